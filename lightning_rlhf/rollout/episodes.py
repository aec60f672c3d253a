"""Settings of episodes: what answers the policy, and how long an episode may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.checks import check_count, check_not_negative, check_positive, check_unit_interval
from lightning_rlhf.environments.environment import Environment


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Dialogues with an environment: the action is all that the policy writes in one.

    `generation.max_new_tokens` is the longest turn. An episode ends where the environment says so; one that reaches a
    limit is truncated, as is one whose turn has no end token.
    """

    factory: Callable[[], Environment]
    """Builds the environment of an episode, anew for each: a class of yours, or a function."""
    turns: int = 8
    """Most turns of the policy."""
    tokens: int = 1024
    """Most tokens after the prompt, the policy's and the environment's."""
    bytes: int = 65536
    """Most bytes of a reply in UTF-8; a longer message is cut there."""
    seconds: float = 60.0
    """Most wall time of a call of the environment."""
    patience: float = 1.0
    """Seconds to wait for all environments before the others go on without the slow ones. The groups that are decoded
    together then depend on the time, so that a run repeats to the bit only where all answer within it."""
    failures: float = 0.1
    """Most share of a rollout's episodes whose environment may raise or not answer in time; these are not learned
    from. Above it the run ends."""
    prompt_role: str | None = None
    """As of the data module: the role of a prompt that is a text; None leaves it plain text."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_count(turns=self.turns, tokens=self.tokens, bytes=self.bytes)
        check_positive(seconds=self.seconds)
        check_not_negative(patience=self.patience)
        check_unit_interval(failures=self.failures)
