"""The notebook runs from its first cell to its last on a finished run, and draws."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.ray

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "01_the_recipe.ipynb"
PLOTS = 3
"""Cells that draw on any run: the loss of SFT, the reward model's bars, PPO's curves."""


def executed(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The notebook after its execution in `folder`; a cell that fails raises."""
    monkeypatch.setenv("CHATRAY_RUN", str(run))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def drawn(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_notebook_walks_a_finished_run(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(smoke_run, tmp_path, monkeypatch)
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert drawn(notebook) >= PLOTS
    shown = "".join(output.get("text", "") for output in outputs(notebook))
    assert "reply:" in shown, "the last cell lets the exported model answer"
    assert list(tmp_path.iterdir()) == [], "the notebook only reads"


def test_notebook_works_where_no_exact_grade_exists(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on real data: judgements in place of rankings, AUC in place of pairwise accuracy, nothing graded exactly."""
    run = recorded_copy(smoke_run, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    notebook = executed(run, tmp_path / "elsewhere", monkeypatch)
    assert drawn(notebook) >= PLOTS
    assert "gold" not in "".join(output.get("text", "") for output in outputs(notebook))


def recorded_copy(run: Path, copy: Path) -> Path:
    """A run's files as a run on recorded judgements would have written them; weights are linked, not copied."""
    for file in run.rglob("*"):
        if file.is_file() and "state" not in file.parts:
            there = copy / file.relative_to(run)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.symlink_to(file)
    summary = json.loads((run / "summary.json").read_text())
    stages = summary["stages"]
    stages["compare"] = {"judgements": 2, "good_share": 0.5, "heldout_judgements": 1, "seconds": 1.0}
    stages["reward_model"] = {"heldout_auc": 0.7, "baseline_auc": 0.6, "heldout_loss": 0.6, "steps": 2.0, "seconds": 1.0}
    stages["evaluate"] = {name: value for name, value in stages["evaluate"].items() if not name.startswith("gold_")}
    rewritten(copy / "summary.json", json.dumps(summary))
    judged = {"id": "a", "context": [{"role": "user", "content": "one latte please"}], "reply": "Which size?", "good": True}
    rewritten(copy / "round_01" / "compare" / "checkpoint" / "comparisons.jsonl", json.dumps(judged) + "\n")
    metrics = copy / "round_01" / "reward_model" / "metrics.jsonl"
    rewritten(metrics, metrics.read_text().replace("heldout_pairwise_accuracy", "heldout_auc"))
    return copy


def rewritten(file: Path, text: str) -> None:
    file.unlink()
    file.write_text(text, encoding="utf-8")
