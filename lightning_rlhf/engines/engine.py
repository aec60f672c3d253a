"""Interface of what draws responses: token ids in, token ids with their log-probs out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, cast

import torch
from torch import Tensor

from lightning_rlhf.engines.generation import SamplingParams
from lightning_rlhf.engines.progress import Watch
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.types import PromptBatch, Rollout


class EngineError(RuntimeError):
    """Failure of an engine, with what the user can do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Responses to draw.

    Attributes:
        prompts: B prompts.
        samples: k, responses to each prompt; those of one prompt follow each other.
        uniforms: numbers in [0, 1) to draw by, (B·k, R), float64; None decodes greedily. An engine that has random
            numbers of its own uses those.
        params: temperature τ and longest response R.
        end_tokens: ids that end a response.
    """

    prompts: PromptBatch
    samples: int
    uniforms: Tensor | None
    params: SamplingParams
    end_tokens: Sequence[int]

    @property
    def is_greedy(self) -> bool:
        """True if each token is the most likely one."""
        return self.uniforms is None


class Processes(Protocol):
    """Processes of a run as an engine needs them; `Ranks` is one."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def device(self) -> torch.device:
        """Device of its networks."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all of them."""

    def agree(self, problem: Exception | None) -> None:
        """Raise on each if one has a problem."""

    def gather_text(self, text: str) -> str:
        """Gather the texts of all."""


class Engine(ABC):
    """Sampler of responses from the weights that were loaded last.

    The step, evaluations and prediction ask it and do not know which it is. `load` and `generate` are called by all
    processes of a run, each with its own prompts. A class of your own needs these two methods; what it returns is
    checked by `check_sampled`.
    """

    # no annotations: jsonargparse would look their names up in the modules of classes that derive from this one
    is_external = True
    """Whether weights other than the trained ones draw, so that their log-probs are not those of the update."""
    overlaps = False
    """Whether `generate` may run in another thread while the policy trains: the loaded weights are then a copy."""
    watch = cast("Watch | None", None)
    """Progress tracker of the drawing while it is set."""

    @abstractmethod
    def load(self, policy: PolicyModel, version: int) -> None:
        """Take over today's weights.

        Args:
            policy: whose weights.
            version: their name: the number of rollouts that they have learned from.

        Raises:
            EngineError: the weights cannot be taken over.
        """

    @abstractmethod
    def generate(self, request: Request) -> Sampled:
        """Draw the responses of a request.

        Raises:
            EngineError: they cannot be drawn.
        """

    def attach(self, ranks: Processes) -> None:
        """Take note of the processes of the run, before anything else is asked."""
        return

    def confirm(self, rollout: Rollout, logprobs: Tensor, *, same_weights: bool) -> None:
        """Check the log-probs that came with responses against the trainer's.

        Args:
            rollout: B responses with `sampler_logprobs`.
            logprobs: the trainer's, (B, R), nats.
            same_weights: whether the trainer's are of the weights that drew, or of those after one update.

        Raises:
            EngineError: they are too far apart to be of these responses and weights.
        """
        return

    def copy_dtype(self, policy: PolicyModel, params: SamplingParams, device: str) -> torch.dtype | None:
        """Return the dtype of the weights that this process samples with; None: others sample.

        Args:
            policy: that is sampled from.
            params: how.
            device: type of the device, whose autocast is asked.
        """
        return None

    def metrics(self) -> dict[str, float]:
        """Return what to log of a step, by logged name.

        A number that does not apply is 0: Lightning repeats one that is left out.
        """
        return {"time/sync": 0.0} if self.is_external else {}

    def close(self) -> None:
        """Release what the engine holds."""
        return

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return the engine itself: callbacks copy modules, and there is one engine in a run."""
        return self


def check_sampled(sampled: Sampled, request: Request, version: int) -> None:
    """Check that an engine's responses are whole and drawn by the loaded weights.

    Args:
        sampled: the engine's answer.
        request: what was asked for.
        version: of the weights that were loaded.

    Raises:
        EngineError: a response is missing, has a hole, lacks a log-prob, ends where none of the end tokens stands, or
            was drawn by other weights.
    """
    rows = len(request.prompts.tokens) * request.samples
    shape = rows, request.params.max_new_tokens
    if sampled.tokens.shape != shape:
        raise EngineError(f"the engine returned responses of shape {tuple(sampled.tokens.shape)}, asked for {shape}")
    mask = sampled.response_mask
    lengths = mask.sum(1)
    last = sampled.tokens.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    ends = torch.isin(last, torch.tensor(list(request.end_tokens), device=last.device))
    full = lengths == shape[1]
    finite = torch.isfinite(sampled.logprobs) & (sampled.logprobs <= 1e-3)
    problems = {
        "are empty or have a hole": (lengths == 0) | (mask[:, 1:] & ~mask[:, :-1]).any(1),
        "have no log-prob of a token, or one above 0": (mask & ~finite).any(1),
        "stop without an end token": ~ends & ~full,
        "are said to have ended without an end token, or to go on after one": sampled.ended != ends,
        "were drawn by weights of another version": (mask & (sampled.versions != version)).any(1),
    }
    failed = torch.stack(list(problems.values())).any(1).tolist()
    for (problem, of_rows), fails in zip(problems.items(), failed, strict=True):
        if fails:
            row = int(of_rows.nonzero()[0])
            drawn = sorted(set(sampled.versions[row][mask[row]].tolist()))
            raise EngineError(
                f"{int(of_rows.sum())} of {rows} responses of the engine {problem}: response {row} has "
                f"{int(lengths[row])} tokens by weights {drawn}, and version {version} was loaded"
            )
