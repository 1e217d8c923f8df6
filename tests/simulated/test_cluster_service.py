"""A whole simulated cluster that nothing disturbs: what it serves, and that it does so again."""

import os
import subprocess
import sys

import numpy as np
import pytest

from loadgen.simulator.cluster import Cluster
from loadgen.simulator.outcome import SimulationSpec, Traffic
from loadgen.simulator.run import SimulationResult, run
from loadgen.workload.records import TraceRecord
from shared.errors import ConfigInvalid
from tests.support.clusters import NEVER, mesh_of, poisson, spec_of

TIGHT = {"kv_blocks": 400, "running_max": 32}
"""So little KV memory that requests preempt each other."""


class Stepping(Cluster):
    """Engines take each step by itself and say each token at once, as in production."""

    streaming = True


def a_spec(**changes: object) -> SimulationSpec:
    mesh = mesh_of(gpus=2, **TIGHT)
    return spec_of(mesh, poisson(600, rps=12.0, seed=4), **changes)


def columns(cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    """TTFT and E2E after everything was served."""
    cluster.boot()
    cluster.serve()
    found = cluster.source.columns
    return np.array(found.ttft_s), np.array(found.e2e_s)


def test_every_request_is_served_once_and_whole() -> None:
    """Requests or tokens would be lost, or served twice, and no figure would mean anything."""
    spec = a_spec()
    result = run(spec)
    requests = result.requests
    records = spec.traffic[0].records
    assert requests.completed.all()
    assert requests.output_tokens.tolist() == [record.output_tokens for record in records]
    assert requests.input_tokens.tolist() == [record.input_tokens for record in records]
    assert requests.arrived_s == pytest.approx([record.timestamp_s for record in records])
    assert [requests.labels[i] for i in requests.label] == [record.label for record in records]
    assert (requests.ttft_s > 2 * spec.network_s).all(), "to the replica and back"
    assert (requests.ttft_s <= requests.e2e_s).all()
    assert (requests.ttft_s < requests.e2e_s)[requests.output_tokens > 1].all()
    assert result.duration_s == pytest.approx((requests.arrived_s + requests.e2e_s).max())
    assert result.gpu_seconds == pytest.approx(2 * result.duration_s, abs=0.01)
    assert result.preemptions > 0, "the trace should be too much for the KV memory at times"
    assert (result.switches, result.notes) == ((), ())


def test_one_request_takes_what_its_steps_take() -> None:
    """The times of the cost model would not be those that requests feel."""
    record = TraceRecord(timestamp_s=1.0, input_tokens=3000, output_tokens=11)
    spec = spec_of(mesh_of(prefill_token_s=1e-4, context_token_s=0.0), [record])
    requests = run(spec).requests
    hops_s = 4 * spec.network_s  # question, answer, submission, chunk
    prefill_s = 2 * 0.01 + 3000 * 1e-4  # in two chunks: a step computes 2048 tokens
    assert requests.ttft_s[0] == pytest.approx(hops_s + prefill_s)
    assert requests.e2e_s[0] - requests.ttft_s[0] == pytest.approx(10 * (0.01 + 2e-4))


def test_same_specification_same_run() -> None:
    """A comparison of policies would compare noise."""
    first, again = run(a_spec()), run(a_spec())
    assert first.digest == again.digest
    for name in ("ttft_s", "e2e_s", "output_tokens", "completed"):
        assert (getattr(first.requests, name) == getattr(again.requests, name)).all()
    assert (first.events, first.engine_steps) == (again.events, again.engine_steps)
    other = run(spec_of(mesh_of(gpus=2, **TIGHT), poisson(600, rps=12.0, seed=5)))
    assert other.digest != first.digest


def test_a_run_does_not_depend_on_the_hash_seed() -> None:
    """A run in CI would differ from the same run on a laptop."""
    program = (
        "from loadgen.simulator.run import run\n"
        "from tests.simulated.test_cluster_service import a_spec\n"
        "print(run(a_spec()).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=50,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert digests == {run(a_spec()).digest}


@pytest.mark.parametrize("loud", [False, True], ids=["hushed", "loud"])
@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix-caching"])
def test_a_leap_feels_as_its_steps_do(*, caching: bool, loud: bool) -> None:
    """What makes the simulator fast would make it wrong: also the load that a worker reports in
    the middle of a leap, by which routers choose."""
    records = [
        TraceRecord(
            timestamp_s=record.timestamp_s,
            input_tokens=record.input_tokens + 1024,
            output_tokens=record.output_tokens,
            hash_ids=(number % 7, 100 + number % 21),
        )
        for number, record in enumerate(poisson(400, rps=12.0))
    ]
    mesh = mesh_of(gpus=2, prefix_caching=caching, **TIGHT)
    spec = spec_of(mesh, records, incidents=NEVER if loud else ())
    leaping, stepping = Cluster(spec), Stepping(spec)
    for leapt, stepped in zip(columns(leaping), columns(stepping), strict=True):
        assert leapt == pytest.approx(stepped, abs=1e-9)
    assert leaping.engine_steps == stepping.engine_steps
    assert leaping.preemptions == stepping.preemptions > 0
    assert leaping.world.steps < stepping.world.steps * 0.6, "it should be worth the trouble"


def latency(result: SimulationResult, share: float) -> tuple[float, float]:
    requests = result.requests
    return float(np.quantile(requests.ttft_s, share)), float(np.quantile(requests.e2e_s, share))


def test_hushed_heartbeats_change_little() -> None:
    """Runs without incidents, whose cores repeat themselves rarely, would be runs of another mesh:
    with other plans, or felt otherwise by its clients."""
    records = poisson(2000, rps=20.0)
    mesh = mesh_of(gpus=4, kv_blocks=1200, running_max=32)
    hushed, loud = (run(spec_of(mesh, records, incidents=i)) for i in ((), NEVER))
    assert hushed.requests.completed.all()
    assert loud.requests.completed.all()
    assert hushed.switches == loud.switches == ()
    assert hushed.events < loud.events * 0.85, "it should be worth the trouble"
    for share, ttft, e2e in ((0.5, 0.01, 0.01), (0.9, 0.02, 0.01), (0.99, 0.1, 0.02)):
        (ttft_s, e2e_s), (ttft_loud_s, e2e_loud_s) = latency(hushed, share), latency(loud, share)
        assert ttft_s == pytest.approx(ttft_loud_s, rel=ttft)  # P99: of 20 requests
        assert e2e_s == pytest.approx(e2e_loud_s, rel=e2e)
    assert hushed.requests.ttft_s.mean() == pytest.approx(loud.requests.ttft_s.mean(), rel=0.01)
    assert hushed.requests.e2e_s.mean() == pytest.approx(loud.requests.e2e_s.mean(), rel=0.01)


def test_shared_prefixes_are_prefilled_once() -> None:
    """Prefix caching would be a setting without effect, or change what is served."""
    records = [
        TraceRecord(
            timestamp_s=0.5 * number,
            input_tokens=2000,
            output_tokens=5,
            hash_ids=(1, 2, 3, 1000 + number),
        )
        for number in range(40)
    ]
    plain, caching = (
        run(spec_of(mesh_of(prefill_token_s=1e-4, prefix_caching=on), records)).requests
        for on in (False, True)
    )
    assert plain.output_tokens.tolist() == caching.output_tokens.tolist()
    saved_s = plain.ttft_s - caching.ttft_s
    assert saved_s[0] == pytest.approx(0.0, abs=1e-9), "nobody came before the first"
    assert saved_s[1:] == pytest.approx(3 * 512 * 1e-4, abs=1e-6), "three blocks of the trace"


def test_what_does_not_fit_or_does_not_end_is_said() -> None:
    """A run would look good because its hard requests had vanished from it."""
    huge = TraceRecord(timestamp_s=1.0, input_tokens=90_000, output_tokens=5)
    endless = TraceRecord(timestamp_s=2.0, input_tokens=5, output_tokens=3000)
    result = run(spec_of(mesh_of(**TIGHT), [huge, endless], drain_s=10.0))
    assert not result.requests.completed.any()
    assert np.isnan(result.requests.e2e_s).all()
    assert result.notes == (
        "1 requests failed: too_long",
        "1 requests were still open 10 s after the last arrival",
    )


def test_without_requests_nothing_happens() -> None:
    """A window in which no request falls would crash, or never end."""
    result = run(spec_of(mesh_of(), []))
    assert (len(result.requests.ttft_s), result.duration_s) == (0, 0.0)


def test_traffic_for_a_model_that_is_not_served_is_refused() -> None:
    """All of its requests would wait for ten virtual minutes, and fail."""
    traffic = (Traffic(model_id="typo", records=poisson(3, rps=1.0)),)
    spec = spec_of(mesh_of(), [], traffic=traffic)
    with pytest.raises(ConfigInvalid, match="known models: m"):
        run(spec)
