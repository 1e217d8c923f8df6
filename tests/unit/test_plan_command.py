"""``oserve plan`` from its command line to what it prints, and what it asks the policy."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from rich.console import Console, Group
from typer.testing import CliRunner, Result

from loadgen.planning import words
from loadgen.planning.advice import start_words
from loadgen.planning.cli import plan
from loadgen.planning.demand import Expected
from loadgen.planning.demand_file import read_demand
from loadgen.planning.demand_trace import Window, trace_demand
from loadgen.planning.machine import Site, read_site, serving
from loadgen.planning.plan_file import read_plan
from loadgen.planning.planner import NOTHING, PlanImpossible, problem_of
from loadgen.planning.report import Question, Report, report
from loadgen.planning.table import plan_tables
from loadgen.planning.table_explain import compared, explained
from loadgen.planning.what_if import parse_what_if
from services.scheduler.config import SchedulerConfig
from services.scheduler.plan_id import make_plan
from services.scheduler.policies.interface import Planned, Policy, Problem
from services.scheduler.policies.weights import equal
from shared.cost.model import cost_model
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.messages.decisions import (
    Decision,
    PlanOutlook,
    ReplicaOutlook,
    SwitchOutlook,
    TypeOutlook,
)
from shared.messages.plans import ReplicaSpec

ROOT = Path(__file__).resolve().parents[2]
TWO = ROOT / "deploy" / "topologies" / "two-models.toml"
TOPOLOGY = """
[mesh.model]
model_id = "llama-3.1-8b"
context_tokens_max = 8192
[[mesh.nodes]]
node_id = "n0"
gpus = 2
gpu_kind = "h100"
[[mesh.nodes]]
node_id = "n1"
gpus = 1
gpu_kind = "h100"
"""
DEMAND = """
horizon_s = 600
[[demand]]
type = "chat"
arrivals_rps = 2.0
input_tokens = 400
output_tokens = 200
[[demand]]
type = "code"
arrivals_rps = 1.0
input_tokens = 2000
output_tokens = 20
classes = { interactive = 1.0 }
"""


class OnEachGpu:
    """One replica on each GPU, each good for ``EACH_RPS``."""

    EACH_RPS = 1.0
    period_s, slow = 30.0, True

    def __init__(self, *, gpus_useful: int = 100) -> None:
        self.useful, self.asked = gpus_useful, list[Problem]()

    def plan(self, problem: Problem) -> Planned:
        self.asked.append(problem)
        model_id = problem.models[0].model_id
        replicas = tuple(
            ReplicaSpec(
                replica_id=f"r{n}", model_id=model_id, parallelism="tp1pp1", gpus=(offer.gpu_id,)
            )
            for n, offer in enumerate(problem.offers)
        )
        rps = sum(model.arrivals_rps for model in problem.models)
        headroom = self.EACH_RPS * min(self.useful, len(replicas)) / rps
        made = make_plan(replicas, equal(replicas), reason="one on each")
        return Planned(
            plan=made, reason="one on each", decision=self._told(problem, made.replicas, headroom)
        )

    def _told(
        self, problem: Problem, replicas: tuple[ReplicaSpec, ...], headroom: float
    ) -> Decision:
        types = [(m.model_id, kind) for m in problem.models for kind in m.types]
        return Decision(
            policy="oserve",
            goal="headroom",
            objective=headroom,
            bound=headroom,
            gap=0.0,
            optimal=True,
            solve_s=0.25,
            types=tuple(
                TypeOutlook(
                    model_id=model_id,
                    request_type=str(kind.request_type),
                    arrivals_rps=kind.arrivals_rps,
                    arrivals_rps_p10=0.5 * kind.arrivals_rps,
                    arrivals_rps_p90=2.0 * kind.arrivals_rps,
                    input_tokens=kind.input_tokens_mean,
                    output_tokens=kind.output_tokens_mean,
                    ttft_s_p50=0.05,
                    ttft_s_p99=1.25,
                    tpot_s_p50=0.02,
                    tpot_s_p99=0.04,
                )
                for model_id, kind in types
            ),
            replicas=tuple(
                ReplicaOutlook(
                    replica_id=spec.replica_id,
                    model_id=spec.model_id,
                    parallelism=spec.parallelism,
                    gpus=spec.gpus,
                    utilisation=1.0 / headroom,
                    arrivals_rps={
                        str(kind.request_type): kind.arrivals_rps / len(replicas)
                        for _, kind in types
                    },
                )
                for spec in replicas
            ),
            chosen=PlanOutlook(
                plan=f"{len(replicas)} x tp1", gpus=len(replicas), headroom=headroom, lateness=0.5
            ),
            alternatives=(
                PlanOutlook(plan="1 x tp2", gpus=2, headroom=0.5, lateness=0.9, why="carries less"),
            ),
            bottleneck="r0 decodes all day",
        )


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "mesh.toml").write_text(TOPOLOGY)
    (tmp_path / "demand.toml").write_text(DEMAND)
    return tmp_path / "mesh.toml", tmp_path / "demand.toml"


@pytest.fixture
def asked(files: tuple[Path, Path]) -> tuple[Site, Expected]:
    topology, demand = files
    site = serving(read_site(topology, sets=()), ["llama-3.1-8b"], alone=False)
    return site, read_demand(demand, model_id="llama-3.1-8b")


def oserve(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "100"}
    )


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


def printed(*parts: Any) -> str:
    console = Console(width=100, file=StringIO())
    with console.capture() as caught:
        console.print(Group(*parts))
    return caught.get()


def always(policy: Policy) -> Callable[[SchedulerConfig, float], Policy]:
    return lambda _config, _horizon_s: policy


def test_the_scheduler_is_asked_as_it_would_ask_itself(
    files: tuple[Path, Path], asked: tuple[Site, Expected]
) -> None:
    """A plan for another problem than the mesh's would be bought for nothing."""
    topology, _ = files
    site = read_site(
        topology,
        sets=(
            "scheduler.survive=1",
            "scheduler.target.ttft_s=1",
            "scheduler.target.tpot_s=0.1",
            "scheduler.elastic=true",
        ),
    )
    site = serving(site, ["llama-3.1-8b"], alone=False)
    problem = problem_of(site, asked[1], NOTHING)
    assert [offer.gpu_id for offer in problem.offers] == ["n0-g0", "n0-g1", "n1-g0"]
    assert (problem.needs.survive, problem.needs.elastic) == (1, True)
    assert problem.targets["llama-3.1-8b"].ttft_s == 1.0
    assert problem.class_targets["standard"].ttft_s == 1.0
    assert problem.class_targets["interactive"].ttft_s == 0.5
    (model,) = problem.models
    assert model.horizon_s == 600.0
    assert [kind.arrivals_rps for kind in model.types] == [2.0, 1.0]
    assert model.types[1].class_shares == {"interactive": 1.0}


def test_the_tables_say_what_the_decision_says(asked: tuple[Site, Expected]) -> None:
    """An operator decides by them."""
    site, expected = asked
    found = report(
        Question(site=site, expected=expected, topology="mesh.toml"), always(OnEachGpu())
    )
    text = printed(plan_tables(found.answer))
    assert "3 x tp1, on 3 GPUs for 9.00 per hour" in text
    assert "carries 1.00 x the p90 of the demand" in text
    assert "proven in 0.25 s, gap 0.00 %" in text
    assert "interactive: TTFT 500 ms, TPOT 50 ms" in text
    assert "chat: 0.667, code: 0.333" in text
    assert "50 / 1,250" in text
    assert "1-4" in text  # p10 and p90
    assert "E2E" not in text  # not worked out: no column of dashes
    assert max(map(len, text.splitlines())) <= 100


def test_what_more_gpus_bring_is_found_by_planning_with_them(
    asked: tuple[Site, Expected],
) -> None:
    """A guess would be believed as much."""
    site, expected = asked
    policy = OnEachGpu()
    question = Question(site=site, expected=expected, topology="t", explain=True)
    found = report(question, always(policy))
    first, link = found.brought
    assert (first.what, first.worth_it) == ("1 more h100", True)
    assert first.gain == pytest.approx(1 / 3)
    assert (link.worth_it, link.gain) == (False, 0.0)
    assert len(policy.asked[1].offers) == 4
    text = printed(*explained(found))
    for part in ("(+33 %)", "helps", "no gain", "carries less", "Bottleneck: r0 decodes all day"):
        assert part in text
    found = report(question, always(OnEachGpu(gpus_useful=2)))
    assert [one.what for one in found.brought[:2]] == ["1 more h100", "8 more h100"]
    assert not any(one.worth_it for one in found.brought)


def test_a_faster_network_reaches_the_cost_model(asked: tuple[Site, Expected]) -> None:
    """The plan would be the same whatever the network, and nobody would notice."""
    site, expected = asked
    policy = OnEachGpu()
    seen: list[float] = []

    class Looks(OnEachGpu):
        def plan(self, problem: Problem) -> Planned:
            name = problem.profiles["llama-3.1-8b"]
            cost = cost_model("h100", name, Parallelism(1, 2), nodes=2)
            seen.append(cost.gpu.network.bytes_per_s)
            return policy.plan(problem)

    what_ifs = (parse_what_if("network_gbps=80"),)
    report(Question(site=site, expected=expected, topology="t", what_ifs=what_ifs), always(Looks()))
    assert seen[1] == 80e9 / 8 != seen[0]


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("gpus=12", {"n0": (8, "h100"), "n1": (4, "h100")}),
        ("gpus=1", {"n0": (1, "h100")}),
        ("kind=h200", {"n0": (2, "h200"), "n1": (1, "h200")}),
        ("gpus=2,kind=h200", {"n0": (2, "h200")}),
        ("add=1", {"n0": (3, "h100"), "n1": (1, "h100")}),
        (
            "add=9,kind=h200",
            {"n0": (2, "h100"), "n1": (1, "h100"), "n2": (8, "h200"), "n3": (1, "h200")},
        ),
        ("nodes=3", {"n0": (1, "h100"), "n1": (1, "h100"), "n2": (1, "h100")}),
    ],
)  # fmt: skip
def test_a_what_if_changes_the_machines(
    asked: tuple[Site, Expected], tmp_path: Path, text: str, gpus: dict[str, tuple[int, str]]
) -> None:
    """The question answered would not be the one asked."""
    mesh = parse_what_if(text).of(asked[0], tmp_path).mesh
    assert {node.node_id: (node.gpus, node.gpu_kind) for node in mesh.nodes} == gpus


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("gpus", "write KEY=VALUE"),
        ("cards=3", "no such key as cards"),
        ("gpus=0", "whole number from 1"),
        ("gpus=3,gpus=4", "gpus is there twice"),
        ("gpus=3,add=1", "use one of them"),
        ("kind=b200", "no such gpu; did you mean"),
        ("scale=0", "a number above 0"),
        ("network_gbps=nan", "a number above 0"),
    ],
)
def test_a_wrong_what_if_is_refused(text: str, what: str) -> None:
    """A slip in the option would answer another question."""
    with pytest.raises(ConfigInvalid, match="--what-if") as caught:
        parse_what_if(text)
    assert what in str(caught.value)


def test_a_what_if_that_cannot_be_is_refused(asked: tuple[Site, Expected], tmp_path: Path) -> None:
    """More nodes than GPUs would be silently fewer."""
    with pytest.raises(ConfigInvalid, match="use 1 to 3"):
        parse_what_if("nodes=4").of(asked[0], tmp_path)
    mixed = parse_what_if("add=1,kind=h200").of(asked[0], tmp_path)
    for text in ("gpus=4", "add=1", "nodes=2"):
        with pytest.raises(ConfigInvalid, match="h100 and h200"):
            parse_what_if(text).of(mixed, tmp_path)


def test_what_ifs_stand_beside_what_is(asked: tuple[Site, Expected]) -> None:
    """The whole point of asking."""
    site, expected = asked
    what_ifs = tuple(parse_what_if(f"add={n},scale=2") for n in (1, 3, 5, 9))
    found = report(
        Question(site=site, expected=expected, topology="t", what_ifs=what_ifs), always(OnEachGpu())
    )
    text = printed(*compared(found))
    assert "0.67 x (0.67 x)" in text  # 4 GPUs for twice the demand
    assert "6 (2.00 x)" in text
    assert text.count("as it is") == 2  # three abreast, then the fourth
    assert max(map(len, text.splitlines())) <= 100


def test_a_plan_that_stands_is_told_of(asked: tuple[Site, Expected]) -> None:
    """A switch that does not pay would look like one that does."""
    site, expected = asked

    class Moves(OnEachGpu):
        def plan(self, problem: Problem) -> Planned:
            found = super().plan(problem)
            assert found.decision is not None
            if not problem.in_force.replicas:
                return found
            switch = SwitchOutlook(
                seconds=76.0, served_share=0.5, bytes_moved=138e9, busiest_link_s=46.0,
                requests_paused=7.0, gain=5.0, cost=6.0, horizon_s=600.0,
            )  # fmt: skip
            told = msgspec.structs.replace(
                found.decision, switch=switch, in_force=found.decision.alternatives[0]
            )
            return Planned(plan=problem.in_force, reason="kept", decision=told)

    stands = make_plan(
        [
            ReplicaSpec(
                replica_id="old", model_id="llama-3.1-8b", parallelism="tp2pp1",
                gpus=("n0-g0", "n0-g1"),
            )
        ],
        {"*": {"old": 1.0}},
        reason="",
    )  # fmt: skip
    question = Question(
        site=site, expected=expected, topology="t", in_force=stands,
        what_ifs=(parse_what_if("add=1"),),
    )  # fmt: skip
    found = report(question, always(Moves()))
    assert found.answer.change == "none"
    text = printed(plan_tables(found.answer))
    assert "1 x tp2, on 2 GPUs for 6.00 per hour; that is in force already" in text
    assert "does not pay: takes 76 s, 50.0 % of the demand is served meanwhile" in text
    assert found.fresh is not None  # what-ifs compare like with like
    assert found.fresh.change == "new"
    assert "as if nothing were in force" in printed(*compared(found))


def test_an_answer_without_figures_or_with_a_wrong_plan_is_refused(
    asked: tuple[Site, Expected],
) -> None:
    """A plan that the scheduler would refuse is none."""
    site, expected = asked

    class Mute(OnEachGpu):
        def plan(self, problem: Problem) -> Planned:
            return Planned(plan=super().plan(problem).plan, reason="")

    class Wrong(OnEachGpu):
        def plan(self, problem: Problem) -> Planned:
            found = super().plan(problem)
            assert found.plan is not None
            (spec, *_) = found.plan.replicas
            made = make_plan([msgspec.structs.replace(spec, gpus=("x",))], {}, reason="")
            return Planned(plan=made, reason="", decision=found.decision)

    for policy, what in ((Mute(), "without figures"), (Wrong(), "not on offer")):
        with pytest.raises(PlanImpossible, match=what):
            report(Question(site=site, expected=expected, topology="t"), always(policy))


def test_requests_longer_than_the_context_are_told(asked: tuple[Site, Expected]) -> None:
    """A mesh would refuse them all, and the plan would stand idle."""
    site, expected = asked
    short = msgspec.structs.replace(
        site.mesh, model=msgspec.structs.replace(site.mesh.model, context_tokens_max=700)
    )
    question = Question(
        site=Site(mesh=short, scheduler=site.scheduler), expected=expected, topology="t"
    )
    (note,) = report(question, always(OnEachGpu())).answer.notes
    assert "llama-3.1-8b code: 2,020 tokens are more than the context of 700" in note


def test_start_up_is_told_as_the_cost_model_has_it(asked: tuple[Site, Expected]) -> None:
    """Who buys a faster network for it would be disappointed."""
    site, _ = asked
    spec = ReplicaSpec(
        replica_id="r", model_id="llama-3.1-8b", parallelism="tp1pp1", gpus=("n0-g0",)
    )
    (text,) = start_words(site, make_plan([spec], {}, reason=""))
    assert (
        f"takes {cost_model('h100', 'llama-3.1-8b', Parallelism()).start_s:.0f} s to start" in text
    )


def test_many_alike_replicas_share_a_line(asked: tuple[Site, Expected]) -> None:
    """A thousand lines say less than one."""
    site, expected = asked
    grown = Site(mesh=parse_what_if("gpus=64").of(site, Path()).mesh, scheduler=site.scheduler)
    found = report(Question(site=grown, expected=expected, topology="t"), always(OnEachGpu()))
    text = printed(plan_tables(found.answer))
    assert "64 x llama-3.1-8b" in text
    assert len(text.splitlines()) < 30


def test_a_window_of_a_trace_becomes_types(tmp_path: Path) -> None:
    """The demand of another time, or of types that nobody would recognise, would be planned for."""
    rows = [f"{1.0 * n},{100 if n % 3 else 4000},{300 if n % 3 else 10}" for n in range(600)]
    rows += ["700,20000,10", "701,100,20"]
    trace = tmp_path / "t.csv"
    trace.write_text("\n".join(["timestamp_s,input_tokens,output_tokens", *rows]) + "\n")
    (tmp_path / "mesh.toml").write_text(TOPOLOGY)
    site = serving(read_site(tmp_path / "mesh.toml", sets=()), ["llama-3.1-8b"], alone=False)
    found = trace_demand({"llama-3.1-8b": str(trace)}, site.mesh, Window(at_s=60.0))
    (model,) = found.models
    assert [kind.request_type for kind in model.types] == [0, 1]
    assert [kind.arrivals_rps for kind in model.types] == pytest.approx([2 / 3, 1 / 3])
    assert {kind.input_tokens_mean for kind in model.types} == {100.0, 4000.0}
    assert model.horizon_s == 300.0
    assert found.notes == ()
    cut = trace_demand({"llama-3.1-8b": str(trace)}, site.mesh, Window(at_s=500.0, length_s=199.0))
    assert cut.notes == ("llama-3.1-8b: nothing arrives in the window's last 100 s",)
    late = trace_demand(
        {"llama-3.1-8b": str(trace)}, site.mesh, Window(at_s=690.0, slo_class="batch")
    )
    assert "1 of 2 prompts were cut to the context of 8,192 tokens" in late.notes[-1]
    assert late.models[0].types[0].class_shares == {"batch": 1.0}


def test_the_command_plans_with_the_production_policy(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The only proof that all parts fit together."""
    topology, demand = files
    out = tmp_path / "plan.toml"
    arguments = ("-t", topology, "--demand", demand, "--out", out, "--json")
    result = oserve(*arguments, "--what-if", "kind=h200")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["feasible"]
    assert found["gap"] is not None
    assert found["solve_s"] > 0
    assert found["type_names"] == {"llama-3.1-8b": {"0": "chat", "1": "code"}}
    shapes = {rate["parallelism"] for rate in found["rates"]}
    assert {replica["parallelism"] for replica in found["replicas"]} <= shapes
    for row in found["weights"].values():
        assert sum(row.values()) == pytest.approx(1.0)
    assert "h200" in found["what_ifs"][0]["plan"]["gpus"]
    written = read_plan(out)
    assert written.plan_id == found["plan_id"]
    again = oserve("-t", topology, "--demand", demand, "--plan", out)
    assert again.exit_code == 0, again.stderr
    assert "in force" in again.stdout


def test_too_much_demand_ends_in_one_and_says_what_is_missing(files: tuple[Path, Path]) -> None:
    """A script would take an impossible plan for a good one."""
    topology, demand = files
    result = oserve("-t", topology, "--demand", demand, "--scale", "500")
    assert result.exit_code == 1
    assert "Missing:" in result.stdout
    assert "Replicas" in result.stdout  # what can be served is still told


def test_a_model_that_fits_nowhere_is_told_with_what_would_hold_it(
    files: tuple[Path, Path],
) -> None:
    """Whoever has too few GPUs wants to know how few."""
    topology, demand = files
    topology.write_text(
        TOPOLOGY.replace("llama-3.1-8b", "llama-2-70b").replace("gpus = 2", "gpus = 1")
    )
    result = oserve("-t", topology, "--demand", demand, "--set", "mesh.nodes=[]")
    assert result.exit_code == 2  # no GPU at all is no topology
    topology.write_text(topology.read_text().rpartition("[[mesh.nodes]]")[0])
    result = oserve("-t", topology, "--demand", demand, "--explain", "--out", topology.parent / "p")
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "plan none" in text
    assert "Missing: llama-2-70b fits no shape" in text
    assert "3 requests/s of 2 types" in text
    assert "1 more h100" in text
    assert "helps" in text
    assert "not written" in said(result)
    assert not (topology.parent / "p").exists()


def test_models_of_the_topology_stay_unless_another_is_asked_for(tmp_path: Path) -> None:
    """Adopting a plan without the second model would stop all its replicas."""
    site = read_site(TWO, sets=())
    assert serving(site, ["llama-3.1-8b"], alone=False).mesh.model_ids == (
        "llama-3.1-8b", "qwen2.5-32b",
    )  # fmt: skip
    assert serving(site, ["qwen2.5-32b"], alone=True).mesh.model_ids == ("qwen2.5-32b",)
    assert serving(site, ["opt-30b"], alone=False).mesh.model_ids == ("opt-30b",)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((), "give --demand FILE, or --trace TRACE"),
        (("--demand", "D", "--at", "3"), "--at = 3.0"),
        (("--trace", "D"), "say --at SECONDS"),
        (("--trace", "D", "--at", "0", "--for", "0"), "more than 0 s"),
        (("--trace", "absent.csv", "--at", "0"), "no such file"),
        (("--demand", "D", "--for", "60"), "it is of a --trace"),
        (("--demand", "D", "--scale", "0"), "a number above 0"),
        (("--demand", "D", "--scale", "1e9"), "1e-06 to 1e+06 requests/s"),
        (("--demand", "D", "--class", "gold"), "use one of interactive"),
        (("--demand", "D", "--set", "scheduler.policy=uniform"), "plans are made by oserve"),
        (("--demand", "D", "--set", "scheduler.survive=9"), "scheduler.survive"),
        (("--demand", "D", "--model", "no-such"), "no such model"),
        (("--demand", "absent.toml"), "cannot be read"),
        (("--demand", "D", "--plan", "absent.toml"), "cannot be read"),
    ],
)
def test_wrong_options_say_what_to_write(
    files: tuple[Path, Path], arguments: tuple[str, ...], what: str
) -> None:
    """A stack trace, or a plan for something else, is no answer."""
    topology, demand = files
    result = oserve("-t", topology, *(str(demand) if a == "D" else a for a in arguments))
    assert result.exit_code == 2, result.output
    assert what in said(result)
    assert result.stdout == ""


def test_errors_about_the_topology_name_its_line(tmp_path: Path) -> None:
    """A user with sixteen nodes would look at the wrong one."""
    (tmp_path / "mesh.toml").write_text(TOPOLOGY.replace('gpu_kind = "h100"', 'gpu_kind = "h1oo"'))
    (tmp_path / "demand.toml").write_text(DEMAND)
    result = oserve("-t", tmp_path / "mesh.toml", "--demand", tmp_path / "demand.toml")
    assert result.exit_code == 2
    assert "mesh.toml, line 8: mesh.nodes.n0.gpu_kind" in said(result)


def test_gpus_are_told_by_runs() -> None:
    """Eight names a replica leave no room for figures."""
    assert words.gpus(("n0-g0", "n0-g1", "n0-g2", "n1-g7", "odd")) == "n0-g0..2 n1-g7 odd"
    assert words.gpus(("n0-g0",)) == "n0-g0"
    assert words.milliseconds(None) == "-"
    assert words.pair(0.0312, 12.3456) == "31.2 / 12,346"
    figures = [words.rate(value) for value in (999.4, 999.6, 0.0, 1.5, 0.00001234, 123456.7)]
    assert figures == ["999", "1,000", "0", "1.5", "0.000012", "123,457"]


def test_the_shipped_demand_can_be_read() -> None:
    """README.md tells everybody to begin with it."""
    found = read_demand(ROOT / "deploy" / "demands" / "chat-and-code.toml", model_id="m")
    assert [found.name("m", str(n)) for n in range(3)] == ["chat", "code", "summaries"]


def test_the_readme_has_the_keys_of_what_ifs() -> None:
    """A key that nobody knows of is not asked for, and one that is gone is."""
    text = (ROOT / "loadgen" / "planning" / "README.md").read_text(encoding="utf-8")
    table = text.partition("## What-ifs")[2].partition("## ")[0]
    told = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    with pytest.raises(ConfigInvalid) as caught:
        parse_what_if("none=1")
    assert told == caught.value.remedy.partition("there are: ")[2].split(", ")


def test_help_needs_none_of_it() -> None:
    """Help that takes a second is not asked for."""
    code = (
        "import sys, deploy.cli, loadgen.planning.cli; "
        "print([n for n in ('numpy', 'scipy', 'services') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_reports_are_whole_in_json(asked: tuple[Site, Expected]) -> None:
    """A field left out of the JSON is missed by the first program that needs it."""
    from loadgen.planning.view import ReportView, view

    site, expected = asked
    question = Question(site=site, expected=expected, topology="t", explain=True)
    found: Report = report(question, always(OnEachGpu()))
    text = msgspec.json.encode(view(found))
    assert msgspec.json.decode(text, type=ReportView) == view(found)
    assert json.loads(text).keys() == set(ReportView.__struct_fields__)
