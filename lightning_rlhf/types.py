"""Data types that pass through the library, from the data loader to the update.

Shapes: B sequences, P prompt tokens, R response tokens, T actions (R per token, 1 per sequence), L text tokens,
K responses of one prompt. What crosses a data loader is a `NamedTuple` (Lightning moves and casts those); what lives
inside one step is a frozen dataclass. A stage never edits its input, it wraps it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

Row = Mapping[str, Any]
"""One raw record as it stood in the file: the reward sees its columns."""


class PromptBatch(NamedTuple):
    """Batch of prompts, padded on the left so that every response starts at the same column.

    Attributes:
        tokens: (B, P), int64.
        mask: (B, P), bool, True on real tokens.
        is_real: (B,), bool, False on a row repeated only to fill the last evaluation batch of a rank.
        rows: the B raw records.
        name: of the held-out set it belongs to; empty for `val`, `test` and training.
    """

    tokens: Tensor
    mask: Tensor
    is_real: Tensor
    rows: list[Row]
    name: str = ""

    def rows_of(self, rollout: Rollout) -> list[Row]:
        """Return the raw record of the prompt of each response."""
        return [self.rows[i] for i in rollout.prompt_index.tolist()]


class TextBatch(NamedTuple):
    """Batch of texts, padded on the right: demonstrations or pretraining blocks.

    Attributes:
        tokens: (B, L), int64.
        mask: (B, L), bool, True on real tokens.
        target: (B, L), bool, True on tokens whose log-probability counts; never the first. A row without any
            target fills the last evaluation batch of a rank and counts nowhere.
    """

    tokens: Tensor
    mask: Tensor
    target: Tensor


class ComparisonBatch(NamedTuple):
    """K ranked responses to each prompt: prompt + response + end token, padded on the right.

    Attributes:
        tokens: (B, K, L), int64.
        mask: (B, K, L), bool, True on real tokens.
        rank: (B, K), int64, 0 is best, equal ranks are ties, -1 marks an absent response (ragged K). A row
            whose ranks are all equal has no pair and counts nowhere.
        strength: the labeler's rating, (B, K), float32, higher is better, NaN where the data has none.
        systems: who wrote each response, for each prompt K names, or none where its row has none.
        target: tokens of the response with its end token, (B, K, L), bool; None where a batch was made without.
    """

    tokens: Tensor
    mask: Tensor
    rank: Tensor
    strength: Tensor
    systems: Sequence[Sequence[str]] = ()
    target: Tensor | None = None


class LabeledBatch(NamedTuple):
    """Responses with a label, one to each prompt.

    Each is prompt + response + end token, padded on the right.

    Attributes:
        tokens: (B, L), int64.
        mask: (B, L), bool, True on real tokens.
        target: tokens of the response with its end token, (B, L), bool. A row without any target fills the last
            evaluation batch of a rank and counts nowhere.
        good: (B,), bool, True where the response is desirable.
    """

    tokens: Tensor
    mask: Tensor
    target: Tensor
    good: Tensor


class PPOBatch(TypedDict):
    """Batch of the prompt loader: prompts, and pretraining texts if there is a stream (PPO-ptx).

    `next_prompts` are those of the batch after, for an engine that draws ahead.
    """

    prompts: PromptBatch
    next_prompts: NotRequired[PromptBatch]
    pretrain: NotRequired[TextBatch]


class Objectives(NamedTuple):
    """Parts of a reward that is their weighted sum.

    Attributes:
        scores: (B, n), reward units, NaN where a part has no score for a response.
        weights: w, (n,): the reward is Σ_i w_i · scores_i.
    """

    scores: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Responses sampled from π_old with the log-probs of their tokens under π_old and π_ref.

    Attributes:
        tokens: prompt and response, (B, P + R), int64.
        attention_mask: real tokens of both, an environment's included, (B, P + R), bool.
        response_mask: tokens the policy chose, end tokens included, (B, R), bool. True is a prefix of the row, or has
            holes, which an environment wrote.
        ended: the response closed with an end token, (B,), bool.
        prompt_index: which prompt of the batch each response answers, (B,), int64.
        logprobs: log π_old(token | before), (B, R), nats, 0 where `response_mask` is False.
        sampler_logprobs: the same under the weights that drew the token, which may be of lower precision, (B, R), nats.
        ref_logprobs: log π_ref of the same tokens, (B, R), nats.
        entropy: of the next-token distribution that each token was drawn from, (B, R), nats.
        values: V(state before each token), (B, R); zeros where there is no value network.
        rewards: what an environment gave after each token, (B, R), reward units; None without one.
        failed: the environment failed, so that nothing is learned from the response, (B,), bool; None without one.
        logprobs_with_grad: `logprobs` with the graph they came by, where the only update goes on from it; else None.
    """

    tokens: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    ended: Tensor
    prompt_index: Tensor
    logprobs: Tensor
    sampler_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    rewards: Tensor | None = None
    failed: Tensor | None = None
    logprobs_with_grad: Tensor | None = None

    @property
    def prompt_width(self) -> int:
        """Number P of prompt columns, after which responses begin."""
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Tokens that the policy chose in each response, end tokens included, (B,)."""
        return self.response_mask.sum(1)

    @property
    def extents(self) -> Tensor:
        """Tokens of each response with what an environment wrote in it, (B,): `lengths` without one."""
        return self.attention_mask[:, self.prompt_width :].sum(1)

    @property
    def spans(self) -> Tensor:
        """Number of spans that the policy wrote in each response, (B,): turns of a dialogue."""
        before = torch.cat([torch.zeros_like(self.response_mask[:, :1]), self.response_mask[:, :-1]], 1)
        return (self.response_mask & ~before).sum(1)

    @property
    def last_span(self) -> tuple[Tensor, Tensor]:
        """Columns of the response at which its last span begins and ends, (B,) each: all of it without an environment.

        A span is what the policy wrote without interruption; the end is exclusive.
        """
        columns = torch.arange(self.response_mask.shape[1], device=self.tokens.device)
        stop = torch.where(self.response_mask, columns + 1, 0).amax(1)
        foreign = ~self.response_mask & (columns < stop.unsqueeze(1))
        return torch.where(foreign, columns + 1, 0).amax(1), stop

    @property
    def prompt_lengths(self) -> Tensor:
        """Prompt lengths in tokens, (B,)."""
        return self.attention_mask[:, : self.prompt_width].sum(1)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, index: Tensor) -> Rollout:
        """Select the sequences at `index`, (b,), int64; drops columns of only padding."""
        first = self.prompt_width - max(int(self.prompt_lengths[index].max()), 1)
        width = max(int(self.extents[index].max()), 1)
        cut = {
            "tokens": slice(first, self.prompt_width + width),
            "attention_mask": slice(first, self.prompt_width + width),
        }
        parts: dict[str, Any] = {}
        for field in fields(self):
            whole = getattr(self, field.name)
            part = None if whole is None else whole[index]
            parts[field.name] = part if part is None or part.ndim == 1 else part[:, cut.get(field.name, slice(width))]
        return Rollout(**parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """Rollout with its rewards and advantages, the input of the update.

    Attributes:
        rollout: B sequences.
        action_mask: actions that count in a loss, (B, T), bool.
        rewards: of each action, r − β·log(π_old/π_ref), (B, T), reward units, 0 where masked.
        penalties: the part −β·log(π_old/π_ref) of them, (B, T), reward units: large scores round it away.
        advantages: Â, (B, T), reward units.
        returns: targets of the value network, (B, T), reward units.
        kept: actions whose policy loss counts, (B, T), bool, those of `action_mask` or fewer; None where nothing masks.
    """

    rollout: Rollout
    action_mask: Tensor
    rewards: Tensor
    penalties: Tensor
    advantages: Tensor
    returns: Tensor
    kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rollout)

    def select(self, index: Tensor) -> Experience:
        """Select the sequences at `index`, (b,), int64; drops columns of only padding."""
        rollout = self.rollout.select(index)
        width = rollout.response_mask.shape[1]  # T is R, or 1
        whole = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rollout"}
        parts: dict[str, Any] = {name: None if x is None else x[index][:, :width] for name, x in whole.items()}
        return Experience(rollout=rollout, **parts)

    def unlearned(self) -> Experience:
        """Mask all actions, for a process that must run a pass without data to learn from."""
        return replace(self, action_mask=torch.zeros_like(self.action_mask))

    def only(self, rows: Tensor) -> Experience:
        """Mask the actions of other responses than `rows`, (B,), bool."""
        return replace(self, action_mask=self.action_mask & rows[:, None])


class Turn(NamedTuple):
    """Part of an episode that one side wrote.

    Attributes:
        is_policy: whether the policy wrote it, or the environment.
        tokens: its ids.
        reward: what the environment gave for it, reward units; 0 for an environment's.
    """

    is_policy: bool
    tokens: list[int]
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Scored responses for callbacks: a rollout or a batch of an evaluation.

    Attributes:
        rollout: B responses.
        rows: the B records of their prompts.
        raw_scores: of the reward, before the shaping rules, (B,), reward units.
        scores: after them, (B,), reward units.
        parts: what the reward is made of, by name, (B,) each.
        is_real: responses that count, (B,), bool; fillers of an evaluation do not.
        advantages: mean over each response's actions, (B,), reward units, 0 where no loss counts them; None if nothing
            is learned.
        name: of the held-out set; empty for `val`, `test` and training.
    """

    rollout: Rollout
    rows: Sequence[Row]
    raw_scores: Tensor
    scores: Tensor
    parts: Mapping[str, Tensor]
    is_real: Tensor
    advantages: Tensor | None = None
    name: str = ""

    def tokens(self) -> list[list[int]]:
        """Token ids of each response with its end token and what an environment wrote in it."""
        rows, extents = self.rollout.tokens[:, self.rollout.prompt_width :].tolist(), self.rollout.extents.tolist()
        return [row[:extent] for row, extent in zip(rows, extents, strict=True)]

    def turns(self) -> list[list[Turn]]:
        """Turns of each response in their order, of the policy and of the environment; one without an environment."""
        rollout = self.rollout
        rewards = torch.zeros_like(rollout.logprobs) if rollout.rewards is None else rollout.rewards
        columns = zip(self.tokens(), rollout.response_mask.tolist(), rewards.tolist(), strict=True)
        return [_turns(ids, own[: len(ids)], given[: len(ids)]) for ids, own, given in columns]

    def numbers(self) -> list[dict[str, Any]]:
        """Return the numbers of each response, ready for JSON: None replaces non-finite ones.

        kl = Σ_t log π_old − log π_ref and entropy = −Σ_t log π_old, nats; length in tokens.
        """
        rollout = self.rollout
        columns = {"length": rollout.lengths, "ended": rollout.ended, "raw_score": self.raw_scores}
        columns |= {"score": self.scores} | {f"score/{name}": part for name, part in self.parts.items()}
        columns |= {"kl": (rollout.logprobs - rollout.ref_logprobs).sum(1), "entropy": -rollout.logprobs.sum(1)}
        columns |= {} if self.advantages is None else {"advantage": self.advantages}
        lists = {name: column.tolist() for name, column in columns.items()}
        finite = {name: [x if math.isfinite(x) else None for x in values] for name, values in lists.items()}
        return [dict(zip(finite, row, strict=True)) for row in zip(*finite.values(), strict=True)]


def _turns(ids: list[int], own: list[bool], rewards: list[float]) -> list[Turn]:
    """Divide a response where the writer changes."""
    bounds = [0, *(i for i in range(1, len(ids)) if own[i] != own[i - 1]), len(ids)]
    parts = [slice(*pair) for pair in pairwise(bounds) if pair[0] < pair[1]]
    return [Turn(own[part.start], ids[part], sum(rewards[part])) for part in parts]
