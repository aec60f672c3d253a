"""Command `lightning-rlhf report RUN_DIR… [--output DIR]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from lightning_rlhf.report.book import write_report


def main(args: Sequence[str]) -> None:
    """Write the report and print its path.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a folder holds no run, or a log can't be read; or several runs are given without an output.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-rlhf report",
        description="One HTML page, a PNG of each figure and a CSV of their numbers, from the logs of runs alone.",
        epilog="Logs of one CSVLogger (version_0, version_1, …) are one run where each goes on from a checkpoint; of "
        "runs that begin anew the newest is taken. Name the version folders to overlay them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="+", metavar="RUN_DIR", help="holds metrics.csv, rollouts.jsonl, samples.jsonl"
    )
    parser.add_argument("--output", metavar="DIR", help="where to write; RUN_DIR/report for one run folder")
    given = parser.parse_args(args)
    given.folders = [expanduser(folder) for folder in given.folders]
    if given.output is None and len(given.folders) > 1:
        parser.error("several runs make one report: say where it goes by --output DIR")
    if given.output is None and (Path(given.folders[0]) / "report").is_symlink():
        parser.error(f"{given.folders[0]}/report is a link: say where the report goes by --output DIR")
    output = Path(expanduser(given.output)) if given.output is not None else Path(given.folders[0]) / "report"
    print(write_report(given.folders, output=output))
