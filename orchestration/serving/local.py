"""The whole service in this process, without Ray (`runtime=local`): for a debugger, tests, and machines with one model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from actors.devices import give
from orchestration.serving.app import create_app
from orchestration.serving.building import load_engine, served_models
from orchestration.serving.engine import Engine, EngineLoop
from orchestration.serving.guarding import HEADERS
from orchestration.serving.judging import in_process, nobody
from orchestration.serving.keys import read_keys
from orchestration.serving.launch import Launch
from orchestration.serving.metrics import PrometheusMetrics
from orchestration.serving.moderation.moderators import open_moderator, thresholds_of
from orchestration.serving.service import Service
from orchestration.serving.store.store import Store


class Connection(HttpToolsProtocol):
    """uvicorn's, which reads headers without end: each takes a moment in which nobody else is served. On Ray HAProxy stands in front."""

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) > HEADERS:  # `guarding.py` says so in OpenAI's form to whoever sends a few too many
            raise ValueError("too many headers")
        super().on_header(name, value)


@contextlib.contextmanager
def opened(wanted: Launch) -> Iterator[Service]:
    """The service with its engines and its store, for as long as the context lasts."""
    settings = wanted.settings
    engine = settings.engine
    give(settings.engines.gpus)
    with contextlib.ExitStack() as stack:
        loops: dict[str, Engine] = {}
        for spec in wanted.models:
            checkpoint = spec.checkpoint
            loop = EngineLoop(lambda: load_engine(checkpoint, settings), settings.limits.waiting, engine.interval_ms, engine.sequences)  # noqa: B023
            stack.callback(loop.close)
            loops[spec.name] = loop
        store = Store.open(settings.store)
        stack.callback(store.close)
        moderator = open_moderator(settings.moderation)
        on = settings.moderation.kind != "off"
        judge = in_process(moderator, thresholds_of(settings.moderation, moderator)) if on else nobody()
        yield Service(
            settings, served_models(wanted.models, settings, loops), judge, store, read_keys(settings.keys, settings.limits),
            PrometheusMetrics(),
        )  # fmt: skip


def serve(wanted: Launch) -> None:
    """Serve until interrupted."""
    with opened(wanted) as service:
        settings = wanted.settings
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.WARNING)
        logging.getLogger("chatray.serving").setLevel(logging.INFO if settings.log_prompts else logging.WARNING)
        app = create_app(service)
        if settings.page:
            from orchestration.serving.page.mount import add_page

            add_page(app)
        config = uvicorn.Config(
            app, host=settings.host, port=settings.port, log_level="warning", access_log=False, server_header=False,
            timeout_graceful_shutdown=int(settings.drain_seconds), http=Connection, ws_max_size=settings.limits.body_bytes,
        )  # fmt: skip
        print(f"serving {', '.join(service.models)} at http://{settings.host}:{settings.port}/v1 (one process)", flush=True)
        uvicorn.Server(config).run()
