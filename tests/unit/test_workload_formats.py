"""Trace readers: every format, plain and gzip, and errors that name the place."""

import gzip
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from loadgen.workload import lines
from loadgen.workload.formats import native
from loadgen.workload.readers import open_trace, read_trace
from loadgen.workload.records import TraceInvalid, TraceRecord

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-09 23:59:59.500000+00:00,2162,5
2024-05-10 00:00:00+00:00,2399,6
2024-05-10 02:00:00.250000+02:00,76,15
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,0,1087,API log
"""
BURSTGPT_SESSIONS = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,\
Total tokens,Log Type
7,"12,a",0.4,ChatGPT,10,20,30,API log
"""
MOONCAKE = """{"timestamp":0,"input_length":700,"output_length":5,"hash_ids":[0,1]}
{"timestamp":1500,"input_length":600,"output_length":4,"hash_ids":[0,2]}
"""
OURS = """# a comment
timestamp_s,input_tokens,output_tokens,service,slo_class,client,image_tokens

0,374,44,conv,batch,61,9
4.5,396.0,109,code,,7,
"""


def record(timestamp_s: float, input_tokens: int, output_tokens: int, **more: str) -> TraceRecord:
    return TraceRecord(
        timestamp_s=timestamp_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        **more,  # pyright: ignore[reportArgumentType]  # texts only
    )


EXPECTED: list[tuple[str, str, list[TraceRecord]]] = [
    ("azure", AZURE_2023, [record(0.0, 4808, 10), record(0.052, 3180, 8)]),
    ("azure", AZURE_2024, [record(0.0, 2162, 5), record(0.5, 2399, 6), record(0.75, 76, 15)]),
    (
        "burstgpt",
        BURSTGPT,
        [record(5.0, 472, 18, label="conversation"), record(45.5, 1087, 0, label="api")],
    ),
    ("burstgpt", BURSTGPT_SESSIONS, [record(7.0, 10, 20, label="api", session="12,a")]),
    (
        "mooncake",
        MOONCAKE,
        [
            TraceRecord(timestamp_s=0.0, input_tokens=700, output_tokens=5, hash_ids=(0, 1)),
            TraceRecord(timestamp_s=1.5, input_tokens=600, output_tokens=4, hash_ids=(0, 2)),
        ],
    ),
    (
        "oserve",
        OURS,
        [
            record(0.0, 374, 44, label="conv", slo_class="batch", tenant="61"),
            record(4.5, 396, 109, label="code", tenant="7"),
        ],
    ),
]


def packed(text: str, *, pack: bool) -> bytes:
    return gzip.compress(text.encode()) if pack else text.encode()


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(("name", "text", "expected"), EXPECTED)
def test_format_is_told_by_its_content(
    tmp_path: Path, name: str, text: str, expected: list[TraceRecord], pack: bool
) -> None:
    """A published trace could not be replayed as downloaded, or with shifted times or lengths."""
    path = tmp_path / "trace.misnamed"
    path.write_bytes(packed(text, pack=pack))
    found, records = open_trace(path)
    assert found == name
    seen = list(records)
    assert [round(one.timestamp_s, 9) for one in seen] == [one.timestamp_s for one in expected]
    assert [(r.input_tokens, r.output_tokens, r.label, r.tenant, r.session) for r in seen] == [
        (r.input_tokens, r.output_tokens, r.label, r.tenant, r.session) for r in expected
    ]
    assert [(r.slo_class, r.hash_ids) for r in seen] == [
        (r.slo_class, r.hash_ids) for r in expected
    ]


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    """A trace that passed through a spreadsheet would be refused."""
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + OURS.replace("# a comment\n", "").encode())
    assert len(list(read_trace(path))) == 2
    path.write_bytes(AZURE_2023.replace("\n", "\r\n").encode())
    assert len(list(read_trace(path))) == 2


MALFORMED: list[tuple[str, str, int | None, str | None, str]] = [
    ("token text", OURS + "9,many,3,conv,,1,\n", 6, "input_tokens", "'many'"),
    ("fraction of a token", OURS + "9,1.5,3,conv,,1,\n", 6, "input_tokens", "whole"),
    ("negative tokens", OURS + "9,10,-3,conv,,1,\n", 6, "output_tokens", "between"),
    ("negative time", OURS + "-9,10,3,conv,,1,\n", 6, "timestamp_s", "before"),
    ("endless time", OURS + "inf,10,3,conv,,1,\n", 6, "timestamp_s", "number of seconds"),
    ("cells", OURS + "9,10\n", 6, None, "2 cells"),
    ("class", OURS + "9,10,3,conv,urgent,1,\n", 6, "slo_class", "interactive"),
    ("azure time", AZURE_2023 + "yesterday,1,1\n", 4, "TIMESTAMP", "2023-11-16"),
    ("azure day", AZURE_2023 + "2023-02-31 00:00:00.1,1,1\n", 4, "TIMESTAMP", "day"),
    ("azure order", AZURE_2023 + "2023-11-16 18:17:01.0,1,1\n", 4, "TIMESTAMP", "first row"),
    ("mooncake json", MOONCAKE + '{"timestamp":1,\n', 3, None, "JSON"),
    ("mooncake field", MOONCAKE + '{"timestamp":1,"input_length":2}\n', 3, None, "output_length"),
    (
        "mooncake type",
        MOONCAKE + '{"timestamp":1,"input_length":"x","output_length":1}\n',
        3,
        "input_length",
        "int",
    ),
    (
        "mooncake hash",
        MOONCAKE + '{"timestamp":1,"input_length":2,"output_length":1,"hash_ids":[-1]}\n',
        3,
        "hash_ids",
        "2^63",
    ),
    ("header", "a,b,c\n1,2,3\n", 1, None, "timestamp_s,input_tokens"),
    ("other json", '{"prompt": "x"}\n', 1, None, "input_length"),
    ("empty", "\n\n", None, None, "no requests"),
]


@pytest.mark.parametrize(
    ("text", "line", "column", "says"),
    [case[1:] for case in MALFORMED],
    ids=[case[0] for case in MALFORMED],
)
def test_error_names_line_and_column(
    tmp_path: Path, text: str, line: int | None, column: str | None, says: str
) -> None:
    """Someone with a million-row file would have to search for the bad cell themselves."""
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TraceInvalid) as caught:
        list(read_trace(path))
    assert (caught.value.line, caught.value.column) == (line, column)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_damaged_and_binary_files(tmp_path: Path) -> None:
    """A wrong path or a broken download would end in a Python traceback."""
    path = tmp_path / "t.gz"
    with pytest.raises(TraceInvalid, match="cannot be read"):
        list(read_trace(path))
    path.write_bytes(gzip.compress((OURS + "9,10,3,conv,,1,\n" * 50).encode())[:-12])
    with pytest.raises(TraceInvalid, match="gzip"):
        list(read_trace(path))
    path.write_bytes(b"\x00\xff\xfe\n")
    with pytest.raises(TraceInvalid, match="UTF-8"):
        list(read_trace(path))


def test_endless_line_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without line breaks would be read into memory whole."""
    monkeypatch.setattr(lines, "LINE_BYTES_MAX", 1000)
    path = tmp_path / "t.csv"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(TraceInvalid, match="longer than"):
        list(read_trace(path))


def test_written_text_cells_are_read_back(tmp_path: Path) -> None:
    """A tenant's name with a comma would shift every later column."""
    path = tmp_path / "t.csv.gz"
    records = [record(0.0, 1, 2, label='a,"b"', tenant="c, d")]
    assert native.write(records, path) == 1
    assert list(read_trace(path)) == records


TRACES = Path(__file__).parents[3] / "shared" / "traces"
REAL: list[tuple[str, str, Callable[[TraceRecord], bool]]] = [
    ("azure2023_code_conv.csv.gz", "oserve", lambda r: r.label in ("code", "conv")),
    ("azure2024_weekday_composite.csv.gz", "oserve", lambda r: r.label in ("code", "conv")),
    ("mooncake_conversation.jsonl.gz", "mooncake", lambda r: len(r.hash_ids) > 0),
    ("mooncake_synthetic.jsonl.gz", "mooncake", lambda r: len(r.hash_ids) > 0),
    ("servegen_m-large_days0-10.csv.gz", "oserve", lambda r: r.tenant.isdecimal()),
    ("servegen_m-mid_days0-10.csv.gz", "oserve", lambda r: r.tenant.isdecimal()),
    ("servegen_m-small_days0-10.csv.gz", "oserve", lambda r: r.tenant.isdecimal()),
    ("servegen_mm-image_1day.csv.gz", "oserve", lambda r: r.tenant.isdecimal()),
]


@pytest.mark.parametrize(("name", "form", "holds"), REAL, ids=[case[0] for case in REAL])
def test_real_traces(name: str, form: str, holds: Callable[[TraceRecord], bool]) -> None:
    """The readers would fit our idea of the traces, and not the traces."""
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"no {path}: real traces are not part of this checkout")
    found, records = open_trace(path)
    first = list(islice(records, 500))
    assert found == form
    assert len(first) == 500
    assert all(one.input_tokens > 0 and holds(one) for one in first)
    times = [one.timestamp_s for one in first]
    assert times == sorted(times)
