"""What every rank of every role shares: threads, the process group, and how models and engines are made from the configuration."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from actors.attention import remove_padding
from actors.compiling import compile_blocks
from actors.devices import give, own_device
from actors.engine import Engine
from actors.models import LanguageModel, ScalarModel, load_causal_lm, load_scalar_model, write_model
from actors.profiling import Traces
from actors.rank import RankSpec as RankSpec
from actors.rank import off_device
from actors.rendezvous import LOOPBACK, open_store
from actors.routes import Ends, endpoint
from actors.sharding import Optimizer, Sharding
from actors.staging import staged
from actors.stream import Endpoint
from conf.schema import Config


class Worker:
    """Base of the role classes. Life: construct, `join` the group's process group, `load`, then the role's own methods.

    Where roles work in turns (`placement.sleep`), `sleep` follows `load`, and from then on every spell of work is between a `wake` and a
    `sleep`."""

    def __init__(self, config: Config, checkpoint: str, spec: RankSpec) -> None:
        """Args:
        checkpoint: Hugging Face folder of the weights this role starts from.
        """
        self.config, self.spec = config, spec
        if (place := getattr(config.placement, spec.role, None)) is not None:  # one of no such role takes what its process was given
            give(place.gpus)
        self.checkpoint = staged(checkpoint, config.engine.stage_folder)
        torch.set_num_threads(spec.threads)
        self.host = "127.0.0.1"
        self.ends = Ends()
        self.traces = Traces(config, spec.role, spec.rank)

    def open_store(self, host: str) -> tuple[str, int]:
        """On rank 0: open the rendezvous at this address, and say where it is."""
        self.host = host
        self._store = open_store(host, self.spec.world_size)
        return host, self._store.port

    def join(self, host: str, port: int, timeout: float) -> None:
        """Enter the process group; every rank of the role must call.

        Args:
            timeout: seconds that this may take. What is done in the group afterwards may take `placement.collective_timeout`.

        Raises:
            DistStoreError, DistBackendError: a rank did not come in time.
        """
        limit = datetime.timedelta(seconds=timeout)
        if self.spec.rank > 0:
            self._store = dist.TCPStore(host, port, self.spec.world_size, is_master=False, timeout=limit)
        self._store.set_timeout(limit)
        patience = datetime.timedelta(seconds=self.config.placement.collective_timeout)
        start_process_group(self.spec.rank, self.spec.world_size, self._store, patience)

    def load(self) -> None:
        """Build the model from `checkpoint`."""
        raise NotImplementedError

    @off_device
    def trace(self, stage: str, step: int | None) -> None:
        """The calls that follow belong to this step (`profile`)."""
        self.traces.turn_to(stage, step)

    @off_device
    def endpoint(self) -> Endpoint:
        """Where this rank's weights are, for choosing how they travel. Roles that sleep have theirs now here, now there."""
        return endpoint(on_device=not self.config.placement.sleep)

    @off_device
    def open_address(self) -> str:
        """On rank 0: where rollout ranks find it for broadcasts."""
        return self.ends.open(self.host) if self.spec.rank == 0 else ""

    def engines(self) -> Sequence[Engine]:
        """What of this rank takes device memory; roles that hold other things than one engine say so."""
        return [engine] if isinstance(engine := getattr(self, "engine", None), Engine) else []

    def sleep(self) -> None:
        """Leave the device to other roles: weights and optimizer states rest in host memory until `wake`."""
        for engine in self.engines():
            engine.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        for engine in self.engines():
            engine.wake()

    def shut_down(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start_process_group(rank: int, world_size: int, store: dist.Store, timeout: datetime.timedelta) -> None:
    """The default process group: NCCL between devices, gloo elsewhere."""
    os.environ["LOCAL_RANK"] = "0"  # one visible device per rank, whatever this process was started by
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    backend = "nccl" if own_device().type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def process_group_of_one() -> None:
    """The process group of a single process; roles of the local runtime share it."""
    if not dist.is_initialized():
        if LOOPBACK:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)  # else gloo listens on the address of the host's name
        start_process_group(0, 1, dist.HashStore(), datetime.timedelta(seconds=60))


def make_engine(config: Config, module: nn.Module, optimizer: Optimizer | None) -> Engine:
    """The module in an engine as the configuration wants it."""
    if config.engine.remove_padding:
        remove_padding(module)
    engine = Engine(module, optimizer, sharding(config))
    if config.engine.compile:
        compile_blocks(engine.module)  # after what the engine does to blocks
    return engine


def sharding(config: Config) -> Sharding:
    """How the configuration wants models spread over their ranks."""
    return Sharding(
        config.zero_stage(), config.dtype(), config.offload_optimizer(), config.offload_parameters(), config.engine.nvme_path,
        config.activation_checkpointing(), config.engine.micro_batch,
    )  # fmt: skip


def filled_by_engine(config: Config) -> bool:
    """Whether models are made without storage, for the engine to give each rank its part of them."""
    return config.zero_stage() == 3


def language_model(config: Config, checkpoint: str, dropout: float = 0.0) -> LanguageModel:
    return LanguageModel(load_causal_lm(checkpoint, dropout, filled_by_engine(config)))


def scalar_model(config: Config, checkpoint: str) -> ScalarModel:
    return load_scalar_model(checkpoint, config.seed, filled_by_engine(config))


def export(config: Config, engine: Engine, folder: Path) -> None:
    """Write the model in Hugging Face form; every rank must call, rank 0 writes."""
    write_model(engine.module, engine.whole, folder if engine.rank == 0 else None, config.engine.shard_mb * 10**6)


def warmed_up(lr: float, step: int, warmup: int) -> float:
    """Linear warm-up from one tenth of `lr` over `warmup` steps, then constant (InstructGPT 2203.02155, C.4)."""
    if step >= warmup:
        return lr
    return lr * (0.1 + 0.9 * step / warmup)
