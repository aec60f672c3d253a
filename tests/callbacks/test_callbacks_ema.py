"""EMA, Export and PredictionWriter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from gathered import gathered
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from lightning_rlhf.callbacks import EMA, Export, NonFiniteGuard, PredictionWriter
from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.folders import atomic
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule
from lightning_rlhf.rollout import UpdateSchedule

TEXTS = [[12, 13, 20, 21, 0], [10, 11, 0], [14, 15, 16, 17, 18, 19, 0]]
RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17]]
DECAY = 0.8


class Trajectory(Callback):
    """The live weights after every batch, and those that validation, test and prediction see."""

    def __init__(self) -> None:
        self.live, self.seen = [], {}

    def on_fit_start(self, trainer, pl_module):
        self.live.append(flat(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.live.append(flat(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.seen["validate"] = flat(pl_module)

    def on_test_batch_end(self, trainer, pl_module, *_):
        self.seen["test"] = flat(pl_module)

    def on_predict_batch_end(self, trainer, pl_module, *_):
        self.seen["predict"] = flat(pl_module)


def flat(module) -> torch.Tensor:
    network = getattr(module, "policy", None) or module.model
    return torch.cat([p.detach().flatten().clone() for p in network.parameters()])


def averaged(live: list[torch.Tensor]) -> torch.Tensor:
    """d^k·θ_0 + (1 − d)·Σ_i d^(k−i)·θ_i."""
    k = len(live) - 1
    return DECAY**k * live[0] + (1 - DECAY) * sum(DECAY ** (k - i) * live[i] for i in range(1, k + 1))


@pytest.fixture
def make_sft(make_lm):
    def make(**options) -> SFTModule:
        adam = partial(torch.optim.Adam, lr=0.01)
        return SFTModule(make_lm().double(), optimizer=adam, schedule=ConstantSchedule(), **options)

    return make


@pytest.fixture
def make_ppo(make_lm, token_reward):
    def make(**options) -> PPOModule:
        usual = {
            "generation": SamplingParams(max_new_tokens=4),
            "updates": UpdateSchedule(minibatch=2),
            "schedule": ConstantSchedule(),
        }
        adam = partial(torch.optim.Adam, lr=0.01)
        return PPOModule(make_lm().double(), token_reward(), **gathered(optimizer=adam, **usual | options))

    return make


def test_average_has_its_closed_form(make_sft, make_trainer, as_loader, right_padded):
    ema, watch = EMA(decay=DECAY), Trajectory()
    batches = as_loader([right_padded(TEXTS)] * 5)
    make_trainer(callbacks=[ema, watch]).fit(make_sft(), batches, as_loader([right_padded(TEXTS)]))
    assert len(watch.live) == 6
    expected = averaged(watch.live)
    assert torch.allclose(torch.cat([t.flatten() for t in ema.average.values()]), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(expected, watch.live[-1], atol=1e-3)
    assert torch.allclose(watch.seen["validate"], expected, rtol=0, atol=1e-12)


def test_training_goes_on_with_the_live_weights(make_sft, make_trainer, as_loader, right_padded):
    def run(callbacks):
        module = make_sft()
        trainer = make_trainer(callbacks=callbacks, val_check_interval=1)
        trainer.fit(module, as_loader([right_padded(TEXTS)] * 4), as_loader([right_padded(TEXTS)]))
        return flat(module)

    assert torch.equal(run([EMA(decay=DECAY)]), run([]))


@pytest.mark.parametrize("method", ["validate", "test"])
def test_evaluation_after_training_sees_the_average(make_sft, make_trainer, as_loader, right_padded, method):
    ema, watch = EMA(decay=DECAY), Trajectory()
    module = make_sft()
    trainer = make_trainer(callbacks=[ema, watch])
    trainer.fit(module, as_loader([right_padded(TEXTS)] * 4))
    live = flat(module)
    getattr(trainer, method)(module, as_loader([right_padded(TEXTS)]), verbose=False)
    assert torch.allclose(watch.seen[method], averaged(watch.live), rtol=0, atol=1e-12)
    assert torch.equal(flat(module), live)


def test_average_moves_once_per_optimizer_step(make_ppo, make_trainer, as_loader, left_padded):
    """Three rollouts of two minibatches: six steps."""
    steps = []

    class Counting(EMA):
        def update(self, pl_module):
            steps.append(1)
            super().update(pl_module)

    make_trainer(callbacks=[Counting()]).fit(make_ppo(), as_loader([{"prompts": left_padded(RAGGED)}] * 3))
    assert len(steps) == 6


def test_step_that_the_guard_leaves_out_is_not_averaged(make_sft, make_trainer, as_loader, right_padded, tmp_path):
    """Four batches, of which the second has NaN gradients: three steps."""
    ema, watch, module, number = EMA(decay=DECAY), Trajectory(), make_sft(), iter(range(9))
    module.configure_model()
    module.model.network.transformer.wpe.weight.register_hook(lambda x: x * torch.nan if next(number) == 1 else x)
    guard = NonFiniteGuard(folder=str(tmp_path / "bad"))
    make_trainer(callbacks=[guard, ema, watch]).fit(module, as_loader([right_padded(TEXTS)] * 4))
    assert torch.equal(watch.live[1], watch.live[2])
    expected = averaged(watch.live[:2] + watch.live[3:])
    found = torch.cat([t.flatten() for t in ema.average.values()])
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, averaged(watch.live), rtol=0, atol=1e-6)


def test_sampling_and_reference_use_the_live_policy(make_ppo, make_trainer, as_loader, left_padded):
    def run(callbacks):
        module = make_ppo()
        held_out = as_loader([left_padded(RAGGED)])
        trainer = make_trainer(callbacks=callbacks, val_check_interval=1)
        trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 3), held_out)
        return flat(module)

    assert torch.equal(run([EMA(decay=0.5)]), run([]))


def test_average_continues_from_the_checkpoint(make_sft, make_trainer, as_loader, right_padded, tmp_path):
    whole, first, second = EMA(decay=DECAY), EMA(decay=DECAY), EMA(decay=DECAY)
    batches = as_loader([right_padded(TEXTS)] * 2)
    make_trainer(callbacks=[whole], max_epochs=2).fit(make_sft(), batches)
    trainer = make_trainer(callbacks=[first], max_epochs=1)
    trainer.fit(make_sft(), batches)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    resumed = make_sft()
    make_trainer(callbacks=[second], max_epochs=2).fit(resumed, batches, ckpt_path=tmp_path / "x.ckpt")
    for name, average in whole.average.items():
        assert torch.allclose(second.average[name], average, rtol=0, atol=1e-12)
        assert not torch.equal(first.average[name], average) or not average.abs().sum()


def test_checkpoint_holds_the_live_weights(make_sft, make_trainer, as_loader, right_padded, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    saver = ModelCheckpoint(dirpath=tmp_path, filename="x", save_top_k=-1)
    module = make_sft()
    trainer = make_trainer(callbacks=[EMA(decay=DECAY), saver], enable_checkpointing=True)
    trainer.fit(module, as_loader([right_padded(TEXTS)] * 4), as_loader([right_padded(TEXTS)]))
    state = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(state["model.network.transformer.wte.weight"], module.model.network.transformer.wte.weight)


def test_average_of_another_model_is_refused(make_sft, make_trainer, as_loader, right_padded):
    ema = EMA()
    ema.load_state_dict({"average": {"x": torch.zeros(1)}})
    with pytest.raises(ValueError, match="another model"):
        make_trainer(callbacks=[ema]).fit(make_sft(), as_loader([right_padded(TEXTS)]))


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(decay=decay)


def test_error_in_validation_leaves_the_live_weights(make_sft, make_trainer, as_loader, right_padded):
    class Break(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            raise RuntimeError("broken")

    watch, module = Trajectory(), make_sft()
    trainer = make_trainer(callbacks=[EMA(decay=DECAY), watch, Break()])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, as_loader([right_padded(TEXTS)] * 4), as_loader([right_padded(TEXTS)]))
    assert torch.equal(flat(module), watch.live[-1])


# Export


def test_export_writes_the_average_and_leaves_the_live_weights(
    make_sft, make_trainer, as_loader, right_padded, tmp_path
):
    ema, watch = EMA(decay=DECAY), Trajectory()
    module = make_sft()
    trainer = make_trainer(callbacks=[Export(str(tmp_path / "out")), ema, watch])
    trainer.fit(module, as_loader([right_padded(TEXTS)] * 4))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    found = torch.cat([p.flatten() for p in saved.parameters()])
    assert torch.allclose(found, averaged(watch.live), rtol=0, atol=1e-12)
    assert torch.equal(flat(module), watch.live[-1])


def test_export_without_an_average_writes_the_live_weights(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    module = make_ppo()
    trainer = make_trainer(callbacks=[Export(str(tmp_path / "out"))])
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert torch.equal(torch.cat([p.flatten() for p in saved.parameters()]), flat(module))


def test_export_keeps_out_of_a_dry_run(make_sft, make_trainer, as_loader, right_padded, tmp_path):
    trainer = make_trainer(callbacks=[Export(str(tmp_path / "out"))], fast_dev_run=True)
    trainer.fit(make_sft(), as_loader([right_padded(TEXTS)]))
    assert not (tmp_path / "out").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("part", ["network", "tokenizer"])
def test_export_writes_the_whole_folder_or_nothing(make_sft, toy_tokenizer, tmp_path, monkeypatch, there, part):
    module = make_sft(tokenizer=toy_tokenizer)
    out = tmp_path / "deep" / "out"
    if there:
        module.save_pretrained(out)
        before = contents(out)
    module.configure_model()
    writer = module.model.network if part == "network" else module.tokenizer
    original = writer.save_pretrained

    def torn(folder, *args, **kwargs):
        original(folder, *args, **kwargs)
        raise OSError("disk full")

    monkeypatch.setattr(writer, "save_pretrained", torn, raising=False)
    with torch.no_grad():
        module.model.network.transformer.wte.weight.add_(1.0)
    with pytest.raises(OSError, match="disk full"):
        module.save_pretrained(out)
    assert [path.name for path in out.parent.iterdir()] == (["out"] if there else [])
    if there:
        assert contents(out) == before


def test_export_that_cannot_be_renamed_keeps_the_old_folder(make_sft, tmp_path, monkeypatch):
    module = make_sft()
    out = tmp_path / "out"
    module.save_pretrained(out)
    before = contents(out)
    rename = Path.rename

    def fails(self, target):
        if self.name == "new":
            raise OSError("in use")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    with pytest.raises(OSError, match="in use"):
        module.save_pretrained(out)
    assert contents(out) == before


def test_export_replaces_what_stood_there(make_sft, make_lm, tmp_path):
    out = tmp_path / "out"
    with atomic.write_folder(out) as folder:
        (folder / "stale.txt").write_text("old")
    make_sft().save_pretrained(out)
    assert "stale.txt" not in contents(out)
    assert "model.safetensors" in contents(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_onto_a_file_is_refused(make_sft, tmp_path):
    (tmp_path / "out").write_text("I am a file")
    with pytest.raises(ValueError, match="a file has that name"):
        make_sft().save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "I am a file"


def test_export_works_for_every_stage(make_scorer, make_trainer, as_loader, tmp_path):
    from lightning_rlhf.types import ComparisonBatch

    tokens = torch.tensor([[[12, 13, 0], [12, 14, 0]]])
    mask, unknown = torch.ones_like(tokens, dtype=torch.bool), torch.full((1, 2), torch.nan)
    batch = ComparisonBatch(tokens, mask, torch.tensor([[0, 1]]), unknown)
    make_trainer(callbacks=[EMA(), Export(str(tmp_path / "rm"))]).fit(
        RewardModule(make_scorer().double()), as_loader([batch])
    )
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["demonstration_bias"] == 0.0


# Predictions


def test_predictions_are_written_as_lines(make_ppo, make_trainer, as_loader, left_padded, toy_tokenizer, tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    rows = [{"prompt": f"ä{i}", "topic": i} for i in range(4)]
    batches = [
        left_padded(RAGGED[:3], rows=rows[:3], counts=[True, True, True]),
        left_padded(RAGGED[2:], rows=rows[2:], counts=[False, True]),
    ]
    trainer = make_trainer(callbacks=[PredictionWriter(str(path))])
    for _ in range(2):  # a second run replaces the file
        trainer.predict(make_ppo(tokenizer=toy_tokenizer), as_loader(batches), return_predictions=False)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["topic"] for record in records] == [0, 1, 2, 3]
    for record in records:
        judged = {"score", "raw_score", "kl", "entropy", "length", "ended"}
        assert record.keys() == {"prompt", "topic", "response"} | judged
        assert isinstance(record["response"], str)
        assert isinstance(record["ended"], bool)
        assert isinstance(record["length"], int)
    assert "ä0" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]


def test_predictions_without_a_tokenizer_are_token_ids(make_ppo, make_trainer, as_loader, left_padded, tmp_path):
    path = tmp_path / "out.jsonl"
    trainer = make_trainer(callbacks=[PredictionWriter(str(path))])
    trainer.predict(make_ppo(), as_loader([left_padded(RAGGED)]))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(record["response"]) for record in records] == [record["length"] for record in records]
