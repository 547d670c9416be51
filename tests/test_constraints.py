"""The pins of constraints.txt fit every requirement, on both versions of Python, of all extras and of both images.

What is installed here is asked without a network. vLLM's GPU build brings gigabytes and is not installed for a test: of it stand the
requirements that its wheel names (`schemas/vllm`), and a resolver reads what those bring along from the package index.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12")
VLLM = ROOT / "tests" / "schemas" / "vllm" / "requires_dist.txt"
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix", "platform_system": "Linux", "extra": ""}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    named = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in named}


def requirements() -> Iterator[tuple[str, Requirement]]:
    """(who asks, for what) of all that is pinned and installed here, of vLLM's GPU build, and of building chatray."""
    pinned = pins()
    for found in importlib.metadata.distributions():
        name = canonicalize_name(found.metadata["Name"])
        if name in pinned or name == "chatray":
            yield from ((name, Requirement(line)) for line in found.requires or [])
    yield from (("vllm", Requirement(line)) for line in VLLM.read_text(encoding="utf-8").splitlines())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    yield from (("pyproject.toml", Requirement(word)) for word in re.findall(r'"(setuptools[^"]*)"', project))


def refused(asked: Requirement, version: str) -> bool:
    """A pin admits every local build of its version (2.13.0 also 2.13.0+cpu), so a requirement of one is held against the plain version."""
    plain = Requirement(re.sub(r"\+\w+", "", str(asked)))
    return not plain.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_satisfies_whoever_requires_it(python: str) -> None:
    environment = LINUX | {"python_version": python, "python_full_version": f"{python}.9"}
    pinned = pins()
    wrong = {
        f"{who} wants {asked}, pinned is {pinned[name]}"
        for who, asked in requirements()
        if (name := canonicalize_name(asked.name)) in pinned
        and (asked.marker is None or asked.marker.evaluate(environment))
        and refused(asked, pinned[name])
    }
    assert not wrong


def test_the_requirements_of_vllm_are_those_of_the_pinned_release() -> None:
    assert f"| vLLM | {pins()['vllm']} |" in (ROOT / "tests" / "schemas" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "Dockerfile.cpu"])
def test_the_images_are_built_with_the_pins_as_they_are(dockerfile: str) -> None:
    text = (ROOT / "cluster" / dockerfile).read_text(encoding="utf-8")
    assert re.findall(r"--constraint (\S+)", text) == ["constraints.txt"]


def resolved(python: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """All extras together, as uv resolves them from the packages' metadata."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    assert uv, "uv is not installed: make install-dev"
    words = [
        uv, "pip", "compile", "--quiet", "--python-version", python, "--python-platform", "x86_64-unknown-linux-gnu", "--all-extras",
        "--constraint", "constraints.txt", "--no-sources", "--output-file", str(folder / f"{python}.txt"), "pyproject.toml",
    ]  # fmt: skip
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_all_extras_resolve_together_on_both_versions_of_python(tmp_path: Path) -> None:
    """Skipped where no package index answers, which in CI is a failure."""
    with ThreadPoolExecutor() as pool:
        found = dict(zip(PYTHONS, pool.map(lambda python: resolved(python, tmp_path), PYTHONS), strict=True))
    errors = {python: done.stderr for python, done in found.items() if done.returncode}
    if errors and not os.environ.get("CI") and all("No solution" not in error for error in errors.values()):
        pytest.skip(f"no package index: {next(iter(errors.values())).strip()[:300]}")
    assert not errors
    for python in PYTHONS:
        chosen = (tmp_path / f"{python}.txt").read_text(encoding="utf-8")
        assert f"vllm=={pins()['vllm']}" in chosen and f"setuptools=={pins()['setuptools']}" in chosen
