"""How fast weights move between two processes of this machine, against a plain copy.

    python -m services.worker.engine.torch_engine.measure_transfer [--mib 512] [--device cpu]

prints one JSON line. One process holds a replica's weights, the other fetches all of them, as a
switch from tp1 to tp1 on another worker does: once through descriptors, once over TCP. The plain
copy is of as many bytes, mapped from the first process, into fresh memory of the second. Rounds
take turns, so that a busy machine slows all of them alike; medians count. With a CUDA device it is
the GPU's memory that is moved: by CUDA IPC, over TCP, and copied from device to device.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec
import torch
from torch import Tensor

from services.worker.engine.torch_engine.arena import Arena
from services.worker.engine.torch_engine.exports import Exports
from services.worker.engine.torch_engine.model_config import ModelConfig, RopeConfig
from services.worker.engine.torch_engine.shared_memory import MemorySegment
from services.worker.engine.torch_engine.transfer import connect_source, fetch_weights
from services.worker.engine.torch_engine.weights import allocate_weights
from services.worker.peers.address import PeerAddress
from services.worker.peers.server import PeerServer
from shared.placement.copies import Copy
from shared.placement.sheets import Rank, areas_of

_LAYER_BYTES = 4 * 1024 * 1024 * 12  # of the model below
_REPLICA = "measured"
_OWNER, _TAKER = "owner", "taker"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="measure_transfer", description=(__doc__ or "")[:80])
    parser.add_argument("--mib", type=int, default=512, help="weights to move")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    figures = measure(asked.mib * 2**20, rounds=asked.rounds, device=torch.device(asked.device))
    sys.stdout.write(msgspec.json.encode(figures).decode() + "\n")


def measure(weight_bytes: int, *, rounds: int, device: torch.device) -> dict[str, object]:
    """What ``main`` prints. Raises PeerLost if the other process fails."""
    model = _model(weight_bytes)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=_own, args=(model, device, theirs), daemon=True)
    owner.start()
    try:
        address = str(ours.recv())
        return _Taker(model, address, device).measure(rounds)
    finally:
        ours.close()
        owner.join(10.0)


def _model(weight_bytes: int) -> ModelConfig:
    """As many alike layers as come closest."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary=256,
        hidden=1024,
        intermediate=2816,
        layers=max(1, round(weight_bytes / _LAYER_BYTES)),
        heads=16,
        kv_heads=8,
        head_dim=64,
        norm_epsilon=1e-6,
        context_tokens=64,
        rope=RopeConfig(),
        tied_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        dtype="float32",
    )


def _own(model: ModelConfig, device: torch.device, pipe: Connection) -> None:
    """The process that holds the weights, until the other closes the pipe."""
    server = PeerServer(worker_id=_OWNER)
    arena = Arena(_REPLICA)
    weights = allocate_weights(
        model, Rank(), dtype=torch.float32, device=device, allocate=arena.allocate
    )
    for tensor in weights.named.values():
        tensor.fill_(1.0)
    exports = Exports(server, arena, replica_id=_REPLICA)
    exports.add(weights.shards, weights.named)
    pipe.send(server.address)
    pipe.poll(None)
    exports.close()
    server.close()


class _Taker:
    """The process that fetches."""

    def __init__(self, model: ModelConfig, address: str, device: torch.device) -> None:
        self._model, self._address, self._device = model, address, device

    def measure(self, rounds: int) -> dict[str, object]:
        there = PeerAddress.decode(self._address)
        remote = msgspec.structs.replace(there, host_id="another-host").encode()
        ways: dict[str, Callable[[], tuple[int, float]]] = {
            "plain": self._plain,
            "local": lambda: self._fetch(self._address),
            "tcp": lambda: self._fetch(remote),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        count = 0
        for turn in range(rounds + 1):
            for name, way in ways.items():
                count, took_s = way()
                if turn:  # the first round warms up
                    rates[name].append(count / took_s / 1e9)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        return {
            "measure": "transfer",
            "device": self._device.type,
            "bytes": count,
            "rounds": rounds,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "plain_gb_s": round(medians["plain"], 3),
            "local_gb_s": round(medians["local"], 3),
            "tcp_gb_s": round(medians["tcp"], 3),
            "local_to_plain": round(medians["local"] / medians["plain"], 3),
            "tcp_to_plain": round(medians["tcp"] / medians["plain"], 3),
        }

    def _fetch(self, address: str) -> tuple[int, float]:
        """Bytes and seconds of a whole fetch, connecting, mapping and fresh pages included."""
        arena = Arena("taken")
        weights = allocate_weights(
            self._model, Rank(), dtype=torch.float32, device=self._device, allocate=arena.allocate
        )
        areas = areas_of(self._model.shape("", "float32"), Rank())
        copies = [Copy(sheet, area, _OWNER, _REPLICA) for sheet, area in areas.items()]
        peers = {_OWNER: address}
        begin = time.perf_counter()
        fetched = fetch_weights(
            weights, copies, peers, worker_id=_TAKER, stage=0, verify=False, arena=arena
        )
        took_s = time.perf_counter() - begin
        assert all(bool((tensor == 1.0).all()) for tensor in weights.named.values())
        return sum(fetched.values()), took_s

    def _plain(self) -> tuple[int, float]:
        """The same bytes: each of the owner's pieces of memory in one copy, once mapped."""
        source = connect_source({_OWNER: self._address}, _OWNER, _REPLICA, worker_id=_TAKER)
        try:
            views = [source.view(name) for name in source.entries]
            storages = {view.untyped_storage().data_ptr(): view for view in views}
            whole = [
                view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
                for view in storages.values()
            ]
            size = sum(view.nbytes for view in whole)
            self._synchronize()
            begin = time.perf_counter()
            target = self._fresh(size)
            at = 0
            for view in whole:
                target[at : at + view.nbytes].copy_(view.view(torch.uint8))
                at += view.nbytes
            self._synchronize()
            return size, time.perf_counter() - begin
        finally:
            source.close()

    def _fresh(self, size: int) -> Tensor:
        if self._device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        segment = MemorySegment.create("plain")
        return segment.map(offset=segment.extend(size), size=size, writable=True)

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.cuda.synchronize(self._device)


if __name__ == "__main__":
    main()
