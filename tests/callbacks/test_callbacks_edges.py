"""Callbacks at their edges: what is averaged and when, broken exports, prediction files by the command line."""

from __future__ import annotations

import datetime
import json
import math
import shutil
from decimal import Decimal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gathered import gathered
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from lightning_rlhf.callbacks import (
    EMA,
    Export,
    NonFiniteGuard,
    PredictionWriter,
    Report,
    RolloutLog,
    RunCheckpoint,
    SampleLog,
)
from lightning_rlhf.cli import main
from lightning_rlhf.core import GAE, ConstantSchedule
from lightning_rlhf.data import PromptDataModule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.folders.atomic import MANIFEST, write_folder
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rollout import UpdateSchedule

PROMPTS = [[12, 13], [10], [14, 15, 16, 11], [17]]
DECAY = 0.75


@pytest.fixture
def make_ppo(make_lm, token_reward):
    def make(**options) -> PPOModule:
        usual = {
            "generation": SamplingParams(max_new_tokens=3),
            "schedule": ConstantSchedule(),
            "reward": token_reward(),
        }
        usual |= {"optimizer": partial(torch.optim.SGD, lr=0.2), "shaping": ()}
        return PPOModule(**gathered(**({"policy": make_lm().double()} | usual | options)))

    return make


class Watch(Callback):
    """One weight of the policy after every optimizer step, and as validation sees it at its start and in its steps."""

    def __init__(self) -> None:
        self.stepped, self.validated, self.after = [], [], []

    def weight(self, module) -> torch.Tensor:
        return next(p for p in module.policy.parameters() if p.requires_grad).detach().clone()

    def on_fit_start(self, trainer, pl_module):
        self.stepped.append(self.weight(pl_module))
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.stepped.append(self.weight(pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append((len(self.stepped) - 1, self.weight(pl_module)))

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.after.append(torch.equal(self.weight(pl_module), self.stepped[-1]))


def average(steps: list[torch.Tensor], decay: float = DECAY) -> torch.Tensor:
    """d^k·θ_0 + (1 − d)·Σ_i d^(k−i)·θ_i over the k steps so far."""
    k = len(steps) - 1
    return decay**k * steps[0] + (1 - decay) * sum(decay ** (k - i) * steps[i] for i in range(1, k + 1))


def test_every_validation_sees_the_average_of_the_minibatches_so_far(make_ppo, make_trainer, as_loader, left_padded):
    """Two optimizer steps per rollout, a validation after each rollout; the order of the callbacks is no matter."""
    for order in (1, -1):
        watch, ema = Watch(), EMA(decay=DECAY)
        module = make_ppo(updates=UpdateSchedule(minibatch=2))
        trainer = make_trainer(callbacks=[watch, ema][::order], val_check_interval=1)
        trainer.fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 3), as_loader([left_padded(PROMPTS)]))
        assert [k for k, _ in watch.validated] == [2, 4, 6]
        for k, seen in watch.validated:
            assert torch.allclose(seen, average(watch.stepped[: k + 1]), rtol=0, atol=1e-12)
            assert not torch.allclose(seen, watch.stepped[k], rtol=0, atol=1e-6)
        assert watch.after == [True] * 3  # swapped out again
        assert torch.equal(watch.weight(module), watch.stepped[-1])


def test_decay_zero_is_the_last_weight(make_ppo, make_trainer, as_loader, left_padded):
    ema, module = EMA(decay=0.0), make_ppo()
    make_trainer(callbacks=[ema]).fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 2))
    for name, p in module.policy.named_parameters():
        assert torch.equal(ema.average[name], p)


def test_average_is_float32_beside_bfloat16_weights(make_ppo, make_trainer, as_loader, left_padded):
    ema = EMA()
    trainer = make_trainer(callbacks=[ema], precision="bf16-true")
    trainer.fit(make_ppo(), as_loader([{"prompts": left_padded(PROMPTS)}] * 2))
    assert {average.dtype for average in ema.average.values()} == {torch.float32}


def test_value_network_is_not_averaged(make_folder, make_ppo, make_trainer, as_loader, left_padded):
    ema = EMA()
    module = make_ppo(policy=ModelSource(path=make_folder()), advantage=GAE())
    make_trainer(callbacks=[ema]).fit(
        module, as_loader([{"prompts": left_padded(PROMPTS, rows=[{"prompt": "a"}] * 4)}])
    )
    assert ema.average.keys() == dict(module.policy.named_parameters()).keys()
    assert any("score" in name for name, _ in module.value.named_parameters())


def test_adapter_alone_is_averaged(make_folder, make_ppo, make_trainer, as_loader, left_padded):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    ema, watch = EMA(decay=DECAY), Watch()
    module = make_ppo(policy=ModelSource(path=make_folder(), peft=config))
    make_trainer(callbacks=[ema, watch]).fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 2))
    assert ema.average
    assert all("lora_" in name for name in ema.average)
    first = next(iter(ema.average.values()))
    assert torch.allclose(first, average(watch.stepped), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_evaluation_after_training_leaves_the_live_weights(make_ppo, make_trainer, as_loader, left_padded, method):
    seen = []

    class Look(Callback):
        def looks(self, trainer, pl_module, *_):
            seen.append(next(pl_module.policy.parameters()).detach().clone())

        on_validation_batch_end = on_test_batch_end = on_predict_batch_end = looks

    ema, watch, module = EMA(decay=DECAY), Watch(), make_ppo()
    make_trainer(callbacks=[ema, watch]).fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 2))
    getattr(make_trainer(callbacks=[ema, Look()]), method)(module, as_loader([left_padded(PROMPTS)]))
    assert torch.allclose(seen[0], average(watch.stepped), rtol=0, atol=1e-12)
    assert torch.equal(watch.weight(module), watch.stepped[-1])


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_exception_in_evaluation_restores_the_live_weights(make_ppo, make_trainer, as_loader, left_padded, method):
    class Break(Callback):
        def breaks(self, *_):
            raise RuntimeError("broken")

        on_validation_batch_end = on_test_batch_end = on_predict_batch_end = breaks

    ema, watch, module = EMA(decay=DECAY), Watch(), make_ppo()
    make_trainer(callbacks=[ema, watch]).fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 2))
    with pytest.raises(RuntimeError, match="broken"):
        getattr(make_trainer(callbacks=[ema, Break()]), method)(module, as_loader([left_padded(PROMPTS)]))
    assert torch.equal(watch.weight(module), watch.stepped[-1])
    assert not torch.allclose(average(watch.stepped), watch.stepped[-1], atol=1e-6)


@pytest.fixture
def averaged_checkpoint(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    """A checkpoint of a run with an average, and the weight after each of its steps."""
    watch = Watch()
    trainer = make_trainer(callbacks=[EMA(decay=DECAY), watch])
    trainer.fit(make_ppo(), as_loader([{"prompts": left_padded(PROMPTS)}] * 3))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt", watch.stepped


def test_checkpoint_carries_the_average(averaged_checkpoint):
    path, steps = averaged_checkpoint
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (state for name, state in checkpoint["callbacks"].items() if "EMA" in name)
    assert torch.allclose(next(iter(state["average"].values())), average(steps), rtol=0, atol=1e-12)
    live = next(value for name, value in checkpoint["state_dict"].items() if name.startswith("policy."))
    assert torch.equal(live, steps[-1])


@pytest.mark.parametrize("with_ema", [True, False])
def test_evaluation_of_a_checkpoint_sees_its_average(
    averaged_checkpoint, make_ppo, make_trainer, as_loader, left_padded, with_ema
):
    """In a new process: `validate --ckpt_path` with an EMA among the callbacks; without one the live weights."""
    path, steps = averaged_checkpoint
    watch = Watch()
    trainer = make_trainer(callbacks=[EMA(decay=DECAY), watch] if with_ema else [watch])
    trainer.validate(make_ppo(), as_loader([left_padded(PROMPTS)]), ckpt_path=path, verbose=False)
    expected = average(steps) if with_ema else steps[-1]
    assert torch.allclose(watch.validated[0][1], expected, rtol=0, atol=1e-12)


# Export


def test_merged_export_is_a_whole_model(make_folder, make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    module = make_ppo(policy=ModelSource(path=make_folder(), peft=config))
    trainer = make_trainer(callbacks=[Export(str(tmp_path / "out"), merge_adapter=True), EMA(decay=DECAY)])
    trainer.fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 2))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    tokens = torch.tensor([[12, 13, 14]])
    with torch.no_grad():
        live = module.policy.network(input_ids=tokens).logits
        assert not torch.allclose(saved(input_ids=tokens).logits, live, rtol=0, atol=1e-6)  # the average, not this
        ema = trainer.callbacks[[type(c) for c in trainer.callbacks].index(EMA)]
        for name, p in module.policy.named_parameters():
            if name in ema.average:
                p.copy_(ema.average[name])
        expected = module.policy.network(input_ids=tokens).logits
    assert torch.allclose(saved(input_ids=tokens).logits, expected, rtol=0, atol=1e-9)


def test_export_that_cannot_merge_is_refused_before_training(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    steps, export = [], Export(str(tmp_path / "out"), merge_adapter=True)

    class Count(Callback):
        def on_train_batch_end(self, *_):
            steps.append(1)

    with pytest.raises(ValueError, match="merge_adapter"):
        make_trainer(callbacks=[export, Count()]).fit(make_ppo(), as_loader([{"prompts": left_padded(PROMPTS)}]))
    assert steps == []


@pytest.mark.parametrize("dry", [True, 2])
def test_dry_run_keeps_an_earlier_export(make_ppo, make_trainer, as_loader, left_padded, tmp_path, dry):
    with write_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    batches = [{"prompts": left_padded(PROMPTS)}] * 2
    make_trainer(callbacks=[Export(str(tmp_path / "out"))], fast_dev_run=dry).fit(make_ppo(), as_loader(batches))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"x", MANIFEST}
    make_trainer(callbacks=[Export(str(tmp_path / "out"))]).fit(make_ppo(), as_loader(batches))
    assert "x" not in {path.name for path in (tmp_path / "out").iterdir()}


# Predictions


def test_broken_predictions_keep_the_older_file(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("older")
    rows = [{"prompt": "a"}] * 3 + [{"prompt": "a", "unwritable": object()}]
    trainer = make_trainer(callbacks=[PredictionWriter(str(path))])
    with pytest.raises(TypeError, match="the column `unwritable` can't be written .*object is not JSON serializable"):
        trainer.predict(make_ppo(), as_loader([left_padded(PROMPTS, rows=rows)]))
    assert path.read_text() == "older"
    trainer.predict(make_ppo(), as_loader([left_padded(PROMPTS)]))
    assert len(path.read_text().splitlines()) == 4


def test_predictions_hold_every_kind_of_cell(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    day = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    cells = {
        "bytes": (b"\x00\xff", "AP8="),
        "picture": ({"bytes": b"a", "path": None}, {"bytes": "YQ==", "path": None}),
        "time": (day, "2026-01-02T03:04:05+00:00"),
        "date": (day.date(), "2026-01-02"),
        "duration": (datetime.timedelta(seconds=1), "0:00:01"),
        "decimal": (Decimal("1.10"), "1.10"),
        "nan": ([math.nan, 1.5], [None, 1.5]),
        "infinite": (-math.inf, "-inf"),
        "number": (np.float32(0.5), 0.5),
        "flag": (np.bool_(True), True),
        "array": (np.array([[1, 2]]), [[1, 2]]),
        "moment": (np.datetime64("2026-01-02"), "2026-01-02"),
        "tensor": (torch.tensor([1.0, math.nan]), [1.0, None]),
        "half": ("a\ud800", "a\ud800"),
    }
    row = {"prompt": "a"} | {name: cell for name, (cell, _) in cells.items()}
    path = tmp_path / "out.jsonl"
    trainer = make_trainer(callbacks=[PredictionWriter(str(path))])
    trainer.predict(make_ppo(), as_loader([left_padded(PROMPTS[:1], rows=[row])]))
    (line,) = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {name: record[name] for name in cells} == {name: written for name, (_, written) in cells.items()}


def test_record_that_cannot_be_written_ends_before_its_response(
    make_ppo, make_trainer, as_loader, left_padded, tmp_path, monkeypatch
):
    module = make_ppo()
    monkeypatch.setattr(module, "predict_step", lambda *_: pytest.fail("a response was drawn"))
    trainer = make_trainer(callbacks=[PredictionWriter(str(tmp_path / "out.jsonl"))])
    with pytest.raises(TypeError, match="the column `x` can't be written"):
        trainer.predict(module, as_loader([left_padded(PROMPTS[:1], rows=[{"prompt": "a", "x": [{1}]}])]))


def test_predictions_of_two_loaders_are_one_line_each(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    path = tmp_path / "out.jsonl"
    loaders = [as_loader([left_padded(PROMPTS)]), as_loader([left_padded(PROMPTS[:2])])]
    make_trainer(callbacks=[PredictionWriter(str(path))]).predict(make_ppo(), loaders)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["p0", "p1", "p2", "p3", "p0", "p1"]


def test_command_line_writes_predictions(make_folder, write_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["test"])
    prompts = write_rows("prompts.jsonl", [{"question": p, "topic": i} for i, p in enumerate(["a b", "c", "d e f"])])
    quiet = [f"--trainer.{name}=false" for name in ("logger", "enable_progress_bar", "enable_model_summary")]
    cli = main(
        [
            "predict",
            *[*quiet, "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"],
            "--model=PPOModule",
            f"--model.policy.path={make_folder()}",
            "--model.reward=LearnedReward",
            f"--model.reward.path={make_folder(scorer=True)}",
            "--model.generation.max_new_tokens=4",
            "--model.algorithm.shaping=[]",
            "--data=PromptDataModule",
            f"--data.predict={prompts}",
            "--data.columns.prompt=question",
            "--data.batch_size=2",
            f"--predictions.path={tmp_path / 'deep' / 'out.jsonl'}",
        ]
    )
    records = [json.loads(line) for line in (tmp_path / "deep" / "out.jsonl").read_text().splitlines()]
    assert [(r["question"], r["topic"]) for r in records] == [("a b", 0), ("c", 1), ("d e f", 2)]
    for record in records:
        assert {"response", "score", "kl", "length", "ended"} <= record.keys()
        assert 1 <= record["length"] <= 4
        assert record["kl"] == pytest.approx(0.0, abs=1e-5)
    module = cli.model
    assert len({record["score"] for record in records}) > 1
    assert module.reward.shares_vocabulary


def test_export_of_shards_is_refused_before_training(tmp_path):
    from types import SimpleNamespace

    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

    export = Export(str(tmp_path / "out"))
    module = torch.nn.Linear(1, 1)
    module.save_pretrained = None
    with pytest.raises(ValueError, match="FSDPStrategy leaves each process a shard: take ModelParallelStrategy"):
        export.on_fit_start(SimpleNamespace(strategy=FSDPStrategy()), module)
    export.on_fit_start(SimpleNamespace(strategy=DDPStrategy(), fast_dev_run=True), module)


@pytest.mark.parametrize("owner", ["RunCheckpoint", "RolloutLog", "CSVLogger", "data", "model"])
def test_export_over_a_path_of_the_run_is_refused_before_training(
    make_trainer, make_folder, write_rows, tmp_path, owner
):
    place = tmp_path / "runs" / "mine"
    prompts = place / "prompts.jsonl"
    source = make_folder(end=list(range(10)))
    rows = write_rows("prompts", [{"prompt": "a"}] * 2)
    place.mkdir(parents=True)
    if owner == "data":
        rows = shutil.copy(rows, prompts)
    if owner == "model":
        source = str(shutil.copytree(source, place / "start"))
    others = {"RunCheckpoint": RunCheckpoint(str(place / "checkpoints")), "RolloutLog": RolloutLog(str(place))}
    callbacks = [Export(str(place)), *([others[owner]] if owner in others else [])]
    logger = CSVLogger(str(tmp_path / "runs"), "mine") if owner == "CSVLogger" else False
    module = PPOModule(ModelSource(path=source), lambda prompts, responses: [0.0] * len(prompts))
    data = PromptDataModule(train=str(rows), batch_size=2)
    with pytest.raises(ValueError, match=rf"Export replaces .*{owner}.* has .*give a folder of its own"):
        make_trainer(callbacks=callbacks, logger=logger, enable_checkpointing=owner == "RunCheckpoint").fit(
            module, data
        )


def test_export_that_fails_ends_the_run_after_its_end_is_saved(
    make_ppo, make_trainer, as_loader, left_padded, tmp_path
):
    """And the same command exports it without training again, once there is room."""
    batches = as_loader([{"prompts": left_padded(PROMPTS)}] * 2)
    steps = []

    class Full(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            steps.append(1)
            (tmp_path / "out").write_text("a file that came later")

    saver = partial(RunCheckpoint, str(tmp_path / "kept"), every_n_batches=100)
    trainer = make_trainer(callbacks=[Export(str(tmp_path / "out")), Full(), saver()], enable_checkpointing=True)
    with pytest.raises(ValueError, match="not exported to .*out .*--ckpt_path last"):
        trainer.fit(make_ppo(), batches)
    (tmp_path / "out").unlink()
    trainer = make_trainer(callbacks=[Export(str(tmp_path / "out")), saver()], enable_checkpointing=True)
    trainer.fit(make_ppo(), batches, ckpt_path="last")
    assert len(steps) == 2
    assert (tmp_path / "out" / "model.safetensors").exists()


def begins(callback):
    return lambda trainer: callback.on_train_start(trainer, SimpleNamespace(outcome=None, iteration=0))


def set_up(callback, stage="fit"):
    return lambda trainer: callback.setup(trainer, SimpleNamespace(predict_step=len), stage)


PLACES = {
    "RolloutLog": ("folder", lambda place: begins(RolloutLog(place))),
    "SampleLog": ("folder", lambda place: begins(SampleLog(place))),
    "NonFiniteGuard": ("folder", lambda place: set_up(NonFiniteGuard(folder=place))),
    "Report": ("output", lambda place: set_up(Report(place))),
    "Report.output": ("output", lambda place: set_up(Report("run", place))),
    "PredictionWriter": ("path", lambda place: set_up(PredictionWriter(f"{place}/out.jsonl"), "predict")),
}


@pytest.mark.parametrize(("argument", "start"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("first", [True, False], ids=["first process", "other process"])
def test_unwritable_place_is_found_before_training(tmp_path, argument, start, first):
    """A parent is a file; the other processes end with what the first one found."""
    (tmp_path / "file").write_text("x")
    place, said = tmp_path / "file" / "sub" / "run", "said by the first"
    strategy = SimpleNamespace(broadcast=lambda problem, *_: problem if first else said, checkpoint_io=None)
    trainer = SimpleNamespace(
        is_global_zero=first, strategy=strategy, fast_dev_run=False, log_dir=None, ckpt_path=None, loggers=[]
    )
    with pytest.raises(ValueError, match=f"`{argument}`: " + ("can't write to .*give a folder" if first else said)):
        start(str(place))(trainer)


def test_prediction_to_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`path`: .* is a folder: give the name of a file in it"):
        set_up(PredictionWriter(str(tmp_path)), "predict")(SimpleNamespace())
