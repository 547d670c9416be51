"""New weights from the policy to every rollout engine, on the way that suits where they are (`placement.weight_sync`)."""

from __future__ import annotations

import uuid

from actors.routes import choose
from actors.stream import Route, Way, total_bytes
from conf.schema import Config
from orchestration.errors import RunError
from orchestration.roles import Roles
from orchestration.runtime.group import Runtime


class WeightSync:
    """Where policy and engines are is asked once; ranks of a run do not move."""

    def __init__(self, runtime: Runtime, config: Config, roles: Roles) -> None:
        self.runtime, self.config, self.roles = runtime, config, roles
        self.way: Way | None = None
        self.address = ""

    def send(self, version: int) -> int:
        """Returns how many bytes of weights each engine was sent.

        Raises:
            RunError: a rank died, or stood still for `deadlines.sync`; or the way that was asked for is not there.
        """
        if self.way is None:
            self._settle()
        if self.way == "object_store":
            self._by_buckets(version)
        else:
            self._streamed(version)
        return self.bytes

    def _settle(self) -> None:
        """Which way, and what goes over it."""
        table = self.runtime.get(self.roles.policy.weight_table(), "the names of the policy's weights")[0]
        self.table, self.bytes = self.runtime.put([table]), total_bytes(table)
        self.way = self._chosen()
        if self.way in ("nccl", "gloo"):
            self.address = self.runtime.get(self.roles.policy.open_address(), "the policy's address")[0]

    def _chosen(self) -> Way:
        if self.config.runtime == "local":  # one process: whoever waited for the other would wait for ever
            return "object_store"
        policy = self.runtime.get(self.roles.policy.endpoint(), "where the policy is")[0]
        engines = self.runtime.get(self.roles.rollout.endpoint(), "where the rollout engines are")
        try:
            return choose(self.config.placement.weight_sync, policy, engines)
        except ValueError as cause:
            raise RunError(str(cause)) from cause

    def _streamed(self, version: int) -> None:
        """One call to each rank; policy rank 0 and the engines settle the rest between themselves."""
        assert self.way is not None
        address = self.address or uuid.uuid4().hex
        route = Route(self.way, address, self.roles.rollout.group.size, self.config.deadlines.sync)
        sent = self.roles.policy.send_weights(version, route)
        received = self.roles.rollout.receive_weights(version, route, self.table)
        self.runtime.wait(sent, received, what=f"rollout engines to take weights of version {version}")

    def _by_buckets(self, version: int) -> None:
        """One bucket on its way while the next is gathered."""
        what = f"rollout engines to load weights of version {version}"
        loaded = []
        for bucket in range(self.runtime.get(self.roles.policy.bucket_count(), "the number of weight buckets")[0]):
            loaded.append(self.roles.rollout.load_weights(self.roles.policy.weights(version, bucket)))
            self.runtime.wait(*loaded[:-1], what=what)
            loaded = loaded[-1:]
        self.runtime.wait(*loaded, what=what)
