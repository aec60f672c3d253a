"""Held-out prompts: generate, score, compare with the reference. Held-out texts: next-token loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rlhf.modules.evaluator import Evaluator
from lightning_rlhf.modules.panel import Panel
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
        evaluators: what else validation and test measure.
    """

    def __init__(self, module: PPOModule, evaluators: Sequence[Evaluator] = ()) -> None:
        self.module, self.tally, self.panel = module, Tally(), Panel(module, evaluators)

    def begin(self) -> None:
        """Forget what an interrupted evaluation took in."""
        self.tally = Tally()
        self.panel.begin()

    @torch.no_grad()
    def step(self, batch: PromptBatch | TextBatch, batch_idx: int) -> None:
        """Take in a batch of prompts, or of texts."""
        if isinstance(batch, PromptBatch):
            rollout, scores = self._rollout(batch, batch_idx)
            observe(self.tally, rollout, scores, batch.counts, "")
            self.panel.prompts(batch, batch_idx, rollout, scores)
            return
        wanted, width = batch.target[:, 1:], batch.tokens.shape[1] - 1
        logprobs = self.module.policy(batch.tokens, batch.mask, width=width, wanted=wanted)
        self.tally.add("/ptx_loss", -logprobs, wanted)
        self.panel.texts(batch, batch_idx, logprobs)

    def log(self, stage: str) -> None:
        """Log the means over all processes as `stage/name` and begin anew; `stage/reward` is the mean score."""
        means = self.tally.means(self.module.all_sum)
        named = {stage + name.replace("/scores", "/reward", 1): value for name, value in means.items()}
        named |= {f"{stage}/{name}": value for name, value in self.panel.conclude().items()}
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
        rollout = self.module.roll_out(batch, 1, stream="eval", iteration=batch_idx)
        return rollout, self.module.score(rollout, batch)
