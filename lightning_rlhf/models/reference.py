"""The reference policy π_ref."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_rlhf.models.policy import PolicyModel


class Reference:
    """Reference policy π_ref: a frozen network of its own or the policy with its adapter off.

    Args:
        policy: which may hold an adapter.
        frozen: the network; None turns the policy's adapter off.
    """

    def __init__(self, policy: PolicyModel, frozen: PolicyModel | None) -> None:
        self.policy = policy
        self.frozen = frozen

    @contextmanager
    def model(self) -> Iterator[PolicyModel]:
        """Context that yields the model that is π_ref."""
        if self.frozen is not None:
            yield self.frozen
            return
        with self.policy.reference():
            yield self.policy
