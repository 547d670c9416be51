"""Hidden prompts: instructions around the user's text, from a file that is named by `serving.prompts` and read by replicas alone.

"*":                       # every model without an entry of its own
  version: "3"
  before: You are a careful assistant.      # the beginning of the system message
  after: Answer in one sentence.            # the end of the last user message
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestration.data.dialogues import Message
from orchestration.errors import RequestError
from orchestration.serving.canaries import Secret

FIELDS = ("version", "before", "after")


@dataclass(frozen=True)
class HiddenPrompt:
    """What a model is told and its users are not. Its text is in no repr, so in no log and no traceback."""

    version: str = ""
    before: str = field(default="", repr=False)
    after: str = field(default="", repr=False)
    secret: Secret = field(default_factory=lambda: Secret((), 2), repr=False, compare=False)

    def __bool__(self) -> bool:
        return bool(self.before or self.after)

    def around(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The messages with what is hidden: one system message, and the last user message extended."""
        found = list(messages)
        users = [number for number, message in enumerate(found) if message.role == "user"]
        if self.after and users:
            found[users[-1]] = Message("user", f"{found[users[-1]].content}\n\n{self.after}")
        head = [self.before, "" if users else self.after]
        if any(head):
            own = found.pop(0).content if found and found[0].role == "system" else ""
            found.insert(0, Message("system", "\n\n".join(part for part in (head[0], own, head[1]) if part)))
        return tuple(found)


def hidden_prompt(before: str, after: str, words: int, version: str | None = None) -> HiddenPrompt:
    """A hidden prompt and what may not be said of it; without a version it is known by a hash."""
    version = version or hashlib.sha256(f"{before}\0{after}".encode()).hexdigest()[:12]
    return HiddenPrompt(version, before, after, Secret([before, after], words))


def read_prompts(path: str | None, words: int) -> dict[str, HiddenPrompt]:
    """Hidden prompts by the model's name, `*` for all others.

    Raises:
        RequestError: the file cannot be read or has another form; says where, and nothing of its content.
    """
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise RequestError(f"serving.prompts={path}: cannot be read as YAML ({type(cause).__name__})") from None
    if not isinstance(content, dict):
        raise RequestError(f"serving.prompts={path}: a model's name must stand before each prompt")
    return {str(name): _prompt(path, str(name), entry, words) for name, entry in content.items()}


def _prompt(path: str, name: str, entry: Any, words: int) -> HiddenPrompt:
    if not isinstance(entry, dict) or not entry.keys() <= set(FIELDS) or not all(isinstance(v, str | int) for v in entry.values()):
        raise RequestError(f"serving.prompts={path}: the entry {name!r} may have {', '.join(FIELDS)}, each a text, and nothing else")
    before, after = (str(entry.get(side) or "").strip() for side in ("before", "after"))
    return hidden_prompt(before, after, words, str(entry["version"]) if entry.get("version") else None)


def prompt_of(prompts: dict[str, HiddenPrompt], model: str) -> HiddenPrompt:
    return prompts.get(model) or prompts.get("*") or HiddenPrompt()
