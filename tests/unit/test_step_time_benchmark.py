"""The benchmark harness: ratios of pairs, tables between markers, and two rounds of the bare loop against stage `ppo`."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.benchmarks import bench, paired, report
from tests.benchmarks.bare_loop import BareLoop
from tests.benchmarks.step_time import ours, pairs, tables
from tests.benchmarks.step_time.prepared import prepare
from tests.benchmarks.step_time.settings import SETTINGS, load
from tests.benchmarks.step_time.turns import EndedError


def test_the_ratio_is_the_median_of_the_pairs_ratios_not_the_ratio_of_medians() -> None:
    ours, theirs = [1.0, 2.0, 30.0], [2.0, 8.0, 40.0]
    assert paired.ratio(ours, theirs).median == 0.5  # of 0.5, 0.25, 0.75; medians alone would give 0.25


def test_what_slows_both_sides_of_a_pair_cancels() -> None:
    rng = np.random.default_rng(0)
    clock, noise = rng.uniform(1, 10, 40), rng.normal(1, 0.01, 40)
    found = paired.ratio(list(0.4 * clock * noise), list(clock))
    assert found.low < 0.4 < found.high
    assert found.high - found.low < 0.02


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    draws = [np.exp(rng.normal(0, 0.3, 25)) for _ in range(200)]
    covered = [found.low <= 1 <= found.high for found in (paired.ratio(list(draw), [1.0] * 25) for draw in draws)]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_one_pair_has_no_spread_and_more_pairs_have_less() -> None:
    one = paired.ratio([1.0], [2.0])
    assert (one.low, one.median, one.high, one.pairs) == (0.5, 0.5, 0.5, 1)
    rng = np.random.default_rng(2)
    few, many = (paired.ratio(list(rng.uniform(1, 2, n)), [1.0] * n) for n in (20, 500))
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_times_that_make_no_ratio_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pairs need|not above 0"):
        paired.ratio(ours, theirs)


def test_a_section_is_replaced_and_nothing_else() -> None:
    text = "# Benchmarks\n\nbefore\n\n<!-- bench:a -->\nold\n<!-- /bench:a -->\n\nafter\n"
    found = report.replaced(text, "a", "new\n")
    assert found == text.replace("old", "new")
    assert report.replaced(found, "a", "new") == found


def test_a_section_that_is_not_there_comes_at_the_end_and_is_found_again() -> None:
    once = report.replaced("# Benchmarks\n", "b", "first")
    assert once == "# Benchmarks\n\n<!-- bench:b -->\nfirst\n<!-- /bench:b -->\n"
    assert report.replaced(once, "b", "second") == once.replace("first", "second")


@pytest.mark.parametrize("text", ["<!-- bench:a -->", "<!-- /bench:a -->\n<!-- bench:a -->", "<!-- bench:a --><!-- /bench:a -->" * 2])
def test_spoilt_markers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="markers"):
        report.replaced(text, "a", "new")


class InThread:
    """Stage `ppo` as a contestant in a thread of this process: importing everything once more would take longer than all its steps."""

    arm = "ours"

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.orders: queue.Queue[str] = queue.Queue()
        self.answers: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self.thread = threading.Thread(target=self.work, args=(folder, run_dir), daemon=True)
        self.thread.start()
        self.answer()

    def work(self, folder: Path, run_dir: Path) -> None:
        try:
            ours.compete(self, folder, run_dir, "fp32")  # type: ignore[arg-type]
        except BaseException as error:
            self.answers.put(error)

    def hand_over(self, answer: dict[str, Any]) -> None:
        self.answers.put(answer)
        if self.orders.get(timeout=120) != "go":
            raise EndedError

    def answer(self) -> dict[str, Any]:
        found = self.answers.get(timeout=300)
        if isinstance(found, BaseException):
            raise found
        return found

    def step(self) -> tuple[float, dict[str, Any]]:
        self.orders.put("go")
        found = self.answer()
        return found["seconds"], found

    def end(self) -> None:
        self.orders.put("stop")
        self.thread.join(timeout=120)
        assert not self.thread.is_alive()


class Bare:
    """The bare loop as a contestant."""

    arm = "bare"

    def __init__(self, folder: Path) -> None:
        self.loop, self.number = BareLoop(load(folder), folder, "fp32"), 0
        self.step()

    def step(self) -> tuple[float, dict[str, Any]]:
        found = self.loop.step(self.number)
        self.number += 1
        return found["seconds"], found


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two rounds of stage `ppo` against the bare loop."""
    out = tmp_path_factory.mktemp("bench")
    folder = prepare(SETTINGS["smoke"], out, "no coffee")
    contestant = InThread(folder, out / "run")
    try:
        named = {"setting": "smoke"}
        assert pairs.contest([contestant, Bare(folder)], 2, time.monotonic() + 600, out / "rounds.jsonl", named) == 2
    finally:
        contestant.end()
    return pairs.read(out / "rounds.jsonl", "smoke")


def test_both_contestants_do_the_same_work(rounds: list[dict[str, Any]]) -> None:
    """Weights, prompts, samples, minibatches and losses are the same: so are scores and KL after two updates and after three."""
    assert len(rounds) == 2
    for line in rounds:
        ppo, bare = line["figures"]["ours"], line["figures"]["bare"]
        assert ppo["reply_tokens"] == bare["reply_tokens"] == 4
        assert ppo["score"] == pytest.approx(bare["score"], abs=1e-4)
        assert ppo["kl"] == pytest.approx(bare["kl"], abs=1e-4)
        assert min(line["seconds"].values()) > 0
    assert rounds[0]["figures"]["ours"]["score"] != rounds[1]["figures"]["ours"]["score"]


class Clocked:
    """A contestant that takes no time, and says that it took some."""

    def __init__(self, arm: str, seconds: float, log: list[str]) -> None:
        self.arm, self.seconds, self.log = arm, seconds, log

    def step(self) -> tuple[float, dict[str, Any]]:
        self.log.append(self.arm)
        return self.seconds, {}


def test_rounds_go_to_and_fro_after_a_warm_up_and_are_kept(tmp_path: Path) -> None:
    log: list[str] = []
    both = [Clocked("ours", 1.0, log), Clocked("theirs", 2.0, log)]
    assert pairs.contest(both, 2, time.monotonic() + 60, tmp_path / "rounds.jsonl", {"setting": "smoke"}) == 2
    assert log == ["ours", "theirs", "ours", "theirs", "theirs", "ours"]  # one round of warm-up, then there and back
    found = pairs.read(tmp_path / "rounds.jsonl", "smoke", ["theirs"])
    assert [line["seconds"] for line in found] == [{"ours": 1.0, "theirs": 2.0}] * 2
    assert pairs.read(tmp_path / "rounds.jsonl", "smoke", ["theirs", "bare"]) == []
    assert pairs.read(tmp_path / "rounds.jsonl", "fixed") == []


def test_no_round_begins_when_the_time_is_over(tmp_path: Path) -> None:
    assert pairs.contest([Clocked("ours", 1.0, [])], 5, time.monotonic() - 1, tmp_path / "rounds.jsonl", {}) == 0
    assert not (tmp_path / "rounds.jsonl").exists()


def test_a_finished_comparison_is_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "smoke").mkdir()
    SETTINGS["smoke"].save(tmp_path / "smoke")  # prepared, as far as it is looked at
    for _ in range(2):
        pairs.append(tmp_path / "rounds.jsonl", {"setting": "smoke", "seconds": {"theirs": 2.0, "ours": 1.0}})
    assert pairs.run("smoke", ["theirs", "ours"], 2, 1e9, tmp_path, "", "no such python", []) == 0


def test_memory_is_read_of_every_process_of_a_contestant(tmp_path: Path) -> None:
    shell = pairs.Contestant.start("bare", ["sh", "-c", "sleep 60 & read line"], tmp_path / "log", 1)
    watch = pairs.MemoryWatch(shell)
    try:
        while len(watch.largest) < 2:  # until the shell has started its child
            watch.look()
        watch.start()
        found = watch.stop()
    finally:
        for child in psutil.Process(shell.process.pid).children():
            child.kill()
        shell.end()
    assert sorted(name.split()[0] for name in found["processes"]) == ["driver", "sleep"]
    assert found["total"] >= max(found["processes"].values()) > 0


def test_a_contestant_that_dies_is_named_with_what_it_said(tmp_path: Path) -> None:
    dead = pairs.Contestant.start("bare", ["sh", "-c", "echo it broke >&2"], tmp_path / "log", 1)
    with pytest.raises(RuntimeError, match=r"(?s)bare ended.*it broke"):
        dead.answer()
    dead.end()


def measured(out: Path) -> None:
    """Rounds and memory of two contestants, made up: ours takes half of TRL's time and learns as it does."""
    for number in range(9):
        figures = {"score": float(number), "kl": 0.1 * number, "reply_tokens": 16.0, "seconds_rollout": 0.25}
        seconds = {"ours": 1.0 + number / 100, "theirs": 2.0 + number / 50}
        line = {"setting": "fixed", "session": number // 8, "seconds": seconds, "figures": {"ours": figures, "theirs": figures}}
        pairs.append(out / "rounds.jsonl", line)
    pairs.append(out / "rounds.jsonl", {"setting": "natural", "session": 0, "seconds": {"ours": 9.0}, "figures": {"ours": figures}})
    processes = {"policy 0 (12)": 90 << 20, "raylet (3)": 4 << 20, "gcs (4)": 5 << 20}
    pairs.append(out / "memory.jsonl", {"setting": "fixed", "arm": "ours", "total": 99 << 20, "processes": processes})


def test_tables_show_ratios_of_what_took_part_together_phases_learning_and_memory(tmp_path: Path) -> None:
    measured(tmp_path)
    ratios = tables.ratios(tmp_path, ["natural", "fixed"]).splitlines()
    assert len(ratios) == 3  # alone in its rounds, nothing is beside natural's
    assert ratios[2] == "| fixed | chatray, fp32 | TRL 1.12.0, fp32 | 1.04 | 2.08 | 0.500 (0.500 to 0.500, 9 pairs) | interval below 1 |"
    assert "rollout 0.25" in tables.phases(tmp_path, ["fixed"])
    assert "| fixed | chatray, fp32 | 8 | 1.00 to 6.00 | 0.10 to 0.60 | 16.00 to 16.00 |" in tables.learning(tmp_path, ["fixed"])
    assert "| fixed | chatray, fp32 | 99 | policy 0 90, others 9 |" in tables.memory(tmp_path, ["fixed"])


def test_only_the_tables_can_be_written_from_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(tmp_path)
    file = tmp_path / "BENCHMARKS.md"
    file.write_text("# Benchmarks\n")
    monkeypatch.setattr(report, "BENCHMARKS", file)
    monkeypatch.setattr("sys.argv", ["bench", "--tables", "--out", str(tmp_path)])
    bench.main()
    found = file.read_text()
    assert found.startswith("# Benchmarks\n\n<!-- bench:step-time -->\n")
    assert "0.500 (0.500 to 0.500, 9 pairs)" in found
    assert "no GPU" in found or "NVIDIA" in found
    bench.main()
    assert file.read_text() == found


def test_a_part_that_is_no_script_yet_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert [bench.script(part) for part in bench.SCRIPTS] == [None, None, None]


def test_a_part_that_is_a_script_is_what_the_script_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "control_plane.py").write_text("import sys\nprint('| ranks', *sys.argv[1:])\nprint('noise', file=sys.stderr)\n")
    monkeypatch.setattr(bench, "FOLDER", folder)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    found = (bench.script("control-plane") or "").split("\n\n")
    assert found[0] == "## What the driver itself costs"
    assert found[1].startswith("`python -m tests.benchmarks.control_plane`, ")
    assert found[2::2] == ["| ranks", "| ranks --ranks 256 --fake"]
    (folder / "control_plane.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"control-plane: .*control_plane ended with 3"):
        bench.script("control-plane")
