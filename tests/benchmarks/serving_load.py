"""The chat service under 1, 8, 32 and 128 streams at once, beside vLLM's own OpenAI server and `ray.serve.llm`: time to first text, time
per token, throughput.

    python -m tests.benchmarks.serving_load --checkpoint runs/bench/natural/lm

Each arm is a server that stays up; those that are not asked are stopped meanwhile (SIGSTOP): an idle Ray takes CPU too. A round
asks every arm once with each number of streams, every other round the other way round: greedy chat completions, the same prompts, so the
same replies of up to `--tokens` tokens. vLLM sends what it has after every token (its default); ours and `ray.serve.llm` at most every
20 ms, and ours in one arm after every token too; with HAProxy. The client is one process beside them, so its own work counts for each
alike. Two arms at a time (`--arms`) are compared best: Serve may take a replica for dead that stood still for half a minute. Then the
service is asked for far more than it takes, again and again, and its memory is read. `--beside FOLDER` adds each of our arms as the code of
another checkout serves it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from tests.benchmarks import report, vllm_words
from tests.benchmarks.paired import median, ratio
from tests.served import free_port

STREAMS = (1, 8, 32, 128)
ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("I would like a small latte with oat milk, please.", "Can you add a muffin to that?", "What sizes of tea do you have?",
             "A large cappuccino, extra hot.", "Do you have anything without caffeine?", "How much is an espresso?")  # fmt: skip
START_SECONDS = 300.0
PUBLISHED_SECONDS = 15.0
"""After so long Ray has published what happened before."""
SETTLE_SECONDS = 3.0
TOO_MANY = 600
MODEL = "bench"
COMMON = ("serving.haproxy=true", "serving.model=bench", "serving.page=false", "serving.engine.sequences=256")
VLLM = ("serving=vllm", *COMMON)
THEIRS, RAYS = "vllm's own server", "ray.serve.llm"
ARMS: dict[str, tuple[str, ...] | None] = {
    THEIRS: None,
    RAYS: None,
    "chatray, vLLM, no moderation": (*VLLM, "serving.moderation.kind=off"),
    "chatray, vLLM, moderated": VLLM,
    "chatray, vLLM, no moderation, every token": (*VLLM, "serving.moderation.kind=off", "serving.engine.interval_ms=0"),
    "chatray, embedded engine, moderated": COMMON,
}
SERVER_PACKAGES = ROOT / "runs" / "vllm-server"
"""What vLLM's server imports beside vLLM's engine, for its process alone (`make bench-serving` puts it there)."""


@dataclass
class Stream:
    """One reply as its client saw it."""

    status: int = 0
    began: float = 0.0
    first: float = 0.0
    """When the first text came."""
    last: float = 0.0
    tokens: int = 0
    pieces: int = 0
    longest: float = 0.0
    """Seconds between two pieces, at most."""
    error: str = ""


@dataclass
class Server:
    """A running arm."""

    name: str
    process: subprocess.Popen[bytes]
    url: str
    figures: dict[int, list[dict[str, float]]] = field(default_factory=dict)


def is_ours(name: str) -> bool:
    return ARMS[name.partition(" @ ")[0]] is not None


def other_code(name: str) -> str | None:
    """The checkout whose code this arm is of; None for this one's."""
    return name.partition(" @ ")[2] or None


def command(name: str, checkpoint: str, port: int) -> list[str]:
    if name == RAYS:
        return [sys.executable, "-m", "tests.benchmarks.serve_llm", checkpoint, str(port), MODEL]
    if name == THEIRS:
        own = ["--stream-interval", "1", "--disable-log-stats", "--disable-uvicorn-access-log", *vllm_words.words(vllm_words.ENGINE)]
        where = ["--model", checkpoint, "--served-model-name", MODEL, "--port", str(port), "--host", "127.0.0.1"]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *where, *own]
    words = [f"checkpoint={checkpoint}", f"serving.port={port}", *(ARMS[name.partition(" @ ")[0]] or ())]
    return [str(Path(sys.executable).with_name("chatray")), "serve", *words]


@contextlib.contextmanager
def started(name: str, checkpoint: str, folder: Path) -> Iterator[Server]:
    """An arm, ready to answer."""
    port = free_port()
    here = folder / re.sub("[^a-zA-Z0-9]+", "-", name)
    here.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if not is_ours(name):
        environment["PYTHONPATH"] = os.pathsep.join([str(SERVER_PACKAGES), str(ROOT)])
    elif code := other_code(name):
        environment["PYTHONPATH"] = code
    with open(here / "log", "wb") as log:
        process = subprocess.Popen(command(name, checkpoint, port), cwd=here, stdout=log, stderr=log, env=environment)
        server = Server(name, process, f"http://127.0.0.1:{port}")
        try:
            asyncio.run(answering(server, here / "log"))
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            for child in [process.pid, *(c.pid for c in descendants(process.pid))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


async def answering(server: Server, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < until:
            if server.process.poll() is not None:
                break
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{server.url}/v1/models") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise RuntimeError(f"{server.name} did not start:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]))


async def ask(session: aiohttp.ClientSession, url: str, number: int, tokens: int) -> Stream:
    """One streamed chat completion."""
    question = QUESTIONS[number % len(QUESTIONS)]
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    found = Stream(began=time.perf_counter())
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        found.status = answer.status
        if answer.status != 200:
            told = await answer.json()
            well = set(told["error"]) == {"message", "type", "param", "code"} and "Retry-After" in answer.headers
            found.error = f"{answer.status} {told['error']['code']}" if well else f"{answer.status} in another form"
            return found
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            event = json.loads(line[6:])
            if "error" in event:
                found.error = str(event["error"].get("code"))
            if event.get("usage"):
                found.tokens = event["usage"]["completion_tokens"]
            elif event.get("choices") and event["choices"][0]["delta"].get("content"):
                if found.first:
                    found.longest = max(found.longest, now - found.last)
                found.first, found.last, found.pieces = found.first or now, now, found.pieces + 1
    return found


async def load(url: str, streams: int, requests: int, tokens: int) -> tuple[list[Stream], float]:
    """(replies, seconds) of so many requests, so many at a time."""
    numbers = iter(range(requests))
    found: list[Stream] = []
    timeout, connector = aiohttp.ClientTimeout(total=300), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def client() -> None:
            for number in numbers:
                found.append(await ask(session, url, number, tokens))

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(streams)))
        return found, time.perf_counter() - began


def figures(replies: Sequence[Stream], seconds: float) -> dict[str, float]:
    """What clients saw.

    Raises:
        RuntimeError: a reply failed.
    """
    if wrong := [reply.error or str(reply.status) for reply in replies if reply.error or reply.status != 200]:
        raise RuntimeError(f"{len(wrong)} of {len(replies)} replies failed: {wrong[0]}")
    first = [1000 * (reply.first - reply.began) for reply in replies if reply.first]
    each = [1000 * (reply.last - reply.first) / (reply.tokens - 1) for reply in replies if reply.tokens > 1]
    return {
        "throughput": sum(reply.tokens for reply in replies) / seconds, "first": float(np.median(first)),
        "first_95": float(np.percentile(first, 95)), "token": float(np.median(each)), "token_95": float(np.percentile(each, 95)),
        "gap": 1000 * max(reply.longest for reply in replies), "tokens": float(np.mean([reply.tokens for reply in replies])),
        "pieces": float(np.mean([reply.pieces for reply in replies])),
    }  # fmt: skip


def memory(server: Server) -> float:
    """MiB of the service's processes (PSS)."""
    total = 0
    for process in [psutil.Process(server.process.pid), *descendants(server.process.pid)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**20


def held(server: Server) -> list[tuple[float, float]]:
    """(seconds, replies none of whose text waited longer for its word and its verdict), of all replies so far, as Ray publishes it."""
    time.sleep(PUBLISHED_SECONDS)
    for agent in descendants(server.process.pid):
        with contextlib.suppress(psutil.Error):
            if "DashboardAgent" not in " ".join(agent.cmdline()):
                continue
            for each in agent.net_connections(kind="tcp"):
                if each.status == psutil.CONN_LISTEN:
                    with contextlib.suppress(OSError, http.client.HTTPException):  # other ports of the agent speak gRPC
                        host = "127.0.0.1" if each.laddr.ip in ("::", "0.0.0.0") else each.laddr.ip
                        with urllib.request.urlopen(f"http://{host}:{each.laddr.port}/metrics", timeout=2) as answer:
                            found = re.findall(r'chatray_held_seconds_bucket{.*le="([^"]+)".*} (\S+)', answer.read().decode())
                        if found:
                            return sorted((float(bound), float(count)) for bound, count in found)
    return []


def told_of(waits: Sequence[tuple[float, float]]) -> str:
    if not waits:
        return "not published"
    total = waits[-1][1]
    return ", ".join(f"{100 * count / total:.1f}% within {1000 * bound:.0f} ms" for bound, count in waits if 0.005 <= bound <= 0.25)


@contextlib.contextmanager
def alone(server: Server, servers: Sequence[Server]) -> Iterator[None]:
    """The other servers' processes stand still."""
    others = [
        each for other in servers if other is not server for each in [psutil.Process(other.process.pid), *descendants(other.process.pid)]
    ]
    for each in others:
        with contextlib.suppress(psutil.Error):
            each.suspend()
    try:
        yield
    finally:
        for each in others:
            with contextlib.suppress(psutil.Error):
                each.resume()
        time.sleep(SETTLE_SECONDS)  # HAProxy cuts connections to a server whose last health check came late


def rounds(servers: Sequence[Server], wanted: argparse.Namespace) -> None:
    for server in servers:  # compiles, caches
        asyncio.run(load(server.url, 8, 16, wanted.tokens))
    for number in range(wanted.rounds):
        for streams in wanted.streams:
            requests = max(wanted.least, 2 * streams)
            for server in servers[:: 1 if number % 2 == 0 else -1]:
                with alone(server, servers):
                    found = figures(*asyncio.run(load(server.url, streams, requests, wanted.tokens)))
                server.figures.setdefault(streams, []).append(found)
                print(json.dumps({"arm": server.name, "streams": streams, "round": number, **found}), flush=True)


def overload(server: Server, wanted: argparse.Namespace) -> list[tuple[Counter[str], float]]:
    """What becomes of far too many requests, several times over, and the memory after each."""
    found = []
    for _ in range(5):
        replies, _ = asyncio.run(load(server.url, TOO_MANY, TOO_MANY, wanted.tokens))
        found.append((Counter(reply.error or "complete" for reply in replies), memory(server)))
        print(json.dumps({"overload": dict(found[-1][0]), "memory_mib": found[-1][1]}), flush=True)
    return found


def tables(servers: Sequence[Server]) -> str:
    theirs = next((server for server in servers if server.name == THEIRS), None)
    rows = []
    for streams in servers[0].figures:
        for server in servers:
            mine = server.figures[streams]
            of = {name: median([one[name] for one in mine]) for name in mine[0]}
            beside = "" if theirs is None or server is theirs else str(
                ratio([one["throughput"] for one in mine], [one["throughput"] for one in theirs.figures[streams]])
            )  # fmt: skip
            rows.append([
                streams, server.name, f"{of['first']:.0f} / {of['first_95']:.0f}", f"{of['token']:.2f} / {of['token_95']:.2f}",
                f"{of['tokens']:.0f} in {of['pieces']:.0f}", f"{of['gap']:.0f}", f"{of['throughput']:.0f}", beside,
            ])  # fmt: skip
    titles = [
        "streams", "server", "first text, ms (median / 95%)", "per token, ms (median / 95%)", "tokens of a reply, in pieces",
        "longest pause, ms", "tokens/s",
        "throughput over vLLM's own",
    ]  # fmt: skip
    return report.table(titles, rows)


def beside_other_code(servers: Sequence[Server]) -> str:
    """Throughput of this checkout over that of others, pair by pair."""
    rows = []
    for other in servers:
        name, _, code = other.name.partition(" @ ")
        mine = next((server for server in servers if server.name == name and code), None)
        for streams in other.figures if mine else ():
            pair = ([one["throughput"] for one in server.figures[streams]] for server in (mine, other) if server)
            rows.append([streams, name, Path(code).name, str(ratio(*pair))])
    return report.table(["streams", "arm", "beside the code of", "throughput over it"], rows) if rows else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/bench/natural/lm"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--beside", nargs="*", type=Path, default=[], help="folders of other checkouts")
    parser.add_argument("--streams", nargs="+", type=int, default=[*STREAMS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", type=int, default=16, help="requests of a measurement, at least")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-serving"))
    parser.add_argument("--no-overload", action="store_true")
    parser.add_argument("--write", action="store_true", help="the table into BENCHMARKS.md")
    wanted = parser.parse_args()
    arms = [*wanted.arms, *(f"{arm} @ {folder.resolve()}" for folder in wanted.beside for arm in wanted.arms if is_ours(arm))]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(started(arm, str(wanted.checkpoint.resolve()), wanted.out.resolve())) for arm in arms]
        rounds(servers, wanted)
        content = [tables(servers), *filter(None, [beside_other_code(servers)])] if wanted.rounds else []
        ours = [server for server in servers if is_ours(server.name)]
        lines = [f"- {server.name}: {told_of(held(server))}" for server in ours]
        content.append("Longest that any text of a reply waited for the rest of its word and its verdict:\n\n" + "\n".join(lines))
        for server in servers:
            if not is_ours(server.name) or wanted.no_overload:
                continue
            before = memory(server)
            lines = [[number, ", ".join(f"{count} {what}" for what, count in sorted(counts.items())), f"{mib:.0f}"]
                     for number, (counts, mib) in enumerate(overload(server, wanted), start=1)]  # fmt: skip
            content.append(f"{TOO_MANY} requests at once, {server.name} ({before:.0f} MiB before):\n\n"
                           + report.table(["time", "answers", "memory after, MiB"], lines))  # fmt: skip
    text: Any = "\n\n".join(content)
    print(text)
    if wanted.write:
        report.write("serving-load", f"Machine: {report.machine()}\n\n{text}")


if __name__ == "__main__":
    main()
