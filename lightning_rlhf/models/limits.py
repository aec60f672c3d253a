"""Limits of a network: the tokens and the lengths that it can read."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def check_length(network: nn.Module, length: int, *, limits: str) -> None:
    """Check that a table of positions covers every token of a text; rotary embeddings have no table.

    Args:
        network: its `config.max_position_embeddings` is read.
        length: of the text, tokens.
        limits: the arguments that limit it, for the error.

    Raises:
        ValueError: it has not.
    """
    config: Any = getattr(network, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most and not getattr(config, "rope_parameters", None):
        raise ValueError(
            f"a text of {length} tokens is longer than the {most} positions of {type(network).__name__}: lower {limits}"
        )


logger = logging.getLogger(__name__)


def check_rows(network: nn.Module, tokenizer: PreTrainedTokenizerBase | None, *, name: str) -> None:
    """Check that no token of the tokenizer lies beyond the network's embedding.

    A special token that nothing writes, neither a text nor the chat template, may lie there: the image token of a
    model that was cut down to text. It is warned of.

    Args:
        network: of which `config.vocab_size` is read; one without a config is not checked.
        tokenizer: whose tokens are fed to it; None is not checked.
        name: of the network, for the error.

    Raises:
        ValueError: one does.
    """
    rows = rows_of(network)
    if tokenizer is None or rows is None:
        return
    beyond = sorted((token for token, i in tokenizer.get_vocab().items() if i >= rows), key=len)
    if not beyond:
        return
    unwritten = set(tokenizer.all_special_tokens) - {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token}
    if unwritten >= set(beyond) and not any(token in str(tokenizer.chat_template) for token in beyond):
        logger.warning("the %s network has no embedding for %s: texts must not hold them", name, beyond[:5])
        return
    raise ValueError(
        f"the {name} network embeds {rows} tokens, but {len(beyond)} of the tokenizer's {len(tokenizer)} lie beyond, "
        f"such as {beyond[0]!r}: use the tokenizer the network was trained with, or call "
        "`network.resize_token_embeddings(len(tokenizer))` and save it again"
    )


def check_same(tokenizer: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase | None, *, name: str) -> None:
    """Check that the tokenizer of a network that is fed the policy's token ids equals the policy's.

    Raises:
        ValueError: its tokenizer has another vocabulary.
    """
    if policy is None:
        return
    own, other = tokenizer.get_vocab(), policy.get_vocab()
    if own == other:
        return
    token = min((t for t in own.keys() | other.keys() if own.get(t) != other.get(t)), key=lambda t: (len(t), t))
    raise ValueError(
        f"the {name} network has another vocabulary than the policy: {token!r} is {_place(own, token)} there and "
        f"{_place(other, token)} here; give a model with the policy's tokenizer"
    )


def rows_of(network: Any) -> int | None:
    """Number of rows of the embedding, read from the config because sharded weights do not show them."""
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _place(vocabulary: dict[str, int], token: str) -> str:
    return f"token {vocabulary[token]}" if token in vocabulary else "no token"
