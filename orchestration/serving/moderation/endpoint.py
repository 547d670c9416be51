"""A service with OpenAI's `/v1/moderations` as a moderator.

    POST <url>   {"input": ["…", "…"], "model": "…"}
    200          {"results": [{"category_scores": {"hate": 0.01, …}}, …]}

A connection that fails, a try that takes too long, and the answers 408, 429 and 5xx are tried again, with waits that double; `Retry-After` in
seconds is heeded up to the try's own timeout. What then has no scores is refused or let through, as `moderation.on_error` says; an answer that
is not of this form counts as none.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

from conf.moderation import Moderation
from orchestration.errors import RequestError
from orchestration.serving.moderation.moderators import Limits, ModerationError, fixed

AGAIN = {408, 429}
CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm", "self-harm/instructions",
    "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
"""Those of OpenAI's service; another one may have others, which are passed on under their own names."""

log = logging.getLogger(__name__)


class Endpoint:
    """One service."""

    def __init__(self, settings: Moderation) -> None:
        if not settings.url:
            raise RequestError("moderation.url: kind=openai needs the address of a service, such as https://host/v1/moderations")
        if settings.key_env and not os.environ.get(settings.key_env):
            raise RequestError(f"moderation.key_env={settings.key_env}: this environment variable is not set where the moderator runs")
        key = os.environ.get(settings.key_env) if settings.key_env else None
        self.settings = settings
        self.client = httpx.Client(timeout=settings.timeout, headers={"Authorization": f"Bearer {key}"} if key else {})
        self.stopped = threading.Event()
        self.name = f"openai:{settings.model or httpx.URL(settings.url).host}"
        self.categories = CATEGORIES if not settings.thresholds else tuple(settings.thresholds)
        self.defaults: Limits = fixed(CATEGORIES)

    def scores(self, texts: Sequence[str]) -> list[dict[str, float]]:
        size = self.settings.batch
        return [scores for start in range(0, len(texts), size) for scores in self._ask(list(texts[start : start + size]))]

    def _ask(self, texts: list[str]) -> list[dict[str, float]]:
        body: dict[str, Any] = {"input": texts} | ({"model": self.settings.model} if self.settings.model else {})
        began, problem, wait = time.monotonic(), "", 0.0
        for number in range(self.settings.tries):
            if number:
                self.stopped.wait(max(wait, self.settings.backoff * 2 ** (number - 1) * random.uniform(0.5, 1.5)))
            try:
                answer = self.client.post(self.settings.url or "", json=body)
            except httpx.RequestError as cause:
                problem, wait = type(cause).__name__, 0.0
                continue
            if answer.status_code in AGAIN or answer.status_code >= 500:
                problem, wait = f"HTTP {answer.status_code}", min(_asked_for(answer), self.settings.timeout)
                continue
            problem = f"HTTP {answer.status_code}"
            if answer.status_code == 200:
                found = _results(answer, len(texts))
                if found is not None:
                    return found
                problem = "an answer of another form"
            break
        said = f"moderation: {self.settings.url} gave no scores in {time.monotonic() - began:.1f} s; last: {problem}"
        if self.settings.on_error == "allow":
            log.warning("%s; %d texts pass unmoderated (moderation.on_error=allow)", said, len(texts))
            return [{} for _ in texts]
        raise ModerationError(said)

    def close(self) -> None:
        self.stopped.set()
        self.client.close()


def _asked_for(answer: httpx.Response) -> float:
    """Seconds that `Retry-After` asks for; 0 where it does not."""
    try:
        seconds = float(answer.headers.get("retry-after", 0))
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _results(answer: httpx.Response, count: int) -> list[dict[str, float]] | None:
    """Scores of each text; None unless there are finite ones from 0 to 1 for every text."""
    try:
        results = answer.json()["results"]
        found = [{str(name): float(score) for name, score in result["category_scores"].items()} for result in results]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    fine = len(found) == count and all(scores and all(0 <= score <= 1 for score in scores.values()) for scores in found)
    return found if fine else None
