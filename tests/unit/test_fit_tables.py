"""Readers of operator tables, and what tables answer between and beyond their rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.profiler.fit import installed_source
from services.profiler.fit.csv_source import CsvSource
from services.profiler.fit.gpus import A100, L40S
from services.profiler.fit.installed_source import InstalledSource
from services.profiler.fit.links import fit_link, measured_links
from services.profiler.fit.rows import AttentionRow, CollectiveRow, GemmRow
from services.profiler.fit.tables import CollectiveTable, GemmTable, measured
from shared.errors import ConfigInvalid
from tests.unit.fit_cases import gemm_us, made_up, write_table

GEMM = ("gpu", "version", "gemm_dtype", "kernel_source", "m", "n", "k", "latency_ms")
ATTENTION = (
    "gpu", "version", "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim",
    "kv_cache_dtype", "step", "window_size", "latency_ms",
)  # fmt: skip
COLLECTIVE = ("gpu", "op_name", "backend", "dtype", "num_gpus", "message_size", "latency_ms")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "aiconfigurator"
    write_table(
        place / "gemm.csv.gz",
        GEMM,
        [
            ("x", "1", "bfloat16", "k", 8, 512, 1024, 0.02),
            ("x", "1", "bfloat16", "k", 33, 512, 1024, 0.09),
            ("y", "1", "bfloat16", "k", 8, 512, 1024, 9.0),
        ],
    )
    common = (32, 8, 128)
    write_table(
        place / "context_attention_hd128.csv.gz",
        ATTENTION,
        [
            ("x", "1", 2, 1024, *common, "bfloat16", 0, 0, 0.5),
            ("x", "1", 2, 1024, *common, "fp8", 0, 0, 9.0),
            ("x", "1", 2, 1024, *common, "bfloat16", 0, 512, 9.0),
        ],
    )
    write_table(
        place / "generation_attention_hd128.csv.gz",
        ATTENTION,
        [("x", "1", 4, 1, *common, "bfloat16", 1023, 0, 0.03)],
    )
    write_table(
        place / "collectives.csv.gz",
        COLLECTIVE,
        [
            ("x", "all_reduce", "nccl", "half", 4, 4096, 0.01),
            ("x", "all_reduce", "nccl", "int8", 4, 8192, 9.0),
            ("x", "all_reduce", "vllm_graph", "bfloat16", 4, 4096, 0.005),
            ("x", "all_reduce", "vllm_eager", "bfloat16", 4, 4096, 9.0),
            ("x", "alltoall", "nccl", "half", 4, 4096, 9.0),
        ],
    )
    return tmp_path


def test_rows_are_read_in_microseconds_and_elements(folder: Path) -> None:
    """Milliseconds taken for microseconds, or bytes for elements, would be a factor of 1,000 or 2
    in every plan; the context of a decode row is its input and the step before."""
    found = measured(CsvSource(folder), "x")
    assert found.gemms == (GemmRow("bfloat16", 8, 512, 1024, 20.0),)  # 33 is one past a tile
    assert found.attentions == (
        AttentionRow("prefill", 2, 1024, 32, 8, 500.0),
        AttentionRow("decode", 4, 1024, 32, 8, 30.0),
    )
    assert found.collectives == (
        CollectiveRow("all_reduce", "nccl", 4, 4096, 10.0),
        CollectiveRow("all_reduce", "vllm", 4, 4096, 5.0),
    )


def test_what_cannot_be_read_names_file_and_column(folder: Path) -> None:
    """A user with other tables would not know which of them to mend."""
    with pytest.raises(ConfigInvalid, match="the folder that holds"):
        CsvSource(folder / "nowhere")
    with pytest.raises(ConfigInvalid, match="no gemm rows"):
        measured(CsvSource(folder), "z")
    path = folder / "aiconfigurator" / "collectives.csv.gz"
    write_table(path, COLLECTIVE[:-1], [])
    with pytest.raises(ConfigInvalid, match=r"collectives\.csv\.gz.*no column latency_ms"):
        measured(CsvSource(folder), "x")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigInvalid, match=r"collectives\.csv\.gz.*cannot be read"):
        measured(CsvSource(folder), "x")
    write_table(path, COLLECTIVE, [("x", "all_reduce")])
    with pytest.raises(ConfigInvalid, match="cut off"):
        measured(CsvSource(folder), "x")


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without tables would be told of a module, not of what to install."""
    monkeypatch.setattr(installed_source, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigInvalid, match=r"oserve\[profile\].*--tables FOLDER"):
        InstalledSource()


class MadeUpParquet:
    """Stands in for ``pyarrow.parquet``: each file's rows by its name and version."""

    def __init__(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        self._rows = rows

    def read_table(self, path: Path) -> "MadeUpParquet":
        return MadeUpParquet({"": self._rows[f"{path.parent.name}/{path.stem}"]})

    def to_pylist(self) -> list[dict[str, Any]]:
        return self._rows[""]


def test_the_package_has_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles would depend on where the tables came from, or on tables of an old version."""
    attention = {
        "batch_size": 2, "num_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "kv_cache_dtype": "bfloat16",
    }  # fmt: skip
    reduce = {"op_name": "all_reduce", "num_gpus": 4, "message_size": 4096}
    decode, prompt = {"isl": 1, "step": 1023, "latency": 0.03}, {"isl": 8, "step": 0, "latency": 1}
    rows: dict[str, list[dict[str, Any]]] = {
        "0.10.0/gemm_perf": [
            {"gemm_dtype": "bfloat16", "m": 8, "n": 512, "k": 1024, "latency": 0.02}
        ],
        "1/context_attention_perf": [
            attention | prompt | {"window_size": 0},
            attention | prompt | {"window_size": 512},
            attention | prompt | {"head_dim": 64},
        ],
        "1/generation_attention_perf": [
            attention | decode,
            attention | decode | {"kv_cache_dtype": "fp8"},
        ],
        "1/nccl_perf": [reduce | {"nccl_dtype": "half", "latency": 0.01}],
        "1/custom_allreduce_perf": [
            reduce | {"allreduce_dtype": "bfloat16", "backend": "vllm_graph", "latency": 0.005}
        ],
    }
    for place in (
        "gemm/vllm/0.9.0/gemm_perf", "gemm/vllm/0.10.0/gemm_perf", "comm/nccl/1/nccl_perf",
        "attention/vllm/1/context_attention_perf", "attention/vllm/1/generation_attention_perf",
        "comm/vllm/1/custom_allreduce_perf",
    ):  # fmt: skip
        path = tmp_path / "systems" / "data" / "x" / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def version(_: str) -> str:
        return "9"

    def parquet(_: str) -> MadeUpParquet:
        return MadeUpParquet(rows)

    monkeypatch.setattr(installed_source, "package_folder", lambda: tmp_path)
    monkeypatch.setattr(installed_source.metadata, "version", version)
    monkeypatch.setattr(installed_source, "import_module", parquet)
    source = InstalledSource()
    found = measured(source, "x")
    assert found.gemms == (GemmRow("bfloat16", 8, 512, 1024, 20.0),)
    assert found.attentions == (
        AttentionRow("prefill", 2, 8, 32, 8, 1000.0),
        AttentionRow("decode", 2, 1024, 32, 8, 30.0),
    )
    assert found.collectives == (
        CollectiveRow("all_reduce", "nccl", 4, 4096, 10.0),
        CollectiveRow("all_reduce", "vllm", 4, 4096, 5.0),
    )
    assert "aiconfigurator-core 9" in source.words
    with pytest.raises(ConfigInvalid, match=r"gemm/vllm/gemm_perf of it.*--tables FOLDER"):
        measured(source, "y")


def test_gemms_between_and_beyond_those_measured() -> None:
    """A model whose matrices were not measured would get the time of another."""
    table = GemmTable(made_up().gemms, "bfloat16")
    for m, n, k in ((4, 64, 64), (40, 300, 700), (20_000, 9000, 128), (64, 4096, 50_000)):
        found = table.us(np.array([float(m)]), n, k)
        assert found[0] == pytest.approx(gemm_us(m, n, k))
    fp8 = GemmTable(made_up().gemms, "fp8").us(np.array([64.0]), 256, 256)
    assert fp8[0] == pytest.approx(gemm_us(64, 256, 256) / 2)
    with pytest.raises(ConfigInvalid, match="precision"):
        GemmTable([], "fp8")


def test_a_matrix_size_that_misses_in_the_grid() -> None:
    """The largest sizes were not all measured together; the others must do."""
    rows = [row for row in made_up().gemms if (row.n, row.k) != (4096, 4096)]
    found = GemmTable(rows, "bfloat16").us(np.array([16.0]), 2000, 4096)
    assert found[0] == pytest.approx(gemm_us(16, 2000, 4096))


def test_all_reduces_change_library_at_eight_mebibytes() -> None:
    """Prompts would be reduced by a kernel that vLLM does not use for them, ten times as fast."""
    table = CollectiveTable(made_up().collectives, nvlink=True)
    limit = 4 << 20  # elements of 2 bytes
    found = table.all_reduce_us(np.array([4096.0, limit, limit + 1024]), 4)
    assert found.tolist() == pytest.approx([0.4096, limit / 1e4, (limit + 1024) / 1e3])


def test_pcie_has_no_custom_all_reduce_beyond_two_gpus() -> None:
    """L40S would look far better at tp4 than it is."""
    table = CollectiveTable(made_up().collectives, nvlink=False)
    elements = np.array([4096.0])
    assert table.all_reduce_us(elements, 2)[0] == pytest.approx(0.4096)
    assert table.all_reduce_us(elements, 4)[0] == pytest.approx(4.096)
    with pytest.raises(ConfigInvalid, match=r"measured between \[2, 4, 8\]"):
        table.all_reduce_us(elements, 3)


def test_one_row_in_five_is_held_out_whatever_the_others() -> None:
    """A row that comes or goes with others would be fitted to once and judge another time."""
    rows = made_up().gemms
    held_out = {(row.m, row.n, row.k) for row in rows if row.held_out}
    assert 0.1 < sum(row.held_out for row in rows) / len(rows) < 0.3
    assert held_out == {(row.m, row.n, row.k) for row in reversed(rows) if row.held_out}
    assert all(not row.held_out for row in made_up().fitted().gemms)


def test_a_link_is_its_latency_and_its_rate(tmp_path: Path) -> None:
    """Copies of KV caches and hops of pipelines would take another time than was measured."""
    sizes = [2e3, 1e6, 1e7, 6e7]
    link = fit_link(sizes, [5e-6 + size / 2e11 for size in sizes])
    assert link.latency_s == pytest.approx(5e-6, abs=1e-8)
    assert link.bytes_per_s == pytest.approx(2e11, rel=1e-3)
    assert measured_links(tmp_path, A100) == (None, None)
    assert measured_links(tmp_path, L40S) == (None, None)
