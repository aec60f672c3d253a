"""Rewards from a function of text, a module on token ids or a trained reward model."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.models import ScalarModel, score_at_end
from lightning_rlhf.models.adapter import is_adapted
from lightning_rlhf.rewards.concurrent import in_loop
from lightning_rlhf.rewards.text import check_needed, columns_of, decoded, wanted_by
from lightning_rlhf.types import Objectives, Rollout, Row


class Scores(NamedTuple):
    """Scores of a rollout with the parts they are made of.

    Attributes:
        total: r_φ(x, y), (B,), reward units.
        parts: what it is made of, by name, (B,) each: for logs only.
        raw: the total before shaping rules, (B,); None if none were applied.
        answered: responses that the reward scored, (B,), bool, the others' total is NaN; None if it scored all.
        objectives: what the raw total is a weighted sum of; None if it is no such sum.
    """

    total: Tensor
    parts: dict[str, Tensor]
    raw: Tensor | None = None
    answered: Tensor | None = None
    objectives: Objectives | None = None

    def complete(self, rows: Sequence[Row], *, source: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the total once every response has one that is finite, (B,).

        Args:
            rows: the B raw records, for the error.
            source: whose scores they are, for the error.
            dtype: in which they will be used, where it is known.

        Raises:
            TypeError: the total is no numbers.
            ValueError: a response has no score, or its score is not finite.
        """
        if self.answered is not None and not self.answered.all():
            first = int((~self.answered).nonzero()[0])
            raise ValueError(
                f"the reward {source} has no score for response {first}: it is None (not its task), in each part where "
                f"it has parts. Leave the row out, give it the column that a reward reads, or add to a WeightedReward "
                f"one that scores it; the row is {str(dict(rows[first]))[:200]}"
            )
        return checked_scores(self.total, count=len(rows), source=source, dtype=dtype)


class Reward(ABC):
    """Reward r_φ(x, y) of every response of a rollout."""

    tokenizer: PreTrainedTokenizerBase | None = None
    """The policy's tokenizer, available after `prepare`."""

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Build networks; called once before training.

        Args:
            tokenizer: the policy's; None if the policy was built without one.
        """
        self.tokenizer = tokenizer

    def identity(self) -> dict[str, Any]:
        """Describe what decides the scores; a resumed run must have the same identity.

        The value is taken before `prepare`.
        """
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {name: value for name, value in public.items() if name != "tokenizer"}

    @property
    def is_learned(self) -> bool:
        """Return True if it contains a reward model, whose demonstrations have scores around 0."""
        held = [value for x in vars(self).values() for value in (x.values() if isinstance(x, dict) else [x])]
        return any(value.is_learned for value in held if isinstance(value, Reward))

    def check_columns(self, names: set[str]) -> None:  # noqa: B027
        """Raise ValueError if the reward needs a column that the data lack.

        Args:
            names: columns of the records.
        """

    def networks(self) -> list[nn.Module]:
        """List the frozen networks to move and cast with the module; its checkpoints leave them out."""
        return []

    @abstractmethod
    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return the scores before any KL penalty, (B,), in reward units.

        Args:
            rollout: B responses.
            rows: the B raw records their prompts came from.
        """

    def scored(self, rollout: Rollout, rows: Sequence[Row]) -> Scores:
        """Return the scores with the parts they are made of; a simple reward has no parts.

        A reward that leaves responses to others overrides this and says in `answered` which it scored.
        """
        return Scores(self(rollout, rows), {})


class TextReward(Reward):
    """Base class of rewards of text; subclasses implement `score`."""

    @abstractmethod
    def score(
        self, prompts: list[Any], responses: list[str], /, **columns: list[Any]
    ) -> Sequence[float | None] | Tensor:
        """Return one number per response, or None where the response is not the reward's task.

        `WeightedReward` sums over the rewards that gave a number.

        Args:
            prompts: text or messages, as in the data.
            responses: text without special tokens.
            columns: every other column of the records, by name; one called `prompts` or `responses` is left out.
        """

    def check_columns(self, names: set[str]) -> None:
        """Raise ValueError if an argument of the reward without a default is no column of the data."""
        check_needed(self._asked(), names, texts=2, source=f"`reward`: {self._name()}")

    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return the scores, (B,), float32; NaN where `score` returned None.

        Raises:
            ValueError: there is no tokenizer, or `score` returned another count, or something that is not finite.
            TypeError: `score` returned no numbers.
        """
        columns = columns_of(rows, but={"prompt", "prompts", "responses"})
        scores = self.score([row.get("prompt") for row in rows], self.responses(rollout), **columns)
        return _scores_with_gaps(scores, count=len(rollout), source=self._name()).to(rollout.tokens.device)

    def scored(self, rollout: Rollout, rows: Sequence[Row]) -> Scores:
        """Return the scores and which responses have one; it has no parts."""
        total = self(rollout, rows)
        return Scores(total, {}, answered=~total.isnan())

    def responses(self, rollout: Rollout) -> list[str]:
        """Decode the responses without special tokens.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self._name()} scores text, but there is no tokenizer: pass PPOModule(tokenizer=...)")
        return decoded(rollout, self.tokenizer)

    def _asked(self) -> Callable[..., Any]:
        """Return the function whose arguments are columns."""
        return self.score

    def _name(self) -> str:
        return type(self).__name__


class FunctionReward(TextReward):
    """Reward by a Python function `fn(prompts, responses, **columns)`, plain or `async def`.

    An `async def` function runs in an event loop in a thread of its own, new for each rollout and closed after it.
    `PerResponse` calls a function of one response.

    Args:
        fn: returns one number per response, or None where it is not its task. It gets the columns it names, or all of
            them if it takes `**kwargs`.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        try:
            self._wanted = wanted_by(fn, texts=2)
        except ValueError as error:
            raise TypeError(f"`reward`: {fn!r} has no signature; wrap it in def fn(prompts, responses): ...") from error

    def score(
        self, prompts: list[Any], responses: list[str], /, **columns: list[Any]
    ) -> Sequence[float | None] | Tensor:
        """Return the result of the function."""
        result = self.fn(prompts, responses, **{name: x for name, x in columns.items() if name in self._wanted})
        return in_loop(lambda: result) if inspect.iscoroutine(result) else result

    def _asked(self) -> Callable[..., Any]:
        return self.fn

    def _name(self) -> str:
        return getattr(self.fn, "__qualname__", type(self.fn).__name__)


class ModuleReward(Reward):
    """Reward by a module on the policy's token ids: `module(tokens, mask)` gives (B,) scores.

    Args:
        module: an `nn.Module`, for example a `RewardModule`; tokens are padded left and right, `mask` says which are
            real. A transformers sequence-classification model is read at the last real token, whatever its padding id.
    """

    def __init__(self, module: nn.Module) -> None:
        module = ScalarModel(module) if isinstance(module, PreTrainedModel) or is_adapted(module) else module
        self.module = module.eval().requires_grad_(False)

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Build the layers of a LightningModule that defers them."""
        super().prepare(tokenizer)
        if isinstance(self.module, LightningModule):
            self.module.configure_model()
            self.module.eval().requires_grad_(False)

    def networks(self) -> list[nn.Module]:
        """List the wrapped module as the only frozen network."""
        return [self.module]

    @torch.no_grad()
    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return the scores, (B,), float32.

        Raises:
            ValueError: the module returned another shape, or something that is not finite; or prompts have no tokens.
        """
        check_prompts(rollout, source=type(self.module).__name__)
        output = self.module(rollout.tokens, rollout.attention_mask)
        scores = score_at_end(output, rollout.attention_mask) if isinstance(self.module, ScalarModel) else output
        return checked_scores(scores, count=len(rollout), source=type(self.module).__name__)


def check_prompts(rollout: Rollout, *, source: str) -> None:
    """Check that a rollout holds the tokens of prompt and response.

    Raises:
        ValueError: there are none of the prompt, as where a log was read without a tokenizer.
    """
    if rollout.prompt_width == 0:
        raise ValueError(
            f"the reward {source} reads token ids, but those of the prompts are not known: name the policy's tokenizer"
        )


def checked_scores(scores: Any, *, count: int, source: str, dtype: torch.dtype | None = None) -> Tensor:
    """Convert scores to a float tensor, (count,), and check them.

    Args:
        scores: what a reward returned.
        count: how many are needed.
        source: whose they are, for the error.
        dtype: in which they will be used, where it is known: each must be finite in it.

    Raises:
        TypeError: they are no numbers.
        ValueError: their count is not `count`, or one is NaN or infinite.
    """
    try:
        values = torch.as_tensor(scores)
        values = values if values.dtype == torch.float64 else values.float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"the reward {source} must return {count} numbers: got {type(scores).__name__}: {str(scores)[:80]}"
        ) from error
    if values.shape != (count,):
        raise ValueError(
            f"the reward {source} must return one number per response: got {tuple(values.shape)} for {count}"
        )
    used = values if dtype is None else values.to(dtype)
    if not used.isfinite().all():
        first = int((~used.isfinite()).nonzero()[0])
        raise ValueError(
            f"the reward {source} returned {values[first].item()} for response {first}: return numbers that are finite "
            f"in {str(used.dtype).removeprefix('torch.')}"
        )
    return values


def _scores_with_gaps(scores: Any, *, count: int, source: str) -> Tensor:
    """Convert scores as `checked_scores` does, and each None to NaN. A number that is NaN is refused."""
    if not isinstance(scores, list | tuple):
        return checked_scores(scores, count=count, source=source)
    gaps = torch.tensor([score is None for score in scores], dtype=torch.bool)
    values = checked_scores([0.0 if score is None else score for score in scores], count=count, source=source)
    return values.masked_fill(gaps, torch.nan)


def as_reward(reward: Reward | nn.Module | Callable[..., Any]) -> Reward:
    """Return the reward unchanged, or wrap a module or a function in one.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, nn.Module):
        return ModuleReward(reward)
    if callable(reward):
        return FunctionReward(reward)
    raise TypeError(
        f"`reward` must be a Reward, an nn.Module or a function fn(prompts, responses, **columns): "
        f"got {type(reward).__name__}"
    )
