"""Report of a run from its logs: one page and its figures."""

from lightning_rlhf.report.book import write_report
from lightning_rlhf.report.draw import require_matplotlib
from lightning_rlhf.report.runs import Run, read_runs

__all__ = ["Run", "read_runs", "require_matplotlib", "write_report"]
