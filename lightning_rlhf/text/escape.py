"""Escaping of untrusted text for display: it can neither drive a terminal nor become markup."""

from __future__ import annotations

import html as markup

_BREAKS = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def terminal(text: str) -> str:
    r"""Escape a text to one line of printable characters, with Python escapes such as `\x1b` for others.

    What is escaped: C0 and C1 controls with ESC and NUL (ANSI sequences lose their first character and with it their
    effect), line breaks of every kind, bidirectional overrides and other invisible format characters, surrogates,
    private and unassigned code points, and every space but the plain one. Backslashes stay, so that ordinary text is
    unchanged: this is for reading, not for parsing back.
    """
    return text if text.isprintable() else "".join(map(_printable, text))


def html(text: str) -> str:
    """Escape a text as HTML content or a quoted attribute: markup characters as entities, line breaks as `<br>`.

    What `terminal` escapes is escaped here too, tabs apart: a bidirectional override would reorder a page as well.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    return "<br>".join(markup.escape("".join(c if c == "\t" else _printable(c) for c in line)) for line in lines)


def markdown(text: str) -> str:
    """Escape a text as Markdown, also in a table's cell: punctuation but commas as entities and breaks as `<br>`.

    An entity is never syntax, so that there is no link, image, emphasis, code, cell or HTML in it.
    """
    return "<br>".join(
        "".join(c if c.isalnum() or c in " ," else f"&#{ord(c)};" for c in terminal(line))
        for line in text.replace("\r\n", "\n").split("\n")
    )


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return _BREAKS.get(character) or character.encode("unicode_escape").decode("ascii")
