"""Pairwise preference by any Python function, asked in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.rewards.text import columns_of, wanted_by
from lightning_rlhf.types import Row


def judged(fn: Callable[..., Any], rows: Sequence[Row], first: list[str], second: list[str]) -> Tensor:
    """Probability that `first` is the better response, asked with it in first and in second position.

    Args:
        fn: `fn(prompts, first, second, **columns)`, probabilities that the first is better, one per prompt, ½ for a
            tie; it gets the columns that it names, or all of them if it takes `**kwargs`.
        rows: the N raw records of the prompts.
        first: N responses, text.
        second: N others.

    Returns:
        (2, N), float64; their mean over the two orders is free of a liking for a position that adds to a probability.

    Raises:
        ValueError: the judge has no signature, returned another count, or a number outside [0, 1].
        TypeError: it returned no numbers.
    """
    if not rows:
        return torch.zeros(2, 0, dtype=torch.float64)
    columns = columns_of(rows, but={"prompt", "prompts", "first", "second"})
    wanted, prompts = wanted_by(fn), [row.get("prompt") for row in rows]
    asked = {name: column for name, column in columns.items() if name in wanted}
    name = getattr(fn, "__qualname__", type(fn).__name__)
    forward = _checked(fn(prompts, first, second, **asked), count=len(rows), name=name)
    return torch.stack([forward, 1 - _checked(fn(prompts, second, first, **asked), count=len(rows), name=name)])


def _checked(answers: Any, *, count: int, name: str) -> Tensor:
    try:
        values = torch.as_tensor(answers, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(answers).__name__}: {str(answers)[:80]}"
        raise TypeError(f"the judge {name} must return {count} numbers: got {got}") from error
    if values.shape != (count,):
        raise ValueError(f"the judge {name} must return one number per pair: got {tuple(values.shape)} for {count}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        odd = values[~((values >= 0) & (values <= 1))][0].item()
        raise ValueError(
            f"the judge {name} must return probabilities that the first response is better, from 0 to 1: got {odd}"
        )
    return values
