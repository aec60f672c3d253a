"""Counts of the rows read and dropped."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_only

from lightning_rlhf.text import LONG_TEXT, Encoder, Prompt

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DropReport:
    """Statistics of the rows of one set of files.

    Attributes:
        name: the argument that named the files.
        limit_name: the argument that limits lengths.
        limit: the longest that is kept, tokens.
        rows: rows read.
        long_rows: rows dropped because too long, or because fewer than 2 of their responses were not.
        tied_rows: rows dropped because their responses are all tied.
        responses: responses read.
        long_responses: responses dropped because too long, those of dropped rows included.
        longest: length of the longest, tokens.
        uncounted: texts among the too long ones whose tokens were not counted.
        mended: responses that began with the tag their prompt ends in, which now stands once.
    """

    name: str
    limit_name: str
    limit: int
    rows: int = 0
    long_rows: int = 0
    tied_rows: int = 0
    responses: int = 0
    long_responses: int = 0
    longest: int = 0
    uncounted: int = 0
    mended: int = 0

    @property
    def dropped(self) -> int:
        """Number of rows dropped for any reason."""
        return self.long_rows + self.tied_rows

    def fits(self, length: int) -> bool:
        """Return True if `length` tokens are within the limit; records the longest."""
        self.longest = max(self.longest, length)
        return length <= self.limit

    def exceeded(self, encoder: Encoder, *parts: Prompt) -> bool:
        """Return True if the parts are together too long by their characters; counts them if so."""
        exceeded = encoder.exceeds(self.limit, *parts)
        self.uncounted += exceeded
        return exceeded

    def report(self) -> None:
        """Warn of dropped or mended rows on rank 0.

        Raises:
            ValueError: every row was dropped.
        """
        parts = []
        if self.long_rows or self.long_responses:
            others = f"; {self.uncounted} others had more than {LONG_TEXT} characters, whose tokens were not counted"
            longest = f"{self.longest}{others if self.uncounted else ''}"
            responses = f" and {self.long_responses} of {self.responses} responses" if self.responses else ""
            parts.append(
                f"dropped {self.long_rows} of {self.rows} rows{responses} longer than {self.limit_name}={self.limit} "
                f"tokens; the longest was {longest}: raise `{self.limit_name}` to keep them"
            )
        if self.tied_rows:
            parts.append(
                f"dropped {self.tied_rows} of {self.rows} rows whose responses are all tied: they rank nothing"
            )
        if self.mended:
            parts.append(
                f"left out of {self.mended} responses the opening tag, such as <think>, that they begin with and the "
                "chat template's prompt already ends in"
            )
        if not parts:
            return
        message = f"`{self.name}`: {'; '.join(parts)}"
        if self.dropped == self.rows:
            raise ValueError(f"no row is left. {message}")
        rank_zero_only(_log.warning)(message)
