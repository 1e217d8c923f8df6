"""Figures of decisions as tables and lines for a terminal of 100 columns."""

from collections.abc import Iterable
from datetime import UTC, datetime

from rich import box
from rich.table import Table

from deploy.why_answers import Figures, TypeCompared
from shared.messages.decisions import Decision, PlanOutlook, SwitchOutlook

NOTHING = "-"
_GB = 1e9
_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86400.0


def when(at_s: float | None, now_s: float) -> str:
    """``14:02:11 (3 min ago)``, in local time; with its day when that is not today."""
    if at_s is None:
        return "at an unknown time"
    at, now = (datetime.fromtimestamp(time_s, UTC).astimezone() for time_s in (at_s, now_s))
    day = "" if at.date() == now.date() else f"{at:%Y-%m-%d} "
    return f"{day}{at:%H:%M:%S} ({lasting(max(0.0, now_s - at_s))} ago)"


def lasting(seconds: float) -> str:
    """Two digits or so, in a unit that fits."""
    if seconds < 2 * _MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR_S:
        return f"{seconds / _MINUTE_S:.0f} min"
    return f"{seconds / _HOUR_S:.1f} h" if seconds < 2 * _DAY_S else f"{seconds / _DAY_S:.1f} days"


def time_text(seconds: float | None) -> str:
    """Milliseconds below a second; ``-`` where it is not known."""
    if seconds is None:
        return NOTHING
    if seconds < 1.0:
        return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"  # noqa: PLR2004
    return f"{seconds:.3g} s"


def number(value: float | None) -> str:
    """Three digits, no exponent for what people count in."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004  # three digits


def share(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


def table(title: str, *columns: str, left: int = 1) -> Table:
    """Without rules between rows; the first ``left`` columns are text, the others figures."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for place, name in enumerate(columns):
        text = place < left
        made.add_column(name, justify="left" if text else "right", no_wrap=not text, min_width=4)
    return made


def types_table(types: Iterable[TypeCompared], *, seen_s: float) -> Table:
    """Two rows a type: what was predicted, and what was seen, with how far it is off."""
    title = (
        f"Predicted, and seen in {lasting(seen_s)}" if seen_s else "Predicted; nothing was seen yet"
    )
    columns = ("type", "", "requests/s", "input", "output", "TTFT mean", "TPOT mean")
    made = table(title, *columns, left=2)
    made.columns[1].no_wrap = True
    rows = list(types)
    several = len({row.model_id for row in rows}) > 1
    for row in rows:
        name = f"{row.model_id} {row.request_type}" if several else row.request_type
        made.add_row(name, "predicted", *_predicted(row))
        if seen_s:
            made.add_row("", "seen", *_seen(row))
    return made


def _predicted(row: TypeCompared) -> list[str]:
    figures = row.predicted
    if figures is None:
        return ["none", *[NOTHING] * 4]
    low, high = row.arrivals_rps_p10, row.arrivals_rps_p90
    spread = "" if low is None or high is None else f" ({low:.2g} to {high:.2g})"
    return [f"{number(figures.arrivals_rps)}{spread}", *_rest(figures)]


def _seen(row: TypeCompared) -> list[str]:
    seen, predicted = row.seen, row.predicted
    if seen is None:
        return ["none", *[NOTHING] * 4]
    if predicted is None:
        return [number(seen.arrivals_rps), *_rest(seen)]
    pairs = (
        (number(seen.arrivals_rps), seen.arrivals_rps, predicted.arrivals_rps),
        (number(seen.input_tokens), seen.input_tokens, predicted.input_tokens),
        (number(seen.output_tokens), seen.output_tokens, predicted.output_tokens),
        (time_text(seen.ttft_s_mean), seen.ttft_s_mean, predicted.ttft_s_mean),
        (time_text(seen.tpot_s_mean), seen.tpot_s_mean, predicted.tpot_s_mean),
    )
    return [f"{text}{_off(actual, expected)}" for text, actual, expected in pairs]


def _off(actual: float | None, expected: float | None) -> str:
    if actual is None or expected is None or expected <= 0.0:
        return ""
    times = actual / expected
    return f" (x {times:.2g})" if times >= 2.0 else f" ({times - 1:+.0%})"  # noqa: PLR2004


def _rest(figures: Figures) -> list[str]:
    return [
        number(figures.input_tokens),
        number(figures.output_tokens),
        time_text(figures.ttft_s_mean),
        time_text(figures.tpot_s_mean),
    ]


def plans_table(decision: Decision, *, chosen: str, in_force: str) -> Table | None:
    """The plan chosen and the one in force then, under the names given (one row, if they are the
    same), and the alternatives; None without any."""
    rows = _named(decision, chosen=chosen, in_force=in_force)
    rows += [("", plan) for plan in decision.alternatives]
    if not rows:
        return None
    columns = ["", "plan", "GPUs", "headroom", "lateness", "in target", "E2E p99"]
    priced = len({plan.price_per_hour for _, plan in rows}) > 1
    made = table("Plans compared", *columns, *(["price/h"] if priced else []), left=2)
    made.columns[0].no_wrap = True
    for name, plan in rows:
        price = [number(plan.price_per_hour)] if priced else []
        made.add_row(name, plan.plan, *_outlook(plan), *price)
    return made


def _named(decision: Decision, *, chosen: str, in_force: str) -> list[tuple[str, PlanOutlook]]:
    best, stood = decision.chosen, decision.in_force
    if best is not None and stood is not None and best.plan == stood.plan:
        return [(in_force, stood)]
    pairs = ((chosen, best), (in_force, stood))
    return [(name, plan) for name, plan in pairs if plan is not None]


def lost_lines(decision: Decision) -> list[str]:
    """Why each alternative lost."""
    return [f"{plan.plan}: {plan.why}" for plan in decision.alternatives if plan.why]


def _outlook(plan: PlanOutlook) -> list[str]:
    return [
        str(plan.gpus),
        f"{plan.headroom:.2f}",
        f"{plan.lateness:.3g}",
        share(plan.goodput_share),
        time_text(plan.e2e_s_p99),
    ]


def switch_lines(switch: SwitchOutlook) -> list[str]:
    """What was reckoned for and against a switch."""
    verdict = "worth it" if switch.moves else "not worth it"
    step = f" ({switch.step})" if switch.step else ""
    payback = (
        "never pays back"
        if switch.payback_s is None
        else f"pays back after {lasting(switch.payback_s)}"
    )
    why = f": {switch.why}" if switch.why else ""
    sums = f"gain {number(switch.gain)}, cost {number(switch.cost)} (lateness x seconds)"
    served = f"meanwhile {share(switch.served_share)} of the demand is served"
    link = f"{time_text(switch.busiest_link_s)} on the busiest link"
    moved = f"moves {switch.bytes_moved / _GB:.3g} GB, {link}"
    return [
        f"Switch{step}: {verdict}{why}",
        f"  {sums}; {payback}, demand expected to last {lasting(switch.horizon_s)}",
        f"  takes {time_text(switch.seconds)}{_live(switch)}, {served}",
        f"  {moved}; pauses {number(switch.requests_paused)} requests",
    ]


def _live(switch: SwitchOutlook) -> str:
    if switch.pause_s is None:
        return ""
    return f" live, with a pause of {time_text(switch.pause_s)}"


def solved_line(decision: Decision) -> str:
    """How good the search was."""
    took = f" in {time_text(decision.solve_s)}" if decision.solve_s > 0.0 else ""
    if decision.objective is None:
        return f"Decided by policy {decision.policy}{took}"
    proof = "proven optimal" if decision.optimal else "not proven optimal"
    gap = "" if decision.gap is None else f", gap {decision.gap:.2g}"
    most = "least" if decision.goal == "thrift" else "most"
    bound = "" if decision.bound is None else f" of at {most} {decision.bound:.4g}"
    goal = f"{decision.goal} " if decision.goal else ""
    return (
        f"Decided by policy {decision.policy}{took}: {goal}{decision.objective:.4g}{bound}, "
        f"{proof}{gap}"
    )
