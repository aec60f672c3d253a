"""Answers to Reasoning Gym questions in several turns."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from lightning_rlhf import PPOModule, SamplingParams
from lightning_rlhf.data.sources import read_records
from lightning_rlhf.environments import Done, ReasoningGymEnvironment
from lightning_rlhf.environments import reasoning_gym as environment_module
from lightning_rlhf.rewards import EnvironmentReward
from lightning_rlhf.rewards import grader as grader_module
from lightning_rlhf.rollout import Episodes

pytest.importorskip("reasoning_gym")
SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ENDS = [0, 1, 2, 4]


@pytest.fixture(scope="module")
def row():
    (record, *_) = read_records({"task": "chain_sum", "config": SMALL, "size": 3})
    return record.row


def asked(row, **arguments) -> ReasoningGymEnvironment:
    environment = ReasoningGymEnvironment(**{"seconds": 60.0} | arguments)
    assert environment.reset(row) is None
    return environment


def test_right_answer_ends_the_episode_with_its_score(row):
    assert asked(row).step(row["answer"], []) == Done(1.0)


def test_wrong_answer_is_told_until_none_is_left(row):
    wrong = str(int(row["answer"]) + 1)
    environment = asked(row, attempts=3)
    assert [environment.step(wrong, []) for _ in range(2)] == ["That is not right. Try again."] * 2
    assert environment.step(wrong, []) == Done(0.0)
    environment = asked(row)
    assert environment.step(wrong, []) == "That is not right. Try again."
    assert environment.step(row["answer"], []) == Done(1.0)


def test_answer_is_the_part_that_is_extracted(row):
    said = f"I think it is <answer>{row['answer']}</answer>."
    assert asked(row, extract="answer_tag").step(said, []) == Done(1.0)
    assert asked(row, extract="answer_tag", attempts=1).step(row["answer"], []) == Done(0.0)


def test_partial_score_is_no_right_answer():
    """`countdown` gives a part of the score to an expression of another value."""
    entry = {"question": "", "answer": "1 + 2", "metadata": {"numbers": [1, 2], "target": 3, "expression": "1 + 2"}}
    row = {"reasoning_gym": json.dumps({"task": "countdown", "config": {}, "entry": entry})}
    environment = asked(row)
    assert environment.step("2 - 1", []) == "That is not right. Try again."
    end = environment.step("2 - 1", [])
    assert isinstance(end, Done)
    assert 0 < end.reward < 1


def test_episodes_share_one_process(row, monkeypatch):
    monkeypatch.setattr(environment_module, "_GRADERS", {})
    started: list[int] = []
    popen = grader_module.subprocess.Popen
    monkeypatch.setattr(grader_module.subprocess, "Popen", lambda *a, **k: started.append(1) or popen(*a, **k))
    ends: list[Done] = []
    threads = [threading.Thread(target=lambda: ends.append(asked(row).step(row["answer"], []))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == [Done(1.0)] * 8
    assert len(started) == 1


def test_what_is_refused(row, monkeypatch):
    with pytest.raises(ValueError, match="no column 'reasoning_gym', only.*ReasoningGymRows"):
        ReasoningGymEnvironment().reset({"prompt": "1 + 1"})
    with pytest.raises(ValueError, match="`attempts` must be a number above 0: got 0"):
        ReasoningGymEnvironment(attempts=0)
    monkeypatch.setattr(environment_module, "_GRADERS", {})
    monkeypatch.setattr(grader_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lightning-rlhf\[rewards\]"):
        ReasoningGymEnvironment()


def test_policy_plays(make_lm, toy_tokenizer, left_padded):
    """A random network, which is right of the first prompt and never of the second."""
    entry = {"question": "", "metadata": {}}
    rows = [
        {"reasoning_gym": json.dumps({"task": "chain_sum", "config": {}, "entry": entry | {"answer": answer}})}
        for answer in ("right", "never")
    ]
    module = PPOModule(
        make_lm("llama", end=ENDS).eval(),
        EnvironmentReward(),
        tokenizer=toy_tokenizer,
        generation=SamplingParams(max_new_tokens=4, samples_per_prompt=6),
        environment=Episodes(factory=lambda: Letters(seconds=60.0), tokens=40, patience=30.0),
    )
    module.configure_model()
    rollout = module.responder.collect(left_padded([[12], [10]], rows=rows), samples=6, iteration=0)
    scores = module.reward(rollout, rows)
    assert not rollout.failed.any()
    assert set(scores[:6][rollout.ended[:6]].tolist()) == {1.0}
    assert not scores[6:].any()
    assert int(rollout.spans[:6].max()) == 1
    assert int(rollout.spans[6:].max()) == 2
    assert torch.equal(rollout.rewards.sum(1), scores)


class Letters(ReasoningGymEnvironment):
    """Reads every turn as the word `right`, so that a random network is right of one row."""

    def step(self, text, tool_calls):
        return super().step("right", tool_calls)
