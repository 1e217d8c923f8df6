"""A comparison from its options to its outcome: saturation, hindsight, every policy at every load.

1. The static deployments of the topology (all uniform shapes that fit, or of several models the
   best splits by the fluid model) are its candidates.
2. Saturation is found with them (saturation.py), unless it is given.
3. At each load every candidate runs with every seed, if a policy needs the one that is best in
   hindsight; then every policy runs with every seed, on the same arrivals.
"""

import dataclasses
from collections.abc import Callable, Sequence

import msgspec

from loadgen.compare import outcome
from loadgen.compare.asked import demand_of
from loadgen.compare.hindsight import best_of, hindsight
from loadgen.compare.jobs import Job, Runs
from loadgen.compare.options import Options
from loadgen.compare.saturation import (
    FIRST_STEP,
    Bearers,
    Saturation,
    bisect_scale,
    requests_of,
)
from loadgen.compare.targets import (
    class_targets,
    lone_requests,
    model_targets,
    relative_targets,
)
from loadgen.compare.workload import (
    TypeMean,
    Workload,
    busiest_start_s,
    history,
    history_windows,
    typed_windows,
)
from loadgen.simulator.beginning import planned
from loadgen.simulator.deployments import (
    Deployment,
    Site,
    candidates,
    default,
    fluid_scale,
    own,
    uniform,
    uniforms,
)
from loadgen.simulator.outcome import SimulationResult, SimulationSpec
from loadgen.simulator.policies import POLICIES, STATIC, ForecastName, Policy, policy_named
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.slo import SloTarget

ALL, EVERY_SHAPE = "all", ("static-<shape>", "static-all")


def expand(names: Sequence[str], site: Site) -> tuple[Policy, ...]:
    """The policies of ``names``: ``static-all`` stands for each uniform shape that fits, ``all``
    for these and every named policy. Raises ConfigInvalid, which lists the names."""
    wanted: dict[str, Policy] = {}
    for name in names:
        if name == ALL:
            named = (p for p in POLICIES.values() if p.begin != "topology" or site.mesh.replicas)
            found = (*_every_shape(site), *named)
        else:
            found = _every_shape(site) if name in EVERY_SHAPE else (policy_named(name),)
        wanted |= {policy.name: policy for policy in found}
    return tuple(wanted.values())


def _every_shape(site: Site) -> tuple[Policy, ...]:
    if len(site.mesh.model_ids) > 1:
        return ()  # one shape for all GPUs is no deployment of several models
    shapes = site.fitting(site.mesh.model.model_id)
    return tuple(policy_named(f"{STATIC}{str(s).removesuffix('pp1')}") for s in shapes)


class Study:
    def __init__(
        self,
        options: Options,
        *,
        site: Site,
        workload: Workload,
        runs: Runs,
        simulate: Callable[[SimulationSpec], SimulationResult],
    ) -> None:
        """``simulate``: for the few lone requests that relative targets are made of."""
        self._options, self._site, self._workload, self._runs = options, site, workload, runs
        self.warmup_s = options.warmup_of(workload.window_s)
        self.policies = expand(options.policies, site)
        if options.reference not in [policy.name for policy in self.policies]:
            raise ConfigInvalid(
                field="reference",
                value=options.reference,
                remedy=f"name one of the policies: {', '.join(p.name for p in self.policies)}",
            )
        self.types = tuple(kind for typed in typed_windows(workload) for kind in typed.types)
        self.demand = demand_of(self.types, workload.window_s)
        self.candidates = candidates(site, self.demand, most=options.candidates)
        if not self.candidates:
            raise ConfigInvalid(
                field="model",
                value=", ".join(site.mesh.model_ids),
                remedy="no shape fits the topology's GPUs: use larger ones, or another model",
            )
        for policy in self.policies:
            if not hindsight(policy) and policy.begin != "planned":
                # Raises for a shape that does not fit, before hours of runs.
                self._begin(policy, {}, 1.0)
        self.targets = self._targets(simulate)
        self._model_targets = model_targets(self.types, self.targets)

    @property
    def reference(self) -> str:
        return self._options.reference

    def forecast_of(self, policy: Policy) -> ForecastName:
        """What its name says, else the options, else its own default; one that never switches reads
        none, so that its runs are the same whatever was asked for."""
        given = None if "@" in policy.name else self._options.forecast
        return "ours" if not policy.switches else given or policy.forecast

    def groups(self, saturation: Saturation) -> list[outcome.Runs]:
        """Every policy at every load."""
        found: list[outcome.Runs] = []
        for load in self._options.loads:
            found += self._at(load, load * saturation.rate_scale)
        return found

    def saturation(self) -> Saturation:
        """As given, or searched for over at most ``saturation_s`` of the window, the busiest."""
        given = self._options.saturation_scale
        offered = requests_of(self._workload) / self._workload.window_s
        if given is not None:
            return Saturation(
                rate_scale=given, rate_scale_above=given, deployment="", given=True,
                requests_per_s=given * offered, simulated_s=0.0, from_s=0.0, simulations=0,
            )  # fmt: skip
        length_s = min(self._options.saturation_s, self._workload.window_s)
        from_s = busiest_start_s(self._workload, length_s)
        workload = msgspec.structs.replace(
            self._workload, start_s=self._workload.start_s + from_s, window_s=length_s
        )
        types = [kind for typed in typed_windows(workload) for kind in typed.types]
        static = POLICIES["static-best"]
        jobs = [
            msgspec.structs.replace(
                self._job(static, option, 1.0, 1),
                name=option.name,
                workload=workload,
                warmup_s=0.0,
                targets=class_targets(types),
            )
            for option in self.candidates
        ]
        bearers = Bearers(self._runs, jobs)
        start = self._expected_scale(types, length_s)
        low, high, name = bisect_scale(bearers.keeps_up, start=start, first_step=FIRST_STEP)
        return Saturation(
            rate_scale=low, rate_scale_above=high, deployment=name, requests_per_s=low * offered,
            simulated_s=length_s, from_s=from_s, simulations=bearers.simulations,
        )  # fmt: skip

    def _expected_scale(self, types: Sequence[TypeMean], length_s: float) -> float:
        """What the best candidate would bear as a fluid: every model's replicas busy all along."""
        demand = demand_of(types, length_s)
        return max(fluid_scale(self._site, option, demand) for option in self.candidates)

    def _at(self, load: float, scale: float) -> list[outcome.Runs]:
        seeds = range(1, self._options.seeds + 1)
        best = self._best(load, scale) if any(hindsight(p) for p in self.policies) else {}
        begin = {policy.name: self._begin(policy, best, scale) for policy in self.policies}
        jobs = [
            self._job(policy, begin[policy.name], scale, seed)
            for policy in self.policies
            for seed in seeds
        ]
        records = self._runs.all(jobs, f"load {load:g}")
        return [
            outcome.Runs(
                policy.name,
                load,
                begin[policy.name].name,
                records[place * len(seeds) : (place + 1) * len(seeds)],
            )
            for place, policy in enumerate(self.policies)
        ]

    def _best(self, load: float, scale: float) -> dict[str, Deployment]:
        """The candidates that are best in hindsight at this load, over all seeds."""
        seeds = range(1, self._options.seeds + 1)
        static = POLICIES["static-best"]
        jobs = [self._job(static, c, scale, seed) for c in self.candidates for seed in seeds]
        records = self._runs.all(jobs, f"load {load:g}, static deployments")
        scored = [
            (option, [r.metrics for r in records[i * len(seeds) : (i + 1) * len(seeds)]])
            for i, option in enumerate(self.candidates)
        ]
        return best_of(scored)

    def _begin(self, policy: Policy, best: dict[str, Deployment], scale: float) -> Deployment:
        if policy.begin in best:
            return best[policy.begin]
        if policy.begin == "planned":
            found = self._planned(policy, scale)
            return found or default(self._site, self.demand)
        if policy.begin == "topology":
            return own(self._site)
        if policy.begin == "shape":
            if len(self._site.mesh.model_ids) > 1:
                raise ConfigInvalid(
                    field="policy",
                    value=policy.name,
                    remedy="one shape for several models is no split of the GPUs: use static-best",
                )
            model_id = self._site.mesh.model.model_id
            return uniform(self._site, model_id, Parallelism.parse(policy.shape))
        return default(self._site, self.demand)

    def _planned(self, policy: Policy, scale: float) -> Deployment | None:
        """What the policy plans for the arrivals of the warm-up at this load."""
        past = history(self._workload, self.warmup_s)
        return planned(
            self._site,
            msgspec.structs.replace(policy.scheduler, targets=self._model_targets),
            demand_of(past, self.warmup_s, rate_scale=scale) if past else (),
            horizon_s=self.warmup_s,
            past=history_windows(self._workload, self.warmup_s, rate_scale=scale),
        )

    def _job(self, policy: Policy, begin: Deployment, scale: float, seed: int) -> Job:
        options = self._options
        forecast = self.forecast_of(policy)
        if policy.switches:
            shapes = set(begin.shapes.values())
            scheduler = msgspec.structs.replace(
                policy.scheduler,
                targets=self._model_targets,
                dynamo_shape=shapes.pop() if len(shapes) == 1 else "auto",
            )
            policy = dataclasses.replace(policy, scheduler=scheduler)
        return Job(
            name=policy.name,
            mesh=begin.on(self._site.mesh),
            policy=dataclasses.replace(policy, begin="topology", shape="", forecast="ours"),
            forecast=forecast,
            workload=self._workload,
            rate_scale=scale,
            seed=seed,
            warmup_s=self.warmup_s,
            drain_s=options.drain_s,
            targets=self.targets,
            slow_work_s=options.slow_work_s,
        )

    def _targets(
        self, simulate: Callable[[SimulationSpec], SimulationResult]
    ) -> dict[str, SloTarget]:
        times = self._options.slo_times
        if times is None:
            return class_targets(self.types)
        runs = [
            simulate(
                SimulationSpec(
                    mesh=option.on(self._site.mesh),
                    traffic=lone_requests([t for t in self.types if t.model_id == model_id]),
                    policy=dataclasses.replace(POLICIES["static-best"], begin="topology"),
                )
            ).requests
            for model_id in self._site.mesh.model_ids
            for option in uniforms(self._site, model_id)
        ]
        targets = relative_targets(runs, times)
        missing = class_targets(self.types).keys() - targets.keys()
        if missing:
            raise ConfigInvalid(
                field="slo",
                value=f"relative:{times:g}",
                remedy=f"no shape serves a request of {', '.join(sorted(missing))}: use class",
            )
        return targets
