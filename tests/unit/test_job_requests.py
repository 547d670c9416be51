"""Jobs without a cluster: the command line, the wheel, secrets, and a server that is another Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestration import cli, on_cluster
from orchestration.errors import RequestError
from orchestration.jobs import submit, wheel
from orchestration.jobs.client import Job, Jobs
from orchestration.jobs.watch import RUN_DIR
from orchestration.jobs.words import Submission, ask, submission, with_scheme

ROOT = Path(__file__).resolve().parents[2]
HERE = ("--address", "http://head:8265")


def test_options_stand_before_run_and_settings_after_it() -> None:
    words = [
        "--address=head:8265",
        "--follow",
        "--folder",
        "/data",
        "--secret",
        "A",
        "--secret=B",
        "run",
        "experiment=smoke",
        "ppo.steps=3",
    ]
    wanted = submission(words)
    assert wanted == Submission("http://head:8265", ("experiment=smoke", "ppo.steps=3"), True, "/data", ("A", "B"))


def test_the_address_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATRAY_ADDRESS", "https://cluster/")
    assert submission(["run"]).address == "https://cluster" == ask(["list"]).address


def test_the_resumed_run_discards_nothing() -> None:
    wanted = submission([*HERE, "--folder", "/data", "run", "experiment=smoke", "from=ppo", "rerun_from=sft"])
    assert wanted.again() == ["chatray", "submit", *HERE, "--folder", "/data", "run", "experiment=smoke"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "--address: needed"),
        ([*HERE, "plan"], "submit plan: after"),
        ([*HERE], "submit : after"),
        ([*HERE, "--folow", "run"], "did you mean --follow?"),
        ([*HERE, "--secret", "A=b", "run"], "--secret A=b: not a name"),
        ([*HERE, "--folder", "runs", "run"], "--folder runs: not the whole path"),
        ([*HERE, "run", "ray.address=auto"], "ray.address: a job runs on the cluster"),
        ([*HERE, "run", "runtime=local"], "runtime=local: a job's ranks"),
        (["--address", "ray://head:10001", "run"], "jobs are submitted over HTTP"),
        (["--address"], "--address: needs a value"),
    ],
)
def test_a_wrong_submission_is_refused(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATRAY_ADDRESS", raising=False)
    with pytest.raises(RequestError, match="") as refused:
        submission(words)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stpo", "a-1"], "did you mean stop?"),
        (["stop"], "jobs stop: needs the id"),
        (["stop", "a-1", "b-2"], "jobs stop b-2: no such option"),
        (["list", "x=1"], "jobs list x=1: no such option"),
    ],
)
def test_a_wrong_question_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        ask([*words, *HERE])
    assert refused.value.mistakes == [refused.value.mistakes[0]] and said in refused.value.mistakes[0]


def test_options_of_a_question_stand_anywhere() -> None:
    asked = [ask(["stop", "a-1", *HERE]), ask([*HERE, "stop", "a-1"]), ask(["stop", *HERE, "a-1"])]
    assert {(one.verb, one.job, one.address) for one in asked} == {("stop", "a-1", "http://head:8265")}
    assert ask([*HERE]).verb == "list"
    assert with_scheme("head:1") == "http://head:1"


def test_settings_that_do_not_exist_are_refused_before_anything_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--address", "http://127.0.0.1:1", "run", "experiment=smoke", "ppo.lrr=1"]) == 2
    assert "ppo.lrr: no such setting; did you mean ppo.lr?" in capsys.readouterr().err


class Known:
    """Jobs that a cluster knows."""

    address = "http://head:8265"

    def __init__(self, *jobs: tuple[str, str]) -> None:
        self.jobs = [Job(name, status, "", {RUN_DIR: "/runs/a b"}, 0.0, None) for name, status in jobs]

    def all(self) -> list[Job]:
        return [*self.jobs, Job("somebody-else", "RUNNING", "", {}, 0.0, None)]


def test_jobs_of_a_run_are_numbered() -> None:
    first = submit._free_name(Known(), "/runs/a b")  # type: ignore[arg-type]
    assert first.startswith("a-b-") and first.endswith("-1")
    later = submit._free_name(Known((first, "STOPPED"), (first[:-1] + "12", "FAILED")), "/runs/a b")  # type: ignore[arg-type]
    assert later == first[:-1] + "13"


def test_a_run_that_is_at_work_is_not_submitted_again() -> None:
    name = submit._free_name(Known(), "/runs/a b")  # type: ignore[arg-type]
    for status in ("PENDING", "RUNNING"):
        with pytest.raises(RequestError, match=f"job {name} is at work there"):
            submit._free_name(Known((name, status)), "/runs/a b")  # type: ignore[arg-type]


@pytest.fixture
def wheels(tmp_path: Path) -> wheel.Wheel:
    return wheel.build(tmp_path / "built")


def test_the_wheel_has_all_of_the_code_and_nothing_else(wheels: wheel.Wheel, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheels.file).namelist())
    code = {
        file.relative_to(ROOT).as_posix()
        for package in wheel.PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert code <= names
    assert {name for name in names - code if ".dist-info/" not in name} == set()
    assert wheel.build(tmp_path / "again").sha256 == wheels.sha256
    assert not list(ROOT.glob("build")) and wheel.as_zip(wheels).read_bytes() == wheels.file.read_bytes()


def test_an_installed_wheel_packs_itself_again(wheels: wheel.Wheel, tmp_path: Path) -> None:
    """With what was changed in it since."""
    place = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place), str(wheels.file)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    (place / "conf" / "scale" / "tiny.yaml").write_text("changed")
    show = "import sys, pathlib; from orchestration.jobs import wheel; print(wheel.build(pathlib.Path(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": str(place)}
    command = [sys.executable, "-c", show, str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "commit='', dirty=False" in done.stdout
    old, new = zipfile.ZipFile(wheels.file), zipfile.ZipFile(tmp_path / "again" / wheels.file.name)
    assert sorted(old.namelist()) == sorted(new.namelist())
    differing = {name for name in old.namelist() if old.read(name) != new.read(name)}
    assert {name for name in differing if not name.endswith("RECORD")} == {"conf/scale/tiny.yaml"}
    again = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "2"), new.filename]
    assert subprocess.run(again, check=False, capture_output=True, timeout=120).returncode == 0


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cluster's head, as a job sees it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATRAY_SECRETS", str(tmp_path / "secrets"))
    monkeypatch.setenv("IN_ENVIRONMENT", "one")
    monkeypatch.setenv("IN_FILE", "")
    monkeypatch.delenv("IN_FILE")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "IN_FILE").write_text("two\n")
    return tmp_path


def test_secrets_are_read_where_the_job_runs(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    on_cluster.settle(submission([*HERE, "--folder", str(at_home), "--secret", "IN_FILE", "--secret", "IN_ENVIRONMENT", "run"]))
    assert (os.environ["IN_FILE"], os.environ["IN_ENVIRONMENT"]) == ("two", "one")


def test_a_secret_that_the_cluster_does_not_have_is_named(at_home: Path) -> None:
    with pytest.raises(RequestError) as refused:
        on_cluster.settle(submission([*HERE, "--folder", str(at_home), "--secret", "NOWHERE", "--secret", "IN_ENVIRONMENT", "run"]))
    (said,) = refused.value.mistakes
    assert said.startswith("--secret NOWHERE: the cluster has none") and str(at_home / "secrets") in said and "one" not in said.split()


def test_a_driver_sees_no_gpu() -> None:
    """From before anything imports torch, which looks once; whoever imports the module keeps theirs."""
    show = (
        "import os, sys; from orchestration import on_cluster; before = os.environ['CUDA_VISIBLE_DEVICES']; "
        "on_cluster._run = lambda wanted: print(before, repr(os.environ['CUDA_VISIBLE_DEVICES']), 'torch' in sys.modules); "
        "on_cluster.main(['run', 'run', 'experiment=smoke'])"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["0,1", "''", "False"]


def test_a_job_is_noted_in_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run-1", "run-2"):
        monkeypatch.setenv("CHATRAY_JOB", json.dumps({"job": name, "code": {"commit": "abc"}}))
        on_cluster.note_job(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "jobs.jsonl").read_text().splitlines()]
    assert [line["job"] for line in lines] == ["run-1", "run-2"]
    assert lines[0]["code"] == {"commit": "abc"} and "deepspeed" in lines[0]["versions"]


def test_a_check_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "try"
    with on_cluster.nothing_left(run):
        run.mkdir(parents=True)
    assert list(tmp_path.iterdir()) == []
    run.mkdir(parents=True)
    with pytest.raises(RequestError), on_cluster.nothing_left(run):
        raise RequestError("refused")
    assert run.is_dir()


class Answering(BaseHTTPRequestHandler):
    """A server that says what Ray it is."""

    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Answering) as started:
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"version": "4", "ray_version": "2.9.3", "ray_commit": "x"}', "the cluster runs Ray 2.9.3, and chatray here Ray 2."),
        (b"<html>hello</html>", "no Ray cluster answers there"),
    ],
    ids=["another Ray", "no Ray"],
)
def test_what_answers_must_be_this_ray(server: HTTPServer, body: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "body", body)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray's client would go there
    with pytest.raises(RequestError, match=said):
        Jobs(f"http://127.0.0.1:{server.server_port}")
