"""A mesh that switches all the time: switcher, workers, ingress and router in a world.

Smaller than mesh.py's, and quicker: plans are drawn instead of decided, two to five in a run, of
any shapes that fit, some of them other weights alone. In ``CalmSwitchMesh`` nothing goes wrong, and
all is checked that must hold then.
"""

import random
from dataclasses import replace

from loadgen.simulator.ambush import Ambush
from loadgen.simulator.clients import Order, draw_orders
from loadgen.simulator.faults import CALM, Weather, draw_weather
from loadgen.simulator.mesh import Mesh
from loadgen.simulator.mesh_services import MODEL
from loadgen.simulator.process import NodeSpec
from loadgen.simulator.wisher import INPUTS, Wisher, Wishes
from loadgen.simulator.workshop import NO_FAULTS, EngineFaults
from services.switcher.machine import State
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec

SHAPES = tuple(Parallelism.parse(shape) for shape in ("tp1", "tp1", "tp2", "tp1pp2", "tp3"))
SAME_SHARE = 0.5
"""Of replicas that a plan keeps as they are, if they fit."""
WEIGHTS_SHARE = 0.2
"""Of plans that change weights alone."""
PHASES: tuple[State, ...] = (
    "preparing", "pausing", "taking", "committing", "activating", "retiring", "rolling_back",
)  # fmt: skip
RARE: tuple[State, ...] = ("pausing", "taking", "taking", "activating", "retiring")
"""Those of them that only the better half of switches reach: they are met more often."""


class SwitchMesh(Mesh):
    FAULTS_S = 16.0
    ROUTERS = 1

    def _draw_plans(self, rng: random.Random) -> None:
        """The first plan, and when others are wished for."""
        self._number = 0
        self.wishes = Wishes(self._draw_plan(rng, None))
        for _ in range(rng.randint(2, 5)):
            self.world.at(rng.uniform(3.0, self.FAULTS_S * 0.9), lambda: self._wish(rng))

    def _draw_orders(self, rng: random.Random) -> list[Order]:
        """More and longer ones: some should run whenever a switch comes."""
        return draw_orders(rng, until_s=self.FAULTS_S, most=40, lengths=(12, 40, 40))

    def _wish(self, rng: random.Random) -> None:
        before = self.wishes.plan
        if rng.random() < WEIGHTS_SHARE:
            self._number += 1
            self.wishes.plan = DeploymentPlan(
                plan_id=f"w{self._number}",
                replicas=before.replicas,
                weights={"*": _draw_weights(rng, before.replicas)},
            )
        else:
            self.wishes.plan = self._draw_plan(rng, before)

    def _draw_plan(self, rng: random.Random, before: DeploymentPlan | None) -> DeploymentPlan:
        self._number += 1
        free = {
            host.node_id: [g.gpu_id for g in host.gpu_specs() if g.gpu_id not in self.world.lost]
            for host in self._hosts
        }
        replicas = [
            spec
            for spec in (before.replicas if before is not None else ())
            if rng.random() < SAME_SHARE and _take(free, spec.gpus)
        ]
        for i in range(rng.randint(0 if replicas else 1, 3)):
            shape = rng.choice(SHAPES)
            roomy = sorted(node_id for node_id, gpus in free.items() if len(gpus) >= shape.gpus)
            if not roomy:
                continue
            gpus = free[rng.choice(roomy)]
            rng.shuffle(gpus)
            replicas.append(
                ReplicaSpec(
                    replica_id=f"r{self._number}-{i}",
                    model_id=MODEL.model_id,
                    parallelism=str(shape),
                    gpus=tuple(gpus.pop() for _ in range(shape.gpus)),
                )
            )
        if not replicas:
            worker_id = next(gpu for gpus in free.values() for gpu in gpus)
            replicas.append(
                ReplicaSpec(
                    replica_id=f"r{self._number}-0",
                    model_id=MODEL.model_id,
                    parallelism="tp1pp1",
                    gpus=(worker_id,),
                )
            )
        return DeploymentPlan(
            plan_id=f"w{self._number}",
            replicas=tuple(replicas),
            weights={"*": _draw_weights(rng, replicas)},
        )

    def _plan_faults(self, rng: random.Random) -> None:
        """Some of them meet the switch in a phase that is over in a moment."""
        super()._plan_faults(rng)
        self.ambush = Ambush(
            self.world,
            rng,
            nodes=[gpu.gpu_id for host in self._hosts for gpu in host.gpu_specs()],
            phases=(*PHASES, *RARE),
            most=6,
            until_s=self.FAULTS_S * 0.9,
        )

    def lose(self, worker_id: str, rng: random.Random) -> None:
        """A machine is gone for good, and nobody wishes for it any more."""
        super().lose(worker_id, rng)
        self.wishes.plan = self._draw_plan(rng, self.wishes.plan)

    def as_wished(self, plan: DeploymentPlan) -> bool:
        return plan.plan_id == self.wishes.plan.plan_id

    def scheduler(self) -> NodeSpec:
        return NodeSpec(
            name="scheduler", make=lambda _n, _p: (Wisher(self.wishes), {}), inputs=INPUTS
        )

    def _engine_faults(self, rng: random.Random) -> EngineFaults:
        """In many runs requests cannot be taken over: the old replicas have to go on."""
        faults = super()._engine_faults(rng)
        return replace(faults, take_fails=rng.choice([0.0, 0.0, 0.5, 0.9]))


class CalmSwitchMesh(SwitchMesh):
    """Nothing is lost or late, and nobody dies."""

    STRICT = True

    def _weather(self, rng: random.Random) -> Weather:
        draw_weather(rng)
        return CALM

    def _engine_faults(self, rng: random.Random) -> EngineFaults:
        super()._engine_faults(rng)
        return NO_FAULTS

    def _plan_faults(self, rng: random.Random) -> None:
        """None."""


def _take(free: dict[str, list[str]], gpus: tuple[str, ...]) -> bool:
    """Take these GPUs out of ``free``, if all of them are."""
    for here in free.values():
        if set(gpus) <= set(here):
            here[:] = [gpu for gpu in here if gpu not in gpus]
            return True
    return False


def _draw_weights(
    rng: random.Random, replicas: tuple[ReplicaSpec, ...] | list[ReplicaSpec]
) -> dict[str, float]:
    draws = [rng.uniform(0.2, 1.0) for _ in replicas]
    total = sum(draws)
    return {spec.replica_id: d / total for spec, d in zip(replicas, draws, strict=True)}
