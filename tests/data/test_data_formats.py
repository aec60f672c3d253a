from __future__ import annotations

from typing import Any

import pytest

from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.formats import Demonstration, demonstration_of, prompt_of, text_of
from lightning_rlhf.data.rankings import Ranking, ranking_of

DEFAULT = ColumnNames()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_prompt_is_text_or_messages() -> None:
    assert prompt_of({"prompt": "a b", "id": 1}, DEFAULT) == "a b"
    assert prompt_of({"prompt": [user("a")]}, DEFAULT) == [user("a")]


def test_demonstration_takes_text_or_the_last_message() -> None:
    assert demonstration_of({"prompt": "a", "response": "b"}, DEFAULT) == Demonstration("a", "b")
    assert demonstration_of({"prompt": "a", "response": [assistant("b")]}, DEFAULT) == Demonstration(
        "a", [assistant("b")]
    )
    repeated = {"prompt": "a", "response": [user("a"), assistant("b")]}
    assert demonstration_of(repeated, DEFAULT) == Demonstration(
        [user("a")], [assistant("b")]
    )  # a dialogue, so the template writes it


RANKINGS = [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, Ranking("a", ["b", "c"], [0, 1])),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, Ranking("a", ["b", "b"], [0, 0])),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5},
        Ranking("a", ["b", "c"], [0, 1], strength=[1.5, 0]),
    ),
    ({"chosen": "q: yes", "rejected": "q: no", "margin": 0}, Ranking("q:", [" yes", " no"], [0, 1], strength=[0, 0])),
    (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        Ranking([user("a")], [[assistant("b")], [assistant("c")]], [0, 1]),
    ),
    # TRL's extract_prompt: the common beginning without its last space, which goes to both responses
    ({"chosen": "q: x a: yes", "rejected": "q: x a: no"}, Ranking("q: x a:", [" yes", " no"], [0, 1])),
    (
        {"prompt": "a", "responses": ["b", "c", "d"], "scores": [0.5, 2, 2]},
        Ranking("a", ["b", "c", "d"], [-0.5, -2, -2], strength=[0.5, 2, 2]),
    ),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": [3, 1]}, Ranking("a", ["b", "c"], [3, 1])),
    (
        {"prompt": "a", "responses": ["b", "c"], "ranks": [3, 1], "systems": ["x", "x"]},
        Ranking("a", ["b", "c"], [3, 1], systems=["x", "x"]),
    ),
    (
        {
            "context": [user("a")],
            "completions": [
                {"rank": 1, "completion": [assistant("b")]},
                {"rank": 0, "completion": [assistant("c")]},
                {"rank": 0, "completion": "d"},
            ],
        },
        Ranking([user("a")], [[assistant("b")], [assistant("c")], "d"], [1, 0, 0]),
    ),
]


@pytest.mark.parametrize(("row", "expected"), RANKINGS)
def test_ranking_formats(row: dict[str, Any], expected: Ranking) -> None:
    assert ranking_of(row, DEFAULT) == expected


def test_every_key_can_be_renamed() -> None:
    columns = ColumnNames(
        prompt="q",
        response="r",
        chosen="good",
        rejected="bad",
        margin="by",
        responses="rs",
        scores="s",
        ranks="k",
        systems="w",
        text="t",
    )
    assert prompt_of({"q": "a", "prompt": "no"}, columns) == "a"
    assert demonstration_of({"q": "a", "r": "b"}, columns) == Demonstration("a", "b")
    assert ranking_of({"q": "a", "good": "b", "bad": "c"}, columns) == Ranking("a", ["b", "c"], [0, 1])
    pair = {"q": "a", "good": "b", "bad": "c", "by": 3, "margin": "no"}
    assert ranking_of(pair, columns) == Ranking("a", ["b", "c"], [0, 1], [3, 0])
    assert ranking_of({"q": "a", "rs": ["b", "c"], "s": [1, 2]}, columns) == Ranking("a", ["b", "c"], [-1, -2], [1, 2])
    assert ranking_of({"q": "a", "rs": ["b", "c"], "k": [1, 2]}, columns) == Ranking("a", ["b", "c"], [1, 2])
    named = {"q": "a", "rs": ["b", "c"], "k": [1, 2], "w": ["x", "y"], "systems": "no"}
    assert ranking_of(named, columns).systems == ["x", "y"]
    assert text_of({"t": "a"}, columns) == "a"


PROMPT_ERRORS = [
    ({"question": "a", "id": 1}, r"no key `prompt`; found \['id', 'question'\].*name the key .*`columns.prompt`"),
    ({"prompt": 3}, r"`prompt` must be a text or a list of messages .*found int: 3"),
    ({"prompt": []}, "found an empty list"),
    ({"prompt": ["a"]}, r"`prompt`\[0\] must be a message with role and content, found 'a'"),
    ({"prompt": [{"role": "user"}]}, r"`prompt`\[0\] needs a text under 'content', found None \(keys: \['role'\]\)"),
    ({"prompt": [{"content": "a"}]}, r"needs a text under 'role'"),
    ({"prompt": [user("a"), assistant("b")]}, "ends with an assistant message, so there is nothing to answer"),
]


@pytest.mark.parametrize(("row", "message"), PROMPT_ERRORS)
def test_bad_prompt_is_explained(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_of(row, DEFAULT)


DEMONSTRATION_ERRORS = [
    ({"prompt": "a"}, r"no key `response`; found \['prompt'\].*`columns.response`"),
    ({"prompt": "a", "response": None}, "`response` must be a text or a list of messages .*found NoneType"),
    (
        {"prompt": "a", "response": [user("b")]},
        "`response` must end with a message of role 'assistant', found role 'user'",
    ),
    ({"prompt": "a", "response": [user("z"), assistant("b")]}, "1 messages before its last .*would be lost"),
]


@pytest.mark.parametrize(("row", "message"), DEMONSTRATION_ERRORS)
def test_bad_demonstration_is_explained(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demonstration_of(row, DEFAULT)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
RANKING_ERRORS = [
    ({"prompt": "a"}, r"no ranking found among the keys \['prompt'\].*`chosen` and `rejected`.*can be renamed"),
    ({"prompt": "a", "chosen": "b"}, r"no key `rejected`; found \['chosen', 'prompt'\]"),
    ({"prompt": "a", "rejected": "b"}, r"no key `chosen`"),
    ({"chosen": "b", "rejected": "c"}, "no common beginning"),
    (PAIR | {"margin": "1_0"}, "`margin` must hold finite numbers, found '1_0'"),
    (PAIR | {"margin": None}, "`margin` must hold finite numbers, found None"),
    (PAIR | {"margin": True}, "`margin` must hold finite numbers, found True"),
    (PAIR | {"margin": float("inf")}, "`margin` must hold finite numbers, found inf"),
    (PAIR | {"margin": -1}, "`margin` must be at least 0, found -1.0: .* `chosen` is better than `rejected`; swap"),
    ({"chosen": "b", "rejected": [assistant("c")]}, "`chosen` must be a text or a list of messages"),
    (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("z"), assistant("c")]},
        "not one dialogue with two endings: their first messages must be equal",
    ),
    ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "an assistant's turn follow in both"),
    ({"prompt": "a", "responses": ["b", "c"]}, r"no key `scores` \(higher is better\) or `ranks` \(lower is better\)"),
    (
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2], "ranks": [1, 2]},
        "both `scores` and `ranks` are there",
    ),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "equal length, found 2 entries and 1 entries"),
    ({"prompt": "a", "responses": "b", "scores": [1]}, "equal length, found a str and 1 entries"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1, "2"]}, "`scores` must hold finite numbers, found '2'"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]}, "finite numbers, found nan"),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, True]}, "`ranks` must hold finite numbers, found True"),
    ({"prompt": "a", "responses": ["b"], "scores": [1]}, "needs at least 2 responses to compare, found 1"),
    (
        {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1], "systems": ["x"]},
        r"`systems` must be a list of 2 names, one per response, found \['x'\]; .*`columns.systems`",
    ),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1], "systems": [1, 2]}, r"2 names, .* found \[1, 2\]"),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1], "systems": "xy"}, "2 names, .* found xy"),
    ({"prompt": "a", "responses": ["b", 5], "scores": [1, 2]}, "`responses` must be a text .*found int: 5"),
    ({"completions": []}, "no key `context`"),
    ({"context": "a", "completions": [{"rank": 0}, {"rank": 1}]}, "no key `completion`"),
    ({"context": "a", "completions": ["b", "c"]}, "`completions` must be a list of"),
]


@pytest.mark.parametrize(("row", "message"), RANKING_ERRORS)
def test_bad_ranking_is_explained(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking_of(row, DEFAULT)


def test_prompt_named_on_purpose_is_not_guessed_from_the_pair() -> None:
    row = {"chosen": "q yes", "rejected": "q no"}
    assert ranking_of(row, DEFAULT).prompt == "q"
    with pytest.raises(ValueError, match="no key `question`"):
        ranking_of(row, ColumnNames(prompt="question"))


def test_bad_text_is_explained() -> None:
    with pytest.raises(ValueError, match=r"no key `text`; found \['body'\].*`columns.text`"):
        text_of({"body": "a"}, DEFAULT)
    with pytest.raises(ValueError, match=r"`text` must be a text, found list"):
        text_of({"text": ["a"]}, DEFAULT)
