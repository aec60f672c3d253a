"""What a function of text is given: responses as text, and the columns of the data that it names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Sequence
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.types import Rollout, Row

_TAG = re.compile(r"<\w+>")


class Everything(Container[str]):
    """Holds every name."""

    def __contains__(self, name: object) -> bool:
        return True


def decoded(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The responses of a rollout, as `texts_of` reads them."""
    texts = rollout.tokens[:, rollout.prompt_width :].tolist()
    return texts_of([row[:length] for row, length in zip(texts, rollout.lengths.tolist(), strict=True)], tokenizer)


def texts_of(responses: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Responses as text, special tokens left out except for opening and closing tags, `<think>` and `</think>`."""
    tags = _tags(tokenizer)
    if not tags:
        return tokenizer.batch_decode(responses, skip_special_tokens=True)
    special = {token for token, text in tokenizer.added_tokens_decoder.items() if text.special}
    omitted = special.union(tokenizer.all_special_ids) - tags
    kept = [[token for token in row if token not in omitted] for row in responses]
    return tokenizer.batch_decode(kept, skip_special_tokens=False)


def _tags(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the added tokens `<name>` and `</name>`, where both are there and neither begins or ends texts.

    A log that stands in for the tokenizer has none.
    """
    added = {str(text): token for token, text in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    for named in getattr(tokenizer, "special_tokens_map", {}).values():
        added.pop(str(named), None)
    pairs = [(text, f"</{text[1:]}") for text in added if _TAG.fullmatch(text)]
    return {added[text] for pair in pairs if pair[1] in added for text in pair}


def columns_of(rows: Sequence[Row], *, but: set[str]) -> dict[str, list[Any]]:
    """The records' columns by name, None if a record has none; those that arrive otherwise are left out."""
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
