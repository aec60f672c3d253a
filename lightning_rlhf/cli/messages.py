"""Which messages reach the console: the library's own, and not the harmless ones that its use of others causes."""

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
"""Beginnings of warnings that have no meaning for a user here, as regular expressions."""
RECORDS = {
    "lightning.pytorch.utilities.rank_zero": re.compile("💡|TPU available"),
    "lightning.pytorch.trainer.connectors.checkpoint_connector": re.compile("`weights_only` was not set"),
    "lightning.fabric.utilities.seed": re.compile("Seed set to"),
}
"""Log records that have none, by logger."""


def speak() -> None:
    """Print what the library logs, from INFO on, unless the caller has set up logging."""
    library = logging.getLogger("lightning_rlhf")
    if library.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    handler.addFilter(lambda record: record.levelno > logging.INFO or not getattr(rank_zero_only, "rank", 0))
    library.addHandler(handler)
    library.setLevel(logging.INFO)


def quiet() -> None:
    """Leave out warnings and log records of other packages that are harmless here."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    disable_progress_bar()  # of reading and writing weights, which takes the library a moment
    for name, pattern in RECORDS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(pattern))


class _Without(logging.Filter):
    """Leave out records that match a pattern."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())


class _Formatter(logging.Formatter):
    """The message, after its level where that is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"
