"""The typed form of a configuration. Every setting is documented beneath itself.

Hydra composes the YAML groups of this folder; `orchestration/config.py` turns the result into these frozen dataclasses and reports
every mistake at once. Units: learning rates per optimizer step, times in seconds, KL in nats, lengths in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import Field

from conf.engines import TransformersRollout, VLLMRollout
from conf.machines import Cluster, Placement, Ray
from conf.ppo import PPO
from conf.serving import Serving
from conf.settings import Count, NotNegative, Positive, Settings, Whole
from conf.sizes import Engine, Model, Scale
from conf.sources import FilesData, WorldData

PPO_ROLES = ("policy", "critic", "reference", "reward", "rollout")
STAGES = ("pretrain", "sft", "compare", "reward_model", "ppo", "evaluate")


@dataclass(frozen=True)
class LoRA(Settings):
    """Low-rank adapters: the weights W of linear layers stay as they are, and W + alpha / rank * B A is used (Hu et al. 2106.09685)."""

    rank: Whole
    """Rank of A and B; 0: no adapters, all weights are trained."""
    alpha: Positive
    """Scale of the adapters, over `rank`."""
    dropout: Annotated[float, Ge(0), Lt(1)]
    """Dropout on what goes into an adapter, in `sft` and `reward_model`; PPO runs without."""
    targets: tuple[str, ...]
    """Names of the linear layers that get one (q_proj, v_proj, ...); []: every linear layer but the output layer."""
    roles: tuple[Literal["sft", "reward_model", "policy", "critic"], ...]
    """Which models are trained by adapters: of the stages `sft` and `reward_model`, and PPO's policy and critic. Scalar heads are trained
    whole. Where the policy is one of them it is its own reference, with its adapters off."""

    def trains(self, role: str) -> bool:
        """Whether this role's model is trained by adapters."""
        return self.rank > 0 and role in self.roles


@dataclass(frozen=True)
class Labeler(Settings):
    """Who ranks sampled answers."""

    kind: Literal["simulated", "recorded"]
    """`simulated`: the embedded world's noisy labeller. `recorded`: judgements that people made, from the data."""
    agreement: Annotated[float, Gt(0.5), Lt(1)]
    """Share of pairs on which two simulated labellers agree; sets their noise (InstructGPT's people: 0.726)."""


@dataclass(frozen=True)
class Learning(Settings):
    """What the training stages (pretrain, sft, reward_model) have in common."""

    batch: Count
    """Rows per optimizer step, over all ranks: blocks of text (pretrain), dialogues (sft), prompts of rankings or judged replies
    (reward_model)."""
    lr: Positive
    """Peak learning rate, falling along a cosine to 10% at `steps`."""
    warmup: Whole
    """Steps of linear warm-up."""
    weight_decay: NotNegative
    """AdamW's decay."""
    max_grad_norm: Positive
    """Gradient norm above which gradients are scaled down."""
    eval_every: Count
    """Steps between measurements on held-out rows."""
    patience: Count
    """Measurements without improvement after which training stops; the best weights are kept."""


@dataclass(frozen=True)
class Pretrain(Learning):
    """Language modelling on plain text before SFT; every token is learned."""

    steps: Whole
    """Optimizer steps at most; 0: the stage is left out, and SFT starts from `model.path` or random weights."""
    dropout: Annotated[float, Ge(0), Lt(1)]
    """Dropout while pretraining."""


@dataclass(frozen=True)
class SFT(Learning):
    """Supervised fine-tuning on dialogues; loss on assistant turns only."""

    steps: Count
    """Optimizer steps at most."""
    dropout: Annotated[float, Ge(0), Lt(1)]
    """Dropout while fine-tuning (InstructGPT: 0.2); all later stages run without."""
    too_long: Literal["drop", "keep_end"]
    """A dialogue longer than the context: `drop` leaves it out, `keep_end` leaves out its oldest turns, whole turns only."""
    packing: bool
    """Put several dialogues of a step in one row, without attention between them: less padding, the same loss and gradients."""
    pack_length: Count | None
    """Tokens of a packed row at most; null: the model's context."""


@dataclass(frozen=True)
class Compare(Settings):
    """Comparisons: K sampled answers per prompt, ranked."""

    prompts: Count
    """Prompts to sample answers for."""
    heldout_prompts: Count
    """Further prompts of the judging split, for the reward model's held-out accuracy."""
    k_min: Annotated[int, Ge(2)]
    """Fewest answers per prompt."""
    k_max: Annotated[int, Ge(2)]
    """Most answers per prompt (InstructGPT: 4 to 9)."""
    temperature: Positive
    """Sampling temperature of the answers."""
    max_new_tokens: Count
    """Longest answer."""


@dataclass(frozen=True)
class RewardModel(Learning):
    """Learning a reward from comparisons or judgements."""

    start: Literal["sft", "model", "own"]
    """`sft`: the SFT model. `model`: what `model` names, or random weights and a tokenizer learned from the data; needs no SFT stage.
    `own`: a model of another size than the policy, from `reward_model.path` or with random weights of the shape `reward_scale`; it reads
    the SFT model's tokens, and so can seed the critic (InstructGPT: 6B beside 175B)."""
    path: str | None
    """With `start=own`: a Hugging Face causal LM with the policy's tokenizer, by local path or hub name."""
    features: Annotated[tuple[Literal["last", "reply", "context", "likelihood", "tokens"], ...], MinLen(1)]
    """What the score is a linear function of. `last` alone, trained whole: the state after the last token (InstructGPT). Otherwise groups
    that weigh the same: all layers' states after the `last` token, and means of them over the `reply` and over the `context`; `likelihood`:
    what the language model thinks of the reply's tokens; `tokens`: which n-grams stand in the reply, the context, and the reply alone."""
    train: Literal["all", "head"]
    """`all`: the whole network, by gradient descent with early stopping. `head`: the language model stays as it is and the head is fitted
    to its optimum, its L2 penalty chosen by cross-validation; best when judgements are few (BENCHMARKS.md)."""
    steps: Count
    """Optimizer steps at most."""
    epochs: Count
    """Passes over the training set at most (more than one overfits K-way comparisons: InstructGPT 2203.02155, C.2)."""
    margin: NotNegative
    """Difference in score asked for per step of rank between two answers (Llama 2 2307.09288, 3.2.2); 0: only the order counts."""
    validation_share: Annotated[float, Gt(0), Lt(1)]
    """Share of the training prompts or judgements that early stopping is decided on; the held-out ones are only reported."""


@dataclass(frozen=True)
class Evaluate(Settings):
    """Judging the result against SFT."""

    prompts: Count
    """Held-out prompts."""
    max_new_tokens: Count
    """Longest reply."""
    temperature: Positive
    """Temperature of the sampled comparison (a greedy one is always made too)."""
    bootstrap: Count
    """Resamples of prompts for the 95% interval."""
    conversations: Count
    """Sampled conversations shown at the end, SFT beside PPO."""


@dataclass(frozen=True)
class Commit(Settings):
    """Saving for resume."""

    every: Count
    """Steps between commits of SFT, reward-model training and PPO."""
    keep: Count
    """Commits kept; older ones are deleted."""


@dataclass(frozen=True)
class Deadlines(Settings):
    """How long to wait before saying what is being waited for. The preflight asks for three times what `chatray plan` plans."""

    start: Positive
    """Seconds for all ranks of the roles to start and load their weights; of a training stage, until its first step is reported."""
    step: Positive
    """Seconds for any one call to the roles, and between two reports of a training stage."""
    sync: Positive
    """Seconds that policy and engines wait for each other, without progress, while new weights are on their way."""


@dataclass(frozen=True)
class Logging(Settings):
    """Where metrics go besides `metrics.jsonl`."""

    progress: bool
    """Show live progress on the terminal."""
    wandb: Literal["off", "offline", "online"]
    """Weights & Biases; `offline` needs no account."""
    wandb_project: str
    """The project that wandb files runs under."""
    wandb_group: str | None
    """What wandb shows together: the runs of a sweep bear its name."""
    tensorboard: bool
    """Write TensorBoard event files to `<run_dir>/tensorboard`."""


@dataclass(frozen=True)
class Profile(Settings):
    """Traces of torch's profiler in `<run_dir>/profile`; none while `roles` or `steps` is empty. They change no result."""

    roles: tuple[Literal["train", "policy", "critic", "reference", "reward", "rollout"], ...]
    """Whose ranks write traces; `train`: those of pretraining, SFT and the reward model, all others PPO's."""
    steps: tuple[Count, ...]
    """In which steps, as metrics.jsonl numbers them. A traced step takes longer, and a trace grows with what it holds."""
    shapes: bool
    """Note the shapes of what each operator was given."""
    memory: bool
    """Note what is allocated and freed."""

    def wants(self, role: str, step: int) -> bool:
        """Whether ranks of this role trace this step."""
        return role in self.roles and step in self.steps


@dataclass(frozen=True)
class Config(Settings):
    """A whole run."""

    experiment: str
    """Name of the experiment file; names the run."""
    run_dir: str
    """Folder of the run; by default runs/<experiment>."""
    seed: Whole
    """Seed of every draw: weights, data, samples."""
    stage: Literal["all", "pretrain", "sft", "compare", "reward_model", "ppo", "evaluate"]
    """Which stage to run; `all` runs them in order."""
    rerun_from: Literal["pretrain", "sft", "compare", "reward_model", "ppo", "evaluate"] | None
    """Discard this stage's results and all after it (on the command line: `from=`)."""
    policy_checkpoint: str | None
    """Starting weights (Hugging Face format) when a stage is run without its predecessor: the SFT model."""
    reward_checkpoint: str | None
    """The reward model's weights when `stage=ppo` is run without `reward_model`."""
    runtime: Literal["ray", "local"]
    """`ray`: roles are actors on a cluster. `local`: one rank per role, in this process, for a debugger."""
    checks: Literal["strict", "warn", "off"]
    """What PPO checks of itself. A check that fails: `strict` ends the run, `warn` is printed once; `off` checks nothing."""
    preflight: Literal["strict", "warn", "off"]
    """What is checked against the cluster before anything starts. What does not fit: `strict` ends the run, `warn` is printed; `off`
    checks nothing."""
    scale: Scale
    """Model shape."""
    reward_scale: Scale | None
    """Shape of the reward model and the critic when it is not the policy's (scale@reward_scale=6.7b; needs reward_model.start=own)."""
    model: Model
    """Starting model and tokenizer."""
    placement: Placement
    """Ranks and resources."""
    engine: Engine
    """DeepSpeed."""
    rollout: Annotated[TransformersRollout | VLLMRollout, Field(discriminator="engine")]
    """What samples replies."""
    lora: LoRA
    """Low-rank adapters."""
    data: Annotated[WorldData | FilesData, Field(discriminator="kind")]
    """Dialogues, prompts and judgements."""
    labeler: Labeler
    """Who ranks."""
    pretrain: Pretrain
    """Before stage 1, for models from scratch; left out unless `pretrain.steps` is above 0."""
    sft: SFT
    """Stage 1."""
    compare: Compare
    """Stage 2."""
    reward_model: RewardModel
    """Stage 3."""
    ppo: PPO
    """Stage 4."""
    evaluate: Evaluate
    """Stage 5."""
    commit: Commit
    """Resume."""
    deadlines: Deadlines
    """Waiting."""
    logging: Logging
    """Metrics."""
    profile: Profile
    """Traces."""
    ray: Ray
    """The Ray cluster that is run on."""
    cluster: Cluster
    """The machines that are planned for."""
    serving: Serving
    """The chat service."""

    def roles_of_ppo(self) -> list[str]:
        """The roles that PPO starts ranks for."""
        absent = {"critic": not self.ppo.has_critic(), "reference": self.policy_is_reference()}
        return [role for role in PPO_ROLES if not absent.get(role, False)]

    def policy_is_reference(self) -> bool:
        """Whether PPO's policy ranks answer for the reference, with their adapters off."""
        return self.lora.trains("policy")

    def zero_stage(self) -> int:
        """The ZeRO stage in force."""
        return self.scale.zero_stage if self.engine.zero_stage is None else self.engine.zero_stage

    def dtype(self) -> Literal["fp32", "bf16"]:
        """The arithmetic in force."""
        return self.model.dtype or self.scale.dtype

    def offload_optimizer(self) -> Literal["none", "cpu", "nvme"]:
        """Where optimizer states are."""
        return self.engine.offload_optimizer or self.scale.offload_optimizer

    def offload_parameters(self) -> Literal["none", "cpu", "nvme"]:
        """Where parameters rest."""
        return self.engine.offload_parameters or self.scale.offload_parameters

    def activation_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        chosen = self.engine.activation_checkpointing
        return self.scale.activation_checkpointing if chosen is None else chosen
