"""Win rate of the policy's response by the reward or a judge, also at equal lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.core import length_controlled, standard_error
from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.evaluation.evaluator import Answers, Columns, Evaluator
from lightning_rlhf.rewards.errors import on_all
from lightning_rlhf.rewards.judge import judged
from lightning_rlhf.rewards.text import decoded


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

    def of_answers(self, answers: Answers) -> Columns:
        """Return preferences and differences of length, (B, k) each."""
        lengths = answers.policy.lengths.unsqueeze(1) - answers.of_reference(self.samples).lengths.view(
            -1, self.samples
        )
        if self.judge is not None:
            first, second = self._asked(answers)
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

    def _asked(self, answers: Answers) -> Tensor:
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
        ask = partial(judged, self.judge, rows, *texts)
        preferences[:, pairs] = on_all(ask, agreed=answers.agreed, what=f"the judge of `{self.name}`")
        return preferences.view(2, -1, self.samples).to(answers.scores.device)
