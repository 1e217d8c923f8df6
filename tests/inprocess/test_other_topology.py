"""A mesh whose stored plan is another topology's: as after its file was edited, on the same store."""

import asyncio

import aiohttp
import msgspec
import pytest

from shared.bus import BusConfig, NatsBus
from shared.mesh import MeshConfig, NodeSpec
from shared.messages.base import encode
from shared.messages.plans import DeploymentPlan, ReplicaSpec, StoredPlan
from shared.models import ModelSpec
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


async def served(url: str, model_id: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session:
        body = {"model": model_id, "prompt": [1, 2, 3], "max_tokens": 4}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            return answer.status, await answer.text()


@pytest.mark.parametrize("under_way", [False, True])
@pytest.mark.parametrize("node_id", ["n0", "elsewhere"])
@pytest.mark.parametrize("model_id", ["gone", "modelled"])
async def test_a_topology_that_was_edited_is_walked_to(
    nats_server: Broker, model_id: str, node_id: str, under_way: bool
) -> None:
    mesh_config = modelled_mesh(gpus=2)
    plan = of_another(mesh_config, model_id=model_id, node_id=node_id)
    target = None
    if under_way:
        target = msgspec.structs.replace(
            plan,
            plan_id="plan-next",
            replicas=tuple(
                msgspec.structs.replace(spec, replica_id=f"next-{spec.replica_id}")
                for spec in plan.replicas
            ),
            weights={},
        )
    stored = StoredPlan(epoch=7, in_force=plan, target=target, target_epoch=8 if under_way else 0)
    await store(nats_server.url, stored)
    async with inprocess_mesh(nats_server.url, mesh_config) as mesh:
        import time; t=time.time()
        status, text = await served(mesh.url, "modelled")
        print(model_id, node_id, under_way, status, time.time()-t)
        assert status == 200, text
