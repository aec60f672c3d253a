"""What an evaluation is: numbers of each held-out prompt or text, and what all of them together say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.rewards import Reward, Scores
from lightning_rlhf.types import PromptBatch, Rollout, TextBatch

Columns = dict[str, Tensor]
"""Numbers by name, of each prompt or text: (B,), or (B, k) for k responses of the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What there is to know of a batch of B held-out prompts.

    Attributes:
        prompts: the batch; its `counts` says which rows count.
        policy: one response of the policy to each, with log π and log π_ref.
        scores: of these, after shaping, (B,), reward units.
        reference: K responses of the reference to each, in consecutive rows; None if no evaluation reads any.
        reference_scores: of these, after shaping, (B, K).
        tokenizer: for text; None if the policy has none.
        score: `(reward, rollout)` to the scores of another reward, agreed on by all processes.
        agreed: whether something is true on every process.
    """

    prompts: PromptBatch
    policy: Rollout
    scores: Tensor
    reference: Rollout | None
    reference_scores: Tensor
    tokenizer: PreTrainedTokenizerBase | None
    score: Callable[[Reward, Rollout], Scores]
    agreed: Callable[[bool], bool]

    def of_reference(self, samples: int) -> Rollout:
        """The first `samples` responses of the reference to each prompt."""
        drawn = torch.arange(len(self.reference), device=self.reference.tokens.device)
        return self.reference.select(drawn.view(len(self.scores), -1)[:, :samples].flatten())


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What there is to know of a batch of B held-out texts.

    Attributes:
        texts: the batch.
        logprobs: log π of its tokens 1 .. L−1, (B, L − 1), nats, 0 where a token does not count.
        reference: measures the same of the reference; of a sharded one all processes must ask.
    """

    texts: TextBatch
    logprobs: Tensor
    reference: Callable[[], Tensor]


class Evaluator(ABC):
    """An evaluation of the policy against its reference.

    It takes notes of each batch and concludes from the notes of all batches and processes, so that it needs no
    collective of its own and does not depend on who held which row.
    """

    name: str
    """What its logged names begin with; no two evaluations of a module may share it."""
    serves = "prompts"  # bare: jsonargparse reads a base's annotations with the names of the subclass's module
    """Which held-out data it is of, `prompts` or `texts`."""

    @property
    def reference_samples(self) -> int:
        """K, responses of the reference to each prompt that it reads."""
        return 0

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """Rewards of its own, which the module prepares and moves."""
        return ()

    def of_answers(self, answers: Answers) -> Columns:
        """Notes of B prompts, float or int; only those of rows that count are kept."""
        raise NotImplementedError(f"{type(self).__name__} is not of prompts")

    def of_texts(self, texts: Texts) -> Columns:
        """Notes of B texts."""
        raise NotImplementedError(f"{type(self).__name__} is not of texts")

    @abstractmethod
    def conclude(self, notes: Columns) -> dict[str, float]:
        """What to log, by name.

        Args:
            notes: of all N ≥ 1 prompts or texts, in the order of the file, float64 on the CPU.
        """

    def adapted(self, notes: Columns) -> Self:
        """The evaluator of the next validation of the same run; itself unless it remembers."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Itself: it never changes, and averaging callbacks, which copy the module, need no second gold reward."""
        return self
