"""How long one routing decision takes: ``python -m loadgen.bench.bench_router``.

The real core, one Query in and one Reply out, with the state of a busy mesh: unlike replicas, four
request types with rows of their own, tenants with habits, reports every 100 ms of mesh time. The
time is that of ``step`` alone; encoding and the bus are measured end to end by the data-plane
benchmark. Prints one JSON line per policy.
"""

import argparse
import random
import sys
import time
from statistics import fmean, quantiles

import msgspec

from loadgen.bench.environment import Environment, environment
from services.router.config import PolicyName, RouterConfig
from services.router.core import Router
from services.router.policies import POLICIES
from shared.core import Loaded, Query, Reply, Started
from shared.messages.demand import DemandReport, TypeDemand
from shared.messages.plans import DeploymentPlan, PlanInForce, ReplicaSpec
from shared.messages.replicas import ReplicaReport
from shared.messages.requests import RequestCompleted, RequestsCompleted, RouteRequest

MODEL = "bench"
REQUESTS_RPS = 1000.0
REPORT_S = 0.1
TYPES = ((60, 120), (1800, 40), (400, 400), (900, 1800))
WARM_UP = 2000


class Result(msgspec.Struct, frozen=True, kw_only=True):
    benchmark: str
    policy: PolicyName
    replicas: int
    decisions: int
    warm_up: int
    decision_us_p50: float
    decision_us_p90: float
    decision_us_p99: float
    decision_us_max: float
    decision_us_mean: float
    environment: Environment


def plan_of(replicas: int, rng: random.Random) -> DeploymentPlan:
    specs = tuple(
        ReplicaSpec(
            replica_id=f"r{i}", model_id=MODEL, parallelism="tp1pp1", gpus=(f"n{i // 8}-g{i % 8}",)
        )
        for i in range(replicas)
    )
    weights: dict[str, dict[str, float]] = {}
    for request_type in ("*", *map(str, range(len(TYPES)))):
        raw = [rng.uniform(0.2, 1.0) for _ in specs]
        weights[request_type] = {
            spec.replica_id: value / sum(raw) for spec, value in zip(specs, raw, strict=True)
        }
    return DeploymentPlan(plan_id="bench", replicas=specs, weights=weights)


def prepared(policy: PolicyName, plan: DeploymentPlan, rng: random.Random) -> Router:
    """A router that knows the plan, the types, and a hundred tenants."""
    router = Router(RouterConfig(policy=policy), models=(MODEL,), instance_id="bench")
    router.step(Started(), 0.0)
    router.step(Loaded(key="plan"), 0.0)
    router.step(PlanInForce(epoch=1, plan=plan), 0.0)
    types = tuple(
        TypeDemand(
            request_type=i,
            requests=100,
            arrivals_rps=10.0,
            input_tokens_mean=float(inputs),
            output_tokens_mean=float(outputs),
            input_tokens_centroid=float(inputs),
            output_tokens_centroid=float(outputs),
        )
        for i, (inputs, outputs) in enumerate(TYPES)
    )
    router.step(DemandReport(model_id=MODEL, window_start_s=0.0, window_s=10.0, types=types), 0.0)
    done = tuple(
        RequestCompleted(
            request_id=f"d{i}",
            outcome="completed",
            model_id=MODEL,
            tenant=f"t{i % 100}",
            input_tokens=(lengths := rng.choice(TYPES))[0],
            output_tokens=lengths[1],
        )
        for i in range(1000)
    )
    router.step(RequestsCompleted(ingress_id="i0", completed=done), 0.0)
    return router


def report_all(router: Router, plan: DeploymentPlan, now_s: float, rng: random.Random) -> None:
    for spec in plan.replicas:
        report = ReplicaReport(
            replica_id=spec.replica_id,
            worker_id=spec.gpus[0],
            incarnation="a",
            epoch=1,
            phase="serving",
            running=rng.randrange(64),
            waiting=rng.choice((0, 0, 0, 3)),
            running_max=64,
            waiting_max=256,
            kv_blocks_used=rng.randrange(4096),
            kv_blocks_total=8192,
            step_s=0.02,
        )
        router.step(report, now_s)


def question(number: int, rng: random.Random) -> Query:
    inputs, outputs = rng.choice(TYPES)
    tokens = max(1, int(inputs * rng.lognormvariate(0.0, 0.7)))
    request = RouteRequest(
        request_id=f"q{number}",
        model_id=MODEL,
        input_tokens=tokens,
        output_tokens_max=outputs * 2,
        tenant=f"t{rng.randrange(100)}",
        prefix_hashes=tuple(rng.randrange(512) for _ in range(min(16, tokens // 64))),
    )
    return Query(request, "reply")


def measure(policy: PolicyName, *, replicas: int, decisions: int, seed: int) -> list[float]:
    """Microseconds of each decision after the warm-up."""
    rng = random.Random(seed)
    plan = plan_of(replicas, rng)
    router = prepared(policy, plan, rng)
    now_s, reported_s = 1.0, float("-inf")
    took_us: list[float] = []
    for number in range(WARM_UP + decisions):
        now_s += 1.0 / REQUESTS_RPS
        if now_s - reported_s >= REPORT_S:
            report_all(router, plan, now_s, rng)
            reported_s = now_s
        query = question(number, rng)
        start_ns = time.perf_counter_ns()
        effects = router.step(query, now_s)
        took_us.append((time.perf_counter_ns() - start_ns) / 1000.0)
        reply = effects[0]
        assert isinstance(reply, Reply), reply
        assert msgspec.structs.asdict(reply.message).get("failure") is None, reply
    router.check()
    return took_us[WARM_UP:]


def result_of(
    policy: PolicyName, took_us: list[float], replicas: int, where: Environment
) -> Result:
    cuts = quantiles(took_us, n=100)
    return Result(
        benchmark="router_decision",
        policy=policy,
        replicas=replicas,
        decisions=len(took_us),
        warm_up=WARM_UP,
        decision_us_p50=round(cuts[49], 2),
        decision_us_p90=round(cuts[89], 2),
        decision_us_p99=round(cuts[98], 2),
        decision_us_max=round(max(took_us), 2),
        decision_us_mean=round(fmean(took_us), 2),
        environment=where,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_router")
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--decisions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    where = environment()
    for policy in POLICIES:
        took_us = measure(
            policy,
            replicas=arguments.replicas,
            decisions=arguments.decisions,
            seed=arguments.seed,
        )
        result = result_of(policy, took_us, arguments.replicas, where)
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


if __name__ == "__main__":
    main()
