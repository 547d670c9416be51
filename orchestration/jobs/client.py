"""Ray's job API over HTTP. The only file that imports `ray.job_submission`.

A token is Ray's own affair: `RAY_AUTH_MODE=token` with `RAY_AUTH_TOKEN` or `RAY_AUTH_TOKEN_PATH`. It goes into a header and is shown
nowhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestration.errors import RequestError, RunError

CONNECT_SECONDS = 5.0
"""How long the address may take to accept a connection; Ray's own client would wait for minutes."""
OVERRULING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables by which Ray's client would overrule the address that it is given."""
CHATTING = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers that would say what is uploaded and how a connection was closed."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """One job, as the cluster knows it."""

    identifier: str
    status: str
    """PENDING, RUNNING, or one of `ENDED`."""
    message: str
    metadata: dict[str, str]
    started: float
    """Seconds since 1970."""
    exit_code: int | None

    def ended(self) -> bool:
        return self.status in ENDED


class Jobs:
    """The jobs of the cluster at an address."""

    def __init__(self, address: str) -> None:
        """Raises:
        RequestError: nothing answers there, it is no Ray cluster, its Ray is another one, or it refuses the token.
        """
        self.address = address
        _reach(address)
        from ray.job_submission import JobSubmissionClient

        for name in CHATTING:
            logging.getLogger(name).setLevel(logging.WARNING)
        kept = {name: os.environ.pop(name) for name in OVERRULING if name in os.environ}
        try:
            with _refusals(address):
                self._client = JobSubmissionClient(address)
        finally:
            os.environ.update(kept)
        _same_ray(address, self._client._server_ray_version or "unknown")

    def submit(self, identifier: str, entrypoint: str, code: Path, environment: dict[str, str], metadata: dict[str, str]) -> None:
        """Start a job.

        Args:
            code: a zip file; the job finds its content first on its path, on every node.

        Raises:
            RequestError: there is a job of that name already.
        """
        wanted = {"working_dir": str(code), "env_vars": environment}
        with _answers(self.address):
            try:
                self._client.submit_job(
                    entrypoint=entrypoint, submission_id=identifier, runtime_env=wanted, metadata=metadata, entrypoint_num_gpus=0
                )
            except RuntimeError as cause:
                if "already exists" in str(cause):
                    raise RequestError(f"job {identifier} was submitted by somebody else at this moment; see chatray jobs list") from cause
                raise

    def get(self, identifier: str) -> Job:
        """Raises:
        RequestError: there is no such job.
        """
        with _answers(self.address):
            try:
                return _job(identifier, self._client.get_job_info(identifier))
            except RuntimeError as cause:
                if "does not exist" in str(cause):
                    raise RequestError(f"job {identifier}: not known at {self.address}; chatray jobs list shows those that are") from cause
                raise

    def all(self) -> list[Job]:
        """Every job, oldest first."""
        with _answers(self.address):
            found = [_job(one.submission_id, one) for one in self._client.list_jobs() if one.submission_id]
        return sorted(found, key=lambda job: job.started)

    def stop(self, identifier: str) -> None:
        """Send it the wish to stop (SIGTERM)."""
        with _answers(self.address):
            self._client.stop_job(identifier)

    def delete(self, identifier: str) -> None:
        """Forget a job that has ended."""
        with _answers(self.address):
            self._client.delete_job(identifier)

    def log(self, identifier: str) -> str:
        """All that it has printed."""
        with _answers(self.address):
            return self._client.get_job_logs(identifier)

    def tail(self, identifier: str, write: Callable[[str], None]) -> None:
        """Pass on what it has printed and prints, until it ends or the connection does."""

        async def passed_on() -> None:
            async for text in self._client.tail_job_logs(identifier):
                write(text)

        with _answers(self.address):
            asyncio.run(passed_on())


def _job(identifier: str, info: Any) -> Job:
    status = getattr(info.status, "value", info.status)
    return Job(identifier, str(status), info.message or "", dict(info.metadata or {}), (info.start_time or 0) / 1000, info.driver_exit_code)


def _reach(address: str) -> None:
    parts = urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as cause:
        raise RequestError(
            f"--address {address}: nothing answers there ({cause}); give the address of the cluster's dashboard, http://<head>:8265, and "
            "see that it can be reached from here"
        ) from cause


def _same_ray(address: str, theirs: str) -> None:
    """Raises:
    RequestError: the cluster runs another minor version of Ray than chatray is made for.
    """
    import ray

    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise RequestError(
            f"--address {address}: the cluster runs Ray {theirs}, and chatray here Ray {ray.__version__}; install the same minor version "
            "on both"
        )


@contextmanager
def _refusals(address: str) -> Iterator[None]:
    """What is wrong with an address or a token, as a RequestError."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as cause:
        given = "none was sent" if os.environ.get("RAY_AUTH_MODE") != "token" else "the one that was sent is not the cluster's, or is empty"
        raise RequestError(
            f"--address {address}: the cluster wants a token, and {given}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<file with the "
            "cluster's token> (or RAY_AUTH_TOKEN)"
        ) from cause
    except (ConnectionError, RuntimeError, ValueError, KeyError, requests.exceptions.RequestException) as cause:
        raise RequestError(
            f"--address {address}: no Ray cluster answers there ({_short(cause)}); give the address of the cluster's dashboard"
        ) from cause


@contextmanager
def _answers(address: str) -> Iterator[None]:
    """A connection that breaks off later, as a RunError."""
    import aiohttp
    import requests

    try:
        yield
    except (ConnectionError, RuntimeError, TimeoutError, requests.exceptions.RequestException, aiohttp.ClientError) as cause:
        raise RunError(f"the cluster at {address} did not answer as it should ({_short(cause)}); its jobs go on") from cause


def _short(cause: BaseException) -> str:
    return " ".join(str(cause).split())[:200] or type(cause).__name__
