"""Held-out prompts: generate, score, compare with the reference. Held-out texts: next-token loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rlhf.models.limits import check_length
from lightning_rlhf.modules.tally import Tally
from lightning_rlhf.rollout import Scores
from lightning_rlhf.types import PromptBatch, Rollout, TextBatch

if TYPE_CHECKING:
    from lightning_rlhf.modules.ppo import PPOModule


def observe(tally: Tally, rollout: Rollout, scores: Scores, counts: Tensor, prefix: str) -> None:
    """Add what a rollout says of the objective (Ouyang et al. 2022, eq. 2).

    Args:
        tally: takes the means.
        rollout: B responses.
        scores: (B,), reward units, and their parts.
        counts: rows that count, (B,), bool.
        prefix: of the names.
    """
    log_ratio = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    tally.add(f"{prefix}/kl", log_ratio, counts)
    tally.add(f"{prefix}/entropy", -rollout.logprobs.sum(1), counts)
    tally.add(f"{prefix}/response_length", rollout.lengths.to(scores.total), counts)
    tally.add(f"{prefix}/eos_rate", rollout.ended.to(scores.total), counts)
    tally.add(f"{prefix}/scores", scores.total, counts)
    for name, part in scores.parts.items():
        tally.add(f"{prefix}/scores/{name}", part, counts)


class Evaluation:
    """Validation, test and prediction of a `PPOModule`, with random numbers of their own.

    Args:
        module: whose policy, reward and reference.
    """

    def __init__(self, module: PPOModule) -> None:
        self.module, self.tally = module, Tally()

    def begin(self) -> None:
        """Forget what an interrupted evaluation took in."""
        self.tally = Tally()

    @torch.no_grad()
    def step(self, batch: PromptBatch | TextBatch, batch_idx: int) -> None:
        """Take in a batch of prompts, or of texts."""
        if isinstance(batch, PromptBatch):
            rollout, scores = self._rollout(batch, batch_idx)
            observe(self.tally, rollout, scores, batch.counts, "")
            return
        logprobs = self.module.policy(batch.tokens, batch.mask, width=batch.tokens.shape[1] - 1).logprobs
        self.tally.add("/ptx_loss", -logprobs, batch.target[:, 1:])

    def log(self, stage: str) -> None:
        """Log the means over all processes as `stage/name` and begin anew; `stage/reward` is the mean score."""
        means = self.tally.means(self.module.all_sum)
        named = {stage + name.replace("/scores", "/reward", 1): value for name, value in means.items()}
        self.module.log_dict(named, sync_dist=True)

    @torch.no_grad()
    def predict(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per prompt that counts."""
        module = self.module
        rollout, scores = self._rollout(batch, batch_idx)
        kl = (rollout.logprobs - rollout.ref_logprobs).sum(1).tolist()
        texts = rollout.tokens[:, rollout.prompt_width :].tolist()
        records = []
        for i in batch.counts.nonzero().flatten().tolist():
            tokens = texts[i][: int(rollout.lengths[i])]
            text = tokens if module.tokenizer is None else module.tokenizer.decode(tokens, skip_special_tokens=True)
            measured = {"response": text, "score": float(scores.total[i]), "kl": kl[i]}
            measured |= {f"score/{name}": float(part[i]) for name, part in scores.parts.items()}
            measured |= {"length": len(tokens), "ended": bool(rollout.ended[i])}
            records.append(dict(batch.rows[i]) | measured)
        return records

    def _rollout(self, batch: PromptBatch, batch_idx: int) -> tuple[Rollout, Scores]:
        longest = batch.tokens.shape[1] + self.module.generation.max_new_tokens
        check_length(self.module.policy.network, longest, limits="the data's `max_prompt_tokens` or `max_new_tokens`")
        rollout = self.module.roll_out(batch, 1, stream="eval", iteration=batch_idx)
        return rollout, self.module.score(rollout, batch)
