"""A simulated cluster with incidents: GPUs and services that die, stall, are cut off or slow."""

import numpy as np
import pytest

from loadgen.simulator.cluster import BOOT_S, Cluster
from loadgen.simulator.faults import Incident, IncidentKind
from loadgen.simulator.outcome import SimulationSpec
from loadgen.simulator.run import run
from loadgen.simulator.workshop import token_at
from services.ingress.journey import Journey
from tests.support.clusters import NEVER, mesh_of, poisson, spec_of

AT_S = 15.0
REQUESTS, RPS = 600, 20.0


def a_spec(*incidents: Incident) -> SimulationSpec:
    mesh = mesh_of(gpus=4, kv_blocks=6000)
    records = poisson(REQUESTS, rps=RPS, output_tokens_max=800)
    return spec_of(mesh, records, incidents=incidents or NEVER)


def incident(kind: IncidentKind, node: str, for_s: float) -> Incident:
    factor = 300.0 if kind == "slow" else 1.0
    return Incident(kind=kind, node=node, at_s=AT_S, for_s=for_s, factor=factor)


class Watched(Cluster):
    """Its engines say tokens that tell lost, repeated and foreign ones from right ones."""

    def __init__(self, spec: SimulationSpec) -> None:
        super().__init__(spec)
        self.ended = self.moves = 0
        self._completed = self.source.on_completed
        self.source.on_completed = self._on_completed  # type: ignore[method-assign]

    def tokens(self, request_id: str, position: int, count: int) -> list[int]:
        return [token_at(request_id, position + i) for i in range(count)]

    def _on_completed(self, journey: Journey) -> None:
        self.ended += 1
        self.moves += journey.moves
        wanted = journey.sampling.output_tokens_max
        right = [token_at(journey.request_id, position) for position in range(wanted)]
        assert journey.tokens == right, f"{journey.request_id} after {journey.moves} moves"
        self._completed(journey)


class Stepping(Watched):
    """Its engines take each step by itself and say each token at once, as in production."""

    streaming = True


def served(cluster: Watched) -> tuple[np.ndarray, np.ndarray]:
    """TTFT and E2E after everything was served."""
    cluster.boot()
    cluster.serve()
    found = cluster.source.columns
    assert (found.ended, cluster.ended, found.failed) == (REQUESTS, REQUESTS, {})
    ttft_s, e2e_s = np.array(found.ttft_s), np.array(found.e2e_s)
    assert (ttft_s <= e2e_s).all()
    assert list(found.output_tokens) == [a.record.output_tokens for a in cluster.arrivals]
    return ttft_s, e2e_s


@pytest.mark.parametrize(
    ("struck", "moves"),
    [
        (incident("crash", "n0-g1", 12.0), True),
        (incident("crash", "n0-g1", 1e6), True),
        (incident("stall", "n0-g1", 0.5), False),
        (incident("stall", "n0-g1", 12.0), True),
        (incident("partition", "n0-g1", 0.5), True),
        (incident("partition", "n0-g1", 12.0), True),
        (incident("slow", "n0-g1", 12.0), False),
        (incident("crash", "router", 3.0), False),
        (incident("crash", "switcher", 12.0), False),
        (incident("partition", "scheduler", 12.0), False),
    ],
    ids=lambda value: (
        f"{value.kind}-{value.node}-{value.for_s:g}s" if isinstance(value, Incident) else ""
    ),
)
def test_whatever_happens_every_token_comes_once(struck: Incident, *, moves: bool) -> None:
    """Incidents would lose or double what they interrupt, or wake up requests that have ended; or
    nothing would be interrupted, and incidents be no test of a policy. Whoever leaps is held to
    those who step: what an incident costs must not depend on how the simulator counts."""
    leaping, stepping = Watched(a_spec(struck)), Stepping(a_spec(struck))
    leapt, stepped = served(leaping), served(stepping)
    assert (leaping.moves > 3) is moves
    # When a slow link is fast again, what is sent then overtakes what was sent before, which costs
    # those that say each token by itself a few moves more.
    if struck.kind != "slow":
        assert leaping.moves == pytest.approx(stepping.moves, abs=2)
    (leapt_ttft_s, leapt_e2e_s), (stepped_ttft_s, stepped_e2e_s) = leapt, stepped
    assert leapt_e2e_s.mean() == pytest.approx(stepped_e2e_s.mean(), rel=0.03)
    # Of those that are moved at once a few find a queue, by chance: a mean of TTFT is made of them.
    assert np.median(leapt_ttft_s) == pytest.approx(np.median(stepped_ttft_s), rel=0.03)
    spread = 0.25 if moves else 0.03
    assert leapt_ttft_s.mean() == pytest.approx(stepped_ttft_s.mean(), rel=spread)
    assert np.quantile(leapt_e2e_s, 0.99) == pytest.approx(
        np.quantile(stepped_e2e_s, 0.99), rel=0.03
    )


def test_what_was_seen_before_a_crash_is_kept() -> None:
    """The first token of a request that is moved would be counted anew, or its E2E end early."""
    calm, struck = (
        run(a_spec(*incidents)).requests for incidents in ((), (incident("crash", "n0-g1", 12.0),))
    )
    seen = calm.arrived_s + calm.ttft_s < AT_S - 0.001
    assert struck.ttft_s[seen].tolist() == calm.ttft_s[seen].tolist()
    over = calm.arrived_s + calm.e2e_s < AT_S - 0.001
    assert struck.e2e_s[over].tolist() == calm.e2e_s[over].tolist()
    hit = seen & ~over & (struck.e2e_s > calm.e2e_s + 1.0)
    assert hit.any(), "requests of the dead GPU wait until its silence is noticed"
    assert struck.e2e_s.mean() > calm.e2e_s.mean()


def test_a_stalled_engine_does_not_compute() -> None:
    """A worker that was stopped for half a second would find its steps done when it wakes up."""
    calm, struck = (
        run(a_spec(*incidents)).requests for incidents in ((), (incident("stall", "n0-g1", 0.5),))
    )
    running = (calm.arrived_s + calm.ttft_s < AT_S) & (calm.arrived_s + calm.e2e_s > AT_S + 0.6)
    late_s = (struck.e2e_s - calm.e2e_s)[running]
    held_s = late_s[late_s > 0.25]
    assert len(held_s) > len(late_s) / 8, "about a quarter runs there"
    assert held_s.min() > 0.45, "steps of the half second were done all the same"
    # What arrives meanwhile, and waits, makes the steps after it a little longer.
    assert np.median(held_s) == pytest.approx(0.6, abs=0.15)


def test_incidents_bring_the_heartbeats_of_production() -> None:
    """A GPU's death would be noticed after minutes, as runs without incidents would have it."""
    cluster = Cluster(a_spec(incident("crash", "n0-g1", 1e6)))
    assert cluster.paces.pulse_s is None
    cluster.boot()
    cluster.serve()
    dead = [switch for switch in cluster.observer.switches if "n0-g1" in switch.reason]
    plan = cluster.observer.in_force
    assert plan is not None
    assert all("n0-g1" not in spec.gpus for spec in plan.replicas), "the rest is planned for"
    assert len(cluster.observer.switches) == 1, dead
    assert cluster.observer.switches[0].at_s - BOOT_S - AT_S < 5.0


def test_whoever_finds_no_replica_is_routed_again_as_soon_as_in_production() -> None:
    """While the only replica of a model is started anew its requests would wait for an ingress
    that rarely looks, and a short outage would count as a long one."""
    records = poisson(200, rps=5.0)
    crash = run(spec_of(mesh_of(), records, incidents=[incident("crash", "n0-g0", 1.0)])).requests
    assert crash.completed.all()
    first_s = np.sort((crash.arrived_s + crash.ttft_s)[crash.arrived_s > AT_S])
    up_s = first_s[0]
    assert AT_S + 1.0 + 3.0 < up_s < AT_S + 1.0 + 3.0 + 3.0, "restarted, noticed, loaded in 3 s"
    waited = (crash.arrived_s > AT_S) & (crash.arrived_s < up_s - 1.0)
    served_s = (crash.arrived_s + crash.ttft_s)[waited]
    assert waited.sum() > 10
    assert served_s.max() < up_s + 1.5, "pauses grow to a second at most"


def test_an_incident_that_never_came_is_said() -> None:
    """A run would count as one with a fault that it never had."""
    (note,) = run(a_spec()).notes
    assert note == "slow of profiler at 1e+09 s never came: all had ended before"
