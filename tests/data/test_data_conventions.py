"""Rows as TRL, OpenRLHF, NeMo-RL and well-known data sets have them, read without renaming a key."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.drop_report import DropReport
from lightning_rlhf.data.examples import comparison_examples, demonstration_examples, prompt_examples
from lightning_rlhf.data.formats import Demonstration, demonstration_of, prompt_of, shared_messages, shared_text
from lightning_rlhf.data.rankings import Ranking, ranking_of
from lightning_rlhf.data.records import Record
from lightning_rlhf.text import Encoder

DEFAULT = ColumnNames()


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def examples(read: Any, row: dict[str, Any], tokenizer: Any) -> list[Any]:
    tally = DropReport(name="train", limit_name="max_tokens", limit=99)
    return read([Record(row, "f.jsonl", 1)], Encoder(tokenizer), DEFAULT, tally)


LONG = [system("s"), user("a"), assistant("b"), user("c")]
PROMPTS = {
    "TRL, prompt only": ({"prompt": "a"}, "a"),
    "TRL, conversational": ({"prompt": LONG}, LONG),
    "TRL, unpaired: its prompt serves": ({"prompt": "a", "completion": "b", "label": False}, "a"),
    "TRL, preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a"),
    "TRL, implicit prompt": ({"chosen": "q: yes", "rejected": "q: no"}, "q:"),
    "TRL, language modelling: up to the last answer": ({"messages": [*LONG, assistant("d")]}, LONG),
    "messages that wait for an answer": ({"messages": LONG}, LONG),
    "OpenRLHF": ({"input": "a", "output": "b"}, "a"),
    "OpenRLHF, dialogue": ({"context_messages": LONG}, LONG),
    "NeMo-RL": ({"context": [user("a")], "completions": []}, [user("a")]),
    "our key is first": ({"prompt": "a", "input": "x", "context_messages": LONG, "messages": LONG}, "a"),
}


@pytest.mark.parametrize(("row", "expected"), PROMPTS.values(), ids=PROMPTS)
def test_prompt_is_found(row: dict[str, Any], expected: Any) -> None:
    assert prompt_of(row, DEFAULT) == expected


DEMONSTRATIONS = {
    "TRL, prompt and completion": ({"prompt": "a", "completion": "b"}, Demonstration("a", "b")),
    "TRL, conversational": (
        {"prompt": LONG, "completion": [assistant("d")]},
        Demonstration(LONG, [assistant("d")]),
    ),
    "TRL, messages": ({"messages": [*LONG, assistant("d")]}, Demonstration(LONG, [assistant("d")])),
    "UltraChat: the prompt is in the messages": (
        {"prompt": "a", "messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]},
        Demonstration(LONG, [assistant("d")]),
    ),
    "several turns": (
        {"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")]},
        Demonstration([user("a")], [assistant("b"), user("c"), assistant("d")]),
    ),
    "OpenRLHF": ({"input": "a", "output": "b"}, Demonstration("a", "b")),
    "TRL, unpaired, a good one": ({"prompt": "a", "completion": "b", "label": True}, Demonstration("a", "b")),
    "our key is first": ({"prompt": "a", "response": "b", "completion": "x", "output": "y"}, Demonstration("a", "b")),
}


@pytest.mark.parametrize(("row", "expected"), DEMONSTRATIONS.values(), ids=DEMONSTRATIONS)
def test_demonstration_is_found(row: dict[str, Any], expected: Demonstration) -> None:
    assert demonstration_of(row, DEFAULT) == expected


HH = "\n\nHuman: a\n\nAssistant:"
RANKINGS = {
    "TRL, conversational": (
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        Ranking([user("a")], [[assistant("b")], [assistant("c")]], [0, 1]),
    ),
    "TRL, implicit prompt, several turns": (
        {"chosen": [*LONG, assistant("d")], "rejected": [*LONG, assistant("e")]},
        Ranking(LONG, [[assistant("d")], [assistant("e")]], [0, 1]),
    ),
    "dialogues that part before their last message": (
        {
            "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
            "rejected": [user("a"), assistant("x"), user("y"), assistant("z")],
        },
        Ranking(
            [user("a")],
            [[assistant("b"), user("c"), assistant("d")], [assistant("x"), user("y"), assistant("z")]],
            [0, 1],
        ),
    ),
    "binarised UltraFeedback": (
        {
            "prompt": "a",
            "prompt_id": "1",
            "chosen": [user("a"), assistant("b")],
            "rejected": [user("a"), assistant("c")],
            "messages": [user("a"), assistant("b")],
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        },
        Ranking([user("a")], [[assistant("b")], [assistant("c")]], [0, 1], [8.5, 6.0]),
    ),
    "a system message before the prompt": (
        {"prompt": "a", "chosen": [system("s"), user("a"), assistant("b")], "rejected": "c"},
        Ranking([system("s"), user("a")], [[assistant("b")], "c"], [0, 1]),
    ),
    "Anthropic HH": (
        {"chosen": HH + " I do", "rejected": HH + " I do not"},
        Ranking(HH, [" I do", " I do not"], [0, 1]),
    ),
    "Anthropic HH, parted earlier": (
        {"chosen": HH + " b\n\nHuman: c\n\nAssistant: d", "rejected": HH + " x"},
        Ranking(HH, [" b\n\nHuman: c\n\nAssistant: d", " x"], [0, 1]),
    ),
    "OpenRLHF": (
        {"input": "a", "chosen": "b", "rejected": "c", "margin": 2},
        Ranking("a", ["b", "c"], [0, 1], [2, 0]),
    ),
    "margin before scores": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2, "score_chosen": 1, "score_rejected": 0},
        Ranking("a", ["b", "c"], [0, 1], [2, 0]),
    ),
}


@pytest.mark.parametrize(("row", "expected"), RANKINGS.values(), ids=RANKINGS)
def test_ranking_is_found(row: dict[str, Any], expected: Ranking) -> None:
    assert ranking_of(row, DEFAULT) == expected


PAIR = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
REFUSED = {
    "two prompts": (prompt_of, {"input": "a", "context_messages": LONG}, "`input` or `context_messages`: say which"),
    "Alpaca": (
        prompt_of,
        {"instruction": "a", "input": "b", "output": "c"},
        "`input` or `instruction`.*columns.prompt",
    ),
    "dialogue or pair": (prompt_of, PAIR | {"messages": LONG}, "`messages` or `chosen`"),
    "nothing asked": (prompt_of, {"messages": [assistant("b")]}, "`messages` holds nothing before"),
    "two answers": (
        demonstration_of,
        {"prompt": "a", "completion": "b", "output": "c"},
        "`completion` or `output`: say which is meant with `columns.response`",
    ),
    "a bad completion": (
        demonstration_of,
        {"prompt": "a", "completion": "b", "label": False},
        "`label` is false.*leave out such rows",
    ),
    "another dialogue": (demonstration_of, {"prompt": "z", "messages": PAIR["chosen"]}, "not the prompt and would be"),
    "unanswered": (demonstration_of, {"messages": LONG}, "must end with a message of role 'assistant'"),
    "unpaired": (ranking_of, {"prompt": "a", "completion": "b", "label": True}, "`label` rates one `completion`"),
    "pair or list": (
        ranking_of,
        PAIR | {"responses": ["b", "c"], "scores": [1, 0]},
        "the ranking could be in `chosen` or `responses`",
    ),
    "scores against the pair": (
        ranking_of,
        PAIR | {"score_chosen": 1, "score_rejected": 3},
        "`score_chosen` less `score_rejected` must be at least 0, found -2.0",
    ),
}


@pytest.mark.parametrize(("read", "row", "message"), REFUSED.values(), ids=REFUSED)
def test_ambiguous_row_is_refused(read: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(row, DEFAULT)


def test_key_named_on_purpose_is_the_only_one() -> None:
    row = {"instruction": "a", "input": "b", "output": "c", "completion": "d"}
    assert prompt_of(row, ColumnNames(prompt="instruction")) == "a"
    assert demonstration_of(row, ColumnNames(prompt="instruction", response="output")) == Demonstration("a", "c")
    with pytest.raises(ValueError, match="no key `answer`"):
        demonstration_of(row, ColumnNames(prompt="input", response="answer"))


def test_shared_messages_end_where_the_assistant_goes_on() -> None:
    same = [user("a"), assistant("b"), user("c")]
    assert shared_messages([[*same, assistant("d")]]) == same
    assert shared_messages([[*same, assistant("d")]] * 2) == same
    parted = [[user("a"), assistant("b"), user(text), assistant("d")] for text in "xy"]
    assert shared_messages(parted) == [user("a")]  # where the users differ, the answers before are the assistant's
    assert shared_messages([[user("a"), assistant("b")], [user("z"), assistant("b")]]) == []


def test_shared_text_ends_at_the_assistant_s_turn() -> None:
    assert shared_text(HH + " I do", HH + " I do not") == HH
    assert shared_text("q: I do", "q: I do not") == "q: I do"  # no marker: TRL's rule
    assert shared_text("a", "b") == ""


def test_prompt_reaches_the_reward_under_one_name(plain: Any) -> None:
    (example,) = examples(prompt_examples, {"input": "a b", "id": 7}, plain)
    assert (example.tokens.tolist(), example.row) == ([10, 11], {"prompt": "a b", "input": "a b", "id": 7})


def test_turns_are_written_by_the_template(chat: Any) -> None:
    """<s> user a, assistant b, user c, assistant … of the longer one: what a rollout after those turns would see."""
    turns = [assistant("b"), user("c"), assistant("d")]
    row = {"prompt": [user("a")], "chosen": turns, "rejected": "e"}
    (example,) = examples(comparison_examples, row, chat)
    opened = [1, 3, 5, 10, 4, 3, 6]  # <s> <|im_start|> user a <|im_end|> <|im_start|> assistant
    assert example.texts[0].tolist() == [*opened, 11, 4, 3, 5, 12, 4, 3, 6, 13, 4]
    assert example.texts[1].tolist() == [*opened, 14, 4]


def test_document_is_predicted_whole(opening: Any) -> None:
    (example,) = examples(demonstration_examples, {"text": "a b"}, opening)
    assert (example.tokens.tolist(), example.context) == ([1, 10, 11, 0], 1)
    (example,) = examples(demonstration_examples, {"text": "z", "prompt": "a", "response": "b"}, opening)
    assert (example.tokens.tolist(), example.context) == ([1, 10, 11, 0], 2)


def test_document_without_a_token_is_refused(plain: Any) -> None:
    with pytest.raises(ValueError, match="f.jsonl, line 1: `text` has no token to predict"):
        examples(demonstration_examples, {"text": ""}, plain)
