"""A comparison as a page: what was compared, what came of it, and how far to trust it."""

from collections.abc import Iterator, Mapping

from loadgen.compare.outcome import METRICS, Cell, Comparison
from loadgen.compare.words import LOSES, NOTHING, number, ratio_words, summary, with_interval
from loadgen.report_table import milliseconds

_DEFINITIONS = """\
- **TTFT**, **E2E**: arrival to first token, to last token. **TPOT**: a request's mean time per
  output token after the first.
- **Goodput**: requests per second of the window (after the warm-up) that completed and met TTFT
  and TPOT of their type. **SLO attainment**: the share of counted requests that did. A request
  that did not complete counts as a miss.
- **Percentiles** are over all counted requests; one that did not end within the drain time is
  endless, and a percentile that falls on one reads "never".
- **Throughput**: completed requests over the time from the warm-up's end to the window's end,
  or the last completion if that is later.
- **Switches**: changes of the plan in force that moved replicas; **reweightings**: those of the
  routing shares alone; **switch time**: from adoption to the new plan in force, all together.
  **GPU-hours**: of GPUs that replicas of the plan in force held, the whole run.
- Brackets hold 95 % intervals: Student's t over the seeds. "vs" compares run by run, same seed
  and same arrivals; a ratio is the geometric mean of the pairs' ratios. A verdict needs the
  interval of the ratio to leave out 1 (where a value is 0, that of the difference to leave out
  0). Intervals are not corrected for their number: of 20 verdicts between equal policies, one is
  wrong by chance.
"""

_SIMULATED = """\
Everything here is simulated. The cores of router, profiler, forecaster, scheduler, switcher and
worker are the production ones; engines are modelled: continuous batching over step times and KV
capacities of the cost model, whose error is in the profile's own report. Requests' lengths and
times are the trace's, nothing of their content. A solve takes its measured time in virtual time
unless `slow_work_s` sets one. See `loadgen/simulator/README.md` for what is modelled and what
is not.
"""


def report_page(comparison: Comparison, pictures: Mapping[str, str], note: str = "") -> str:
    """``pictures`` maps file names to what they show; ``note`` says why there are none."""
    parts = (
        "# Comparison of policies\n",
        *_about(comparison),
        "\n## In short\n",
        *(f"- {sentence}" for sentence in summary(comparison.cells)),
        "\n## Findings\n",
        *_findings(comparison),
        "\n## Results\n",
        *_results(comparison),
        *(f"\n![{shows}]({name})\n" for name, shows in pictures.items()),
        *((f"\n{note}\n",) if note else ()),
        "\n## What is compared\n",
        *_policies(comparison),
        "\n## What requests had to meet\n",
        *_targets(comparison),
        "\n## Definitions\n",
        _DEFINITIONS,
        "\n## What is simulated\n",
        _SIMULATED,
        "\n## Settings\n",
        *_settings(comparison),
    )
    return "\n".join(parts)


def _about(comparison: Comparison) -> Iterator[str]:
    about, saturation = comparison.about, comparison.saturation
    gpus = ", ".join(f"{count} {kind}" for kind, count in about.gpus.items())
    traces = ", ".join(f"{name}: `{path}`" for name, path in about.traces.items())
    window = f"{about.window_s:g} s of it, the first {about.warmup_s:g} s as warm-up"
    yield f"{gpus}; {traces}; {window}.\n"
    if saturation.given:
        yield (
            f"Load 1.0 is rate scale {saturation.rate_scale:.4g}, as given "
            f"({saturation.requests_per_s:.3g} requests/s); it was not searched for.\n"
        )
        return
    yield (
        f"Load 1.0 is the saturation of the best static deployment, `{saturation.deployment}`: "
        f"rate scale {saturation.rate_scale:.4g} ({saturation.requests_per_s:.3g} requests/s), "
        "the largest at which requests with 99 % of the offered tokens end within a grace of 5 % "
        "of the window plus that deployment's P99 of E2E at rest. At "
        f"{saturation.rate_scale_above:.4g} none does. {saturation.simulations} simulations of "
        f"{saturation.simulated_s:g} s, the window's busiest (from its second "
        f"{saturation.from_s:g} on).\n"
    )


def _findings(comparison: Comparison) -> Iterator[str]:
    for finding in comparison.findings:
        yield f"- **{finding}**" if LOSES in finding else f"- {finding}"
    yield ""


def _results(comparison: Comparison) -> Iterator[str]:
    reference = comparison.reference
    for load in comparison.loads:
        cells = [cell for cell in comparison.cells if cell.load == load]
        scale, seeds = cells[0].rate_scale, len(cells[0].seeds)
        yield f"### Load {load:g}: rate scale {scale:.4g}, {seeds} seeds\n"
        yield (
            f"| policy | began with | goodput, requests/s | vs {reference} | SLO attainment | "
            f"E2E P99 vs {reference} |"
        )
        yield "|---|---|---|---|---|---|"
        for cell in cells:
            yield _headline(cell)
        yield ""
        titles = [metric.title for metric in METRICS[2:]]
        yield f"| policy | {' | '.join(titles)} |"
        yield f"|---|{'---|' * len(titles)}"
        for cell in cells:
            yield f"| {cell.policy} | {' | '.join(_values(cell))} |"
        yield "\nMeans over the seeds; TTFT, TPOT and E2E in ms, switch time in s.\n"


def _headline(cell: Cell) -> str:
    goodput, attained = cell.values["goodput_rps"], cell.values["slo_attainment"]
    return (
        f"| {cell.policy} | {cell.deployment} | {with_interval(goodput, 'requests/s')} | "
        f"{_versus(cell, 'goodput_rps')} | {with_interval(attained, 'share')} | "
        f"{_versus(cell, 'e2e_ms_p99')} |"
    )


def _versus(cell: Cell, name: str) -> str:
    pair = next((pair for pair in cell.versus if pair.metric == name), None)
    return "reference" if pair is None else f"{ratio_words(pair.ratio)}, {pair.verdict}"


def _values(cell: Cell) -> Iterator[str]:
    for metric in METRICS[2:]:
        value = cell.values[metric.name]
        if metric.unit == "ms":
            yield "never" if value is None else milliseconds(value.mean)
        else:
            yield NOTHING if value is None else number(value.mean, metric.unit)


def _policies(comparison: Comparison) -> Iterator[str]:
    for policy in comparison.policies:
        forecast = f" Forecast: {policy.forecast}." if policy.switches else ""
        yield f"**{policy.name}**.{forecast}\n"
        yield f"- Known: {policy.known}"
        yield f"- Inferred: {policy.inferred}\n"
    yield f"Static deployments looked at in hindsight: {'; '.join(comparison.deployments)}.\n"


def _targets(comparison: Comparison) -> Iterator[str]:
    yield "| model/type | TTFT, ms | TPOT, ms |"
    yield "|---|---|---|"
    for name, target in comparison.targets.items():
        ttft, tpot = milliseconds(1000 * target.ttft_s), milliseconds(1000 * target.tpot_s)
        yield f"| {name} | {ttft} | {tpot} |"
    yield ""


def _settings(comparison: Comparison) -> Iterator[str]:
    about = comparison.about
    yield f"`{about.command}`\n"
    rows: dict[str, object] = {
        "commit": about.environment.commit,
        "oserve": about.oserve_version,
        "source digest": about.source_digest,
        **{f"package {name}": version for name, version in about.packages.items()},
        "simulated on": f"{about.environment.cpu}, {about.environment.cores} cores",
        "python": about.environment.python,
        "system": about.environment.system,
        "topology": about.topology,
        "runs": f"{about.runs_done} done, {about.runs_reused} reused, in {about.took_s:.0f} s",
        **{f"trace of {name}": digest for name, digest in about.trace_digests.items()},
        **{f"requests of {name}": f"{n:,}" for name, n in about.offered_requests.items()},
        **{f"prompts cut of {name}": f"{n:,}" for name, n in about.prompts_cut.items()},
        **about.settings,
    }
    yield "| setting | value |"
    yield "|---|---|"
    for name, value in rows.items():
        yield f"| {name} | {NOTHING if value is None else value} |"
