"""Check that a text is made of whole characters."""

from __future__ import annotations


def check_characters(text: str) -> None:
    """Check that a text can be written as UTF-8, as every tokenizer needs it.

    Raises:
        ValueError: it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(error.start - 20, 0) : error.start]
        raise ValueError(
            f"the text holds half of a surrogate pair, {text[error.start]!r}{f' after {before!r}' if before else ''}: "
            "it was cut inside a character; remove it"
        ) from error
