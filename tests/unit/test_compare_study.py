"""The study of policies: its workloads, what its cells come to, and how that is told."""

import gzip
import sys
from pathlib import Path

import pytest

from loadgen.bench import compare_workloads
from loadgen.bench.bench_compare import arguments_of, meshes
from loadgen.bench.compare_cells import Row, mesh_of
from loadgen.bench.compare_summary import OVERALL, goodput_ratio, markdown, p99_ratio, summary
from loadgen.bench.compare_workloads import KEPT, PROBE_SCALE, WORKLOADS, Unavailable
from loadgen.compare.options import parse_names
from loadgen.compare.study import expand
from loadgen.simulator.site import Site

HEADER = "timestamp_s,input_tokens,output_tokens\n"
SAMPLER = f"""
import sys
print("drawing")
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if asked["--pool"] == "m-mid":
    raise SystemExit("no pandas")
assert asked["--end"] == str(int(asked["--start"]) + 3600), asked
with open(asked["--out"], "w") as file:
    file.write({HEADER!r} + f"{{float(asked['--scale'])}},1,1\\n")
"""


def row(
    policy: str,
    *,
    load: float = 0.5,
    p99_ms: float | None = 1000.0,
    goodput: float = 10.0,
    attained: float = 0.9,
    gpu_hours: float = 4.0,
    workload: str = "azure",
) -> Row:
    return Row(
        workload=workload,
        models="llama-2-70b",
        gpus=16,
        load=load,
        policy=policy,
        began_with="4 tp4",
        rate_scale=1.0,
        seeds=1,
        values={
            "e2e_ms_p99": p99_ms,
            "goodput_rps": goodput,
            "slo_attainment": attained,
            "gpu_hours": gpu_hours,
        },
    )


def test_ratios_say_who_is_better() -> None:
    """A loss would be published as a win."""
    fast, slow = row("oserve", p99_ms=500.0), row("static-best", p99_ms=1000.0)
    endless = row("static-best", p99_ms=None)
    assert p99_ratio(fast, slow) == pytest.approx(2.0)
    assert p99_ratio(slow, fast) == pytest.approx(0.5)
    assert p99_ratio(fast, endless) == float("inf")
    assert p99_ratio(endless, fast) == 0.0
    assert p99_ratio(endless, endless) == 1.0
    assert goodput_ratio(row("a", goodput=5.0), row("b", goodput=10.0)) == pytest.approx(0.5)
    assert goodput_ratio(row("a", goodput=5.0), row("b", goodput=0.0)) == float("inf")
    assert goodput_ratio(row("a", goodput=0.0), row("b", goodput=5.0)) == 0.0
    assert goodput_ratio(row("a", goodput=0.0), row("b", goodput=0.0)) == 1.0


def test_cells_without_a_ratio_are_counted() -> None:
    """A policy whose tail never ends would look better for it."""
    rows = [
        row("static-best", load=0.5, p99_ms=1000.0),
        row("oserve", load=0.5, p99_ms=500.0),
        row("static-best", load=0.9, p99_ms=1000.0),
        row("oserve", load=0.9, p99_ms=None),
        row("static-best", load=1.0, p99_ms=1000.0),
        row("oserve", load=1.0, p99_ms=2000.0),
        row("static-best", load=1.1, p99_ms=None),
        row("oserve", load=1.1, p99_ms=2000.0),
    ]
    found = next(v for v in summary(rows) if (v.workload, v.policy) == (OVERALL, "oserve"))
    assert found.against == "static-best"
    assert found.p99.mean == pytest.approx(1.0)  # of 2 and 1/2
    assert (found.p99.cells, found.p99.lost) == (4, 2)
    assert (found.p99.never, found.p99.others_never) == (1, 1)
    assert found.p99.worst == pytest.approx(0.5)
    assert "never in 1" in markdown(rows)


def test_gpu_hours_count_where_as_much_is_attained() -> None:
    """An elastic plan that serves less would be praised for its savings."""
    rows = [
        row("static-best", load=0.5, attained=0.90, gpu_hours=8.0),
        row("oserve-elastic", load=0.5, attained=0.895, gpu_hours=4.0),
        row("static-best", load=0.9, attained=0.90, gpu_hours=8.0),
        row("oserve-elastic", load=0.9, attained=0.80, gpu_hours=2.0),
    ]
    found = next(v for v in summary(rows) if v.policy == "oserve-elastic")
    assert (found.equal, found.gpu_hours) == (1, pytest.approx(2.0))


def test_pairs_are_of_one_cell() -> None:
    """A policy would be compared with another load, or with nothing."""
    rows = [
        row("static-best", load=0.5, goodput=1.0),
        row("static-best", load=0.9, goodput=4.0),
        row("oserve", load=0.9, goodput=8.0),
        row("oserve", load=0.9, goodput=8.0, workload="mooncake"),
    ]
    found = {v.workload: v for v in summary(rows) if v.policy == "oserve"}
    assert found.keys() == {"azure", OVERALL}
    assert found[OVERALL].goodput.cells == 1
    assert found["azure"].goodput.mean == pytest.approx(2.0)


def test_losses_are_bold_in_every_table() -> None:
    """A reader would have to look for what went wrong."""
    rows = [
        row("static-best"), row("oserve", p99_ms=1020.0, goodput=9.0),
        row("oserve-paper@oracle", p99_ms=None),
    ]  # fmt: skip
    text = markdown(rows)
    assert "| azure | 0.5 | 1.0 s | 0.98 | **none** |" in text
    assert "| azure | 0.5 | 10.00/s | **0.90** | 1.00 |" in text


def test_an_unread_option_is_the_small_or_the_whole_study() -> None:
    """One command would not do what the README says it does."""
    small, whole = arguments_of([]), arguments_of(["--part", "all", "--load", "0.6"])
    assert small.workload == "azure"
    assert parse_names(whole.workload) == tuple(WORKLOADS)
    assert (whole.load, small.load) == ("0.6", "0.6,0.9")
    found = list(meshes(whole))
    assert len(found) == (len(WORKLOADS) - 1) * 4 + 1
    assert [(models, gpus) for w, models, gpus in found if w.name == "three-models"] == [
        (("llama-3.1-70b", "qwen2.5-32b", "llama-3.1-8b"), 32)
    ]
    expand(parse_names(whole.policies), Site(mesh_of(("llama-2-70b",), 16)))  # all are known


@pytest.mark.parametrize(("gpus", "nodes"), [(16, [8, 8]), (32, [8] * 4), (4, [4])])
def test_gpus_come_in_nodes_of_eight(gpus: int, nodes: list[int]) -> None:
    """Tensor parallelism would span what no link connects."""
    mesh = mesh_of(("llama-2-70b", "opt-66b"), gpus).checked()
    assert [node.gpus for node in mesh.nodes] == nodes
    assert mesh.model_ids == ("llama-2-70b", "opt-66b")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Traces and tools in a folder of the test's own; nothing is there yet."""
    for name in ("TRACES", "TOOLS"):
        monkeypatch.setattr(compare_workloads, name, tmp_path)
    monkeypatch.setenv("OSERVE_TOOLS_PYTHON", sys.executable)
    return tmp_path


def test_what_is_missing_is_said(elsewhere: Path) -> None:
    """A study would end in a traceback on a machine without the traces."""
    for workload in WORKLOADS.values():
        models = workload.models or ("m",)
        with pytest.raises(Unavailable, match=r"no .* in"):
            workload.files(elsewhere / "cache", models, 0.5)


def test_a_window_is_drawn_at_the_scale_of_its_load(elsewhere: Path) -> None:
    """Thinned from one large draw, clients would be less bursty than they are."""
    (elsewhere / "servegen").mkdir()
    (elsewhere / "servegen" / "m-large_rates.csv.gz").touch()
    window = WORKLOADS["m-large-841800"]
    with pytest.raises(Unavailable, match="OSERVE_TOOLS"):
        window.files(elsewhere / "cache", ("m",), None)
    (elsewhere / "servegen_sample.py").write_text(SAMPLER)
    whole = window.files(elsewhere / "cache", ("m",), None)
    assert whole.rate_scale == 1.0
    assert Path(whole.traces["m"]).read_text() == f"{HEADER}{PROBE_SCALE},1,1\n"
    part = window.files(elsewhere / "cache", ("m",), 0.3)
    assert part.rate_scale == pytest.approx(KEPT)
    assert Path(part.traces["m"]).read_text() == f"{HEADER}{PROBE_SCALE * 0.3 / KEPT:g},1,1\n"
    (elsewhere / "servegen_sample.py").unlink()  # what is there is not drawn again
    assert window.files(elsewhere / "cache", ("m",), 0.3) == part


def test_a_tool_that_fails_leaves_nothing_behind(elsewhere: Path) -> None:
    """Half a trace would be taken for a whole one by the next run."""
    (elsewhere / "servegen").mkdir()
    for pool in ("m-large", "m-mid", "m-small"):
        (elsewhere / "servegen" / f"{pool}_rates.csv.gz").touch()
    (elsewhere / "servegen_sample.py").write_text(SAMPLER)
    three = WORKLOADS["three-models"]
    with pytest.raises(Unavailable, match=r"no pandas.*OSERVE_TOOLS_PYTHON"):
        three.files(elsewhere / "cache", three.models, 1.0)
    assert all("m-large" in path.name for path in (elsewhere / "cache").iterdir())


def test_a_sweep_is_made_once(elsewhere: Path) -> None:
    """Each load would be another workload, and each start take minutes."""
    rows = [(3000, 20), (200, 300), (2000, 350), (150, 10)]
    lines = [f"{i}.0,{into},{out}\n" for i, (into, out) in enumerate(rows)]
    (elsewhere / "azure2023_code_conv.csv.gz").write_bytes(
        gzip.compress((HEADER + "".join(lines)).encode())
    )
    made = WORKLOADS["S5"].files(elsewhere / "cache", ("m",), None)
    at_s = Path(made.traces["m"]).stat().st_mtime_ns
    again = WORKLOADS["S5"].files(elsewhere / "cache", ("m",), 0.25)
    assert again.traces == made.traces
    assert again.rate_scale == 0.25
    assert Path(again.traces["m"]).stat().st_mtime_ns == at_s
