"""A checkpoint is copied to a node once, and again only when it has changed."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from actors.reference import Reference
from actors.staging import staged
from actors.worker import RankSpec, process_group_of_one
from tests.fakes import rollouts, saved_lm, smoke


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were copied."""
    names: list[str] = []
    plain = shutil.copyfile

    def copyfile(source: str, target: str, **more: bool) -> str:
        names.append(Path(source).name)
        return plain(source, target, **more)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    return names


def checkpoint(folder: Path) -> Path:
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_text("1")
    (folder / "part/more").write_text("2")
    return folder


def test_ranks_that_come_together_copy_it_once(tmp_path: Path, copied: list[str]) -> None:
    source = checkpoint(tmp_path / "shared")
    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(lambda _: staged(str(source), str(tmp_path / "local")), range(8)))
    assert sorted(copied) == ["more", "weights"]
    (place,) = places
    assert (Path(place) / "part/more").read_text() == "2"
    assert Path(place).parent == tmp_path / "local"


def test_what_has_changed_is_copied_again_and_the_older_copy_goes(tmp_path: Path) -> None:
    source, other = checkpoint(tmp_path / "shared"), checkpoint(tmp_path / "other")
    first, beside = (Path(staged(str(folder), str(tmp_path / "local"))) for folder in (source, other))
    (source / "weights").write_text("changed")
    second = Path(staged(str(source), str(tmp_path / "local")))
    assert (second / "weights").read_text() == "changed"
    assert not first.exists() and beside.is_dir()


def test_a_copy_that_was_cut_short_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "shared")
    with monkeypatch.context() as broken:
        broken.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            staged(str(source), str(tmp_path / "local"))
    assert (Path(staged(str(source), str(tmp_path / "local"))) / "weights").read_text() == "1"


def test_without_a_folder_and_for_a_name_on_the_hub_nothing_is_copied(tmp_path: Path) -> None:
    assert staged(str(tmp_path), None) == str(tmp_path)
    assert staged("some/model", str(tmp_path / "local")) == "some/model"
    assert not (tmp_path / "local").exists()


def test_a_role_loads_its_copy(tmp_path: Path) -> None:
    process_group_of_one()
    path = saved_lm(tmp_path / "lm")
    found = []
    for more in ((), (f"engine.stage_folder={tmp_path}/local",)):
        role = Reference(smoke(*more), path, RankSpec("reference", 0, 1, 1))
        role.load()
        found.append(role.logprobs([rollouts(3, 4)], 1.0)[0])
    assert role.checkpoint.startswith(f"{tmp_path}/local") and torch.equal(*found)
