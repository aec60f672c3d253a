"""Canary of a transfer of weights: log-probs of a fixed text, server against trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.engines.engine import EngineError
from lightning_rlhf.models.limits import rows_of
from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.types import TextBatch

TEXT = (
    "Once upon a time a small boat lay in the harbor, and the people who lived beside it used to say that it would "
    "sail away by itself if nobody looked."
)
WITHOUT_TOKENIZER = 32
"""Tokens of the text of a policy without a tokenizer, spread over its vocabulary."""
LONGEST = 64
FLOOR = 1e-4
"""Smallest bound, nats per token: what float32 leaves."""
LIMIT = 0.5
"""Largest mean difference at the first transfer, nats per token: more is another model or another precision."""
KEPT = 8
"""Earlier transfers whose log-probs are remembered."""
SLACK = 3.0
"""Bound in multiples of the difference at the first transfer."""


def canary_tokens(policy: PolicyModel) -> list[int]:
    """Return the tokens of the fixed text, at most `LONGEST`."""
    if policy.tokenizer is not None:
        return list(policy.tokenizer(TEXT, add_special_tokens=False)["input_ids"])[:LONGEST]
    rows = rows_of(policy.network) or WITHOUT_TOKENIZER
    spread = torch.linspace(0, rows - 1, WITHOUT_TOKENIZER).long().tolist()
    return [token for token in spread if token not in policy.end_tokens]  # whose embedding may be 0


@torch.no_grad()
def trainer_logprobs(policy: PolicyModel, tokens: list[int]) -> Tensor:
    """Return log π of tokens 1 .. L − 1 as the trainer computes them.

    Args:
        policy: of a sharded one, all processes must call this.
        tokens: L of them.

    Returns:
        (L − 1,), float64, on the CPU, nats.
    """
    row = torch.tensor([tokens], device=next(policy.parameters()).device)
    target = torch.ones_like(row, dtype=torch.bool)
    target[:, 0] = False
    return policy.text_logprobs(TextBatch(row, torch.ones_like(target), target))[0].double().cpu()


class Canary:
    """Bound on the difference between server and trainer, measured at the first transfer.

    A transfer is lost if the server's log-probs are farther from the trainer's than the bound, or if they are to the
    bit those of earlier weights while the trainer's have changed.

    Args:
        tolerance: the bound, nats per token; None measures it.
    """

    def __init__(self, tolerance: float | None) -> None:
        self.bound = tolerance
        self._seen: list[tuple[int, Tensor, Tensor]] = []

    def check(self, server: Tensor, trainer: Tensor, *, weights: int, url: str) -> float:
        """Check the log-probs and return their mean difference in nats per token.

        Args:
            server: log-probs of the fixed text, (L − 1,), float64.
            trainer: the same by the trainer.
            weights: fingerprint of those that were sent.
            url: of the server, for the message.

        Raises:
            EngineError: the server does not have the weights that were sent.
        """
        apart = float((server - trainer).abs().mean())
        if self.bound is None and not apart <= LIMIT:
            raise EngineError(
                f"the vLLM server at {url} does not compute what the trainer does: log-probs of a fixed text differ by "
                f"{apart:.3g} nats per token after the first transfer of weights. Serve the policy's own folder (same "
                "architecture, same tokenizer) and in the precision of the training"
            )
        if self.bound is None:
            self.bound = max(SLACK * apart, FLOOR)
        if not apart <= self.bound:
            raise EngineError(
                f"the vLLM server at {url} does not have the weights that were sent: log-probs of a fixed text differ "
                f"by {apart:.3g} nats per token, the bound is {self.bound:.3g}. See the server's log; restart it and "
                "resume the run, or set `tolerance` if the server's precision explains the difference"
            )
        for former, before, trained in self._seen:
            if former != weights and torch.equal(before, server) and not torch.equal(trained, trainer):
                raise EngineError(
                    f"the vLLM server at {url} still has earlier weights: its log-probs of a fixed text are to the bit "
                    "those before the transfer. See the server's log; restart it and resume the run"
                )
        self._seen = [*self._seen[1 - KEPT :], (weights, server, trainer)]
        return apart
