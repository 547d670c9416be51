from __future__ import annotations

import pytest

from orchestration import cli
from orchestration.errors import RunError


def test_a_failure_that_was_said_where_it_happened_is_not_said_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(words: object) -> None:
        error = RunError("waited 120 s (deadlines.start) for a training step of sft")
        error.say()
        raise error

    monkeypatch.setitem(cli.VERBS, "config", fails)
    assert cli.main(["config"]) == 1
    assert capsys.readouterr().err == "chatray: waited 120 s (deadlines.start) for a training step of sft\n"
