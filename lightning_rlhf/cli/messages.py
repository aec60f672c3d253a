"""Console messages: the library's own, without harmless ones of other packages."""

from __future__ import annotations

import logging
import re
import warnings

from lightning.pytorch.utilities import rank_zero_only
from transformers.utils.logging import disable_progress_bar

WARNINGS = (
    r".*module\(s\) in eval mode at the start of training",  # dropout is off in all stages
    r".*Total length of `list` across ranks is zero",  # no validation data
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's use of torch
    r".*Precision .* is not supported by the model summary",
    r".*`weights_only` was not set",  # said of a checkpoint that Lightning writes
    r".*does not have many workers which may be a bottleneck",  # rows are tokenized once
    r".*LightningCLI's args parameter is intended to run from within Python",
)
"""Beginnings of harmless warnings, as regular expressions."""
RECORDS = {
    "lightning.pytorch.utilities.rank_zero": re.compile("💡|TPU available"),
    "lightning.pytorch.trainer.connectors.checkpoint_connector": re.compile("`weights_only` was not set"),
    "lightning.fabric.utilities.seed": re.compile("Seed set to"),
}
"""Beginnings of harmless log records by logger, as regular expressions."""


def speak() -> None:
    """Print the library's log from INFO on unless the caller has set up logging."""
    library = logging.getLogger("lightning_rlhf")
    if library.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    handler.addFilter(lambda record: record.levelno > logging.INFO or not getattr(rank_zero_only, "rank", 0))
    library.addHandler(handler)
    library.setLevel(logging.INFO)


def quiet() -> None:
    """Silence the harmless warnings and log records of other packages."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    disable_progress_bar()  # of reading and writing weights, which takes the library a moment
    for name, pattern in RECORDS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(pattern))


class _Without(logging.Filter):
    """Filter that drops the records that match a pattern."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())


class _Formatter(logging.Formatter):
    """Formatter that prefixes the level to warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"
