"""Runs of a comparison: what one depends on, how it is done, where its outcome is kept.

A run's digest covers everything that its outcome depends on: settings, traces' contents, and the
source of whatever the simulator executes. A run whose digest is in the folder is not done again, so
that an interrupted comparison goes on where it was, and two policies that come to the same
deployment share their runs.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import msgspec

from loadgen.compare.metrics import RunMetrics, measure
from loadgen.compare.workload import Workload, arrivals
from loadgen.simulator.outcome import Forecast, SimulationResult, SimulationSpec
from loadgen.simulator.policies import Policy
from loadgen.simulator.run import run
from shared.errors import OServeError
from shared.mesh import MeshConfig
from shared.slo import SloTarget

OUTPUT_LIMIT = 2048
"""What clients allow: with just what they will get, routers would know each request's output."""
FORMAT = 1
"""Raised when a field of a kept run changes its meaning."""
ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("shared", "services", "loadgen/simulator", "loadgen/workload", "loadgen/compare")
_encoder = msgspec.json.Encoder(order="deterministic")


class RunFailed(OServeError):
    """A run could not be finished; names it. Those that were finished are kept."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ``name`` is what people call it, and no part of its digest."""

    name: str
    mesh: MeshConfig
    policy: Policy
    forecast: Forecast
    workload: Workload
    rate_scale: float
    seed: int
    warmup_s: float
    drain_s: float
    targets: dict[str, SloTarget]
    slow_work_s: float | None = None

    @property
    def digest(self) -> str:
        nameless = dataclasses.replace(self.policy, name="", known="", inferred="")
        same = msgspec.structs.replace(self, name="", policy=nameless)
        return hashlib.blake2b(
            _encoder.encode((FORMAT, source_digest(), same)), digest_size=12
        ).hexdigest()


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run, as kept in the folder."""

    format: int
    digest: str
    name: str
    rate_scale: float
    seed: int
    metrics: RunMetrics


Simulate = Callable[[SimulationSpec], SimulationResult]


def perform(job: Job, simulate: Simulate = run) -> RunRecord:
    """Do one run, in whatever process this is."""
    workload = job.workload
    result = simulate(
        SimulationSpec(
            mesh=job.mesh,
            traffic=arrivals(workload, rate_scale=job.rate_scale, seed=job.seed),
            policy=job.policy,
            forecast=job.forecast,
            seed=job.seed,
            drain_s=job.drain_s,
            slow_work_s=job.slow_work_s,
            output_tokens_limit=OUTPUT_LIMIT,
        )
    )
    metrics = measure(
        result,
        window_s=workload.window_s,
        warmup_s=job.warmup_s,
        targets=job.targets,
    )
    return RunRecord(
        format=FORMAT,
        digest=job.digest,
        name=job.name,
        rate_scale=job.rate_scale,
        seed=job.seed,
        metrics=metrics,
    )


class Runs:
    """Does jobs, at most ``processes`` at a time, and keeps their records in ``folder``."""

    def __init__(
        self,
        folder: Path,
        *,
        processes: int = 1,
        perform: Callable[[Job], RunRecord] = perform,
    ) -> None:
        self._folder, self._processes = folder, processes
        self._perform = perform
        self.told: Callable[[str, int, int], None] | None = None
        """Hears of progress: of what, how many runs are done, of how many."""
        self.done = self.reused = 0
        self.cpu_s = 0.0  # of the runs that were done

    @property
    def processes(self) -> int:
        return self._processes

    def all(self, jobs: Sequence[Job], what: str) -> list[RunRecord]:
        """The record of each job, in the order given; raises RunFailed."""
        wanted = {job.digest: job for job in jobs}
        records: dict[str, RunRecord] = {}
        for digest in wanted:
            kept = self._kept(digest)
            if kept is not None:
                records[digest] = kept
        self.reused += len(records)
        missing = [job for digest, job in wanted.items() if digest not in records]
        self._tell(what, len(records), len(wanted))
        for record in self._performed(missing):
            if record.digest not in wanted:
                raise RunFailed(
                    f"{record.name}: the source was changed while runs were under way; start again"
                )
            self._keep(record)
            records[record.digest] = record
            self.done += 1
            self.cpu_s += record.metrics.cpu_s
            self._tell(what, len(records), len(wanted))
        return [records[job.digest] for job in jobs]

    def _performed(self, jobs: Sequence[Job]) -> Iterator[RunRecord]:
        if self._processes == 1 or len(jobs) <= 1:
            for job in jobs:
                yield _named(job, lambda job=job: self._perform(job))
            return
        count = min(self._processes, len(jobs))
        # Spawned: a forked child would inherit threads' locks as they are.
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            futures: dict[Future[RunRecord], Job] = {
                pool.submit(self._perform, job): job for job in jobs
            }
            try:
                for future in as_completed(futures):
                    yield _named(futures[future], future.result)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.told is not None:
            self.told(what, done, total)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.json"

    def _kept(self, digest: str) -> RunRecord | None:
        """None for what is absent or damaged (a full disk): it is then done again."""
        try:
            record = msgspec.json.decode(self._path(digest).read_bytes(), type=RunRecord)
        except (OSError, msgspec.DecodeError):
            return None
        return record if record.digest == digest else None

    def _keep(self, record: RunRecord) -> None:
        """Written beside and renamed, so that an interrupted write is never read."""
        self._folder.mkdir(parents=True, exist_ok=True)
        beside = self._path(record.digest).with_suffix(".part")
        beside.write_bytes(msgspec.json.encode(record))
        beside.replace(self._path(record.digest))


def _named(job: Job, done: Callable[[], RunRecord]) -> RunRecord:
    try:
        return done()
    except OServeError:
        raise
    except Exception as error:
        what = f"{job.name} at rate scale {job.rate_scale:g}, seed {job.seed}"
        raise RunFailed(f"{what}: {type(error).__name__}: {error}") from error


@cache
def source_digest() -> str:
    """Of the code and the cost profiles that decide a run's outcome."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
