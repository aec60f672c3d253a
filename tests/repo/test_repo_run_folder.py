"""One folder for a run: where everything lies by default, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_rlhf import Export, NonFiniteGuard, PredictionWriter, Report, RolloutLog, RunCheckpoint, SampleLog
from lightning_rlhf.cli import main
from lightning_rlhf.cli.standard import RUN, STANDARD
from lightning_rlhf.cli.words import expanded

Arguments = Callable[..., list[str]]
PLACES = {"model/model.safetensors", "checkpoints/last.ckpt", "rollouts.jsonl", "samples.jsonl"}
PLACES |= {"version_0/metrics.csv", "version_0/config.yaml"}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_run_is_in_one_folder_that_one_flag_names(ppo: Arguments, workplace: Path) -> None:
    main(["fit", *ppo(), "--run", "kept/one"])
    assert files(workplace / "kept/one") >= PLACES
    assert {path.name for path in workplace.iterdir()} == {"kept"}


def test_two_seeds_are_two_flags(ppo: Arguments, workplace: Path) -> None:
    for seed in (1, 2):
        main(["fit", *ppo(), f"--seed_everything={seed}", f"--run=runs/seed{seed}"])
    one, other = (files(workplace / f"runs/seed{seed}") for seed in (1, 2))
    assert one == other >= PLACES
    first, second = ((workplace / f"runs/seed{seed}/rollouts.jsonl").read_text() for seed in (1, 2))
    assert first != second


def test_run_resumes_and_predicts_in_its_folder(tiny: Any, ppo: Arguments, workplace: Path) -> None:
    main(["fit", *ppo(), "--run=here"])
    main(["fit", *ppo(trainer__limit_train_batches=1, trainer__max_epochs=3), "--run=here", "--ckpt_path=last"])
    assert {path.name for path in (workplace / "here").iterdir() if path.is_dir()} >= {"version_0", "version_1"}
    main(["predict", *ppo(data__predict=tiny.file("held_out")), "--run=here", "--ckpt_path=last"])
    assert (workplace / "here/responses.jsonl").read_text().count("\n") == 3


def test_run_without_a_name_has_a_folder(tiny: Any, workplace: Path) -> None:
    flags = [f"--model.model={tiny.policy}", f"--data.train={tiny.file('demonstrations')}", "--data.batch_size=4"]
    main(["fit", "--model=SFTModule", "--data=DemonstrationDataModule", *flags, "--trainer.max_epochs=1"])
    assert files(workplace / RUN) >= {"model/model.safetensors", "version_0/metrics.csv"}


@pytest.mark.parametrize("key", sorted(STANDARD))
def test_standard_callback_is_left_out_by_null(key: str, ppo: Arguments, workplace: Path) -> None:
    kinds = [type(each) for each in main(["fit", *ppo(trainer__fast_dev_run=True)]).trainer.callbacks]
    fewer = [type(each) for each in main(["fit", *ppo(trainer__fast_dev_run=True), f"--{key}=null"]).trainer.callbacks]
    assert set(kinds) - set(fewer) == {STANDARD[key][0]}


def test_callback_of_the_user_replaces_the_standard_one(ppo: Arguments, workplace: Path) -> None:
    own = '--trainer.callbacks=[{"class_path": "SampleLog", "init_args": {"folder": "else"}}]'
    callbacks = main(["fit", *ppo(), own]).trainer.callbacks
    assert [each.file.folder for each in callbacks if isinstance(each, SampleLog)] == ["else"]
    assert (workplace / "else/samples.jsonl").exists()


@pytest.mark.parametrize("flag", ["--trainer.enable_checkpointing=false", "--checkpoint=null"])
def test_run_without_checkpoints_writes_none(flag: str, ppo: Arguments, workplace: Path) -> None:
    main(["fit", *ppo(), flag])
    assert not list(workplace.rglob("*.ckpt"))


def test_module_that_cannot_be_exported_trains_without_export(workplace: Path) -> None:
    demos = "lightning.pytorch.demos.boring_classes"
    flags = [f"--model={demos}.DemoModel", f"--data={demos}.BoringDataModule", "--trainer.max_steps=1"]
    assert main(["fit", *flags, "--trainer.accelerator=cpu"]).trainer.global_step == 1


def test_flag_wins_over_a_config_wherever_it_stands() -> None:
    assert expanded(["fit", "--run", "b", "--x=1", "--config", "grpo", "-c=mine.yaml"]) == [
        "fit",
        f"--config={Path(expanded(['--config=grpo'])[0].partition('=')[2])}",
        "--config=mine.yaml",
        "--trainer.default_root_dir=b",
        "--x=1",
    ]


class Learner(LightningModule):
    """Predicts its one weight, and writes it as a model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight * batch.sum()

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, float]]:
        return [{"weight": float(self.weight)}]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()


def test_callbacks_in_python_write_below_the_trainers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = [Export(), NonFiniteGuard(), PredictionWriter(), Report(), RolloutLog(), RunCheckpoint(), SampleLog()]
    off = {"enable_progress_bar": False, "enable_model_summary": False}
    logger = CSVLogger("runs/mine", name=None)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir="runs/mine", callbacks=callbacks, logger=logger, **off
    )
    module = Learner()
    batches = [torch.tensor([1.0]), torch.tensor([float("inf")])]  # the second's gradient is left out
    trainer.fit(module, DataLoader(batches, batch_size=None))
    trainer.predict(module, DataLoader(batches[:1], batch_size=None))
    places = {path.relative_to("runs/mine").parts[0] for path in Path("runs/mine").rglob("*")}
    assert places >= {"model", "checkpoints", "nonfinite", "responses.jsonl", "version_0"}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_name_of_an_optimizer_is_torch_s_whatever_else_is_imported() -> None:
    """bitsandbytes, which PEFT imports, has classes of the same names."""
    words = ["fit", "--model.optimizer=SGD", "--model.optimizer.lr=1", "--model.optimizer", "my_project.SGD"]
    assert expanded(words) == [
        "fit",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=1",
        "--model.optimizer=my_project.SGD",
    ]
