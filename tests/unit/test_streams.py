"""Both ends of the ways that weights travel, in processes of their own; what happens when one end dies or stands still."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from actors import broadcast, ring
from actors.broadcast import Broadcast, Meeting
from actors.ring import RingReceiver, RingSender
from actors.routes import Ends, choose
from actors.stream import Endpoint, Route, Stream, WeightSyncError, receive_all, send_all, total_bytes
from actors.weights import Weight, gather_from
from tests.fakes import floats

SIZES = {"a": (7,), "empty": (0, 3), "b": (13, 5), "c": (), "d": (40,)}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors lie across pieces, and pieces hold several tensors."""
    monkeypatch.setattr(ring, "SLOT_BYTES", 50)
    monkeypatch.setattr(broadcast, "PIECE_BYTES", 50)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    found = {name: floats(seed + n, *shape, dtype=torch.float32) for n, (name, shape) in enumerate(SIZES.items())}
    return found | {"half": floats(9, 11).bfloat16(), "count": torch.arange(5)}


def table(given: dict[str, torch.Tensor]) -> dict[str, Weight]:
    return {name: Weight(tuple(tensor.shape), tensor.dtype, (name,)) for name, tensor in given.items()}


def received(route: Route, number: int, version: int, names: dict[str, Weight], places: dict[str, torch.Tensor]) -> list[Any]:
    """What an engine is told to load, call by call."""
    told: list[Any] = []
    stream = Ends().receiver(route, number, version, total_bytes(names))
    try:
        receive_all(names, stream, places, lambda ready, last: told.append((ready, last)), limit=100)
    finally:
        stream.close()
    return told


def check_all_arrived(told: list[Any], given: dict[str, torch.Tensor], places: dict[str, torch.Tensor]) -> None:
    assert [last for _, last in told] == [False] * (len(told) - 1) + [True]
    found = {name: tensor for ready, _ in told for name, tensor in ready.items()}
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert (found[name] is places[name]) == (tensor.dtype == torch.float32), name


def empty_places(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In float32 whatever the weights are: only those of the same type are written in place."""
    return {name: torch.zeros(tensor.shape) for name, tensor in given.items()}


@pytest.mark.parametrize("engines", [1, 3])
def test_every_engine_gets_every_weight_in_its_place_or_in_its_own_type(engines: int) -> None:
    given = weights()
    names, route = table(given), Route("shared_memory", uuid.uuid4().hex, engines, 60.0)
    places = [empty_places(given) for _ in range(engines)]
    with ThreadPoolExecutor(engines) as pool:
        taking = [pool.submit(received, route, number, 2, names, places[number]) for number in range(engines)]
        stream = Ends().sender(route, 2, total_bytes(names))
        send_all(names, gather_from(given), stream)
        stream.close()
        for number, waiting in enumerate(taking):
            check_all_arrived(waiting.result(60), given, places[number])


def broadcast_engine(route: Route, number: int, pipe: Any) -> None:
    """Takes two versions over one meeting."""
    broadcast.PIECE_BYTES, ends = 50, Ends()
    try:
        for version in range(2):
            given = weights(version)
            places, told = empty_places(given), []
            stream = ends.receiver(route, number, version, total_bytes(table(given)))
            receive_all(table(given), stream, places, lambda ready, last, told=told: told.append((ready, last)), limit=100)
            check_all_arrived(told, given, places)
        pipe.send("all there")
    except BaseException as cause:
        pipe.send(repr(cause))


def started(target: Any, *given: Any) -> tuple[Any, Any]:
    """A process and the pipe from it. Forked: it touches no thread pool, and nothing is imported again."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*given, theirs), daemon=True)
    process.start()
    return process, ours


@pytest.mark.parametrize("engines", [1, 3])
def test_a_broadcast_by_gloo_reaches_every_engine_version_by_version(engines: int) -> None:
    sender = Ends()
    route = Route("gloo", sender.open("127.0.0.1"), engines, 60.0)
    others = [started(broadcast_engine, route, number) for number in range(engines)]
    for version in range(2):
        given = weights(version)
        stream = sender.sender(route, version, total_bytes(table(given)))
        send_all(table(given), gather_from(given), stream)
        stream.close()
    for process, pipe in others:
        assert pipe.poll(60) and pipe.recv() == "all there"
        process.join()


def test_more_bytes_than_the_ring_holds_go_through_it_while_the_other_end_reads() -> None:
    given = {f"w{n}": floats(n, 97, dtype=torch.float32) for n in range(20)}
    names, address = table(given), uuid.uuid4().hex
    assert total_bytes(names) > 20 * ring.SLOTS * ring.SLOT_BYTES
    places = {name: torch.zeros(97) for name in given}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(received, Route("shared_memory", address, 1, 60.0), 0, 4, names, places)
        sender = RingSender(address, 1, 4, total_bytes(names), 60.0)
        send_all(names, gather_from(given), sender)
        sender.close()
        waiting.result(60)
    assert all(torch.equal(places[name], tensor) for name, tensor in given.items())


def reads_one_piece(address: str, total: int, pipe: Any) -> None:
    """An engine that reads one piece, says so, and reads no more."""
    ring.SLOT_BYTES = 50
    stream = RingReceiver(address, 0, 3, total, 60.0)
    stream.receive(torch.empty(50, dtype=torch.uint8))
    pipe.send("read")
    signal.pause()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (signal.SIGKILL, r"rollout rank 0 broke off after \d of 20 pieces of the weights of version 3"),
        (signal.SIGSTOP, r"waited 0.3 s \(deadlines.sync\) for rollout rank 0 to take piece 2 of 20 of version 3"),
    ],
)
def test_an_engine_that_dies_or_stands_still_amid_a_sync_is_named(how: signal.Signals, said: str) -> None:
    address = uuid.uuid4().hex
    engine, pipe = started(reads_one_piece, address, 1000)
    try:
        stream = RingSender(address, 1, 3, 1000, 60.0)
        stream.send(torch.zeros(50, dtype=torch.uint8))
        assert pipe.poll(60) and pipe.recv() == "read"
        os.kill(engine.pid, how)
        stream.seconds = 0.3
        with pytest.raises(WeightSyncError, match=said):
            stream.send(torch.zeros(950, dtype=torch.uint8))
        stream.close()
    finally:
        engine.kill()
        engine.join()
    assert address not in Path("/proc/net/unix").read_text()


def test_an_engine_that_never_comes_is_named_when_the_deadline_passes() -> None:
    address = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(RingReceiver, address, 0, 1, 10, 60.0)
        with pytest.raises(WeightSyncError, match=r"waited 0.3 s \(deadlines.sync\) for rollout rank 1 to ask for weights of version 1"):
            RingSender(address, 2, 1, 10, 0.3)
        stream = waiting.result(60)
        with pytest.raises(WeightSyncError, match="policy rank 0 to send weights of version 1, the connection broke off"):
            stream.receive(torch.empty(10, dtype=torch.uint8))
        stream.close()


def test_a_policy_that_never_comes_is_named_when_the_deadline_passes() -> None:
    with pytest.raises(WeightSyncError, match=r"waited 0.1 s \(deadlines.sync\) for policy rank 0 to send weights of version 7"):
        RingReceiver(uuid.uuid4().hex, 0, 7, 10, 0.1)


@pytest.mark.parametrize(("version", "total"), [(2, 10), (1, 11)])
def test_another_version_or_another_models_bytes_are_refused(version: int, total: int) -> None:
    address = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(RingReceiver, address, 0, 1, 10, 60.0)
        with pytest.raises(WeightSyncError, match="rollout rank 0 broke off"):
            send_everything(RingSender(address, 1, version, total, 60.0), total)
        with pytest.raises(WeightSyncError, match=f"{total} bytes of version {version} came where 10 of version 1 were expected"):
            waiting.result(60)


def meets_and_waits(address: str, pipe: Any) -> None:
    meeting = Meeting("gloo", address, 1, 1, 60.0)
    pipe.send("met")
    signal.pause()
    del meeting


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_broadcast_that_nobody_takes_ends_with_the_deadlines_name(how: signal.Signals) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = f"127.0.0.1:{store.port}"
    engine, pipe = started(meets_and_waits, address)
    try:
        meeting = Meeting("gloo", address, 0, 1, 1.0, store)
        assert pipe.poll(60) and pipe.recv() == "met"
        os.kill(engine.pid, how)
        stream = Broadcast(meeting, 5, 10**8)
        with pytest.raises(WeightSyncError, match=r"1 s \(deadlines.sync\) for the rollout ranks to take piece \d+ of .* version 5"):
            send_everything(stream, 10**7)
    finally:
        engine.kill()
        engine.join()


def send_everything(stream: Stream, total: int) -> None:
    stream.send(torch.zeros(total, dtype=torch.uint8))
    stream.finish()


HERE, THERE = "this machine", "another"


@pytest.mark.parametrize(
    ("wanted", "policy", "engines", "way"),
    [
        ("auto", (HERE, None), [(HERE, None)] * 2, "shared_memory"),
        ("auto", (HERE, None), [(HERE, None), (THERE, None)], "object_store"),
        ("auto", (HERE, "gpu0"), [(HERE, "gpu0")], "cuda_ipc"),
        ("auto", (HERE, "gpu0"), [(HERE, "gpu1"), (THERE, "gpu2")], "nccl"),
        ("auto", (HERE, "gpu0"), [(HERE, "gpu0"), (HERE, "gpu1")], "shared_memory"),
        ("auto", (HERE, "gpu0"), [(HERE, "gpu1"), (THERE, "gpu1")], "object_store"),
        ("auto", (HERE, "gpu0"), [(HERE, None)], "shared_memory"),
        ("object_store", (HERE, "gpu0"), [(HERE, "gpu0")], "object_store"),
        ("collective", (HERE, None), [(HERE, None)], "gloo"),
        ("collective", (HERE, "gpu0"), [(HERE, "gpu0")], "gloo"),
        ("collective", (HERE, "gpu0"), [(THERE, "gpu1")], "nccl"),
        ("shared_memory", (HERE, "gpu0"), [(HERE, "gpu1")], "shared_memory"),
        ("shared_memory", (HERE, "gpu0"), [(HERE, "gpu0")], "cuda_ipc"),
    ],
)
def test_the_way_follows_from_where_the_ranks_are(wanted: Any, policy: Any, engines: list[Any], way: str) -> None:
    assert choose(wanted, Endpoint(*policy), [Endpoint(*engine) for engine in engines]) == way


def test_shared_memory_with_another_machine_is_refused_by_the_engines_number() -> None:
    with pytest.raises(ValueError, match="weight_sync=shared_memory: rollout rank 1 is on another machine"):
        choose("shared_memory", Endpoint(HERE, None), [Endpoint(HERE, None), Endpoint(THERE, None)])


def test_nothing_is_left_open_when_a_sync_is_over() -> None:
    def sync(_: int) -> None:
        address = uuid.uuid4().hex
        taking = threading.Thread(target=_take_and_close, args=(address,))
        taking.start()
        sender = RingSender(address, 1, 0, 10, 60.0)
        sender.send(torch.zeros(10, dtype=torch.uint8))
        sender.finish()
        sender.close()
        taking.join()

    sync(0)
    before = _open_files()
    for number in range(5):
        sync(number)
    # Not their count: what an earlier test left to the garbage collector may be closed meanwhile.
    assert _open_files() - before == set()


def _open_files() -> set[tuple[str, str]]:
    """Number and target of every open file of this process; a socket's target has its inode."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def _take_and_close(address: str) -> None:
    stream = RingReceiver(address, 0, 0, 10, 60.0)
    stream.receive(torch.empty(10, dtype=torch.uint8))
    stream.close()


def test_an_engines_own_weights_are_written_in_place_and_sample_as_the_policys() -> None:
    from actors.models import LanguageModel
    from actors.rollout_transformers import TransformersEngine
    from actors.weights import plain_weights
    from tests.fakes import END, tiny_lm

    policy, engine = LanguageModel(tiny_lm(1)), TransformersEngine(tiny_lm(0), END, torch.device("cpu"))
    names, state = plain_weights(policy), policy.state_dict()
    address = uuid.uuid4().hex
    kept = {name: tensor.data_ptr() for name, tensor in engine.places().items()}

    def load(ready: dict[str, torch.Tensor], last: bool) -> None:
        engine.load_weights(ready, 6 if last else None)

    def take() -> None:
        stream = RingReceiver(address, 0, 6, total_bytes(names), 60.0)
        receive_all(names, stream, engine.places(), load, limit=100)
        stream.close()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take)
        sender = RingSender(address, 1, 6, total_bytes(names), 60.0)
        send_all(names, gather_from(state), sender)
        sender.close()
        waiting.result(60)
    assert engine.version == 6
    assert {name: tensor.data_ptr() for name, tensor in engine.places().items()} == kept
    assert all(torch.equal(tensor, state[name]) for name, tensor in engine.places().items())
