"""A live mesh whose mix of requests shifts: the deployment follows, and says why."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from loadgen.client import ClientOptions, replay
from loadgen.results import RequestResult
from loadgen.workload.records import TraceRecord
from tests.support.up import Up, oserve

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "shared/cost/profiles/h100"
MODEL = "llama-2-70b"
PATIENCE_S = 120.0
TOPOLOGY = """
[mesh]
name = "shift"

[mesh.model]
model_id = "llama-2-70b"
profile = "{folder}/profiles/llama-2-70b"
context_tokens_max = 8192

[mesh.engine.modelled]
timing = "profile"

[[mesh.nodes]]
node_id = "n0"
gpus = 8
gpu_kind = "h100"
gpu_memory_bytes = 85520809984

[[mesh.replicas]]
replica_id = "r0"
parallelism = "tp2"

[ingress]
first_route_s = 60.0 # whoever waited long at a replica that goes may wait on for the next one

[profiler]
window_s = 2.0
seed_samples = 8

[scheduler]
policy = "oserve"
policy_period_s = 3.0
elastic = true

[switcher]
drain_timeout_s = 5.0

[up]
http_port = 0
routers = 1
data_dir = "{folder}/data"
"""
ENOUGH = "1 x tp2"
"""Serves short requests five times as fast as they come; of long ones its KV cache holds three."""
CHAT, DOCUMENTS = (2.0, 400, 80), (1.2, 6000, 150)  # requests/s, prompt and output tokens


def _write_topology(folder: Path) -> Path:
    """Eight H100s that load weights in half a second, and have 3.5 GB less memory."""
    profiles = folder / "profiles/h100"
    profiles.mkdir(parents=True)
    (profiles / f"{MODEL}.toml").write_bytes((SHIPPED / f"{MODEL}.toml").read_bytes())
    facts = (SHIPPED / "gpu.toml").read_text(encoding="utf-8")
    facts = re.sub(r"(?m)^engine_start_s = .*$", "engine_start_s = 0.5", facts)
    facts = re.sub(r"(?m)^reserved_bytes = .*$", "reserved_bytes = 5900000000", facts)
    head, disk = facts.split("[disk]")
    disk = re.sub(r"(?m)^bytes_per_s = .*$", "bytes_per_s = 3e11", disk)
    (profiles / "gpu.toml").write_text(f"{head}[disk]{disk}", encoding="utf-8")
    file = folder / "mesh.toml"
    file.write_text(TOPOLOGY.format(folder=folder), encoding="utf-8")
    return file


class Traffic:
    """Requests of one kind at a steady rate, whatever becomes of them, until told otherwise: what
    each second brings is a replay of its own. All that was sent is waited for at the end."""

    def __init__(self, url: str) -> None:
        self.results: list[RequestResult] = []
        self.kind = CHAT
        self._options = ClientOptions(url=url, model=MODEL, timeout_s=PATIENCE_S)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> list[RequestResult]:
        """Send nothing more; what became of everything."""
        self._ended.set()
        self._thread.join()
        return self.results

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            owed = 0.0
            while not self._ended.is_set():
                rate_rps, input_tokens, output_tokens = self.kind
                owed += rate_rps
                number, owed = int(owed), owed % 1.0
                records = [
                    TraceRecord(
                        timestamp_s=i / rate_rps,
                        input_tokens=input_tokens,
                        output_tokens=output_tokens,
                    )
                    for i in range(number)
                ]
                tasks.create_task(self._replay(records))
                await asyncio.sleep(1.0)

    async def _replay(self, records: list[TraceRecord]) -> None:
        self.results += await replay(records, self._options)


class Asked:
    """``oserve`` commands on the one mesh of the test."""

    def __init__(self, topology: Path) -> None:
        self._mesh = ("-t", str(topology))

    def text(self, *arguments: str) -> str:
        answer = oserve(*arguments, *self._mesh, timeout_s=PATIENCE_S + 30.0)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    def why(self, question: str) -> dict[str, Any]:
        return json.loads(self.text("why", question, "--json"))

    def until(self, question: str, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The first answer that is as ``wanted``."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            answer = self.why(question)
            if wanted(answer):
                return answer
            assert time.monotonic() < deadline_s, json.dumps(answer, indent=2)
            time.sleep(0.5)


def _compared(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Types of which something was predicted and something was seen."""
    return [row for row in answer["types"] if row["predicted"] and row["seen"]]


def test_the_deployment_follows_the_mix_and_a_person_overrules_it(tmp_path: Path) -> None:
    """A mesh that keeps the shapes of yesterday's requests would fail today's, lose requests while
    it changes, or leave its operator without a reason and without a say."""
    topology, former = _write_topology(tmp_path), tmp_path / "former.toml"
    asked = Asked(topology)
    with Up(topology) as up, Traffic(up.url()) as traffic:
        quiet = asked.until("not-switching", lambda answer: answer["decision"])
        assert quiet["plan"] == ENOUGH
        asked.text("why", "plan", "--out", str(former))

        traffic.kind = DOCUMENTS
        moved = asked.until("plan", lambda answer: answer["plan"] != ENOUGH and _compared(answer))
        assert moved["decision"]["in_force"]["plan"] != moved["plan"]
        assert moved["decision"]["switch"]["moves"]
        assert moved["switch"]["succeeded"]
        shown = asked.text("why", "plan")
        for text in ("Predicted, and seen in", "in force then", "Switch", "the switch took"):
            assert text in shown, shown
        replica_id = moved["decision"]["replicas"][0]["replica_id"]
        replica = asked.text("why", "replica", replica_id)
        assert "started, epoch" in replica, replica

        assert "is in force as epoch" in asked.text("adopt", str(former))
        pinned = asked.why("plan")
        assert (pinned["plan"], pinned["pinned"]) == (ENOUGH, True)
        assert "`oserve release`" in asked.text("why", "not-switching")
        asked.text("release")
        asked.until("plan", lambda answer: not answer["pinned"] and answer["plan"] != ENOUGH)

        results = traffic.end()
        up.interrupt()
        assert up.exit_code() == 0, up.output
    lost = [result for result in results if not result.completed]
    assert not lost, [(result.error_code, result.error_message) for result in lost]
    assert {result.input_tokens for result in results} == {CHAT[1], DOCUMENTS[1]}
