"""The accuracy report: its arithmetic, and what it says of the shipped profiles."""

import json
from pathlib import Path

import msgspec
import pytest

from services.profiler.fit import command
from services.profiler.fit.build import Tables, engine_overheads, fit_profile
from services.profiler.fit.csv_source import CsvSource
from services.profiler.fit.gpus import KINDS
from services.profiler.fit.models import SHIPPED
from services.profiler.fit.overheads import predicted_itl_ms
from services.profiler.fit.published import CALIBRATED_ON, ITLS, PublishedItl
from services.profiler.fit.validation.compared import Accuracy, Comparison, accuracy
from services.profiler.fit.validation.report import table
from shared.cost.library import gpu_facts, load_profile

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "profiles"
measured_tables = pytest.mark.skipif(
    not (FOLDER / "aiconfigurator").is_dir(), reason=f"no measured tables in {FOLDER}"
)


@pytest.fixture(scope="module")
def rows() -> list[Accuracy]:
    tables = Tables(CsvSource(FOLDER), FOLDER)
    shipped = command.shipped()
    return [*command.operator_accuracy(tables, shipped), *command.engine_accuracy(tables, shipped)]


def test_errors_by_hand() -> None:
    """Errors 0, 10, 20 and 50 %: their median is 15 %. All twice as long is one factor away, all
    1 longer one constant."""
    pairs = [(1.0, 1.0), (1.1, 1.0), (0.8, 1.0), (1.5, 1.0)]
    found = accuracy(Comparison("s", "w", "g", "m", pairs, "c"))
    assert found.median == pytest.approx(0.15)
    assert found.rows == 4
    assert found.bias == pytest.approx(0.05)
    assert found.level_median is None
    twice = [(x, 2 * x) for x in (1.0, 2.0, 5.0)]
    found = accuracy(Comparison("s", "w", "g", "m", twice, "c", levelled=True))
    assert (found.median, found.level, found.level_p90) == (0.5, 2.0, 0.0)
    found = accuracy(
        Comparison("s", "w", "g", "m", [(x, x + 1) for x in (1.0, 2.0)], "c", levelled=True)
    )
    assert found.offset_p90 == 0
    assert found.level_p90 != 0


def test_nothing_to_compare_is_no_perfect_score() -> None:
    """A source that could not be read would look like the best of all."""
    with pytest.raises(ValueError, match="nothing to compare"):
        accuracy(Comparison("s", "w", "g", "m", [], "c"))


@pytest.mark.parametrize("row", [one for one in ITLS if one.model != CALIBRATED_ON], ids=str)
def test_published_itl_of_the_model_that_overheads_were_not_fitted_to(row: PublishedItl) -> None:
    """Batch 8 to 256 within 15 %: plans at high load would be made of wishes."""
    found = predicted_itl_ms(load_profile(row.gpu, row.model), gpu_facts(row.gpu), row)
    assert found == pytest.approx(row.itl_ms, rel=0.15)


@measured_tables
def test_steps_held_out_are_within_a_tenth(rows: list[Accuracy]) -> None:
    """The form of the model would not fit what GPUs do."""
    steps = [row for row in rows if row.source == "operator tables, held out"]
    assert len(steps) > 40
    for row in steps:
        assert row.median <= 0.10, row
    whole = [row for row in steps if row.what in {"decode step", "prompt step"}]
    assert all(row.p90 <= 0.20 for row in whole)


@measured_tables
def test_published_itl_within_15_percent_either_way(rows: list[Accuracy]) -> None:
    """Calibrated on one model, right for the other, whichever is which."""
    itl = [row for row in rows if row.what == "ITL, were it 400 in, 800 out"]
    assert len(itl) == 3
    assert sum("very rows" in row.calibrated for row in itl) == 1
    assert all(row.p90 <= 0.15 for row in itl)


@measured_tables
def test_kv_capacities_of_distserve(rows: list[Accuracy]) -> None:
    """Reserved on OPT-13B, right for models of five and thirteen times its size."""
    for name in ("opt-66b", "opt-175b"):
        found = [
            r for r in rows if r.what == "KV capacity at 95% of the memory" and r.model == name
        ]
        assert len(found) == 1
        assert found[0].p90 <= 0.03


@measured_tables
def test_older_engines_differ_by_their_level(rows: list[Accuracy]) -> None:
    """Times would grow otherwise than measured ones, with tokens, batch or GPUs."""
    for source, what, most in (
        ("Splitwise", "prompt time", 0.20),
        ("DistServe", "prompt, engine vllm", 0.15),
        ("DistServe", "decode step, engine vllm", 0.20),
        ("Vidur", "layer without attention", 0.10),
    ):
        found = [row for row in rows if row.source.startswith(source) and row.what == what]
        assert found
        for row in found:
            assert row.level_median is not None
            assert row.level_median <= most, row
    tokens = [row for row in rows if row.what == "token time"]
    assert len(tokens) == 2
    for row in tokens:  # their host takes its time at every step, whatever is in it
        assert row.offset_median is not None
        assert row.offset_median <= 0.20


@measured_tables
def test_every_source_is_in_the_table(rows: list[Accuracy]) -> None:
    """A source left out without a word would be taken for one that agrees."""
    text = table(rows)
    for source in ("Splitwise", "DistServe", "Vidur", "IBM", "LLMServingSim", "SageServe"):
        assert source in text
    assert "calibrated on" in text


@measured_tables
def test_shipped_profiles_are_what_the_fit_makes() -> None:
    """Numbers that nobody can make again."""
    tables = Tables(CsvSource(FOLDER), FOLDER)
    overheads = engine_overheads(tables)
    for name in ("llama-3.1-8b", "opt-66b"):
        made = fit_profile(tables, KINDS["h100"], name, SHIPPED[name], overheads)
        found = load_profile("h100", name)
        assert len(made.times) == len(found.times)
        for one, other in zip(made.times, found.times, strict=True):
            assert msgspec.to_builtins(one) == approximately(other)
        assert msgspec.to_builtins(made.overheads) == approximately(found.overheads)
        assert made.source == found.source


def test_commands_name_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stack trace, or an exit status of 0, for a folder that is none."""
    nowhere = str(tmp_path / "nowhere")
    assert command.run(["validate", "--tables", nowhere]) == command.EXIT_CONFIG
    assert nowhere in capsys.readouterr().err
    assert command.run(["fit", "--model", nowhere]) == command.EXIT_CONFIG
    assert "config.json" in capsys.readouterr().err


def test_an_eight_bit_model_on_a_gpu_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be fitted with the times of 16-bit weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 128256,
        "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["fit", "--model", str(tmp_path), "--gpu", "a100-80"]
    assert command.run(arguments) == command.EXIT_CONFIG
    assert "does not compute in fp8" in capsys.readouterr().err


@measured_tables
def test_a_local_model_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same dimensions would give other times than the shipped profile has."""
    model, out = tmp_path / "Mine", tmp_path / "out"
    model.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    arguments = ["fit", "--model", str(model), "--gpu", "h100", "--out", str(out)]
    assert command.run([*arguments, "--tables", str(FOLDER)]) == 0
    assert "mine.toml" in capsys.readouterr().out
    found = load_profile("h100", "mine", [out])
    wanted = load_profile("h100", "llama-3.1-8b").times
    for one, other in zip(found.times, wanted, strict=True):
        assert msgspec.to_builtins(one) == approximately(other)
    assert found.error.step_p90 > 0
    assert gpu_facts("h100", [out]) == gpu_facts("h100")


def approximately(struct: msgspec.Struct) -> dict[str, object]:
    """Another machine's linear algebra rounds the last digit otherwise."""
    return {
        name: pytest.approx(value, rel=1e-3, abs=0.02)
        for name, value in msgspec.to_builtins(struct).items()
    }
