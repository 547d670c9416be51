"""API keys: a YAML file of names, hashes and limits. A key itself is printed once, when it is made, and stored nowhere.

    - {name: alice, sha256: 9f86d0…, requests_per_minute: 60, tokens_per_day: 200000}

Keys are 32 random bytes, so one round of SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf.serving import Limits
from orchestration.errors import RequestError
from orchestration.serving.errors import ApiError, too_many

FIELDS = {"name", "sha256", "requests_per_minute", "tokens_per_day"}
MINUTE, DAY = 60.0, 86400.0


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether an address cannot be reached from elsewhere."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Owner:
    """Whoever asks: a key, or everybody where there are no keys."""

    id: str
    """What stands in the store and in the log: no part of the key can be got from it."""
    name: str
    requests_per_minute: int
    tokens_per_day: int


class Keys:
    """Who a key belongs to. None of it: there are no keys, and everybody is one owner."""

    def __init__(self, entries: Sequence[tuple[str, Owner]] | None, limits: Limits) -> None:
        self.entries = None if entries is None else list(entries)
        self.everybody = Owner("local", "local", limits.requests_per_minute, limits.tokens_per_day)

    def owner(self, authorization: str | None) -> Owner:
        """The owner by the request's `Authorization` header.

        Raises:
            ApiError: 401.
        """
        if self.entries is None:
            return self.everybody
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise ApiError(401, "No API key was given: send it as Authorization: Bearer KEY.", kind="authentication_error")
        digest, found = hashed(key.strip()), None
        for known, owner in self.entries:  # all of them, in the same time whichever it is
            if hmac.compare_digest(known, digest):
                found = owner
        if found is None:
            raise ApiError(401, "This API key is not valid.", kind="authentication_error", code="invalid_api_key")
        return found


def read_keys(path: str | None, limits: Limits) -> Keys:
    """Keys of a file.

    Raises:
        RequestError: it cannot be read or has another form; quotes nothing of it.
    """
    if path is None:
        return Keys(None, limits)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise RequestError(f"serving.keys={path}: cannot be read as YAML ({type(cause).__name__}); make it with chatray key") from None
    if not isinstance(content, list) or not content:
        raise RequestError(f"serving.keys={path}: not a list of keys; make it with chatray key")
    return Keys([_entry(path, number, entry, limits) for number, entry in enumerate(content, start=1)], limits)


def _entry(path: str, number: int, entry: Any, limits: Limits) -> tuple[str, Owner]:
    if not isinstance(entry, dict) or not entry.keys() <= FIELDS or not {"name", "sha256"} <= entry.keys():
        raise RequestError(f"serving.keys={path}: entry {number} needs name and sha256, and may have {', '.join(sorted(FIELDS))}")
    digest = str(entry["sha256"]).lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise RequestError(f"serving.keys={path}: entry {number} has no SHA-256 in hexadecimal; the key itself has no place there")
    numbers = {name: entry.get(name, getattr(limits, name)) for name in ("requests_per_minute", "tokens_per_day")}
    if not all(isinstance(value, int) and value >= 0 for value in numbers.values()):
        raise RequestError(f"serving.keys={path}: entry {number} has a limit that is no whole number")
    return digest, Owner(f"key-{digest[:16]}", str(entry["name"]), **numbers)


def make_key(path: Path, name: str) -> str:
    """Add a key to the file, which only its owner can read then; gives the key back, which is nowhere else."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else []
    if not isinstance(content, list) or any(isinstance(entry, dict) and entry.get("name") == name for entry in content):
        raise RequestError(f"file={path}: not a list of keys, or it has one named {name} already")
    key = f"cr-{secrets.token_urlsafe(32)}"
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        yaml.safe_dump([*content, {"name": name, "sha256": hashed(key)}], file, sort_keys=False)
    os.replace(aside, path)
    return key


class Quotas:
    """Requests of the last minute and tokens of the last 24 hours, of each owner, in this process."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.requests: dict[str, deque[float]] = {}
        self.tokens: dict[str, deque[tuple[float, int]]] = {}

    def admit(self, owner: Owner) -> None:
        """Count a request.

        Raises:
            ApiError: 429, with the time to wait.
        """
        now = self.clock()
        if owner.tokens_per_day:
            spent = self.tokens.setdefault(owner.id, deque())
            while spent and spent[0][0] <= now - DAY:
                spent.popleft()
            if sum(count for _, count in spent) >= owner.tokens_per_day:
                wait = spent[0][0] + DAY - now
                raise too_many("The tokens of this API key are used up for now.", wait, "insufficient_quota", "insufficient_quota")
        if owner.requests_per_minute:
            made = self.requests.setdefault(owner.id, deque())
            while made and made[0] <= now - MINUTE:
                made.popleft()
            if len(made) >= owner.requests_per_minute:
                raise too_many("Too many requests of this API key in a minute.", made[0] + MINUTE - now)
            made.append(now)

    def spend(self, owner: Owner, tokens: int) -> None:
        """Count tokens read and written."""
        if owner.tokens_per_day and tokens:
            spent = self.tokens.setdefault(owner.id, deque())
            now = self.clock()
            if spent and now - spent[-1][0] < MINUTE:
                spent[-1] = (spent[-1][0], spent[-1][1] + tokens)
            else:
                spent.append((now, tokens))
