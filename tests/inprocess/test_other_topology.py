"""A mesh whose stored plan is of another topology: its file was edited, its store is the same."""

import aiohttp
import msgspec
import pytest

from shared.bus import BusConfig, NatsBus
from shared.mesh import MeshConfig
from shared.messages.base import encode
from shared.messages.plans import DeploymentPlan, ReplicaSpec, StoredPlan
from tests.support.broker import Broker
from tests.support.inprocess import inprocess_mesh, modelled_mesh

pytestmark = pytest.mark.nats


def of_another(mesh: MeshConfig, *, model_id: str = "gone", node_id: str = "n0") -> DeploymentPlan:
    """As many replicas under the same names, of a model or on GPUs that ``mesh`` does not have."""
    replicas = tuple(
        ReplicaSpec(
            replica_id=wish.replica_id,
            model_id=model_id,
            parallelism="tp1pp1",
            gpus=(f"{node_id}-g{index}",),
        )
        for index, wish in enumerate(mesh.replicas)
    )
    row = {spec.replica_id: 1.0 / len(replicas) for spec in replicas}
    return DeploymentPlan(plan_id="plan-other", replicas=replicas, weights={"*": row})


async def store(url: str, plan: StoredPlan) -> None:
    bus = NatsBus(BusConfig(url=url))
    await bus.connect(name="test")
    try:
        await bus.store("plan", encode(plan), revision=0)
    finally:
        await bus.close()


async def served(url: str, model_id: str) -> int:
    """The status of one request; new ones wait 15 s for a replica."""
    async with aiohttp.ClientSession() as session:
        body = {"model": model_id, "prompt": [1, 2, 3], "max_tokens": 4}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            return answer.status


@pytest.mark.parametrize("node_id", ["n0", "elsewhere"])
@pytest.mark.parametrize("model_id", ["gone", "modelled"])
async def test_a_topology_that_was_edited_is_walked_to(
    nats_server: Broker, model_id: str, node_id: str
) -> None:
    """A mesh started again after its model or its nodes were changed would serve nothing, for as
    long as its store remembers the former ones."""
    mesh_config = modelled_mesh(gpus=2)
    plan = of_another(mesh_config, model_id=model_id, node_id=node_id)
    await store(nats_server.url, StoredPlan(epoch=7, in_force=plan))
    async with inprocess_mesh(nats_server.url, mesh_config) as mesh:
        assert await served(mesh.url, "modelled") == 200


async def test_a_switch_that_was_under_way_is_given_up(nats_server: Broker) -> None:
    """The same, when the mesh ended in the middle of a switch between two plans that it does not
    know any more: workers refuse both, and neither would ever be in force."""
    mesh_config = modelled_mesh(gpus=2)
    plan = of_another(mesh_config, model_id="gone")
    replicas = tuple(
        msgspec.structs.replace(spec, replica_id=f"next-{spec.replica_id}")
        for spec in plan.replicas
    )
    target = msgspec.structs.replace(plan, plan_id="plan-next", replicas=replicas, weights={})
    stored = StoredPlan(epoch=7, in_force=plan, target=target, target_epoch=8)
    await store(nats_server.url, stored)
    async with inprocess_mesh(nats_server.url, mesh_config) as mesh:
        assert await served(mesh.url, "modelled") == 200
