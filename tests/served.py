"""`chatray serve` in a process of its own, and clients that note how each of their requests ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from orchestration.serving.keys import make_key
from tests.conftest import COMMAND
from tests.intruder import Listening
from tests.serving_stand_ins import tiny_checkpoint, write_yaml

ASK: Any = [{"role": "user", "content": "where is the cat?"}]
SECONDS = 180


@dataclass
class Served:
    """A running service."""

    process: subprocess.Popen
    url: str
    key: str
    folder: Path

    def client(self, **further: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60, **further)

    def version(self) -> str:
        found = self.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=1)
        return str((found.model_extra or {})["chatray"]["model_version"])


def free_port() -> int:
    """Below the ports that the system gives to outgoing connections: one of those may be taken before the service listens on it."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


def wait_for(line: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + SECONDS
    while line not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


@contextlib.contextmanager
def serving(folder: Path, *words: str, run: Path | None = None) -> Iterator[Served]:
    """A tiny model or that of a run, a key and a hidden prompt, served on Ray until the context ends."""
    if run is None:
        tiny_checkpoint(folder / "tiny", seed=0)
    key = make_key(folder / "keys.yaml", "test")
    write_yaml(folder / "prompts.yaml", {"*": {"version": 1, "before": "Be brief and kind to every one of the cats of this house."}})
    port, log, listening = free_port(), folder / "log", Listening()
    given = [
        f"run={run}" if run else "checkpoint=tiny",
        f"serving.port={port}",
        "serving.keys=keys.yaml",
        "serving.prompts=prompts.yaml",
        *words,
    ]
    with log.open("w") as out:
        process = subprocess.Popen([str(COMMAND), "serve", *given], cwd=folder, stdout=out, stderr=out)
        try:
            wait_for(f"serving {run.name if run else 'tiny'} at", process, log)
            yield Served(process, f"http://127.0.0.1:{port}", key, folder)
            listening.sample()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=90)
    assert key not in log.read_text()
    assert process.returncode == 0, log.read_text()
    assert listening.open_to_others(port) == []


@dataclass
class Load:
    """Clients that ask again and again, and how each request ended: `complete`, an error's code, or `lost` without either."""

    served: Served
    ended: Counter[str] = field(default_factory=Counter)
    going: bool = True
    tokens: int = 60

    async def client(self, asked: httpx.AsyncClient) -> None:
        while self.going:
            ending = await self.one(asked)
            self.ended[ending] += 1
            if ending not in ("complete", "lost"):
                await asyncio.sleep(0.05)  # what a client does that was told to wait

    async def one(self, asked: httpx.AsyncClient) -> str:
        body = {"model": "tiny", "messages": ASK, "max_tokens": self.tokens, "stream": True}
        finish = ended = None
        try:
            async with asked.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    error = json.loads(await answer.aread())["error"]
                    return str(error["code"]) if answer.status_code in (429, 503) and "retry-after" in answer.headers else "lost"
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        if "error" in event:
                            return str(event["error"]["code"])
                        finish = next((choice["finish_reason"] for choice in event["choices"] if choice["finish_reason"]), finish)
        except (httpx.HTTPError, ValueError, KeyError):
            return "lost"
        return "complete" if ended and finish else "lost"

    async def until(self, reached: Any) -> None:
        """Wait until something holds of `ended`."""
        deadline = time.monotonic() + SECONDS
        while not reached(self.ended):
            assert time.monotonic() < deadline, self.ended
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def load(served: Served, clients: int = 4) -> Any:
    """So many clients at work for as long as the context lasts; when it ends, what is under way is finished first."""
    found = Load(served)
    headers = {"authorization": f"Bearer {served.key}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=90) as asked, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(found.client(asked))
        try:
            yield found
        finally:
            found.going = False


def replicas(served: Served, deployment: str) -> list[psutil.Process]:
    """A deployment's processes."""
    name = f"ServeReplica:chatray:{deployment}"
    found = []
    for process in psutil.Process(served.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and name in " ".join(process.cmdline()):
                found.append(process)
    return found
