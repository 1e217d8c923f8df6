"""What a modelled replica is made of: its step times, its KV blocks, how long it takes to start."""

from dataclasses import dataclass

from services.worker.engine.batching import Batch
from services.worker.engine.batching_types import PrefillWork, StepTimes
from services.worker.engine.modelled_settings import check_settings
from shared.cost.limits import EngineLimits
from shared.cost.step import PS_PER_S, DecodeTimes
from shared.cost.topology import check_profiles, replica_cost
from shared.hardware import Parallelism
from shared.mesh import MeshConfig, ModelledEngineSettings
from shared.messages.plans import ReplicaSpec


class SettingsTimes:
    """Step times as the settings' coefficients give them: ``base_s``, which every shape pays, and a
    linear term each for prompt tokens, decodes and context, divided by the replica's GPUs."""

    def __init__(self, settings: ModelledEngineSettings, *, gpus: int) -> None:
        def scaled(seconds: float) -> int:
            return round(seconds * PS_PER_S / settings.speedup)

        self._base = scaled(settings.base_s)
        self._prefill_token = scaled(settings.prefill_token_s / gpus)
        self._decode_token = scaled(settings.decode_token_s / gpus)
        self._context_token = scaled(settings.context_token_s / gpus)
        self._decodes: dict[int, DecodeTimes] = {}

    def decode(self, batch: int, /) -> DecodeTimes:
        known = self._decodes.get(batch)
        if known is None:
            fixed_ps = self._base + self._decode_token * batch
            known = self._decodes[batch] = DecodeTimes(batch, fixed_ps, self._context_token)
        return known

    def step_ps(self, batch: int, context: int, prefill: PrefillWork, /) -> int:
        return (
            self._base
            + self._decode_token * batch
            + self._prefill_token * prefill.tokens
            + self._context_token * (context + prefill.context)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledReplica:
    """One replica, before it runs; ``start_s`` is how long it takes to load. ``kv_blocks_full``: as
    many as ``kv_blocks`` grow to, 0 where they stay."""

    limits: EngineLimits
    times: StepTimes
    kv_blocks: int
    start_s: float
    prefix_caching: bool
    kv_blocks_full: int = 0

    def new_batch(self) -> Batch:
        return Batch(
            self.limits,
            self.times,
            kv_blocks=self.kv_blocks,
            kv_blocks_full=self.kv_blocks_full,
            prefix_caching=self.prefix_caching,
        )


def limits_of(settings: ModelledEngineSettings) -> EngineLimits:
    return EngineLimits(
        block_tokens=settings.block_tokens,
        batch_tokens_max=settings.batch_tokens_max,
        running_max=settings.running_max,
        waiting_max=settings.waiting_max,
    )


def replica_by_settings(settings: ModelledEngineSettings, *, gpus: int) -> ModelledReplica:
    """A replica on ``gpus`` GPUs as the settings alone describe it."""
    return ModelledReplica(
        limits=limits_of(settings),
        times=SettingsTimes(settings, gpus=gpus),
        kv_blocks=settings.kv_blocks * gpus,
        start_s=settings.start_s / settings.speedup,
        prefix_caching=settings.prefix_caching,
    )


def modelled_replica(mesh: MeshConfig, spec: ReplicaSpec) -> ModelledReplica:
    """The replica as the topology's modelled engine runs it; raises ConfigInvalid for a shape or a
    GPU that its profile does not hold."""
    settings = mesh.engine.modelled
    if settings.timing == "settings":
        return replica_by_settings(settings, gpus=Parallelism.parse(spec.parallelism).gpus)
    cost = replica_cost(mesh, spec)
    return ModelledReplica(
        limits=limits_of(settings).in_stages(cost.shape.pp),
        times=cost.step,
        kv_blocks=cost.kv_tokens // settings.block_tokens,
        start_s=cost.start_s / settings.speedup,
        prefix_caching=settings.prefix_caching,
    )


def check_modelled(mesh: MeshConfig) -> None:
    """Raises ConfigInvalid for settings, models or GPUs that cannot work together."""
    check_settings(mesh.engine.modelled)
    if mesh.engine.modelled.timing == "profile":
        check_profiles(mesh)
