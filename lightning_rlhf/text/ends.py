"""End tokens of a response: one set for training, sampling and export."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_ASKED = {"role": "user", "content": "a"}
_PROBE = "qzxq"
"""Message content that is easy to find in the text of a template."""


def end_tokens(tokenizer: PreTrainedTokenizerBase | None, named: int | Sequence[int] | None = None) -> list[int]:
    """Ids of the tokens that end a turn or a text or that a network's config names, each once.

    Args:
        tokenizer: names the end of a text and, by its chat template, that of a turn; None names neither.
        named: `eos_token_id` of a generation config.

    Returns:
        the first is the one that is taught: after a dialogue the end of a turn, where the template has one.
    """
    ids = [] if tokenizer is None else [turn_end(tokenizer), tokenizer.eos_token_id]
    ids += [named] if named is None or isinstance(named, int) else named
    return list(dict.fromkeys(token for token in ids if token is not None))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token that the chat template writes after an answer, such as `<|im_end|>`.

    Returns:
        None if it writes none, takes no question with its answer, or is not there.
    """
    after = after_turn(tokenizer)
    tokens = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return tokens[0] if tokens and tokens[0] in special else None


def after_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the stripped text that the chat template writes after the last answer of a dialogue."""
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    dialogue = [_ASKED, {"role": "assistant", "content": _PROBE}]
    try:
        written = str(tokenizer.apply_chat_template(dialogue, tokenize=False))
    except Exception:  # a template is a program that came with the tokenizer: it may raise anything
        return ""
    _, probe, after = written.rpartition(_PROBE)
    return after.strip() if probe else ""
