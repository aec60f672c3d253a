"""`rollouts.jsonl` and `samples.jsonl`: every number by hand, and the same file after an interruption."""

from __future__ import annotations

import csv
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_rlhf.callbacks import RolloutLog, RunCheckpoint, SampleLog
from lightning_rlhf.callbacks.run_file import RunFile
from lightning_rlhf.callbacks.run_lock import RunLock
from lightning_rlhf.core import Algorithm, BanditAdvantage, BatchMean, ConstantSchedule, FixedKL, TruncatedScore
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule, SFTModule
from lightning_rlhf.report.places import find_places
from lightning_rlhf.rewards import WeightedReward
from lightning_rlhf.types import Outcome

ENDS = list(range(10))
PROMPTS, HELD_OUT = [[12, 13], [10], [14, 15, 16, 11], [17]], [[20, 21], [22], [23, 11, 10]]
BETA = 0.3
EVIL = "\x1b[31m| <b>x</b>\u202e\n[l](javascript:1)"


def vowels(prompts, responses):
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


def brevity(prompts, responses):
    return [-len(response) / 10 for response in responses]


def rows(name: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {start + i}", "question": i, "said": EVIL} for i in range(count)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Seen(Callback):
    """What the module showed after each rollout."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.outcomes.append(pl_module.outcome)


@pytest.fixture(scope="module")
def make_module(make_lm, make_tokenizer):
    def make() -> PPOModule:
        return PPOModule(
            policy=make_lm(end=ENDS).double(),
            reward=WeightedReward({"vowels": vowels, "short": brevity}),
            tokenizer=make_tokenizer(),
            generation=SamplingParams(max_new_tokens=5, samples_per_prompt=2),
            algorithm=Algorithm(
                beta=FixedKL(coef=BETA),
                advantage=BanditAdvantage(baseline=BatchMean()),
                shaping=(TruncatedScore(value=-9.0),),
            ),
            optimizer=partial(torch.optim.SGD, lr=0.05),
            schedule=ConstantSchedule(),
        )

    return make


@pytest.fixture
def fit(make_module, make_trainer, as_loader, left_padded):
    """Three rollouts with a validation after each, of two batches and a filler."""

    def run(folder: Path | None, *more: Callback, ckpt_path: str | None = None, logger: Any = False, **options) -> Any:
        train = as_loader([{"prompts": left_padded(PROMPTS, rows=rows("p", 4))}] * 3)
        val = [
            left_padded(HELD_OUT[:2], rows=rows("v", 2)),
            left_padded(HELD_OUT[2:] * 2, rows=rows("v", 2, 2), counts=[True, False]),
        ]
        logs = [] if folder is None else [RolloutLog(str(folder)), SampleLog(str(folder), table=2)]
        trainer = make_trainer(
            callbacks=[*logs, *more],
            **({"val_check_interval": 1, "logger": logger} | options),
        )
        module = make_module()
        trainer.fit(module, train, as_loader(val), ckpt_path=ckpt_path)
        return trainer, module

    return run


def test_lines_say_what_was_measured(fit, tmp_path, make_lm):
    """From the outcome's tensors, and log-probs of the first rollout from an unpadded pass a row."""
    seen = Seen()
    _, module = fit(tmp_path, seen)
    lines = read(tmp_path / "rollouts.jsonl")
    assert [(line["iteration"], line["episode"]) for line in lines] == [(n // 8, n) for n in range(24)]
    assert [line["prompt"] for line in lines[:8]] == [f"p {i // 2}" for i in range(8)]
    network = make_lm(end=ENDS).double().eval()
    for line in lines[:8]:
        prompt = PROMPTS[line["row"]["question"]]
        with torch.no_grad():
            logits = network(torch.tensor([prompt + line["tokens"]])).logits[0].log_softmax(-1)
        logprobs = [float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(line["tokens"])]
        assert line["entropy"] == pytest.approx(-math.fsum(logprobs), abs=1e-9)
        assert line["kl"] == pytest.approx(0.0, abs=1e-9)
    for number, outcome in enumerate(seen.outcomes):
        assert outcome.rollout.logprobs_with_grad is None
        part = lines[8 * number : 8 * number + 8]
        credit = [line["score"] - BETA * line["kl"] for line in part]
        for i, line in enumerate(part):
            letters = [chr(87 + token) for token in line["tokens"] if token >= 10]
            names = {2: "<unk>", 5: "user", 6: "assistant", 7: "system"}
            assert [word for word in line["response"].split() if word not in names.values()] == letters
            assert line["length"] == len(line["tokens"]) == int(outcome.rollout.response_mask[i].sum())
            assert line["ended"] == (line["tokens"][-1] < 10)
            assert line["score/vowels"] == vowels([], [line["response"]])[0]
            assert line["raw_score"] == pytest.approx(line["score/vowels"] + line["score/short"])
            assert line["score"] == (pytest.approx(line["raw_score"]) if line["ended"] else -9.0)
            assert line["advantage"] == pytest.approx(credit[i] - sum(credit) / 8, abs=1e-9)
            assert line["row"] == {"question": i // 2, "said": EVIL}
    assert 0 < sum(line["ended"] for line in lines) < 24
    assert any(abs(line["kl"]) > 1e-3 for line in lines[8:])
    assert module.outcome is not seen.outcomes[-1]  # the evaluation's by now


def test_line_of_a_single_response_has_no_turns(fit, tmp_path):
    fit(tmp_path)
    before = ["iteration", "episode", "prompt", "response", "tokens"]
    assert all(list(line)[:5] == before for line in read(tmp_path / "rollouts.jsonl"))
    assert all(list(line)[-1] == "row" for line in read(tmp_path / "rollouts.jsonl"))
    written = (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8")
    assert '"turns"' not in written
    assert '"failed"' not in written


def test_logs_predictions_and_failures_hold_the_text_that_the_reward_saw(
    make_lm, make_tokenizer, make_trainer, as_loader, left_padded, tmp_path, monkeypatch
):
    """Tags such as <think> too, where they are special tokens: what is scored again is what was scored."""
    monkeypatch.chdir(tmp_path)
    tokenizer, seen = make_tokenizer(), []
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)  # 36 and 37

    def reward(prompts, responses):
        seen.append(responses)
        return [math.nan if len(seen) == 3 else 0.0] * len(responses)

    module = PPOModule(
        policy=make_lm(end=ENDS, vocab=38).double(),
        reward=reward,
        tokenizer=tokenizer,
        generation=SamplingParams(max_new_tokens=9, samples_per_prompt=16),
        schedule=ConstantSchedule(),
    )
    batch = left_padded(PROMPTS, rows=rows("p", 4))
    trainer = make_trainer(callbacks=[RolloutLog(str(tmp_path))])
    trainer.fit(module, as_loader([{"prompts": batch}]))
    assert [line["response"] for line in read(tmp_path / "rollouts.jsonl")] == seen[0]
    assert any("<think>" in response for response in seen[0])
    (records,) = make_trainer().predict(module, as_loader([batch]))
    assert [record["response"] for record in records] == seen[1]
    with pytest.raises(ValueError, match="failed-rewards"):
        make_trainer().fit(module, as_loader([{"prompts": batch}]))
    (kept,) = tmp_path.glob("failed-rewards/rollout-*.jsonl")
    assert [line["response"] for line in read(kept)] == seen[2]


def test_samples_begin_before_training_and_leave_fillers_out(fit, tmp_path, make_module, make_trainer, as_loader):
    fit(tmp_path)
    lines = read(tmp_path / "samples.jsonl")
    assert [(line["iteration"], line["index"]) for line in lines] == [(n, i) for n in range(4) for i in range(3)]
    assert {line["stage"] for line in lines} == {"val"}
    assert [line["prompt"] for line in lines[:3]] == ["v 0", "v 1", "v 2"]
    names = {"prompt", "response", "length", "ended", "raw_score", "score", "score/vowels", "score/short", "kl"}
    assert lines[0].keys() == names | {"iteration", "stage", "index", "entropy"}
    assert all(line["kl"] == pytest.approx(0.0, abs=1e-9) for line in lines[:3])
    assert all(abs(line["kl"]) > 1e-6 for line in lines[-3:])


def test_state_before_training_changes_nothing_that_follows(fit, tmp_path):
    """Logged evaluation, weights and global random numbers are those of a run without the log."""
    found = []
    for folder in (tmp_path, None):
        torch.manual_seed(1)
        trainer, module = fit(folder)
        weights = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
        found.append((weights, trainer.callback_metrics["eval/reward"], torch.rand(1)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_fast_dev_run_writes_nothing(fit, tmp_path):
    fit(tmp_path, fast_dev_run=1)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("torn", [b"", b'{"iteration": 2, "epis', b'{"iteration": 3}\n{"iteration": 4, "a'])
def test_resumed_log_is_that_of_an_uninterrupted_run(fit, tmp_path, torn):
    whole, part = tmp_path / "whole", tmp_path / "part"
    fit(whole)
    saver = partial(RunCheckpoint, str(part / "checkpoints"))
    fit(part, saver(), enable_checkpointing=True, limit_train_batches=3, max_steps=2)
    for name in ("rollouts.jsonl", "samples.jsonl"):
        with (part / name).open("ab") as file:
            file.write(torn)
    fit(part, saver(), enable_checkpointing=True, ckpt_path="last")
    assert read(part / "rollouts.jsonl") == read(whole / "rollouts.jsonl")
    assert read(part / "samples.jsonl") == read(whole / "samples.jsonl")


def test_new_run_moves_the_log_of_an_old_one_aside(fit, tmp_path, caplog):
    fit(tmp_path)
    before = {name: (tmp_path / f"{name}.jsonl").read_bytes() for name in ("rollouts", "samples")}
    (tmp_path / "rollouts.earlier-1.jsonl").write_bytes(b"taken")
    fit(tmp_path)
    numbers = {"rollouts": 2, "samples": 1}
    for name, number in numbers.items():
        assert (tmp_path / f"{name}.jsonl").read_bytes() == before[name]
        assert (tmp_path / f"{name}.earlier-{number}.jsonl").read_bytes() == before[name]
        assert f"{name}.jsonl was of an earlier run: it is now {tmp_path}/{name}.earlier-{number}.jsonl" in caplog.text
    assert (tmp_path / "rollouts.earlier-1.jsonl").read_bytes() == b"taken"
    (place,) = find_places(tmp_path)
    assert sorted(path.name for path in place.others) == ["rollouts.jsonl", "samples.jsonl"]


@pytest.mark.parametrize("name", ["rollouts.jsonl", "samples.jsonl"])
def test_second_run_in_the_folder_of_a_log_is_refused(fit, tmp_path, monkeypatch, name):
    take = RunLock.take
    monkeypatch.setattr(RunLock, "take", lambda self, path: "process 7" if name in path.name else take(self, path))
    with pytest.raises(ValueError, match=f"`folder`: another run writes to {tmp_path}: process 7; wait for it"):
        fit(tmp_path)
    monkeypatch.undo()
    fit(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts.jsonl", "samples.jsonl"]


def test_log_is_locked_for_the_time_of_the_run(fit, tmp_path):
    class Look(Callback):
        def on_train_batch_end(self, *_):
            seen.append(sorted(path.name for path in tmp_path.glob(".*")))

        def on_validation_end(self, *_):
            raise RuntimeError("broken")

    seen: list[list[str]] = []
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, Look())
    assert seen == [[".rollouts.jsonl.lock", ".samples.jsonl.lock"]]
    assert list(tmp_path.glob(".*")) == []


def test_test_replaces_its_own_lines_and_validate_writes_none(fit, tmp_path, make_trainer, as_loader, left_padded):
    _, module = fit(tmp_path)
    before = read(tmp_path / "samples.jsonl")
    held_out = as_loader([left_padded(HELD_OUT, rows=rows("t", 3))])
    for _ in range(2):
        make_trainer(callbacks=[SampleLog(str(tmp_path))]).test(module, held_out, verbose=False)
        make_trainer(callbacks=[SampleLog(str(tmp_path))]).validate(module, held_out, verbose=False)
    lines = read(tmp_path / "samples.jsonl")
    assert lines[: len(before)] == before
    assert [(line["stage"], line["iteration"], line["prompt"]) for line in lines[len(before) :]] == [
        ("test", 3, f"t {i}") for i in range(3)
    ]


def test_full_disk_leaves_the_file_that_was_to_be_written_anew(tmp_path, monkeypatch, caplog):
    file = RunFile(str(tmp_path), "log.jsonl")
    file.path = tmp_path / "log.jsonl"
    file.append([{"a": 1}, {"a": 2}])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    file.drop(lambda line: line["a"] == 1)
    assert read(file.path) == [{"a": 1}, {"a": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert "No space left on device" in caplog.text


def test_full_disk_costs_the_lines_and_not_the_run(tmp_path, monkeypatch, caplog):
    file = RunFile(str(tmp_path), "log.jsonl")
    file.path = tmp_path / "log.jsonl"
    file.append([{"a": 1}])
    real = Path.open

    class Full:
        def __enter__(self):
            self.file = real(file.path, "a")
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[:5])
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
    file.append([{"b": 2}])
    monkeypatch.undo()
    assert "No space left on device" in caplog.text
    file.append([{"c": 3}])
    assert read(file.path) == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        (
            '{"iteration": 0, "a": 1}\n{"iteration": 1}\n{"iteration": 2}\n',
            '{"iteration": 0, "a": 1}\n{"iteration": 1}\n',
        ),
        ('{"iteration": 1}\n{"iteration": 1', '{"iteration": 1}\n'),  # torn
        ('{"iteration": 1}\n{"iteration": 1}', '{"iteration": 1}\n'),  # whole but for its line break
        ('{"iteration": 10}\n', ""),
        ("{}\n", ""),
    ],
)
def test_file_is_cut_at_the_first_line_that_does_not_belong(tmp_path, make_trainer, text, kept):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    RunFile(str(tmp_path), "log.jsonl").begin(make_trainer(), before=2)
    assert path.read_text() == kept


def test_log_is_ascii_and_pandas_reads_it(fit, tmp_path):
    pandas = pytest.importorskip("pandas")
    fit(tmp_path)
    assert (tmp_path / "rollouts.jsonl").read_bytes().isascii()
    frame = pandas.read_json(tmp_path / "rollouts.jsonl", lines=True)
    assert len(frame) == 24
    assert frame["row"][0]["said"] == EVIL
    assert frame.groupby("iteration")["score"].mean().notna().all()


def test_other_stages_write_nothing(make_lm, toy_tokenizer, make_trainer, as_loader, right_padded, tmp_path):
    module = SFTModule(make_lm().double(), toy_tokenizer, schedule=ConstantSchedule())
    texts = right_padded([[12, 13, 14, 0]])
    logs = [RolloutLog(str(tmp_path)), SampleLog(str(tmp_path))]
    make_trainer(callbacks=logs).fit(module, as_loader([texts]), as_loader([texts]))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_table_is_refused_below_zero():
    with pytest.raises(ValueError, match="`table` must be at least 0 prompts: got -1"):
        SampleLog(table=-1)


WANTED = {"objective/scores", "objective/scores/vowels", "eval/reward", "eval/kl", "policy/grad_norm", "time/step"}


def test_csv_logger_takes_the_run(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="csv")
    fit(tmp_path, logger=logger, log_every_n_steps=1)
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0].keys() >= WANTED
    for name in WANTED:
        assert len([line for line in lines if line[name]]) == 3


def test_tensorboard_logger_takes_the_run_and_a_table_of_samples(fit, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="board")
    fit(tmp_path, logger=logger, log_every_n_steps=1)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert set(events.Tags()["scalars"]) >= WANTED
    assert [event.step for event in events.Scalars("objective/scores")] == [0, 1, 2]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    assert len(texts) == 4  # before training and after each rollout
    assert all(text.count("\n") == 3 for text in texts)  # head, rule, two prompts
    after = [line for line in read(tmp_path / "samples.jsonl") if line["iteration"] == 3]
    assert f"{after[0]['score']:.3f}" in texts[-1]
    assert "v 0" in texts[-1]


def test_wandb_logger_takes_the_run_and_a_table_of_samples(fit, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True, settings=wandb.Settings(console="off"))
    try:
        fit(tmp_path, logger=logger, log_every_n_steps=1)
        summary = dict(logger.experiment.summary)
        folder = Path(logger.experiment.dir)
    finally:
        wandb.finish()
    assert summary.keys() >= WANTED
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("*.table.json")]
    assert len(tables) == 4
    samples = read(tmp_path / "samples.jsonl")
    for table in tables:
        assert table["columns"] == ["prompt", "before training", "now", "score before", "score now", "KL now"]
        assert [row[0] for row in table["data"]] == ["v 0", "v 1"]
        assert [row[1] for row in table["data"]] == [line["response"] for line in samples[:2]]
