"""Rewards by regular expression, on texts and on tokenizers whose tags are special tokens."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.rewards import Format, RegexMatch, WeightedReward


def scores(reward, responses, **columns):
    return reward.score([None] * len(responses), responses, **columns)


def test_any_match_is_right_without_a_column():
    assert scores(RegexMatch(r"(?i)answer: \d"), ["Answer: 7", "say answer: x", "ANSWER: 1", ""]) == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("#### 18", "18", 1.0),
        ("#### 18", 18, 1.0),
        ("#### 18", 18.0, 1.0),
        ("#### 1,000", "1000.0", 1.0),
        ("#### 0.1", 0.1, 1.0),
        ("#### .5", "0.50", 1.0),
        ("#### -3", "3", 0.0),
        ("#### 1e3", "1000", 1.0),
        ("#### 10000000000000000000001", "10000000000000000000002", 0.0),  # the same float
        ("#### 1,00", "100", 0.0),  # no thousands separator
        ("####  Paris \n", " Paris", 1.0),
        ("#### paris", "Paris", 0.0),
        ("#### nan", "nan", 1.0),  # as text
        ("#### 17\n#### 18", "18", 1.0),  # the last one
        ("#### 18\n#### 17", "18", 0.0),
        ("18", "18", 0.0),
        ("", "18", 0.0),
        ("#### 18", None, None),
    ],
)
def test_last_match_is_compared_with_the_column(response, answer, expected):
    assert scores(RegexMatch(r"####([^\n]*)", column="answer"), [response], answer=[answer]) == [expected]


def test_rows_without_the_column_are_not_its_task():
    assert scores(RegexMatch("(x)", column="answer"), ["x", "y"]) == [None, None]


def test_group_that_took_no_part_is_no_answer():
    assert scores(RegexMatch("a|(b)", column="answer"), ["a"], answer=["None"]) == [0.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pattern": "("}, "must be a regular expression: got '\\('"),
        ({"pattern": "x", "column": "answer"}, "must have a group"),
        ({"pattern": "(x)", "column": "prompt"}, "must be another than prompt"),
    ],
)
def test_wrong_patterns_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        RegexMatch(**arguments)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>\na < b\n\nc</think>\n\n<answer>b</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think>", 0),
        ("<think>a</think><answer>b", 0),
        ("so: <think>a</think><answer>b</answer>", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> done", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a<think>b</think></think><answer>c</answer>", 0),
        ("<think>a<answer>b</answer></think><answer>c</answer>", 0),
        ("<think>a</think><answer>b</answer>c</answer>", 0),
        ("", 0),
    ],
)
def test_format_is_the_tags_once_in_order_and_nothing_else(response, expected):
    assert scores(Format(), [response]) == [expected]


def test_format_of_other_tags():
    assert scores(Format(["plan"]), ["<plan>x</plan>", "<think>a</think><answer>b</answer>"]) == [1, 0]
    assert scores(Format(["plan"]), ["<plan><think>a</think></plan>"]) == [1]  # a tag that is not one of its own


@pytest.mark.parametrize("tags", [[], ["a", "a"], ["a b"], ["<think>"]])
def test_wrong_tags_are_refused(tags):
    with pytest.raises(ValueError, match="`tags` must be different names"):
        Format(tags)


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


@pytest.mark.parametrize("special", [True, False])
def test_tags_that_are_special_tokens_are_seen(make_rollout, special):
    """A decoded response has lost its special tokens, but for pairs of tags and never the end token."""
    words = ["</s>", *TAGS, "a", "b"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
        assert tokenizer.decode([1, 5, 2], skip_special_tokens=True).strip() == "a"
    rollout = make_rollout([[5]] * 4, [[1, 5, 2, 3, 6, 4, 0], [1, 5, 2, 3, 6, 0], [5, 6, 0], [3, 6, 4, 1, 5, 2, 0]])
    reward = Format()
    reward.prepare(tokenizer)
    assert reward(rollout, [{}] * 4).tolist() == [1, 0, 0, 0]
    both = WeightedReward({"format": Format(), "answer": RegexMatch("<answer>(.*)</answer>", column="answer")})
    both.prepare(tokenizer)
    rows = [{"answer": "b"}, {"answer": "b"}, {}, {"answer": "b"}]
    assert both(rollout, rows).tolist() == [2, 0, 0, 1]
