"""Taskmaster-4: coffee orders that one person wrote both sides of, with the assistant's API calls, and human 0/1 judgements of actions.

Released with PERL (arXiv 2403.10704). An API call becomes an assistant turn, its response a tool turn:

    user: one Chai Latte please     assistant: call get_menu_items {"query":"Chai Latte"}     tool: {"menu_items":[…]}
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.schema import TaskmasterData
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.source import Corpus, Judgement
from orchestration.errors import RequestError
from orchestration.run_directory import digest

ELISION = " … "


@dataclasses.dataclass(frozen=True)
class TaskmasterSource:
    """The folder with `data/*.json[.gz]` and `reward/*.json[.gz]`."""

    data: TaskmasterData
    judge_prompts: int
    seed: int

    def load(self) -> Corpus:
        dialogues = [dialogue for file, row in self._rows("data") if (dialogue := self._dialogue(file, row)).assistant_turns()]
        judged = [(row["conversation_id"], self._judgement(file, row)) for file, row in self._rows("reward")]
        rng = random.Random(f"taskmaster {self.seed}")
        rng.shuffle(dialogues)
        kept, held_out = dialogues[self.data.heldout :], dialogues[: self.data.heldout]
        train, test = _by_conversation(judged, self.data.heldout_judgements, rng)
        if not kept or not train or not test:
            raise RequestError(
                f"data.path={self.data.path}: {len(dialogues)} dialogues and {len(judged)} judgements leave {len(kept)} dialogues and "
                f"{len(train)} judgements to learn from and {len(test)} to measure on; lower data.heldout or data.heldout_judgements"
            )
        return Corpus(
            demonstrations=kept, held_out=held_out, prompts=[_context(d, rng) for d in kept for _ in range(2)],
            comparison_prompts=[], judge_prompts=[_context(held_out[n % len(held_out)], rng) for n in range(self.judge_prompts)],
            judgements=train, held_out_judgements=test,
        )  # fmt: skip

    def fingerprint(self) -> str:
        files = [(file.name, digest(file.read_bytes().hex())) for part in ("data", "reward") for file in self._files(part)]
        settings = {name: value for name, value in dataclasses.asdict(self.data).items() if name != "path"}
        return digest({"settings": settings, "files": files})

    def _files(self, part: str) -> list[Path]:
        return sorted((Path(self.data.path or ".") / part).glob("*.json*"))

    def _rows(self, part: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        for file in self._files(part):
            try:
                with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as opened:
                    rows = json.load(opened)
            except (OSError, EOFError, ValueError, zlib.error) as cause:
                raise RequestError(f"data.path: {file} is not readable JSON ({cause}); fetch the file again") from cause
            if not isinstance(rows, list) or not rows:
                raise RequestError(f"data.path: {file} holds no rows; a list of dialogues or judgements is expected")
            for number, row in enumerate(rows):
                if not isinstance(row, dict) or not isinstance(row.get("conversation_id"), str):
                    raise RequestError(f"data.path: {file}, row {number + 1}: not an object with a conversation_id")
                yield file, row

    def _dialogue(self, file: Path, row: dict[str, Any]) -> Dialogue:
        messages: list[Message] = []
        try:
            for turn in row["utterances"]:
                if turn["speaker"] not in ("user", "assistant"):
                    raise ValueError(f"speaker {turn['speaker']!r}")
                if turn["text"].strip():
                    messages.append(Message(turn["speaker"], turn["text"].strip()))
                messages += self._calls(turn["annotations"] or [])
            return Dialogue(row["conversation_id"], tuple(messages))
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise RequestError(f"data.path: {file}, dialogue {row.get('conversation_id', '?')}: {type(cause).__name__} {cause}") from cause

    def _calls(self, annotations: list[dict[str, str]]) -> list[Message]:
        """API calls and responses, in the order they were made. Annotations come as name, request, name, response."""
        found, name = [], ""
        for annotation in annotations:
            kind, value = annotation["name"], annotation["value"]
            if kind in ("api_call", "api_response"):
                name = value
            elif kind == "request":
                found.append(Message("assistant", f"call {name} {_compact(value)}"))
            elif kind == "response":
                found.append(Message("tool", self._shortened(_compact(value))))
        return found

    def _shortened(self, text: str) -> str:
        room = self.data.tool_response_chars
        if len(text) <= room:
            return text
        if room < len(ELISION):
            return text[:room]
        head = (room - len(ELISION)) // 2
        return text[:head] + ELISION + text[len(text) - head :]

    def _judgement(self, file: Path, row: dict[str, Any]) -> Judgement:
        try:
            context = [self._turn(turn) for turn in json.loads(row["context"])]
            reply = self._turn(json.loads(row["generation"]))
            if row["reward"] not in (0, 1):
                raise ValueError(f"reward {row['reward']!r} is neither 0 nor 1")
            return Judgement(Dialogue(row["conversation_id"], tuple(context)), reply.content, row["reward"] == 1)
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise RequestError(
                f"data.path: {file}, judgement of {row.get('conversation_id', '?')}: {type(cause).__name__} {cause}"
            ) from cause

    def _turn(self, turn: dict[str, Any]) -> Message:
        if turn["role"] == "api":
            (response,) = turn["response"].values()
            return Message("tool", self._shortened(_compact(response)))
        role = {"agent": "assistant", "user": "user"}[turn["role"]]
        if "api" in turn:
            ((name, request),) = turn["api"].items()
            return Message(role, f"call {name} {_compact(request)}")
        return Message(role, str(turn["text"]).strip())


def _compact(value: Any) -> str:
    """JSON without spaces; what is not JSON stays as it is."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value.strip()
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _context(dialogue: Dialogue, rng: random.Random) -> Dialogue:
    """The context of one of its assistant turns, picked at random (InstructGPT's recipe), API calls included."""
    return dialogue.before(rng.choice(dialogue.assistant_turns()))


def _by_conversation(judged: list[tuple[str, Judgement]], held_out: int, rng: random.Random) -> tuple[list[Judgement], list[Judgement]]:
    """Judgements in two parts that share no conversation; the second has at least `held_out`, if there are that many."""
    names = sorted({name for name, _ in judged})
    rng.shuffle(names)
    apart: set[str] = set()
    counts = dict.fromkeys(names, 0)
    for name, _ in judged:
        counts[name] += 1
    for name in names:
        if sum(counts[n] for n in apart) >= held_out:
            break
        apart.add(name)
    return [j for name, j in judged if name not in apart], [j for name, j in judged if name in apart]
