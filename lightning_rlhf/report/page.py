"""One HTML file that needs nothing else: no network, no library, and no way for what a model wrote to run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from lightning_rlhf.report.figure import Figure, Missing
from lightning_rlhf.report.palette import color
from lightning_rlhf.report.summary import Change
from lightning_rlhf.text.escape import html

WIDE = ("frontier",)
"""Figures that take a whole line of the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: of the part.
        figures: each with its SVG.
        missing: figures that the logs do not give.
    """

    title: str
    figures: Sequence[tuple[Figure, str]]
    missing: Sequence[Missing]


def page(
    title: str,
    *,
    names: Sequence[str],
    changes: Sequence[Change],
    settings: Mapping[str, Sequence[str]],
    sections: Sequence[Section],
    samples: str,
    notes: Sequence[str],
) -> str:
    """The document.

    Args:
        title: of the page, plain text.
        names: of the runs, plain text.
        changes: for the table at the top.
        settings: that differ between runs: key → a value for each run.
        sections: of figures.
        samples: HTML of the responses side by side, or of what would give them.
        notes: plain text, one sentence each.
    """
    places = {name: color(place) for place, name in enumerate(names)}
    runs = "".join(f'<li style="--run: {places[name]}">{html(name)}</li>' for name in names)
    style, script = (files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    body = "\n".join(
        [
            f'<header><h1>{html(title)}</h1><ul class="runs">{runs}</ul></header>',
            _list("notes", "How the logs were read", [html(note) for note in notes]),
            _summary(changes, places),
            *map(_section, sections),
            _settings(settings, names),
            f"<section><h2>Samples</h2>{samples}</section>",
        ]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{html(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def _policy(style: str, script: str) -> str:
    """Only this style sheet and this script, by their hashes: a tag that got past the escaping still can't run."""

    def known(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = {"default-src": "'none'", "script-src": known(script), "style-src-elem": known(style)}
    allowed |= {"style-src-attr": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{what} {who}" for what, who in allowed.items())


def _list(kind: str, title: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    return f'<div class="{kind}"><p>{title}:</p><ul>{"".join(f"<li>{entry}</li>" for entry in entries)}</ul></div>'


def _summary(changes: Sequence[Change], places: Mapping[str, str]) -> str:
    if not changes:
        return ""
    several = len(places) > 1
    rows, before = [], ""
    for change in changes:
        what = html(change.what) if change.what != before else ""
        before = change.what
        of_run = f'<td class="name">{html(change.run)}</td>' if several else ""
        numbers = "".join(f"<td>{number(value)}</td>" for value in (change.first, change.last))
        delta = f"<td>{number(change.last - change.first, '+')}</td>" if len(change.series.x) > 1 else "<td></td>"
        spark = f'<td style="--run: {places[change.run]}">{_sparkline(change.series.y)}</td>'
        rows.append(f"<tr><td>{what}</td>{of_run}{numbers}{delta}{spark}</tr>")
    run = '<th class="name">run</th>' if several else ""
    head = f"<tr><th></th>{run}<th>start</th><th>end</th><th>change</th><th></th></tr>"
    caption = "Held out: first and last evaluation. Training: means over the first and the last tenth."
    return (
        f'<section><h2>Start and end</h2><div class="card scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}'
        f'</tbody></table><p class="caption">{caption}</p></div></section>'
    )


def number(value: float, sign: str = "") -> str:
    """Three digits that count; a real minus."""
    return f"{value:{sign}.3g}".replace("-", "−")


def _sparkline(values: Sequence[float]) -> str:
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    points = " ".join(
        f"{2 + 106 * i / (len(finite) - 1):.1f},{21 - 18 * (value - low) / (high - low or 1):.1f}"
        for i, value in enumerate(finite)
    )
    return f'<svg class="spark" viewBox="0 0 110 24" aria-hidden="true"><polyline points="{points}"/></svg>'


def _section(section: Section) -> str:
    figures = "".join(
        f'<figure class="card{" wide" * (figure.name in WIDE)}"><h3>{html(figure.title)}</h3>{svg}'
        f'<figcaption class="caption">{html(figure.caption)}</figcaption></figure>'
        for figure, svg in section.figures
    )
    missing = _list(
        "missing", "Not in the logs", [f"{html(gap.title)}: {html(gap.remedy)}." for gap in section.missing]
    )
    return f'<section><h2>{html(section.title)}</h2><div class="figures">{figures}</div>{missing}</section>'


def _settings(settings: Mapping[str, Sequence[str]], names: Sequence[str]) -> str:
    if not settings:
        return ""
    head = "".join(f"<th>{html(name)}</th>" for name in ["", *names])
    rows = "".join(
        f"<tr><td>{html(key)}</td>{''.join(f'<td>{html(value)}</td>' for value in values)}</tr>"
        for key, values in settings.items()
    )
    return (
        f'<section><h2>Where the settings differ</h2><div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )
