"""Self-contained HTML page in which no text of a model can run as code."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from lightning_rlhf.report.draw import Drawing
from lightning_rlhf.report.figure import Missing
from lightning_rlhf.report.glossary import meaning
from lightning_rlhf.report.header import facts
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.settings import differing
from lightning_rlhf.report.summary import Change, changes, rows_of
from lightning_rlhf.report.verdict import number, verdict
from lightning_rlhf.text.escape import html


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Part of the page for one stage.

    Attributes:
        title: of the part.
        figures: drawn.
        missing: figures that the logs do not give.
    """

    title: str
    figures: Sequence[Drawing]
    missing: Sequence[Missing]


def page(title: str, *, runs: Sequence[Run], sections: Sequence[Section], samples: str) -> str:
    """Compose the HTML document.

    Args:
        title: of the page, plain text.
        runs: for the header and the tables.
        sections: of figures.
        samples: HTML of the responses side by side, or of the remedy if there are none.
    """
    style, script = (files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    cards = "".join(_card(run, named=len(runs) > 1) for run in runs)
    body = "\n".join(
        [
            f'<header><h1>{html(title)}</h1><div class="runs">{cards}</div></header>',
            _list("notes", "How the logs were read", [html(note) for run in runs for note in run.notes]),
            _summary(runs),
            *map(_section, sections),
            _settings(runs),
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
<div id="tip" hidden></div>
<script>{script}</script>
</body>
</html>
"""


def _policy(style: str, script: str) -> str:
    """Content security policy that allows only this style sheet and this script by hash."""

    def known(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = {"default-src": "'none'", "script-src": known(script), "style-src-elem": known(style)}
    allowed |= {"style-src-attr": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{what} {who}" for what, who in allowed.items())


def _list(kind: str, title: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    return f'<div class="{kind}"><p>{title}:</p><ul>{"".join(f"<li>{entry}</li>" for entry in entries)}</ul></div>'


def _card(run: Run, *, named: bool) -> str:
    """HTML of a run's verdict and facts."""
    judged = verdict(run)
    name = f"<h2>{html(run.name)}</h2>" * named
    said = f'<p class="verdict">{html(judged.said)}</p>' * bool(judged.said)
    doubts = "".join(f'<p class="doubt">{html(doubt)}</p>' for doubt in judged.doubts)
    known = "".join(f"<div><dt>{html(key)}</dt><dd>{html(text)}</dd></div>" for key, text in facts(run).items())
    return f'<article class="card" style="--run: {run.color}">{name}{said}{doubts}<dl>{known}</dl></article>'


def _summary(runs: Sequence[Run]) -> str:
    per_run = [changes(run) for run in runs]
    rows = [
        (
            f'<td title="{html(_keys(what, per_run))}: {html(meaning(names[0]))}">{html(what)}</td>',
            [_move(of_run.get(what)) for of_run in per_run],
        )
        for what, names, _ in {row[0]: row for run in runs for row in rows_of(run)}.values()
        if any(what in of_run for of_run in per_run)
    ]
    if not rows:
        return ""
    caption = (
        "Start → end, and the change. Held out: first and last evaluation. Training: means over the first and the last "
        "tenth. Rest on a name for its key and meaning."
    )
    return (
        f'<section><h2>Start and end</h2><div class="card">{_table(runs, rows)}<p class="caption">{caption}</p></div>'
        "</section>"
    )


def _keys(what: str, found: Sequence[Mapping[str, Change]]) -> str:
    return ", ".join(dict.fromkeys(of_run[what].key for of_run in found if what in of_run))


def _table(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """HTML table with a column for each run."""
    head = "".join(f'<th style="--run: {run.color}">{html(run.name)}</th>' for run in runs)
    body = "".join(
        f"<tr>{first}"
        + "".join(f'<td style="--run: {run.color}">{cell}</td>' for run, cell in zip(runs, cells, strict=True))
        + "</tr>"
        for first, cells in rows
    )
    return (
        f'<div class="scroll"><table style="--runs: {len(runs)}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _move(change: Change | None) -> str:
    if change is None:
        return ""
    if change.moved is None:
        return f'<span class="move"><b>{number(change.last)}</b></span>'
    return (
        f'<span class="move"><span>{number(change.first)} → <b>{number(change.last)}</b></span>'
        f'<span class="faint">{number(change.moved, "+")}</span>{_sparkline(change.series.y)}</span>'
    )


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
    figures = "".join(map(_figure, section.figures))
    missing = _list(
        "missing", "Not in the logs", [f"{html(gap.title)}: {html(gap.remedy)}." for gap in section.missing]
    )
    return f'<section><h2>{html(section.title)}</h2><div class="figures">{figures}</div>{missing}</section>'


def _figure(drawn: Drawing) -> str:
    """HTML of a figure with its numbers for the tooltips of the page's script."""
    dots = html(json.dumps(drawn.dots))
    return (
        f'<figure class="card" data-dots="{dots}"><h3>{html(drawn.figure.title)}</h3>{drawn.svg}'
        f'<figcaption class="caption">{html(drawn.figure.caption)}</figcaption></figure>'
    )


def _settings(runs: Sequence[Run]) -> str:
    known = [run for run in runs if run.settings]
    settings = differing({run.name: run.settings for run in known})
    if not settings:
        return ""
    rows = [
        (f"<td>{html(key).replace('.', '.<wbr>')}</td>", [html(value) for value in values])
        for key, values in settings.items()
    ]
    return f'<section><h2>Where the settings differ</h2><div class="card">{_table(known, rows)}</div></section>'
