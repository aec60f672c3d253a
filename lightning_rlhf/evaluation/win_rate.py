"""Win rate of the policy's response by the reward or a judge, also at equal lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.core import length_controlled, standard_error
from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.evaluation.evaluator import Answers, Columns, Evaluator
from lightning_rlhf.rewards.errors import on_all
from lightning_rlhf.rewards.text import check_needed, columns_of, decoded, wanted_by
from lightning_rlhf.types import Row


@dataclass(frozen=True, kw_only=True)
class WinRate(Evaluator):
    """Win rate P(the policy's response is preferred to one of the reference to the same held-out prompt).

    Logs `win_rate` and its standard error `win_rate_se` over prompts; `win_rate_length_controlled`, the win rate at
    equal lengths (`core.length_controlled`, Dubois et al. 2024 without their term for an instruction's difficulty);
    `win_rate_length_difference`, policy less reference, tokens. A judge is asked twice, each response standing first
    once, and the mean counts, so that a liking for a position cancels; `win_rate_first` is the mean probability that it
    gives whatever stands first, ½ for a judge that does not look at the order.
    """

    judge: Callable[..., Any] | None = None
    """`fn(prompts, first, second, **columns)`, the probability that the first response is better for each pair (0 to 1,
    ½ for a tie), by object or dotted path; extra columns of the data reach it. None compares the module's scores after
    shaping, ties count half."""
    samples: int = 1
    """Number of reference responses to each prompt; the policy's is compared with every one of them."""
    name: str = "win_rate"
    """Prefix of the logged names; two judges need two names."""

    def __post_init__(self) -> None:
        check_positive(samples=self.samples)

    @property
    def reference_samples(self) -> int:
        """Number of reference responses to each prompt."""
        return self.samples

    def check_columns(self, names: set[str]) -> None:
        """Raise ValueError if an argument of the judge without a default is no column of the data."""
        if self.judge is not None:
            check_needed(self.judge, names, texts=3, source=f"the judge of `{self.name}`")

    def of_answers(self, answers: Answers) -> Columns:
        """Return preferences and differences of length, (B, k) each."""
        lengths = answers.policy.lengths.unsqueeze(1) - answers.of_reference(self.samples).lengths.view(
            -1, self.samples
        )
        if self.judge is not None:
            first, second = self._asked(self.judge, answers)
            return {"preference": (first + second) / 2, "first": (first + 1 - second) / 2, "lengths": lengths}
        ours, theirs = answers.scores.unsqueeze(1), answers.reference_scores[:, : self.samples]
        return {"preference": (ours > theirs).double() + (ours == theirs).double() / 2, "lengths": lengths}

    def conclude(self, notes: Columns) -> dict[str, float]:
        """Average over all pairs; the standard error is that of the prompts' means."""
        preference, lengths = notes["preference"], notes["lengths"]
        of_prompts = preference.mean(1)
        metrics = {
            self.name: float(of_prompts.mean()),
            f"{self.name}_se": standard_error(of_prompts),
            f"{self.name}_length_controlled": length_controlled(preference.flatten(), lengths.flatten()),
            f"{self.name}_length_difference": float(lengths.mean()),
        }
        return metrics | ({f"{self.name}_first": float(notes["first"].mean())} if "first" in notes else {})

    def _asked(self, judge: Callable[..., Any], answers: Answers) -> Tensor:
        """Ask the judge for preferences in both orders, (2, B, k), except about filler rows.

        Raises:
            ValueError: it failed on some process, or there is no tokenizer.
        """
        if answers.tokenizer is None:
            raise ValueError(
                f"the judge of `{self.name}` reads text, but there is no tokenizer: set PPOModule's `tokenizer`"
            )
        ours = decoded(answers.policy, answers.tokenizer)
        theirs = decoded(answers.of_reference(self.samples), answers.tokenizer)
        pairs = answers.prompts.is_real.cpu().repeat_interleave(self.samples).nonzero().flatten()
        of_policy, of_reference = (pairs // self.samples).tolist(), pairs.tolist()
        rows = [answers.prompts.rows[i] for i in of_policy]
        texts = [ours[i] for i in of_policy], [theirs[i] for i in of_reference]
        preferences = torch.zeros(2, len(theirs), dtype=torch.float64)
        ask = partial(judged, judge, rows, *texts)
        preferences[:, pairs] = on_all(ask, agreed=answers.agreed, what=f"the judge of `{self.name}`")
        return preferences.view(2, -1, self.samples).to(answers.scores.device)


def judged(fn: Callable[..., Any], rows: Sequence[Row], first: list[str], second: list[str]) -> Tensor:
    """Probability that `first` is the better response, asked with it in first and in second position.

    Args:
        fn: `fn(prompts, first, second, **columns)`, probabilities that the first is better, one per prompt, ½ for a
            tie; it gets the columns that it names, or all of them if it takes `**kwargs`.
        rows: the N raw records of the prompts.
        first: N responses, text.
        second: N others.

    Returns:
        (2, N), float64; their mean over the two orders is free of a liking for a position that adds to a probability.

    Raises:
        ValueError: the judge has no signature, returned another count, or a number outside [0, 1].
        TypeError: it returned no numbers.
    """
    if not rows:
        return torch.zeros(2, 0, dtype=torch.float64)
    columns = columns_of(rows, but={"prompt", "prompts", "first", "second"})
    wanted, prompts = wanted_by(fn, texts=3), [row.get("prompt") for row in rows]
    asked = {name: column for name, column in columns.items() if name in wanted}
    name = getattr(fn, "__qualname__", type(fn).__name__)
    forward = _checked(fn(prompts, first, second, **asked), count=len(rows), name=name)
    return torch.stack([forward, 1 - _checked(fn(prompts, second, first, **asked), count=len(rows), name=name)])


def _checked(answers: Any, *, count: int, name: str) -> Tensor:
    try:
        values = torch.as_tensor(answers, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(answers).__name__}: {str(answers)[:80]}"
        raise TypeError(f"the judge {name} must return {count} numbers: got {got}") from error
    if values.shape != (count,):
        raise ValueError(f"the judge {name} must return one number per pair: got {tuple(values.shape)} for {count}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        odd = values[~((values >= 0) & (values <= 1))][0].item()
        raise ValueError(
            f"the judge {name} must return probabilities that the first response is better, from 0 to 1: got {odd}"
        )
    return values
