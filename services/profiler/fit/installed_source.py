"""The same operator tables out of an installed ``aiconfigurator-core`` (the extra ``profile``)."""

from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from services.profiler.fit.csv_source import collective
from services.profiler.fit.rows import (
    HEAD_DIM,
    US_PER_MS,
    AttentionRow,
    CollectiveRow,
    GemmRow,
)
from shared.errors import ConfigInvalid

PACKAGE = "aiconfigurator_core"
REMEDY = 'pip install "oserve[profile]", or name a folder of tables with --tables FOLDER'
_ATTENTION = (("prefill", "context"), ("decode", "generation"))


class InstalledSource:
    """Raises ConfigInvalid that names the extra if the package, or a table in it, is missing."""

    def __init__(self) -> None:
        self._systems = package_folder() / "systems"
        self._version = metadata.version("aiconfigurator-core")
        try:
            self._parquet: Any = import_module("pyarrow.parquet")
        except ImportError as error:
            raise ConfigInvalid(field="pyarrow", value=str(error), remedy=REMEDY) from None

    @property
    def words(self) -> str:
        return (
            f"operator times: aiconfigurator-core {self._version} (Apache-2.0), measured with vLLM "
            "by its authors"
        )

    def gemms(self, system: str) -> Iterator[GemmRow]:
        for row in self._rows(system, "gemm/vllm", "gemm_perf"):
            yield GemmRow(
                str(row["gemm_dtype"]), row["m"], row["n"], row["k"], row["latency"] * US_PER_MS
            )

    def attentions(self, system: str) -> Iterator[AttentionRow]:
        for phase, name in _ATTENTION:
            for row in self._rows(system, "attention/vllm", f"{name}_attention_perf"):
                plain = row["kv_cache_dtype"] == "bfloat16" and row["head_dim"] == HEAD_DIM
                if plain and not row.get("window_size"):
                    yield AttentionRow(
                        phase=phase,
                        batch=row["batch_size"],
                        tokens=row["isl"] + row["step"],
                        heads=row["num_heads"],
                        kv_heads=row["num_key_value_heads"],
                        us=row["latency"] * US_PER_MS,
                    )

    def collectives(self, system: str) -> Iterator[CollectiveRow]:
        tables = (
            ("comm/nccl", "nccl_perf", "nccl_dtype", None),
            ("comm/vllm", "custom_allreduce_perf", "allreduce_dtype", "backend"),
        )
        for folder, name, dtype, library in tables:
            for row in self._rows(system, folder, name):
                found = collective(
                    row["op_name"],
                    row[library] if library else "nccl",
                    row[dtype],
                    row["num_gpus"],
                    row["message_size"],
                    row["latency"],
                )
                if found is not None:
                    yield found

    def _rows(self, system: str, folder: str, name: str) -> Iterator[dict[str, Any]]:
        """Of the newest version that has the table."""
        found = sorted(
            (self._systems / "data" / system / folder).glob(f"*/{name}.parquet"),
            key=lambda path: _version_key(path.parent.name),
        )
        if not found:
            remedy = f"{PACKAGE} {self._version} has no {folder}/{name} of it; {REMEDY}"
            raise ConfigInvalid(field="system", value=system, remedy=remedy)
        yield from cast("list[dict[str, Any]]", self._parquet.read_table(found[-1]).to_pylist())


def package_folder() -> Path:
    """Raises ConfigInvalid if the package is not installed. It is found, not imported: that would
    load pandas and scipy for nothing."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigInvalid(field=PACKAGE, value="not installed", remedy=REMEDY)
    return Path(spec.origin).parent


def _version_key(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in text.split("."))
