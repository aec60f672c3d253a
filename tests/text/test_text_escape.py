"""What a model wrote can neither drive a terminal nor become markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlhf.text.escape import html, markdown, terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Grüße, 世界! \\o/ 👍", "Grüße, 世界! \\o/ 👍"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("a\0b\x7f\x9b31m", r"a\x00b\x7f\x9b31m"),  # NUL, DEL, and CSI as one C1 control
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),  # right-to-left override, isolate
        ("a\u200b\ufeffb\u2028c\xa0d", r"a\u200b\ufeffb\u2028c\xa0d"),  # invisible, line separator, odd space
        ("\ud800", r"\ud800"),
        ("", ""),
    ],
)
def test_terminal_shows_one_line(text: str, shown: str) -> None:
    assert terminal(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert('x')</script>", "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;"),
        ('" onload="x', "&quot; onload=&quot;x"),
        ("a & b\nc\r\nd", "a &amp; b<br>c<br>d"),
        ("&lt;", "&amp;lt;"),
        ("a\tb\x1b\0\u202e", r"a" + "\t" + r"b\x1b\x00\u202e"),
    ],
)
def test_html_is_content(text: str, shown: str) -> None:
    assert html(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Grüße, 世界 2", "Grüße, 世界 2"),
        ("a | b\n\n# c", "a &#124; b<br><br>&#35; c"),
        ("[l](javascript:x)", "&#91;l&#93;&#40;javascript&#58;x&#41;"),
        ("`<b>`", "&#96;&#60;b&#62;&#96;"),
        ("&lt;\x1b[1m\u202e", "&#38;lt&#59;&#92;x1b&#91;1m&#92;u202e"),
    ],
)
def test_markdown_has_no_syntax(text: str, shown: str) -> None:
    assert markdown(text) == shown


@given(st.text(alphabet=st.characters()))
def test_markdown_of_any_text_is_words_entities_and_breaks(text: str) -> None:
    assert re.fullmatch(r"(?:[\w ,]|&#\d+;|<br>)*", markdown(text))


@given(st.text(alphabet=st.characters()))
def test_nothing_unprintable_is_left(text: str) -> None:
    assert terminal(text).isprintable()
    assert terminal(terminal(text)) == terminal(text)


@given(st.text(alphabet="<>&\"'ab/=\n\x1b"))
def test_page_has_no_tag_but_line_breaks(text: str) -> None:
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(f'<p title="{html(text).replace("<br>", "")}">{html(text)}</p>')
    assert tags == ["p"] + ["br"] * text.count("\n")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html(text))
