"""Best-of-n of the reference, a baseline without training that every run should beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core import best_of_n_kl, expected_best, n_of_kl, standard_error
from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.evaluation.evaluator import Answers, Columns, Evaluator


@dataclass(frozen=True, kw_only=True)
class BestOfN(Evaluator):
    """Best-of-n of the reference compared with the policy, by the module's scores after shaping.

    Of the largest n responses to each prompt it logs, for each n, `best_of_4/reward`, the unbiased mean of the best
    (`core.expected_best`), its standard error over prompts, and `best_of_4/kl` = log n − (n − 1)/n, nats: exactly
    KL(π_bon‖π_ref) where no two responses score alike, an upper bound where some do (Beirami et al. 2024).

    Which is better is asked at equal KL and at equal reward, along the curve from n = 1 to the largest, and between two
    n by a coin that chooses one of them, which costs no more KL than the line between their points:
    `best_of_n/equivalent`, the n with the policy's KL; `best_of_n/reward_at_equal_kl`, what that n would earn;
    `best_of_n/lead`, the policy's reward less that, with `best_of_n/lead_se`; `best_of_n/kl_at_equal_reward`, what best
    of n pays for the policy's reward. What lies beyond the largest n is not logged: a policy many nats away has no
    equal, since n grows as e to the KL.
    """

    n: tuple[int, ...] = (1, 4, 16)
    """Numbers of responses to choose from; the largest is drawn."""
    name = "best_of_n"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", tuple(sorted(set(self.n))))
        if not self.n:
            raise ValueError("`n` must hold at least one number of responses: got none")
        check_positive(n=self.n[0])

    @property
    def reference_samples(self) -> int:
        """Number of responses to draw: the largest n."""
        return self.n[-1]

    def of_answers(self, answers: Answers) -> Columns:
        """Return score and KL of the policy's response, (B,), and the reference's scores, (B, N)."""
        kl = (answers.policy.logprobs - answers.policy.ref_logprobs).sum(1)
        return {"score": answers.scores, "kl": kl, "reference": answers.reference_scores[:, : self.reference_samples]}

    def conclude(self, notes: Columns) -> dict[str, float]:
        """Compute the metrics of best-of-n over all prompts."""
        best = torch.stack([expected_best(notes["reference"], n=n) for n in range(1, self.reference_samples + 1)])
        metrics: dict[str, float] = {}
        for n in self.n:
            of_prompts = best[n - 1]
            metrics[f"best_of_{n}/reward"] = float(of_prompts.mean())
            metrics[f"best_of_{n}/reward_se"] = standard_error(of_prompts)
            metrics[f"best_of_{n}/kl"] = best_of_n_kl(n)
        return metrics | self._compared(best, notes["score"], max(float(notes["kl"].mean()), 0.0))

    def _compared(self, best: Tensor, scores: Tensor, kl: float) -> dict[str, float]:
        """Compare the policy with the curve of best-of-n.

        Args:
            best: score of the best of n to each prompt, (N, prompts), n from 1.
            scores: of the policy, (prompts,).
            kl: of the policy, nats.
        """
        curve = torch.tensor([best_of_n_kl(n) for n in range(1, len(best) + 1)], dtype=torch.float64)
        metrics = {"best_of_n/equivalent": n_of_kl(kl)}
        if kl <= float(curve[-1]):
            at_equal_kl = _between(curve, best, kl)
            lead = scores - at_equal_kl
            metrics["best_of_n/reward_at_equal_kl"] = float(at_equal_kl.mean())
            metrics |= {"best_of_n/lead": float(lead.mean()), "best_of_n/lead_se": standard_error(lead)}
        reward, means = float(scores.mean()), best.mean(1)
        if reward <= float(means[-1]):
            metrics["best_of_n/kl_at_equal_reward"] = float(_between(means, curve, reward))
        return metrics


def _between(x: Tensor, y: Tensor, place: float) -> Tensor:
    """Interpolate the points (x, y) at `place`, x rising; returns the first y before the first x.

    Args:
        x: (N,).
        y: (N, …).
        place: at most the last x.
    """
    after = int(torch.searchsorted(x, torch.tensor(place, dtype=x.dtype)))  # the first x that is not below
    if after == 0:
        return y[0]
    share = (place - x[after - 1]) / (x[after] - x[after - 1])
    return torch.lerp(y[after - 1], y[after], share)
