"""The words of `chatray submit` and `chatray jobs`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestration.config import ALIASES, nearest
from orchestration.errors import RequestError

ADDRESS = "CHATRAY_ADDRESS"
"""Environment variable with the address, where the command line has none."""
ASKS = ("list", "status", "follow", "stop")
SECRET = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
AGAIN_NOT = ("from", ALIASES["from"])
"""Words that a resumed run must not have: they discard results."""


@dataclass(frozen=True)
class Submission:
    """What is to be submitted."""

    address: str
    words: tuple[str, ...]
    """Settings of the run."""
    follow: bool = False
    folder: str = "~"
    """On the cluster: what relative paths start from."""
    secrets: tuple[str, ...] = ()
    """Names of environment variables whose values the cluster has."""

    def options(self) -> list[str]:
        """Those that the program on the cluster is told as well."""
        return ["--folder", self.folder, *(word for name in self.secrets for word in ("--secret", name))]

    def again(self) -> list[str]:
        """The command that goes on with this run."""
        kept = [word for word in self.words if word.partition("=")[0] not in AGAIN_NOT]
        return ["chatray", "submit", "--address", self.address, *self.options(), "run", *kept]


@dataclass(frozen=True)
class Ask:
    """What is asked of jobs."""

    address: str
    verb: str
    job: str = ""


@dataclass
class _Options:
    """`--name value` and `--name=value`, until a word that is no option."""

    values: dict[str, list[str]] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)

    def last(self, name: str, default: str = "") -> str:
        return self.values.get(name, [default])[-1]


def submission(words: Sequence[str]) -> Submission:
    """`[--address URL] [--follow] [--folder DIR] [--secret NAME]... run settings...`.

    Raises:
        RequestError: with every mistake.
    """
    found = _options(words, with_value=("--address", "--folder", "--secret"), flags=("--follow",))
    mistakes, verb, settings = found.mistakes, found.rest[:1], tuple(found.rest[1:])
    if verb != ["run"] and not mistakes:
        mistakes.append(
            f"submit {' '.join(verb)}: after its options comes what is to be run: chatray submit --address URL run experiment=…"
        )
    mistakes += [f"--secret {name}: not a name of an environment variable" for name in _wrong_names(found)]
    given = {word.partition("=")[0].lstrip("+") for word in settings}
    if "ray.address" in given:
        mistakes.append("ray.address: a job runs on the cluster that it is submitted to; leave it out")
    if "runtime=local" in settings:
        mistakes.append("runtime=local: a job's ranks run on the cluster that it is submitted to; leave it out")
    folder = found.last("--folder", "~")
    if not folder.startswith(("/", "~")):
        mistakes.append(f"--folder {folder}: not the whole path of a folder on the cluster; begin it with / or ~")
    address = _address(found)
    if mistakes:
        raise RequestError(mistakes)
    return Submission(address, settings, "--follow" in found.values, folder, tuple(found.values.get("--secret", ())))


def ask(words: Sequence[str]) -> Ask:
    """`[list | status ID | follow ID | stop ID] [--address URL]`.

    Raises:
        RequestError: with every mistake.
    """
    named, options = [], []
    left = list(words)
    while left:  # options stand anywhere
        if left[0].startswith("--"):
            options += left[: 1 if "=" in left[0] else 2]
            left = left[1 if "=" in left[0] else 2 :]
        else:
            named.append(left.pop(0))
    found = _options(options, with_value=("--address",), flags=())
    verb, *more = named or ["list"]
    mistakes = found.mistakes
    if verb not in ASKS:
        raise RequestError([*mistakes, f"jobs {verb}: no such command; did you mean {nearest(verb, ASKS)[0]}? There are {', '.join(ASKS)}"])
    identifiers = [word for word in more if "=" not in word][: int(verb != "list")]
    mistakes += [f"jobs {verb} {word}: no such option" for word in more if word not in identifiers]
    if verb != "list" and not identifiers and not mistakes:
        mistakes.append(f"jobs {verb}: needs the id of a job; chatray jobs list shows them")
    address = _address(found) if not mistakes else ""
    if mistakes:
        raise RequestError(mistakes)
    return Ask(address, verb, *identifiers)


def _wrong_names(found: _Options) -> list[str]:
    return [name for name in found.values.get("--secret", ()) if not SECRET.fullmatch(name)]


def _options(words: Sequence[str], with_value: Sequence[str], flags: Sequence[str]) -> _Options:
    found, left = _Options(), list(words)
    while left and left[0].startswith("--"):
        name, sign, value = left.pop(0).partition("=")
        if name in flags and not sign:
            found.values[name] = [""]
        elif name not in with_value:
            found.mistakes.append(f"{name}: no such option; did you mean {nearest(name, [*with_value, *flags])[0]}?")
        elif sign or left:
            found.values.setdefault(name, []).append(value if sign else left.pop(0))
        else:
            found.mistakes.append(f"{name}: needs a value")
    found.rest = left
    return found


def _address(found: _Options) -> str:
    """Raises:
    RequestError: there is none.
    """
    address = found.last("--address") or os.environ.get(ADDRESS, "")
    if not address:
        raise RequestError([*found.mistakes, f"--address: needed, for example --address http://head:8265 (or set {ADDRESS})"])
    return with_scheme(address)


def with_scheme(address: str) -> str:
    """Raises:
    RequestError: it is one of Ray's own protocol, not of its HTTP API.
    """
    scheme = address.partition("://")[0] if "://" in address else ""
    if scheme and scheme not in ("http", "https"):
        raise RequestError(f"--address {address}: jobs are submitted over HTTP; give the dashboard's address, http://<head>:8265")
    return (address if scheme else f"http://{address}").rstrip("/")
