"""The search for saturation, on made-up systems whose saturation is known."""

from pathlib import Path

import msgspec
import pytest

from loadgen.compare.jobs import FORMAT, Job, RunRecord, Runs
from loadgen.compare.saturation import (
    DOUBLINGS_MAX,
    FIRST_STEP,
    GRACE_SHARE,
    TOLERANCE,
    Bearers,
    SaturationNotFound,
    bisect_scale,
    light_scale,
)
from loadgen.compare.workload import TraceOfModel, Workload
from loadgen.simulator.policies import POLICIES
from shared.mesh import MeshConfig
from shared.slo import DEFAULT_TARGETS
from tests.support.comparisons import metrics_of

WINDOW_S = 200.0
REST_S = 2.0


@pytest.mark.parametrize("true", [0.0031, 0.4, 1.0, 1.7, 900.0])
def test_bisection_finds_the_scale_of_a_monotone_system(true: float) -> None:
    """Load 1.0 would mean something else on each trace."""
    low, high, name = bisect_scale(lambda scale: "it" if scale <= true else None)
    assert low <= true < high
    assert high - low <= TOLERANCE * low
    assert name == "it"


@pytest.mark.parametrize("true", [0.0031, 0.4, 0.83, 1.0, 1.3, 900.0])
def test_an_estimate_shortens_the_search_and_does_not_bend_it(true: float) -> None:
    """Saturation would be where a fluid model expects it."""
    asked: list[float] = []

    def keeps_up(scale: float) -> str | None:
        asked.append(scale)
        return "it" if scale <= true else None

    low, high, _ = bisect_scale(keeps_up, first_step=FIRST_STEP)
    assert low <= true < high
    assert high - low <= TOLERANCE * low
    near = 1 / FIRST_STEP <= true < FIRST_STEP
    assert len(asked) <= (6 if near else 2 * DOUBLINGS_MAX)


def test_the_bearer_of_the_largest_scale_is_named() -> None:
    """The report would credit a deployment that had given up before."""
    low, _, name = bisect_scale(lambda s: "few" if s <= 1.5 else "many" if s <= 3.0 else None)
    assert name == "many"
    assert low == pytest.approx(3.0, rel=TOLERANCE)


@pytest.mark.parametrize("answer", [None, "it"])
def test_a_search_without_end_gives_up_and_says_so(answer: str | None) -> None:
    """It would double for ever where nothing, or everything, is borne."""
    asked: list[float] = []

    def keeps_up(scale: float) -> str | None:
        asked.append(scale)
        return answer

    with pytest.raises(SaturationNotFound):
        bisect_scale(keeps_up)
    assert len(asked) <= 2 * DOUBLINGS_MAX + 2


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    rows = "".join(f"{i / 2},100,10\n" for i in range(400))
    (tmp_path / "t.csv").write_text("timestamp_s,input_tokens,output_tokens\n" + rows)
    trace = TraceOfModel(
        model_id="m", path=str(tmp_path / "t.csv"), digest="d", context_tokens_max=4096
    )
    return Workload(traces=(trace,), start_s=0.0, window_s=WINDOW_S)


def job_of(name: str, workload: Workload) -> Job:
    return Job(
        name=name,
        mesh=MeshConfig(name=name),
        policy=POLICIES["static-best"],
        forecast="ours",
        workload=workload,
        rate_scale=1.0,
        seed=1,
        warmup_s=0.0,
        drain_s=1.0,
        targets={"m/x": DEFAULT_TARGETS["standard"]},
    )


def test_bearers_ask_each_deployment_no_more_than_needed(
    workload: Workload, tmp_path: Path
) -> None:
    """A search over ten shapes would simulate ten times what it has to; or it would take a
    backlog that ends within the grace for one that does not."""
    bears = {"slow": 0.7, "fast": 2.3, "dead": 0.0}
    asked: list[tuple[str, float]] = []

    def perform(job: Job) -> RunRecord:
        asked.append((job.name, job.rate_scale))
        light = job.rate_scale == light_scale(workload)
        grace_s = GRACE_SHARE * WINDOW_S + REST_S
        borne = job.rate_scale <= bears[job.name]
        metrics = msgspec.structs.replace(
            metrics_of(1.0, e2e_ms_p99=None if job.name == "dead" else 1000 * REST_S),
            settled_s=grace_s if borne or light else grace_s + 0.1,
        )
        return RunRecord(
            format=FORMAT, digest=job.digest, name=job.name, rate_scale=job.rate_scale, seed=1,
            metrics=metrics,
        )  # fmt: skip

    runs = Runs(tmp_path / "runs", perform=perform)
    bearers = Bearers(runs, [job_of(name, workload) for name in bears])
    low, high, name = bisect_scale(bearers.keeps_up)
    assert (low <= 2.3 < high, name) == (True, "fast")
    assert light_scale(workload) == pytest.approx(0.25)
    of = {name: [scale for asked_name, scale in asked if asked_name == name] for name in bears}
    assert of["dead"] == [0.25]
    assert of["slow"] == [0.25, 1.0]
    assert bearers.simulations == len(asked)
