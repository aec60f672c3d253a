"""Tools, reasoning, tool calls and arguments of the chat template: learned as the template writes them, or refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from lightning_rlhf.data import DemonstrationDataModule, PromptDataModule
from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.drop_report import DropReport
from lightning_rlhf.data.examples import comparison_examples, demonstration_examples, prompt_examples
from lightning_rlhf.data.records import Record
from lightning_rlhf.text import Encoder

# a is 10, f is 15; <|im_start|> 3, <|im_end|> 4, user 5, assistant 6; <think> 40, </think> 41, <tool> 42, </tool> 43
USER = {"role": "user", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
TOOLS = [{"name": "g"}]
ASKED = [3, 5, 10, 4, 3, 6]


def said(content: str | None = "b", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def read(reader: Any, row: dict[str, Any], tokenizer: Any, **arguments: Any) -> Any:
    tally = DropReport(name="train", limit_name="max_tokens", limit=99)
    (example,) = reader([Record(row, "f.jsonl", 7)], Encoder(tokenizer, **arguments), ColumnNames(), tally)
    return example


def learned(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    example = read(demonstration_examples, row, tokenizer)
    return example.tokens[: example.context].tolist(), example.tokens[example.context :].tolist()


LEARNED: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "a tool call": (
        {"messages": [USER, said("", tool_calls=[CALL])], "tools": TOOLS},
        [42, 16, 43, *ASKED],
        [40, 41, 42, 15, 43, 4],
    ),
    "content null": ({"messages": [USER, said(None, tool_calls=[CALL])]}, ASKED, [40, 41, 42, 15, 43, 4]),
    "content and a call": ({"messages": [USER, said("b", tool_calls=[CALL])]}, ASKED, [40, 41, 11, 42, 15, 43, 4]),
    "tools as JSON": ({"messages": [USER, said()], "tools": '[{"name": "g"}]'}, [42, 16, 43, *ASKED], [40, 41, 11, 4]),
    "no tools": ({"messages": [USER, said()], "tools": []}, ASKED, [40, 41, 11, 4]),
    "reasoning": ({"messages": [USER, said(reasoning_content="w v")]}, ASKED, [40, 32, 31, 41, 11, 4]),
    "an empty think block": ({"prompt": [USER], "completion": [said()]}, ASKED, [40, 41, 11, 4]),
    "an argument of the row": (
        {"prompt": [USER], "completion": [said()], "chat_template_kwargs": {"enable_thinking": False}},
        [*ASKED, 40, 41],
        [11, 4],
    ),
    "an answer as text stays as it is": ({"prompt": [USER], "response": "b"}, ASKED, [11, 4]),
    "history": (
        {"messages": [USER, said(tool_calls=[CALL]), {"role": "tool", "content": "c", "name": "x"}, said("d")]},
        [3, 5, 10, 4, 3, 6, 11, 42, 15, 43, 4, 3, 2, 12, 4, 3, 6],
        [40, 41, 13, 4],
    ),
}


@pytest.mark.parametrize(("row", "prompt", "response"), LEARNED.values(), ids=LEARNED)
def test_answer_is_what_the_template_writes(row: Any, prompt: list[int], response: list[int], thinking: Any) -> None:
    assert learned(row, thinking) == (prompt, response)


def test_plain_answer_is_its_content_and_the_end(chat: Any) -> None:
    for answer in ("b", [said()], [said(tool_calls=[])]):
        assert learned({"prompt": [USER], "response": answer}, chat) == ([1, *ASKED], [11, 4])
    chat.chat_template = chat.chat_template.replace("{{ m['content'] }}", " {{ m['content'] | trim }} ")
    assert learned({"messages": [USER, said(" b ")]}, chat) == ([1, *ASKED], [11, 4])


def test_answers_of_a_ranking_are_what_the_template_writes(thinking: Any) -> None:
    row = {"prompt": [USER], "chosen": [said(reasoning_content="c")], "rejected": [said(tool_calls=[CALL])]}
    example = read(comparison_examples, row | {"tools": TOOLS}, thinking)
    opened = [42, 16, 43, *ASKED]
    assert [text.tolist() for text in example.texts] == [
        [*opened, 40, 12, 41, 11, 4],
        [*opened, 40, 41, 11, 42, 15, 43, 4],
    ]


def test_arguments_of_all_rows_come_after_those_of_a_row(thinking: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": [USER]},
        {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": True}},
    ]
    data = PromptDataModule(rows, tokenizer=thinking, chat_template_kwargs={"enable_thinking": False})
    data.setup("fit")
    assert [example.tokens.tolist() for example in data._examples["train"]] == [[*ASKED, 40, 41], ASKED]


PLAIN = {
    "tools": ({"prompt": [USER], "tools": TOOLS}, "takes no `tools`, so it would be lost"),
    "an argument": ({"prompt": [USER], "chat_template_kwargs": {"x": 1}}, "takes no `x`"),
    "an argument of the call": ({"prompt": [USER], "chat_template_kwargs": {"chat_template": "m"}}, "takes no `chat_t"),
    "tools of another kind": (
        {"prompt": [USER], "tools": "g"},
        "`tools` must be a list of JSON schemas.*str: g; where",
    ),
    "tools of a text": ({"prompt": "a", "tools": TOOLS}, "plain text, which no chat template writes, so `tools`"),
    "a call in the history": ({"prompt": [USER, said(tool_calls=[CALL]), USER]}, "`tool_calls` of message 1"),
    "a weight": ({"prompt": [USER | {"weight": 0}]}, "does not write `weight` of message 0 .'user'."),
}
ANSWERED = {
    "a weight": ({"messages": [USER, said(weight=0)]}, "does not write `weight` of message 1 .'assistant'."),
    "reasoning": ({"messages": [USER, said(reasoning_content="c")]}, "`reasoning_content` of message 1"),
    "a call": ({"messages": [USER, said(tool_calls=[CALL])]}, "`tool_calls` of message 1"),
    "a call after a text": ({"prompt": "a", "response": [said(tool_calls=[CALL])]}, "only a chat template can write"),
}


@pytest.mark.parametrize(("row", "message"), PLAIN.values(), ids=PLAIN)
def test_what_the_template_leaves_out_is_refused(row: dict[str, Any], message: str, chat: Any) -> None:
    with pytest.raises(ValueError, match=rf"f.jsonl, line 7: .*{message}"):
        read(prompt_examples, row, chat)


@pytest.mark.parametrize(("row", "message"), ANSWERED.values(), ids=ANSWERED)
def test_answer_that_the_template_leaves_out_is_refused(row: dict[str, Any], message: str, chat: Any) -> None:
    with pytest.raises(ValueError, match=rf"f.jsonl, line 7: .*{message}"):
        learned(row, chat)


def test_answer_that_does_not_follow_the_prompt_is_refused(thinking: Any) -> None:
    """The prompt ends with an empty think block, where the dialogue has reasoning."""
    row = {"messages": [USER, said(reasoning_content="c")], "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(
        ValueError, match=r"f.jsonl, line 7: the chat template ends the prompt with .*give the answer as"
    ):
        learned(row, thinking)


def test_answer_that_ends_otherwise_is_refused(thinking: Any) -> None:
    thinking.chat_template = thinking.chat_template.replace(
        "</tool>{% endfor %}<|im_end|>", "</tool>{% endfor %}{{ '</s>' if m.tool_calls else '<|im_end|>' }}"
    )
    with pytest.raises(ValueError, match="f.jsonl, line 7: the chat template ends this answer with .*others with"):
        learned({"messages": [USER, said(tool_calls=[CALL])]}, thinking)


def test_column_of_another_meaning_is_left_alone(chat: Any) -> None:
    data = PromptDataModule([{"prompt": "a", "tools": "hammer"}], tokenizer=chat, columns=ColumnNames(tools="schemas"))
    data.setup("fit")
    assert data._examples["train"][0].row == {"prompt": "a", "tools": "hammer"}


@pytest.mark.parametrize("answer", ["<think> c </think> b", "<think>\nc </think> b", [said(" <think>\nc </think> b")]])
@pytest.mark.parametrize("template", ["<think>\n", "<think>"])
def test_tag_of_prompt_and_answer_stands_once(
    answer: Any, template: str, thinking: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts end in the tag and turns are their content: joined as they are, the tag would stand twice."""
    thinking.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant " + template + "{% endif %}"
    )
    data = DemonstrationDataModule([{"prompt": [USER], "response": answer}], tokenizer=thinking)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    (example,) = data._examples["train"]
    assert example.tokens.tolist() == [*ASKED, 40, 12, 41, 11, 4]
    assert "left out of 1 responses the opening tag" in caplog.text


def test_answer_without_the_tag_of_its_prompt_is_refused_as_a_message(thinking: Any) -> None:
    thinking.chat_template = thinking.chat_template.replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"
    )
    thinking.chat_template = thinking.chat_template.replace(
        "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n", ""
    )
    with pytest.raises(ValueError, match="the chat template ends the prompt with"):
        learned({"messages": [USER, said()]}, thinking)
    assert learned({"prompt": [USER], "response": "b"}, thinking) == ([*ASKED, 40], [11, 4])
