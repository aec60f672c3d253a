"""The command line: its four commands, what it refuses, what it remembers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stopped import refused

from lightning_rlhf import DAPO, GRPO, RLOO, PPOModule, RewardModule, SFTModule
from lightning_rlhf.cli import console, main
from lightning_rlhf.core import AdaptiveEntropy, AdaptiveKL, Clip, KLPen
from lightning_rlhf.rewards import ModuleReward

CONFIGS = Path(__file__).parents[2] / "configs"
Arguments = Callable[..., list[str]]


@pytest.fixture
def theirs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, importable as `theirs_of_the_cli`."""
    (workplace / "theirs_of_the_cli.py").write_text(
        "import torch\n"
        "def short(prompts, responses, answer):\n"
        "    return [float(number) for number in answer]\n"
        "class Length(torch.nn.Module):\n"
        "    def __init__(self, scale: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.scale = scale\n"
        "    def forward(self, tokens, mask):\n"
        "        return self.scale * mask.sum(1).float()\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(workplace)
    return "theirs_of_the_cli"


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-rlhf", "--version"])
    console()
    assert capsys.readouterr().out == f"lightning-rlhf {version('lightning-rlhf')}\n"


def test_script_and_module_run_the_same() -> None:
    for command in ([Path(sys.executable).parent / "lightning-rlhf"], [sys.executable, "-m", "lightning_rlhf"]):
        done = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True, timeout=60)
        assert done.stdout == f"lightning-rlhf {version('lightning-rlhf')}\n"


def test_part_that_is_a_subclass_of_its_default_is_named(ppo: Arguments, workplace: Path) -> None:
    part = {"model__algorithm__entropy_bonus": "AdaptiveEntropy", "model__algorithm__entropy_bonus__target": 0.5}
    bonus = main(["fit", *ppo(trainer__max_steps=0, **part)]).model.algorithm.entropy_bonus
    assert bonus == AdaptiveEntropy(target=0.5)


def test_null_leaves_a_part_of_the_algorithm_out(
    ppo: Arguments, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = "--model.algorithm.dynamic_sampling"
    for words, wanted in (([], {"batches": 3, "keep_flat": False}), ([f"{part}=null"], None)):
        with pytest.raises(SystemExit):
            main(["fit", *ppo(), f"{part}.batches=3", *words, "--print_config"])
        model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
        assert model["algorithm"]["init_args"]["dynamic_sampling"] == wanted


def test_fit_counts_rollouts_steps_and_episodes(ppo: Arguments, workplace: Path) -> None:
    cli = main(["fit", *ppo()])
    assert (cli.model.iteration, cli.model.episodes, cli.trainer.global_step) == (2, 8, 4)
    logs = {"rollouts.jsonl", "samples.jsonl"}
    assert {path.name for path in workplace.rglob("*.jsonl")} == logs  # predictions are of `predict` alone


def test_validate_logs_reward_kl_and_length(ppo: Arguments, workplace: Path) -> None:
    metrics = main(["validate", *ppo()]).trainer.callback_metrics
    assert metrics.keys() >= {"eval/reward", "eval/kl", "eval/response_length"}
    assert metrics["eval/kl"] == pytest.approx(0, abs=1e-5)  # nothing was trained; float32 sums of 4 log-probs
    assert 1 <= metrics["eval/response_length"] <= 4


def test_validate_measures_kl_against_the_reference_that_is_named(tiny: Any, ppo: Arguments, workplace: Path) -> None:
    main(["fit", *tiny.arguments(CONFIGS / "sft.yaml", model__optimizer__init_args__lr=0.05)])
    changes = {"model__policy__path": "runs/sft/model", "model__reference__path": tiny.policy}
    metrics = main(["validate", *ppo(**changes)]).trainer.callback_metrics
    assert abs(metrics["eval/kl"]) > 1e-3


def test_test_logs_the_same_under_its_own_name(tiny: Any, ppo: Arguments, workplace: Path) -> None:
    metrics = main(["test", *ppo(data__test=tiny.file("held_out"))]).trainer.callback_metrics
    assert metrics.keys() >= {"test/reward", "test/kl", "test/response_length"}


def test_predict_writes_a_line_per_prompt(tiny: Any, ppo: Arguments, workplace: Path) -> None:
    main(["predict", *ppo(data__predict=tiny.file("held_out"), predictions__path="deep/responses.jsonl")])
    records = [json.loads(line) for line in Path("deep/responses.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [json.loads(line) for line in Path(tiny.file("held_out")).read_text(encoding="utf-8").splitlines()]
    assert [{"prompt": record["prompt"], "answer": record["answer"]} for record in records] == asked
    for record in records:
        assert record.keys() >= {"response", "score", "kl", "length", "ended"}
        assert not {"<|im_end|>", "<pad>"} & set(record["response"].split())


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--model.surogate=Clip", "'surogate'"),
        ("--model.algorithm.surrogate.epsilonn=0.1", "'epsilonn'"),
        ("--data.batchsize=4", "'batchsize'"),
        ("--trainer.max_epocks=1", "trainer.max_epocks"),
        ("--trainer.max_epoch=1", "trainer.max_epoch"),  # a prefix is no key
    ],
)
def test_misspelt_key_is_refused_by_name(flag: str, named: str, ppo: Arguments, workplace: Path, capsys: Any) -> None:
    assert named in refused(capsys, "fit", *ppo(), flag)


def test_misspelt_key_in_a_file_is_refused_by_name(ppo: Arguments, workplace: Path, capsys: Any) -> None:
    Path("mine.yaml").write_text("model: {init_args: {updates: {mini_batch: 2}}}", encoding="utf-8")
    assert "mini_batch" in refused(capsys, "fit", *ppo(), "--config", "mine.yaml")


@pytest.mark.parametrize(
    "flag", ["--model.algorithm.surrogate=Clipp", "--model.reward=nowhere.Reward", "--data=PromtDataModule"]
)
def test_unknown_class_is_refused_by_name(flag: str, ppo: Arguments, workplace: Path, capsys: Any) -> None:
    assert flag.split("=")[1] in refused(capsys, "fit", *ppo(), flag)


@pytest.mark.parametrize("method", [DAPO, RLOO, GRPO])
def test_method_by_name_is_the_method(method: Any, theirs: str, tiny: Any) -> None:
    data = ["--data=PromptDataModule", f"--data.train={tiny.file('held_out')}", "--data.batch_size=4"]
    model = ["--model=PPOModule", f"--model.policy={tiny.policy}", f"--model.reward={theirs}.short"]
    short = ["--model.generation.max_new_tokens=4", "--trainer.max_steps=1", "--trainer.logger=false"]
    quiet = ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    cli = main(["fit", *data, *model, *short, *quiet, f"--model.algorithm={method.__name__}"])
    assert cli.model.algorithm == method().for_run(learned_reward=False, max_new_tokens=4)
    assert cli.model.samples_per_prompt == 8


def test_argument_of_another_class_is_refused(ppo: Arguments, workplace: Path, capsys: Any) -> None:
    """Clip's epsilon, set by the YAML, does not leak into KLPen; given by hand it is an error."""
    error = refused(
        capsys, "fit", *ppo(), "--model.algorithm.surrogate=KLPen", "--model.algorithm.surrogate.epsilon=0.1"
    )
    assert "'epsilon'" in error
    assert "KLPen" in error


@pytest.mark.parametrize(("missing", "named"), [("model__policy__path", "policy"), ("model__reward__path", "path")])
def test_missing_required_key_is_refused_by_name(
    missing: str, named: str, ppo: Arguments, workplace: Path, capsys: Any
) -> None:
    assert f"required: {named}" in refused(capsys, "fit", *ppo(**{missing: None}))


def test_missing_training_file_says_what_to_pass(ppo: Arguments, workplace: Path) -> None:
    with pytest.raises(ValueError, match="PromptDataModule needs `train`.*train=<path"):
        main(["fit", *ppo(data__train=None)])


def test_short_class_names_work_on_the_command_line(ppo: Arguments, workplace: Path) -> None:
    named = ["--model.algorithm.surrogate=KLPen", "--model.algorithm.surrogate.target=0.02"]
    named += ["--model.algorithm.beta=AdaptiveKL", "--model.algorithm.shaping=[]"]
    cli = main(["fit", *ppo(), *named])
    assert isinstance(cli.model.algorithm.surrogate, KLPen)
    assert cli.model.algorithm.surrogate.target == 0.02
    assert isinstance(cli.model.algorithm.kl, AdaptiveKL)
    assert cli.model.algorithm.shaping == ()


def test_function_by_dotted_path_is_a_reward(theirs: str, ppo: Arguments) -> None:
    changes = {"model__reward__path": None, "model__algorithm__shaping": "[]"}
    metrics = main(["validate", *ppo(**changes), f"--model.reward={theirs}.short"]).trainer.callback_metrics
    assert metrics["eval/reward"] == 1  # every held-out row has "answer": "1"


def test_module_by_class_path_is_a_reward(theirs: str, ppo: Arguments) -> None:
    reward = [f"--model.reward={theirs}.Length", "--model.reward.scale=0.5"]
    cli = main(["validate", *ppo(model__reward__path=None), *reward])
    assert isinstance(cli.model.reward, ModuleReward)
    assert cli.model.reward.module.scale == 0.5


def test_saved_config_runs_again(ppo: Arguments, workplace: Path) -> None:
    first = main(["fit", *ppo()])
    again = main(["fit", "--config", "runs/ppo/version_0/config.yaml"])
    weights = dict(again.model.policy.named_parameters())
    for name, weight in first.model.policy.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)


def fit(arguments: list[str], *more: str) -> Any:
    """A run that keeps `kept/last.ckpt`."""
    saver = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept", "save_last": True}}
    Path("saver.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [saver]}}), encoding="utf-8")
    return main(["fit", *arguments, "--config", "saver.yaml", *more])


def test_checkpoint_of_the_command_line_loads_by_itself(ppo: Arguments, workplace: Path) -> None:
    trained = fit(ppo(trainer__enable_checkpointing=True, model__algorithm__surrogate__epsilon=0.3)).model
    loaded = PPOModule.load_from_checkpoint("kept/last.ckpt")
    loaded.configure_model()
    assert loaded.algorithm.surrogate == Clip(epsilon=0.3)
    assert loaded.iteration == 2
    for name, weight in trained.policy.named_parameters():
        torch.testing.assert_close(dict(loaded.policy.named_parameters())[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(("stage", "kind"), [("sft", SFTModule), ("reward", RewardModule)])
def test_checkpoint_of_the_other_stages_loads_by_itself(stage: str, kind: Any, tiny: Any, workplace: Path) -> None:
    trained = fit(tiny.arguments(CONFIGS / f"{stage}.yaml", trainer__enable_checkpointing=True)).model
    loaded = kind.load_from_checkpoint("kept/last.ckpt")
    loaded.configure_model()
    for name, weight in trained.model.named_parameters():
        torch.testing.assert_close(dict(loaded.model.named_parameters())[name], weight, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["bandit_klpen", "instructgpt"])
def test_resumed_run_is_the_uninterrupted_run(config: str, tiny: Any, workplace: Path) -> None:
    def arguments(rollouts: int) -> list[str]:
        changes = {"trainer__enable_checkpointing": True, "trainer__limit_train_batches": 1}
        changes |= {"model__optimizer__init_args__lr": 0.01, "trainer__max_epochs": rollouts}
        return tiny.arguments(CONFIGS / f"{config}.yaml", **changes)

    whole = fit(arguments(3)).model
    fit(arguments(1))
    resumed = fit(arguments(3), "--ckpt_path=last").model
    assert (resumed.iteration, resumed.episodes) == (whole.iteration, whole.episodes) == (3, 12)
    assert (resumed.algorithm.kl, resumed.algorithm.surrogate) == (whole.algorithm.kl, whole.algorithm.surrogate)
    for name, weight in whole.policy.named_parameters():
        torch.testing.assert_close(dict(resumed.policy.named_parameters())[name], weight, rtol=0, atol=0)


@pytest.fixture
def trained(tiny: Any, ppo: Arguments, workplace: Path) -> Arguments:
    """Arguments that go with `kept/last.ckpt`, whose averaged weights are far from its live ones."""
    same = {"data__val": tiny.file("held_out"), "data__test": tiny.file("held_out"), "model__algorithm__shaping": "[]"}
    fit(ppo(**same, trainer__enable_checkpointing=True, model__optimizer__init_args__lr=0.3))
    return lambda **changes: [*ppo(**same, **changes), "--ckpt_path=kept/last.ckpt"]


def test_test_measures_the_weights_that_validate_measures(trained: Arguments) -> None:
    validated = main(["validate", *trained()]).trainer.callback_metrics
    tested = main(["test", *trained()]).trainer.callback_metrics
    assert tested["test/kl"] == pytest.approx(validated["eval/kl"].item(), abs=1e-5)  # the same prompts and dice


def test_arguments_win_over_those_a_checkpoint_remembers(trained: Arguments) -> None:
    cli = main(["validate", *trained(model__generation__max_new_tokens=2)])
    assert cli.model.generation.max_new_tokens == 2


MINIMAL = {
    "PPOModule": ("PromptDataModule", ["--model.policy.path={policy}", "--model.reward=theirs_of_the_cli.short"]),
    "SFTModule": ("DemonstrationDataModule", ["--model.model.path={policy}"]),
    "RewardModule": ("ComparisonDataModule", ["--model.model.path={policy}"]),
    "PreferenceModule": ("ComparisonDataModule", ["--model.policy.path={policy}"]),
}
ROWS = {"PPOModule": "prompts", "SFTModule": "demonstrations", "RewardModule": "rankings"}
ROWS |= {"PreferenceModule": "rankings"}


@pytest.mark.parametrize("name", MINIMAL)
def test_saved_config_with_every_default_runs_again(
    name: str, tiny: Any, theirs: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As do what `--print_config` prints and the arguments in the checkpoint."""
    data, flags = MINIMAL[name]
    train = tiny.file(ROWS[name])
    given = [f"--model={name}", *(flag.format(policy=tiny.policy) for flag in flags)]
    given += [f"--data={data}", f"--data.train={train}", "--data.batch_size=4", "--trainer.max_epochs=1"]
    given += ["--trainer.accelerator=cpu", "--run=first"]
    with pytest.raises(SystemExit) as printed:
        main(["fit", *given, "--print_config"])
    assert printed.value.code == 0
    (workplace / "printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    first = main(["fit", *given])
    saved = next(workplace.glob("first/**/config.yaml"))
    for config in (saved, workplace / "printed.yaml"):
        again = main(["fit", "--config", str(config), f"--run={config.stem}"])
        assert type(again.model).__name__ == name
        for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(one, other)
    loaded = type(first.model).load_from_checkpoint(workplace / "first/checkpoints/last.ckpt", map_location="cpu")
    for one, other in zip(first.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_callbacks_that_a_later_config_replaces_are_named(
    ppo: Arguments, workplace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (workplace / "mine.yaml").write_text("trainer: {callbacks: [EMA]}\n", encoding="utf-8")
    (workplace / "added.yaml").write_text("trainer: {callbacks+: [EMA]}\n", encoding="utf-8")
    (workplace / "norms.yaml").write_text("trainer: {callbacks: [GradientNorms]}\n", encoding="utf-8")
    for config, said in (("added.yaml", False), ("mine.yaml", True)):
        caplog.clear()
        with pytest.raises(SystemExit):
            main(["fit", *ppo(), "--config", "norms.yaml", "--config", config, "--print_config"])
        capsys.readouterr()
        assert ("GradientNorms" in caplog.text and "`callbacks+:`" in caplog.text) == said
