"""Inputs of a text reward: decoded responses and the data columns it names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Sequence
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.types import Rollout, Row

_TAG = re.compile(r"<\w+>")


class EverythingBut(Container[str]):
    """Container that contains every name but some.

    Args:
        names: that it does not contain.
    """

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def __contains__(self, name: object) -> bool:
        return name not in self.names


def decoded(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode the responses of a rollout with `texts_of`; of a dialogue with an environment the last span."""
    texts = rollout.tokens[:, rollout.prompt_width :].tolist()
    spans = zip(texts, *(columns.tolist() for columns in rollout.last_span), strict=True)
    return texts_of([row[start:stop] for row, start, stop in spans], tokenizer)


def texts_of(responses: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode responses without special tokens, except for tag pairs such as `<think>` and `</think>`."""
    tags = _tags(tokenizer)
    if not tags:
        return tokenizer.batch_decode(responses, skip_special_tokens=True)  # type: ignore[arg-type]
    special = {token for token, text in tokenizer.added_tokens_decoder.items() if text.special}
    omitted = special.union(tokenizer.all_special_ids) - tags
    plain = [[token for token in row if token not in omitted] for row in responses]
    return tokenizer.batch_decode(plain, skip_special_tokens=False)


def _tags(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the added tokens `<name>` and `</name>` if both exist and neither begins or ends texts.

    The tokenizer substitute of a log has none.
    """
    added = {str(text): token for token, text in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    for named in getattr(tokenizer, "special_tokens_map", {}).values():
        added.pop(str(named), None)
    pairs = [(text, f"</{text[1:]}") for text in added if _TAG.fullmatch(text)]
    return {added[text] for pair in pairs if pair[1] in added for text in pair}


def columns_of(rows: Sequence[Row], *, but: set[str]) -> dict[str, list[Any]]:
    """Collect the records' columns by name without those in `but`; None if a record lacks a value."""
    names = sorted({name for row in rows for name in row} - but)
    return {name: [row.get(name) for row in rows] for name in names}


def check_needed(fn: Callable[..., Any], names: set[str], *, texts: int, source: str) -> None:
    """Raise ValueError if an argument of a function without a default is no column of the data.

    Args:
        fn: a reward, a judge.
        names: columns of the records.
        texts: number of its first arguments that are no columns.
        source: what the function is, for the error.
    """
    missing = [name for name in needed_by(fn, texts=texts) if name not in names - {"prompt"}]
    if missing:
        raise ValueError(
            f"{source} needs {', '.join(missing)}, but the rows "
            f"have {', '.join(sorted(names)) or 'none'}: rename the argument, or give it a default"
        )


def needed_by(fn: Callable[..., Any], *, texts: int) -> list[str]:
    """List the arguments of a function without a default, but for its first `texts`."""
    return [p.name for p in _columns(fn, texts=texts) if p.default is inspect.Parameter.empty]


def wanted_by(fn: Callable[..., Any], *, texts: int) -> Container[str]:
    """Names of the columns that a function takes beside its first `texts` arguments.

    With `**kwargs` it takes every other name.

    Raises:
        ValueError: it has no signature.
    """
    parameters = inspect.signature(fn).parameters.values()
    columns = {p.name for p in _columns(fn, texts=texts)}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return EverythingBut({p.name for p in parameters} - columns) if takes_all else columns


def _columns(fn: Callable[..., Any], *, texts: int) -> list[inspect.Parameter]:
    """Return the arguments that may be given by name beside the first `texts`, which get the texts."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(fn).parameters.values())
    positional = [p for p in parameters if p.kind in named[:1] or p.kind is inspect.Parameter.POSITIONAL_ONLY][:texts]
    return [p for p in parameters if p not in positional and p.kind in named]
