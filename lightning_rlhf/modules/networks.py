"""Builders of the four networks of the RL stage."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel
from lightning_rlhf.models.adapter import is_adapted
from lightning_rlhf.models.limits import check_rows, check_same
from lightning_rlhf.models.meta import unread
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.models.source import DType, recomputing, without_dropout
from lightning_rlhf.rewards import LearnedReward, Reward

Given = TypeVar("Given")


def as_source(model: ModelSource | str | Given) -> ModelSource | Given:
    """Convert a folder or hub name to a `ModelSource` and return anything else unchanged."""
    return ModelSource(path=model) if isinstance(model, str) else model


def find_tokenizer(
    model: ModelSource | nn.Module, tokenizer: PreTrainedTokenizerBase | str | None
) -> PreTrainedTokenizerBase | None:
    """Return the given tokenizer or the one stored with the model; returns None if a built module has none."""
    if isinstance(tokenizer, str):
        return ModelSource(path=tokenizer).tokenizer()
    if tokenizer is None and isinstance(model, ModelSource):
        return model.tokenizer()
    return tokenizer


def build_policy(model: ModelSource | nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> PolicyModel:
    """Build the policy network π_θ.

    Raises:
        ValueError: a token of the tokenizer has no embedding, or a built policy is quantized and has no adapter.
    """
    network = unread(model).causal_lm() if isinstance(model, ModelSource) else without_dropout(model)
    if is_quantized(network) and not is_adapted(network):
        raise ValueError(
            "the policy's weights are quantized, so that only an adapter can be trained on them, and it has none: give "
            "ModelSource(path=..., quantization=..., peft=...), or put one on by peft.get_peft_model"
        )
    check_rows(network, tokenizer, name="policy")
    return PolicyModel(network, tokenizer)


def build_reference(policy: PolicyModel, source: ModelSource | None, dtype: DType | None) -> Reference:
    """Build π_ref from its source, or else as the policy without its adapter or as a frozen copy of the policy.

    Raises:
        ValueError: the source reads other tokens than the policy, `dtype` is asked for where there is no copy, or the
            adapter off is not the policy at the start.
    """
    if dtype is not None and (source is not None or is_adapted(policy.network)):
        what = "comes from a source: set `reference.dtype`" if source is not None else "is the policy, its adapter off"
        raise ValueError(f"`reference_dtype`={dtype} is of a copy of the policy, but the reference {what}")
    if source is not None:
        network = unread(source).causal_lm()
        _check_tokens(network, source, policy.tokenizer, name="reference")
        return Reference(policy, PolicyModel(network, policy.tokenizer).eval().requires_grad_(False))
    if is_adapted(policy.network):
        with policy.reference():  # refuses an adapter that leaves something behind
            return Reference(policy, None)
    return Reference(policy, policy.frozen_copy(None if dtype is None else getattr(torch, dtype)))


def build_value(
    source: ModelSource | None,
    reward: Reward,
    policy: ModelSource | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
) -> ScalarModel:
    """Build the value network V from its source, or else on the learned reward's or the policy's backbone.

    What starts from the learned reward or the policy keeps or recomputes activations as the policy does.

    Raises:
        ValueError: the reward model or the source reads other tokens than the policy, or the policy came as a built
            module.
    """
    if source is None and isinstance(reward, LearnedReward):
        if not reward.shares_vocabulary:
            raise ValueError(
                "the value network starts from the reward model, but that has another vocabulary than the policy: set "
                "`value` to a model with the policy's tokenizer"
            )
        value = reward.load()
        if isinstance(policy, ModelSource) and policy.gradient_checkpointing:
            recomputing(value.network)
        return value
    source = source or (policy if isinstance(policy, ModelSource) else None)
    if source is None:
        raise ValueError("the advantage needs a value network: set `value`, since the policy came as a built module")
    network = unread(source).scorer(new_head=True)
    _check_tokens(network, source, tokenizer, name="value")
    return ScalarModel(network, tokenizer)


def set_passes(
    policy: PolicyModel, reference: PolicyModel | None, value: ScalarModel | None, *, compiled: bool, packed: bool
) -> None:
    """Compile the blocks of policy and reference, and leave padding out of the passes of all networks.

    Args:
        policy: π.
        reference: a network of its own; None if there is none.
        value: V; None if there is none.
        compiled: whether to compile.
        packed: whether to leave padding out.

    Raises:
        ValueError: a network cannot be compiled, or its attention might mix sequences.
    """
    for model in filter(None, [policy, reference] if compiled else []):
        model.compile_backbone()
    backbones = [model.backbone for model in (policy, reference, value) if model is not None]
    for backbone in backbones if packed else []:
        backbone.pack()


def _check_tokens(
    network: nn.Module, source: ModelSource, tokenizer: PreTrainedTokenizerBase | None, *, name: str
) -> None:
    """Check that a network reads the policy's tokens; a folder without a tokenizer is trusted."""
    check_rows(network, tokenizer, name=name)
    if source.has_tokenizer:
        check_same(source.tokenizer(), tokenizer, name=name)
