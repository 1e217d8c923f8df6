"""Runs are kept, reused and told apart; arrivals are the same for every policy."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from loadgen.compare.jobs import FORMAT, Job, RunFailed, RunRecord, Runs, perform
from loadgen.compare.targets import (
    class_targets,
    lone_requests,
    model_targets,
    relative_targets,
)
from loadgen.compare.workload import (
    TraceOfModel,
    Workload,
    arrivals,
    busiest_start_s,
    typed_windows,
)
from loadgen.simulator.outcome import SimulationResult, SimulationSpec
from loadgen.simulator.policies import POLICIES
from shared.mesh import MeshConfig
from shared.slo import DEFAULT_TARGETS
from tests.support.comparisons import metrics_of, result_of


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    """Two hundred seconds, the third quarter twice as busy; one prompt too long for the model."""
    rows = [f"{i},100,10" for i in range(200)] + [f"{100 + i},100,10" for i in range(50)]
    rows.append("199.5,9000,500")
    (tmp_path / "t.csv").write_text("timestamp_s,input_tokens,output_tokens\n" + "\n".join(rows))
    trace = TraceOfModel(
        model_id="m", path=str(tmp_path / "t.csv"), digest="d", context_tokens_max=4096
    )
    return Workload(traces=(trace,), start_s=0.0, window_s=200.0)


@pytest.fixture
def job(workload: Workload) -> Job:
    return Job(
        name="a",
        mesh=MeshConfig(),
        policy=POLICIES["oserve"],
        forecast="ours",
        workload=workload,
        rate_scale=0.5,
        seed=1,
        warmup_s=10.0,
        drain_s=60.0,
        targets={"m/x": DEFAULT_TARGETS["standard"]},
    )


def counting(calls: list[str]) -> Callable[[Job], RunRecord]:
    def done(job: Job) -> RunRecord:
        calls.append(job.name)
        return RunRecord(
            format=FORMAT, digest=job.digest, name=job.name, rate_scale=job.rate_scale,
            seed=job.seed, metrics=metrics_of(float(len(calls))),
        )  # fmt: skip

    return done


def test_what_is_finished_is_not_done_again(job: Job, tmp_path: Path) -> None:
    """An interrupted comparison would start from nothing."""
    calls: list[str] = []
    jobs = [msgspec.structs.replace(job, seed=seed) for seed in (1, 2)]
    first = Runs(tmp_path, perform=counting(calls)).all(jobs, "x")
    again = Runs(tmp_path, perform=counting(calls))
    more = [*jobs, msgspec.structs.replace(job, seed=3)]
    assert again.all(more, "x")[:2] == first
    assert (len(calls), again.done, again.reused) == (3, 1, 2)


def test_a_damaged_file_is_done_again(job: Job, tmp_path: Path) -> None:
    """A full disk would leave a file that every later run trips over."""
    calls: list[str] = []
    Runs(tmp_path, perform=counting(calls)).all([job], "x")
    (kept,) = tmp_path.glob("*.json")
    kept.write_bytes(kept.read_bytes()[:100])
    Runs(tmp_path, perform=counting(calls)).all([job], "x")
    assert len(calls) == 2


def test_digest_knows_what_matters_and_nothing_else(job: Job) -> None:
    """Another setting would get the old result; or another name of the same, a new run."""
    replace = msgspec.structs.replace
    policy = dataclasses.replace(job.policy, name="b", known="k", inferred="i")
    assert replace(job, name="b", policy=policy).digest == job.digest
    changed = (
        replace(job, seed=2),
        replace(job, rate_scale=0.6),
        replace(job, forecast="oracle"),
        replace(job, warmup_s=11.0),
        replace(job, slow_work_s=0.0),
        replace(job, mesh=MeshConfig(name="other")),
        replace(job, policy=POLICIES["dynamo"]),
        replace(job, targets={"m/x": DEFAULT_TARGETS["batch"]}),
        replace(job, workload=replace(job.workload, start_s=1.0)),
    )
    digests = {other.digest for other in changed}
    assert len(digests) == len(changed)
    assert job.digest not in digests


def test_equal_jobs_are_done_once(job: Job, tmp_path: Path) -> None:
    """static-best would repeat every run of the shape that it is."""
    calls: list[str] = []
    runs = Runs(tmp_path, perform=counting(calls))
    told: list[tuple[str, int, int]] = []
    runs.told = lambda what, done, total: told.append((what, done, total))
    a, b = runs.all([job, msgspec.structs.replace(job, name="b")], "phase")
    assert a == b
    assert len(calls) == 1
    assert told == [("phase", 0, 1), ("phase", 1, 1)]


def test_a_run_that_breaks_is_named_and_the_others_are_kept(job: Job, tmp_path: Path) -> None:
    """One broken policy would cost the whole comparison, and not say which it was."""

    def broken(job: Job) -> RunRecord:
        if job.seed == 2:
            raise AssertionError("two owners of one GPU")
        return counting([])(job)

    jobs = [msgspec.structs.replace(job, seed=seed) for seed in (1, 2, 3)]
    with pytest.raises(RunFailed, match=r"a at rate scale 0.5, seed 2.*two owners"):
        Runs(tmp_path, perform=broken).all(jobs, "x")
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_perform_gives_the_simulator_the_arrivals_and_measures(job: Job) -> None:
    """Load and seed of a run would not be those of its arrivals."""
    seen: list[SimulationSpec] = []

    def simulate(spec: SimulationSpec) -> SimulationResult:
        seen.append(spec)
        records = spec.traffic[0].records
        ones = [1.0] * len(records)
        return result_of(
            [r.timestamp_s for r in records], ones, ones, [9] * len(records), [1] * len(records),
            labels=["x"] * len(records),
        )  # fmt: skip

    record = perform(job, simulate)
    (spec,) = seen
    assert (spec.seed, spec.forecast, spec.drain_s) == (1, "ours", 60.0)
    assert list(spec.traffic[0].records) == list(
        arrivals(job.workload, rate_scale=0.5, seed=1)[0].records
    )
    counted = [r for r in spec.traffic[0].records if r.timestamp_s >= 10.0]
    assert record.metrics.offered == len(counted)
    assert record.metrics.goodput_rps == pytest.approx(len(counted) / 190.0)


def test_a_higher_load_keeps_what_a_lower_one_has(workload: Workload) -> None:
    """Loads would differ by luck on top of load."""
    few = {r.timestamp_s for r in arrivals(workload, rate_scale=0.3, seed=4)[0].records}
    more = {r.timestamp_s for r in arrivals(workload, rate_scale=0.6, seed=4)[0].records}
    other = {r.timestamp_s for r in arrivals(workload, rate_scale=0.3, seed=5)[0].records}
    assert few < more
    assert few != other


def test_prompts_are_cut_to_the_context_and_counted(workload: Workload) -> None:
    """Requests that no engine takes would count as misses of every policy."""
    (typed,) = typed_windows(workload)
    assert typed.cut == 1
    assert max(r.input_tokens + r.output_tokens for r in typed.records) == 4096
    assert {kind.label for kind in typed.types} == {"short-in/short-out", "long-in/long-out"}


def test_the_busiest_stretch_is_found(workload: Workload) -> None:
    """Saturation would be that of a quiet hour."""
    assert busiest_start_s(workload, 40.0) in (100.0, 110.0)
    assert busiest_start_s(workload, 500.0) == 0.0


def test_relative_targets_are_multiples_of_the_fastest(workload: Workload) -> None:
    """A target would be below what any replica can do, or that of another type."""
    (typed,) = typed_windows(workload)
    (traffic,) = lone_requests(typed.types)
    labels = [record.label for record in traffic.records]
    slow = result_of([0, 600], [2.0, 1.0], [6.0, 2.0], [9, 9], [500, 11], labels=labels)
    fast = result_of([0, 600], [1.0, 0.5], [5.99, 2.5], [9, 9], [500, 11], labels=labels)
    found = relative_targets([slow.requests, fast.requests], 5.0)
    first, second = (found[f"m/{label}"] for label in labels)
    assert (first.ttft_s, first.tpot_s) == pytest.approx((5.0, 0.05))
    assert (second.ttft_s, second.tpot_s) == pytest.approx((5.0, 0.5))
    assert class_targets(typed.types).keys() == found.keys()


def test_a_model_is_planned_for_its_mean_target(workload: Workload) -> None:
    """A rare type's target would decide the shapes of all."""
    (typed,) = typed_windows(workload)
    targets = class_targets(typed.types)
    assert model_targets(typed.types, targets) == {"m": DEFAULT_TARGETS["standard"]}
