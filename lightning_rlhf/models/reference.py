"""Reference policy of the KL penalty and of log-ratios."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.models.replica import sharded_as, whole_tensor


class Reference:
    """Reference policy π_ref: a frozen network of its own or the policy with its adapter off.

    Args:
        policy: which may hold an adapter.
        frozen: the network; None turns the policy's adapter off.

    Attributes:
        version: number of times that the weights have changed, for whoever keeps what they said.
    """

    def __init__(self, policy: PolicyModel, frozen: PolicyModel | None) -> None:
        self.policy = policy
        self.frozen = frozen
        self.version = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        """Copy the reference but share its own network, because averaging callbacks copy the module."""
        clone = Reference(copy.deepcopy(self.policy, memo), self.frozen)
        clone.version = self.version
        return clone

    @contextmanager
    def model(self) -> Iterator[PolicyModel]:
        """Context that yields the model that is π_ref."""
        if self.frozen is not None:
            yield self.frozen
            return
        with self.policy.reference():
            yield self.policy

    def check_movable(self) -> None:
        """Raise unless the reference is a network of its own with the policy's parameters.

        Raises:
            ValueError: it is the policy with its adapter off, its parameters have other names or shapes, or DeepSpeed's
                ZeRO stage 3 shards them.
        """
        if self.frozen is None:
            raise ValueError(
                "the reference is the policy with its adapter off, which has no weights of its own to move: train "
                "without `peft`, or leave MovingReference out"
            )
        mine, theirs = _shapes(self.frozen), _shapes(self.policy)
        if mine != theirs:
            name = next(name for name in [*mine, *theirs] if mine.get(name) != theirs.get(name))
            raise ValueError(
                f"the reference cannot move towards a policy of another architecture: `{name}` is "
                f"{mine.get(name, 'absent')} in the reference and {theirs.get(name, 'absent')} in the policy; leave "
                "`reference` out to take a copy of the policy, or leave MovingReference out"
            )
        if any(hasattr(weight, "ds_id") for weight in self.policy.parameters()):
            raise ValueError(
                "MovingReference cannot mix weights that DeepSpeed's ZeRO stage 3 shards: take stage 2, or shard with "
                "ModelParallelStrategy (configs/strategy/fsdp2.yaml)"
            )

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        """π_ref ← α·π_θ + (1 − α)·π_ref, weight by weight (the soft update of Gorbatovski et al. 2024).

        It is computed in float32 at least and rounded to the reference's dtype. Shards are mixed where they are.

        Args:
            alpha: α in (0, 1].
        """
        towards = dict(self.policy.named_parameters())
        for name, weight in self._weights().items():
            dtype = torch.promote_types(torch.promote_types(weight.dtype, towards[name].dtype), torch.float32)
            weight.copy_(alpha * towards[name].to(dtype) + (1 - alpha) * weight.to(dtype))
        self.version += 1

    def state(self) -> dict[str, Tensor]:
        """Unsharded weights in main memory by name; empty if they never changed.

        All processes must call this if the weights are sharded.
        """
        return self.weights() if self.version else {}

    def weights(self) -> dict[str, Tensor]:
        """Copy of the unsharded weights in main memory by name; of sharded ones all processes must ask."""
        return {name: whole_tensor(weight).cpu().clone() for name, weight in self._weights().items()}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of `state`.

        Raises:
            ValueError: they are of another network.
        """
        own = self._weights()
        if {name: weight.shape for name, weight in own.items()} != {n: tensor.shape for n, tensor in weights.items()}:
            raise ValueError(
                "the checkpoint's reference, which MovingReference had moved, has other parameters than this run's: "
                "take the `policy` and `reference` of that run"
            )
        for name, weight in own.items():
            weight.copy_(sharded_as(weight, weights[name]))
        self.version += 1

    def _weights(self) -> dict[str, nn.Parameter]:
        """Parameters of the reference's own network by name."""
        return {} if self.frozen is None else dict(self.frozen.named_parameters())


def _shapes(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in network.named_parameters()}
