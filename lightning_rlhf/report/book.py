"""Composition of a report and its files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_rlhf.report import learning, reward_model
from lightning_rlhf.report.draw import draw, require_matplotlib
from lightning_rlhf.report.figure import Figure, Missing
from lightning_rlhf.report.frontier import frontier
from lightning_rlhf.report.page import Section, page
from lightning_rlhf.report.runs import Run, read_runs
from lightning_rlhf.report.samples import columns_of, pairs
from lightning_rlhf.report.shares import shares

PAGE, NUMBERS = "report.html", "report.csv"
Draft = Callable[[Sequence[Run]], Figure | Missing]
RL: tuple[Draft, ...] = (
    learning.REWARD,
    shares,
    learning.KL,
    frontier,
    learning.LENGTH,
    learning.ENDED,
    learning.TURNS,
    learning.FAILED,
    learning.ENTROPY,
    learning.TOKEN_ENTROPY,
    learning.CLIPPED,
    learning.KL_OLD,
    learning.LEARNED_FROM,
    learning.DRAWN,
    learning.PRETRAINING,
    learning.GRADIENTS,
    learning.length_bias,
)
REWARD: tuple[Draft, ...] = (
    reward_model.ACCURACY,
    reward_model.LOSS,
    reward_model.reliability,
    reward_model.accuracy_by_margin,
    reward_model.accuracy_by_length,
    reward_model.LENGTH_CORRELATION,
)
FINE_TUNING: tuple[Draft, ...] = (learning.NEXT_TOKEN,)
STAGES = {"Fine-tuning": FINE_TUNING, "Reward model": REWARD, "RL": RL}
NO_SAMPLES = '<p class="missing">Needs samples.jsonl, the responses to held-out prompts at each evaluation.</p>'


def write_report(folders: Sequence[str | Path], *, output: Path) -> Path:
    """Write `report.html`, a PNG of each figure and `report.csv` with their numbers.

    Args:
        folders: of runs; several are overlaid.
        output: folder to write to, made if it is missing.

    Returns:
        path of the page.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a folder holds no run, or a log can't be read; names file and line.
    """
    require_matplotlib()
    runs = read_runs(folders)
    output.mkdir(parents=True, exist_ok=True)
    sections = []
    for stage, (title, drafts) in enumerate(STAGES.items()):
        of = [run for run in runs if run.stage == stage]
        if of:
            sections.append(_section(title, drafts, of))
    figures = [drawn for section in sections for drawn in section.figures]
    columns = columns_of([run for run in runs if run.is_rl])
    document = page(
        f"Report of {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        runs=runs,
        sections=sections,
        samples=pairs(columns) if columns else NO_SAMPLES,
    )
    for drawn in figures:
        with replacing(output / f"{drawn.figure.name}.png") as part:
            part.write_bytes(drawn.png)
    with replacing(output / NUMBERS) as part:
        _write_numbers(part, [drawn.figure for drawn in figures])
    with replacing(output / PAGE) as part:
        part.write_text(document, encoding="utf-8")
    return output / PAGE


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file that replaces `path` at the end, also if that is a link."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch(exist_ok=False)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _section(title: str, drafts: Sequence[Draft], runs: Sequence[Run]) -> Section:
    made = [draft(runs) for draft in drafts]
    return Section(
        title=title,
        figures=[draw(figure) for figure in made if isinstance(figure, Figure)],
        missing=[gap for gap in made if isinstance(gap, Missing) and gap.remedy],
    )


def _write_numbers(path: Path, figures: Sequence[Figure]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["figure", "series", "x", "y", "low", "high"])
        for figure in figures:
            for mark in figure.marks:
                writer.writerows(map(_cell, [figure.name, mark.label, *row]) for row in mark.rows())


def _cell(value: Any) -> Any:
    """Prefix an apostrophe to a text that a spreadsheet would take for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
