from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from conf.engines import VLLMRollout
from conf.schema import Config
from conf.sources import FilesData
from orchestration import config as configuration
from orchestration import roles
from orchestration.config import as_yaml, groups, leaves, load, nearest
from orchestration.errors import RequestError
from tests.fakes import smoke


def mistakes(*overrides: str) -> list[str]:
    """What is wrong with the request; the experiment is smoke unless one is named."""
    named = [] if any(text.startswith("experiment=") for text in overrides) else ["experiment=smoke"]
    with pytest.raises(RequestError) as refused:
        load([*named, *overrides], Path("/tmp"))
    return refused.value.mistakes


def taskmaster(folder: Path) -> Path:
    for place in (folder, folder / "taskmaster-4"):
        for part in ("data", "reward"):
            (place / part).mkdir(parents=True)
            (place / part / "a.json").write_text("[]")
    for place in (folder, folder / "self-instruct"):
        place.mkdir(exist_ok=True)
        (place / "a.jsonl.gz").touch()
    for place in ("demonstrations", "comparisons", "texts"):
        (folder / place).mkdir()
        (folder / place / "a.jsonl").touch()
    return folder


def test_every_mistake_is_reported_at_once() -> None:
    found = mistakes(
        "scale=huge",
        "ppo.minibatch=4",
        "sft.steps=0",
        "ppo.lr=fast",
        "what is this",
        "sft.lr=1e-3,1e-4",
        "nonsense=1",
        "data.flaws.opener=2",
    )
    assert len(found) == 8
    for part in (
        "no such scale; choose from",
        "ppo.minibatch",
        "sft.steps=0",
        "ppo.lr='fast'",
        "what is this",
        "a sweep",
        "nonsense",
        "opener=2",
    ):
        assert sum(part in text for text in found) == 1


def test_all_contradictions_are_reported_at_once() -> None:
    found = mistakes("compare.k_min=6", "compare.k_max=5", "labeler=recorded", "ppo.batch=15", "placement.policy.ranks=2", "runtime=local")
    assert len(found) == 6  # the batch over all ranks, over policy and critic ranks by minibatches; k; the labeller; the runtime


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("ppo.minibatch", "ppo.minibatches"), ("ppo.kl.betta", "ppo.kl.beta"), ("sed", "seed"), ("data.flaws.open", "data.flaws.opener")],
)
def test_an_unknown_setting_is_answered_with_the_nearest_one(typed: str, meant: str) -> None:
    assert mistakes(f"{typed}=1") == [f"{typed}: no such setting; did you mean {meant}?"]


def test_an_unknown_choice_is_answered_with_all_the_nearest_first() -> None:
    (text,) = mistakes("scale=13B")
    assert text.startswith("scale=13B: no such scale; choose from 13b, ")
    assert "175b" in text


WRONG_TYPE = (
    "sft.steps='3'",
    "sft.steps=3.5",
    "sft.steps=true",
    "sft.steps=null",
    "engine.offload_optimizer=1",
    "engine.offload_optimizer=yes_please",
    "run_dir=3",
    "ppo=3",
)
WRONG_RANGE = (
    "ppo.lr=-1",
    "ppo.lr=0",
    "ppo.lr=nan",
    "ppo.gamma=1.5",
    "labeler.agreement=0.5",
    "lora.dropout=1.0",
    "seed=-1",
    "engine.zero_stage=4",
    "sft.dropout=1.0",
)
WRONG_CHOICE = (
    "ray.address=local",
    "runtime=slurm",
    "model.dtype=fp16",
    "from=serve",
    "data.kind=files",
    "labeler.kind=people",
    "ppo.kl.controller=none",
)


@pytest.mark.parametrize("override", [*WRONG_TYPE, *WRONG_RANGE, *WRONG_CHOICE])
def test_a_value_of_the_wrong_type_or_range_is_refused_by_its_settings_name(override: str) -> None:
    (text,) = mistakes(override)
    assert text.startswith(override.partition("=")[0].removesuffix(".kind"))


@pytest.mark.parametrize(
    "override", ["ppo.lr=1", "engine.zero_stage=null", "engine.zero_stage=2", "logging.progress=false", "ppo.kl.beta=0"]
)
def test_values_of_the_right_type_are_taken(override: str) -> None:
    name, _, value = override.partition("=")
    found: object = load(["experiment=smoke", override], Path("/tmp"))
    for part in name.split("."):
        found = getattr(found, part)
    assert found == yaml.safe_load(value)


def test_an_infinite_learning_rate_is_refused() -> None:
    assert len(mistakes("ppo.lr=inf")) == 1


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["scale.heads=3"], "scale.width=32: not a multiple of scale.heads=3"),
        (["compare.k_max=3"], "compare.k_min=4: above compare.k_max=3"),
        (["ppo.max_new_tokens=256"], "ppo.max_new_tokens=256: leaves no room"),
        (["evaluate.max_new_tokens=999"], "evaluate.max_new_tokens=999"),
        (["ppo.batch=10", "placement.rollout.ranks=3"], "ppo.batch=10: not divisible by 3"),
        (["ppo.minibatches=3"], "ppo.batch=16: not divisible by ppo.minibatches=3"),
        (["ppo.ptx=1.0", "ppo.ptx_batch=3", "placement.policy.ranks=2"], "ppo.ptx_batch=3"),
        (["ppo.advantage=rloo"], "ppo.samples_per_prompt=1: ppo.advantage=rloo compares the replies to one prompt"),
        (["ppo.advantage=grpo"], "ppo.samples_per_prompt=1: ppo.advantage=grpo"),
        (["ppo.samples_per_prompt=3"], "ppo.batch=16: not divisible by ppo.samples_per_prompt=3"),
        (
            ["ppo.advantage=rloo", "ppo.samples_per_prompt=8", "ppo.batch=24", "placement.policy.ranks=2"],
            "ppo.batch=24: not divisible by ppo.samples_per_prompt=8 x placement.policy.ranks=2; ppo.advantage=rloo needs",
        ),
        (["ppo.dual_clip=1.2"], "ppo.dual_clip=1.2: not above 1 + ppo.clip=1.2"),
        (["ppo.dual_clip=1.0"], "ppo.dual_clip=1.0: Input should be greater than 1"),
        (["ppo.advantage=a2c"], "ppo.advantage='a2c'"),
        (["sft.batch=7", "placement.train.ranks=2"], "sft.batch=7: not divisible by placement.train.ranks=2"),
        (["runtime=local", "placement.critic.ranks=2"], "placement.critic.ranks=2: runtime=local"),
        (["labeler=recorded"], "labeler=recorded"),
        (["lora.rank=4", "lora.roles=[sft,policy]"], "lora.roles: stage sft starts from random weights"),
        (["lora.rank=4", "lora.roles=[]"], "lora.rank=4: lora.roles=[] names no model"),
        (["lora.rank=4", "ppo.batch=10", "placement.reference.ranks=7", "placement.rollout.ranks=3"], "ppo.batch=10: not divisible by 3"),
        (["experiment=taskmaster_coffee"], "data.path: needed"),
        (["experiment=taskmaster_coffee", "labeler=simulated"], "labeler=simulated: it can rank"),
        (["experiment=taskmaster_coffee", "data.path=/nowhere"], "data.path=/nowhere: there is no reward/*.json"),
        (["experiment=taskmaster_coffee", "data.mix=[]"], "data.mix=[]: at least one part"),
        (["experiment=hh_harmless", "data.path=/nowhere"], "data.path=/nowhere: there is no *.jsonl or *.ndjson or *.json in it"),
        (["experiment=hh_harmless", "data.mix=[{format: hh, path: nowhere}]"], "data.mix[0].path=/tmp/nowhere: there is no"),
        (["experiment=hh_harmless", "data.mix=[{format: dataset}]"], "data.mix[0]: format dataset needs a name and columns"),
        (["experiment=hh_harmless", "data.mix=[{format: csv}]"], "data.mix.0.format='csv'"),
        (["experiment=hh_harmless", "data.mix=[{format: hh, wait: 1}]"], "data.mix.0.wait: no such setting"),
        (["experiment=hh_harmless", "data.mix=[{format: messages}]"], "data.mix: messages hold no comparisons"),
        (["experiment=hh_harmless", "data.mix=[{format: hh}, {format: taskmaster}]"], "one reward model learns from one kind"),
        (["experiment=hh_harmless", "data.heldout_preferences=0"], "data.heldout_preferences=0: the reward model is measured"),
        (["experiment=hh_harmless", "++data.pretrain={format: messages, path: x}"], "data.pretrain.format=messages: plain text is needed"),
        (["reward_model.start=model"], "reward_model.start=model: simulated labellers"),
        (["ppo.staleness=1"], "ppo.staleness=1: samples of older weights must be corrected for; set ppo.importance_cap"),
        (["ppo.staleness=1", "ppo.importance_cap=2", "placement.sleep=true"], "roles that take turns (placement.sleep=true) cannot sample"),
        (["placement.critic.tensor_parallel=2"], "placement.critic.tensor_parallel=2: rollout engines alone"),
        (["reward_model.start=own"], "reward_model.start=own: of which size?"),
        (["scale@reward_scale=tiny"], "reward_scale=tiny: it counts with reward_model.start=own only"),
        (["reward_model.path=/nowhere", "reward_model.start=own"], "reward_model.path=/nowhere: no Hugging Face checkpoint"),
        (["scale@reward_scale=tiny", "reward_model.start=own", "lora.rank=2", "lora.roles=[reward_model]"], "from random weights, which"),
        (["policy_checkpoint=/nowhere"], "policy_checkpoint=/nowhere: no Hugging Face checkpoint"),
        (["model.path=/nowhere"], "model.path=/nowhere"),
        (["run_dir=/dev/null/run"], "run_dir=/dev/null/run: /dev/null is not a folder"),
    ],
)
def test_settings_that_contradict_each_other_or_the_disk_are_refused(overrides: list[str], wanted: str) -> None:
    assert any(wanted in text for text in mistakes(*overrides))


def test_the_scale_of_a_pretrained_model_does_not_limit_replies(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load(["experiment=smoke", f"model.path={tmp_path}", "ppo.max_new_tokens=900"], tmp_path).ppo.max_new_tokens == 900


@pytest.mark.parametrize("name", groups()["experiment"])
def test_every_shipped_experiment_composes(name: str, tmp_path: Path) -> None:
    folder = taskmaster(tmp_path)
    found = load([f"experiment={name}", *([f"data.path={folder}"] if name not in ("smoke", "quickstart") else [])], tmp_path)
    assert found.experiment == name
    assert found.run_dir == str(tmp_path / "runs" / name)


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in ("scale", "placement") for name in groups()[group]])
def test_every_shipped_choice_composes(group: str, name: str) -> None:
    found = load([f"{group}={name}"], Path("/tmp"))
    if group == "scale":
        assert found.scale.name == name
    else:
        assert found.placement.policy.ranks >= 1


def test_each_group_is_offered() -> None:
    assert {"scale", "placement", "data", "labeler", "experiment"} <= set(groups())


def test_relative_paths_become_absolute_from_the_working_directory(tmp_path: Path) -> None:
    taskmaster(tmp_path / "coffee")
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text("{}")
    found = load(
        [
            "experiment=taskmaster_coffee",
            "data.path=coffee",
            "run_dir=out/../here",
            "policy_checkpoint=lm",
            "reward_checkpoint=lm",
            "model.path=lm",
        ],
        tmp_path,
    )
    assert isinstance(found.data, FilesData)
    assert found.data.path == str(tmp_path / "coffee")
    assert found.run_dir == str(tmp_path / "here")
    assert {found.policy_checkpoint, found.reward_checkpoint, found.model.path} == {str(tmp_path / "lm")}


def test_a_parts_own_path_is_taken_below_the_shorthand(tmp_path: Path) -> None:
    taskmaster(tmp_path / "sets")
    data = load(["experiment=instruct_mix", "data.path=sets"], tmp_path).data
    assert isinstance(data, FilesData)
    assert [part.path for part in data.mix] == [str(tmp_path / "sets" / name) for name in ("taskmaster-4", "self-instruct")]


def test_a_hub_name_stays_as_it_is(tmp_path: Path) -> None:
    found = load(["experiment=smoke", "model.path=facebook/opt-125m", "model.tokenizer=gpt2"], tmp_path)
    assert (found.model.path, found.model.tokenizer) == ("facebook/opt-125m", "gpt2")


def test_from_is_another_name_of_rerun_from() -> None:
    assert load(["experiment=smoke", "from=ppo"], Path("/tmp")).rerun_from == "ppo"


def test_what_is_typed_wins_over_the_experiment_and_that_over_the_defaults() -> None:
    found = load(["ppo.batch=32", "experiment=smoke", "scale=tiny"], Path("/tmp"))
    assert found.ppo.batch == 32
    assert found.scale.name == "tiny"
    assert found.ppo.minibatches == 2
    assert found.ppo.epochs == 1


def test_the_resolved_yaml_holds_every_setting_and_is_the_same_request_again() -> None:
    found = smoke()
    assert yaml.safe_load(as_yaml(found)) == configuration.as_dict(found)
    plain, problems = yaml.safe_load(as_yaml(found)), []
    assert configuration._typed(plain, problems) == found
    assert problems == []


def test_groups_of_features_are_named_once() -> None:
    (text,) = mistakes("reward_model.features=[tokens,likelihood,tokens]")
    assert text == "reward_model.features=[tokens,likelihood,tokens]: tokens is there more than once; name each group once"
    assert load(["experiment=smoke", "reward_model.features=[tokens,likelihood]"]).reward_model.features == ("tokens", "likelihood")
    assert mistakes("reward_model.features=[]")[0].startswith("reward_model.features=[]")


def test_a_fitted_head_leaves_nothing_to_adapters() -> None:
    (text,) = mistakes("reward_model.train=head", "lora.rank=2")
    assert text.startswith("lora.roles: reward_model.train=head") and "leave reward_model out" in text
    for words in (["lora.rank=2", "lora.roles=[policy,critic]"], ["lora.rank=0"]):
        assert load(["experiment=smoke", "reward_model.train=head", *words]).reward_model.train == "head"


def test_every_setting_is_documented_beneath_itself() -> None:
    files = [configuration.FOLDER / name for name in ("schema.py", "sources.py", "ppo.py", "rewards.py")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    fields = [n for n, line in enumerate(lines) if re.match(r"    \w+: ", line)]
    assert len(fields) > 100
    assert [lines[n].strip() for n in fields if not lines[n + 1].strip().startswith('"""')] == []


def test_leaves_are_the_dotted_names_of_all_settings() -> None:
    found = set(leaves(Config))
    assert {"seed", "ppo.kl.beta", "placement.rollout.gpus", "data.flaws.opener", "data.path"} <= found
    assert not found & {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
    assert "ppo" not in found


def test_nearest_lists_all_names_by_likeness() -> None:
    assert nearest("ppo.lr", ["seed", "ppo.lam", "ppo.lr"])[0] == "ppo.lr"
    assert sorted(nearest("x", ["b", "a"])) == ["a", "b"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["ppo.advantage=reinforce"],
        ["ppo.advantage=rloo", "ppo.samples_per_prompt=2"],
        ["ppo.advantage=grpo", "ppo.samples_per_prompt=16"],
        ["ppo.samples_per_prompt=8", "ppo.batch=24", "placement.policy.ranks=2"],  # compares nothing: a prompt may be on both ranks
        ["ppo.advantage=reinforce", "placement.critic.ranks=3"],  # of a role that is not started
        ["ppo.dual_clip=1.3", "ppo.old_logprobs=behaviour", "ppo.importance_cap=2.0"],
    ],
)
def test_what_needs_no_critic_or_compares_no_replies_is_not_held_to_their_rules(overrides: list[str]) -> None:
    found = configuration.load(["experiment=smoke", *overrides])
    assert ("critic" in found.roles_of_ppo()) == (found.ppo.advantage == "gae")


def test_a_critic_is_counted_in_the_roles_ranks_only_where_there_is_one() -> None:
    three = ("experiment=smoke", "placement.critic.ranks=2")
    assert roles.rank_counts(configuration.load([*three])) == [1, 2, 1, 1, 1]
    assert roles.rank_counts(configuration.load([*three, "ppo.advantage=reinforce"])) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("engine.zero_stage=0", "engine.offload_optimizer=cpu"), "engine.offload_optimizer=cpu: needs ZeRO stage 1 or higher"),
        (("engine.zero_stage=2", "engine.offload_parameters=cpu"), "engine.offload_parameters=cpu: needs ZeRO stage 3 or higher"),
        (("engine.zero_stage=3", "engine.offload_optimizer=nvme"), "engine.nvme_path=null names no folder"),
        (("engine.zero_stage=2", "engine.offload_parameters=nvme", "engine.nvme_path=/tmp"), "needs ZeRO stage 3 or higher"),
    ],
)
def test_offloading_what_the_stage_does_not_cut_up_is_refused(overrides: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as found:
        configuration.load(["experiment=smoke", *overrides], tmp_path)
    assert any(said in mistake for mistake in found.value.mistakes)


TURNS = ("placement=colocated", "placement.devices=2", "engine.zero_stage=3")


@pytest.mark.parametrize("where", ["cpu", "nvme"])
@pytest.mark.parametrize("setting", ["engine.offload_parameters", "scale.offload_parameters"])
def test_roles_that_sleep_may_not_offload_parameters(setting: str, where: str, tmp_path: Path) -> None:
    """Of such a model DeepSpeed moves nothing."""
    given = (*TURNS, f"{setting}={where}", f"engine.nvme_path={tmp_path}")
    (said,) = mistakes(*given)
    assert said.startswith(f"engine.offload_parameters={where}: ") and "set engine.offload_parameters=none" in said
    assert "placement.sleep=false" in said
    for better in ("placement.sleep=false", "engine.offload_parameters=none", "stage=sft"):
        configuration.load(["experiment=smoke", *given, better], tmp_path)


def test_offloading_that_goes_together_is_accepted(tmp_path: Path) -> None:
    given = ("engine.zero_stage=3", "engine.offload_optimizer=nvme", "engine.offload_parameters=cpu", f"engine.nvme_path={tmp_path}")
    assert configuration.load(["experiment=smoke", *given], tmp_path).offload_parameters() == "cpu"


def test_settings_of_vllm_belong_to_vllm() -> None:
    assert load(["rollout=vllm", "rollout.sequences=8"]).rollout == VLLMRollout("vllm", 0.5, 1.0, 8, None)
    assert mistakes("rollout.sequences=8") == [
        "rollout.sequences: a setting of vLLM, and replies are sampled by transformers; choose rollout=vllm"
    ]
    assert mistakes("rollout=vllm", "rollout.sequence=8") == ["rollout.sequence: no such setting; did you mean rollout.sequences?"]
    assert mistakes("rollout.engine=vllm") == ["rollout.engine=vllm: choose the group instead: rollout=vllm"]
