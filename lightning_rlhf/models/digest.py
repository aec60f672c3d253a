"""Digest that identifies the weights of a built network."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from lightning_rlhf.models.adapter import is_adapted, sampled


@torch.no_grad()
def weights_digest(network: nn.Module) -> str:
    """Return a digest of up to 64 numbers of each parameter; for an adapted network, of its base.

    Those of the base are what the reference of the RL stage is made of, and training an adapter leaves them as they
    are.
    """
    digest, adapted = hashlib.sha256(), is_adapted(network)
    for name, weight in network.named_parameters():
        if weight.is_meta or (adapted and weight.requires_grad):
            continue
        digest.update(name.encode() + sampled(weight).double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
