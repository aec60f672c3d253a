"""The ids that were drawn are the ids that are trained on: random turns under six chat templates."""

from __future__ import annotations

import json
import random

import pytest
import torch
from templates import FAMILIES, tokenizer

from lightning_rlhf import PPOModule, SamplingParams
from lightning_rlhf.engines import Engine
from lightning_rlhf.engines.engine import Request
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.environments import Done, Environment
from lightning_rlhf.rewards import EnvironmentReward
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.text import Encoder
from lightning_rlhf.types import PromptBatch, Rollout

LENGTH = 24
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}


class RandomTurns(Engine):
    """Draws turns of random ids, of text, of tool calls and of thoughts; and keeps them by their context."""

    is_external = False

    def __init__(self, family: str, *, thinks: bool) -> None:
        self.family, self.tokenizer, self.random = FAMILIES[family], tokenizer(family), random.Random(7)
        self.thinks = thinks
        self.drawn: dict[tuple[int, ...], list[list[int]]] = {}

    def load(self, policy, version):
        return

    def turn(self) -> list[int]:
        kind = self.random.choice(["ids", "ids", "text", "call"] + ["thought"] * self.thinks)
        if kind == "ids":
            ids = self.random.choices(range(len(self.tokenizer)), k=self.random.randint(0, 8))
        elif kind == "text":
            ids = self.tokenizer(" the  answer\n\nis 12\n").input_ids
        elif kind == "call":
            call = json.dumps({"name": "add", "arguments": {"a": self.random.randint(0, 9)}})
            ids = self.tokenizer(f"<tool_call>\n{call}\n</tool_call>").input_ids
        else:
            ids = self.tokenizer("<think>door</think>\n\nopens").input_ids
        ends = self.tokenizer.convert_tokens_to_ids([self.family.special[0], "<|endoftext|>"])
        ids = [token for token in ids if token not in ends]
        return [*ids[: LENGTH - 1], self.random.choice(ends[:1] * 4 + ends)]

    def generate(self, request: Request) -> Sampled:
        rows = len(request.prompts.tokens) * request.samples
        tokens = torch.zeros(rows, request.params.max_new_tokens, dtype=torch.long)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for i in range(rows):
            ids = self.turn()[: tokens.shape[1]]
            tokens[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), True
            place = i // request.samples
            context = request.prompts.tokens[place][request.prompts.mask[place]].tolist()
            self.drawn.setdefault(tuple(context), []).append(ids)
        last = tokens.gather(1, mask.sum(1, keepdim=True) - 1).flatten()
        numbers = torch.where(mask, -1.0, 0.0)
        return Sampled(
            tokens, mask, torch.isin(last, torch.tensor(request.end_tokens)), numbers, -numbers, mask.long() * 0
        )


class Talk(Environment):
    """Answers at random as a user or, where the template takes it, with a tool's result; 1 to 4 turns."""

    random = random.Random(3)
    users = True
    all: list[Talk] = []

    def __init__(self, takes_tools: bool) -> None:
        self.takes_tools = takes_tools
        self.left = self.random.randint(1, 4)
        self.said: list[dict] = []
        self.all.append(self)

    def reset(self, row):
        self.prompt = row["prompt"]

    def schemas(self):
        return [TOOL] if self.takes_tools else []

    def step(self, text, tool_calls):
        self.left -= 1
        self.said.append({"role": "assistant", "content": text})
        if self.left == 0:
            return Done(1.0)
        answer = self.answer(tool_calls)
        self.said += answer
        return answer

    def answer(self, tool_calls) -> list[dict]:
        said = self.random.choice(["12", "no such door ", "\n ärger 東京", '{"x": [1, 2]}', "<b>&amp;</b>"])
        if self.takes_tools and (tool_calls or not self.users):
            return [{"role": "tool", "content": said}] * max(len(tool_calls), 1)
        return [{"role": "user", "content": said}]


class ToolTalk(Talk):
    """Answers as a tool alone."""

    users = False


def rollout_of(family: str, make_lm, *, episodes: int, thinks: bool = False, talk=Talk) -> tuple[RandomTurns, Rollout]:
    read, takes_tools = tokenizer(family), FAMILIES[family].takes_tools
    engine = RandomTurns(family, thinks=thinks)
    Talk.all.clear()
    module = PPOModule(
        make_lm("llama", vocab=len(read), end=read.eos_token_id),
        EnvironmentReward(),
        tokenizer=read,
        generation=SamplingParams(max_new_tokens=LENGTH, samples_per_prompt=2),
        environment=Episodes(factory=lambda: talk(takes_tools), turns=5, tokens=600, patience=60.0),
        engine=engine,
    )
    module.configure_model()
    encoder = Encoder(read)
    rows = [{"prompt": [{"role": "user", "content": f"open door {i}"}]} for i in range(episodes // 2)]
    prompts = [list(encoder.prompt(row["prompt"])) for row in rows]
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts])
    batch = PromptBatch(tokens, mask, torch.ones(len(rows), dtype=torch.bool), rows)
    return engine, module.responder.draw(batch, samples=2, iteration=0, batch=0)


def check(engine: RandomTurns, rollout: Rollout) -> int:
    """Compare every turn of every episode with what the engine drew in its place; return their number."""
    turns = 0
    for i in range(len(rollout)):
        real = rollout.attention_mask[i]
        ids, own = rollout.tokens[i][real].tolist(), [False] * int(rollout.prompt_lengths[i])
        own += rollout.response_mask[i][: int(rollout.extents[i])].tolist()
        place = 0
        while place < len(ids):
            if not own[place]:
                place += 1
                continue
            stop = next((j for j in range(place, len(ids)) if not own[j]), len(ids))
            assert ids[place:stop] in engine.drawn[tuple(ids[:place])], "a turn is trained on that was not drawn here"
            turns += 1
            place = stop
    assert turns == sum(map(len, engine.drawn.values()))
    return turns


def squeezed(text: str) -> str:
    """The text without white space, which templates trim."""
    return "".join(text.split())


def compared_with_the_template(family: str, rollout: Rollout) -> int:
    """Compare the text of the episodes that are over with the template's, told apart by it; return their number."""
    read = tokenizer(family)
    tools = {"tools": [TOOL]} if FAMILIES[family].takes_tools else {}
    written = set()
    for talk in Talk.all:
        if talk.left == 0:
            text = read.apply_chat_template([*talk.prompt, *talk.said], tokenize=False, **tools)
            written.add(squeezed(text))
    end = read.convert_tokens_to_ids(FAMILIES[family].special[0])
    special = {*read.all_special_ids} - {end}
    compared = 0
    for i in range(len(rollout)):
        real = rollout.attention_mask[i]
        own = rollout.tokens[i, rollout.prompt_width :][rollout.response_mask[i]].tolist()
        if not rollout.ended[i] or special.intersection(own):
            continue
        compared += 1
        assert squeezed(read.decode(rollout.tokens[i][real])) in written
    return compared


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_ids_are_trained_ids(make_lm, family):
    engine, rollout = rollout_of(family, make_lm, episodes=100)
    assert not rollout.failed.any()
    assert check(engine, rollout) > 200
    assert compared_with_the_template(family, rollout) > 30


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_ids_are_trained_ids_of_ten_thousand_episodes(make_lm, family):
    """Of all six families together."""
    engine, rollout = rollout_of(family, make_lm, episodes=1668)
    assert check(engine, rollout) > 3000
    assert compared_with_the_template(family, rollout) > 500


def test_turn_that_the_template_would_drop_is_refused(make_lm):
    with pytest.raises(ValueError, match=r"leaves out part of the policy's turn '<think>door</think>"):
        rollout_of("thinking", make_lm, episodes=40, thinks=True)


def test_thoughts_stay_before_a_tool_s_result(make_lm):
    engine, rollout = rollout_of("thinking", make_lm, episodes=40, thinks=True, talk=ToolTalk)
    assert check(engine, rollout) > 60
    assert compared_with_the_template("thinking", rollout) > 10
    thoughts = tokenizer("thinking")("</think>").input_ids
    assert any(thoughts[-1] in turn for turns in engine.drawn.values() for turn in turns)


def test_tools_that_the_template_does_not_write_are_refused(make_lm, monkeypatch):
    monkeypatch.setitem(FAMILIES, "chatml", FAMILIES["chatml"]._replace(takes_tools=True))
    with pytest.raises(ValueError, match="takes no `tools`"):
        rollout_of("chatml", make_lm, episodes=4)
