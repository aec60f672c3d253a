"""Parameters of the sampling of responses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.checks import check_count, check_positive
from lightning_rlhf.core.settings import seed_of_run


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Pure sampling at a temperature.

    There is no top-k, top-p or minimum length: they sample from another distribution than the one whose log-probs
    the update uses, and the KL to the reference can come out negative.
    """

    max_new_tokens: int = 128
    """Longest response, end token included."""
    samples_per_prompt: int | None = None
    """k, responses to each prompt in training; evaluation draws one. None: 8 where the advantage compares the responses
    to one prompt, as TRL has it, else 1."""
    slots: int | None = None
    """Responses decoded at the same time, at least `samples_per_prompt`; one that ends makes room for the next prompt.
    None decodes all at once. Where lengths differ widely, a part of the rollout is faster and takes less memory."""
    temperature: float = 1.0
    """τ > 0; divides the logits in sampling and in every log-prob. InstructGPT samples at 1."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the weights that sample. None: that of training (bfloat16 under bf16-mixed), copied once a rollout."""
    seed: int | None = None
    """Seed of the random numbers, a function of (seed, iteration, row) whatever the number of processes. None is that
    of `seed_everything`, else 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        samples = self.samples_per_prompt
        check_count(max_new_tokens=self.max_new_tokens, samples_per_prompt=1 if samples is None else samples)
        check_positive(temperature=self.temperature)
        if self.slots is not None and self.slots < (samples or 1):
            raise ValueError(
                f"`slots` must hold the responses to one prompt: got slots={self.slots} for "
                f"samples_per_prompt={samples}"
            )

    def for_run(self, needs_group: bool) -> Self:
        """Fill in `seed` and `samples_per_prompt` where they are None.

        Args:
            needs_group: whether the responses to one prompt are compared.

        Raises:
            ValueError: `slots` is below it.
        """
        samples = self.samples_per_prompt
        if samples is None:
            samples = 8 if needs_group else 1
        return replace(self, seed=seed_of_run(self.seed), samples_per_prompt=samples)


def row_uniforms(*, seed: int, stream: str, iteration: int, rows: Sequence[int], length: int) -> Tensor:
    """Random numbers in [0, 1), one per token; they depend only on the arguments.

    They are the SHAKE-128 of the arguments, 53 bits each: torch's generators tell only 2³² seeds apart on a CPU.

    Args:
        seed: of the run.
        stream: what they are for, so that training and validation do not share numbers.
        iteration: which rollout.
        rows: positions of the responses in the rollout of all processes.
        length: R, tokens per row.

    Returns:
        (len(rows), R), float64, on CPU.
    """
    uniforms = torch.empty(len(rows), length, dtype=torch.float64)
    for i, row in enumerate(rows):
        stretch = hashlib.shake_128(f"{seed}/{stream}/{iteration}/{row}".encode()).digest(8 * length)
        words = torch.frombuffer(bytearray(stretch), dtype=torch.int64)
        uniforms[i] = words.bitwise_and(2**53 - 1).double() * 2**-53
    return uniforms
