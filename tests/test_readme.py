"""What the documents say can be done: commands parse, make targets exist, named files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orchestration import cli
from orchestration import config as configuration

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "cluster/README.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FOLDERS = (".", "data", "reward", "taskmaster-4/data", "taskmaster-4/reward", "self-instruct", "demonstrations", "comparisons", "texts")
FOLDER_SETTINGS = ("model.path", "policy_checkpoint", "reward_checkpoint")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks in one of the languages."""
    return [content for language, content in FENCE.findall(text) if language in languages]


def command_lines(text: str) -> list[str]:
    """Lines of shell blocks, continued lines joined, comments and variables for one command dropped."""
    joined = "\n".join(blocks(text, "bash", "sh")).replace("\\\n", " ")
    return [re.sub(r"^(\w+=\S* )+", "", line.strip()) for line in joined.splitlines() if line.strip()]


def chatray_commands() -> list[tuple[str, str]]:
    lines = [(document, line) for document in DOCUMENTS for line in command_lines(text_of(document))]
    shell = [(document, line) for document, line in lines if line.startswith("chatray ")]
    inline = [(document, code) for document in DOCUMENTS for code in re.findall(r"`(chatray [^`]*)`", text_of(document))]
    return sorted({*shell, *inline})


def make_targets() -> list[tuple[str, str]]:
    return sorted({(d, target) for d in DOCUMENTS for target in re.findall(r"(?:`|^|&& )make ([a-z-]+)", text_of(d), re.MULTILINE)})


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Stand-ins for the folders that the documents name: every shipped set's, and a Hugging Face checkpoint."""
    for part in FOLDERS:
        (tmp_path / "sets" / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sets" / part / "x.json.gz").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return {"data.path": str(tmp_path / "sets"), **{name: str(tmp_path / "model") for name in FOLDER_SETTINGS}}


def stood_in(word: str, folders: dict[str, str]) -> str:
    key, sign, value = word.partition("=")
    return f"{key}{sign}{folders.get(key, value)}"


@pytest.mark.parametrize(("document", "command"), chatray_commands())
def test_every_command_parses(document: str, command: str, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, verb, *words = shlex.split(command, comments=True)
    assert verb in cli.VERBS, f"{document}: {command}"
    if verb == "data":
        assert words[0] == "show"
    if verb == "doctor":  # it asks the cluster it is given; what the words may be is its own test's
        assert set(words) <= {"--json", "ray.address=auto"}
        return
    if verb == "serve":
        own = ("run", "checkpoint", "stage", "--yaml")
        configuration.load([word for word in words if word.partition("=")[0] not in own], tmp_path, reads_data=False, consistent=False)
        return
    if verb == "plan":
        configuration.load([word for word in words if word != "--json"], tmp_path, reads_data=False)
        return
    if verb in ("run", "config"):
        configuration.load([stood_in(word, folders) for word in words], tmp_path)
        return
    # An option that does not exist makes the command stop after it has looked at all of them: it must be the only one found wrong.
    assert cli.main([verb, *words, "no_such_option=1"]) == 2
    mistakes = capsys.readouterr().err.strip().splitlines()
    assert len(mistakes) == 1, mistakes
    assert "no_such_option" in mistakes[0]


def test_the_documents_show_every_verb() -> None:
    assert {shlex.split(command)[1] for _, command in chatray_commands()} == set(cli.VERBS)


@pytest.mark.parametrize(("document", "target"), make_targets())
def test_every_make_target_exists(document: str, target: str) -> None:
    assert re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE), f"{document} mentions make {target}"


def test_the_first_screen_shows_the_two_commands() -> None:
    first_screen = "\n".join(text_of("README.md").splitlines()[:40])
    assert "make quickstart" in first_screen
    assert "make test" in first_screen


def tree_paths() -> list[str]:
    """Paths of the tree in README.md: one entry per line, two spaces deeper inside a folder."""
    (tree,) = [block for block in blocks(text_of("README.md"), "text") if "orchestration/" in block]
    parents: list[str] = []
    found = []
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if not name:
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        found.append("".join(parents))
    return found


@pytest.mark.parametrize("path", tree_paths())
def test_everything_in_the_tree_exists(path: str) -> None:
    there = ROOT / path
    assert there.is_dir() if path.endswith("/") else there.is_file()


def test_every_module_is_in_the_tree() -> None:
    modules = {
        file.relative_to(ROOT).as_posix()
        for package in ("conf", "actors", "orchestration")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert modules - set(tree_paths()) == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", text_of(document))
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_settings_exist(document: str) -> None:
    """Dotted names in backticks whose first part is a section of the configuration."""
    known = set(configuration.leaves(configuration.Config))
    sections = {name.split(".")[0] for name in known if "." in name}
    named = {name for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", text_of(document)) if name.split(".")[0] in sections}
    files = {name for name in named if name.rsplit(".", 1)[1] in ("py", "yaml", "json", "jsonl")}
    figures = {name for name in named if not any(k == name or k.startswith(f"{name}.") for k in known)}
    assert figures - files - set(summary_fields(document)) == set()


def summary_fields(document: str) -> list[str]:
    """Names in the table of summary.json's fields."""
    return re.findall(r"^\| `([a-z_.0-9]+)` \|", text_of(document), re.MULTILINE)
