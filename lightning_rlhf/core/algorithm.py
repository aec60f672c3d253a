"""Objective of RLHF as one value: actions, their rewards and their loss (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.advantage import AdvantageEstimator, BanditAdvantage
from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.checks import check_not_negative
from lightning_rlhf.core.clip import Clip
from lightning_rlhf.core.controller import FixedKL, KLController
from lightning_rlhf.core.entropy_bonus import EntropyBonus
from lightning_rlhf.core.kl import k2
from lightning_rlhf.core.kl_term import KLInReward, ReferenceKL, penalized_rewards
from lightning_rlhf.core.klpen import KLPen
from lightning_rlhf.core.level import ActionLevel, GeometricLevel, GeometricTokenLevel, SequenceLevel
from lightning_rlhf.core.masked import AllSum, local, with_first_of_empty
from lightning_rlhf.core.masks import LossMask
from lightning_rlhf.core.mismatch import MismatchIS, TruncatedIS, check_levels
from lightning_rlhf.core.per_reward import PerReward
from lightning_rlhf.core.prompt_choice import DynamicSampling
from lightning_rlhf.core.reduction import Reduction, TokenMean
from lightning_rlhf.core.shaping import RunningNormalized, Shaping, TruncatedScore
from lightning_rlhf.core.soft_clip import VESPO
from lightning_rlhf.core.surrogate import PerAction, Surrogate, importance_ratio
from lightning_rlhf.core.value import ClippedValueLoss, ValueLoss
from lightning_rlhf.core.vocabulary import VocabularySums
from lightning_rlhf.types import Experience, Objectives, Rollout


@dataclass(frozen=True, kw_only=True)
class Algorithm(Adaptive):
    """Contextual bandit under PPO with one reward per response (Ouyang et al. 2022, eq. 2).

    Â = r − β·log(π_old/π_ref) − b;  loss = surrogate(π_θ/π_old, Â) + value loss − γ·log π_θ(text)

    Every field exchanges one part. Published methods are subclasses with other defaults. It needs torch alone:
    log-probs and scores go in, advantages and losses come out.

    Raises:
        ValueError: a number is out of range, or two parts do not go together.
    """

    level: ActionLevel = SequenceLevel()
    """Definition of an action: the whole response (the bandit) or a token."""
    beta: float | KLController = 0.02
    """β ≥ 0, reward units per nat of KL to the reference, or what adapts it. The default is the paper's (C.4)."""
    kl_term: ReferenceKL = KLInReward()
    """Place of the KL to the reference: in the reward or in the loss."""
    advantage: AdvantageEstimator = BanditAdvantage()
    """Estimator of advantages from rewards; the default has no baseline."""
    surrogate: Surrogate = Clip()
    """Policy loss of an update."""
    value_loss: ValueLoss | None = None
    """Loss of the value network; None is `ClippedValueLoss()` if the advantage needs one."""
    reduction: Reduction = TokenMean()
    """Reduction of per-action losses to a number."""
    shaping: Shaping | Sequence[Shaping] | None = None
    """A rule on the score, or several, applied in turn. None: `TruncatedScore()` for a learned reward, whose
    demonstrations score around 0; none for any other."""
    masks: LossMask | Sequence[LossMask] | None = None
    """A rule for which actions the policy loss counts, or several; None counts all."""
    entropy_bonus: EntropyBonus | None = None
    """Bonus on the entropy of the next token; None has none."""
    dynamic_sampling: DynamicSampling | None = None
    """Draws until enough groups have different scores; None learns from the prompts as they come."""
    ptx_coef: float = 0.0
    """γ ≥ 0, weight of the pretraining loss; above 0 the data must serve pretraining texts (PPO-ptx)."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_not_negative(ptx_coef=self.ptx_coef)
        if not isinstance(self.beta, KLController):
            check_not_negative(beta=self.beta)
        for name in ("shaping", "masks"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_ratio(self.level, self.surrogate)
        check_levels(self.surrogate, self.level)
        for mask in self.loss_masks:
            mask.check_level(self.level)
        if any(isinstance(rule, RunningNormalized) for rule in self.rules[1:]):
            raise ValueError("`RunningNormalized` knows the spread of unshaped scores: put it first in `shaping`")
        if isinstance(self.advantage, PerReward) and any(isinstance(rule, RunningNormalized) for rule in self.rules):
            raise ValueError(
                "`PerReward` takes what a rule adds to the score as one more reward, and `RunningNormalized` changes "
                "its unit: leave it out, since each reward has a unit of its own"
            )
        if isinstance(self.advantage, PerReward) and isinstance(self.kl_term, KLInReward) and self.kl.coef > 0:
            raise ValueError(
                "`PerReward` credits each reward alone, and a KL in the reward belongs to none of them: take "
                "`kl_term`=KLInLoss(), or `beta`=0"
            )
        if self.value_loss is not None and not self.needs_value:
            raise ValueError(
                f"`value_loss` belongs to a value network, but {type(self.advantage).__name__} trains none: leave it "
                "out, or take an advantage such as GAE or BanditAdvantage(baseline=LearnedValue())"
            )

    @property
    def kl(self) -> KLController:
        """Controller of β, the price of the KL."""
        return self.beta if isinstance(self.beta, KLController) else FixedKL(coef=self.beta)

    @property
    def rules(self) -> tuple[Shaping, ...]:
        """The shaping rules as a tuple."""
        if self.shaping is None:
            return ()
        return (self.shaping,) if isinstance(self.shaping, Shaping) else tuple(self.shaping)

    @property
    def loss_masks(self) -> tuple[LossMask, ...]:
        """The rules for which actions the policy loss counts as a tuple."""
        if self.masks is None:
            return ()
        return (self.masks,) if isinstance(self.masks, LossMask) else tuple(self.masks)

    def with_beta(self, coef: float) -> Self:
        """Return the algorithm at another β, which keeps adapting as before."""
        return replace(self, beta=coef if isinstance(self.beta, float | int) else replace(self.beta, coef=coef))

    @property
    def needs_value(self) -> bool:
        """True if a value network must be trained."""
        return self.advantage.needs_value

    @property
    def learns_without_reward(self) -> bool:
        """True if the loss has a gradient where every advantage is 0: from a KL, an entropy bonus or texts."""
        in_loss = self.kl.coef > 0 and not isinstance(self.kl_term, KLInReward)
        return in_loss or self.entropy_bonus is not None or self.ptx_coef > 0

    @property
    def needs_vocabulary(self) -> bool:
        """True if the loss sums over the vocabulary at every token."""
        return self.entropy_bonus is not None or self.kl_term.over_vocabulary

    def identity(self) -> dict[str, Any]:
        """Return the fields by name with β as its controller, so that a number equals `FixedKL` of it."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"beta": self.kl}

    def for_run(self, *, learned_reward: bool, max_new_tokens: int, sampled_elsewhere: bool = False) -> Self:
        """Fill in what was left to the run.

        That is the shaping, lengths, the value loss and the correction for the sampler. −1 is low on the scale of a
        reward model that is normalized by its demonstrations, and unknown on any other.

        Args:
            learned_reward: whether the reward is such a model.
            max_new_tokens: longest response.
            sampled_elsewhere: whether an external engine samples. It differs from the trainer in kernels and precision,
                so that a surrogate without a correction is put into `TruncatedIS`; `NoCorrection` goes without one.
        """
        by_reward = (TruncatedScore(),) if learned_reward else ()
        rules = by_reward if self.shaping is None else self.rules
        corrected = isinstance(self.surrogate, MismatchIS) or not sampled_elsewhere
        return replace(
            self,
            surrogate=self.surrogate if corrected else TruncatedIS(surrogate=self.surrogate),
            shaping=tuple(rule.for_length(max_new_tokens) for rule in rules),
            reduction=self.reduction.for_length(max_new_tokens),
            value_loss=ClippedValueLoss() if self.value_loss is None and self.needs_value else self.value_loss,
        )

    def shaped(self, scores: Tensor, *, lengths: Tensor, ended: Tensor) -> Tensor:
        """Return the scores after the shaping rules, (B,), in reward units.

        Args:
            scores: of the reward, (B,), reward units.
            lengths: tokens of each response, end token included, (B,), int64.
            ended: the response closed with an end token, (B,), bool.
        """
        for rule in self.rules:
            scores = rule(scores, lengths=lengths, ended=ended)
        return scores

    def teaches(self, scores: Tensor, objectives: Objectives | None = None) -> bool:
        """Return True if the responses to one prompt differ in their scores, under `PerReward` in any part of them.

        Args:
            scores: before shaping, (k,), reward units.
            objectives: what they are a weighted sum of.
        """
        columns = [scores]
        if objectives is not None and isinstance(self.advantage, PerReward):
            columns = [part[~part.isnan()] for part in objectives.scores.unbind(1)]
        return any(len(column) > 1 and bool((column != column[0]).any()) for column in columns)

    def credit(
        self, rollout: Rollout, scores: Tensor, all_sum: AllSum = local, objectives: Objectives | None = None
    ) -> Experience:
        """Subtract β·KL to the reference from the rewards and estimate the advantages of all actions.

        Args:
            rollout: B responses of π_old.
            scores: after shaping, (B,), reward units.
            all_sum: sums a tensor over processes.
            objectives: what the scores before shaping are a weighted sum of, for `PerReward`.
        """
        mask = self.level.mask(with_first_of_empty(rollout.response_mask))
        kl_ref = self.level.total(rollout.logprobs - rollout.ref_logprobs, rollout.response_mask)
        charged = self.kl_term.in_reward(kl_ref)
        given = None if rollout.rewards is None else self.level.total(rollout.rewards, rollout.response_mask)
        rewards = penalized_rewards(scores, charged, mask, coef=self.kl.coef, given=given)
        penalties = penalized_rewards(torch.zeros_like(scores), charged, mask, coef=self.kl.coef)
        values = self.level.state_value(rollout.values, rollout.response_mask)
        place: Any = {"groups": rollout.prompt_index, "all_sum": all_sum}
        if objectives is not None and isinstance(self.advantage, PerReward):
            parts, weights = _parts(scores, objectives, mask, shaped=bool(self.rules))
            credit = self.advantage.summed(parts, weights, mask, **place)
        else:
            credit = self.advantage(rewards, values, mask, **place)
        counted, kept = self._masked(rollout, all_sum)
        return Experience(
            rollout=rollout,
            action_mask=counted,
            rewards=rewards,
            penalties=penalties,
            advantages=credit.advantages,
            returns=credit.returns,
            kept=kept,
        )

    def action_loss(
        self,
        logprobs: Tensor,
        values: Tensor | None,
        experience: Experience,
        vocabulary: VocabularySums | None = None,
    ) -> PerAction:
        """Compute the loss of each action before the reduction, (B, T): surrogate + β·KL − bonus + value loss.

        The KL is part of it under `KLInLoss` and `ExactKL` only. Where `masks` drop an action, the surrogate is 0.

        Args:
            logprobs: log π_θ of each response token, (B, R), nats; the gradient flows through it.
            values: V_θ of the state before each token, (B, R), reward units; None without a value network.
            experience: what the rollout gave.
            vocabulary: entropy and KL to the reference at each token, (B, R); None if the loss needs neither.
        """
        old = experience.rollout
        log_ratio = self.level.log_ratio(logprobs, old.logprobs, old.response_mask)
        action = self.surrogate(log_ratio, experience.advantages)
        weights = self.surrogate.weights(old.logprobs, old.sampler_logprobs, old.response_mask, self.level)
        policy_loss = weights.applied * action.loss
        dropped: dict[str, Tensor] = {}
        if self.loss_masks:
            kept = self._kept(logprobs.detach(), experience)
            policy_loss = torch.where(kept, policy_loss, torch.zeros_like(policy_loss))
            dropped["policy/masked"] = (~kept).to(policy_loss.dtype)
        kl_loss = self.kl.coef * self.kl_term.in_loss(
            logprobs,
            old.ref_logprobs,
            old.sampler_logprobs,
            old.response_mask,
            self.level,
            None if vocabulary is None else vocabulary.kl_ref,
        )
        ratio = importance_ratio(log_ratio.detach())
        stats = {"loss/policy_avg": policy_loss, "loss/kl_avg": kl_loss, "policy/approxkl_avg": k2(log_ratio)}
        stats |= {"policy/ratio": ratio, "policy/ratio_square": ratio.square()}
        stats |= weights.stats(policy_loss) | action.stats | dropped
        loss = policy_loss + kl_loss
        if self.entropy_bonus is not None and vocabulary is not None:
            bonus = self.entropy_bonus.price * self.level.total(vocabulary.entropy, old.response_mask)
            loss, stats = loss - bonus, stats | {"loss/entropy_avg": -bonus}
        if values is None:
            return PerAction(loss, stats)
        value = self._value_loss(values, experience)
        stats |= {"loss/value_avg": value.loss} | value.stats
        return PerAction(loss + value.loss, stats)

    def adapted(self, means: Mapping[str, float], episodes: int) -> Self:
        """Return the algorithm of the next rollout after an update of what adapts.

        Args:
            means: of this rollout and its updates over all processes, by logged name: of `objective/kl` (nats),
                `objective/rlhf_reward`, `objective/raw_scores` and their square, `policy/entropy_avg` (nats), and, for
                an adaptive surrogate, of `policy/kl_old` (nats per action).
            episodes: responses of the rollout, of all processes.
        """
        kl_old, raw = means.get("policy/kl_old"), means["objective/raw_scores"]
        variance = max(means["objective/raw_scores_square"] - raw**2, 0.0)
        rules = tuple(rule.adapted(raw, variance, episodes) for rule in self.rules)
        beta, bonus = self.beta, self.entropy_bonus
        return replace(
            self,
            beta=beta.adapted(means["objective/kl"], episodes) if isinstance(beta, KLController) else beta,
            advantage=self.advantage.adapted(means["objective/rlhf_reward"]),
            surrogate=self.surrogate if kl_old is None else self.surrogate.adapted(kl_old),
            entropy_bonus=None if bonus is None else bonus.adapted(means["policy/entropy_avg"]),
            shaping=self.shaping if rules == self.rules else rules,
        )

    def _masked(self, rollout: Rollout, all_sum: AllSum) -> tuple[Tensor, Tensor | None]:
        """Actions that count and those whose policy loss does, (B, T), bool each; None for the latter without masks."""
        tokens = rollout.response_mask
        for mask in self.loss_masks:
            tokens = tokens & mask.counted(rollout)
        counted = self.level.mask(tokens)
        kept = counted
        for mask in self.loss_masks:
            kept = kept & mask.kept(rollout, counted, all_sum)
        return counted, kept if self.loss_masks else None

    def _kept(self, logprobs: Tensor, experience: Experience) -> Tensor:
        """Actions whose policy loss counts under π_θ, (B, T), bool."""
        kept = experience.action_mask if experience.kept is None else experience.kept
        for mask in self.loss_masks:
            kept = kept & mask.kept_by(logprobs, experience)
        return kept

    def _value_loss(self, values: Tensor, experience: Experience) -> PerAction:
        old = experience.rollout
        now = self.level.state_value(values, old.response_mask)
        before = self.level.state_value(old.values, old.response_mask)
        return (self.value_loss or ClippedValueLoss())(now, before, experience.returns)


def _parts(scores: Tensor, objectives: Objectives, mask: Tensor, *, shaped: bool) -> tuple[Tensor, Tensor]:
    """Rewards of the actions of each part, (n, B, T), with the weights; what shaping added is one more part."""
    parts, weights = objectives.scores.to(scores), objectives.weights.to(scores)
    if shaped:
        before = torch.where(parts.isnan(), torch.zeros_like(parts), parts) @ weights
        parts = torch.cat([parts, (scores - before).unsqueeze(1)], 1)
        weights = torch.cat([weights, torch.ones_like(weights[:1])])
    no_kl = torch.zeros_like(mask, dtype=scores.dtype)
    return torch.stack([penalized_rewards(part, no_kl, mask, coef=0.0) for part in parts.unbind(1)]), weights


def _check_ratio(level: ActionLevel, surrogate: Surrogate) -> None:
    """Raise ValueError if the surrogate needs another ratio than that of the level's actions."""
    while isinstance(surrogate, MismatchIS):
        surrogate = surrogate.surrogate
    if isinstance(level, GeometricLevel | GeometricTokenLevel) and isinstance(surrogate, KLPen):
        raise ValueError(
            f"KLPen needs the ratio π_θ/π_old, but {type(level).__name__} normalizes it by the length, so that its k3 "
            "is no KL: take SequenceLevel or TokenLevel, or Clip(epsilon=3e-4, epsilon_high=4e-4)"
        )
    if isinstance(surrogate, VESPO) and (not isinstance(level, SequenceLevel) or isinstance(level, GeometricLevel)):
        raise ValueError(
            f"VESPO weighs a response by the ratio of the whole of it, which {type(level).__name__} does not give: "
            "take `level`=SequenceLevel(), or SAPO for tokens"
        )
