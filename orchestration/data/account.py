"""Where the rows of a source went: rows read = used + held out + skipped + dropped as duplicates."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from orchestration.data.rows import BadRow
from orchestration.errors import RequestError

LISTED = 100
"""Skipped rows that are listed one by one; all are counted, by reason."""


@dataclass
class Account:
    """Counts of one source's rows."""

    source: str
    on_bad_row: str
    """`refuse` or `skip`."""
    read: int = 0
    used: int = 0
    held_out: int = 0
    skipped: int = 0
    duplicates: int = 0
    """Left out because a held-out row says the same."""
    listed: list[BadRow] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def skip(self, row: BadRow) -> None:
        """Count a bad row, which counts as read too.

        Raises:
            RequestError: bad rows are refused; names file, line, reason and the setting.
        """
        if self.on_bad_row == "refuse":
            raise RequestError(f"data: {row}; correct the row, or leave such rows out with data.on_bad_row=skip")
        self.read += 1
        self.skipped += 1
        kind = re.sub(r"\d+", "N", row.reason)[:80]
        self.reasons[kind if kind in self.reasons or len(self.reasons) < LISTED else "other reasons"] += 1
        if len(self.listed) < LISTED:
            self.listed.append(row)

    def balance(self) -> None:
        """Every row read has gone somewhere."""
        gone = self.used + self.held_out + self.skipped + self.duplicates
        assert self.read == gone, f"{self.source}: {self.read} rows read, {gone} accounted for"

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.read} rows read = {self.used} used + {self.held_out} held out + {self.skipped} skipped "
            f"+ {self.duplicates} duplicates left out"
        )

    def as_dict(self) -> dict[str, Any]:
        """For summary.json."""
        counts = {name: getattr(self, name) for name in ("read", "used", "held_out", "skipped", "duplicates")}
        return {"source": self.source} | counts | {"reasons": dict(self.reasons), "skipped_rows": [str(row) for row in self.listed]}
