"""Reports against numbers worked out by hand."""

from array import array
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from loadgen import results
from loadgen.picture import check_picture, draw
from loadgen.replay import replay, write_outputs
from loadgen.report import About, Report, build_report, spread_ms, type_labels
from loadgen.report_table import milliseconds, report_tables, share
from loadgen.results import RequestResult
from loadgen.timeline import bucket_length_s
from shared.errors import ConfigInvalid
from shared.slo import SloTarget


def done(
    index: int, *, at_s: float, ttft_s: float, gap_s: float, tokens: int, label: str = "chat"
) -> RequestResult:
    """A request whose tokens came one by one, ``gap_s`` apart."""
    times = [at_s + ttft_s + gap_s * place for place in range(tokens)]
    return RequestResult(
        index=index,
        scheduled_s=at_s,
        sent_s=at_s,
        input_tokens=100,
        output_tokens_asked=tokens,
        output_tokens=tokens,
        label=label,
        status=200,
        error_code=results.OK,
        ttft_s=ttft_s,
        e2e_s=ttft_s + gap_s * (tokens - 1),
        chunk_times_s=array("d", times),
        chunk_tokens=array("I", [1] * tokens),
        replica_id="r1",
        overhead_ms=2.0,
    )


def failed(index: int, *, at_s: float, code: str, label: str = "chat") -> RequestResult:
    return RequestResult(
        index=index,
        scheduled_s=at_s,
        sent_s=None if code == results.NOT_SENT else at_s,
        input_tokens=100,
        output_tokens_asked=10,
        label=label,
        error_code=code,
        error_message=f"why {code}",
        e2e_s=None if code == results.NOT_SENT else 0.5,
    )


def sample() -> Report:
    """Four requests in ten seconds: one good, one too slow for its class, two that failed."""
    seen = [
        done(0, at_s=0.0, ttft_s=1.0, gap_s=0.05, tokens=11),
        done(1, at_s=2.0, ttft_s=3.0, gap_s=0.5, tokens=11, label="doc"),
        failed(2, at_s=3.0, code="overloaded"),
        failed(3, at_s=4.0, code=results.NOT_SENT, label="doc"),
    ]
    about = About(command="oserve replay t", trace="t", url="http://u", model="m")
    return build_report(seen, about, in_flight_max=2)


def test_percentiles_by_hand() -> None:
    """p99 in the report would be some other number than in everyone else's tools."""
    spread = spread_ms([0.1, 0.2, 0.3, 0.4, 0.5])
    assert spread is not None
    assert (spread.count, spread.mean, spread.p50) == (5, pytest.approx(300), pytest.approx(300))
    assert spread.p90 == pytest.approx(460)  # 0.6 of the way from the fourth to the fifth
    assert spread.p99 == pytest.approx(496)
    assert spread.max == pytest.approx(500)
    assert spread_ms([]) is None


def test_counts_rates_and_attainment_by_hand() -> None:
    """Goodput would count failures as good, or leave them out of the share."""
    report = sample()
    assert report.duration_s == pytest.approx(10.0)  # the second ends at 2 + 3 + 10 * 0.5
    overall = report.overall
    assert (overall.offered, overall.completed, overall.failed) == (4, 2, 2)
    assert report.throughput_rps == pytest.approx(0.2)
    assert report.output_tokens_per_s == pytest.approx(2.2)
    assert overall.goodput_rps == pytest.approx(0.1)
    assert overall.slo_attainment == pytest.approx(0.25)
    assert report.errors == {"overloaded": 1, results.NOT_SENT: 1}
    assert report.error_examples["overloaded"] == "why overloaded"
    assert report.refused_locally == 1
    assert not report.all_completed


def test_latencies_by_hand() -> None:
    """TTFT, TPOT, ITL and E2E would be mixed up, or count what never completed."""
    overall = sample().overall
    assert overall.ttft_ms is not None
    assert overall.tpot_ms is not None
    assert overall.itl_ms is not None
    assert overall.e2e_ms is not None
    assert (overall.ttft_ms.count, overall.ttft_ms.mean) == (2, pytest.approx(2000))
    assert (overall.tpot_ms.mean, overall.tpot_ms.max) == (pytest.approx(275), pytest.approx(500))
    assert (overall.itl_ms.count, overall.itl_ms.mean) == (20, pytest.approx(275))
    assert (overall.e2e_ms.mean, overall.e2e_ms.max) == (pytest.approx(4750), pytest.approx(8000))


def test_types_are_labels() -> None:
    """A slow type would hide in the average."""
    types = sample().types
    assert list(types) == ["chat", "doc"]
    assert types["chat"].slo_attainment == pytest.approx(0.5)
    assert types["doc"].slo_attainment == 0.0
    assert types["doc"].goodput_rps == 0.0


def test_targets_can_be_overridden() -> None:
    """Someone's own service levels could not be judged."""
    seen = [done(0, at_s=0.0, ttft_s=1.0, gap_s=0.05, tokens=11)]
    strict = build_report(seen, About(), targets={"standard": SloTarget(ttft_s=0.5, tpot_s=1)})
    assert strict.overall.slo_attainment == 0.0
    assert strict.slo_targets["batch"].ttft_s == 60.0


def test_without_labels_types_are_lengths() -> None:
    """A trace without labels would have one type, and its long prompts hide its short ones."""
    seen = [
        RequestResult(index=0, scheduled_s=0, input_tokens=inputs, output_tokens_asked=outputs)
        for inputs, outputs in ((10, 10), (10, 1000), (1000, 10), (1000, 1000))
    ]
    assert type_labels(seen) == [
        "short-in/short-out",
        "short-in/long-out",
        "long-in/short-out",
        "long-in/long-out",
    ]


def test_timeline_adds_up() -> None:
    """The picture would show other requests than the table."""
    report = sample()
    line = report.timeline
    assert line.buckets == len(line.failed) == len(line.output_tokens_per_s)
    assert sum(line.failed) == 2
    for kind, offered in (("chat", 2), ("doc", 2)):
        assert sum(line.offered_rps[kind]) * line.bucket_s == pytest.approx(offered)
        assert sum(line.completed_rps[kind]) * line.bucket_s == pytest.approx(1)
    assert sum(line.output_tokens_per_s) * line.bucket_s == pytest.approx(22)
    assert line.ttft_ms_p50[0] == pytest.approx(1000)
    assert bucket_length_s(120, requests=10_000) == 2.0
    assert bucket_length_s(120, requests=100) == 10.0


def test_an_interrupted_replay_is_not_a_success() -> None:
    """Ctrl-C after the first answer would end with 0, and a pipeline would go on."""
    seen = [done(0, at_s=0.0, ttft_s=1.0, gap_s=0.05, tokens=11)]
    assert build_report(seen, About()).all_completed
    cut = build_report(seen, About(), planned=2)
    assert cut.unsent == 1
    assert not cut.all_completed


def test_nothing_to_report_on() -> None:
    """An empty replay would divide by zero, or count as a success."""
    report = build_report([], About())
    assert report.overall.ttft_ms is None
    assert report.overall.slo_attainment is None
    assert not report.all_completed


def test_json_is_read_back_whole(tmp_path: Path) -> None:
    """A saved report could not be compared with a later one."""
    report = sample()
    (path,) = write_outputs(report, report=tmp_path / "out.json")
    assert msgspec.json.decode(path.read_bytes(), type=Report) == report


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.123, "0.12"), (9.999, "10.0"), (99.96, "100"), (1234.5, "1,234")],
)
def test_milliseconds_claim_no_more_than_is_known(value: float | None, text: str) -> None:
    """A table would print noise as digits, or 0 where nothing was measured."""
    assert milliseconds(value) == text


def test_share_is_whole_only_when_it_is() -> None:
    """One failed request in a million would read as 100 %."""
    assert share(1.0) == "100.0 %"
    assert share(0.99999) == "99.9+ %"
    assert share(None) == "-"


@pytest.mark.parametrize("width", [80, 160])
def test_table_shows_types_and_errors(width: int) -> None:
    """Errors would be in the JSON only, where nobody looks; or a narrow terminal would cut them."""
    shown = Console(width=width)
    with shown.capture() as text:
        shown.print(report_tables(sample()))
    for word in ("chat", "doc", "overloaded", "why overloaded", "25.0 %", "4 offered", "2,000/100"):
        assert word in text.get()
    assert "…" not in text.get()


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture_is_of_the_kind_its_name_says(tmp_path: Path, ending: str) -> None:
    """The picture could not be opened, or an empty replay would crash after an hour's run."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    path = tmp_path / f"p.{ending}"
    draw(sample(), path)
    head = path.read_bytes()[:600]
    assert head.startswith(b"\x89PNG") if ending == "png" else b"<svg" in head
    draw(build_report([], About()), path)
    draw(build_report([failed(0, at_s=0, code="x")], About()), path)


def test_picture_of_another_kind_is_refused_before_the_replay() -> None:
    """An hour's replay would end in a refusal to draw it."""
    with pytest.raises(ConfigInvalid, match=r"\.png or \.svg"):
        check_picture(Path("p.jpg"))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generator", "--url", "http://127.0.0.1:9", "--duration", "5"], 1, "cannot be reached"),
        (["no-such-file.csv"], 1, "no-such-file.csv"),
        (["generator", "--rate-scale", "0"], 2, "rate_scale"),
        (["generator", "--class", "urgent"], 2, "interactive"),
        (["generator", "--target", "interactive=5"], 2, "TTFT and TPOT"),
        (["generator", "--vocabulary", "x"], 2, "32:255"),
        (["generator", "--picture", "x.gif"], 2, ".png or .svg"),
        (["generator", "--report", "no/such/folder/r.json"], 2, "folder"),
    ],
)
def test_command_line_says_what_is_wrong(arguments: list[str], code: int, says: str) -> None:
    """A typing mistake would end in a traceback."""
    app = Typer()
    app.command()(replay)
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == code
    assert says in " ".join(outcome.stderr.split())
