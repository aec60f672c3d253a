"""A report of runs: which figures it has, and the files it is written to."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_rlhf.report import learning, reward_model, supervised
from lightning_rlhf.report.draw import draw, require_matplotlib
from lightning_rlhf.report.figure import Figure, Missing
from lightning_rlhf.report.frontier_figure import frontier
from lightning_rlhf.report.page import Section, page
from lightning_rlhf.report.replacing import replacing
from lightning_rlhf.report.runs import Run, read_runs
from lightning_rlhf.report.samples import columns_of, section
from lightning_rlhf.report.settings import differing
from lightning_rlhf.report.summary import changes

PAGE, NUMBERS = "report.html", "report.csv"
Draft = Callable[[Sequence[Run]], Figure | Missing]
RL: tuple[Draft, ...] = (
    learning.REWARD,
    learning.KL,
    frontier,
    learning.LENGTH,
    learning.ENDED,
    learning.ENTROPY,
    learning.TOKEN_ENTROPY,
    learning.CLIPPED,
    learning.KL_OLD,
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
SUPERVISED: tuple[Draft, ...] = (supervised.LOSS,)
NO_SAMPLES = '<p class="missing">Needs samples.jsonl, the responses to held-out prompts at each evaluation.</p>'


def write_report(folders: Sequence[str | Path], *, output: Path) -> Path:
    """Write `report.html`, a PNG of each figure, and `report.csv` with the numbers behind them.

    Args:
        folders: of runs; several are overlaid.
        output: folder to write to, made where it is missing.

    Returns:
        path of the page.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a folder holds no run, or a log can't be read; names file and line.
    """
    require_matplotlib()
    runs = read_runs(folders)
    kinds = {
        "RL": (RL, [run for run in runs if run.is_rl]),
        "Reward model": (REWARD, [run for run in runs if run.is_reward_model]),
        "Fine-tuning": (SUPERVISED, [run for run in runs if not run.is_rl and not run.is_reward_model]),
    }
    output.mkdir(parents=True, exist_ok=True)
    sections = [_section(title, drafts, of, output) for title, (drafts, of) in kinds.items() if of]
    columns = columns_of(kinds["RL"][1])
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    document = page(
        f"Report of {title}",
        names=[run.name for run in runs],
        changes=changes(runs),
        settings=differing({run.name: run.settings for run in runs if run.settings}),
        sections=sections,
        samples=section(columns) if columns else NO_SAMPLES,
        notes=[note for run in runs for note in run.notes],
    )
    with replacing(output / PAGE) as part:
        part.write_text(document, encoding="utf-8")
    with replacing(output / NUMBERS) as part:
        _write_numbers(part, [figure for section in sections for figure, _ in section.figures])
    return output / PAGE


def _section(title: str, drafts: Sequence[Draft], runs: Sequence[Run], output: Path) -> Section:
    made = [draft(runs) for draft in drafts]
    figures = [figure for figure in made if isinstance(figure, Figure)]
    missing = [gap for gap in made if isinstance(gap, Missing)]
    drawn = [(figure, draw(figure, png=output / f"{figure.name}.png")) for figure in figures]
    return Section(title=title, figures=drawn, missing=missing)


def _write_numbers(path: Path, figures: Sequence[Figure]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["figure", "series", "x", "y", "low", "high"])
        for figure in figures:
            for mark in figure.marks:
                writer.writerows(map(_cell, [figure.name, mark.label, *row]) for row in mark.rows())


def _cell(value: Any) -> Any:
    """A text that a spreadsheet takes for a formula stands behind an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
