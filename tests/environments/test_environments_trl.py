"""Classes of TRL's `environment_factory`: their methods, what they open with, their rewards."""

from __future__ import annotations

import copy

import pytest
import torch
from jsonargparse import ArgumentParser
from says import Says
from templates import tokenizer

from lightning_rlhf import PPOModule, SamplingParams
from lightning_rlhf.environments import Done, ToolCall, ToolEnvironment, TRLEnvironment
from lightning_rlhf.rewards import EnvironmentReward
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.text import Encoder
from lightning_rlhf.types import PromptBatch


class Dial:
    """What Safe inherits."""

    def turn(self, by: int) -> str:
        """Turn the dial.

        Args:
            by: steps to the right.
        """
        self.at += by
        return f"it is at {self.at}"


class Safe(Dial):
    """Opens at the number of its row."""

    def __init__(self) -> None:
        self.at, self.is_open = 0, False

    def reset(self, number, **columns) -> str | None:
        self.number, self.columns = number, columns
        return f"The dial is at {self.at}."

    async def pull(self) -> bool:
        """Pull the door."""
        self.is_open = self._fits()
        return self.is_open

    def _fits(self) -> bool:
        return self.at == self.number

    @property
    def burning(self) -> str:
        raise RuntimeError("looked at")


class Graded(Safe):
    def get_reward(self) -> float:
        return 0.25


def built() -> Graded:
    return Graded()


def opened(safe: Safe) -> float:
    return float(safe.is_open)


async def opened_later(safe: Safe) -> float:
    return 2.0 * safe.is_open


def played(environment: TRLEnvironment, by: int = 3) -> Done:
    environment.reset({"prompt": "open it", "number": 3})
    environment.step("", [ToolCall("turn", {"by": by}), ToolCall("pull", {})])
    end = environment.step("done", [])
    assert isinstance(end, Done)
    return end


def test_tools_are_the_public_methods():
    environment = TRLEnvironment(Graded)
    assert [schema["function"]["name"] for schema in environment.schemas()] == ["pull", "turn"]
    (schema,) = (one["function"] for one in environment.schemas() if one["function"]["name"] == "turn")
    assert schema["parameters"]["required"] == ["by"]
    assert list(schema["parameters"]["properties"]) == ["by"]
    assert TRLEnvironment(Safe, described=False).schemas() == []


def test_tools_are_those_that_trl_takes(make_lm, tmp_path, monkeypatch):
    """The trainer of the installed TRL, asked for the tools it would show the policy."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    read = copy.deepcopy(tokenizer("hermes"))
    read.response_schema = {"type": "object"}  # TRL knows those of published templates alone
    trainer = trl.GRPOTrainer(
        model=make_lm("llama", vocab=len(read), end=read.eos_token_id),
        processing_class=read,
        args=trl.GRPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}], "number": 1}]),
        environment_factory=Graded,
    )
    assert sorted(tool.__name__ for tool in trainer.tools) == sorted(TRLEnvironment(Graded).tools)


def test_row_is_given_by_name_and_the_observation_opens():
    environment = TRLEnvironment(Safe)
    assert environment.reset({"prompt": "open it", "number": 3}) == "The dial is at 0."
    assert environment.environment.number == 3
    assert environment.environment.columns == {"prompt": "open it"}
    with pytest.raises(TypeError, match="number"):
        environment.reset({"prompt": "open it"})


def test_calls_are_run_in_order():
    environment = TRLEnvironment(Safe)
    environment.reset({"number": 3})
    calls = [ToolCall("turn", {"by": 2}), ToolCall("pull", {}), ToolCall("turn", {"by": 1}), ToolCall("pull", {})]
    said = [message["content"] for message in environment.step("", calls)]
    assert said == ["it is at 2", "false", "it is at 3", "true"]
    (message,) = environment.step("", [ToolCall("reset", {"number": 0})])
    assert message["content"] == "error: there is no tool 'reset'; the tools are pull, turn"


@pytest.mark.parametrize(
    ("kind", "reward", "right", "wrong"),
    [
        (Safe, None, 0.0, 0.0),
        (Safe, opened, 1.0, 0.0),
        (Safe, opened_later, 2.0, 0.0),
        (Graded, None, 0.25, 0.25),
        (Graded, opened, 1.25, 0.25),
    ],
)
def test_reward_is_of_the_last_turn(kind, reward, right, wrong):
    assert played(TRLEnvironment(kind, reward)) == Done(right)
    assert played(TRLEnvironment(kind, reward), by=2) == Done(wrong)


def test_object_without_reset_is_refused():
    with pytest.raises(TypeError, match=r"needs a method `reset\(\*\*columns\)`: Dial has none"):
        TRLEnvironment(Dial)


@pytest.mark.parametrize("name", ["Graded", "built"])
def test_class_or_function_is_named_in_a_config(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Episodes, "episodes")
    arguments = f"{{factory: {__name__}.{name}, reward: {__name__}.opened}}"
    kind = f"{TRLEnvironment.__module__}.TRLEnvironment"
    given = parser.parse_args([f"--episodes.factory={{class_path: {kind}, init_args: {arguments}}}"])
    factory = parser.instantiate_classes(given).episodes.factory
    assert played(factory()) == Done(1.25)
    assert factory().environment is not factory().environment


def test_policy_plays(make_lm):
    """The whole way: the opening after the prompt, two calls, the reward of the last turn."""
    read = tokenizer("hermes")
    calls = ['{"name": "turn", "arguments": {"by": 3}}', '{"name": "pull", "arguments": {}}']
    engine = Says(read, [*(f"<tool_call>{call}</tool_call>" for call in calls), "it is open"])
    module = PPOModule(
        make_lm("llama", vocab=len(read), end=read.eos_token_id),
        EnvironmentReward(),
        tokenizer=read,
        generation=SamplingParams(max_new_tokens=60),
        environment=Episodes(factory=lambda: TRLEnvironment(Safe, opened)),
        engine=engine,
    )
    module.configure_model()
    row = {"prompt": [{"role": "user", "content": "open it"}], "number": 3}
    prompt = torch.tensor([list(Encoder(read).prompt(row["prompt"]))])
    batch = PromptBatch(prompt, torch.ones_like(prompt, dtype=torch.bool), torch.tensor([True]), [row])
    rollout = module.responder.draw(batch, samples=1, iteration=0, batch=0)
    first, second, third = map(read.decode, engine.asked)
    tools = ToolEnvironment([Safe().pull, Safe().turn]).schemas()
    dialogue = [{"role": "user", "content": "open itThe dial is at 0."}]  # as TRL has it
    assert first == read.apply_chat_template(dialogue, tools=tools, add_generation_prompt=True, tokenize=False)
    assert "it is at 3" in second[len(first) :]
    assert "true" in third[len(second) :]
    assert module.reward(rollout, [row]).tolist() == [1.0]
    assert rollout.ended.all()
