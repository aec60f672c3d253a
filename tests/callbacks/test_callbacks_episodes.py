"""Episodes by turns: in the logs, on the page, on the progress bar, and scored again from the log."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_rlhf import PPOModule, RolloutLog, RolloutProgress, SampleLog, SamplingParams
from lightning_rlhf.cli import main
from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.environments import Done, Environment, Reply
from lightning_rlhf.report.book import write_report
from lightning_rlhf.rewards import EnvironmentReward
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.types import Outcome, Rollout, Turn

ENDS = list(range(10))
ROWS = [{"prompt": "c d e", "answer": "v"}, {"prompt": "a", "answer": "w"}]


class Dice(Environment):
    """Answers by the dice, and now and then falls off the table."""

    def reset(self, row):
        self.dice, self.turns = random.Random(self.seed), 0
        if self.dice.random() < 0.1:
            raise OSError("no table")

    def step(self, text, tool_calls):
        self.turns += 1
        if self.dice.random() < 0.1:
            raise OSError("off the table")
        if self.turns == 3 or self.dice.random() < 0.3:
            return Done(float(len(text) % 3))
        return Reply(self.dice.choice([" v", " v w <b>z</b>"]), 0.25)


def longest(prompts, responses):
    return [float(len(response)) for response in responses]


@pytest.fixture(params=["environment", "text"])
def run(request, tmp_path_factory, make_lm, make_tokenizer, make_trainer, as_loader, left_padded) -> Path:
    """Folder of a run of two rollouts whose reward is the environment's, or of the last turn's text."""
    folder = tmp_path_factory.mktemp("run")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    module = PPOModule(
        make_lm(end=ENDS).double(),
        EnvironmentReward() if request.param == "environment" else longest,
        tokenizer=make_tokenizer(),
        generation=SamplingParams(max_new_tokens=5, samples_per_prompt=6),
        environment=Episodes(factory=Dice, tokens=24, failures=1.0),
        schedule=ConstantSchedule(),
    )
    batch = left_padded([[12, 13, 14], [10]], rows=ROWS)
    trainer = make_trainer(default_root_dir=folder, callbacks=[RolloutLog(), SampleLog()])
    trainer.fit(module, as_loader([{"prompts": batch}] * 2), as_loader([batch]))
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_log_has_the_turns(run, make_tokenizer):
    lines = read(run / "rollouts.jsonl")
    assert {len(line["turns"]) for line in lines} >= {0, 1, 3}
    assert any(line["failed"] for line in lines)
    assert not all(line["failed"] for line in lines)
    for line in lines:
        place = 0
        for i, turn in enumerate(line["turns"]):
            assert turn["role"] == ("policy", "environment")[i % 2]
            ids = line["tokens"][place : place + turn["tokens"]]
            assert turn["text"] == make_tokenizer().decode(ids, skip_special_tokens=True)
            if turn["role"] == "policy" and i + 1 < len(line["turns"]):
                assert turn["reward"] == 0.25
            place += turn["tokens"]
        assert place == len(line["tokens"])
        own = [turn for turn in line["turns"] if turn["role"] == "policy"]
        assert line["length"] == sum(turn["tokens"] for turn in own)
    samples = read(run / "samples.jsonl")
    assert all({"turns", "failed"} <= sample.keys() for sample in samples)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_log_is_scored_again_to_the_same(run, with_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = read(run / "rollouts.jsonl")
    by_text = all(line["raw_score"] == int(line["raw_score"]) for line in lines if not line["failed"])
    reward = f"{__name__}.longest" if by_text else "EnvironmentReward"
    tokenizer = [f"--tokenizer={run / 'tokenizer'}"] * with_tokenizer
    main(["rescore", str(run / "rollouts.jsonl"), f"--reward={reward}", "--output=out.jsonl", *tokenizer])
    again = read(Path("out.jsonl"))
    well = [(line["raw_score"], line["rescored"]) for line in again if not line["failed"]]
    assert len(well) > 6
    assert [a for a, _ in well] == pytest.approx([b for _, b in well])
    assert len({a for a, _ in well}) > 2


@pytest.mark.parametrize(
    "turns", [[{"role": "policy", "tokens": 99, "text": "a"}], [{"role": "user", "tokens": 1, "text": "a"}], ["a"], 3]
)
def test_turns_that_are_not_those_of_the_log_are_refused(run, turns, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = read(run / "rollouts.jsonl")
    lines[1] |= {"turns": turns, "tokens": [11]}
    Path("bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="2: `turns` is"):
        main(["rescore", "bad.jsonl", f"--reward={__name__}.longest", "--output=out.jsonl"])


def test_page_shows_the_turns(run, tmp_path):
    page = write_report([run], output=tmp_path / "report").read_text(encoding="utf-8")
    assert '<p class="environment"><b>environment</b>' in page
    assert '<p class="policy"><b>policy</b>' in page
    assert "environment failed" in page or all(not sample["failed"] for sample in read(run / "samples.jsonl"))


def test_bar_counts_episodes_and_turns(make_lm, toy_tokenizer, make_trainer, as_loader, left_padded, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lightning_rlhf.callbacks.rollout_progress._describe", lambda trainer, text: said.append(text))
    module = PPOModule(
        make_lm(end=ENDS).double(),
        EnvironmentReward(),
        tokenizer=toy_tokenizer,
        generation=SamplingParams(max_new_tokens=5, samples_per_prompt=6),
        environment=Episodes(factory=Dice, tokens=24, failures=1.0),
        schedule=ConstantSchedule(),
    )
    batch = left_padded([[12, 13, 14], [10]], rows=ROWS)
    bar = [RolloutProgress(every=0.0), TQDMProgressBar()]
    make_trainer(callbacks=bar, enable_progress_bar=True).fit(module, as_loader([{"prompts": batch}]))
    shown = [re.match(r"(\d+)/12 episodes, turn (\d), \d+/\d+ drawn, \d+ tokens/s", text) for text in said]
    places = [(int(match[2]), int(match[1])) for match in shown if match]
    assert places == sorted(places)
    assert {turn for turn, _ in places} == {1, 2, 3}


def test_turns_of_a_rollout():
    numbers = torch.tensor([[0.0, 0.5, 0.0, 1.0, 0.0]])
    rollout = Rollout(
        tokens=torch.tensor([[7, 11, 12, 20, 13, 0]]),
        attention_mask=torch.tensor([[True] * 5 + [False]]),
        response_mask=torch.tensor([[True, True, False, True, False]]),
        ended=torch.tensor([True]),
        prompt_index=torch.tensor([0]),
        **dict.fromkeys(("logprobs", "sampler_logprobs", "ref_logprobs", "entropy", "values"), numbers),
        rewards=numbers,
    )

    one = torch.zeros(1)
    outcome = Outcome(rollout=rollout, rows=[{}], raw_scores=one, scores=one, parts={}, is_real=one.bool())
    assert outcome.turns() == [[Turn(True, [11, 12], 0.5), Turn(False, [20], 0.0), Turn(True, [13], 1.0)]]
