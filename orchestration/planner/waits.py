"""How long each thing that a run waits for is planned to take, beside the deadline that ends the wait.

A deadline tells a hang from slow work, so it needs room: plans are off by a factor (`tests/benchmarks/planning.py`), and a machine may be
busy. What a run waits for, and until when:

    deadlines.start             a stage's ranks to be there with their weights; of a training stage, until the first step is reported
    deadlines.step              any one call to PPO's roles; two reports of a training stage after each other, a commit between them
    deadlines.sync              the next bytes of new weights
    placement.collective_timeout    ranks of one role for each other: at most as long as the call that they are in

How many demonstrations set the reward model's zero, and how many rows its early stopping is decided on, is not known before the data are
read: `demonstrations_within` says for how many a deadline is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor

from conf.engines import VLLMRollout
from conf.schema import Config
from conf.sources import WorldData
from orchestration.planner.layout import Layout
from orchestration.planner.memory import RankMemory
from orchestration.planner.shapes import Shape, language_model, longest, scalar_model
from orchestration.planner.timing import Lengths, Speed, Work, by_role, forward, lengths, sampling, through_store, training_step

MARGIN = 3.0
"""A deadline is at least so many times what is planned."""
STORAGE_GB = 1.0
"""GB/s in which a node reads and writes the storage of `run_dir` and models. An assumption."""
IMPORT_SECONDS = 10.0
"""Of a core, for a rank's process to import what it needs (7 to 10 s were measured)."""
VLLM_SECONDS = 60.0
"""For a vLLM engine to measure its memory and to capture graphs. An assumption."""
TEXT_BLOCKS = 256
"""Blocks of held-out text that PPO measures at its end."""
MANY = 256
"""Rows that are planned together, so that the last micro-batch's being smaller counts for little."""
PREFERENCE_PASSES = 3
"""Over the held-out answers when a reward model is done: loss and accuracy, calibration, and the scores that are left in a file."""
FILE_BYTES = 4
"""Of a parameter in a checkpoint that a stage has written."""


@dataclass(frozen=True)
class Wait:
    """Something that a stage waits for."""

    stage: str
    what: str
    seconds: float
    """Planned."""
    setting: str
    given: float
    """Seconds that the setting allows."""

    @property
    def short(self) -> bool:
        return self.given < MARGIN * self.seconds

    @property
    def reason(self) -> str:
        enough = ceil(MARGIN * self.seconds / 100) * 100
        return (
            f"{self.setting}={self.given:g}: in stage {self.stage}, {self.what} is planned to take {self.seconds:,.0f} s, and a deadline "
            f"must be {MARGIN:g} times that, to tell slow from hung: set {self.setting}={enough}"
        )


def too_short(waits: Sequence[Wait], stages: Sequence[str] | None = None) -> list[str]:
    """Deadlines that are too short for what is planned, each with the longest of its waits.

    Args:
        stages: those that are going to run; None: all.
    """
    short: dict[str, Wait] = {}
    for wait in waits:
        if wait.short and (stages is None or wait.stage in stages):
            short[wait.setting] = max(short.get(wait.setting, wait), wait, key=lambda one: one.seconds)
    return [wait.reason for wait in short.values()]


@dataclass(frozen=True)
class Planner:
    """What the waits of all stages are planned from."""

    config: Config
    speed: Speed
    memory: Mapping[str, RankMemory]
    """Of a rank of each role."""
    layouts: Mapping[str, Layout]
    """Where the ranks of the training stages and of PPO stand, as `plan.groups` names them."""

    def waits(self) -> Iterator[Wait]:
        config = self.config
        policy, scorer = language_model(config), scalar_model(config)
        if config.stage in ("all", "pretrain") and config.pretrain.steps:
            yield from self._training("pretrain", policy, config.pretrain.batch)
        if config.stage in ("all", "sft"):
            yield from self._training("sft", policy, config.sft.batch, measured=ceil(config.data.heldout / 2))
        if config.stage in ("all", "reward_model") and config.ppo.uses_reward_model():
            answers = _answers(config)
            held_out = config.compare.heldout_prompts if isinstance(config.data, WorldData) else config.data.heldout_preferences
            rows, at_end = config.reward_model.batch * answers, held_out * answers * PREFERENCE_PASSES
            yield from self._training("reward_model", scorer, rows, at_end=at_end)
        if config.stage in ("all", "compare") and config.labeler.kind == "simulated" and config.ppo.uses_reward_model():
            yield from self._compare()
        if config.stage in ("all", "ppo"):
            yield from self._ppo()
        if config.stage in ("all", "evaluate"):
            yield from self._evaluate()

    def _training(self, stage: str, shape: Shape, rows: float, measured: int = 0, at_end: int = 0) -> Iterator[Wait]:
        """`rows` of a step are spread over the ranks; those `measured` while training and those `at_end` go through every rank."""
        config, ranks, length = self.config, self.config.placement.train.ranks, longest(self.config)
        step = self._seconds(training_step(config, shape, rows, length))
        between = self._seconds(forward(config, shape, measured * ranks, length, ranks))
        after = self._seconds(forward(config, shape, max(measured, at_end) * ranks, length, ranks))
        export = _through_storage(shape.parameters * FILE_BYTES)
        beginning = self._imports("training stages") + self._reading("training stages", {"train": shape}) + step
        yield self._step(stage, "a step, held-out rows and a commit", step + between + self._commit(["train"]))
        yield self._step(stage, "held-out rows and the export of the trained weights", after + export)
        yield self._start(stage, "starting the ranks, reading weights and the first step", beginning)
        yield from self._collective(stage, "a step", step, ranks)

    def _ppo(self) -> Iterator[Wait]:
        config, ppo, policy = self.config, self.config.ppo, language_model(self.config)
        phases = by_role(config, lengths(config))
        replies = self._seconds(phases["generate"]["rollout"])
        yield self._started("ppo", config.roles_of_ppo())
        yield self._step("ppo", "sampling the replies of a step", replies)
        if ppo.staleness > 1:
            yield self._step("ppo", f"sampling the replies of ppo.staleness={ppo.staleness} steps ahead", replies * ppo.staleness)
        scoring, learning = self._together(phases["score"]), self._together(phases["learn"])
        yield self._step("ppo", f"scoring the replies ({', '.join(phases['score'])})", scoring)
        yield self._step("ppo", f"one update of {' and '.join(phases['learn'])}", learning)
        yield self._step("ppo", "sending new weights to the rollout engines", self._seconds(phases["sync"]["policy"]))
        largest = max(policy.tensors, default=0) * 4
        yield Wait("ppo", "sending the largest of the weights", through_store(largest), "deadlines.sync", config.deadlines.sync)
        yield self._step("ppo", "a commit", self._commit([*phases["learn"]]))
        yield self._step("ppo", "the export of the policy", _through_storage(policy.parameters * FILE_BYTES))
        if ppo.judge.every:
            yield self._step("ppo", "the replies to the judge's prompts", self._replies(lengths(config), ppo.judge.prompts))
        if ppo.ptx > 0 or config.pretrain.steps:
            text = forward(config, policy, TEXT_BLOCKS, longest(config), config.placement.policy.ranks)
            yield self._step("ppo", "measuring held-out text", self._seconds(text))
        for role, work in phases["learn"].items():
            yield from self._collective("ppo", f"one update of {role}", self._seconds(work), getattr(config.placement, role).ranks)
        for role, work in phases["score"].items():
            ranks = getattr(config.placement, role if role in config.roles_of_ppo() else "policy").ranks
            if config.zero_stage() == 3:  # below, ranks that only score do not wait for each other
                yield from self._collective("ppo", f"scoring the replies ({role})", self._seconds(work), ranks)

    def _compare(self) -> Iterator[Wait]:
        given = self.config.compare
        answers = given.prompts * (given.k_min + given.k_max) / 2
        yield self._started("compare", ["rollout"])
        yield self._step("compare", "sampling all answers", self._replies(lengths(self.config, given.max_new_tokens), answers))

    def _evaluate(self) -> Iterator[Wait]:
        config, given = self.config, self.config.evaluate
        tokens, policy = lengths(config, given.max_new_tokens), language_model(config)
        roles = {"reference": policy, "reward": scalar_model(config)}
        yield self._started("evaluate", ["rollout", *roles])
        yield self._step("evaluate", "sampling the replies", self._replies(tokens, given.prompts))
        length, place = tokens.prompt + tokens.reply, config.placement
        works = {role: forward(config, shape, given.prompts, length, getattr(place, role).ranks) for role, shape in roles.items()}
        yield self._step("evaluate", "scoring the replies (reference, reward)", self._together(works))
        yield self._step("evaluate", "loading the PPO model into the rollout engines", self._reading("ppo", {"rollout": policy}))

    def _started(self, stage: str, roles: Sequence[str]) -> Wait:
        shapes = {role: scalar_model(self.config) if role in ("critic", "reward") else language_model(self.config) for role in roles}
        engine = VLLM_SECONDS if isinstance(self.config.rollout, VLLMRollout) and "rollout" in roles else 0.0
        seconds = self._imports("ppo") + self._reading("ppo", shapes) + engine
        return self._start(stage, "starting the ranks and reading their weights", seconds)

    def _start(self, stage: str, what: str, seconds: float) -> Wait:
        return Wait(stage, what, seconds, "deadlines.start", self.config.deadlines.start)

    def _step(self, stage: str, what: str, seconds: float) -> Wait:
        return Wait(stage, what, seconds, "deadlines.step", self.config.deadlines.step)

    def _collective(self, stage: str, what: str, seconds: float, ranks: int) -> Iterator[Wait]:
        if ranks > 1:
            limit = self.config.placement.collective_timeout
            yield Wait(stage, f"{what}, in which {ranks} ranks wait for each other,", seconds, "placement.collective_timeout", limit)

    def _together(self, works: Mapping[str, Work]) -> float:
        """Seconds of one wait for several roles: they work after each other on devices that they share, and at once on their own; where
        they sleep in turns, the wait for one ends before the next begins."""
        place, seconds = self.config.placement, [self._seconds(work) for work in works.values()]
        shared = (place.share or not place.devices) and not place.sleep
        return sum(seconds) if shared else max(seconds)

    def _replies(self, tokens: Lengths, count: float) -> float:
        return self._seconds(sampling(self.config, tokens, count))

    def _seconds(self, work: Work) -> float:
        return work.seconds(self.speed)

    def _imports(self, group: str) -> float:
        """On the node with most ranks; one rank takes that long however many cores there are."""
        placed = self.layouts[group].placed
        return IMPORT_SECONDS * max((max(len(there.ranks) / there.node.cpus, 1.0) for there in placed), default=1.0)

    def _reading(self, group: str, shapes: Mapping[str, Shape]) -> float:
        """Checkpoints, on the node that reads most. Under ZeRO-3 a rank reads its part; what several ranks read is read once."""
        most = 0.0
        for there in self.layouts[group].placed:
            wanted = 0.0
            for role, shape in shapes.items():
                here, ranks = sum(name == role for name, _ in there.ranks), getattr(self.config.placement, role).ranks
                parts = here / ranks if self.config.zero_stage() == 3 and role != "rollout" else float(here > 0)
                wanted += parts * shape.parameters * FILE_BYTES
            most = max(most, wanted)
        return _through_storage(most)

    def _commit(self, roles: Sequence[str]) -> float:
        """All ranks of these roles write their states at once, as fast as the nodes that they are on."""
        layout = self.layouts["training stages" if roles == ["train"] else "ppo"]
        state = {role: self.memory[role].of("state") / (self.config.commit.keep + 1) for role in roles}
        return max((_through_storage(sum(state.get(role, 0.0) for role, _ in there.ranks)) for there in layout.placed), default=0.0)


def _answers(config: Config) -> int:
    """At most, to one prompt that a reward model learns from: one where people judged single replies."""
    if isinstance(config.data, WorldData):
        return config.compare.k_max
    ranked = {"rankings": config.compare.k_max, "hh": 2}
    return max((ranked.get(part.columns or part.format, 1) for part in config.data.mix), default=1)


def _through_storage(size: float) -> float:
    return size / (STORAGE_GB * 1e9)


def planned_waits(config: Config, speed: Speed, memory: Mapping[str, RankMemory], layouts: Mapping[str, Layout]) -> list[Wait]:
    """What the stages of `config.stage` wait for; nothing of a single process, which waits for nobody."""
    return [] if config.runtime == "local" else list(Planner(config, speed, memory, layouts).waits())


def demonstrations_within(config: Config, waits: Sequence[Wait], speed: Speed) -> int | None:
    """How many demonstrations, as long as they may be, `deadlines.step` has room for when a reward model is done: all are scored before and
    after its zero is set, by every rank. None where no reward model is trained."""
    last = [wait for wait in waits if wait.stage == "reward_model" and wait.setting == "deadlines.step"]
    if not last:
        return None
    twice = 2 * forward(config, scalar_model(config), MANY, longest(config), 1).seconds(speed) / MANY
    return max(floor((config.deadlines.step / MARGIN - max(wait.seconds for wait in last)) / twice), 0)
