"""A wheel of exactly the code that runs here: from a checkout by setuptools, from an installation by its RECORD.

Only the three packages and what builds them go in: no runs, no data, no history, nothing of the folder that the command is given in. The
same code gives the same bytes, so that a cluster that has a wheel already is not sent it again.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import conf
from orchestration.errors import RequestError

PACKAGES = ("conf", "actors", "orchestration")
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")
LEFT_OUT = ("__pycache__", "*.pyc", ".*")
INSTALLERS = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")
"""What an installer adds to a wheel's own files."""
EPOCH = 315532800
"""1 January 1980, the earliest time that a zip file can hold: files' own times would make every wheel another one."""
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


@dataclass(frozen=True)
class Wheel:
    """A file, and what it was made from."""

    file: Path
    sha256: str
    commit: str
    """Of the checkout; "" for an installation."""
    dirty: bool
    """Whether what was packed differs from that commit."""


def build(folder: Path) -> Wheel:
    """Write the wheel into `folder`.

    Raises:
        RequestError: the code here cannot be packed.
    """
    home = Path(conf.__file__).resolve().parent.parent
    checkout = (home / "pyproject.toml").is_file()
    file = _from_checkout(home, folder) if checkout else _from_installation(home, folder)
    commit, dirty = _commit(home) if checkout else ("", False)
    return Wheel(file, hashlib.sha256(file.read_bytes()).hexdigest(), commit, dirty)


def as_zip(wheel: Wheel) -> Path:
    """The same bytes under a name by which Ray unpacks them. Ray would have pip install a .whl with all its requirements, and know it
    again by its name alone; unpacked, a wheel of pure Python is installed."""
    return Path(shutil.copy(wheel.file, wheel.file.with_suffix(".zip")))


def _from_checkout(home: Path, folder: Path) -> Path:
    source = folder / "source"  # a copy: setuptools leaves its own files beside what it builds
    source.mkdir(parents=True)
    for name in BUILT_FROM:
        shutil.copy(home / name, source / name)
    for name in PACKAGES:
        shutil.copytree(home / name, source / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH)}
    command = [sys.executable, "-P", "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RequestError(f"no wheel can be built of {home}: {reason}; `pip install 'setuptools>=77'` if it is missing")
    return folder / done.stdout.strip().splitlines()[-1]


def _commit(home: Path) -> tuple[str, bool]:
    """("", True) where there is no git, or no checkout of chatray's own."""
    try:
        commit = _git(home, "rev-parse", "HEAD")
        return commit, bool(_git(home, "status", "--porcelain", "--", *PACKAGES, *BUILT_FROM))
    except (OSError, subprocess.CalledProcessError):
        return "", True


def _git(home: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(home), *words], capture_output=True, text=True, check=True).stdout.strip()


def _from_installation(home: Path, folder: Path) -> Path:
    found = [one for one in importlib.metadata.distributions(path=[str(home)]) if one.metadata["Name"] == "chatray"]
    if not found:
        raise RequestError(f"no wheel can be made of {home}: it is neither a checkout nor an installation of chatray; install it with pip")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"chatray-{found[0].version}-py3-none-any.whl"
    record = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in _installed(found[0], home):
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(content)}")
            _add(packed, name, content)
        name = f"chatray-{found[0].version}.dist-info/RECORD"
        _add(packed, name, "".join(f"{line}\n" for line in [*sorted(record), f"{name},,"]).encode())
    return file


def _installed(distribution: importlib.metadata.Distribution, home: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files that the wheel had, as they are now."""
    for path in sorted(distribution.files or [], key=str):
        top, last = path.parts[0], path.parts[-1]
        inside = top in PACKAGES or (top.endswith(".dist-info") and last not in INSTALLERS)
        if not inside or path.suffix == ".pyc":
            continue
        try:
            yield path.as_posix(), (home / path).read_bytes()
        except OSError as cause:
            raise RequestError(
                f"no wheel can be made of {home}: {path} of its RECORD cannot be read ({cause}); install it again"
            ) from cause


def _add(packed: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name)  # of 1980, as every ZipInfo is
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    packed.writestr(entry, content)
