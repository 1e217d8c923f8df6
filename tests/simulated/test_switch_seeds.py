"""Switches under seeded faults, live ones above all: nothing lost or twice, never too much."""

from collections import Counter

import pytest

from loadgen.simulator.__main__ import main
from loadgen.simulator.engine import Engine
from loadgen.simulator.mesh import Mesh, Outcome, replay_command
from loadgen.simulator.ranks import Ranks
from loadgen.simulator.switch_mesh import PHASES, CalmSwitchMesh, SwitchMesh
from services.switcher.core import Switcher
from services.switcher.view import WorkerView
from shared.core import Publish
from shared.messages import plans, replicas

SEEDS, CALM_SEEDS, SEEDS_PER_TEST = 100, 50, 25


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_switches_keep_their_promises_under_faults(first: int) -> None:
    """Otherwise a crash, stall, partition or twin in some phase of a switch loses a token, gives a
    GPU more than it holds, or leaves neither plan in force."""
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            SwitchMesh(seed, trace_max=1).run()
        except Exception as error:
            message = f"seed {seed}: {error!r}\nreplay it: {replay_command(seed, 'switch')}"
            raise AssertionError(message) from error


@pytest.mark.parametrize("first", range(0, CALM_SEEDS, SEEDS_PER_TEST))
def test_switches_disturb_nobody_when_nothing_goes_wrong(first: int) -> None:
    """Otherwise requests would run twice at a time, GPUs compute for two replicas, or requests be
    begun anew, only because the plan changes."""
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            CalmSwitchMesh(seed, trace_max=1).run()
        except Exception as error:
            message = f"seed {seed}: {error!r}\nreplay it: {replay_command(seed, 'calm')}"
            raise AssertionError(message) from error


def test_most_switches_are_live_and_move_requests() -> None:
    """Otherwise the seeds prove little: every switch would drain, stop and start as before."""
    calm = [CalmSwitchMesh(seed, trace_max=1).run() for seed in range(1000, 1030)]
    live, reloads = _sum(calm, "live"), _sum(calm, "reloads") - len(calm)  # the first one each
    assert live > 5 * reloads
    assert live > 60
    assert _sum(calm, "moved") > 40
    assert _sum(calm, "replayed") < _sum(calm, "moved") / 4


def test_faults_strike_every_phase_of_a_live_switch() -> None:
    """Otherwise a phase could be defenceless, and no seed fail."""
    seen: Counter[str] = Counter()

    def see(_: str, effect: Publish) -> None:
        match effect.message:
            case plans.SwitchEnded(succeeded=False):
                seen["rolled back"] += 1
            case replicas.ReplicaFailed():
                seen["failed"] += 1
            case replicas.ResumeReplica():
                seen["resumed"] += 1
            case replicas.AdvanceStage():
                seen["staged"] += 1
            case _:
                pass

    for seed in range(1000, 1050):
        mesh = SwitchMesh(seed, trace_max=1)
        mesh.world.taps.append(see)
        mesh.run()
        seen.update(mesh.ambush.struck)
    what = ("rolled back", "failed", "resumed", "staged", *PHASES)
    assert not {each: seen[each] for each in what if seen[each] < 4}, seen


@pytest.mark.parametrize(
    ("owner", "guard", "answer"),
    [
        (WorkerView, "gone", False),
        (Switcher, "_on_phase_deadline", ()),
    ],
    ids=["vanished-workers", "phase-deadlines"],
)
def test_the_loss_of_a_guard_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, owner: object, guard: str, answer: object
) -> None:
    """Otherwise the guard is either dead code, or the seeds do not test what it is for."""

    def broken(*_args: object, **_kwargs: object) -> object:
        return answer

    monkeypatch.setattr(owner, guard, broken)
    assert any(_breaks(world, seed) for seed in range(60) for world in (SwitchMesh, CalmSwitchMesh))


def test_weights_beyond_memory_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise old and new could lie side by side where they do not fit, and no seed fail."""
    start = Ranks.start

    def heavy(ranks: Ranks, engine: Engine) -> None:
        start(ranks, engine)
        engine.weight_bytes *= 2

    monkeypatch.setattr(Ranks, "start", heavy)
    assert any(_breaks(SwitchMesh, seed) for seed in range(30))


def test_a_world_of_switches_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise a find of the night could not be replayed in the morning."""
    assert main(["--seed", "3", "--runs", "2", "--world", "switch"]) == 0
    assert "2 of 2 seeds held" in capsys.readouterr().out
    assert replay_command(3, "switch").endswith("--seed 3 --world switch")


def _sum(outcomes: list[Outcome], field: str) -> int:
    return sum(getattr(outcome, field) for outcome in outcomes)


def _breaks(world: type[Mesh], seed: int) -> bool:
    try:
        world(seed, trace_max=1).run()
    except AssertionError:
        return True
    return False
