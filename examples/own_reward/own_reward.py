"""A reward of your own: whether the last number in a response is the row's `answer`.

Data rows are {"prompt": "What is 2 + 3?", "answer": "5"}: each column beside the prompt reaches `score` by its name.

    PYTHONPATH=examples/own_reward lightning-rlhf fit --config ppo \
        --config examples/own_reward/own_reward.yaml --model.policy.path runs/sft/model --data.train questions.jsonl
"""

from __future__ import annotations

import re
from typing import Any

from lightning_rlhf import TextReward

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class LastNumber(TextReward):
    """1 for the right number, `attempt` for another one, 0 for none.

    Args:
        attempt: credit for a response that ends on a number at all.
    """

    def __init__(self, attempt: float = 0.1) -> None:
        self.attempt = attempt

    def score(
        self, prompts: list[Any], responses: list[str], *, answer: list[Any], **columns: list[Any]
    ) -> list[float]:
        return [self.verify(NUMBER.findall(text), float(right)) for text, right in zip(responses, answer, strict=True)]

    def verify(self, numbers: list[str], right: float) -> float:
        if not numbers:
            return 0.0
        return 1.0 if float(numbers[-1]) == right else self.attempt
