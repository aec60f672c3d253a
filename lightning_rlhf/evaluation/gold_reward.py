"""Over-optimization measured by a second reward that is not trained on (Gao et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from lightning_rlhf.core import standard_error
from lightning_rlhf.evaluation.evaluator import Answers, Columns, Evaluator
from lightning_rlhf.rewards import Reward, as_reward

ERRORS = 2.0
"""Number of standard errors by which the gold reward must have fallen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GoldReward(Evaluator):
    """Scores of the same responses under a gold reward, which stands for the true goal.

    The proxy is the module's score after shaping. Logs `gold/reward`, `gold/reference_reward`; `gold/gain` and
    `gold/proxy_gain`, the policy's less the reference's, with `gold/gain_se`; `gold/correlation` of gold and proxy over
    the policy's responses (Pearson's, 0 where one does not vary).

    `gold/since_best`, with its standard error, is the gold reward less that of the best evaluation so far in this run
    (the reference's where none was better), prompt by prompt, and `gold/proxy_since_best` the same of the proxy.
    `gold/overoptimized` is 1 where the proxy has risen since then and the gold reward has fallen by more than two
    standard errors: what is learned now is the proxy's error. It steers nothing. What was best is not part of a
    checkpoint: a resumed run begins with the reference again.
    """

    reward: Reward | Callable[..., Any]
    """Gold reward in any form of the module's `reward`: a `Reward`, an `nn.Module` on token ids or a function."""
    name: str = "gold"
    """Prefix of the logged names; two gold rewards need two names."""
    best: Columns | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", as_reward(self.reward))

    @property
    def reference_samples(self) -> int:
        """Number of reference responses to each prompt, which is 1."""
        return 1

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """List the gold reward as the evaluator's own."""
        return (as_reward(self.reward),)

    def of_answers(self, answers: Answers) -> Columns:
        """Return gold and proxy scores of the policy's response and of the reference's, (B,) each."""
        (reward,) = self.rewards
        gold = answers.score(reward, answers.policy).total
        of_reference = answers.score(reward, answers.of_reference(1)).total
        proxies = {"proxy": answers.scores, "reference_proxy": answers.reference_scores[:, 0]}
        return proxies | {"gold": gold, "reference_gold": of_reference}

    def conclude(self, notes: Columns) -> dict[str, float]:
        """Compute gain and over-optimization over all prompts."""
        gold, proxy = notes["gold"], notes["proxy"]
        gain, best = gold - notes["reference_gold"], self._best(notes)
        change, proxy_change = gold - best["gold"], float((proxy - best["proxy"]).mean())
        since, error = float(change.mean()), standard_error(change)
        metrics = {
            "reward": float(gold.mean()),
            "reference_reward": float(notes["reference_gold"].mean()),
            "gain": float(gain.mean()),
            "gain_se": standard_error(gain),
            "proxy_gain": float((proxy - notes["reference_proxy"]).mean()),
            "correlation": _correlation(gold, proxy),
            "since_best": since,
            "since_best_se": error,
            "proxy_since_best": proxy_change,
            "overoptimized": float(proxy_change > 0 and since < -ERRORS * error),
        }
        return {f"{self.name}/{name}": number for name, number in metrics.items()}

    def adapted(self, notes: Columns) -> Self:
        """Remember these notes if they are the best so far."""
        best = self._best(notes)
        best = notes if float(notes["gold"].mean()) > float(best["gold"].mean()) else best
        successor = replace(self)
        object.__setattr__(successor, "best", {name: best[name] for name in ("gold", "proxy")})
        return successor

    def _best(self, notes: Columns) -> Columns:
        """Return gold and proxy of the best evaluation on these prompts, or of the reference if none was better."""
        reference = {"gold": notes["reference_gold"], "proxy": notes["reference_proxy"]}
        if self.best is None or len(self.best["gold"]) != len(notes["gold"]):
            return reference
        return max(reference, self.best, key=lambda columns: float(columns["gold"].mean()))


def _correlation(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation; 0 if either quantity is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = torch.sqrt(x.square().sum() * y.square().sum())
    return float((x * y).sum() / scale) if float(scale) > 0 else 0.0
