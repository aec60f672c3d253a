"""What a function of text is given: responses as text, and the columns of the data that it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Sequence
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.types import Rollout, Row


class Everything(Container[str]):
    """Holds every name."""

    def __contains__(self, name: object) -> bool:
        return True


def decoded(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The responses, special tokens left out."""
    texts = rollout.tokens[:, rollout.prompt_width :].tolist()
    kept = [row[:length] for row, length in zip(texts, rollout.lengths.tolist(), strict=True)]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)


def columns_of(rows: Sequence[Row], *, but: set[str]) -> dict[str, list[Any]]:
    """The records' columns by name, None where a record has none; those that arrive otherwise are left out."""
    names = sorted({name for row in rows for name in row} - but)
    return {name: [row.get(name) for row in rows] for name in names}


def wanted_by(fn: Callable[..., Any]) -> Container[str]:
    """Names of the arguments of a function, or every name if it takes `**kwargs`.

    Raises:
        ValueError: it has no signature.
    """
    parameters = inspect.signature(fn).parameters.values()
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return Everything() if takes_all else {p.name for p in parameters}
