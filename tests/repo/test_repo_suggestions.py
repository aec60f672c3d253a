"""What is nearly right is answered with what is right, and where a run's results are is told at its end."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped import refused

from lightning_rlhf.cli import main
from lightning_rlhf.cli.ending import numbers
from lightning_rlhf.cli.messages import WARNINGS, quiet, speak
from lightning_rlhf.cli.suggestions import suggestion

Arguments = Callable[..., list[str]]
REPOSITORY = Path(__file__).parents[2]


NEAR = {
    "--model.updates.mini_batch=4": "did you mean `--model.updates.minibatch`",
    "--model.algorithm=GRPOO": "did you mean `GRPO`",
    "--model.algorithm.surrogate=KLPenalti": "did you mean `KLPen`?",
    "--model.algorithm.advantage=LeaveOneOut": "it belongs to `--model.algorithm.advantage.baseline=LeaveOneOut`\n",
    "--model.lrr=1e-6": "did you mean `--model.lr`?",
    "--model.surrogate=KLPen": "`surrogate` belongs to `--model.algorithm.surrogate`\n",
    "--model.temperature=0.5": "`temperature` belongs to `--model.generation.temperature`",
    "--data.batchsize=4": "did you mean `--data.batch_size`",
    "--data=PromtDataModule": "did you mean `PromptDataModule`",
    "--chekpoint=null": "did you mean `--checkpoint`?",
    "--trainer.max_epoch=1": "did you mean `--trainer.max_epochs`",
    "--minibatch=4": "did you mean `--model.updates.minibatch`",
    "--model.reward=rewards/mine.py": "name what is in it by module and name, rewards.mine.NAME",
    "--model.reward=nowhere.at_all": "No module named 'nowhere'",
    "--model.policy.peft.r=16": "an adapter is given as a whole, in a config or by --model.policy.peft='{",
    "--model.quantum=1": "Option 'quantum' is not accepted",
}


@pytest.mark.parametrize(("flag", "answer"), NEAR.items())
def test_refused_key_or_class_has_its_nearest(
    flag: str, answer: str, ppo: Arguments, workplace: Any, capsys: Any
) -> None:
    error = refused(capsys, "fit", *ppo(), flag)
    assert answer in error
    assert ("did you mean" in error) == ("did you mean" in answer)


def test_package_that_is_missing_is_named() -> None:
    assert suggestion("No module named 'peft'", "model.policy.peft") == "pip install peft"


def test_reward_in_the_working_directory_is_found_from_a_config_elsewhere(
    tiny: Any, ppo: Arguments, workplace: Path
) -> None:
    (workplace / "my_own_reward.py").write_text("def short(prompts, responses): return [1.0] * len(responses)\n")
    (workplace / "deep").mkdir()
    (workplace / "deep/mine.yaml").write_text("model: {init_args: {reward: my_own_reward.short}}\n")
    command = [sys.executable, "-c", "from lightning_rlhf.cli import console; console()", "fit"]
    words = [*ppo(model__reward__path=None), "--config", "deep/mine.yaml", "--trainer.fast_dev_run=true"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *words], check=True, cwd=workplace, env=environment, capture_output=True, timeout=240)


def test_fit_ends_with_where_its_results_are(ppo: Arguments, workplace: Path, capsys: Any) -> None:
    main(["fit", *ppo(), "--run=runs/mine"])
    lines = capsys.readouterr().out.strip().splitlines()[-4:]
    assert lines == [
        "model:      runs/mine/model",
        "checkpoint: runs/mine/checkpoints/last.ckpt",
        "logs:       runs/mine/version_0",
        "report:     lightning-rlhf report runs/mine",
    ]
    assert all((workplace / line.split()[1]).exists() for line in lines[:3])


@pytest.mark.parametrize(("stage", "following"), [("sft", "--config reward"), ("reward", "--config ppo")])
def test_stage_names_the_next(stage: str, following: str, tiny: Any, workplace: Path, capsys: Any) -> None:
    main(["fit", *tiny.arguments(REPOSITORY / "configs" / f"{stage}.yaml")])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next stage:")]
    assert following in line
    assert f"runs/{stage}/model" in line


def test_validate_ends_with_a_table_of_meanings(ppo: Arguments, workplace: Path, capsys: Any) -> None:
    cli = main(["validate", *ppo()])
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("eval/kl ")]
    assert f"{float(cli.trainer.callback_metrics['eval/kl']):.4g}" in line
    assert "nats" in line
    assert "DataLoader" not in shown


def test_table_puts_the_standard_error_beside_its_number() -> None:
    table = numbers({"eval/win_rate": 0.51234567, "eval/win_rate_se": 0.02345, "eval/mine": 2.0})
    lines = table.splitlines()
    assert lines[0].startswith("eval/win_rate  0.5123  ± 0.023")
    assert not [line for line in lines if line.startswith("eval/win_rate_se")]
    assert any(line.split() == ["eval/mine", "2"] for line in lines)


def test_predict_names_its_file(tiny: Any, ppo: Arguments, workplace: Path, capsys: Any) -> None:
    main(["predict", *ppo(data__predict=tiny.file("held_out")), "--run=runs/mine"])
    assert "responses: runs/mine/responses.jsonl" in capsys.readouterr().out


def test_library_speaks_unless_logging_is_set_up(capsys: Any) -> None:
    library = logging.getLogger("lightning_rlhf")
    before = library.handlers[:], library.level, library.propagate
    library.handlers, library.propagate = [], False
    try:
        speak()
        speak()
        library.info("told once")
        library.warning("careful")
        library.debug("not told")
    finally:
        library.handlers, library.level, library.propagate = before
    assert capsys.readouterr().err.splitlines() == ["told once", "warning: careful"]


def test_harmless_warnings_are_left_out_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet()
        warnings.warn("Precision bf16-mixed is not supported by the model summary. Estimated ...", stacklevel=1)
        warnings.warn("Precision is lost", stacklevel=1)
    assert [str(each.message) for each in caught] == ["Precision is lost"]
    assert len(set(WARNINGS)) == len(WARNINGS)
