"""What a comparison says: verdicts, findings, tables, page, pictures, JSON."""

from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from loadgen.compare.assemble import NOT_DRAWN, write_outputs
from loadgen.compare.markdown import report_page
from loadgen.compare.outcome import BY_NAME, METRICS, Comparison, versus
from loadgen.compare.pictures import can_draw, draw_all, picture_load
from loadgen.compare.table import comparison_tables
from loadgen.compare.words import number, summary, with_interval
from tests.support.comparisons import comparison_of, metrics_of

NOISE = (-0.1, 0.0, 0.1)


def made_up(*, ours: float, ours_p99: float | None = 900.0) -> Comparison:
    """Ours against 10 requests/s of goodput, at two loads."""
    return comparison_of(
        {
            (policy, load): [metrics_of(goodput + noise, e2e_ms_p99=p99) for noise in NOISE]
            for load in (0.5, 1.0)
            for policy, goodput, p99 in (("static-best", 10.0, 900.0), ("oserve", ours, ours_p99))
        },
        reference="static-best",
    )


def test_a_loss_is_said_plainly_and_first() -> None:
    """The report would hide where its own project loses."""
    found = made_up(ours=9.0)
    assert found.cell("oserve", 0.5).versus[0].verdict == "worse"
    for load, line in zip(("0.5", "1"), found.findings, strict=False):
        assert line.startswith(f"At load {load}, oserve LOSES to static-best: goodput 9.00")
    page = report_page(found, {})
    assert "- **At load 0.5, oserve LOSES to static-best" in page
    console = Console(record=True, width=150, file=StringIO())
    console.print(comparison_tables(found))
    assert "oserve LOSES to static-best" in console.export_text()


def test_a_tail_that_never_ended_is_a_loss() -> None:
    """Requests that never end would drop out of the comparison of tails."""
    found = made_up(ours=10.0, ours_p99=None)
    (pair,) = [p for p in found.cell("oserve", 1.0).versus if p.metric == "e2e_ms_p99"]
    assert pair.verdict == "worse"
    assert "E2E P99 never ended against 900 ms" in found.findings[0]
    assert summary(found.cells)[1] == "At load 0.5, oserve on E2E P99: worse than static-best."
    back = versus(
        BY_NAME["e2e_ms_p99"],
        found.cell("static-best", 1.0).runs,
        found.cell("oserve", 1.0).runs,
    )
    assert back.verdict == "better"


def test_a_win_is_no_loss() -> None:
    """The sentence about losses would be there whatever came out."""
    found = made_up(ours=12.0)
    assert not any("LOSES" in line for line in found.findings)
    assert found.findings[0].startswith("Ours loses nowhere beyond chance")
    assert any("oserve beats static-best: goodput 12.0" in line for line in found.findings)


def test_chance_is_called_chance() -> None:
    """Noise would be sold as a result."""
    runs = {
        ("a", 1.0): [metrics_of(value) for value in (9.0, 10.0, 11.0)],
        ("oserve", 1.0): [metrics_of(value) for value in (11.0, 9.5, 10.0)],
    }
    found = comparison_of(runs, reference="a")
    assert found.cell("oserve", 1.0).versus[0].verdict == "even"
    assert any("cannot be told apart on goodput" in line for line in found.findings)
    alone = comparison_of({key: value[:1] for key, value in runs.items()}, reference="a")
    assert alone.cell("oserve", 1.0).versus[0].verdict == "unknown"
    assert "With one seed" in alone.findings[0]


def test_a_comparison_without_ours_says_so() -> None:
    """Silence would read as "it loses nowhere"."""
    found = comparison_of({("a", 1.0): [metrics_of(1.0)] * 2}, reference="a")
    assert found.findings == ("This project's own policy was not among those compared.",)


def test_gpu_hours_are_better_when_fewer() -> None:
    """A policy that wastes GPUs would be praised for it."""
    cheap = [metrics_of(1.0, gpu_hours=hours) for hours in (2.0, 2.1)]
    dear = [metrics_of(1.0, gpu_hours=hours) for hours in (4.0, 4.1)]
    assert versus(BY_NAME["gpu_hours"], cheap, dear).verdict == "better"
    assert versus(BY_NAME["gpu_hours"], dear, cheap).verdict == "worse"
    assert versus(BY_NAME["switches"], dear, cheap).verdict == "even"


def test_json_round_trip() -> None:
    """What is kept could not be read again, or would mean something else."""
    found = made_up(ours=9.0, ours_p99=None)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found


def test_the_page_holds_definitions_settings_and_both_texts() -> None:
    """A reader could not judge the numbers without asking us."""
    found = made_up(ours=9.0)
    page = report_page(found, {"load.png": "Measures"}, "")
    for needed in (
        "known of oserve", "guess of static-best", "Everything here is simulated", "made up",
        "warm-up", "rate scale 2", "![Measures](load.png)", "m/chat", "abc", "2.02", "4 tp1; 2 tp2",
    ):  # fmt: skip
        assert needed in page
    for metric in METRICS[2:]:
        assert metric.title in page
    assert NOT_DRAWN in report_page(found, {}, NOT_DRAWN)


def test_outputs_are_written(tmp_path: Path) -> None:
    """Hours of simulation would end without a file."""
    found = made_up(ours=9.0)
    written = write_outputs(found, tmp_path / "new" / "folder")
    assert {path.name for path in written} >= {"report.md", "comparison.json"}
    assert all(path.stat().st_size > 500 for path in written)
    kept = (tmp_path / "new" / "folder" / "comparison.json").read_bytes()
    assert msgspec.json.decode(kept, type=Comparison) == found


@pytest.mark.skipif(not can_draw(), reason="needs matplotlib")
def test_pictures(tmp_path: Path) -> None:
    """A policy whose tail never ended would stop the drawing of all the others."""
    found = made_up(ours=9.0, ours_p99=None)
    drawn = draw_all(found, tmp_path)
    assert set(drawn) == {"load.png", "distributions.png", "shapes.png"}
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert picture_load(found) == 1.0


def test_numbers_in_words() -> None:
    """A failure in a million would round to none."""
    assert number(0.999_999, "share") == "99.9+ %"
    assert number(1.0, "share") == "100.0 %"
    assert number(12345.6, "ms") == "12,346"
    assert with_interval(None, "ms") == "-"
