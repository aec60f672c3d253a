"""The bar while a rollout is drawn: counts by hand, both of Lightning's bars, nothing where there is no bar."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_rlhf.callbacks import RolloutProgress, rollout_progress
from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.engines.decode import decode
from lightning_rlhf.engines.hf_generate import generate
from lightning_rlhf.engines.progress import Progress, Watch
from lightning_rlhf.modules import PPOModule, SFTModule

ENDS = list(range(10))
PROMPTS = [[12, 13], [10], [14, 15, 16, 11], [17]]


def vowels(prompts, responses):
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


@pytest.mark.parametrize("way", [decode, partial(decode, slots=2), generate], ids=["all", "slots", "generate"])
def test_watch_counts_every_response_and_token(make_lm, left_padded, way):
    network, batch, told = make_lm().eval(), left_padded(PROMPTS), []
    options = {"length": 6, "temperature": 1.0, "end_tokens": ENDS, "pad_token": 0}
    uniforms = torch.rand(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = way(network, batch.tokens, batch.mask, uniforms, **options)
    watched = way(network, batch.tokens, batch.mask, uniforms, watch=Watch(told.append, every=0.0), **options)
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    lengths = alone.response_mask.sum(1)
    assert lengths.unique().numel() > 1
    assert told[-1][:3] == (4, 4, int(lengths.sum()))
    assert told == sorted(told, key=lambda progress: progress.seconds)
    if way is not generate and not isinstance(way, partial):  # one pass, one token of each that goes on
        by_hand = [
            (int((lengths <= t).sum()), int(lengths.clamp(max=t).sum())) for t in range(1, int(lengths.max()) + 1)
        ]
        assert [(p.done, p.tokens) for p in told[:-1]] == by_hand


def test_watch_tells_at_its_pace_and_at_the_end(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr("lightning_rlhf.engines.progress.perf_counter", lambda: now[0])
    watch = Watch(told.append, every=2.0)
    for total in (3, 2):
        watch.begin(total, torch.device("cpu"))
        for _ in range(5):
            now[0] += 1.0
            watch.add(torch.tensor([True, False]))
        watch.end()
    first = [Progress(2, 3, 4, 2.0), Progress(4, 3, 8, 4.0), Progress(5, 3, 10, 5.0)]
    assert told == first + [progress._replace(total=2) for progress in first]
    with pytest.raises(ValueError, match="every"):
        Watch(told.append, every=-1.0)


@pytest.fixture
def fit(make_lm, make_tokenizer, make_trainer, as_loader, left_padded):
    """Three rollouts in two epochs, with a validation."""

    def run(*callbacks: Callback, rollouts: int = 3, **options: Any) -> PPOModule:
        module = PPOModule(
            policy=make_lm(end=ENDS).double(),
            reward=vowels,
            tokenizer=make_tokenizer(),
            generation=SamplingParams(max_new_tokens=5),
            optimizer=partial(torch.optim.SGD, lr=0.01),
            schedule=ConstantSchedule(),
        )
        prompts = left_padded(PROMPTS)
        usual = {"callbacks": list(callbacks), "max_epochs": 2, "enable_progress_bar": True}
        trainer = make_trainer(**(usual | options))
        trainer.fit(module, as_loader([{"prompts": prompts}] * rollouts), as_loader([prompts]))
        return module

    return run


BARS = {
    "tqdm": TQDMProgressBar,
    "rich": partial(RichProgressBar, console_kwargs={"force_terminal": True, "width": 160}),
}


@pytest.mark.parametrize("kind", BARS)
def test_bar_shows_responses_speed_and_time_left(fit, capsys, monkeypatch, kind):
    """What stands in the bar after each change; which of them are drawn is a matter of its refresh rate."""
    if kind == "rich":
        pytest.importorskip("rich")
    bar, told, describe = BARS[kind](), [], rollout_progress._describe

    def watched(*args):
        describe(*args)
        shown = bar.train_progress_bar
        told.append(shown.desc.removesuffix(": ") if kind == "tqdm" else shown.description)

    monkeypatch.setattr(rollout_progress, "_describe", watched)
    module = fit(bar, RolloutProgress(every=0.0))
    first = next(i for i, text in enumerate(told) if re.fullmatch(r"Epoch 0, 0:00:0\d left", text))
    assert re.fullmatch(r"Epoch 0, [0-3]/4 responses, \d+ tokens/s", told[0])  # no end is known yet
    assert re.fullmatch(r"Epoch 0, 4/4 responses, \d+ tokens/s", told[first - 2])
    assert told[first - 1] == "Epoch 0, update 1/1"
    assert re.fullmatch(r"Epoch 0, [0-3]/4 responses, \d+ tokens/s, 0:00:0\d left", told[first + 1])
    assert told[-1] == "Epoch 1, 0:00:00 left"
    assert module.collector.engine.watch is None
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert re.search(r"Epoch 1, 0:00:00 left.*3/3.*score[:=] ?-?\d.*kl[:=] ?-?\d", drawn)


class Said(Callback):
    """What is watched after each rollout began."""

    def __init__(self) -> None:
        self.watches: list[Watch | None] = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.watches.append(pl_module.collector.engine.watch)


@pytest.mark.parametrize(("bar", "watched"), [(TQDMProgressBar(), True), (TQDMProgressBar(refresh_rate=0), False)])
def test_bar_that_is_off_watches_nothing(fit, capsys, bar, watched):
    said = Said()
    fit(bar, RolloutProgress(), said, rollouts=1, max_epochs=1)
    assert [watch is not None for watch in said.watches] == [watched]
    assert ("responses" in capsys.readouterr().out) == watched


def test_no_bar_watches_nothing(fit):
    said = Said()
    fit(RolloutProgress(), said, rollouts=1, max_epochs=1, enable_progress_bar=False)
    assert said.watches == [None]


def test_time_left_is_the_pace_so_far(fit, capsys, monkeypatch):
    """Ten seconds a rollout: after one of six, fifty are left, whatever the steps of each."""
    now = [0.0]
    monkeypatch.setattr("lightning_rlhf.callbacks.rollout_progress.perf_counter", lambda: now[0])

    class Slow(Callback):
        def on_train_batch_start(self, *_):
            now[0] += 10.0

    fit(TQDMProgressBar(), Slow(), RolloutProgress(), rollouts=3)
    shown = capsys.readouterr().out
    after = re.findall(r"Epoch \d, (\d:\d\d:\d\d) left", shown)
    assert list(dict.fromkeys(after)) == ["0:00:50", "0:00:40", "0:00:30", "0:00:20", "0:00:10", "0:00:00"]


def test_steps_end_a_run_too(fit, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning_rlhf.callbacks.rollout_progress.perf_counter", lambda: now[0])

    class Slow(Callback):
        def on_train_batch_start(self, *_):
            now[0] += 10.0

    fit(TQDMProgressBar(), Slow(), RolloutProgress(), rollouts=9, max_epochs=-1, max_steps=3)
    after = re.findall(r"Epoch \d, (\d:\d\d:\d\d) left", capsys.readouterr().out)
    assert list(dict.fromkeys(after)) == ["0:00:20", "0:00:10", "0:00:00"]


def test_stage_without_rollouts_is_left_alone(make_lm, make_trainer, as_loader, right_padded, capsys):
    module = SFTModule(make_lm().double(), optimizer=partial(torch.optim.SGD, lr=0.01), schedule=ConstantSchedule())
    trainer = make_trainer(callbacks=[TQDMProgressBar(), RolloutProgress()], enable_progress_bar=True)
    trainer.fit(module, as_loader([right_padded([[10, 11, 0]])]))
    assert "left" not in capsys.readouterr().out
