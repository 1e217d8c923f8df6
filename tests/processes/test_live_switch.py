"""What clients do while replicas change their shape under them: leave, stop, and come."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

pytest.importorskip("torch", reason="needs the torch extra")

from deploy.local import LocalMesh
from loadgen.bench.switching import News, Switching, plan_of
from services.worker.engine.torch_engine.make_model import make_model
from shared.messages.plans import SwitchProgress
from tests.support.up import oserve
from tests.support.watch import MeshWatch, watching

pytestmark = [
    pytest.mark.nats,
    pytest.mark.torch,
    pytest.mark.processes,
    pytest.mark.timeout(240),
]

TOPOLOGY = """
[mesh]
name = "live"
[mesh.model]
model_id = "tiny"
path = "{path}"
context_tokens_max = 4096
[mesh.engine]
kind = "torch"
[mesh.engine.torch]
dtype = "float32"
threads = 1
kv_memory_bytes = 100663296
running_max = 32
[[mesh.nodes]]
node_id = "n0"
gpus = 2
[[mesh.replicas]]
replica_id = "r0"
[[mesh.replicas]]
replica_id = "r1"
[up]
routers = 1
"""
STREAMS, STREAM_TOKENS = 8, 1500
ARRIVAL_TOKENS = 80
STOPS, LEAVES = 0, 1  # which of the streams has a stop string, and whose client goes
STOP_CHARS = 8
ATTEMPTS_MAX = 2
SINGLES = (("tp1", ("n0-g0",)), ("tp1", ("n0-g1",)))
WAIT_S = 30.0  # for what takes a second here
PHASES = {"preparing", "pausing", "taking", "activating", "retiring"}


@dataclass(slots=True)
class Stream:
    """One streamed completion, as its client sees it."""

    number: int
    output_tokens: int
    stop: str = ""
    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    finish: str = ""
    ends: int = 0  # [DONE]

    async def run(self, http: aiohttp.ClientSession, url: str) -> None:
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": f"The story of number {self.number} begins ",
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if self.stop:
            body["stop"] = self.stop
        async with http.post(f"{url}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: "):
                    self._hear(line.removeprefix(b"data: ").strip())

    def _hear(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.ends += 1
            return
        choice = json.loads(data)["choices"][0]
        if choice.get("token_ids"):
            assert choice["position"] == len(self.tokens), "a token is missing, or was sent twice"
            self.tokens += choice["token_ids"]
        self.text += choice["text"]
        self.finish = choice["finish_reason"] or self.finish


def _streams() -> list[Stream]:
    return [Stream(number, STREAM_TOKENS) for number in range(STREAMS)]


def _arrivals() -> list[Stream]:
    return [Stream(STREAMS + number, ARRIVAL_TOKENS) for number in range(2 * len(PHASES))]


async def _all(streams: Sequence[Stream], url: str) -> None:
    async with _client() as http, asyncio.TaskGroup() as tasks:
        for stream in streams:
            tasks.create_task(stream.run(http, url))


@asynccontextmanager
async def _client() -> AsyncGenerator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=WAIT_S * 4)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        yield http


def _stop_string(text: str) -> tuple[str, int]:
    """Something that the text says for the first time after four fifths of it, and where."""
    for at in range(len(text) * 4 // 5, len(text) - STOP_CHARS):
        candidate = text[at : at + STOP_CHARS]
        if candidate.isascii() and text.find(candidate) == at:
            return candidate, at
    raise AssertionError(f"it repeats itself: {text!r}")


class _Clients:
    """The streams of a switch: those that run through it, and those that come in the middle."""

    def __init__(self, url: str, stop: str, http: aiohttp.ClientSession) -> None:
        self._url, self._http = url, http
        self.streams, self.arrivals = _streams(), _arrivals()
        self.streams[STOPS].stop = stop
        self._coming = list(self.arrivals)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.phases: list[str] = []

    def start(self, stream: Stream) -> None:
        running = stream.run(self._http, self._url)
        self._tasks[stream.number] = asyncio.create_task(running)

    @property
    def open(self) -> int:
        return sum(not task.done() for task in self._tasks.values())

    def hear(self, news: News) -> None:
        """A new request in each phase; in the first pause a client leaves."""
        if not isinstance(news, SwitchProgress) or news.phase in self.phases[-1:]:
            return
        self.phases.append(news.phase)
        if self._coming:
            self.start(self._coming.pop(0))
        if news.phase == "pausing":
            self._tasks[LEAVES].cancel()

    async def until_ended(self) -> None:
        for stream in self._coming:
            self.start(stream)
        for number, task in self._tasks.items():
            if number == LEAVES:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            else:
                await task


async def _switch(mesh: LocalMesh, to: str) -> dict[str, Any]:
    """``oserve switch``, as a person calls it; its report."""
    command = ("switch", "--to", to, "--bus-url", mesh.bus_url, "--json")
    ended = await asyncio.to_thread(oserve, *command)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    outcome = json.loads(ended.stdout)
    assert outcome["way"] == "live", outcome
    return outcome["report"]


async def test_clients_leave_stop_and_come_in_the_middle_of_a_switch(tmp_path: Path) -> None:
    """If this fails, a stream breaks or changes when its replica does; a request whose client has
    gone runs on where nobody knows of it; or who comes at the wrong moment is turned away."""
    folder = tmp_path / "model"
    make_model(folder)
    topology = tmp_path / "topology.toml"
    topology.write_text(TOPOLOGY.format(path=folder))
    async with (
        LocalMesh(topology, data_dir=tmp_path / "mesh", port=0, say=print) as mesh,
        watching(mesh) as watch,
        Switching(mesh.bus_url) as switching,
        _client() as http,
    ):
        before = [*_streams(), *_arrivals()]
        await _all(before, mesh.url)
        stop, cut = _stop_string(before[STOPS].text)
        clients = _Clients(mesh.url, stop, http)
        for stream in clients.streams:
            clients.start(stream)
        await _until(watch, lambda: all(s.tokens for s in clients.streams), "the first tokens")
        switching.on_news = clients.hear

        there = await _switch(mesh, "tp2*1")
        shown = len(clients.streams[STOPS].text)
        await _until(watch, lambda: _running(watch) <= clients.open, "the request that was left")
        back = (await switching.to(plan_of(SINGLES, model_id="tiny"))).ended.report
        assert back is not None
        assert clients.open > 0, "all had ended before the switch back"
        await clients.until_ended()

        assert there["moved"] >= STREAMS - 1, there
        assert back.moved > 0, back
        assert (there.get("replayed", 0), back.replayed) == (0, 0), (there, back)
        assert shown < cut, "the stop string came before the switch"
        assert clients.phases[:5] == ["preparing", "pausing", "taking", "activating", "retiring"]
        _assert_as_before(before, clients, cut)
    requests = len(before) + STREAMS + len(clients.arrivals)
    _assert_moved_along(mesh.log_dir / "ingress-0.log", requests=requests)


def _assert_as_before(before: Sequence[Stream], clients: _Clients, cut: int) -> None:
    for one, other in zip(before, [*clients.streams, *clients.arrivals], strict=True):
        if one.number == LEAVES:
            assert other.ends == 0
            assert other.tokens == one.tokens[: len(other.tokens)]
        elif one.number == STOPS:
            assert (other.text, other.finish, other.ends) == (one.text[:cut], "stop", 1)
        else:
            assert other.tokens == one.tokens, other.number
            assert (other.text, other.finish, other.ends) == (one.text, "length", 1)


def _assert_moved_along(log: Path, *, requests: int) -> None:
    """No stream was begun again. Who comes while everything stands still may be sent on once."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ended = [line for line in lines if line["event"] == "request.ended"]
    outcomes = sorted(line["outcome"] for line in ended)
    assert outcomes == ["aborted", *["completed"] * (requests - 1)], outcomes
    streams = [line for line in ended if line["output_tokens"] > ARRIVAL_TOKENS]
    assert {line["attempts"] for line in streams} == {1}, streams
    assert sum(line["handovers"] > 1 for line in streams) == STREAMS - 1, streams
    assert all(line["attempts"] <= ATTEMPTS_MAX for line in ended), ended


def _running(watch: MeshWatch) -> int:
    return sum(watch.running(gpu.gpu_id) for gpu in watch.mesh.topology.mesh.gpus())


async def _until(watch: MeshWatch, condition: Callable[[], bool], what: str) -> None:
    await watch.until(lambda: "" if condition() else "not so", timeout_s=WAIT_S, what=what)
