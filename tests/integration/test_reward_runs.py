"""Whole runs with rewards that people bring."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from actors.models import ScalarModel, load_causal_lm, new_causal_lm, save_model
from orchestration import config as configuration
from orchestration import recipe
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.world import scenarios
from orchestration.errors import RequestError, RunError
from orchestration.run_directory import read_records

TINY = ("experiment=smoke", "runtime=local", "logging.progress=false", "data.demonstrations=64", "data.prompts=64", "data.heldout=8",
        "ppo.batch=8", "sft.steps=2", "evaluate.prompts=8")  # fmt: skip
SHORT = "ppo.rewards=[{kind: function, function: 'tests.fakes:brief', name: short}]"


def run(folder: Path, *words: str) -> dict[str, Any]:
    return recipe.run(configuration.load([*TINY, f"run_dir={folder}", *words]))


def ppo_records(folder: Path) -> list[dict[str, float]]:
    """Figures of every step but the times and the checks, of which a run that goes on makes more."""
    records = read_records(folder / "round_01/ppo/metrics.jsonl")
    return [{k: v for k, v in record.items() if "second" not in k and k != "checks"} for record in records]


def model(folder: Path, texts: int) -> str:
    """A tiny language model, and a reward model on it, whose tokenizer was learned from so many dialogues."""
    config = configuration.load(["experiment=smoke"])
    chat = Chat(learn_tokenizer(scenarios.demonstrations(texts, 0, config.data.flaws), config.scale.vocabulary))
    new_causal_lm(config.scale, len(chat.tokenizer), 0, 0.0, chat.end, chat.pad).save_pretrained(folder / "lm")
    (folder / "rm").mkdir()
    reward = ScalarModel(load_causal_lm(str(folder / "lm")).base_model, seed=1)
    save_model(reward, reward.state_dict(), folder / "rm")
    for part in ("lm", "rm"):
        chat.save(folder / part)
    return str(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model(tmp_path_factory.mktemp("start"), 200)


def test_a_function_needs_no_reward_model_stage_by_stage_and_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, "stage=sft")
    run(folder, "stage=ppo", SHORT)
    records = ppo_records(folder)
    for record in records:
        assert record["score_short"] == pytest.approx(record["score"], abs=1e-5) and record["score"] < 0
        assert "running_score_mean" not in record
    summary = run(folder, SHORT)  # the stages that are there are left as they are
    assert summary["stages"].keys() == {"sft", "ppo", "evaluate"}
    assert summary["stages"]["evaluate"]["rm_score_ppo"] < 0
    assert ppo_records(folder) == records
    with pytest.raises(RequestError, match="rewards"):
        run(folder, SHORT.replace("brief", "replies_of"))


class Service:
    """Rewards as long as the replies; out of order from a given request on."""

    def __init__(self) -> None:
        self.asked, self.broken_from = 0, 10**9
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked += 1
                text = json.dumps({"rewards": [len(reply) for reply in body["replies"]]}).encode()
                self.send_response(200 if service.asked < service.broken_from else 503)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.mark.parametrize("normalise", ["running", "none"])
def test_a_service_that_goes_down_ends_the_run_and_the_same_command_goes_on_as_if_it_had_not(
    normalise: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    service = Service()

    def ppo(folder: Path, tries: int) -> dict[str, Any]:
        source = f"ppo.rewards=[{{kind: http, url: '{service.url}', tries: {tries}, backoff: 0.01}}]"
        words = ("stage=ppo", f"policy_checkpoint={start}/lm", "ppo.steps=4", "commit.every=2", f"ppo.reward_normalise={normalise}", source)
        return run(folder, *words)

    ppo(tmp_path / "whole", 2)
    service.asked, service.broken_from = 0, 4  # one request a step: the fourth step has no rewards
    with pytest.raises(RunError) as failed:
        ppo(tmp_path / "broken", 2)
    for part in ("reward rank 0 failed in score", service.url, "in 2 tries over", "HTTP 503"):
        assert part in str(failed.value)
    assert len(ppo_records(tmp_path / "broken")) == 3
    service.broken_from = 10**9
    ppo(tmp_path / "broken", 9)  # how patient one is may change
    assert ppo_records(tmp_path / "broken") == ppo_records(tmp_path / "whole")
    assert ("running_score_std" in ppo_records(tmp_path / "whole")[0]) == (normalise == "running")
    service.server.shutdown()
    service.server.server_close()


def test_a_reward_model_of_another_tokenizer_scores_text_and_the_critic_starts_from_sft(start: str, tmp_path: Path) -> None:
    other = model(tmp_path, 40)
    ours = ("stage=ppo", f"policy_checkpoint={start}/lm", "ppo.steps=1")
    run(tmp_path / "own", *ours, f"reward_checkpoint={other}/rm")
    run(tmp_path / "named", *ours, f"ppo.rewards=[{{kind: model, path: '{other}/rm', name: theirs}}]")
    (own,), (named,) = ppo_records(tmp_path / "own"), ppo_records(tmp_path / "named")
    assert named.pop("score_theirs") == pytest.approx(named["score"], abs=1e-6)
    assert own == named


def test_a_named_model_of_the_policys_tokenizer_is_the_same_as_a_run_with_it_as_its_own(start: str, tmp_path: Path) -> None:
    ours = ("stage=ppo", f"policy_checkpoint={start}/lm", "ppo.steps=2")
    run(tmp_path / "own", *ours, f"reward_checkpoint={start}/rm")
    run(tmp_path / "named", *ours, f"ppo.rewards=[{{kind: model, path: '{start}/rm'}}]")
    named = ppo_records(tmp_path / "named")
    assert [record.pop("score_model") for record in named] == pytest.approx([record["score"] for record in named], abs=1e-6)
    assert named == ppo_records(tmp_path / "own"), "scores, and a critic that starts from the same weights"


def test_reward_model_and_critic_may_be_of_another_size_than_the_policy(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    own = ("reward_model.start=own", "scale@reward_scale=micro", "reward_scale.layers=1", "reward_scale.width=24", "reward_scale.heads=2")
    run(folder, *own)
    assert [record["step"] for record in ppo_records(folder)] == [1, 2, 3]
    shapes = {stage: json.loads((folder / f"round_01/{stage}/checkpoint/config.json").read_text()) for stage in ("ppo", "reward_model")}
    assert (shapes["ppo"]["hidden_size"], shapes["reward_model"]["hidden_size"]) == (32, 24)
    assert not (folder / "round_01/reward_model/start").exists()
    assert all(record["explained_variance"] < 1 for record in ppo_records(folder))
    with pytest.raises(RequestError, match="takes 32 tokens and the policy 256"):
        run(folder, *own, "reward_scale.context=32", "from=reward_model", "stage=reward_model")
