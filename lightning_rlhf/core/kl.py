"""Three estimators of KL(π‖ρ) from a log-ratio at samples of π (Schulman, "Approximating KL divergence", 2020).

Which one where: **k1 in the reward**, detached, has the gradient of the KL; **k3 in metrics** is unbiased and never
negative; as a loss k1 has gradient 0 in expectation, k2 the gradient of KL(π‖ρ), k3 that of KL(ρ‖π)
(Tang & Munos 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 40.0
"""Above it a ratio of probabilities is held, so that neither it nor its square overflows float32."""


def held(log_ratio: Tensor) -> Tensor:
    """`log_ratio` where it is at most 40, and 40 above, with a gradient of 1 in both: who ran off is still pulled back.

    Args:
        log_ratio: any shape, nats.

    Returns:
        the same shape, ≤ 40.
    """
    return torch.where(log_ratio > LARGEST_LOG_RATIO, log_ratio - (log_ratio - LARGEST_LOG_RATIO).detach(), log_ratio)


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
    """ρ(a)/π(a) − 1 + log π(a) − log ρ(a), a ~ π: unbiased, ≥ 0, its ratio held at e⁴⁰.

    Args:
        log_ratio: log π(a) − log ρ(a), any shape, nats.

    Returns:
        the same shape, nats.
    """
    return held(-log_ratio).expm1() + log_ratio
