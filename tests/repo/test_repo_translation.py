"""docs/translation.md names every argument of TRL's configs, and each flag of its last column is one of ours."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_rlhf.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "translation.md").read_text(encoding="utf-8")
TRL = "1.16"
"""Version whose fields these are."""
BOTH = """
learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout remove_unused_columns
num_generations num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of
generation_batch_size steps_per_generation temperature top_p top_k min_p generation_kwargs chat_template_kwargs
repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size beta num_iterations epsilon
epsilon_high reward_weights mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
log_completions log_multimodal num_completions_to_print log_unique_prompts use_transformers_continuous_batching
transformers_continuous_batching_config use_transformers_paged
"""
GRPO = """
cast_lm_head_to_fp32 delta sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg
vespo_lambda_neg importance_sampling_level multi_objective_aggregation scale_rewards loss_type top_entropy_quantile
entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
max_tool_calling_iterations vllm_importance_sampling_correction vllm_importance_sampling_mode
vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min off_policy_mask_threshold use_bias_correction_kl
log_completions_hub_repo vllm_importance_sampling_cap
"""
SUPERVISED = """
activation_offloading assistant_only_loss center_rewards_coefficient chat_template_path completion_only_loss
dataset_kwargs dataset_num_proc dataset_text_field discopop_tau eos_token eval_packing f_alpha_divergence_coef
f_divergence_type label_smoothing ld_alpha loss_weights max_length packing packing_strategy pad_token padding_free
precompute_ref_batch_size precompute_ref_log_probs truncation_mode use_weighting
"""
RLOO = "normalize_advantages reward_clip_range"
FIELDS = sorted({*BOTH.split(), *GRPO.split(), *RLOO.split(), *SUPERVISED.split()})
"""Own fields of TRL's configs: those that their class bodies annotate."""
REQUIRED = ("--config=ppo", "--model.policy.path=MODEL", "--model.reward.path=MODEL", "--data.train=prompts.jsonl")
"""What a run of stage 3 needs to be parsed."""
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| TRL |"))
]


def flags(cell: str) -> list[str]:
    """The arguments in a cell, as a shell gives them."""
    return [word for code in re.findall(r"`([^`]*)`", cell) for word in code.split() if word.startswith("--")]


def named(text: str) -> set[str]:
    """Words in the first column's code."""
    return {word for code in re.findall(r"`([^`]*)`", text) for word in re.findall(r"\w+", code)}


@pytest.fixture
def project(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's folder: the examples, and a module of their own."""
    Path("examples").symlink_to(Path(__file__).parents[2] / "examples")
    module = ModuleType("my_project")
    module.correct = lambda prompts, responses: [0.0] * len(responses)
    monkeypatch.setitem(sys.modules, "my_project", module)


def test_every_row_has_three_cells() -> None:
    assert len(ROWS) > 60
    assert not [row for row in ROWS if len(row) != 3]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_trl_is_on_the_page(field: str) -> None:
    assert field in set().union(*(named(row[0]) for row in ROWS))


def test_fields_are_those_of_trl() -> None:
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith(TRL):
        pytest.skip(f"these are the fields of {TRL}, here is {trl.__version__}")
    configs = (trl.GRPOConfig, trl.RLOOConfig, trl.DPOConfig, trl.RewardConfig, trl.SFTConfig)
    assert {name for config in configs for name in config.__annotations__} == set(FIELDS)


STAGES = {"sft": "model", "reward": "model", "dpo": "policy", "kto": "policy"}
"""Configs that take no reward, with the argument that names their model."""


def behind(given: list[str]) -> list[str]:
    """The words with what else a command needs: PPO's, or those of the stage that the first of them names."""
    stage = re.match(r"--config[ =](\w+)$", " ".join(given[:2] if given[0] == "--config" else given[:1]))
    if stage is None or stage[1] not in STAGES:
        return [*REQUIRED, *given]
    return [*given, f"--model.{STAGES[stage[1]]}.path=MODEL", "--data.train=a.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if flags(row[2])], ids=lambda row: flags(row[2])[0])
def test_every_flag_of_ours_is_taken(row: list[str], capsys: pytest.CaptureFixture[str], project: None) -> None:
    """With its class, where an argument is one of a class; `--print_config` parses and stops."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *behind(flags(row[2])), "--print_config"])
    assert stopped.value.code == 0, capsys.readouterr().err


def test_wrong_flag_is_refused(capsys: pytest.CaptureFixture[str], workplace: Any) -> None:
    """Negative control."""
    for wrong in ("--model.generation.num_samples=8", "--model.algorithm.surrogate.caps=3.0"):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *REQUIRED, wrong, "--print_config"])
        assert stopped.value.code != 0


def pieces(page: str) -> list[str]:
    """Rows of tables, paragraphs and list items of a page that hold flags, without its blocks of code."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    parts = re.split(r"\n\n|\n(?=[|-])", text)
    return [part for part in parts if flags(part)]


ADVICE = [(page, piece) for page in ("faq.md", "memory.md", "methods.md", "metrics.md") for piece in pieces(page)]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "piece"), ADVICE, ids=lambda text: text[:40])
def test_every_flag_of_an_advice_is_taken(
    page: str, piece: str, capsys: pytest.CaptureFixture[str], project: None
) -> None:
    """Each group of flags that stands in one pair of backticks, behind PPO's config or the stage that it names."""
    for code in re.findall(r"`(--[^`]*)`", piece):
        if not re.search(r"[= ]", code):  # the name of a flag alone
            continue
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *behind(shlex.split(code)), "--print_config"])
        assert stopped.value.code == 0, f"{code}: {capsys.readouterr().err}"
