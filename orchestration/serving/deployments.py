"""The service on Ray Serve. The only file that imports `ray.serve`.

    proxy ─▶ Ingress (FastAPI: keys, prompts, conversations, moderation, text) ─▶ Engine, one for each model (tokens, by `wire.py`)
                                                                              └─▶ Moderation (scores)

`build` is what a Serve config names as its `import_path`. What may change without a restart is in each deployment's `user_config`: a new
checkpoint, prompt file, threshold or limit reaches running replicas by `reconfigure`, and requests under way end as they began.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
from pydantic import TypeAdapter
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address
from ray.util import metrics as ray_metrics

from actors.serving.protocol import Request
from conf.moderation import Moderation as ModerationSettings
from conf.serving import Serving
from orchestration.errors import RequestError
from orchestration.serving.apart import Threads
from orchestration.serving.app import create_app
from orchestration.serving.building import as_plain, load_engine, served_models, spec_of, tokenizer_of
from orchestration.serving.engine import EngineLoop, Mailbox
from orchestration.serving.errors import ApiError, engine_lost, failed, overloaded
from orchestration.serving.judging import Judge, Scores, nobody
from orchestration.serving.keys import read_keys
from orchestration.serving.launch import Launch, engine_name, launch, options
from orchestration.serving.metrics import COUNTERS, GAUGES, HISTOGRAMS
from orchestration.serving.moderation.moderators import Limits, open_moderator, thresholds_of
from orchestration.serving.service import Service
from orchestration.serving.store.store import Store
from orchestration.serving.wire import Address, Desk, Lines

logger = logging.getLogger("chatray.serving")
APP = "chatray"
LOST = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
PROCESS = uuid4().hex
PING_SECONDS = 5.0
LATE_SECONDS = 10.0
"""A reply's last tokens come before Serve says that its request has ended, or soon after."""


def settings_of(plain: dict[str, Any]) -> Serving:
    return TypeAdapter(Serving).validate_python(plain)


def listen_at_own_address() -> None:
    """Have this replica's gRPC server listen at its node's address, as other replicas reach it. It unpickles what it is sent, and Serve
    binds it to all addresses."""
    from ray.serve._private import replica

    bind, host = replica.add_port_to_grpc_server, get_node_ip_address()
    own = f"[{host}]:0" if ":" in host else f"{host}:0"
    replica.add_port_to_grpc_server = lambda server, _: bind(server, own)


class RayMetrics:
    """Metrics that Ray publishes with its own. Handing a number to Ray takes as long as making an event of a stream, so sums and levels are
    handed over once a second."""

    def __init__(self) -> None:
        self.counters = {f.name: ray_metrics.Counter(f.name, f.text, f.labels) for f in COUNTERS}
        self.gauges = {f.name: ray_metrics.Gauge(f.name, f.text, f.labels) for f in GAUGES}
        self.histograms = {f.name: ray_metrics.Histogram(f.name, f.text, list(f.bounds), f.labels) for f in HISTOGRAMS}
        self.counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self.levels: dict[str, float] = {}
        self.due: asyncio.TimerHandle | None = None

    def count(self, name: str, by: float = 1.0, **labels: str) -> None:
        if by > 0:
            self.counts[name, tuple(labels.items())] += by  # type: ignore[assignment]  # a Counter counts floats too
            self._soon()

    def set(self, name: str, value: float) -> None:
        self.levels[name] = value
        self._soon()

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.histograms[name].observe(value, labels)

    def text(self) -> str | None:
        return None

    def _soon(self) -> None:
        if self.due is None:
            self.due = asyncio.get_running_loop().call_later(1.0, self.publish)

    def publish(self) -> None:
        """Hand over what has come since."""
        self.due = None
        counts, self.counts = self.counts, Counter()
        for (name, labels), by in counts.items():
            self.counters[name].inc(by, dict(labels))
        levels, self.levels = self.levels, {}
        for name, value in levels.items():
            self.gauges[name].set(value)


class RemoteEngine:
    """Engine replicas behind the protocol of `engine.py`: Serve carries the request and says how it ended, the wire brings the tokens."""

    def __init__(self, handle: DeploymentHandle, desk: Desk) -> None:
        self.handle, self.desk = handle, desk
        self.calls: set[asyncio.Task[None]] = set()

    def submit(self, request: Request) -> Mailbox:
        def stop() -> None:
            self.desk.forget(request.id)
            if not box.ended:
                call.cancel()

        box = Mailbox(stop)
        self.desk.expect(request.id, box)
        call = asyncio.ensure_future(self._call(request, box))
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        return box

    async def _call(self, request: Request, box: Mailbox) -> None:
        response: Any = None
        try:
            response = self.handle.generate.remote(request, await self.desk.address())
            await response
            if not box.ended:
                await asyncio.sleep(LATE_SECONDS)
                box.fail(engine_lost())
        except asyncio.CancelledError:
            box.fail(engine_lost())
            if response is not None:
                with contextlib.suppress(Exception):  # of a request that found no room it raises what was raised before
                    response.cancel()
            raise
        except BackPressureError:
            box.fail(overloaded())
        except LOST:
            box.fail(engine_lost())
        except Exception as error:
            cause = getattr(error, "cause", error)  # as Ray brings what was raised there
            if not isinstance(cause, ApiError):
                logger.exception("an engine failed")
            box.fail(cause if isinstance(cause, ApiError) else failed())

    async def well(self) -> bool:
        """Whether a replica answers."""
        try:
            async with asyncio.timeout(PING_SECONDS):
                return bool(await self.handle.ping.remote())
        except Exception:  # a timeout, or whatever Serve says of a replica that cannot be reached
            return False


class Engine:
    """A replica with a model."""

    def __init__(self, serving: dict[str, Any]) -> None:
        listen_at_own_address()
        self.settings = settings_of(serving)
        self.loop: EngineLoop | None = None
        self.lines = Lines(self.settings.engine.interval_ms / 1000)
        self.tokenizer = self.checkpoint = ""
        self.given: dict[str, Any] = {}

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the model, or swap in another one. One that cannot be loaded leaves the old one at work, and a line in the log."""
        if user_config == self.given:
            return
        checkpoint, settings = user_config["checkpoint"], self.settings
        if self.loop is None:
            self.loop = await asyncio.to_thread(
                EngineLoop, lambda: load_engine(checkpoint, settings), settings.limits.waiting, settings.engine.interval_ms,
                settings.engine.sequences,
            )  # fmt: skip
        else:
            try:
                await self.loop.swap(lambda: load_engine(checkpoint, settings))
            except Exception:  # Serve would end this replica, and the replies under way with it
                logger.exception("%s could not be loaded; the model before it goes on", checkpoint)
                return
        self.tokenizer, self.given = tokenizer_of(checkpoint), user_config

    async def generate(self, request: Request, to: Address) -> None:
        """Write a reply to an ingress; returns when its last tokens are on their way. The writing stops when this is cancelled.

        Raises:
            ApiError: there is no room, or the ingress cannot be reached.
        """
        assert self.loop is not None
        line = await self.lines.to(to)
        if request.tokenizer != self.tokenizer:  # ingress and engine are swapped one after the other
            raise overloaded()
        reply = line.reply(request.id)
        try:
            self.loop.write(request, reply)
            await reply.ended
        finally:
            self.loop.leave(request.id)
            line.forget(request.id)

    async def ping(self) -> bool:
        self.check_health()
        return True

    def check_health(self) -> None:
        if self.loop is not None:
            self.loop.check()

    def __del__(self) -> None:
        if self.loop is not None:
            self.loop.close()
            self.lines.close()


class Moderation:
    """A replica that judges texts."""

    def __init__(self) -> None:
        listen_at_own_address()
        self.moderator: Any = None
        self.thresholds: Limits = {}
        self.thread = Threads("moderation", 1)  # a lock would be given back by a request that is cancelled while its thread still judges

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        settings = TypeAdapter(ModerationSettings).validate_python(user_config["moderation"])
        moderator = await asyncio.to_thread(open_moderator, settings)
        self.thresholds = thresholds_of(settings, moderator)
        self.moderator = moderator

    async def scores(self, texts: Sequence[str]) -> list[Scores]:
        return await self.thread.run(self.moderator.scores, texts)

    async def about(self) -> tuple[str, tuple[str, ...], Limits]:
        """Name, categories and the thresholds in force."""
        return self.moderator.name, tuple(self.moderator.categories), self.thresholds


def deployed(kind: type, **given: Any) -> Any:
    """A class as a deployment. Its replicas stay as long as this process: what changes meanwhile (SIGHUP) is handed to their `reconfigure`.

    `serve.run` takes a deployment without a version for new code each time and replaces all its replicas: requests stood still for seconds
    until the new ones were there. The argument is internal because a Serve config needs none.
    """
    found: Any = serve.deployment(kind)
    return found.options(version=PROCESS, _internal=True, **given)


def bare_app() -> FastAPI:
    """The app; its service comes with the first `reconfigure`, before any request, and says whether there is a chat page."""
    from orchestration.serving.page.mount import add_page  # NiceGUI is for the replica alone

    app = create_app()
    add_page(app)
    return app


class Ingress:
    """A replica that speaks HTTP."""

    app: FastAPI

    def __init__(self, engines: dict[str, DeploymentHandle], moderation: DeploymentHandle | None) -> None:
        listen_at_own_address()
        self.desk = Desk(get_node_ip_address())
        self.engines = {name: RemoteEngine(handle, self.desk) for name, handle in engines.items()}
        self.moderation = moderation
        self.service: Service | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over models, prompts, thresholds, keys and limits. Requests under way go on with what they began with."""
        settings = settings_of(user_config["serving"])
        logger.setLevel(logging.INFO if settings.log_prompts else logging.WARNING)
        specs = [spec_of(plain) for plain in user_config["models"]]
        models = await asyncio.to_thread(served_models, specs, settings, dict(self.engines))
        judge = await self._judge(settings)
        keys = read_keys(settings.keys, settings.limits)
        if self.service is None:
            store = await asyncio.to_thread(Store.open, settings.store)
            self.service = Service(settings, models, judge, store, keys, RayMetrics(), live=self._live)
        else:
            self.service.settings, self.service.models, self.service.judge, self.service.keys = settings, models, judge, keys
        self.app.state.service = self.service

    async def _judge(self, settings: Serving) -> Judge:
        if self.moderation is None:
            return nobody()
        handle = self.moderation
        name, categories, thresholds = await handle.about.remote()

        async def ask(texts: list[str]) -> list[Scores]:
            return await handle.scores.remote(texts)

        chosen: Any = settings.moderation.thresholds or thresholds  # those of the settings, though its replicas be late
        return Judge(name, tuple(categories), ask, chosen)

    async def _live(self) -> bool:
        return all(await asyncio.gather(*(engine.well() for engine in self.engines.values())))

    def check_health(self) -> None:
        if self.service is None:
            raise RuntimeError("the ingress has no service yet")

    def __del__(self) -> None:
        self.desk.close()
        if self.service is not None:
            self.service.store.close()


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config: `args: {words: [run=…, serving.…]}`, the words of `chatray serve`."""
    return application(launch(args["words"]))


def application(wanted: Launch) -> serve.Application:
    """The deployments and how they are bound together."""
    settings, given = wanted.settings, options(wanted)
    plain = asdict(settings)
    engines: dict[str, Any] = {}
    config: dict[str, Any]
    for number, spec in enumerate(wanted.models):
        name = engine_name(number)
        config = {"checkpoint": spec.checkpoint, "version": spec.version}
        engines[spec.name] = deployed(Engine, name=name, user_config=config, **given[name]).bind(_of_engine(plain))
    moderation = None
    if "Moderation" in given:
        config = {"moderation": plain["moderation"], "revision": settings.revision}
        moderation = deployed(Moderation, name="Moderation", user_config=config, **given["Moderation"]).bind()
    config = {"serving": plain, "models": as_plain(wanted.models)}
    ingress = serve.ingress(bare_app)(Ingress)
    return deployed(ingress, name="Ingress", user_config=config, **given["Ingress"]).bind(engines, moderation)


def _of_engine(plain: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that engines have no use for, so that a change of these restarts none."""
    neutral: dict[str, Any] = {"prompts": None, "keys": None, "revision": 0, "refusal": "", "log_prompts": False, "cors": (), "model": None}
    return plain | neutral | {"moderation": asdict(ModerationSettings(kind="off"))}


def run(wanted: Launch) -> None:
    """Serve on the connected cluster until interrupted; SIGHUP reads checkpoint, prompts and keys again, without dropping a request."""
    deploy(wanted)
    print(
        f"serving {', '.join(spec.name for spec in wanted.models)} at http://{wanted.settings.host}:{wanted.settings.port}/v1", flush=True
    )
    ended, again, revision = threading.Event(), threading.Event(), wanted.settings.revision
    _signals(ended, again)
    while not ended.wait(0.2):
        if again.is_set():
            again.clear()
            revision += 1
            try:
                deploy(_revised(launch(wanted.words), revision))
            except (RequestError, RuntimeError) as cause:
                print(f"chatray: nothing was changed: {' '.join(str(cause).split())[:600]}", file=sys.stderr, flush=True)


def _revised(wanted: Launch, revision: int) -> Launch:
    return replace(wanted, config=replace(wanted.config, serving=replace(wanted.settings, revision=revision)))


def _signals(ended: threading.Event, again: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    signal.signal(signal.SIGHUP, lambda *_: again.set())


def deploy(wanted: Launch) -> None:
    """Start the application, or change the one that runs. Returns once it serves."""
    settings = wanted.settings
    serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # Serve's progress lines
        serve.run(application(wanted), name=APP, route_prefix="/")


def stop() -> None:
    """End the application, its requests drained, and Serve."""
    serve.delete(APP)
    serve.shutdown()
