"""Moderators that others bring: a tiny Hugging Face model on disk, and a service on loopback that misbehaves in every way."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, pipeline

from conf.moderation import Moderation
from orchestration.errors import RequestError
from orchestration.serving.moderation.moderators import ModerationError, decide, open_moderator, thresholds_of

WORDS = ["[PAD]", "[UNK]", *"good morning bread table hate kill you".split()]


def classifier(folder: Path, problem: str | None) -> Path:
    """A random tiny BERT with three labels, the third one of them raised by the word `kill`."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32,
        id2label={0: "fine", 1: "rude", 2: "toxic"}, label2id={"fine": 0, "rude": 1, "toxic": 2}, problem_type=problem,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    model.save_pretrained(folder)
    return folder


def test_a_hugging_face_model_gives_the_scores_of_transformers_own_pipeline(tmp_path: Path) -> None:
    texts = ["good morning", "kill you", "hate you you you you", "bread", "table good bread morning hate"]
    for problem, function in (("multi_label_classification", "sigmoid"), (None, "softmax")):
        folder = classifier(tmp_path / function, problem)
        moderator = open_moderator(Moderation("huggingface", path=str(folder), batch=2))
        theirs = pipeline("text-classification", str(folder), top_k=None, function_to_apply=function)(texts)
        assert moderator.categories == ("fine", "rude", "toxic")
        for ours, expected in zip(moderator.scores(texts), theirs, strict=True):
            assert ours == pytest.approx({score["label"]: score["score"] for score in expected}, abs=1e-5)
    assert moderator.scores([]) == []


def test_labels_become_categories_and_the_highest_counts(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "m", "multi_label_classification")
    labels = {"rude": "harassment", "toxic": "harassment"}
    mapped = open_moderator(Moderation("huggingface", path=str(folder), labels=labels))
    plain = open_moderator(Moderation("huggingface", path=str(folder)))
    assert mapped.categories == ("harassment",)
    (ours,), (theirs,) = mapped.scores(["kill you"]), plain.scores(["kill you"])
    assert ours == {"harassment": max(theirs["rude"], theirs["toxic"])}
    assert thresholds_of(Moderation("huggingface", path=str(folder)), mapped) == {"harassment": {"warn": 0.5, "block": 0.9}}
    with pytest.raises(RequestError, match="no such label; .* has fine, rude, toxic"):
        open_moderator(Moderation("huggingface", path=str(folder), labels={"mean": "harassment"}))
    with pytest.raises(RequestError, match="no such category"):
        thresholds_of(Moderation("huggingface", path=str(folder), thresholds={"hate": {"warn": 0.5}}), mapped)


def test_what_stands_at_the_end_of_a_long_text_is_seen(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "m", "multi_label_classification")
    moderator = open_moderator(Moderation("huggingface", path=str(folder), longest=16))
    begins, ends = "good " * 16, "good " * 14 + "kill you"
    whole, first, second = moderator.scores(["good " * 28 + "kill you", begins, ends])  # windows of 16 that share 2
    assert whole == pytest.approx({name: max(first[name], second[name]) for name in whole}, abs=1e-6)
    assert first != second
    assert moderator.scores(["kill you " * 500])[0].keys() == whole.keys()  # the model itself takes 32 tokens at most


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="needs a folder"):
        open_moderator(Moderation("huggingface"))
    with pytest.raises(RequestError, match="no text-classification model"):
        open_moderator(Moderation("huggingface", path=str(tmp_path)))


class Service:
    """A moderation service that answers what it is told to: (status, body, headers) by turn, the last for ever."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any, dict[str, str]]] = []
        self.asked: list[dict[str, Any]] = []
        self.hold = threading.Event()
        self.hold.set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked.append({"body": body, "key": self.headers.get("Authorization")})
                status, answer, headers = service.answers.pop(0) if len(service.answers) > 1 else service.answers[0]
                service.hold.wait()
                content = answer(body) if callable(answer) else answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/moderations"

    def stop(self) -> None:
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def service() -> Iterator[Service]:
    started = Service()
    yield started
    started.stop()


def scored(body: dict[str, Any]) -> dict[str, Any]:
    return {"results": [{"flagged": "kill" in text, "category_scores": {"violence": 0.95 if "kill" in text else 0.01}} for text in body["input"]]}


def test_a_service_is_asked_in_batches_with_the_key_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.answers = [(200, scored, {})]
    settings = Moderation("openai", url=service.url, model="omni", key_env="MODERATION_KEY", batch=2)
    with pytest.raises(RequestError, match="MODERATION_KEY"):
        open_moderator(settings)
    monkeypatch.setenv("MODERATION_KEY", "sesame")
    moderator = open_moderator(settings)
    found = moderator.scores(["good morning", "kill", "bread"])
    assert [decide(scores, thresholds_of(settings, moderator)).action for scores in found] == ["allow", "block", "allow"]
    assert [asked["body"] for asked in service.asked] == [{"input": ["good morning", "kill"], "model": "omni"}, {"input": ["bread"], "model": "omni"}]
    assert {asked["key"] for asked in service.asked} == {"Bearer sesame"}


def test_an_overloaded_service_is_asked_again(service: Service) -> None:
    service.answers = [(503, b"", {}), (429, b"", {"Retry-After": "0.01"}), (200, scored, {})]
    moderator = open_moderator(Moderation("openai", url=service.url, backoff=0.01))
    assert moderator.scores(["kill"]) == [{"violence": 0.95}]
    assert len(service.asked) == 3


BROKEN: list[Any] = [
    (500, b"", {}), (401, b"", {}), (200, b"not json", {}), (200, {"results": []}, {}), (200, {"results": [{"category_scores": {}}]}, {}),
    (200, {"results": [{"category_scores": {"hate": 7}}]}, {}), (200, b'{"results": [{"category_scores": {"hate": NaN}}]}', {}), (200, [], {}),
]  # fmt: skip


@pytest.mark.parametrize("answer", BROKEN, ids=str)
def test_a_service_that_gives_no_scores_blocks_or_allows_as_set(service: Service, answer: Any) -> None:
    service.answers = [answer]
    closed = open_moderator(Moderation("openai", url=service.url, tries=2, backoff=0.01))
    with pytest.raises(ModerationError, match="gave no scores"):
        closed.scores(["kill"])
    opened = open_moderator(Moderation("openai", url=service.url, tries=2, backoff=0.01, on_error="allow"))
    assert opened.scores(["kill", "you"]) == [{}, {}]
    assert decide({}, {"violence": {"block": 0.5}}).action == "allow"


def test_a_service_that_hangs_or_is_not_there_is_given_up(service: Service) -> None:
    service.answers = [(200, scored, {})]
    service.hold.clear()
    with pytest.raises(ModerationError, match="ReadTimeout"):
        open_moderator(Moderation("openai", url=service.url, tries=1, timeout=0.05)).scores(["kill"])
    service.hold.set()
    gone: Callable[[], Any] = open_moderator(Moderation("openai", url="http://127.0.0.1:9/x", tries=2, backoff=0.01)).scores
    with pytest.raises(ModerationError, match="ConnectError"):
        gone(["kill"])  # type: ignore[call-arg]
    with pytest.raises(RequestError, match=r"moderation\.url"):
        open_moderator(Moderation("openai"))


def test_decide_takes_the_gravest_action_and_names_what_was_over() -> None:
    limits = {"hate": {"warn": 0.3, "block": 0.8}, "violence": {"warn": 0.5}}
    assert decide({"hate": 0.1, "violence": 0.4, "other": 1.0}, limits).action == "allow"
    warned = decide({"hate": 0.3, "violence": 0.9}, limits)
    assert (warned.action, warned.categories) == ("warn", ("violence", "hate"))
    blocked = decide({"hate": 0.8, "violence": 0.9}, limits)
    assert (blocked.action, blocked.categories) == ("block", ("violence", "hate"))
    assert open_moderator(Moderation("off")).scores(["kill"]) == [{}]
    with pytest.raises(RequestError, match="below its warning"):
        thresholds_of(Moderation("off", thresholds={"hate": {"warn": 0.9, "block": 0.1}}), open_moderator(Moderation("off")))
