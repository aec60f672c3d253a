"""Rows of Reasoning Gym: disjoint parts, the same on every process, graded right and wrong."""

from __future__ import annotations

import json
import math

import pytest

from lightning_rlhf.data import PromptDataModule, ReasoningGymRows
from lightning_rlhf.data import reasoning_gym as rows_module
from lightning_rlhf.data.sources import read_records
from lightning_rlhf.rewards import ReasoningGym

pytest.importorskip("reasoning_gym")
SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def rows(**arguments):
    return [record.row for record in read_records({"task": "chain_sum", "config": SMALL} | arguments)]


def questions(**arguments):
    return [row["prompt"] for row in rows(**arguments)]


def test_parts_are_disjoint_and_cover_all():
    """Two digits and a sign are 200 questions, all of which 4000 draws give, over and over."""
    everything = questions(size=4000)
    train = questions(size=4000, part="train", share=0.2)
    held_out = questions(size=3000, seed=5, part="val", share=0.2)  # by another seed
    assert len(everything) == len(set(everything)) == 200
    assert set(train) | set(held_out) == set(everything)
    assert not set(train) & set(held_out)
    assert abs(len(held_out) - 40) <= 4 * math.sqrt(200 * 0.2 * 0.8)
    assert [question for question in everything if question in set(train)] == train  # the order stays
    assert set(questions(size=300)) & set(questions(size=300, seed=5))  # seeds alone do not part them


def test_rows_are_those_of_the_seed():
    assert rows(size=30) == rows(size=30)
    assert rows(size=30) == rows(size=60)[: len(rows(size=30))]
    assert rows(size=30) != rows(size=30, seed=1)


def test_rows_do_not_depend_on_the_hashes_of_the_process(monkeypatch):
    """`word_ladder` goes through sets; in a process with other hashes it has other rows."""
    one = [record.row for record in read_records(ReasoningGymRows(task="word_ladder", size=4))]
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert [record.row for record in read_records(ReasoningGymRows(task="word_ladder", size=4))] == one


def test_grader_gives_1_to_right_answers_and_0_to_wrong_ones():
    some = rows(size=60)
    graded_by = [row["reasoning_gym"] for row in some]
    right = [row["answer"] for row in some]
    wrong = [str(int(answer) + 1) for answer in right]
    reward = ReasoningGym()
    blank = [None] * len(some)
    assert set(reward.score(blank, right, reasoning_gym=graded_by)) == {1.0}
    assert set(reward.score(blank, wrong, reasoning_gym=graded_by)) == {0.0}
    assert ReasoningGym(task="leg_counting").score(blank, right, reasoning_gym=graded_by) == blank
    assert reward.score([None], ["7"]) == [None]


@pytest.mark.parametrize(
    ("extract", "response", "expected"),
    [
        ("whole", " 7\n", 1.0),
        ("whole", "it is 7", 1 / 7),
        ("last_number", "3 + 4 is 7.", 1.0),
        ("last_number", "7, not 8", 0.0),
        ("last_number", "it is -7", 1 / 2),
        ("last_number", "none", 0.0),
        ("answer_tag", "<answer>8</answer> or <answer>\n7 </answer>", 1.0),
        ("answer_tag", "7", 0.0),
        (r"= (\d+)", "3 + 4 = 7, see 9", 1.0),
    ],
)
def test_answer_is_a_part_of_the_response(extract, response, expected):
    """A longer answer that holds the right one gets a share of 1 by this task's rules."""
    entry = {"question": "3 + 4", "answer": "7", "metadata": {}}
    cell = json.dumps({"task": "chain_sum", "config": {}, "entry": entry})
    assert ReasoningGym(extract=extract).score([None], [response], reasoning_gym=[cell]) == [pytest.approx(expected)]


def test_grader_that_raises_is_counted():
    """That of prime factors takes every word for a number."""
    row = read_records(ReasoningGymRows(task="prime_factorization", size=1))[0].row
    assert ReasoningGym()._graded(["zzz", row["answer"]], [row["reasoning_gym"]] * 2) == [(0.0, True), (1.0, False)]


@pytest.mark.parametrize("task", ["gcd", "word_ladder", "countdown", "knight_swap", "syllogism"])
def test_graders_of_other_tasks_read_the_rows(task):
    made = [record.row for record in read_records({"task": task, "size": 3})]
    columns = {"reasoning_gym": [row["reasoning_gym"] for row in made]}
    assert ReasoningGym().score([None] * len(made), [row["answer"] for row in made], **columns) == [1.0] * len(made)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "chain_sun"}, "no task 'chain_sun': such as chain_sum"),
        ({"task": "list_functions"}, "gives other rows each time"),
        ({"task": "arc_agi", "size": 2}, "grades by what is no JSON"),
        ({"task": "chain_sum", "config": {"terms": 2}}, "does not fit the task chain_sum: .*terms"),
        ({"task": "chain_sum", "config": {"min_terms": 0}}, "min_terms must be positive"),
        ({"task": "chain_sum", "config": {"seed": 0}}, "must not hold seed"),
        ({"task": "chain_sum", "size": 1, "part": "val", "share": 1e-9}, "none of the 1 questions"),
        ({"task": "chain_sum", "size": 0}, "`size` must be at least 1"),
        ({"task": "chain_sum", "share": 1.0}, "`share` must be between 0 and 1"),
        ({"task": "chain_sum", "part": "test"}, "`part` must be all, train or val"),
        ({"task": "chain_sum", "instruction": "Go"}, "`instruction` must hold {question}"),
    ],
)
def test_wrong_tasks_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        read_records(arguments)


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(rows_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs reasoning-gym: pip install"):
        read_records({"task": "chain_sum"})


def test_several_sources_and_digest(toy_tokenizer):
    """Two tasks are one list; other rows have another digest, by which a resumed run tells them."""

    def digest(**arguments):
        source = [{"task": "chain_sum", "size": 5} | arguments, ReasoningGymRows(task="gcd", size=3)]
        data = PromptDataModule(train=source, tokenizer=toy_tokenizer, max_prompt_tokens=10_000)
        data.setup("fit")
        return data.state_dict()["rows"]["train"], data.state_dict()["content"]["train"]

    assert digest() == digest()
    assert digest()[0] == 8
    assert digest(seed=3)[1] != digest()[1]
