"""What doctor and preflight say of a cluster that others reach."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest

from conf.schema import Config
from orchestration import doctor, preflight
from orchestration.config import load
from orchestration.runtime.exposure import Exposure, exposure
from orchestration.runtime.facts import Survey
from orchestration.runtime.machine import Machine, inspect

GCS = ("gcs_server 10.0.0.1:6379", "raylet port 40000 on all addresses")
LISTENS = """
import socket, sys
found = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
found.bind((sys.argv[1], 0)); found.listen()
print(found.getsockname()[1], flush=True); sys.stdin.read()
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return inspect(str(tmp_path_factory.mktemp("run")))


def said(here: Machine, found: Exposure, *words: str) -> tuple[list[str], list[doctor.Line]]:
    """What preflight says of it, and doctor's lines."""
    config: Config = load(["experiment=smoke", *words])
    seen = Survey((dataclasses.replace(here, exposure=found),), (), "token", here.clock, 1.0)
    findings = [finding for finding in preflight.machines(config, seen) if "token" in finding.text]
    assert not any(finding.grave for finding in findings), "many clusters are behind a firewall"
    return [finding.text for finding in findings], [line for line in doctor.lines(config, seen) if line.what == "open to others"]


def test_a_cluster_without_a_token_is_said_with_its_ports_and_a_remedy(here: Machine) -> None:
    (text,), (line,) = said(here, Exposure(GCS, token=False, tls=False), "ray.address=auto")
    for told in (text, line.found + line.remedy):
        assert "gcs_server 10.0.0.1:6379" in told and "run" in told and "RAY_AUTH_MODE=token" in told and "RAY_USE_TLS" in told
    assert text.startswith("ray.address=auto: the Ray of 1 of 1 nodes")
    assert line.verdict == "note"


@pytest.mark.parametrize(("token", "tls", "whom"), [(True, False, "holders of the token, which goes over the network unencrypted"),
                                                    (True, True, "certificate"), (False, True, "certificate")])  # fmt: skip
def test_who_may_use_it_is_said_where_not_everybody_may(token: bool, tls: bool, whom: str, here: Machine) -> None:
    texts, (line,) = said(here, Exposure(GCS, token, tls), "ray.address=auto")
    assert texts == []
    assert (line.verdict, whom in line.found) == ("ok", True)


def test_a_cluster_on_loopback_without_a_token_is_open_to_users_of_the_machine(here: Machine) -> None:
    texts, (line,) = said(here, Exposure((), token=False, tls=False), "ray.address=auto")
    assert texts == []
    assert line.verdict == "note" and "users of this machine" in line.found and "run code" in line.found


def test_of_a_runs_own_cluster_nothing_is_open(here: Machine) -> None:
    texts, (line,) = said(here, Exposure((), token=False, tls=False))
    assert texts == [] and line.verdict == "ok" and "loopback" in line.found
    assert said(here, Exposure((), token=False, tls=False), "runtime=local") == ([], [])


@pytest.fixture
def listening(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """A process that is called as one of Ray's, and listens at an address."""
    program = [sys.executable, "-c", LISTENS, request.param, "/ray/core/src/ray/gcs/gcs_server"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield request.param, int(process.stdout.readline())
        process.kill()


@pytest.mark.parametrize(
    ("listening", "written"),
    [("0.0.0.0", "gcs_server port {} on all addresses"), ("::", "gcs_server port {} on all addresses"), ("127.0.0.1", None), ("::1", None),
     ("::ffff:127.0.0.1", None)],
    indirect=["listening"],
)  # fmt: skip
def test_what_listens_for_others_is_found(listening: tuple[str, int], written: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_USE_TLS", "1")
    _, port = listening
    found = exposure()
    assert [name for name in found.ports if str(port) in name] == ([written.format(port)] if written else [])
    assert found.token and found.tls
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_USE_TLS", "0")
    assert not exposure().token and not exposure().tls
