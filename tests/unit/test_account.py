from __future__ import annotations

import pytest

from orchestration.data.account import LISTED, Account
from orchestration.data.rows import BadRow
from orchestration.errors import RequestError


def test_a_refused_row_names_file_line_reason_and_setting() -> None:
    with pytest.raises(RequestError, match=r"data: a\.jsonl, line 3: 'text' is empty; .*data\.on_bad_row=skip"):
        Account("a", "refuse").skip(BadRow("a.jsonl", 3, "'text' is empty"))


def test_skipped_rows_are_all_counted_by_reason_and_the_first_are_listed() -> None:
    account = Account("a", "skip")
    for number in range(LISTED + 50):
        account.skip(BadRow("f", number, f"turn {number} is empty" if number % 2 else f"unknown role {chr(200 + number)}"))
    assert (account.read, account.skipped, len(account.listed)) == (LISTED + 50, LISTED + 50, LISTED)
    assert account.reasons["turn N is empty"] == (LISTED + 50) // 2
    assert sum(account.reasons.values()) == account.skipped
    assert len(account.reasons) <= LISTED + 1


def test_a_lost_row_is_noticed() -> None:
    account = Account("a", "skip", read=3, used=1, held_out=1)
    with pytest.raises(AssertionError, match="3 rows read, 2 accounted for"):
        account.balance()
    account.duplicates = 1
    account.balance()
    assert str(account) == "a: 3 rows read = 1 used + 1 held out + 0 skipped + 1 duplicates left out"
