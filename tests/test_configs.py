"""Every configuration that is shipped composes, and no setting stands without a line of documentation."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import conf
from conf.moderation import Moderation
from conf.schema import PPO_ROLES, Config
from conf.sweeps import Sweep
from orchestration import config as configuration
from orchestration.sweep.run import request

FOLDER = Path(conf.__file__).resolve().parent
FILES = sorted(FOLDER.rglob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (FOLDER / "experiment").glob("*.yaml"))
FOLDERS = (".", "data", "reward", "taskmaster-4/data", "taskmaster-4/reward", "self-instruct", "demonstrations", "comparisons", "texts")
GROUP_CHOICES = [(group, name) for group, names in configuration.groups().items() if group != "experiment" for name in names]


@pytest.fixture
def files(tmp_path: Path) -> str:
    """A folder with the layouts of all shipped file sources; its files are empty, and composing reads none of them."""
    for name in FOLDERS:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "x.json.gz").touch()
    return str(tmp_path)


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def overrides_for(experiment: str, files: str) -> list[str]:
    needs_files = any("override /data" in entry for entry in read(FOLDER / "experiment" / f"{experiment}.yaml")["defaults"])
    return [f"experiment={experiment}", *([f"data.path={files}"] if needs_files else [])]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str, files: str) -> None:
    config = configuration.load(overrides_for(experiment, files))
    assert config.experiment == experiment
    assert Path(config.run_dir).name == experiment


@pytest.mark.parametrize(("group", "name"), GROUP_CHOICES)
def test_every_choice_of_every_group_composes(group: str, name: str, files: str) -> None:
    experiment = "taskmaster_coffee" if (group == "data" and name != "world") or name == "recorded" else "quickstart"
    stage = ["stage=sft"] if name == "instructions" else []  # it holds no preferences
    config = configuration.load([*overrides_for(experiment, files), f"{group}={name}", *stage])
    chosen = configuration.as_dict(config)[group] if group != "experiment" else {}
    given = read(FOLDER / group / f"{name}.yaml") if group in ("placement", "labeler") else {}
    assert holds(chosen, given)


def test_every_scale_and_experiment_can_work_in_turns(files: str) -> None:
    """What is offloaded in a preset may be offloaded where all roles share the GPUs and sleep."""
    scales = [["experiment=smoke", f"scale={file.stem}"] for file in sorted((FOLDER / "scale").glob("*.yaml"))]
    for words in (*scales, *(overrides_for(experiment, files) for experiment in EXPERIMENTS)):
        config = configuration.load([*words, "placement=colocated"], consistent=False)
        assert config.placement.sleep
        refused = [text for text in configuration.contradictions(config) if "offload" in text or "placement.sleep" in text]
        assert refused == [], words


def holds(chosen: Any, given: Any) -> bool:
    """Whether everything that a file gives, but for interpolations, stands in what was chosen."""
    if isinstance(given, dict):
        return all(holds(chosen[key], value) for key, value in given.items())
    return chosen == given or str(given).startswith("${")


@pytest.mark.parametrize("name", sorted(file.stem for file in (FOLDER / "sweep").glob("*.yaml")))
def test_every_sweep_can_be_asked_for(name: str) -> None:
    asked = request([f"sweep={name}", "experiment=quickstart", "ppo.lr=2e-4"])
    assert asked.config.ppo.lr == 2e-4 and len(asked.space.dimensions) == 3


@pytest.mark.parametrize("file", sorted((FOLDER / "scale").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_scale_names_itself(file: Path) -> None:
    assert read(file)["name"] == file.stem


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_names_itself(name: str) -> None:
    assert read(FOLDER / "experiment" / f"{name}.yaml")["experiment"] == name


def prefix_of(file: Path) -> str:
    """Where a file's keys stand in the whole: experiments and config.yaml at the root, the others below their group."""
    return "" if file.parent == FOLDER or file.parent.name == "experiment" else f"{file.parent.name}."


def keys(section: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_every_key_is_a_setting(file: Path) -> None:
    content = {name: value for name, value in read(file).items() if name != "defaults"}
    settings = {*configuration.leaves(Config), *configuration.leaves(Sweep, "sweep.")}
    optional = "data.pretrain."  # a whole section or null; composing the file checks what is in it
    unknown = sorted(
        key for key in keys(content, prefix_of(file)) if key not in settings and not key.startswith((optional, "sweep.space."))
    )
    assert not unknown, f"{file} sets what schema.py does not know"


def test_every_setting_has_a_default() -> None:
    """Only what the schema itself gives a default may be missing from the YAML files."""
    given = {key for file in FILES for key in keys({n: v for n, v in read(file).items() if n != "defaults"}, prefix_of(file))}
    defaulted = {"scale.embedding", "scale.post_layer_norm"}
    defaulted |= {f"serving.moderation.{field.name}" for field in dataclasses.fields(Moderation)}
    defaulted |= {f"placement.{role}.tensor_parallel" for role in ("train", *PPO_ROLES)}
    assert set(configuration.leaves(Config)) - given - defaulted == set()


def settings_without_doc(source: str) -> list[str]:
    """`Class.field` of every annotated class field that has no string beneath it."""
    found = []
    for section in [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]:
        for node, after in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and not is_text(after):
                found.append(f"{section.name}.{ast.unparse(node.target)}")
    return found


def is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_every_setting_is_documented_beneath_itself() -> None:
    source = "".join(
        (FOLDER / name).read_text(encoding="utf-8")
        for name in (
            "settings.py",
            "sizes.py",
            "engines.py",
            "machines.py",
            "sources.py",
            "ppo.py",
            "serving.py",
            "moderation.py",
            "schema.py",
            "sweeps.py",
        )
    )
    assert source.count('"""') > 100
    assert settings_without_doc(source) == []


def test_a_missing_line_of_documentation_is_noticed() -> None:
    assert settings_without_doc('class A:\n    x: int\n    """Here."""\n    y: int\n') == ["A.y"]
