"""Tool calls in text, and the functions that they call."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from says import Says
from templates import tokenizer

from lightning_rlhf import PPOModule, SamplingParams
from lightning_rlhf.environments import Done, ToolCall, ToolEnvironment
from lightning_rlhf.environments.tool_calls import CallFormat, call_format
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.text import Encoder
from lightning_rlhf.types import PromptBatch

HERMES = CallFormat("<tool_call>", "</tool_call>")
CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'


def add(a: int, b: int = 5) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


async def look(door: str) -> dict:
    """Look behind a door.

    Args:
        door: its name.
    """
    await asyncio.sleep(0)
    return {"door": door, "size": 2}


def fail() -> str:
    """Fail."""
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize("family", ["chatml", "hermes", "thinking", "instruct", "turns"])
def test_format_is_the_template_s_or_that_of_hermes(family):
    assert call_format(tokenizer(family)) == HERMES


def test_format_of_a_template_that_writes_the_call_alone():
    form = call_format(tokenizer("dated"))
    assert form == CallFormat("", "")
    assert form.parse(' {"name": "add", "parameters": {"a": 1}} ') == [ToolCall("add", {"a": 1})]
    assert form.parse('the answer is {"name": 3}') == []


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("the answer is 12", []),
        (f"I add.<tool_call>\n{CALL}\n</tool_call>", [ToolCall("add", {"a": 1, "b": 2})]),
        (f"<tool_call>{CALL}</tool_call> and <tool_call>{CALL}", [ToolCall("add", {"a": 1, "b": 2})] * 2),
        (f"<tool_call>[{CALL}, {CALL}]</tool_call>", [ToolCall("add", {"a": 1, "b": 2})] * 2),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', [ToolCall("add", {"a": 1})]),
        ('<tool_call>{"name": "look"}</tool_call>', [ToolCall("look", {})]),
    ],
)
def test_calls_are_read(text, calls):
    assert HERMES.parse(text) == calls


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("add(1, 2)", "it is no JSON"),
        ('{"arguments": {}}', "there is no name"),
        ('{"name": 3}', "there is no name"),
        ("7", "there is no name"),
        ('{"name": "add", "arguments": [1]}', "the arguments are no object"),
        ('{"name": "add", "arguments": "a=1"}', "the arguments are no JSON"),
        ("[" * 100_000, "it is no JSON"),
    ],
)
def test_malformed_call_says_what_is_wrong(body, said):
    (call,) = HERMES.parse(f"<tool_call>{body}</tool_call>")
    assert said in call.problem
    (message,) = ToolEnvironment([add]).step("", [call])
    assert message["content"].startswith("error: a tool call must have the form")


@pytest.mark.parametrize(
    ("call", "content"),
    [
        (ToolCall("add", {"a": 1, "b": 2}), "3"),
        (ToolCall("add", {"a": 1}), "6"),
        (ToolCall("look", {"door": "ö"}), '{"door": "ö", "size": 2}'),
        (ToolCall("add", {"b": 2}), "error: TypeError: missing a required argument: 'a'"),
        (ToolCall("add", {"a": 1, "c": 2}), "error: TypeError: got an unexpected keyword argument 'c'"),
        (ToolCall("sub", {}), "error: there is no tool 'sub'; the tools are add, look, fail"),
        (ToolCall("fail", {}), "error: ZeroDivisionError: by zero"),
    ],
)
def test_result_of_a_call(call, content):
    (message,) = ToolEnvironment([add, look, fail]).step("", [call])
    assert message == {"role": "tool", "name": call.name, "content": content}


def test_turn_without_a_call_is_the_last():
    assert ToolEnvironment([add]).step("the answer is 3", []) == Done()


def test_schemas_are_those_of_transformers():
    (schema,) = ToolEnvironment([add]).schemas()
    assert schema["function"]["name"] == "add"
    assert schema["function"]["parameters"]["properties"]["a"] == {"type": "integer", "description": "the first."}
    assert ToolEnvironment([add], described=False).schemas() == []


@pytest.mark.parametrize("family", ["hermes", "dated"])
def test_policy_reads_the_tools_and_their_results(make_lm, family):
    """The whole way: schemas in the prompt, a call in the template's form, its result, and an error."""
    read = tokenizer(family)
    call = CALL if family == "hermes" else CALL.replace("arguments", "parameters")
    bad = call.replace("add", "sub")
    tagged = [f"<tool_call>{one}</tool_call>" if family == "hermes" else one for one in (call, bad)]
    engine = Says(read, [*tagged, "it is 3"])
    scored: list[str] = []

    def reward(prompts, responses):
        scored.extend(responses)
        return [1.0] * len(responses)

    module = PPOModule(
        make_lm("llama", vocab=len(read), end=read.eos_token_id),
        reward,
        tokenizer=read,
        generation=SamplingParams(max_new_tokens=60),
        environment=Episodes(factory=lambda: ToolEnvironment([add])),
        engine=engine,
    )
    module.configure_model()
    row = {"prompt": [{"role": "user", "content": "what is 1 + 2?"}]}
    prompt = torch.tensor([list(Encoder(read).prompt(row["prompt"]))])
    batch = PromptBatch(prompt, torch.ones_like(prompt, dtype=torch.bool), torch.tensor([True]), [row])
    rollout = module.responder.draw(batch, samples=1, iteration=0, batch=0)
    module.score(rollout, batch)
    first, second, third = map(read.decode, engine.asked)
    assert json.dumps("the first.") in first
    assert first == read.apply_chat_template(
        row["prompt"], tools=ToolEnvironment([add]).schemas(), add_generation_prompt=True, tokenize=False
    )
    assert "\n3\n" in second[len(first) :] or '"3"' in second[len(first) :]
    assert "there is no tool 'sub'; the tools are add" in third[len(second) :]
    assert scored == ["it is 3"]
    assert rollout.ended.all()
    assert int(rollout.spans) == 3
