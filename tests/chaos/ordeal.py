"""A replay that is disturbed, fault after fault, and what came of it.

Faults never overlap: each begins when the mesh is whole again after the one before, with requests
in flight. Nothing here waits for a fixed time but the ten seconds that a process is held still.
"""

import asyncio
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic

from rich.console import Console
from rich.table import Table

from loadgen.client import ClientOptions, Progress, closed_loop
from loadgen.results import RequestResult
from loadgen.workload.records import TraceRecord
from shared.errors import OServeError
from tests.support.usage import Usage, open_files_of, usage_of
from tests.support.watch import MeshWatch

RECOVERY_TIMEOUT_S = 60.0  # of one fault, on a machine that does other things as well
SETTLE_TIMEOUT_S = 30.0
STILL_S = 10.0


@dataclass(frozen=True, slots=True)
class Fault:
    """``victim`` is a process of the supervisor; ``held`` is stopped for STILL_S, not killed."""

    victim: str
    held: bool = False

    @property
    def worker_id(self) -> str:
        """The worker that it hits, "" if it hits none."""
        service, _, rest = self.victim.partition("-")
        return rest if service == "worker" else ""


@dataclass(slots=True, kw_only=True)
class Outcome:
    fault: Fault
    at_s: float  # on the replay's clock, as are the times of its results
    in_flight: int
    recovery_s: float  # to the whole mesh; for a process held still, from when it may go on
    over_s: float
    moves: dict[str, float]  # attempts given up, by reason
    ended: int  # requests that ended between fault and recovery
    restarted: set[str]  # processes that are others than before


@dataclass(slots=True)
class Ordeal:
    """Everything that a test asks about a disturbed replay."""

    results: list[RequestResult]
    outcomes: list[Outcome] = field(default_factory=list[Outcome])

    def show(self) -> None:
        table = Table(
            "fault", "at s", "in flight", "whole again s", "ended", "longest silence s", "moves"
        )
        for outcome in self.outcomes:
            held = f" held {STILL_S:g} s" if outcome.fault.held else " killed"
            moves = ", ".join(f"{n:g} {why}" for why, n in sorted(outcome.moves.items()))
            table.add_row(
                outcome.fault.victim + held,
                f"{outcome.at_s:.1f}",
                str(outcome.in_flight),
                f"{outcome.recovery_s:.1f}",
                str(outcome.ended),
                f"{self._silence_s(outcome):.1f}",
                moves or "-",
            )
        Console(width=120).print(table, f"{len(self.results)} requests")

    def _silence_s(self, outcome: Outcome) -> float:
        """The longest that any client waited for its next token, of the waits that the fault or
        the recovery from it touched."""
        longest_s = 0.0
        for result in self.results:
            times_s = [result.sent_s or 0.0, *result.chunk_times_s]
            for before_s, after_s in pairwise(times_s):
                if after_s > outcome.at_s and before_s < outcome.over_s:
                    longest_s = max(longest_s, after_s - before_s)
        return longest_s


async def endure(
    watch: MeshWatch,
    records: Iterable[TraceRecord],
    options: ClientOptions,
    faults: Sequence[Fault],
    *,
    concurrency: int,
    requests_min: int,
) -> Ordeal:
    """Replay ``records`` in a closed loop while the faults happen; it goes on until the last is
    over and ``requests_min`` were sent, so that every fault meets requests in flight."""
    progress = Progress()
    over = asyncio.Event()
    ordeal = Ordeal([])

    def until_over() -> Iterator[TraceRecord]:
        for count, record in enumerate(records):
            if over.is_set() and count >= requests_min:
                return
            yield record

    async def disturb() -> None:
        try:
            for fault in faults:
                ordeal.outcomes.append(await _suffer(watch, fault, progress, origin_s))
        except BaseException:
            progress.stop.set()  # nothing to wait for: the test has failed
            raise
        finally:
            over.set()

    origin_s = monotonic()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(disturb())
        ordeal.results = await closed_loop(
            until_over(), options, concurrency=concurrency, progress=progress
        )
    return ordeal


async def _suffer(watch: MeshWatch, fault: Fault, progress: Progress, origin_s: float) -> Outcome:
    """One fault, from the moment when it can hurt to the moment when all is well."""
    await watch.until(
        lambda: _harmless(watch, fault, progress),
        timeout_s=SETTLE_TIMEOUT_S,
        what=f"before the fault of {fault.victim}",
    )
    moves, pids = await _moves(watch), watch.mesh.pids()
    at_s, in_flight, completed = monotonic(), progress.in_flight, progress.completed
    await _inflict(watch, fault)
    inflicted_s = monotonic()
    await watch.until_whole(since_s=inflicted_s, timeout_s=RECOVERY_TIMEOUT_S)
    whole_s, ended = monotonic(), progress.completed - completed
    # Whoever was in flight has ended, as far as counting tells, and others after it.
    served = progress.completed + 2 * progress.in_flight
    await watch.until(
        lambda: "" if progress.completed > served else "hardly any request has ended since then",
        timeout_s=RECOVERY_TIMEOUT_S,
        what=f"after the fault of {fault.victim}",
    )
    after = await _moves(watch)
    return Outcome(
        fault=fault,
        at_s=at_s - origin_s,
        in_flight=in_flight,
        recovery_s=whole_s - (inflicted_s if fault.held else at_s),
        over_s=monotonic() - origin_s,
        moves={why: n - moves.get(why, 0.0) for why, n in after.items() if n > moves.get(why, 0.0)},
        ended=ended,
        restarted={name for name, pid in watch.mesh.pids().items() if pids.get(name) != pid},
    )


async def _inflict(watch: MeshWatch, fault: Fault) -> None:
    """Returns when the process goes on, or another runs in its place."""
    mesh, victim, worker_id = watch.mesh, fault.victim, fault.worker_id
    if fault.held:
        mesh.kill(victim, signal.SIGSTOP)
        await asyncio.sleep(STILL_S)
        mesh.kill(victim, signal.SIGCONT)
        return
    pid = mesh.pids()[victim]
    incarnation = watch.incarnation(worker_id) if worker_id else ""

    def lasting() -> str:
        if mesh.pids().get(victim, pid) == pid:
            return "not restarted"
        silent = worker_id and watch.incarnation(worker_id) == incarnation
        return "restarted, but not heard" if silent else ""

    mesh.kill(victim)
    await watch.until(lasting, timeout_s=RECOVERY_TIMEOUT_S, what=victim)


def _harmless(watch: MeshWatch, fault: Fault, progress: Progress) -> str:
    if progress.in_flight == 0:
        return "no request is in flight"
    if fault.worker_id and watch.running(fault.worker_id) == 0:
        return f"{fault.worker_id} runs no request"
    return ""


async def _moves(watch: MeshWatch) -> dict[str, float]:
    found = await watch.metric("oserve_ingress_moves_total")
    return {labels.partition("=")[2].strip('"'): value for labels, value in found.items()}


def assert_each_ended_once(results: Sequence[RequestResult]) -> None:
    """One finish_reason, one [DONE], all tokens, positions contiguous: the client's own verdict
    (loadgen.stream) is that a request which is not so has not completed."""
    broken = [
        f"request {r.index} ({r.request_id}): {r.error_code}: {r.error_message}"
        for r in results
        if not r.completed
    ]
    assert not broken, "\n".join(broken)
    for result in results:
        assert (result.finishes, result.dones) == (1, 1), result
        assert len(result.token_ids) == result.output_tokens_asked, result
        assert result.resends == 0, result


async def assert_nothing_left(watch: MeshWatch) -> None:
    """No request is owned by the ingress or runs on a worker once no client waits."""

    def left() -> str:
        busy = {g.gpu_id: watch.running(g.gpu_id) for g in watch.mesh.topology.mesh.gpus()}
        return "" if not any(busy.values()) else f"workers still run {busy}"

    await watch.until(left, timeout_s=SETTLE_TIMEOUT_S, what="after the replay")
    opened = await watch.metric("oserve_ingress_open_requests")
    assert opened == {"": 0.0}, opened


def assert_only_victims_died(outcomes: Sequence[Outcome]) -> None:
    """A process that dies of another's death is restarted as well, and would go unseen."""
    for outcome in outcomes:
        fault = outcome.fault
        assert outcome.restarted == (set[str]() if fault.held else {fault.victim}), outcome


class Resources:
    """Descriptors and memory of processes that live through the replay, before and after."""

    def __init__(self, pids: dict[str, int], *, rss_growth_bytes_max: dict[str, int]) -> None:
        self._pids, self._growth_max = pids, rss_growth_bytes_max
        self._before: dict[str, Usage] = {}

    async def take_baseline(self) -> None:
        """Once the descriptors are the same twice in a second: connections take a moment to go."""
        deadline_s = monotonic() + SETTLE_TIMEOUT_S
        while True:
            self._before = {name: usage_of(pid) for name, pid in self._pids.items()}
            await asyncio.sleep(1.0)
            fds = {name: usage_of(pid).fds for name, pid in self._pids.items()}
            if fds == {name: usage.fds for name, usage in self._before.items()}:
                return
            if monotonic() >= deadline_s:
                raise OServeError(f"descriptors do not settle: {self._before}, {fds}")

    async def assert_returned(self, watch: MeshWatch) -> None:
        """Descriptors exactly; memory within what the test allows for each."""

        def leaked() -> str:
            now = {name: usage_of(pid).fds for name, pid in self._pids.items()}
            grown = {n: (self._before[n].fds, now[n]) for n in now if now[n] != self._before[n].fds}
            return f"{grown}: {[open_files_of(self._pids[n]) for n in grown]}" if grown else ""

        await watch.until(leaked, timeout_s=SETTLE_TIMEOUT_S, what="file descriptors")
        table = Table("process", "fds", "rss before MB", "rss after MB")
        grown: list[str] = []
        for name, pid in self._pids.items():
            before, now = self._before[name], usage_of(pid)
            row = (f"{now.fds}", f"{before.rss_bytes / 1e6:.1f}", f"{now.rss_bytes / 1e6:.1f}")
            table.add_row(name, *row)
            if now.rss_bytes - before.rss_bytes > self._growth_max[name]:
                grown.append(f"{name} grew from {before.rss_bytes} to {now.rss_bytes} bytes")
        Console(width=110).print(table)
        assert not grown, grown
