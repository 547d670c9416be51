"""The http source against real services on this machine, well and ill."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from actors.rewards.http import HttpSource
from actors.rewards.source import RewardError, Rows
from conf.rewards import HttpReward
from tests.fakes import replies_of, rollouts, texts

Answer = tuple
"""(status, text, and further headers)."""


class Service:
    """Answers by a script, one entry per request, the last one for ever; remembers what it was asked."""

    def __init__(self) -> None:
        self.script: list[Callable[[dict], Answer]] = []
        self.asked: list[tuple[dict, dict]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                number = min(len(service.asked), len(service.script) - 1)
                service.asked.append((dict(self.headers), body))
                status, text, *headers = service.script[number](body)
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Service()
    yield found
    found.close()


def lengths(body: dict) -> Answer:
    return 200, json.dumps({"rewards": [len(reply) for reply in body["replies"]], "model": "v1"})


def says(text: str, status: int = 200) -> Callable[[dict], Answer]:
    return lambda body: (status, text)


def slow(body: dict) -> Answer:
    time.sleep(0.6)
    return lengths(body)


def source(url: str, **more: Any) -> HttpSource:
    return HttpSource(HttpReward("http", url, **({"timeout": 5.0, "tries": 3, "backoff": 0.01} | more)))


def rows(count: int = 5) -> Rows:
    return Rows(rollouts(0, count).split(2), texts(count))


def expected(count: int = 5) -> list[float]:
    return [float(len(reply)) for reply in replies_of(rollouts(0, count))]


def test_it_asks_in_batches_and_keeps_the_order(service: Service) -> None:
    service.script = [lengths]
    assert source(service.url, batch=2).score(rows()).tolist() == expected()
    assert [len(body["replies"]) for _, body in service.asked] == [2, 2, 1]
    headers, body = service.asked[0]
    assert body["conversations"][1] == [{"role": "user", "content": "question 1"}]
    assert body["replies"] == replies_of(rollouts(0, 5))[:2]
    assert headers["Content-Type"] == "application/json" and "Authorization" not in headers


def test_a_token_goes_into_the_header_and_nowhere_else(service: Service) -> None:
    service.script = [lengths, says("who are you?", 401)]
    known = texts(5)
    known.tokens["http"] = "s3cret"
    asking = source(service.url, token_env="MY_TOKEN")
    asking.score(Rows([rollouts(0, 5)], known))
    assert service.asked[0][0]["Authorization"] == "Bearer s3cret"
    with pytest.raises(RewardError, match="HTTP 401") as refused:
        asking.score(Rows([rollouts(0, 5)], known))
    assert "s3cret" not in str(refused.value) and len(service.asked) == 2, "a refusal is not tried again"


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_service_in_trouble_is_asked_again(service: Service, status: int) -> None:
    service.script = [says("busy", status), says("busy", status), lengths]
    assert source(service.url).score(rows()).tolist() == expected()
    assert len(service.asked) == 3


def test_a_slow_answer_is_tried_again(service: Service) -> None:
    service.script = [slow, lengths]
    assert source(service.url, timeout=0.2).score(rows()).tolist() == expected()


def test_one_that_stays_down_ends_with_all_there_is_to_know(service: Service) -> None:
    service.script = [says("on fire", 503)]
    with pytest.raises(RewardError) as failed:
        source(service.url).score(rows())
    for part in (service.url, "in 3 tries over", "HTTP 503 ('on fire')", "`tries`, `timeout`", "goes on from the last commit"):
        assert part in str(failed.value)
    assert len(service.asked) == 3


def test_one_that_never_answers_ends_within_its_time(service: Service) -> None:
    service.script = [slow]
    began = time.monotonic()
    asking = source(service.url, timeout=0.2, tries=2)
    with pytest.raises(RewardError, match="ReadTimeout"):
        asking.score(rows())
    assert time.monotonic() - began < asking.settings.longest_seconds() + 1


def test_nobody_there_is_an_end_too(service: Service) -> None:
    service.close()
    with pytest.raises(RewardError, match="in 3 tries over .* last: ConnectError"):
        source(service.url).score(rows())


def test_waits_double_and_are_spread(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    service.script = [says("no", 500)]
    with pytest.raises(RewardError):
        source(service.url, tries=5, backoff=0.1).score(rows())
    assert len(waits) == 4
    for number, wait in enumerate(waits):
        assert 0.05 * 2**number <= wait <= 0.15 * 2**number


def test_what_the_service_asks_to_wait_is_heeded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    busy = [(429, "", ("Retry-After", text)) for text in ("7", "999999", "Fri, 31 Dec 1999 23:59:59 GMT")]
    service.script = [*[lambda body, answer=answer: answer for answer in busy], lengths]
    assert source(service.url, tries=4).score(rows()).tolist() == expected()
    assert waits[:2] == [7.0, 60.0] and waits[2] < 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<html>hello</html>", "something that is not JSON"),
        ('{"rewards": [1, 2', "something that is not JSON"),
        ("[1, 2, 3, 4, 5]", "the form is"),
        ('{"scores": [1, 2, 3, 4, 5]}', "the form is"),
        ('{"rewards": null}', "in place of a list of 5 numbers"),
        ('{"rewards": 3}', "in place of a list of 5 numbers"),
        ('{"rewards": [1, 2, 3, 4]}', "4 rewards for 5 replies"),
        ('{"rewards": [1, 2, 3, 4, 5, 6]}', "6 rewards for 5 replies"),
        ('{"rewards": [1, 2, NaN, 4, 5]}', "nan for reply 3 of 5"),
        ('{"rewards": [1, 2, Infinity, 4, 5]}', "inf for reply 3 of 5"),
        ('{"rewards": [1, 2, 1e999, 4, 5]}', "inf for reply 3 of 5"),
        ('{"rewards": [1, 2, null, 4, 5]}', "'None' (NoneType) for reply 3 of 5"),
        ('{"rewards": [1, 2, "3", 4, 5]}', "'3' (str) for reply 3 of 5"),
        ('{"rewards": [1, 2, true, 4, 5]}', "True for reply 3 of 5"),
        ('{"rewards": [1, 2, [3], 4, 5]}', "(list) for reply 3 of 5"),
    ],
)
def test_what_is_no_number_is_never_taken_for_one(service: Service, text: str, said: str) -> None:
    service.script = [says(text)]
    with pytest.raises(RewardError) as failed:
        source(service.url).score(rows())
    assert said in str(failed.value) and service.url in str(failed.value)
    assert len(service.asked) == 1, "the same question would get the same answer"


def test_an_empty_reply_and_odd_text_can_be_sent(service: Service) -> None:
    service.script = [lengths]
    asking = source(service.url)
    odd = asking._ask([[{"role": "user", "content": "\ud800 \u2028 \0"}]], [""], {"Content-Type": "application/json"})
    assert torch.equal(odd, torch.zeros(1))
