"""A module's evaluations: serves each the held-out data, brings the notes of all processes together, and concludes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_rlhf.modules.evaluator import Answers, Columns, Evaluator, Texts
from lightning_rlhf.modules.gathering import gathered
from lightning_rlhf.modules.reference_answers import ReferenceAnswers
from lightning_rlhf.rollout import Reward, Scores
from lightning_rlhf.rollout.failure import scored_or_told
from lightning_rlhf.types import PromptBatch, Rollout, TextBatch

if TYPE_CHECKING:
    from lightning_rlhf.modules.ppo import PPOModule

NEEDS = {"prompts": "held-out prompts: set the data's `val` or `test`", "texts": "texts: set the data's `val_pretrain`"}


class Panel:
    """Runs evaluators beside a module's own evaluation.

    Random numbers are those of a stream of their own, and nothing here moves what training reads.

    Args:
        module: whose policy, reference and reward.
        evaluators: in the order in which they log.

    Raises:
        ValueError: two of them have one name.
    """

    def __init__(self, module: PPOModule, evaluators: Sequence[Evaluator]) -> None:
        names = [evaluator.name for evaluator in evaluators]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"`evaluations` must have different names: got {twice} twice; set `name` of one")
        self.module, self.given = module, tuple(evaluators)
        self.current = self.given
        self._notes: list[list[tuple[Tensor, Columns]]] = []
        self._reference = ReferenceAnswers(module)

    def networks(self) -> list[nn.Module]:
        """Those of the evaluators' own rewards, built now."""
        for reward in self._rewards():
            reward.prepare(self.module.tokenizer)
        return [network for reward in self._rewards() for network in reward.networks()]

    def begin(self) -> None:
        """Forget what an interrupted evaluation took in."""
        self._notes = [[] for _ in self.given]
        for reward in self._rewards():
            for network in reward.networks():
                network.to(self.module.device)

    def prompts(self, batch: PromptBatch, batch_idx: int, rollout: Rollout, scores: Scores) -> None:
        """Take in a batch of prompts with the policy's responses."""
        present = self._of("prompts")
        if not present:
            return
        answers = self._answers(batch, batch_idx, rollout, scores)
        for number, evaluator in present:
            self._note(number, evaluator.of_answers(answers), batch.counts, batch_idx)

    def texts(self, batch: TextBatch, batch_idx: int, logprobs: Tensor) -> None:
        """Take in a batch of texts with the policy's log-probs, (B, L − 1)."""
        texts = Texts(texts=batch, logprobs=logprobs, reference=partial(self._reference_logprobs, batch))
        for number, evaluator in self._of("texts"):
            self._note(number, evaluator.of_texts(texts), batch.target.any(1), batch_idx)

    def conclude(self) -> dict[str, float]:
        """What all evaluations say, by name; those of a training run remember it.

        Raises:
            ValueError: the data served nothing that an evaluation is of.
        """
        found: dict[str, float] = {}
        trainer, successors = self.module.trainer, []
        training = trainer.state.fn == "fit"
        for evaluator, batches in zip(self.current if training else self.given, self._notes, strict=True):
            notes = gathered(self.module, batches)
            if notes is None:
                raise ValueError(f"{type(evaluator).__name__} needs {NEEDS[evaluator.serves]}; or leave it out")
            found |= evaluator.conclude(notes)
            successors.append(evaluator.adapted(notes))
        if training and not trainer.sanity_checking:
            self.current = tuple(successors)
        return found

    def _of(self, served: str) -> list[tuple[int, Evaluator]]:
        return [(number, each) for number, each in enumerate(self.current) if each.serves == served]

    def _rewards(self) -> list[Reward]:
        return [reward for evaluator in self.given for reward in evaluator.rewards]

    def _note(self, number: int, columns: Columns, counts: Tensor, batch_idx: int) -> None:
        """Keep the rows that count, with their place in the file."""
        world, rank = self.module.trainer.world_size, self.module.trainer.global_rank
        places = batch_idx * 2**32 + torch.arange(len(counts)) * world + rank
        counts = counts.cpu()
        kept = {name: column.detach().cpu()[counts].double() for name, column in columns.items()}
        self._notes[number].append((places[counts], kept))

    def _answers(self, batch: PromptBatch, batch_idx: int, rollout: Rollout, scores: Scores) -> Answers:
        samples = max(evaluator.reference_samples for evaluator in self.current)
        reference, theirs = None, scores.total.new_zeros(len(scores.total), 0)
        if samples:
            reference, theirs = self._reference(batch, batch_idx, samples=samples)
        return Answers(
            prompts=batch,
            policy=rollout,
            scores=scores.total,
            reference=reference,
            reference_scores=theirs,
            tokenizer=self.module.tokenizer,
            score=partial(self._scored_by, batch, batch_idx),
            agreed=self.module.agreed,
        )

    def _scored_by(self, batch: PromptBatch, batch_idx: int, reward: Reward, rollout: Rollout) -> Scores:
        rows = [batch.rows[i] for i in rollout.groups.tolist()]
        return scored_or_told(reward, rollout, rows, agreed=self.module.agreed, iteration=batch_idx)

    def _reference_logprobs(self, batch: TextBatch) -> Tensor:
        policy, frozen = self.module.policy, self.module.collector.reference
        wanted, width = batch.target[:, 1:], batch.tokens.shape[1] - 1
        with policy.reference() if frozen is None else nullcontext():
            return (policy if frozen is None else frozen)(batch.tokens, batch.mask, width=width, wanted=wanted)
