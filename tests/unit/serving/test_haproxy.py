"""What `serving.haproxy` sets before Serve is imported."""

from __future__ import annotations

import importlib.util
import os

import pytest

from orchestration.errors import RunError
from orchestration.serving.start import FAST, PORTS, hasten


def test_serve_is_told_of_haproxy_and_of_ports_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "environ", {PORTS[0]: "9101"})
    hasten(needed=False)
    assert {name: os.environ[name] for name in FAST} == FAST
    assert os.environ[PORTS[0]] == "9101"
    assert len({os.environ[name] for name in PORTS}) == len(PORTS)


def test_without_the_package_it_is_refused_by_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(RunError, match="serving.haproxy=true"):
        hasten(needed=True)
    assert os.environ == {}


def test_without_the_package_and_the_wish_serves_own_proxy_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(os, "environ", {})
    hasten(needed=False)
    assert os.environ == {}
