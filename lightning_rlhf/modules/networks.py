"""The networks of the RL stage, built when Lightning asks for them."""

from __future__ import annotations

import torch
from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel
from lightning_rlhf.models.adapter import is_adapted
from lightning_rlhf.models.source import DType, without_dropout
from lightning_rlhf.rollout import LearnedReward, Reward


def find_tokenizer(
    model: ModelSource | nn.Module, tokenizer: PreTrainedTokenizerBase | str | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, or the one beside the model's weights; None for a built module without one."""
    if isinstance(tokenizer, str):
        return ModelSource(path=tokenizer).tokenizer()
    if tokenizer is None and isinstance(model, ModelSource):
        return model.tokenizer()
    return tokenizer


def build_policy(model: ModelSource | nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> PolicyModel:
    """π_θ."""
    network = model.causal_lm() if isinstance(model, ModelSource) else without_dropout(model)
    return PolicyModel(network, tokenizer)


def build_reference(policy: PolicyModel, source: ModelSource | None, dtype: DType | None) -> PolicyModel | None:
    """π_ref: from its source, else a frozen copy of the policy as it is now; None where it is the adapter off.

    Raises:
        ValueError: `dtype` is asked for where there is no copy that could have it.
    """
    if dtype is not None and (source is not None or is_adapted(policy.network)):
        what = "comes from a source: set `reference.dtype`" if source is not None else "is the policy, its adapter off"
        raise ValueError(f"`reference_dtype`={dtype} is of a copy of the policy, but the reference {what}")
    if source is not None:
        return PolicyModel(source.causal_lm(), policy.tokenizer).eval().requires_grad_(False)
    if is_adapted(policy.network):
        return None
    return policy.frozen_copy(None if dtype is None else getattr(torch, dtype))


def build_value(
    source: ModelSource | None,
    reward: Reward,
    policy: ModelSource | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
) -> ScalarModel:
    """V: from its source, else from the learned reward, else a new head on the policy's backbone.

    Raises:
        ValueError: the reward model reads other tokens than the policy, or the policy came as a built module.
    """
    if source is None and isinstance(reward, LearnedReward):
        if not reward.shares_vocabulary:
            raise ValueError(
                "the value network starts from the reward model, but that has another vocabulary than the policy: set "
                "`value` to a model with the policy's tokenizer"
            )
        return reward.load()
    source = source or (policy if isinstance(policy, ModelSource) else None)
    if source is None:
        raise ValueError("the advantage needs a value network: set `value`, since the policy came as a built module")
    return ScalarModel(source.scorer(new_head=True), tokenizer)
