"""What the mesh costs a request: ``python -m loadgen.bench.bench_data_plane``.

Load client and modelled engines share one core, everything else (broker, ingress, router, control
services) the other. Real processes, real broker, streaming over HTTP, 16 chunks a request, 64
requests at once. Prints one JSON line per measurement:

- ``throughput``: engines that answer at once; requests and streamed tokens per second, and CPU
  milliseconds per request of each process.
- ``latency``: 10 ms between chunks; time to first token against the same engines behind a bare
  HTTP server in the place of the mesh. Once at 64 in flight, once at Poisson arrivals of the same
  rate: in the closed loop, requests that end in one step of an engine come back together, so what
  is added there is mostly the queue of their convoy.
- ``memory``: resident memory of ingress and router over many requests.
"""

import argparse
import asyncio
import gc
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import uvloop

from loadgen.bench.environment import Environment, environment
from loadgen.bench.rig import DATA_PLANE, Rig, cores, free_port
from loadgen.client import ClientOptions, closed_loop, replay
from loadgen.results import RequestResult
from loadgen.workload.records import TraceRecord

CONCURRENCY = 64
CHUNKS = 16
INPUT_TOKENS = 32
STEP_S = 0.010
FAST = {"base_s": 0.0, "prefill_token_s": 0.0, "decode_token_s": 0.0, "start_s": 0.01}
PACED = FAST | {"base_s": STEP_S}
WARM_UP = 1000
GPUS = 2


@dataclass(frozen=True)
class Arguments:
    requests: int
    latency_requests: int
    memory_requests: int


def records(
    count: int, *, output_tokens: int = CHUNKS, rate_rps: float = 0.0
) -> Iterator[TraceRecord]:
    rng = random.Random(1)
    at_s = 0.0
    for _ in range(count):
        if rate_rps:
            at_s += rng.expovariate(rate_rps)
        yield TraceRecord(timestamp_s=at_s, input_tokens=INPUT_TOKENS, output_tokens=output_tokens)


def options(url: str) -> ClientOptions:
    return ClientOptions(url=url, model="modelled", chunk_times_max=0)


def run_closed(
    url: str, count: int, *, output_tokens: int = CHUNKS
) -> tuple[list[RequestResult], float]:
    """Results and the seconds that they took."""

    async def main() -> tuple[list[RequestResult], float]:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        results = await closed_loop(
            records(count, output_tokens=output_tokens), options(url), concurrency=CONCURRENCY
        )
        return results, loop.time() - start_s

    return uvloop.run(main())


def run_open(url: str, count: int, rate_rps: float) -> list[RequestResult]:
    return uvloop.run(replay(list(records(count, rate_rps=rate_rps)), options(url)))


def check(results: list[RequestResult]) -> None:
    bad = [r for r in results if r.error_code]
    if bad:
        raise RuntimeError(f"{len(bad)} requests failed, first: {bad[0]}")


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ttft_ms(results: list[RequestResult]) -> dict[str, float]:
    values = [r.ttft_s * 1e3 for r in results if r.ttft_s is not None]
    return {
        "p50": round(percentile(values, 0.50), 2),
        "p90": round(percentile(values, 0.90), 2),
        "p99": round(percentile(values, 0.99), 2),
        "mean": round(sum(values) / len(values), 2),
        "count": len(values),
    }


def measure_throughput(arguments: Arguments) -> dict[str, Any]:
    with Rig(engine=FAST, gpus=GPUS) as rig:
        check(run_closed(rig.url, WARM_UP)[0])
        before = rig.cpu_ms()
        client_before = sum(os.times()[:2])
        results, took_s = run_closed(rig.url, arguments.requests)
        client_ms = (sum(os.times()[:2]) - client_before) * 1e3
        after = rig.cpu_ms()
        check(results)
        long_tokens = 128
        long_results, long_s = run_closed(
            rig.url, max(64, arguments.requests // 8), output_tokens=long_tokens
        )
        check(long_results)
    count = len(results)
    cpu_ms = {name: round((after[name] - before[name]) / count, 4) for name in after}
    return {
        "requests": count,
        "concurrency": CONCURRENCY,
        "chunks_per_request": CHUNKS,
        "requests_per_s": round(count / took_s, 1),
        "streamed_tokens_per_s": round(count * CHUNKS / took_s, 1),
        "streamed_tokens_per_s_at_128_chunks": round(len(long_results) * long_tokens / long_s, 1),
        "cpu_ms_per_request": cpu_ms | {"client": round(client_ms / count, 4)},
        "cpu_ms_per_request_data_plane": round(sum(cpu_ms[name] for name in DATA_PLANE), 4),
        "ttft_ms": ttft_ms(results),
    }


def measure_latency(arguments: Arguments) -> dict[str, Any]:
    count = arguments.latency_requests
    with Rig(engine=PACED, gpus=GPUS) as rig:
        check(run_closed(rig.url, WARM_UP // 2)[0])
        before = rig.cpu_ms()
        meshed, took_s = run_closed(rig.url, count)
        after = rig.cpu_ms()
        check(meshed)
        rate_rps = count / took_s  # so that as many are in flight, but not in step
        meshed_open = run_open(rig.url, count, rate_rps)
        check(meshed_open)
    port = free_port()
    command = [
        sys.executable, "-m", "loadgen.bench.bare_engine", str(port), str(GPUS),
        msgspec.json.encode(PACED).decode(),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE) as bare:
        os.sched_setaffinity(bare.pid, cores()[0])
        assert bare.stdout is not None
        bare.stdout.readline()
        url = f"http://127.0.0.1:{port}"
        try:
            run_closed(url, WARM_UP // 2)
            alone, _ = run_closed(url, count)
            alone_open = run_open(url, count, rate_rps)
        finally:
            bare.kill()
    cpu = {name: round((after[name] - before[name]) / count, 4) for name in DATA_PLANE}
    return {
        "requests": count,
        "concurrency": CONCURRENCY,
        "chunks_per_request": CHUNKS,
        "s_between_chunks": STEP_S,
        "requests_per_s": round(count / took_s, 1),
        "cpu_ms_per_request_data_plane": round(sum(cpu.values()), 4),
        "closed_loop": _added(meshed, alone),
        "open_loop": {"arrivals_per_s": round(rate_rps, 1), **_added(meshed_open, alone_open)},
    }


def _added(meshed: list[RequestResult], alone: list[RequestResult]) -> dict[str, Any]:
    mesh, engine = ttft_ms(meshed), ttft_ms(alone)
    added = {key: round(mesh[key] - engine[key], 2) for key in ("p50", "p90", "p99", "mean")}
    return {"ttft_ms": mesh, "ttft_ms_engine_alone": engine, "ttft_ms_added": added}


def measure_memory(arguments: Arguments) -> dict[str, Any]:
    """Resident memory after a tenth of the requests, when pools and tables are warm, and at the
    end."""
    total = arguments.memory_requests
    with Rig(engine=FAST, gpus=GPUS) as rig:
        run_closed(rig.url, total // 10)
        before = {name: rig.rss_bytes(name) for name in ("ingress", "router")}
        rounds = 9
        for _ in range(rounds):
            run_closed(rig.url, total // 10)
        after = {name: rig.rss_bytes(name) for name in ("ingress", "router")}
    return {
        "requests": total,
        "rss_mib_before": {k: round(v / 2**20, 2) for k, v in before.items()},
        "rss_mib_after": {k: round(v / 2**20, 2) for k, v in after.items()},
        "growth_percent": {k: round(100 * (after[k] / before[k] - 1), 2) for k in before},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadgen.bench.bench_data_plane")
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--latency-requests", type=int, default=4000)
    parser.add_argument("--memory-requests", type=int, default=100_000)
    parser.add_argument("--only", choices=("throughput", "latency", "memory"))
    parsed = parser.parse_args()
    arguments = Arguments(parsed.requests, parsed.latency_requests, parsed.memory_requests)
    where: Environment = environment()
    os.sched_setaffinity(0, cores()[0])
    gc.disable()  # the client keeps every result: its pauses are not the mesh's
    measurements = {
        "throughput": measure_throughput,
        "latency": measure_latency,
        "memory": measure_memory,
    }
    for name, measure in measurements.items():
        if parsed.only in (None, name):
            line = {"benchmark": f"data_plane_{name}", **measure(arguments)}
            line["environment"] = msgspec.to_builtins(where)
            sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
