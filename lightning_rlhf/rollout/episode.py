"""Episode of the policy with an environment, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_rlhf.environments.environment import Environment, Message
from lightning_rlhf.rollout.stage import Call
from lightning_rlhf.types import Row


@dataclass(slots=True, kw_only=True)
class Episode:
    """Context that the policy and an environment extend in turns.

    Attributes:
        place: of the response in the rollout of all processes.
        prompt: which prompt of this process it answers.
        row: raw record of it.
        context: ids of the prompt and of all that follows.
        opening: ids before the first turn.
        chosen: for each id after the opening, whether the policy drew it.
        logprobs: of these ids under the weights that drew them, nats, 0 for an environment's.
        entropy: of the distributions they were drawn from, nats, 0 for an environment's.
        rewards: what the environment gave after each, reward units.
        drawn: the ids of each turn as the engine gave them.
        dialogue: messages before the next turn; empty for plain text.
        arguments: of the chat template.
        environment: None until it is built.
        call: of the environment that has begun; None if the policy is next.
        state: why nothing more is drawn, or `open`.
        problem: why the environment failed.
    """

    place: int
    prompt: int
    row: Row
    context: list[int] = field(default_factory=list)
    opening: int = 0
    chosen: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    drawn: list[list[int]] = field(default_factory=list)
    dialogue: list[Message] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: Environment | None = None
    call: Call | None = None
    state: Literal["open", "done", "truncated", "failed"] = "open"
    problem: str = ""

    @property
    def is_open(self) -> bool:
        """True if more may be drawn."""
        return self.state == "open"

    @property
    def length(self) -> int:
        """Tokens after the opening, of both."""
        return len(self.context) - self.opening

    def open(self, ids: Sequence[int]) -> None:
        """Take the ids before the first turn."""
        self.context, self.opening = list(ids), len(ids)

    def add_turn(self, ids: list[int], logprobs: list[float], entropy: list[float]) -> None:
        """Append a turn of the policy, with a log-prob and an entropy for each of its ids."""
        self.drawn.append(ids)
        self._extend(ids, True, logprobs, entropy)

    def add_reply(self, ids: Sequence[int]) -> None:
        """Append what an environment wrote."""
        nothing = [0.0] * len(ids)
        self._extend(ids, False, nothing, nothing)

    def give(self, reward: float) -> None:
        """Note the reward of the turn that was appended last."""
        self.rewards[-1] += reward

    def fail(self, error: BaseException) -> None:
        """End the episode for a failure of its environment."""
        self.state, self.problem = "failed", f"{type(error).__name__}: {error}"

    def check(self) -> None:
        """Check that the ids to be trained on are those that were drawn, in their places.

        Raises:
            RuntimeError: they are not.
        """
        kept = [token for token, own in zip(self.context[self.opening :], self.chosen, strict=True) if own]
        if kept != [token for turn in self.drawn for token in turn]:
            raise RuntimeError(
                f"episode {self.place}: the ids to be trained on are not those that were drawn; this is a fault of the "
                "library: please report it with the chat template"
            )

    def _extend(self, ids: Sequence[int], own: bool, logprobs: list[float], entropy: list[float]) -> None:
        self.context.extend(ids)
        self.chosen.extend([own] * len(ids))
        self.logprobs.extend(logprobs)
        self.entropy.extend(entropy)
        self.rewards.extend([0.0] * len(ids))
