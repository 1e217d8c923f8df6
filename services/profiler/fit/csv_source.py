"""Operator tables as CSV files in ``<folder>/aiconfigurator``."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from services.profiler.fit.rows import (
    HEAD_DIM,
    US_PER_MS,
    AttentionRow,
    CollectiveRow,
    GemmRow,
)
from shared.errors import ConfigInvalid

WORDS = (
    "operator times: aiconfigurator (ai-dynamo/aiconfigurator@095f58a51c4c, Apache-2.0), measured "
    "with vLLM 0.24 (A100: 0.14) by its authors"
)
_ATTENTION = (("prefill", "context"), ("decode", "generation"))


class CsvSource:
    """Raises ConfigInvalid that names file, line and column for whatever cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "aiconfigurator"
        if not self._folder.is_dir():
            remedy = "no such folder: --tables takes the folder that holds aiconfigurator/*.csv.gz"
            raise ConfigInvalid(field="--tables", value=str(folder), remedy=remedy)

    @property
    def words(self) -> str:
        return WORDS

    def gemms(self, system: str) -> Iterator[GemmRow]:
        columns = ("gemm_dtype", "m", "n", "k", "latency_ms")
        for dtype, m, n, k, ms in read_table(self._folder / "gemm.csv.gz", columns, gpu=system):
            yield GemmRow(dtype, int(m), int(n), int(k), float(ms) * US_PER_MS)

    def attentions(self, system: str) -> Iterator[AttentionRow]:
        columns = (
            "batch_size", "isl", "step", "num_heads", "num_key_value_heads", "latency_ms",
        )  # fmt: skip
        wanted = {
            "gpu": system, "kv_cache_dtype": "bfloat16", "window_size": "0",
            "head_dim": str(HEAD_DIM),
        }  # fmt: skip
        for phase, name in _ATTENTION:
            path = self._folder / f"{name}_attention_hd{HEAD_DIM}.csv.gz"
            for batch, isl, step, heads, kv_heads, ms in read_table(path, columns, **wanted):
                yield AttentionRow(
                    phase=phase,
                    batch=int(batch),
                    tokens=int(isl) + int(step),
                    heads=int(heads),
                    kv_heads=int(kv_heads),
                    us=float(ms) * US_PER_MS,
                )

    def collectives(self, system: str) -> Iterator[CollectiveRow]:
        columns = ("op_name", "backend", "dtype", "num_gpus", "message_size", "latency_ms")
        path = self._folder / "collectives.csv.gz"
        for kind, library, dtype, gpus, elements, ms in read_table(path, columns, gpu=system):
            row = collective(kind, library, dtype, int(gpus), int(elements), float(ms))
            if row is not None:
                yield row


def collective(
    kind: str, library: str, dtype: str, gpus: int, elements: int, ms: float
) -> CollectiveRow | None:
    """None for rows that no step of ours takes: other collectives, 8-bit ones, eager launches."""
    libraries = {("nccl", "half"): "nccl", ("vllm_graph", "bfloat16"): "vllm"}
    name = libraries.get((library, dtype))
    if name is None or kind not in {"all_reduce", "all_gather"}:
        return None
    return CollectiveRow(kind, name, gpus, elements, ms * US_PER_MS)


def read_table(path: Path, columns: tuple[str, ...], **wanted: str) -> Iterator[list[str]]:
    """``columns`` of the rows whose other columns are as ``wanted``; plain or gzipped CSV."""
    try:
        with _opened(path) as file:
            reader = csv.reader(file)
            empty: list[str] = []
            header = next(reader, empty)
            places = [_place(path, header, name) for name in columns]
            tests = [(_place(path, header, name), value) for name, value in wanted.items()]
            for line in reader:
                if all(line[place] == value for place, value in tests):
                    yield [line[place] for place in places]
    except (OSError, EOFError, csv.Error, UnicodeDecodeError) as error:
        remedy = f"cannot be read: {error}"
        raise ConfigInvalid(field="tables", value=str(path), remedy=remedy) from None
    except IndexError:
        remedy = "a line has fewer columns than the header: the file is cut off"
        raise ConfigInvalid(field="tables", value=str(path), remedy=remedy) from None


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", newline="")
    return path.open(newline="")


def _place(path: Path, header: list[str], name: str) -> int:
    if name not in header:
        remedy = f"has no column {name}, but: {', '.join(header)}"
        raise ConfigInvalid(field="tables", value=str(path), remedy=remedy)
    return header.index(name)
