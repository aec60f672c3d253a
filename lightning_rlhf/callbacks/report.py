"""Report of a run, written when it ends."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_rlhf.callbacks.writable import check_writable, place_of
from lightning_rlhf.report import require_matplotlib, write_report

logger = logging.getLogger(__name__)


class Report(Callback):
    """Writes `report.html`, its figures as PNG and their numbers as CSV when `fit` ends.

    It does the same as `lightning-rlhf report FOLDER`, from the files of the run and nothing else, so that the command
    makes the same page later. A log that cannot be read, or a full disk, costs the report and not the run: the reason
    is a warning.

    Args:
        folder: of the run, with the logs of CSVLogger, `RolloutLog` and `SampleLog` anywhere below it; None is the
            trainer's `default_root_dir`.
        output: where to write; None is `report` in the folder.
    """

    def __init__(self, folder: str | None = None, output: str | None = None) -> None:
        self.folder = folder
        self.output = output
        self.run: Path | None = None
        self.place: Path = None  # type: ignore[assignment]  # until `setup`

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Check before training that the report can be written.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: the report cannot be written there.
        """
        require_matplotlib()
        self.run = place_of(trainer, self.folder)
        self.place = self.run / "report" if self.output is None else place_of(trainer, self.output)
        if stage == "fit" and not trainer.fast_dev_run:
            check_writable(trainer, self.place, argument="output")

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Write the report on the first process."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        for log in trainer.loggers:
            log.save()  # Lightning itself writes the last lines only after this hook
        try:
            page = write_report([str(self.run)], output=self.place)
        except (OSError, ValueError) as error:
            logger.warning("no report of %s was written: %s", self.run, error)
            return
        logger.info("the report of this run is %s", page)
