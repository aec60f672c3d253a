"""Three estimators of KL(π‖ρ) from a log-ratio at samples of π (Schulman, "Approximating KL divergence", 2020).

Which one where: **k1 in the reward**, detached, has the gradient of the KL; **k3 in metrics** is unbiased and never
negative; as a loss k1 has gradient 0 in expectation, k2 the gradient of KL(π‖ρ), k3 that of KL(ρ‖π)
(Tang & Munos 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 40.0
"""Cap of log-ratios, so that neither a ratio nor its square overflows float32."""


def held(log_ratio: Tensor) -> Tensor:
    """Cap `log_ratio` at 40, with a gradient of 1 on both sides: ratios beyond the cap keep their gradient.

    Args:
        log_ratio: any shape, nats.

    Returns:
        the same shape, ≤ 40.
    """
    return torch.where(log_ratio > LARGEST_LOG_RATIO, log_ratio - (log_ratio - LARGEST_LOG_RATIO).detach(), log_ratio)


def k1(log_ratio: Tensor) -> Tensor:
    """Estimator k1 = log π(a) − log ρ(a) for a ~ π: unbiased and signed.

    Args:
        log_ratio: log π(a) − log ρ(a), any shape, nats.

    Returns:
        the same shape, nats.
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Estimator k2 = ½ (log π(a) − log ρ(a))² for a ~ π: biased, of low variance and ≥ 0.

    Args:
        log_ratio: log π(a) − log ρ(a), any shape, nats.

    Returns:
        the same shape, nats.
    """
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """Estimator k3 = ρ(a)/π(a) − 1 + log π(a) − log ρ(a) for a ~ π: unbiased and ≥ 0.

    The ratio is capped at e⁴⁰.

    Args:
        log_ratio: log π(a) − log ρ(a), any shape, nats.

    Returns:
        the same shape, nats.
    """
    return held(-log_ratio).expm1() + log_ratio
