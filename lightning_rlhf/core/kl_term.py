"""Place of the KL to the reference in eq. 2: the reward (detached) or the loss (differentiated)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.kl import k1, k2, k3
from lightning_rlhf.core.level import ActionLevel
from lightning_rlhf.core.surrogate import importance_ratio


def penalized_rewards(
    scores: Tensor, kl_ref: Tensor, mask: Tensor, *, coef: float, given: Tensor | None = None
) -> Tensor:
    """Per-action reward: −β·kl, plus the score on the last action (Ouyang et al. 2022, eq. 2).

    rₜ = −β (log π_old(aₜ|sₜ) − log π_ref(aₜ|sₜ)) + 1[t = last] · r_φ(x, y)

    With T = 1, the bandit, this is r_φ(x, y) − β·log(π_old(y|x) / π_ref(y|x)).

    Args:
        scores: r_φ(x, y), (B,), float.
        kl_ref: log π_old − log π_ref of each action, (B, T), nats.
        mask: actions that count, (B, T), bool, at least one per row.
        coef: β ≥ 0.
        given: what an environment gave for each action, (B, T), reward units: it stays there, and the last action gets
            the rest of the score. None gives all of it to the last one.

    Returns:
        rewards, (B, T), 0 where masked; their sum over T is the bandit's reward.

    Raises:
        ValueError: the shapes do not match.
    """
    if scores.shape != kl_ref.shape[:1] or mask.shape != kl_ref.shape:
        raise ValueError(
            "`scores` (B,), `kl_ref` (B, T) and `mask` (B, T) must match: "
            f"got {tuple(scores.shape)}, {tuple(kl_ref.shape)} and {tuple(mask.shape)}"
        )
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = steps == torch.where(mask, steps, -1).amax(1, keepdim=True)
    earlier = torch.zeros_like(kl_ref) if given is None else torch.where(last | ~mask, 0.0, given.to(kl_ref.dtype))
    rest = scores.to(kl_ref.dtype).unsqueeze(1) - earlier.sum(1, keepdim=True)
    rewards = -coef * kl_ref + torch.where(last, rest, earlier)
    return torch.where(mask, rewards, torch.zeros_like(rewards))


@dataclass(frozen=True, kw_only=True)
class KLEstimator(ABC):
    """Estimator of KL(π‖ρ) from log π(a) − log ρ(a) at samples of π."""

    @abstractmethod
    def __call__(self, log_ratio: Tensor) -> Tensor:
        """Estimate the KL at each sample.

        Args:
            log_ratio: log π(a) − log ρ(a), any shape, nats.

        Returns:
            the same shape, nats.
        """


@dataclass(frozen=True, kw_only=True)
class K1(KLEstimator):
    """Estimator log π − log ρ. As a loss its gradient is 0 in expectation."""

    def __call__(self, log_ratio: Tensor) -> Tensor:
        """Estimate the KL by `kl.k1`."""
        return k1(log_ratio)


@dataclass(frozen=True, kw_only=True)
class K2(KLEstimator):
    """Estimator ½(log π − log ρ)². Its gradient as a loss is KL(π‖ρ)'s (Tang & Munos 2025).

    This holds for whole responses at π_old.
    """

    def __call__(self, log_ratio: Tensor) -> Tensor:
        """Estimate the KL by `kl.k2`."""
        return k2(log_ratio)


@dataclass(frozen=True, kw_only=True)
class K3(KLEstimator):
    """Estimator ρ/π − 1 + log π − log ρ of GRPO. Its gradient as a loss is the *forward* KL(ρ‖π)'s (Tang & Munos 2025).

    This holds for whole responses at π_old; for tokens it is that of the next token's KL at the states that π_old
    reaches.
    """

    def __call__(self, log_ratio: Tensor) -> Tensor:
        """Estimate the KL by `kl.k3`."""
        return k3(log_ratio)


@dataclass(frozen=True, kw_only=True)
class ReferenceKL(ABC):
    """Base class of the KL to the reference before its price β, in the reward and in the loss."""

    @property
    def over_vocabulary(self) -> bool:
        """True if the KL is summed over the vocabulary, for which the reference runs in each pass of the update."""
        return False

    @abstractmethod
    def in_reward(self, kl_ref: Tensor) -> Tensor:
        """Return the KL charged in the reward of each action, (B, T), nats.

        Args:
            kl_ref: log π_old − log π_ref of each action, (B, T), nats.
        """

    @abstractmethod
    def in_loss(
        self,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        sampler_logprobs: Tensor,
        response: Tensor,
        level: ActionLevel,
        vocabulary_kl: Tensor | None = None,
    ) -> Tensor:
        """Return the KL added to the loss of each action, (B, T), nats.

        Args:
            logprobs: log π_θ per token, (B, R), nats; the gradient flows through it.
            ref_logprobs: log π_ref per token, (B, R), nats.
            sampler_logprobs: log of the probabilities that the tokens were drawn with, (B, R), nats.
            response: (B, R), bool.
            level: what an action is.
            vocabulary_kl: KL of each next-token distribution, (B, R), nats, where `over_vocabulary` asks for it.
        """


@dataclass(frozen=True, kw_only=True)
class KLInReward(ReferenceKL):
    """Detached reward r − β·(log π_old − log π_ref): k1, with the gradient of the KL (Ouyang et al. 2022, eq. 2).

    The KL is per token or per response as the actions are.
    """

    def in_reward(self, kl_ref: Tensor) -> Tensor:
        """Return k1 of each action."""
        return k1(kl_ref)

    def in_loss(
        self,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        sampler_logprobs: Tensor,
        response: Tensor,
        level: ActionLevel,
        vocabulary_kl: Tensor | None = None,
    ) -> Tensor:
        """Return zeros, because the KL is in the reward."""
        return torch.zeros_like(level.total(ref_logprobs, response))


@dataclass(frozen=True, kw_only=True)
class KLInLoss(ReferenceKL):
    """Loss β·KL(π_θ‖π_ref) beside the surrogate (GRPO; Shao et al. 2024, eq. 3); the reward stays the score.

    What shrinks or scales the advantage does not reach it. Beside a mean that counts the response itself (`BatchMean`,
    `GroupAdvantage` with `NoScale`) β counts k/(k − 1) times, k responses to a mean; beside a unit of spread
    (`Whitened`, `GroupStd`, `BatchStd`) it is a price in standard deviations of the reward, which shrink as the policy
    sharpens.

    Raises:
        ValueError: the estimator is k1, whose gradient as a loss is noise around 0, or `unbiased` goes with k2.
    """

    estimator: KLEstimator = field(default_factory=K2)
    """Estimator k2 or k3; k1 only if `unbiased`."""
    level: ActionLevel | None = None
    """Level of the estimate: the token, or the whole response, where k2's gradient is exact; None: the action.
    The estimate of a response is shared out evenly over its tokens, those of tokens sum to a response's."""
    unbiased: bool = False
    """Multiply the estimate by the live ratio π_θ/π_sampler (DeepSeek-V3.2, 2512.02556).

    Value and gradient are then those of KL(π_θ‖π_ref) whatever drew the response, with k3 or k1. Of whole responses
    this is exact; of tokens it is the KL of the next token at the states that the sampler reaches. TRL's ratio is to
    π_old.
    """

    def __post_init__(self) -> None:
        check_fields(self)
        if self.unbiased and isinstance(self.estimator, K2):
            raise ValueError(
                "`unbiased` needs an estimator with the value of the KL, which K2 has not: its gradient under the live "
                "ratio is another one. Take K3 or K1, or leave `unbiased` out"
            )
        if isinstance(self.estimator, K1) and not self.unbiased:
            raise ValueError(
                "`estimator`=K1 does nothing in the loss: its gradient is 0 in expectation. Take K2 (the gradient of "
                "KL(π‖π_ref)) or K3 (GRPO's), or put the KL in the reward with KLInReward"
            )

    def in_reward(self, kl_ref: Tensor) -> Tensor:
        """Return zeros, because the KL is in the loss."""
        return torch.zeros_like(kl_ref)

    def in_loss(
        self,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        sampler_logprobs: Tensor,
        response: Tensor,
        level: ActionLevel,
        vocabulary_kl: Tensor | None = None,
    ) -> Tensor:
        """Estimate the KL of every action, a token's or a response's."""
        at = self.level or level
        estimate = self.estimator(at.total(logprobs - ref_logprobs, response))
        if self.unbiased:
            estimate = estimate * importance_ratio(at.total(logprobs - sampler_logprobs, response))
        return level.total(at.spread(estimate, response), response)


@dataclass(frozen=True, kw_only=True)
class ExactKL(ReferenceKL):
    """Loss β·Σ_t KL(π_θ(·|s_t)‖π_ref(·|s_t)), summed over the vocabulary at the states that π_old reached.

    It has no noise of the sampled token, and one more pass of the reference in each pass of the update. Its gradient
    leaves out which states are reached, as that of a per-token estimate does. With a teacher in the reference's place
    it is on-policy distillation by the reverse KL (Agarwal et al. 2024, 2306.13649; Gu et al. 2024, 2306.08543).
    """

    @property
    def over_vocabulary(self) -> bool:
        """True: the sum needs every token's probability."""
        return True

    def in_reward(self, kl_ref: Tensor) -> Tensor:
        """Return zeros, because the KL is in the loss."""
        return torch.zeros_like(kl_ref)

    def in_loss(
        self,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        sampler_logprobs: Tensor,
        response: Tensor,
        level: ActionLevel,
        vocabulary_kl: Tensor | None = None,
    ) -> Tensor:
        """Sum the exact KL over each action.

        Raises:
            ValueError: it was not measured.
        """
        if vocabulary_kl is None:
            raise ValueError("`ExactKL` needs `vocabulary_kl`: pass `vocabulary` to `Algorithm.action_loss`")
        return level.total(vocabulary_kl, response)
