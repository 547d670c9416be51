"""What keeps a cluster of this machine to this machine and this user, and where ranks meet."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from ray._private import ray_constants, services
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

from actors.rendezvous import open_store
from orchestration.runtime import loopback

THEIRS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of another cluster", "GLOO_SOCKET_IFNAME": "eth0"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in loopback.NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in THEIRS.items():
        monkeypatch.setenv(name, value)
    return _set()


def _set() -> dict[str, str]:
    return {name: os.environ[name] for name in loopback.NAMES if name in os.environ}


def test_ray_takes_loopback_for_its_address_and_a_token_of_this_clusters_own(environment: dict[str, str], tmp_path: Path) -> None:
    loopback.close_to_others(tmp_path)
    try:
        assert services.get_node_ip_address() == "127.0.0.1"
        assert get_authentication_mode() == AuthenticationMode.TOKEN
        token = tmp_path / "token"
        assert token.stat().st_mode & 0o777 == 0o600
        told = AuthenticationTokenLoader.instance().get_token_for_http_header()
        assert list(told.values()) == [f"Bearer {token.read_text()}"]
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    finally:
        loopback.open_again()


def test_a_later_connection_finds_what_was_set_for_it(environment: dict[str, str], tmp_path: Path) -> None:
    for _ in range(2):  # a cluster that is started again
        loopback.close_to_others(tmp_path)
    loopback.open_again()
    loopback.open_again()
    assert _set() == environment == THEIRS
    assert ray_constants.ENABLE_RAY_CLUSTER == loopback.AS_READ
    assert list(AuthenticationTokenLoader.instance().get_token_for_http_header().values()) == ["Bearer of another cluster"]


def test_each_cluster_has_another_token(environment: dict[str, str], tmp_path: Path) -> None:
    tokens = set()
    for _ in range(3):
        loopback.close_to_others(tmp_path)
        tokens.add((tmp_path / "token").read_text())
    loopback.open_again()
    assert len(tokens) == 3 and all(len(token) == 64 for token in tokens)


def listening_on(port: int) -> set[str]:
    return {
        found.laddr.ip for found in psutil.Process().net_connections() if found.status == psutil.CONN_LISTEN and found.laddr.port == port
    }


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_ranks_meet_at_one_address(host: str) -> None:
    store = open_store(host, 2)
    assert listening_on(store.port) <= {"127.0.0.1", "::1"} and len(listening_on(store.port)) == 1
    other = dist.TCPStore(host, store.port, 2, is_master=False)
    other.set("said", "by the other")
    assert store.get("said") == b"by the other"


def test_an_address_of_another_machine_is_refused_and_no_socket_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="assign requested address"):
        open_store("203.0.113.7", 1)  # reserved for documents
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_store_that_ends_gives_its_port_back() -> None:
    store = open_store("127.0.0.1", 1)
    port = store.port
    assert listening_on(port) == {"127.0.0.1"}
    del store
    assert listening_on(port) == set()
