"""Rules for which actions the policy loss counts."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.core.level import ActionLevel, TokenLevel
from lightning_rlhf.core.masked import AllSum
from lightning_rlhf.types import Experience, Rollout


@dataclass(frozen=True, kw_only=True)
class LossMask(ABC):  # noqa: B024  # the command line takes subclasses of it
    """Base class of a rule for which actions the policy loss counts; each of its three hooks keeps all by default.

    Advantages are those of all actions, whatever is masked. Several rules keep what all of them keep.
    """

    def check_level(self, level: ActionLevel) -> None:  # noqa: B027
        """Raise ValueError if the rule has no meaning for actions of this level; by default it has.

        Args:
            level: what an action is.
        """

    def counted(self, rollout: Rollout) -> Tensor:
        """Decide which tokens are in a loss and a denominator at all: (B, R), bool.

        Args:
            rollout: B responses.
        """
        return rollout.response_mask

    def kept(self, rollout: Rollout, counted: Tensor, all_sum: AllSum) -> Tensor:
        """Decide once for all updates whose policy loss counts: actions (B, T), bool.

        The others have a policy loss of 0; they stay in the denominators, the KL in the loss and the value loss.

        Args:
            rollout: B responses.
            counted: actions that count at all, (B, T), bool.
            all_sum: sums a tensor over processes.
        """
        return counted

    def kept_by(self, logprobs: Tensor, experience: Experience) -> Tensor:
        """Decide in every pass of an update whose policy loss counts: actions (B, T), bool.

        Args:
            logprobs: log π_θ per token, (B, R), nats, no gradient.
            experience: the same B responses.
        """
        return experience.action_mask


@dataclass(frozen=True, kw_only=True)
class MaskTruncated(LossMask):
    """Count no response that did not end (overlong filtering; DAPO, Yu et al. 2025, §3.4).

    They are in no denominator, also not in that of a mean over responses, where TRL's `mask_truncated_completions`
    leaves them. The baselines of their groups count them.
    """

    def counted(self, rollout: Rollout) -> Tensor:
        """Tokens of responses that closed with an end token."""
        return rollout.response_mask & rollout.ended.unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class TopEntropy(LossMask):
    """Keep the tokens of highest entropy in the policy loss (Wang et al. 2025, 2506.01939).

    The entropy is that of the distribution a token was drawn from. It is compared within the whole rollout of all
    processes, so that minibatches change nothing. Actions must be tokens.
    """

    share: float = 0.2
    """Share of the rollout's tokens to keep, in (0, 1]; of n tokens the 1 + ⌊share·(n − 1)⌋ highest, ties included."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1: got {self.share}")

    def check_level(self, level: ActionLevel) -> None:
        """Raise ValueError unless actions are tokens."""
        _check_tokens(self, level)

    def kept(self, rollout: Rollout, counted: Tensor, all_sum: AllSum) -> Tensor:
        """Tokens with an entropy among the highest `share`, compared in float32."""
        return counted & among_largest(rollout.entropy, counted, share=self.share, all_sum=all_sum)


@dataclass(frozen=True, kw_only=True)
class OffPolicyMask(LossMask):
    """Drop a response with Â < 0 that π_θ has left (off-policy sequence masking; DeepSeek-V3.2, 2512.02556, eq. 9).

    It has left where the mean over tokens of log π_sampler − log π_θ exceeds the threshold: pushing down what the
    policy would not say any more is what makes stale data harmful. Where advantages differ within a response, the sign
    is that of each action.
    """

    threshold: float
    """Largest mean of log π_sampler − log π_θ, > 0, nats per token; TRL's example is 0.5."""

    def __post_init__(self) -> None:
        check_positive(threshold=self.threshold)

    def kept_by(self, logprobs: Tensor, experience: Experience) -> Tensor:
        """Actions with Â ≥ 0, and all of the responses within the threshold."""
        rollout = experience.rollout
        gap = torch.where(rollout.response_mask, rollout.sampler_logprobs - logprobs, 0.0).sum(1, keepdim=True)
        near = gap / rollout.lengths.unsqueeze(1).clamp(min=1) <= self.threshold
        return experience.action_mask & (near | (experience.advantages >= 0))


@dataclass(frozen=True, kw_only=True)
class DPPOMask(LossMask):
    """Drop a token that the update would move further beyond a trust region (DPPO, binary TV; Qi et al. 2026).

    (2602.04879.) It is beyond where |π_θ(a) − π_sampler(a)| exceeds the threshold: rare tokens may move by a large
    factor, and frequent ones only a little. It takes the place of a clip, so that the surrogate is
    `ImportanceSampling`. Actions must be tokens.
    """

    threshold: float = 0.15
    """Largest difference of the probabilities, in (0, 1]; the default is that of the authors' runs in bfloat16."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` must be above 0 and at most 1: got {self.threshold}")

    def check_level(self, level: ActionLevel) -> None:
        """Raise ValueError unless actions are tokens."""
        _check_tokens(self, level)

    def kept_by(self, logprobs: Tensor, experience: Experience) -> Tensor:
        """Tokens within the threshold, and those that the update moves back."""
        moved = logprobs.exp() - experience.rollout.sampler_logprobs.exp()
        further = moved * experience.advantages.sign() > self.threshold
        return experience.action_mask & ~further


def among_largest(values: Tensor, mask: Tensor, *, share: float, all_sum: AllSum) -> Tensor:
    """Mark the largest 1 + ⌊share·(n − 1)⌋ of n values of all processes with their ties, in the shape of `values`.

    That is what lies at or above the quantile 1 − share. The threshold is found exactly in four sums over processes, a
    byte of it at a time: floats ≥ 0 have the order of their bits.

    Args:
        values: any shape, ≥ 0; compared in float32.
        mask: values that count, of the same shape, bool.
        share: in (0, 1].
        all_sum: sums a tensor over processes.

    Returns:
        bool; entries outside the mask mean nothing.
    """
    bits = values.float().abs().contiguous().view(torch.int32).long()  # abs: rounding leaves −0 of an entropy of 0
    threshold = wanted = bits.new_zeros(())
    for shift in (24, 16, 8, 0):
        candidates = mask & (bits >> shift + 8 == threshold)
        counts = all_sum(torch.bincount((bits[candidates] >> shift) & 255, minlength=256))
        above = torch.cat(
            [counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1)]
        )  # candidates of this byte or a higher
        if shift == 24:
            wanted = 1 + (above[0] - 1).clamp(min=0) * round(share * 10**9) // 10**9  # whole numbers are exact
        byte = ((above >= wanted).sum() - 1).clamp(min=0)
        wanted = wanted - above[byte + 1]
        threshold = threshold << 8 | byte
    return bits >= threshold


def _check_tokens(mask: LossMask, level: ActionLevel) -> None:
    """Raise ValueError unless actions are tokens."""
    if not isinstance(level, TokenLevel):
        raise ValueError(
            f"{type(mask).__name__} chooses tokens, but an action of {type(level).__name__} is a whole response: set "
            "the algorithm's `level` to TokenLevel(), or leave it out of `masks`"
        )
