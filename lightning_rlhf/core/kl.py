"""Three estimators of KL(π‖ρ) from a log-ratio at samples of π (Schulman, "Approximating KL divergence", 2020).

Which one where: **k1 in the reward**, detached, has the gradient of the KL; **k3 in metrics** is unbiased and never
negative; as a loss k1 has gradient 0 in expectation, k2 the gradient of KL(π‖ρ), k3 that of KL(ρ‖π)
(Tang & Munos 2025).
"""

from __future__ import annotations

from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """log π(a) − log ρ(a), a ~ π: unbiased, signed.

    Args:
        log_ratio: log π(a) − log ρ(a), any shape, nats.

    Returns:
        the same shape, nats.
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """½ (log π(a) − log ρ(a))², a ~ π: biased, low variance, ≥ 0.

    Args:
        log_ratio: log π(a) − log ρ(a), any shape, nats.

    Returns:
        the same shape, nats.
    """
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """ρ(a)/π(a) − 1 + log π(a) − log ρ(a), a ~ π: unbiased, ≥ 0.

    Args:
        log_ratio: log π(a) − log ρ(a), any shape, nats.

    Returns:
        the same shape, nats.
    """
    return (-log_ratio).expm1() + log_ratio
