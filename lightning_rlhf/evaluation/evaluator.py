"""Interface of evaluators: numbers per held-out prompt or text and metrics of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.rewards import Reward, Scores
from lightning_rlhf.types import PromptBatch, Rollout, TextBatch

Columns = dict[str, Tensor]
"""Numbers by name, of each prompt or text: (B,), or (B, k) for k responses of the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Responses to a batch of B held-out prompts with their scores.

    Attributes:
        prompts: the batch; its `counts` says which rows count.
        policy: one response of the policy to each, with log π and log π_ref.
        scores: of these, after shaping, (B,), reward units.
        reference: K responses of the reference to each, in consecutive rows; None if no evaluation reads any.
        reference_scores: of these, after shaping, (B, K).
        several: N responses of the policy to each, in consecutive rows, not measured; None if no evaluation reads any.
        several_scores: of these, before shaping, (B, N).
        tokenizer: for text; None if the policy has none.
        score: `(reward, rollout)` to the scores of another reward, agreed on by all processes.
        agreed: whether something is true on every process.
    """

    prompts: PromptBatch
    policy: Rollout
    scores: Tensor
    reference: Rollout | None
    reference_scores: Tensor
    several: Rollout | None
    several_scores: Tensor
    tokenizer: PreTrainedTokenizerBase | None
    score: Callable[[Reward, Rollout], Scores]
    agreed: Callable[[bool], bool]

    def of_reference(self, samples: int) -> Rollout:
        """Return the first `samples` responses of the reference to each prompt."""
        reference: Any = self.reference
        drawn = torch.arange(len(reference), device=reference.tokens.device)
        return reference.select(drawn.view(len(self.scores), -1)[:, :samples].flatten())


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Log-probs of a batch of B held-out texts.

    Attributes:
        texts: the batch.
        logprobs: log π of its tokens 1 .. L−1, (B, L − 1), nats, 0 where a token does not count.
        reference: measures the same of the reference; of a sharded one all processes must ask.
    """

    texts: TextBatch
    logprobs: Tensor
    reference: Callable[[], Tensor]


class Evaluator(ABC):
    """Base class of evaluations of the policy against its reference.

    It takes notes of each batch and concludes from the notes of all batches and processes, so that it needs no
    collective of its own and does not depend on the distribution of rows over processes.
    """

    name: str
    """Prefix of its logged names; no two evaluations of a module may share it."""
    serves = "prompts"  # bare: jsonargparse reads a base's annotations with the names of the subclass's module
    """Kind of held-out data it evaluates, `prompts` or `texts`."""

    @property
    def reference_samples(self) -> int:
        """Number K of responses of the reference to each prompt that it reads."""
        return 0

    @property
    def policy_samples(self) -> int:
        """Number N of further responses of the policy to each prompt that it reads."""
        return 0

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """List the evaluator's own rewards, which the module prepares and moves."""
        return ()

    def check_columns(self, names: set[str]) -> None:
        """Raise ValueError if the evaluator needs a column that the data lack; asked before anything is sampled.

        Args:
            names: columns of the records of a batch of prompts.
        """
        for reward in self.rewards:
            reward.check_columns(names)

    def of_answers(self, answers: Answers) -> Columns:
        """Return notes of B prompts, float or int; only those of rows that count are used."""
        raise NotImplementedError(f"{type(self).__name__} is not of prompts")

    def of_texts(self, texts: Texts) -> Columns:
        """Return notes of B texts."""
        raise NotImplementedError(f"{type(self).__name__} is not of texts")

    @abstractmethod
    def conclude(self, notes: Columns) -> dict[str, float]:
        """Return the metrics to log by name.

        Args:
            notes: of all N ≥ 1 prompts or texts, in the order of the file, float64 on the CPU.
        """

    def adapted(self, notes: Columns) -> Self:
        """Return the evaluator of the run's next validation: the same one unless it has a memory."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return the evaluator itself. Because it is immutable, averaging callbacks need no second gold reward."""
        return self
