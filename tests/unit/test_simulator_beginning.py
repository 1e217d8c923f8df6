"""The replicas that a policy plans before anything runs."""

import pytest

from loadgen.bench.compare_cells import mesh_of
from loadgen.simulator.beginning import planned
from loadgen.simulator.demand import Demand
from loadgen.simulator.policies import POLICIES, policy_named
from loadgen.simulator.site import Site
from shared.hardware import Parallelism

MODEL = "llama-2-70b"
LIGHT = (Demand(MODEL, 0.2, 1000.0, 200.0),)
HEAVY = (Demand(MODEL, 12.0, 1000.0, 200.0), Demand(MODEL, 6.0, 3000.0, 30.0))


@pytest.fixture(scope="module")
def site() -> Site:
    return Site(mesh_of((MODEL,), 16))


@pytest.mark.parametrize("name", ["uniform-fast", "oserve-paper", "oserve"])
def test_what_is_planned_fits_the_topology(site: Site, name: str) -> None:
    """A run would begin with replicas that share GPUs, or that its mesh does not have."""
    found = planned(site, policy_named(name).scheduler, HEAVY, horizon_s=240.0)
    assert found is not None
    mesh = found.on(site.mesh).checked()
    gpus = [gpu for wish in mesh.replicas for gpu in wish.gpus]
    assert len(gpus) == len(set(gpus))
    assert set(gpus) <= {gpu.gpu_id for gpu in site.mesh.gpus()}
    assert found.name
    for wish in mesh.replicas:
        assert len(wish.gpus) == Parallelism.parse(wish.parallelism).gpus


def test_the_demand_decides(site: Site) -> None:
    """Every load would begin with the same replicas, however unfit."""
    config = POLICIES["uniform-fast"].scheduler
    light, heavy = (planned(site, config, demand, horizon_s=240.0) for demand in (LIGHT, HEAVY))
    assert light is not None
    assert heavy is not None
    assert light.name != heavy.name


def test_nothing_is_planned_for_nothing(site: Site) -> None:
    """A short warm-up would end in a plan for made-up demand."""
    assert planned(site, POLICIES["oserve"].scheduler, (), horizon_s=240.0) is None


def test_every_model_is_planned_for() -> None:
    """With several models the others would begin without replicas."""
    site = Site(mesh_of((MODEL, "opt-66b"), 16))
    demand = (*LIGHT, Demand("opt-66b", 0.5, 500.0, 100.0))
    found = planned(site, POLICIES["uniform-fast"].scheduler, demand, horizon_s=240.0)
    assert found is not None
    assert {wish.model_id for wish in found.replicas} == {MODEL, "opt-66b"}
