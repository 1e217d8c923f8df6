"""One simulated engine in the middle of a leap."""

import pytest

from loadgen.simulator.engine import Engine, Owner
from loadgen.simulator.process import Port
from services.worker.engine.batching import Batch
from services.worker.engine.modelled_timing import replica_by_settings
from services.worker.events import EngineStart
from shared.cost.step import PS_PER_S
from shared.messages.plans import ReplicaSpec
from tests.support.clusters import ENGINE


class Nobody:
    """Speaks for no engine."""

    incarnation = "nobody"

    @property
    def port(self) -> Port:
        raise AssertionError("nothing is said here")

    def refuse(self, *_: object) -> None:
        raise AssertionError("nothing is refused here")

    def resume(self, *_: object) -> None:
        raise AssertionError("nothing changes here")


def prefilled() -> Batch:
    """Three requests of unlike length that decode."""
    batch = replica_by_settings(ENGINE, gpus=1).new_batch()
    for number, output_tokens in enumerate((90, 40, 60)):
        batch.add(f"q{number}", prompt_tokens=10 + number, output_tokens=output_tokens)
    batch.advance()
    return batch


def leaping(batch: Batch, owner: Owner) -> Engine:
    plan = batch.plan()
    assert plan is not None
    spec = ReplicaSpec(replica_id="r", model_id="m", parallelism="tp1pp1", gpus=("g",))
    start = EngineStart(spec, 1)
    return Engine(spec, 1, owner, batch, start, ready=True, since_ps=PS_PER_S, steps=plan.steps)


@pytest.mark.parametrize("done", [0, 1, 17, 38])
def test_its_load_is_that_of_an_engine_that_steps(done: int) -> None:
    """Routers would choose by loads as old as the leap."""
    engine, stepped = leaping(prefilled(), Nobody()), prefilled()  # type: ignore[arg-type]
    plan = engine.batch.plan()
    assert plan is not None
    assert plan.times is not None
    end_ps = engine.since_ps + plan.times.total_ps(plan.context, done)
    for _ in range(done):
        stepped.advance(1)
    for now_ps in (end_ps, end_ps + 1, end_ps + PS_PER_S // 100):
        assert engine.done(now_ps) == done
        assert engine.load(now_ps) == stepped.load()
    if done:
        assert engine.done(end_ps - 1) == done - 1


def test_the_last_step_of_a_leap_is_not_done_before_it_is_heard_of() -> None:
    """A request would have said its last token and not that it ends, just before its GPU dies; who
    goes on for it would have nothing to do."""
    engine = leaping(prefilled(), Nobody())  # type: ignore[arg-type]
    plan = engine.batch.plan()
    assert plan is not None
    assert plan.steps == 39, "one of the 40 was made by the prefill"
    assert engine.done(engine.since_ps + plan.duration_ps) == 38
