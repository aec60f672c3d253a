"""Metrics of a rollout and its credit, and the outcome passed to callbacks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_rlhf.core import group_size, group_std, k3
from lightning_rlhf.evaluation.mean_metrics import MeanMetrics
from lightning_rlhf.rewards import Scores
from lightning_rlhf.types import Experience, Outcome, PromptBatch, Rollout


def observed(rollout: Rollout, scores: Scores, *, score: str = "scores") -> dict[str, Tensor]:
    """Return the terms of the objective by name for each response, (B,) (Ouyang et al. 2022, eq. 2).

    Args:
        rollout: B responses.
        scores: (B,), reward units, and their parts.
        score: what the score is called; its parts are `score/part`.
    """
    terms = {
        "kl": (rollout.logprobs - rollout.ref_logprobs).sum(1),
        "entropy": -rollout.logprobs.sum(1),
        "response_length": rollout.lengths.to(scores.total),
        "eos_rate": rollout.ended.to(scores.total),
        score: scores.total,
    }
    return terms | {f"{score}/{name}": part for name, part in scores.parts.items()}


def credited(rollout: Rollout, scores: Scores, experience: Experience) -> MeanMetrics:
    """Compute the metrics of a training rollout before its updates.

    Args:
        rollout: B responses.
        scores: (B,), reward units, and their parts.
        experience: the same responses with their advantages.
    """
    terms = observed(rollout, scores)
    terms["raw_scores"] = scores.total if scores.raw is None else scores.raw
    terms["rlhf_reward"] = experience.rewards.sum(1)
    terms["non_score_reward"] = experience.penalties.sum(1)
    of_tokens = {
        "policy/entropy_avg": rollout.entropy,
        "policy/kl_sampler": k3(rollout.sampler_logprobs - rollout.logprobs),
    }
    flat = group_std(scores.total, rollout.prompt_index) == 0  # of these GRPO learns nothing
    return (
        MeanMetrics.of({f"objective/{name}": term for name, term in terms.items()})
        + MeanMetrics.of(of_tokens, rollout.response_mask)
        + MeanMetrics.of({"objective/flat_groups": flat.to(scores.total)}, group_size(rollout.prompt_index) > 1)
    )


def outcome_of(rollout: Rollout, scores: Scores, prompts: PromptBatch, experience: Experience | None = None) -> Outcome:
    """Build the outcome for callbacks, detached from the graph that the update uses.

    Args:
        rollout: B responses.
        scores: (B,), reward units, and their parts.
        prompts: that were responded to.
        experience: the same responses with their advantages, where they are learned from.
    """
    advantages = None
    if experience is not None:
        mask = experience.action_mask
        advantages = torch.where(mask, experience.advantages, 0.0).sum(1) / mask.sum(1)
    return Outcome(
        rollout=replace(rollout, logprobs_with_grad=None),
        rows=prompts.rows_of(rollout),
        raw_scores=scores.total if scores.raw is None else scores.raw,
        scores=scores.total,
        parts=scores.parts,
        is_real=prompts.is_real[rollout.prompt_index],
        advantages=advantages,
    )
