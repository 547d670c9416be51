"""Scores by a service over HTTP.

    POST <url>   {"conversations": [[{"role": "user", "content": "Hi"}]], "replies": ["Hello."]}
    200          {"rewards": [0.5]}

One finite number per reply, in their order; other keys of the answer are ignored. A connection that fails, a try that takes too long and
the answers 408, 429 and 5xx are tried again, with waits that double; `Retry-After` in seconds is heeded. Any other answer ends the run at
once: trying again would give the same, and nothing that is not a number is ever taken for one.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence

import httpx
import torch
from torch import Tensor

from actors.rewards.source import Messages, RewardError, Rows, checked
from conf.rewards import LONGEST_WAIT, HttpReward

AGAIN = {408, 429}


class HttpSource:
    """One service."""

    def __init__(self, settings: HttpReward) -> None:
        self.settings = settings
        self.client = httpx.Client(timeout=settings.timeout)
        self.chance = random.Random()  # waits decide no result: the point is that ranks differ

    def score(self, rows: Rows) -> Tensor:
        token = rows.texts.tokens.get(self.settings.name)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        contexts, replies, size = rows.contexts, rows.replies, self.settings.batch
        found = [self._ask(contexts[i : i + size], replies[i : i + size], headers) for i in range(0, len(replies), size)]
        return torch.cat(found)

    def _ask(self, contexts: Sequence[Messages], replies: Sequence[str], headers: dict[str, str]) -> Tensor:
        """The rewards of one request's replies."""
        body = json.dumps({"conversations": contexts, "replies": replies}).encode()
        began, problem, wait = time.monotonic(), "", 0.0
        for number in range(self.settings.tries):
            if number:
                time.sleep(max(wait, self._wait(number)))
            try:
                answer = self.client.post(self.settings.url, content=body, headers=headers)
            except httpx.RequestError as cause:
                problem, wait = f"{type(cause).__name__} ({str(cause)[:200]})", 0.0
                continue
            if answer.status_code in AGAIN or answer.status_code >= 500:
                problem, wait = f"HTTP {answer.status_code} ({answer.text[:200]!r})", _asked_for(answer)
                continue
            return self._rewards(answer, len(replies))
        raise RewardError(
            f"ppo.rewards: {self.settings.url} gave no answer in {self.settings.tries} tries over {time.monotonic() - began:.1f} s; last: "
            f"{problem}. Bring the service back and give the same command, which goes on from the last commit; or raise `tries`, `timeout` "
            f"or `backoff` of the source {self.settings.name!r}"
        )

    def _rewards(self, answer: httpx.Response, count: int) -> Tensor:
        """What a complete answer says."""
        who = f"ppo.rewards: {self.settings.url}"
        if answer.status_code != 200:
            hint = "; set `token_env` of this source to the variable that holds its token" if answer.status_code in (401, 403) else ""
            raise RewardError(f"{who} refused the request: HTTP {answer.status_code} ({answer.text[:200]!r}){hint}")
        try:
            found = answer.json()
        except (ValueError, RecursionError) as cause:
            raise RewardError(f"{who} answered with something that is not JSON: {answer.text[:200]!r}") from cause
        if not isinstance(found, dict) or "rewards" not in found:
            raise RewardError(f'{who} answered {answer.text[:200]!r}; the form is {{"rewards": [numbers]}}')
        return checked(found["rewards"], count, who)

    def _wait(self, number: int) -> float:
        """Seconds before try `number`, counted from 0."""
        return min(self.settings.backoff * 2 ** (number - 1), LONGEST_WAIT) * self.chance.uniform(0.5, 1.5)


def _asked_for(answer: httpx.Response) -> float:
    """Seconds that the service asks us to wait; 0 when it does not, or names a date."""
    text = answer.headers.get("Retry-After", "")
    return min(float(text), LONGEST_WAIT) if text.isdigit() else 0.0
