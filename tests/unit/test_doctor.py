"""What is found on a machine, and what is advised where there is no room."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestration import config as configuration
from orchestration import preflight
from orchestration.runtime import machine


def test_the_header_of_libaio_is_looked_for_where_a_compiler_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "INCLUDES", (str(tmp_path / "none"),))
    monkeypatch.setenv("CPATH", str(tmp_path))
    assert machine.tools()["libaio.h"] == ""
    (tmp_path / "libaio.h").touch()
    assert machine.tools()["libaio.h"] == str(tmp_path / "libaio.h")


def test_the_lock_of_a_build_that_was_ended_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu/async_io/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert machine.unfinished_build() == ""  # somebody may be at it
    os.utime(lock, (0, 0))
    assert machine.unfinished_build() == str(lock)
    assert machine.built("async_io") == ""
    (done := lock.with_name("async_io.so")).touch()
    assert machine.built("async_io") == str(done)


@pytest.mark.parametrize(("placement", "advised"), [("split", True), ("colocated", False)])
def test_sharing_devices_is_advised_where_they_are_not_shared(placement: str, advised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "offered", lambda config: [("one", 96.0, 2.0)])
    words = [f"placement={placement}", "ppo.batch=256", "ppo.minibatches=1"]
    (found,) = preflight.room(configuration.load(words, consistent=False), ["ppo"])
    assert ("placement=colocated" in found.text) is advised
