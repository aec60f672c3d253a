"""From scores to advantages: the reward less β·KL to the reference, and what an estimator makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_rlhf.core import group_size, group_std, k3, penalised_rewards
from lightning_rlhf.modules.evaluation import observe
from lightning_rlhf.modules.tally import Tally
from lightning_rlhf.rollout import Scores
from lightning_rlhf.types import Experience, Rollout

if TYPE_CHECKING:
    from lightning_rlhf.modules.ppo import PPOModule


def credit(module: PPOModule, rollout: Rollout, scores: Scores, tally: Tally) -> Experience:
    """Rewards less β·KL to the reference, and the advantages they give (Ouyang et al. 2022, eq. 2).

    Args:
        module: whose level, KL, advantage and processes.
        rollout: B responses of π_old.
        scores: (B,), reward units.
        tally: takes the objective's metrics.
    """
    level = module.level
    mask = level.mask(rollout.response)
    kl_ref = level.total(rollout.logprobs - rollout.ref_logprobs, rollout.response)
    charged, coef = module.kl_term.in_reward(kl_ref), module.kl.coef
    rewards = penalised_rewards(scores.total, charged, mask, coef=coef)
    penalties = penalised_rewards(torch.zeros_like(scores.total), charged, mask, coef=coef)  # large scores round these
    values = level.state_value(rollout.values, rollout.response)
    found = module.advantage(rewards, values, mask, groups=rollout.groups, all_sum=module.all_sum)
    observe(tally, rollout, scores, rollout.ended | ~rollout.ended, "objective")
    tally.add("objective/raw_scores", scores.total if scores.raw is None else scores.raw)
    tally.add("objective/rlhf_reward", rewards.sum(1))
    tally.add("objective/non_score_reward", penalties.sum(1))
    tally.add("policy/entropy_avg", rollout.entropy, rollout.response)
    tally.add("policy/kl_sampler", k3(rollout.sampler_logprobs - rollout.logprobs), rollout.response)
    flat = group_std(scores.total, rollout.groups) == 0  # of these GRPO learns nothing
    tally.add("objective/flat_groups", flat.to(rewards), group_size(rollout.groups) > 1)
    return Experience(rollout=rollout, mask=mask, advantages=found.advantages, returns=found.returns)
