"""Profile files and the library of them: what can be wrong with a file, and how it is told."""

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from shared.cost.files import (
    ProfileInvalid,
    dump_gpu,
    dump_profile,
    read_gpu,
    read_profile,
    write_gpu,
    write_profile,
)
from shared.cost.library import SHIPPED, gpu_facts, known, known_gpus, load_profile
from shared.cost.model import cost_model
from shared.cost.topology import check_profiles
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings, NodeSpec
from shared.models import ModelSpec
from tests.support.costs import small_gpu, small_profile


@pytest.fixture
def library(tmp_path: Path) -> Path:
    write_profile(tmp_path / "toy" / "small.toml", small_profile())
    write_gpu(tmp_path / "toy" / "gpu.toml", small_gpu())
    return tmp_path


def test_what_is_written_reads_as_it_was(library: Path) -> None:
    """A fitted profile would predict something else once it is stored."""
    assert read_profile(library / "toy" / "small.toml") == small_profile()
    assert read_gpu(library / "toy" / "gpu.toml") == small_gpu()


def test_equal_profiles_have_equal_text() -> None:
    """Fitting again would change files in which nothing changed: 100 for 100.0."""
    profile = small_profile()
    overheads = msgspec.structs.replace(profile.overheads, step_us=100)
    assert dump_profile(msgspec.structs.replace(profile, overheads=overheads)) == dump_profile(
        profile
    )
    assert "step_us = 100.0" in dump_profile(profile)


def test_text_of_any_kind_survives(tmp_path: Path) -> None:
    """A source with quotes, line breaks or signs would make its profile unreadable."""
    source = 'a "b"\\c\n\t\x01\x7f [x] é \U0001f600'
    facts = msgspec.structs.replace(small_gpu(), source=source)
    write_gpu(tmp_path / "gpu.toml", facts)
    assert read_gpu(tmp_path / "gpu.toml").source == source


def test_long_curves_stay_legible(tmp_path: Path) -> None:
    """A change of one knot would show as a line of a thousand characters."""
    profile = small_profile()
    knots = tuple(range(1, 200))
    curve = tuple(n / 7 for n in knots)
    times = msgspec.structs.replace(
        profile.times[1], tokens=knots, dense_us=curve, collective_us=curve, head_us=curve
    )
    long = msgspec.structs.replace(profile, times=(profile.times[0], times))
    assert max(len(line) for line in dump_profile(long).splitlines()) <= 100
    write_profile(tmp_path / "x.toml", long)
    assert read_profile(tmp_path / "x.toml") == long


Edit = Callable[[str], str]


def swap(old: str, new: str, count: int = 1) -> Edit:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, count)

    return edit


def second(old: str, new: str) -> Edit:
    """Replace the second occurrence: that of tp2."""

    def edit(text: str) -> str:
        head, tail = text.split("[[times]]\ntp = 2", 1)
        return head + "[[times]]\ntp = 2" + swap(old, new)(tail)

    return edit


BAD = {
    "not TOML": (swap("gpu = ", "gpu : "), "TOML", "gpu : "),
    "newer format": (swap("format = 1", "format = 2"), "format", "format ="),
    "older format": (swap("format = 1", "format = 0"), "format", "format ="),
    "wrong type": (swap("layers = 4", 'layers = "4"'), "model_facts.layers", "layers ="),
    "no layers": (swap("layers = 4", "layers = 0"), "model_facts.layers", "layers ="),
    "heads": (swap("kv_heads = 2", "kv_heads = 3"), "model_facts.kv_heads", "kv_heads ="),
    "unknown field": (swap("ffn = 32", "ffn = 32\nfnn = 1"), "model_facts.fnn", "fnn ="),
    "missing field": (swap("ffn = 32\n", ""), "model_facts.ffn", "[model_facts]"),
    "missing table": (swap("[overheads]", "[overhead]"), "overhead", "[overhead]"),
    "upper case": (swap('gpu = "toy"', 'gpu = "Toy"'), "gpu", "gpu ="),
    "unsorted knots": (swap("tokens = [1, 11", "tokens = [11, 1"), "times[0].tokens", "tokens ="),
    "no knots": (swap("tokens = [1, 11, 111]", "tokens = []"), "times[0].tokens", "tokens ="),
    "lengths differ": (
        swap("dense_us = [10.0, ", "dense_us = ["), "times[0].dense_us", "dense_us =",
    ),
    "negative": (second("head_us = [5.0", "head_us = [-5.0"), "times[1].head_us", "head_us = [-"),
    "NaN": (
        second("decode_context_ns = 50.0", "decode_context_ns = nan"),
        "times[1].decode_context_ns", "decode_context_ns = nan",
    ),
    "infinite": (swap("step_us = 100.0", "step_us = inf"), "overheads.step_us", "step_us = inf"),
    "no time": (swap("dense_us = [10.0", "dense_us = [0.0"), "times[0].dense_us", "dense_us ="),
    "tp twice": (swap("tp = 2", "tp = 1"), "times[1].tp", None),
    "text in a curve": (
        swap("dense_us = [10.0", 'dense_us = ["x"'), "times[0].dense_us[0]", "dense_us =",
    ),
    "collective of one": (
        swap("collective_us = [0.0", "collective_us = [1.0"), "times[0].collective_us",
        "collective_us =",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_profile_is_told_by_file_line_and_field(name: str, tmp_path: Path) -> None:
    """Whoever edits a profile would have to search for what is wrong, or simulate nonsense."""
    edit, field, starts = BAD[name]
    text = edit(dump_profile(small_profile()))
    path = tmp_path / "small.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileInvalid) as caught:
        read_profile(path)
    error = caught.value
    assert (error.file, error.field) == (str(path), field)
    assert str(path) in str(error)
    line = text.splitlines()[error.line - 1]
    assert f"line {error.line}" in str(error)
    if starts is not None:
        assert line.startswith(starts)
    else:
        assert error.line > text[: text.rindex("[[times]]")].count("\n")


GPU_BAD = {
    "share": (swap("usable = 0.9", "usable = 1.9"), "usable"),
    "reserve": (swap("reserved_bytes = 4000", "reserved_bytes = 70000"), "reserved_bytes"),
    "node": (swap("gpus_per_node = 4", "gpus_per_node = 0"), "gpus_per_node"),
    "memory": (swap("memory_bytes = 64000", "memory_bytes = 0"), "memory_bytes"),
    "link": (swap("bytes_per_s = 1000000000.0", "bytes_per_s = 0.0"), "peer.bytes_per_s"),
    "latency": (swap("latency_s = 2e-06", "latency_s = -1.0"), "peer.latency_s"),
    "start": (swap("engine_start_s = 10.0", "engine_start_s = nan"), "engine_start_s"),
}


@pytest.mark.parametrize("name", GPU_BAD)
def test_bad_facts_of_a_gpu_are_told(name: str, tmp_path: Path) -> None:
    """Capacities and switch times would be nonsense."""
    edit, field = GPU_BAD[name]
    path = tmp_path / "gpu.toml"
    path.write_text(edit(dump_gpu(small_gpu())), encoding="utf-8")
    with pytest.raises(ProfileInvalid) as caught:
        read_gpu(path)
    assert caught.value.field == field
    assert caught.value.line > 0


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    """A folder, a missing file or a picture would end in a stack."""
    (tmp_path / "image.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge.toml").write_bytes(b"#" * (1 << 21))
    for name, reason in (("none", "No such file"), ("image", "UTF-8"), ("huge", "bytes")):
        with pytest.raises(ProfileInvalid, match=reason) as caught:
            read_profile(tmp_path / f"{name}.toml")
        assert caught.value.line == 0
    with pytest.raises(ProfileInvalid):
        read_profile(tmp_path)


def test_nothing_invalid_is_written(tmp_path: Path) -> None:
    """A bad fit would replace a good file, and be found by whoever reads it next."""
    path = tmp_path / "small.toml"
    write_profile(path, small_profile())
    before = path.read_text(encoding="utf-8")
    bad = msgspec.structs.replace(small_profile(), times=())
    with pytest.raises(ProfileInvalid, match="times"):
        write_profile(path, bad)
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["small.toml"]


def test_profiles_are_found_by_name_in_any_case(library: Path) -> None:
    """`--gpu H100` would be unknown beside h100."""
    assert load_profile("TOY", "Small", [library]) == small_profile()
    assert gpu_facts("Toy", [str(library)]) == small_gpu()
    assert ("toy", "small") in known([library])
    assert ("toy", "gpu") not in known([library])
    assert "toy" in known_gpus([library])


def test_unknown_names_are_answered_with_near_ones(library: Path) -> None:
    """A typing error would cost a search for what there is."""
    with pytest.raises(ConfigInvalid, match=re.escape("did you mean small?")) as caught:
        load_profile("toy", "smal", [library])
    assert caught.value.field == "model"
    with pytest.raises(ConfigInvalid, match="did you mean toy") as caught:
        load_profile("toi", "small", [library])
    assert caught.value.field == "gpu"
    for name in ("", "gpu", "../toy/small"):
        with pytest.raises(ConfigInvalid):
            load_profile("toy", name, [library])
    with pytest.raises(ConfigInvalid, match="no such folder"):
        load_profile("toy", "small", [library / "none"])


def test_a_profile_in_the_wrong_place_is_told(library: Path) -> None:
    """A copied file would pass for another model's measurements."""
    (library / "toy" / "small.toml").rename(library / "toy" / "other.toml")
    with pytest.raises(ProfileInvalid, match='where "other" belongs') as caught:
        load_profile("toy", "other", [library])
    assert (caught.value.field, caught.value.line) == ("model", 3)


def test_one_replica_has_one_cost_model(library: Path) -> None:
    """Each question would build its curves again, and forget what was worked out from them."""
    one = cost_model("toy", "small", Parallelism(tp=2), folders=[library])
    assert cost_model("TOY", "small", Parallelism(tp=2), folders=[str(library)]) is one
    assert one.stages == (4,)
    assert one.kv_tokens == 746
    assert one.start_s == pytest.approx(11.7416)
    assert cost_model("toy", "small", Parallelism(tp=2), nodes=2, folders=[library]) is not one


def test_a_profile_of_ones_own_is_named_with_its_folder(library: Path) -> None:
    """What ``oserve fit`` and ``oserve profile measure`` write could be shown, but not served."""
    name = f"{library}/small"
    assert cost_model("toy", name, Parallelism()) is cost_model(
        "toy", "small", Parallelism(), folders=(library,)
    )
    mesh = MeshConfig(
        model=ModelSpec(model_id="m", profile=name),
        engine=EngineSpec(modelled=ModelledEngineSettings(timing="profile")),
        nodes=(NodeSpec(node_id="n0", gpu_kind="toy"),),
    )
    check_profiles(mesh)


def test_shipped_profiles_are_whole() -> None:
    """A user would be the first to find that a profile cannot be read, or stands in the wrong
    place; or a text edited by hand would change when it is fitted again."""
    for gpu in known_gpus():
        assert dump_gpu(gpu_facts(gpu)) == (SHIPPED / gpu / "gpu.toml").read_text(encoding="utf-8")
    for gpu, model in known():
        path = SHIPPED / gpu / f"{model}.toml"
        assert dump_profile(load_profile(gpu, model)) == path.read_text(encoding="utf-8")
        assert gpu in known_gpus(), f"{gpu} has profiles, but no gpu.toml"
