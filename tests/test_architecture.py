"""Who may import whom, and how large things may grow. The layers themselves are import-linter's contracts (`.importlinter`)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("conf", "actors", "orchestration")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 450, 80
GOLD = "orchestration.data.world.gold"

CONFINED = {
    "alembic": ["orchestration/serving/store/"],
    "deepspeed": ["actors/engine.py"],
    "hydra": ["orchestration/config.py"],
    "nicegui": ["orchestration/serving/page/"],
    "omegaconf": ["orchestration/config.py"],
    "matplotlib": ["orchestration/sweep/plots.py"],
    "optuna": ["orchestration/sweep/search.py"],
    "ray": ["orchestration/runtime/", "orchestration/jobs/client.py", "orchestration/serving/deployments.py"],
    "ray.job_submission": ["orchestration/jobs/client.py"],
    "ray.serve": ["orchestration/serving/deployments.py"],
    "ray.tune": ["orchestration/runtime/trials.py"],
    "sqlalchemy": ["orchestration/serving/store/"],
    "vllm": ["actors/rollout_vllm.py", "actors/serving/vllm_engine.py"],
}
"""Each package, and the files or folders that may import it."""


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, wherever the import stands; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def importers(module: str) -> list[str]:
    """The files of the program that import a module or anything below it."""
    found = []
    for file in SOURCES:
        if any(name == module or name.startswith(f"{module}.") for name in imported(file.read_text(encoding="utf-8"))):
            found.append(name_of(file))
    return found


def test_import_linter_keeps_every_contract() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize("package", CONFINED)
def test_a_package_is_imported_only_where_it_may_be(package: str) -> None:
    allowed = CONFINED[package]
    elsewhere = [file for file in importers(package) if not any(file == a or (a.endswith("/") and file.startswith(a)) for a in allowed)]
    assert elsewhere == []


def test_imports_are_found_wherever_they_stand() -> None:
    source = "def f():\n    import ray.train\n    from a.b import c\n    importlib.import_module('vllm.x')\n"
    assert set(imported(source)) == {"ray.train", "a.b", "a.b.c", "vllm.x"}
    assert importers("deepspeed") == ["actors/engine.py"]
    assert importers("hydra") == ["orchestration/config.py"]


def test_the_exact_grade_is_seen_by_the_labeller_and_the_evaluation_alone() -> None:
    assert importers(GOLD) == ["orchestration/data/labeler.py", "orchestration/stages/evaluate.py"]


def without_docstrings(tree: ast.AST) -> ast.AST:
    """The tree, with an empty text in place of every text that stands as a line of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return tree


def of_the_exact_grade(source: str) -> set[str]:
    """Names and texts in the code that have to do with the exact grade, or with files that it is in."""
    words = re.findall(r"\w+", ast.unparse(without_docstrings(ast.parse(source))))
    return {word for word in words if re.search("gold|grade|curve|metrics|evaluat|conversations", word)}


def test_a_sweep_reads_the_exact_grade_nowhere() -> None:
    """Not its name, and no file or figure of a run that holds it: what wins is the held-out judge's word alone."""
    files = [file for file in SOURCES if "orchestration/sweep/" in name_of(file)] + [ROOT / "orchestration/runtime/trials.py"]
    assert len(files) > 8
    assert {name_of(file): found for file in files if (found := of_the_exact_grade(file.read_text(encoding="utf-8")))} == {}
    assert of_the_exact_grade('"""The gold standard."""\nscore = point["gold"]\n') == {"gold"}


def test_algorithms_and_batches_import_torch_and_the_schema_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    for file in [*(ROOT / "actors" / "algorithms").glob("*.py"), ROOT / "actors" / "batch.py"]:
        for module in imported(file.read_text(encoding="utf-8")):
            ours = module.startswith(("actors.algorithms", "actors.batch", "conf.schema"))
            assert ours or module.split(".")[0] in allowed, f"{name_of(file)} imports {module}"


@pytest.mark.parametrize(
    ("opens", "where"),
    [("is_master=True", "actors/rendezvous.py"), ("ray.init(", "orchestration/runtime/connection.py"),
     ("TorchConfig(backend", None), ("init_method=", None)],
)  # fmt: skip
def test_what_listens_is_opened_in_one_place_that_closes_it_to_others(opens: str, where: str | None) -> None:
    """Ray and torch would listen on all addresses of the machine."""
    found = [name_of(file) for file in SOURCES if opens in file.read_text(encoding="utf-8")]
    assert found == ([where] if where else [])


def test_the_program_does_not_import_its_tests() -> None:
    assert importers("tests") == []
    assert importers("conftest") == []


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [name_of(file) for file in SOURCES if file.stem in ("utils", "util", "common", "helpers", "misc")] == []


def test_files_and_functions_stay_readable() -> None:
    long_files = [name_of(file) for file in SOURCES if len(file.read_text(encoding="utf-8").splitlines()) > LONGEST_FILE]
    long_functions = [
        f"{name_of(file)}:{node.name}"
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert long_files == []
    assert long_functions == []


def test_every_module_says_what_it_is() -> None:
    def empty(tree: ast.Module) -> bool:
        return not tree.body

    trees = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES}
    assert [name for name, tree in trees.items() if not empty(tree) and not ast.get_docstring(tree)] == []


def test_contributing_names_every_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    packages = [folder.parent.name for folder in ROOT.glob("*/__init__.py") if folder.parent.name != "tests"]
    assert sorted(packages) == sorted(PACKAGES)
    assert [name for name in packages if f"`{name}`" not in text] == []


HEAVY = ("torch", "transformers", "deepspeed", "hydra")


@pytest.mark.parametrize("module", ["orchestration.runtime.rank", "orchestration.runtime.machine"])
def test_what_runs_on_every_node_starts_without_torch(module: str) -> None:
    """A rank's empty process, and what looks at a node: a hundred of them would otherwise import gigabytes at once."""
    show = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_rank_starts_without_sklearn_and_can_import_it_once_it_is_built() -> None:
    """transformers would import it for every rank; a reward function of the user's may need it."""
    show = (
        "import sys; from orchestration.runtime.rank import RayRank; rank = RayRank({}); hidden = sys.modules['sklearn'] is None; "
        "rank.build(lambda *_: None, None, '', None, []); import sklearn; print(hidden, sklearn.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True", "sklearn"]
