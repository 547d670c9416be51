"""SIGTERM to a run: at once outside of what commits, after the commit within it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from orchestration import stopping


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stopping, "_request", stopping._Request())
    stopping.listen()
    yield
    signal.signal(signal.SIGTERM, handler)


def test_what_cannot_commit_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.asked()


def test_what_commits_is_told_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with stopping.commits_first():
        assert not stopping.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked()
    assert "finished and committed first" in capsys.readouterr().err
    with pytest.raises(stopping.Stopped, match="all stages so far complete"):
        stopping.between_stages()


def test_a_second_wish_does_not_wait() -> None:
    with stopping.commits_first():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_it_listens_again_only_if_it_did_before(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray replaces it
    stopping.listen_still()
    assert signal.getsignal(signal.SIGTERM) == stopping._on_signal
    monkeypatch.setattr(stopping, "_request", stopping._Request())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stopping.listen_still()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_was_kept_is_said() -> None:
    assert "step 3 is committed" in str(stopping.stopped("ppo", 3))
    assert "no step of it was done yet" in str(stopping.stopped("ppo", 0))
