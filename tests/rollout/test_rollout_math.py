"""Answers graded by math-verify in a process of its own: a table, and what hangs, crashes or is missing."""

from __future__ import annotations

import copy
import pickle
import threading
import time

import pytest

from lightning_rlhf.rewards import MathAnswer, TimedReward, WeightedReward
from lightning_rlhf.rewards import grader as grader_module

pytest.importorskip("math_verify")
TABLE = [
    # the row's answer, a response, right or wrong
    ("72", "The answer is 72.", 1),
    ("72", "The answer is 73.", 0),
    ("72", "72 is wrong, so it is 71", 0),
    ("72", r"First 71, then \boxed{72}.", 1),
    ("72", r"\boxed{72} and not 71", 1),
    ("72", r"\boxed{71} no: it must be \boxed{72}", 1),
    ("72", r"\boxed{72} no: it must be \boxed{71}", 0),
    ("$72", "It costs $72$", 1),
    (72, "72", 1),
    (0.00001, "0.00001", 1),
    ("1/2", r"\boxed{\frac{1}{2}}", 1),
    (r"\frac{1}{2}", "so it is 1/2", 1),
    (r"\frac12", "0.5", 1),
    ("1/2", r"\boxed{\frac{2}{1}}", 0),
    ("0.333", "1/3", 0),
    ("1,000", "The total is 1000", 1),
    ("-5", r"$x = -5$", 1),
    ("-5", "5", 0),
    (r"\sqrt{8}", r"$2\sqrt{2}$", 1),
    (r"\sqrt{8}", r"$2\sqrt{3}$", 0),
    (r"2\pi", r"$\pi + \pi$", 1),
    ("x^2+2x+1", "$(x+1)^2$", 1),
    ("x^2+2x+1", "$(x-1)^2$", 0),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1),
    (r"\{1, 2\}", r"\boxed{\{1, 3\}}", 0),
    ("(1, 2)", r"\boxed{(1, 2)}", 1),
    ("(1, 2)", r"\boxed{(2, 1)}", 0),
    ("[0, 1)", r"\boxed{[0, 1)}", 1),
    ("50%", r"\boxed{50\%}", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"$\begin{pmatrix}1\\2\end{pmatrix}$", 1),
    ("48 / 2 = 24 a month.\n#### 24", "24", 1),
    ("48 / 2 = 24 a month.\n#### 24", "48", 0),
    ("Twice $5$ is\n#### 10", "10", 1),
    ("72", "I do not know", 0),
    ("72", "", 0),
    ("1", "(" * 3000 + "1", 0),
]
SLOW = "$9^{9^{9^{9}}}$"


@pytest.fixture(scope="module")
def reward():
    return MathAnswer()


def grade(reward, *pairs):
    return reward.score([None] * len(pairs), [text for _, text in pairs], answer=[right for right, _ in pairs])


@pytest.mark.parametrize(("right", "response", "expected"), TABLE)
def test_answers(reward, right, response, expected):
    assert grade(reward, (right, response)) == [expected]


def test_rows_without_answer_are_not_its_task(reward):
    assert grade(reward, (None, "1"), ("", "1"), ("1", "1")) == [None, None, 1.0]
    assert reward.score([None], ["1"]) == [None]


def test_grader_that_hangs_scores_0_is_counted_and_goes_on(make_rollout, toy_tokenizer, monkeypatch):
    reward = MathAnswer(seconds=1.0)
    reward.prepare(toy_tokenizer)
    monkeypatch.setattr(reward, "responses", lambda rollout: ["1", SLOW, "3", "4"])
    rollout = make_rollout([[10]] * 4, [[11, 0]] * 4)
    rows = [{"answer": "1"}, {"answer": "2"}, {"answer": "3"}, {}]
    scores = reward.scored(rollout, rows)
    assert scores.total[:3].tolist() == [1.0, 0.0, 1.0]
    assert scores.parts["failed"][:3].tolist() == [0.0, 1.0, 0.0]
    assert scores.answered.tolist() == [True, True, True, False]
    summed = WeightedReward({"math": reward, "length": lambda prompts, responses: [0.5] * 4})
    summed.members["length"].prepare(toy_tokenizer)
    monkeypatch.setattr(summed.members["length"], "responses", lambda rollout: [""] * 4)
    assert summed.scored(rollout, rows).total.tolist() == [1.5, 0.5, 1.5, 0.5]


def test_grader_that_dies_is_started_again():
    reward = MathAnswer()
    assert grade(reward, ("1", "1")) == [1.0]
    reward.grader._process.kill()
    reward.grader._process.wait()
    assert grade(reward, ("1", "1"), ("1", "1")) == [0.0, 1.0]


def test_answer_that_cannot_be_read_is_counted():
    reward = MathAnswer()
    assert reward._graded(["1", "1"], ["$", "1"]) == [(0.0, True), (1.0, False)]


def test_it_works_in_another_thread(reward):
    results = []
    thread = threading.Thread(target=lambda: results.append(grade(reward, ("1/2", "0.5"))))
    thread.start()
    thread.join()
    assert results == [[1.0]]


def test_timed_reward_around_it_still_ends(make_rollout, toy_tokenizer, monkeypatch):
    """The limit of one answer takes no other alarm away, and the answer that came too late is nobody's."""
    reward = MathAnswer(seconds=30.0)
    grade(reward, ("1", "1"))
    timed = TimedReward(reward, seconds=0.5)
    timed.prepare(toy_tokenizer)
    texts = [SLOW]
    monkeypatch.setattr(reward, "responses", lambda rollout: texts)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within"):
        timed.scored(make_rollout([[10]], [[11, 0]]), [{"answer": "1"}])
    assert time.monotonic() - began < 10
    texts[0] = "2"
    assert reward.scored(make_rollout([[10]], [[11, 0]]), [{"answer": "1"}]).total.tolist() == [0.0]


def test_copies_and_pickles_have_a_process_of_their_own(reward):
    grade(reward, ("1", "1"))
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert other.grader._process is None
        assert grade(other, ("1", "1"), ("1", "2")) == [1.0, 0.0]
    assert reward.identity() == {"column": "answer", "seconds": 5.0}


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(grader_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs math-verify: pip install 'lightning-rlhf\\[rewards\\]'"):
        MathAnswer()


def test_package_that_does_not_import_is_named(monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(grader_module.PROGRAM.read_text().replace("from math_verify import", "from math_vain import"))
    monkeypatch.setattr(grader_module, "PROGRAM", program)
    with pytest.raises(RuntimeError, match="math_verify does not start .*No module named 'math_vain'"):
        grade(MathAnswer(), ("1", "1"))
