"""A topology as a place for replicas: which shapes of its models fit, and how busy they are."""

from collections.abc import Sequence

from loadgen.simulator.demand import Demand, busy
from services.scheduler.policies.capacity import pools, shapes
from services.scheduler.policies.interface import GpuOffer
from services.scheduler.policies.placing import choose
from services.worker.engine.modelled_timing import (
    ModelledReplica,
    check_modelled,
    modelled_replica,
)
from shared.cost.memory import kv_bytes_per_token
from shared.cost.model import cost_model
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.mesh import MeshConfig
from shared.messages.plans import ReplicaSpec


class Site:
    """A topology, and which shapes of its models fit on it."""

    def __init__(self, mesh: MeshConfig) -> None:
        """Raises ConfigInvalid, which names what there is, for a model or GPU without profile."""
        check_modelled(mesh)
        self.mesh = mesh
        self.gpus = len(mesh.gpus())
        self.offers = tuple(
            GpuOffer(gpu_id=gpu.gpu_id, node_id=node.node_id, kind=gpu.kind)
            for node in mesh.nodes
            for gpu in node.gpu_specs()
        )
        self.kinds = sorted({offer.kind for offer in self.offers})
        self._replicas: dict[tuple[str, Parallelism, str], ModelledReplica | None] = {}

    def fitting(self, model_id: str) -> tuple[Parallelism, ...]:
        """Shapes whose weights and some KV cache fit each kind of GPU that there is."""
        found: list[Parallelism] | None = None
        for pool in pools(self.offers).values():
            here = [shape for shape in shapes(pool) if self.replica(model_id, shape, pool.kind)]
            found = here if found is None else [shape for shape in found if shape in here]
        return tuple(sorted(found or ()))

    def replica(self, model_id: str, shape: Parallelism, kind: str) -> ModelledReplica | None:
        """One replica on empty GPUs of that kind; None where it does not fit."""
        key = (model_id, shape, kind)
        if key not in self._replicas:
            self._replicas[key] = self._built(model_id, shape, kind)
        return self._replicas[key]

    def room(self, model_id: str, shape: Parallelism) -> float:
        """The share of GPU memory left for the KV cache, on the kind that leaves least; all of it
        where settings in place of a profile say nothing of weights."""
        if self.mesh.engine.modelled.timing == "settings":
            return 1.0
        name = self.mesh.model_of(model_id).profile_name
        shares: list[float] = []
        for kind in self.kinds:
            model = cost_model(kind, name, shape)
            facts = model.profile.model_facts
            token_bytes = kv_bytes_per_token(facts, shape.tp, max(model.stages))
            shares.append(model.kv_tokens * token_bytes / model.gpu.memory_bytes)
        return min(shares)

    def load(self, model_id: str, shape: Parallelism, demand: Sequence[Demand]) -> float:
        """Replicas' worth of the model's demand, on the slowest kind of GPU."""
        own = [kind for kind in demand if kind.model_id == model_id]
        replicas = [self.replica(model_id, shape, kind) for kind in self.kinds]
        return max(busy(replica, own) for replica in replicas if replica is not None)

    def _built(self, model_id: str, shape: Parallelism, kind: str) -> ModelledReplica | None:
        gpus = choose(shape, [offer for offer in self.offers if offer.kind == kind])
        if not gpus:
            return None
        spec = ReplicaSpec(replica_id="r", model_id=model_id, parallelism=str(shape), gpus=gpus)
        try:
            replica = modelled_replica(self.mesh, spec)
        except ConfigInvalid:
            return None
        return replica if replica.kv_blocks > 0 else None
