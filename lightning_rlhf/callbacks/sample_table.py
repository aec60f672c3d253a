"""Table of samples for the loggers that support tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from lightning_rlhf.text.escape import markdown

COLUMNS = ("prompt", "before training", "now", "score before", "score now", "KL now")
NAME = "samples"


def show(
    loggers: Iterable[Logger], before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], *, step: int
) -> None:
    """Log prompts with their first and present response to TensorBoard's text page and a W&B table.

    Args:
        loggers: of the trainer; others have no tables.
        before: samples of iteration 0, or none.
        now: samples of the same prompts.
        step: the loggers' x-axis.
    """
    rows = [_row(first, sample) for first, sample in zip([*before, *[{}] * len(now)], now, strict=False)]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(NAME, markdown_table(COLUMNS, rows), step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(NAME, columns=list(COLUMNS), data=rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a Markdown table whose cells are escaped, because a model wrote them."""
    head = [list(columns), ["---"] * len(columns)]
    cells = [[markdown(cell) if isinstance(cell, str) else f"{cell:.3f}" for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in head + cells)


def _row(before: dict[str, Any], now: dict[str, Any]) -> list[Any]:
    said = [_text(now["prompt"]), _text(before.get("response")), _text(now["response"])]
    return said + [float("nan") if x is None else x for x in (before.get("score"), now["score"], now["kl"])]


def _text(said: Any) -> str:
    """Format a text, or a dialogue with its roles."""
    if isinstance(said, list):
        return "\n".join(f"{message['role']}: {message['content']}" for message in said)
    return "" if said is None else str(said)
