"""Detection of networks whose logits are a linear map of their hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RANGE = 100.0
"""Range of the substituted logits: wide enough to show a cap."""


@torch.no_grad()
def is_linear(network: nn.Module, backbone: nn.Module, head: nn.Linear, tokens: Tensor) -> bool:
    """Return True if the logits are `head` applied to the states of `backbone`: some networks scale or cap them.

    States and logits of our own replace the network's during the check. Otherwise they may be 0 for every token, or so
    small that a cap leaves them as they are.

    Args:
        network: a causal language model, bare or in an adapter.
        backbone: the transformer in it.
        head: its output embedding.
        tokens: to run it on, (1, L), int64.
    """
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    alone = getattr(backbone(**inputs), "last_hidden_state", None)
    if alone is None:
        return False
    states = torch.linspace(-1, 1, alone.numel()).view(alone.shape).to(alone)
    logits = torch.linspace(-RANGE, RANGE, head.out_features).expand(*alone.shape[:2], -1).to(states)
    same = []

    def replace_states(_: nn.Module, __: Any, output: Any) -> Any:
        same.append(torch.equal(output.last_hidden_state, alone))
        output.last_hidden_state = states
        return output

    def replace_logits(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        same.append(bool(given) and torch.equal(given[0].to(states), states))
        return logits.to(output)

    hooks = [backbone.register_forward_hook(replace_states), head.register_forward_hook(replace_logits)]
    try:
        whole = network(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    return same == [True, True] and torch.equal(whole, logits.to(whole))
