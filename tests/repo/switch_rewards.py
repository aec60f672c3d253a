"""Switches of rewards: the scores of one rollout, whose tokens are the policy's."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from switch_bench import Bench
from switch_harness import Table, case, to

from lightning_rlhf.core import WorstReward
from lightning_rlhf.rewards import (
    EnsembleReward,
    Format,
    FunctionReward,
    LearnedReward,
    MathAnswer,
    ModuleReward,
    ReasoningGym,
    RegexMatch,
    Reward,
    TextReward,
    TimedReward,
    WeightedReward,
)
from lightning_rlhf.types import Rollout

RESPONSES = torch.tensor([[12, 13, 0], [20, 0, 0], [33, 34, 35], [10, 11, 0]])
LENGTHS = torch.tensor([3, 2, 3, 3])


def words(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(response.split())) for response in responses]


def letters(prompts: list[Any], responses: list[str]) -> list[float]:
    return [sum(0.7**t * (ord(letter) % 7) for t, letter in enumerate(response)) for response in responses]


TEXTS = ["it is 7", "it is 8, or 7", "7", "<note>8</note>", "<think>7</think><answer>8</answer>", "none"]
ANSWERS = ["7", "8", "8", "8", "7", "8"]
ENTRIES = [
    json.dumps({"task": task, "config": {}, "entry": {"question": "", "answer": answer, "metadata": {}}})
    for task, answer in zip(["chain_sum", "decimal_chain_sum"] * 3, ANSWERS, strict=True)
]


def of_text(reward: TextReward) -> Any:
    """Scores of texts, without a rollout."""
    return reward.score([None] * len(TEXTS), TEXTS, answer=ANSWERS, result=ANSWERS[::-1], reasoning_gym=ENTRIES)


def patience(reward: MathAnswer | ReasoningGym) -> bool:
    """Whether an answer is graded that takes some milliseconds."""
    return reward.score([None], ["7"], answer=["7"], reasoning_gym=ENTRIES[:1]) == [1.0]


def table(bench: Bench) -> Table:
    rollout = _rollout(bench)
    rows = [{"prompt": "a b"}] * len(RESPONSES)

    def scores(reward: Reward, tokenizer: Any = bench.tokenizer) -> Any:
        reward.prepare(tokenizer)
        return reward.scored(rollout, rows)

    def scores_of_another_vocabulary(reward: Reward) -> Any:
        return scores(reward, bench.other_tokenizer)

    def rows_per_pass(reward: LearnedReward) -> list[int]:
        reward.prepare(bench.tokenizer)
        sizes: list[int] = []
        reward.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        reward(rollout, rows)
        return sizes

    def slowly(prompts: list[Any], responses: list[str]) -> list[float]:
        time.sleep(0.2)
        return words(prompts, responses)

    def in_time(reward: Reward) -> str:
        try:
            return str(scores(reward).total.tolist())
        except TimeoutError:
            return "too late"

    both = {"words": words, "letters": letters}
    return {
        EnsembleReward: case(
            scores, {"rewards": [words, letters]}, rewards=to([words, words]), combine=to(WorstReward())
        ),
        FunctionReward: case(scores, {"fn": words}, fn=to(letters)),
        LearnedReward: case(
            scores,
            {"path": bench.folder(bench.scorer)},
            path=to(bench.folder(bench.other_scorer)),
            dtype=to("bfloat16"),
            prompt_role=to("user", by=scores_of_another_vocabulary),
            batch_tokens=to(1, by=rows_per_pass),
        ),
        Format: case(of_text, tags=to(["note"])),
        MathAnswer: case(of_text, column=to("result"), seconds=to(1e-6, by=patience)),
        ReasoningGym: case(
            of_text,
            {"seconds": 60.0},
            task=to("chain_sum"),
            extract=to("last_number"),
            seconds=to(1e-6, by=patience),
        ),
        ModuleReward: case(scores, {"module": bench.scorer}, module=to(bench.other_scorer)),
        RegexMatch: case(of_text, {"pattern": r"(\d+)"}, pattern=to(r"is (\d+)"), column=to("answer")),
        TimedReward: case(scores, {"reward": words}, reward=to(letters), seconds=to(0.05, by=in_time, reward=slowly)),
        WeightedReward: case(
            scores, {"parts": both}, parts=to({"words": words}), weights=to({"words": 1.0, "letters": -0.5})
        ),
    }


def _rollout(bench: Bench) -> Rollout:
    response = torch.arange(RESPONSES.shape[1]) < LENGTHS.unsqueeze(1)
    zeros = torch.zeros(RESPONSES.shape, dtype=torch.float64)
    return Rollout(
        tokens=torch.cat([bench.prompts.tokens, RESPONSES], 1),
        attention_mask=torch.cat([bench.prompts.mask, response], 1),
        response_mask=response,
        ended=RESPONSES.gather(1, LENGTHS.unsqueeze(1) - 1).squeeze(1) == 0,
        prompt_index=torch.arange(len(RESPONSES)),
        logprobs=zeros,
        sampler_logprobs=zeros,
        ref_logprobs=zeros,
        entropy=zeros,
        values=zeros,
    )
