"""`chatray chat url=`."""

from __future__ import annotations

import io

import pytest

from orchestration import cli
from tests.serving_stand_ins import ScriptedEngine, served


def test_a_conversation_on_the_terminal(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(lambda prompt: f"answer {prompt.count('<|user|>')}")
    with served(engine) as (url, _):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
        assert cli.main(["chat", f"url={url}/v1"]) == 0
    shown = capsys.readouterr().out
    assert "Talking to tiny." in shown
    assert shown.count("answer 1") == 2 and shown.count("answer 2") == 1


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["chat", "url=http://127.0.0.1:9"]) == 2
    engine = ScriptedEngine(lambda prompt: "a long answer")
    engine.breaks_after = 2
    with served(engine) as (url, _):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
        assert cli.main(["chat", f"url={url}", "model=other"]) == 2
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
        assert cli.main(["chat", f"url={url}"]) == 1
    told = capsys.readouterr().err
    assert "no service answers" in told and "does not exist" in told and "stopped" in told
