"""The whole control plane under seeded faults: safety at every step, liveness once they stop."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from loadgen.simulator.__main__ import main
from loadgen.simulator.mesh import Mesh, replay_command, simulate
from services.ingress import intake
from services.ingress.core import IngressCore
from services.ingress.journey import Journey, Taken, Verdict
from services.scheduler.pins import Pins
from services.switcher import core as switcher
from services.switcher import walk
from services.switcher.view import WorkerView
from services.worker.engine.batching import Batch
from services.worker.engine.batching_types import Plan
from services.worker.engine.kv_blocks import KvBlocks
from services.worker.hosting import Hosting
from shared.core import Effect, Publish
from shared.messages.plans import AdoptPlan, PlanKept, PlanProposed
from shared.messages.requests import SubmitRequest, TokenChunk, TokenChunks
from tests.simulated.planned_mesh import PlannedMesh

HUNTED = 160  # of them, one of which must notice that a guard is gone
SEEDS, SEEDS_PER_TEST = 200, 25
PLANNED_SEEDS, PLANNED_PER_TEST = 40, 20


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_the_mesh_keeps_its_promises_under_faults(first: int) -> None:
    """Otherwise some mixture of lost, late and repeated messages, crashes, stalls, partitions
    and twin switchers loses a token, gives a GPU to two replicas, or never comes to rest."""
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            simulate(seed)
        except Exception as error:
            message = f"seed {seed}: {error!r}\nreplay it: {replay_command(seed)}"
            raise AssertionError(message) from error


@pytest.mark.parametrize("first", range(0, PLANNED_SEEDS, PLANNED_PER_TEST))
def test_a_mesh_that_follows_forecasts_keeps_its_promises(first: int) -> None:
    """Otherwise forecasts that are lost, late, repeated or cease, a policy that raises or takes too
    long, or a plan pinned in the middle of it, leave a mesh that never comes to rest."""
    for seed in range(first, first + PLANNED_PER_TEST):
        try:
            PlannedMesh(seed).run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error


def test_what_strikes_a_planned_mesh_matters() -> None:
    """Otherwise its seeds would hold because no forecast ceased, and nobody pinned anything."""
    reasons: Counter[str] = Counter()

    def see(_: str, effect: Publish) -> None:
        message = effect.message
        if isinstance(message, PlanProposed | PlanKept):
            reasons.update(kind for kind in kinds if kind in message.reason)

    kinds = (
        "as expected", "adopted by hand", "pinned, and GPUs", "released", "GPUs lost",
        "ArithmeticError", "no answer within", "no word of demand",
    )  # fmt: skip
    for seed in range(1000, 1030):
        mesh = PlannedMesh(seed, trace_max=1)
        mesh.world.taps.append(see)
        mesh.run()
    assert not [kind for kind in kinds if reasons[kind] < 2], reasons


def test_a_pin_that_is_forgotten_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a scheduler could drop what a person asked for, and no seed fail."""
    monkeypatch.setattr(Pins, "plan", None)
    for seed in range(40):
        try:
            PlannedMesh(seed, trace_max=1).run()
        except AssertionError as error:
            if "gave way" in str(error):
                return
    pytest.fail("no seed failed")


def test_faults_are_severe_enough_to_matter() -> None:
    """Otherwise the seeds prove little: the mesh would hold because nothing ever went wrong."""
    outcomes = [simulate(seed) for seed in range(1000, 1040)]
    assert sum(outcome.rollbacks for outcome in outcomes) > 10
    assert sum(outcome.switches for outcome in outcomes) > 60
    assert sum(outcome.attempts for outcome in outcomes) > sum(o.requests for o in outcomes) * 1.5
    assert sum(outcome.lost for outcome in outcomes) > 5, "the ingress should crash now and then"
    assert sum(outcome.failed for outcome in outcomes) > 10, "some ingresses should give up"


def test_engines_are_small_enough_to_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise no seed would show what a mesh does whose engines prefill in chunks, preempt,
    refuse, break or are hard to reach, and whose requests go on elsewhere behind their tokens."""
    seen: Counter[str] = Counter()
    plan_of = Batch.plan

    def plan(batch: Batch) -> Plan | None:
        found = plan_of(batch)
        if found is not None:
            seen["preempted"] += len(found.preempted)
            seen["in chunks"] += any(s.computed + count < s.known for s, count in found.chunks)
            seen["KV full"] += batch.kv.used > batch.kv.total - 2
        return found

    def see(_: str, effect: Publish) -> None:
        match effect.message:
            case TokenChunks(chunks=chunks):
                seen.update(chunk.finish for chunk in chunks if chunk.finish is not None)
            case SubmitRequest(attempt=attempt, output_tokens=tokens):
                seen["behind its tokens elsewhere"] += bool(attempt and tokens)
            case _:
                pass

    monkeypatch.setattr(Batch, "plan", plan)
    for seed in range(1000, 1040):
        mesh = Mesh(seed)
        mesh.world.taps.append(see)
        mesh.run()
        struck = [line for line in mesh.world.trace.lines() if ": -- " in line]
        seen.update(
            kind
            for kind in ("crash", "stall", "partition", "slow", "twin", "lost for good")
            if any(f"-- {kind}" in line for line in struck)
        )
    few = {
        what: seen[what]
        for what in (
            "preempted", "in chunks", "KV full", "refused", "failed", "length",
            "behind its tokens elsewhere", "crash", "stall", "partition", "slow", "twin",
            "lost for good",
        )
        if seen[what] < 3
    }  # fmt: skip
    assert not few, seen


def test_same_seed_same_run() -> None:
    """Otherwise a failing seed could not be replayed and its bug not be found."""
    first, again, other = simulate(7), simulate(7), simulate(8)
    assert first == again
    assert first.digest != other.digest


def test_a_run_does_not_depend_on_the_hash_seed() -> None:
    """Otherwise a seed that fails in CI passes on the laptop, where strings hash differently."""
    command = [sys.executable, "-m", "loadgen.simulator", "--seed", "11", "--runs", "2"]
    runs = [
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=50,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert "digest=" in runs[0]


def test_a_failing_seed_says_how_to_replay_it_and_does_so_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a find of the night would be a find no more in the morning."""

    def broken(*_args: object, **_kwargs: object) -> bool:
        return False

    monkeypatch.setattr(Hosting, "_outdated", broken)
    seed = next(seed for seed in range(HUNTED) if _breaks(seed))
    assert main(["--seed", str(seed - 1), "--runs", "2", "--quiet"]) == 1
    hunt = capsys.readouterr().out
    (line,) = {line for line in hunt.splitlines() if line.startswith(f"seed {seed} failed")}
    assert "1 of 2 seeds held" in hunt
    command = line.partition("replay it: ")[2].split()
    assert command[:3] == ["python", "-m", "loadgen.simulator"]
    assert main(command[3:]) == 1
    replay = capsys.readouterr().out
    assert "AssertionError" in replay
    assert "digest=" in replay
    assert hunt.startswith(replay)


def test_without_compare_and_set_the_seeds_would_fail() -> None:
    """Otherwise two switchers at once are never simulated, or nobody checks what they write."""
    assert any(_breaks(seed, checks_revision=False) for seed in range(HUNTED))


def test_plans_based_on_a_past_epoch_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the switcher's guard against late wishes could vanish unseen."""

    class Gullible(switcher.Switcher):
        def step(self, event: switcher.SwitcherEvent, now_s: float) -> list[Effect]:
            if isinstance(event, AdoptPlan) and self.stored is not None:
                event = AdoptPlan(plan=event.plan, based_on_epoch=self.stored.epoch)
            return super().step(event, now_s)

    monkeypatch.setattr(switcher, "Switcher", Gullible)
    assert any(_breaks(seed) for seed in range(HUNTED))


@pytest.mark.parametrize(
    ("owner", "guard", "answer"),
    [
        (Hosting, "_outdated", False),
        (switcher.Switcher, "_on_phase_deadline", ()),
        (WorkerView, "gone", False),
        (walk, "repairs", []),
        (IngressCore, "_sweep_due", ()),
        (IngressCore, "_sweep_streaming", ()),
    ],
    ids=[
        "worker-epochs",
        "phase-deadlines",
        "vanished-workers",
        "repairs",
        "lost-answers",
        "silent-streams",
    ],
)
def test_the_loss_of_a_guard_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, owner: object, guard: str, answer: object
) -> None:
    """Otherwise the guard is either dead code, or the seeds do not test what it is for."""

    def broken(*_args: object, **_kwargs: object) -> object:
        return answer

    monkeypatch.setattr(owner, guard, broken)
    assert any(_breaks(seed) for seed in range(HUNTED))


def test_kv_blocks_beyond_memory_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an engine could promise blocks that it does not have, and no seed fail."""

    def take(kv: KvBlocks, blocks: int) -> None:
        kv.used += blocks

    def due(*_: object) -> int:
        return -1000  # nothing is ever short, so that nobody is preempted

    def steps_that_fit(_: KvBlocks, _step: int, steps: int, _batch: int) -> int:
        return steps

    monkeypatch.setattr(KvBlocks, "take", take)
    monkeypatch.setattr(KvBlocks, "due", due)
    monkeypatch.setattr(KvBlocks, "steps_that_fit", steps_that_fit)
    found: list[str] = []
    for seed in range(HUNTED):
        try:
            Mesh(seed, trace_max=1).run()
        except AssertionError as error:
            found.append(str(error))
    assert found
    assert all("more KV blocks in use than there are" in fault for fault in found), found


def test_tokens_shown_behind_a_gap_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the ingress's rule of exactly once could vanish unseen."""

    def careless(journey: Journey, chunk: TokenChunk) -> tuple[Verdict, Taken | None]:
        journey.tokens += chunk.tokens
        return "new", Taken(chunk.tokens, None, chunk.position)

    monkeypatch.setattr(intake, "take", careless)
    assert any(_breaks(seed) for seed in range(HUNTED))


def _breaks(seed: int, *, checks_revision: bool = True) -> bool:
    mesh = Mesh(seed, trace_max=1)
    mesh.world.bucket.checks_revision = checks_revision
    try:
        mesh.run()
    except AssertionError:
        return True
    return False
