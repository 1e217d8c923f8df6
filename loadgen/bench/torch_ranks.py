"""The torch engine at any shape on this machine: this process leads, other ranks are processes."""

import multiprocessing
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from services.worker.engine.interface import Engine
from services.worker.engine.torch_engine.config import TorchEngineConfig
from services.worker.events import EngineStart
from services.worker.peers.server import PeerServer
from shared.hardware import Parallelism
from shared.messages.plans import ReplicaSpec

_ENGINE = "services.worker.engine.torch_engine.engine"
_START_S = 60.0
_END_S = 10.0


@contextmanager
def started(folder: Path, shape: str, config: TorchEngineConfig) -> Generator[Engine]:
    """The leading rank, ready; the others end with it. Raises EngineFailed if one cannot start."""
    from services.worker.engine.torch_engine.engine import (  # noqa: PLC0415
        build_torch_engine,  # torch takes seconds to import: only when asked for
    )

    gpus = tuple(f"g{number}" for number in range(Parallelism.parse(shape).gpus))
    spec = ReplicaSpec(replica_id="bench", model_id="bench", parallelism=shape, gpus=gpus)
    with ExitStack() as undo:
        server = PeerServer(worker_id=gpus[0])
        undo.callback(server.close)
        links = [undo.enter_context(_follower(gpu)) for gpu in gpus[1:]]
        peers = {gpus[0]: server.address} | dict(
            zip(gpus[1:], (_told(link) for link in links), strict=True)
        )
        for number, link in enumerate(links, start=1):
            start = EngineStart(spec=spec, generation=1, rank=number, epoch=1, peers=peers)
            link.send((start, folder, config))
        leading = EngineStart(spec=spec, generation=1, epoch=1, peers=peers)
        engine = build_torch_engine(leading, folder, config, server)
        undo.callback(engine.close)
        yield engine


@contextmanager
def _follower(gpu: str) -> Generator[Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_ENGINE])  # torch takes seconds to import: once for all ranks
    ours, theirs = context.Pipe()
    process = context.Process(target=_follow, args=(gpu, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(_END_S)
        if process.is_alive():
            process.kill()
            process.join()


def _told(link: Connection) -> str:
    if not link.poll(_START_S):
        raise TimeoutError(f"a rank's process said nothing for {_START_S:g} s")
    address: str = link.recv()
    return address


def _follow(gpu: str, link: Connection) -> None:
    """A rank's process."""
    from services.worker.engine.torch_engine.engine import follow_torch_engine  # noqa: PLC0415

    server = PeerServer(worker_id=gpu)
    link.send(server.address)
    start, folder, config = link.recv()
    follower = follow_torch_engine(start, folder, config, server)
    try:
        follower.serve()
    finally:
        follower.close()
        server.close()
