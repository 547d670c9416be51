"""The recipe through the real command line: what it leaves, going on, refusing, and failing well."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import COMMAND, Chatray, ray_processes, wait_until_gone

from orchestration.data.chat import Chat
from orchestration.data.dialogues import Dialogue, Message
from orchestration.run_directory import RunDirectory, read_records, sealed
from tests.intruder import Listening

pytestmark = pytest.mark.ray

STAGES = ("sft", "compare", "reward_model", "ppo", "evaluate")
FIGURES = {
    "sft": {"heldout_nats_per_token", "heldout_nats_per_char"},
    "reward_model": {"heldout_pairwise_accuracy", "labeler_ceiling", "baseline_pairwise_accuracy"},
    "ppo": {"kl", "kl_budget"},
    "evaluate": {
        "gold_win_rate_vs_sft", "gold_win_rate_ci95", "gold_win_rate_greedy", "prompts", "rm_score_sft", "rm_score_ppo", "kl",
    },
}  # fmt: skip


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def without(run: Path, *stages: str) -> None:
    """Take stages out of a finished run, as if they had not been run."""
    manifest = json.loads((run / "manifest.json").read_text())
    for stage in stages:
        del manifest["stages"][stage]
        shutil.rmtree(run / "round_01" / stage)
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_leaves_every_stage_and_headline_figure(smoke_run: Path) -> None:
    found = summary(smoke_run)
    assert found["seconds"] > 0 and found["peak_rss_bytes"] > 1e8
    assert set(found["stages"]) == set(STAGES)
    for stage, names in FIGURES.items():
        assert names <= found["stages"][stage].keys()
    for stage in ("sft", "reward_model", "ppo"):
        steps = [record["step"] for record in read_records(smoke_run / "round_01" / stage / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1)) and steps
    for name in ("config.yaml", "manifest.json", "report.html"):
        assert (smoke_run / name).stat().st_size > 0


def test_a_run_listens_on_loopback_alone(smoke_listening: Listening) -> None:
    """GCS, raylet, driver, workers, agents, and where ranks of roles and of Ray Train meet."""
    names = " ".join(smoke_listening.inet.values())
    assert all(part in names for part in ("gcs_server", "raylet", "RayRank", "RayTrainWorker")), "they were not seen at all"
    assert smoke_listening.open_to_others() == []


def test_wandb_and_tensorboard_wrote_offline_files(smoke_run: Path) -> None:
    assert list(smoke_run.glob("wandb/offline-run-*/*.wandb"))
    assert list(smoke_run.glob("tensorboard/events*"))


def test_the_first_update_starts_from_ratio_one_and_the_reference(smoke_run: Path) -> None:
    first = read_records(smoke_run / "round_01" / "ppo" / "metrics.jsonl")[0]
    assert abs(first["kl"]) < 1e-4
    assert first["first_clip_share"] == 0 and abs(first["first_kl"]) < 1e-6


def test_bytes_and_seconds_of_weight_sync_are_in_every_steps_row(smoke_run: Path) -> None:
    size = (smoke_run / "round_01/ppo/checkpoint/model.safetensors").stat().st_size
    for row in read_records(smoke_run / "round_01" / "ppo" / "metrics.jsonl"):
        assert row["seconds_sync"] > 0
        assert row["sync_bytes"] == pytest.approx(size, rel=0.1)  # float32 both, and the file has a header


def test_no_run_leaves_start_models_or_resume_states(smoke_run: Path) -> None:
    left = [p.name for p in (smoke_run / "round_01").glob("*/*") if p.name in ("start", "state", "ray_train")]
    assert left == []


def test_the_exported_model_loads_with_plain_transformers_and_its_template_is_the_training_format(smoke_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smoke_run / "round_01" / "ppo" / "checkpoint"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": "what is my city?"}, {"role": "assistant", "content": "your city is rome."}]
    dialogue = Dialogue("x", tuple(Message(**m) for m in messages))
    template = tokenizer.apply_chat_template(messages, return_dict=False)
    assert template == Chat(tokenizer).encode(dialogue)[0]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert prompt == Chat(tokenizer).prompt(Dialogue("x", dialogue.messages[:1]))
    out = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert out.shape[1] > len(prompt)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_same_command_again_runs_nothing(smoke_run: Path, chatray: Chatray, tmp_path: Path) -> None:
    """Nor does one with settings that change no result."""
    run = copy_of(smoke_run, tmp_path)
    for more in ((), ("engine.micro_batch=4", "deadlines.step=99")):
        done = chatray("run", "experiment=smoke", "run_dir=run", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("complete, skipped") == len(STAGES)
        assert summary(run) == summary(smoke_run)


def test_a_changed_setting_is_refused_with_the_difference(smoke_run: Path, chatray: Chatray, tmp_path: Path) -> None:
    run = copy_of(smoke_run, tmp_path)
    done = chatray("run", "experiment=smoke", "run_dir=run", "ppo.lr=5e-5", cwd=tmp_path)
    assert done.returncode == 2
    assert "settings.ppo.lr: was 0.0001, is now 5e-05" in done.stderr and "from=ppo" in done.stderr
    assert summary(run) == summary(smoke_run)


def test_from_runs_a_stage_and_those_after_it_again(smoke_run: Path, chatray: Chatray, tmp_path: Path) -> None:
    run = copy_of(smoke_run, tmp_path)
    done = chatray("run", "experiment=smoke", f"run_dir={run}", "runtime=local", "evaluate.bootstrap=50", "from=evaluate", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("complete, skipped") == 4 and "evaluate: done" in done.stderr


def test_a_killed_ppo_goes_on_from_its_commit_and_ends_as_if_never_killed(smoke_run: Path, chatray: Chatray, tmp_path: Path) -> None:
    """The local runtime: the same numbers, bit by bit. (The chaos suite kills the Ray runtime.)"""
    words = ("run", "experiment=smoke", "runtime=local", "stage=ppo", "ppo.steps=4", "commit.every=1", "from=ppo")
    whole, killed = copy_of(smoke_run, tmp_path / "a"), copy_of(smoke_run, tmp_path / "b")
    done = chatray(*words, f"run_dir={whole}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen([COMMAND, *words, f"run_dir={killed}"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stage = RunDirectory(killed, 1).stage("ppo")
    while process.poll() is None and not (point := stage.last()):
        psutil.wait_procs([psutil.Process(process.pid)], timeout=0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert point is not None and point.step < 4, "the kill came too late to prove anything"
    done = chatray(*words[:-1], f"run_dir={killed}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [read_records(run / "round_01/ppo/metrics.jsonl") for run in (whole, killed)]
    assert [r["step"] for r in records[1]] == [1, 2, 3, 4]
    for one, other in zip(*records, strict=True):
        assert (one["kl"], one["policy_loss"], one["value_loss"]) == (other["kl"], other["policy_loss"], other["value_loss"])


def test_a_stage_alone_says_how_to_get_what_it_starts_from(chatray: Chatray, tmp_path: Path) -> None:
    done = chatray("run", "experiment=smoke", "stage=ppo", cwd=tmp_path)
    assert done.returncode == 2
    assert "stage=sft" in done.stderr and "policy_checkpoint=<folder>" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_stage_alone_starts_from_named_weights(smoke_run: Path, chatray: Chatray, tmp_path: Path) -> None:
    weights = f"policy_checkpoint={smoke_run}/round_01/sft/checkpoint", f"reward_checkpoint={smoke_run}/round_01/reward_model/checkpoint"
    done = chatray("run", "experiment=smoke", "stage=ppo", "runtime=local", "ppo.steps=1", "ppo.ptx=1.0", *weights, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(summary(tmp_path / "runs/smoke")["stages"]) == ["ppo"]


def test_half_of_a_run_goes_on(smoke_run: Path, chatray: Chatray, tmp_path: Path) -> None:
    run = copy_of(smoke_run, tmp_path)
    without(run, "evaluate")
    done = chatray("run", "experiment=smoke", f"run_dir={run}", "runtime=local", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("complete, skipped") == 4


def test_chat_answers_on_the_terminal(smoke_run: Path, chatray: Chatray) -> None:
    done = chatray("chat", "run=run", cwd=smoke_run.parent, stdin="my city is rome.\nwhat is my city?\n")
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("> ") for line in done.stdout.splitlines()) == 3


def test_report_again(smoke_run: Path, chatray: Chatray) -> None:
    done = chatray("report", "run=run", "conversations=1", cwd=smoke_run.parent)
    assert done.returncode == 0 and "Gold score, PPO" in done.stdout


WRONG = {
    "misspelt key": (["ppo.lrr=1"], ["ppo.lrr", "did you mean ppo.lr"]),
    "unknown scale": (["scale=tinny"], ["scale=tinny", "tiny"]),
    "k is 1": (["compare.k_min=1"], ["compare.k_min=1"]),
    "batch not divisible": (["ppo.batch=15"], ["ppo.batch=15", "ppo.minibatches=2"]),
    "missing file": (["experiment=taskmaster_coffee", "data.path=nowhere"], ["data.path=", "nowhere"]),
    "no such stage": (["stage=train"], ["stage='train'"]),
    "ill typed": (["ppo.steps=many", "seed=-1"], ["ppo.steps='many'", "seed=-1"]),
    "no model there": (["model.path=./nowhere"], ["model.path="]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_ends_in_one_clear_error_before_anything_starts(case: str, chatray: Chatray, tmp_path: Path) -> None:
    words, expected = WRONG[case]
    done = chatray("run", *([] if words[0].startswith("experiment") else ["experiment=smoke"]), *words, cwd=tmp_path, seconds=60)
    assert done.returncode == 2, done.stderr
    for text in expected:
        assert text in done.stderr
    assert len(done.stderr.splitlines()) <= 24 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_the_needed_tokens_is_refused(chatray: Chatray, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>").save_pretrained(tmp_path / "tok")
    done = chatray("run", "experiment=smoke", "runtime=local", "model.tokenizer=./tok", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "model.tokenizer" in done.stderr and "<|assistant|>" in done.stderr and "Traceback" not in done.stderr
    assert sealed(tmp_path / "runs/smoke/round_01/sft/checkpoint") is None


def test_an_empty_set_is_refused(chatray: Chatray, tmp_path: Path) -> None:
    for part in ("data", "reward"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "rows.json").write_text("[]")
    done = chatray("run", "experiment=taskmaster_coffee", "runtime=local", "placement=cpu", "data.path=.", cwd=tmp_path)
    assert done.returncode == 2 and "holds no rows" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_with_its_own_conf_actors_and_tests_does_not_shadow_ours(smoke_run: Path, chatray: Chatray, tmp_path: Path) -> None:
    for name in ("conf", "actors", "tests", "orchestration"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package was imported')")
    run = copy_of(smoke_run, tmp_path)
    without(run, "evaluate")
    done = chatray("run", "experiment=smoke", f"run_dir={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    module = subprocess.run(
        [sys.executable, "-m", "orchestration.cli", "config"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert module.returncode != 0 and "wrong package" in module.stderr


def test_another_actors_package_first_on_the_path_fails_loudly(chatray: Chatray, tmp_path: Path) -> None:
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([COMMAND, "run", "experiment=smoke"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "not beside chatray's own code" in done.stderr


def test_a_finished_run_leaves_no_ray_process(smoke_run: Path) -> None:
    mine = psutil.Process().pid
    left = wait_until_gone(lambda: [p for p in ray_processes() if mine not in {parent.pid for parent in p.parents()}])
    assert not left
