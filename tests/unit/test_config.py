"""Settings: who wins, where a value came from, and what a wrong one is told."""

from pathlib import Path

import msgspec
import pytest

from shared.bus import BusConfig
from shared.config import load_settings
from shared.errors import ConfigInvalid
from shared.mesh import MeshConfig
from shared.telemetry import TelemetryConfig


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    window_s: float = 1.0
    enabled: bool = False


class Item(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    item_id: str
    inner: Inner = msgspec.field(default_factory=Inner)


class RouterLike(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section with every shape of setting that services use."""

    policy: str = "plan"
    inbox_max: int = 10
    limit: float | None = None
    inner: Inner = msgspec.field(default_factory=Inner)
    items: tuple[Item, ...] = ()
    free: dict[str, str] = msgspec.field(default_factory=dict[str, str])


def _file(folder: Path, text: str) -> str:
    path = folder / "topology.toml"
    path.write_text(text)
    return str(path)


def _section(**environ: str) -> RouterLike:
    return load_settings(file=None, environ=environ).section("router", RouterLike)


def _error(**environ: str) -> ConfigInvalid:
    with pytest.raises(ConfigInvalid) as caught:
        _section(**environ)
    return caught.value


@pytest.mark.parametrize(
    ("sources", "expected", "source"),
    [
        ((), 10, "default"),
        (("file",), 20, "topology.toml"),
        (("file", "env"), 30, "OSERVE_ROUTER__INBOX_MAX"),
        (("file", "env", "set"), 40, "--set"),
        (("file", "set"), 40, "--set"),
        (("env",), 30, "OSERVE_ROUTER__INBOX_MAX"),
    ],
)
def test_precedence(tmp_path: Path, sources: tuple[str, ...], expected: int, source: str) -> None:
    """An operator's --set would lose to the file, or --print-config would blame the wrong one."""
    settings = load_settings(
        file=_file(tmp_path, "[router]\ninbox_max = 20\n") if "file" in sources else None,
        environ={"OSERVE_ROUTER__INBOX_MAX": "30", "PATH": "/bin"} if "env" in sources else {},
        sets=["router.inbox_max=40"] if "set" in sources else [],
    )
    section = settings.section("router", RouterLike)
    assert section.inbox_max == expected
    (line,) = [x for x in settings.show("router", section) if x.startswith("router.inbox_max ")]
    assert line.startswith(f"router.inbox_max = {expected}  # ")
    assert line.endswith(source)


def test_a_later_set_wins() -> None:
    """Of two --set of one key the first would count, against every other command line."""
    settings = load_settings(
        file=None, environ={}, sets=["router.policy=round_robin", "router.policy=least_load"]
    )
    assert settings.section("router", RouterLike).policy == "least_load"


def test_values_from_text_take_the_type_of_the_field() -> None:
    """Numbers, booleans and lists could not be set from the environment."""
    section = _section(
        OSERVE_ROUTER__INNER__WINDOW_S="2.5",
        OSERVE_ROUTER__INNER__ENABLED="true",
        OSERVE_ROUTER__LIMIT="null",
        OSERVE_ROUTER__ITEMS='[{"item_id": "a", "inner": {"window_s": 3}}, {"item_id": "b"}]',
        OSERVE_ROUTER__FREE='{"k": "v"}',
    )
    assert section.inner == Inner(window_s=2.5, enabled=True)
    assert section.limit is None
    assert section.items == (Item(item_id="a", inner=Inner(window_s=3.0)), Item(item_id="b"))
    assert section.free == {"k": "v"}


def test_nested_lists_of_structs_from_toml(tmp_path: Path) -> None:
    """A topology's [[mesh.nodes]] would not become nodes."""
    text = """
[mesh]
name = "laptop"
[[mesh.nodes]]
node_id = "n0"
gpus = 2
[[mesh.replicas]]
replica_id = "r0"
parallelism = "tp2"
gpus = ["n0-g0", "n0-g1"]
[mesh.engine]
kind = "modelled"
modelled = { speedup = 4.0 }
"""
    settings = load_settings(file=_file(tmp_path, text), environ={})
    mesh = settings.section("mesh", MeshConfig).checked()
    assert [gpu.gpu_id for gpu in mesh.gpus()] == ["n0-g0", "n0-g1"]
    assert mesh.replicas[0].gpus == ("n0-g0", "n0-g1")
    assert mesh.engine.modelled.speedup == 4.0


def test_show_covers_every_leaf() -> None:
    """--print-config would leave out a setting, and nobody could tell its value."""

    def paths(kind: msgspec.inspect.Type, path: str) -> set[str]:
        if isinstance(kind, msgspec.inspect.StructType):
            return set[str]().union(*(paths(f.type, f"{path}.{f.name}") for f in kind.fields))
        return {path}

    settings = load_settings(file=None, environ={})
    for name, kind in (
        ("router", RouterLike), ("mesh", MeshConfig), ("bus", BusConfig),
        ("telemetry", TelemetryConfig),
    ):  # fmt: skip
        shown = {
            line.partition(" = ")[0] for line in settings.show(name, settings.section(name, kind))
        }
        assert shown == paths(msgspec.inspect.type_info(kind), name)


def test_show_tells_the_source_of_an_overridden_list(tmp_path: Path) -> None:
    """A list from the environment would be shown as the file's."""
    settings = load_settings(
        file=_file(tmp_path, '[[router.items]]\nitem_id = "from-file"\n'),
        environ={"OSERVE_ROUTER__ITEMS": '[{"item_id": "a"}]'},
    )
    lines = settings.show("router", settings.section("router", RouterLike))
    (line,) = [x for x in lines if x.startswith("router.items ")]
    assert line == (
        'router.items = [{"item_id":"a","inner":{"window_s":1.0,"enabled":false}}]'
        "  # OSERVE_ROUTER__ITEMS"
    )


def test_a_table_set_as_a_whole_replaces_what_lay_under_it(tmp_path: Path) -> None:
    """Keys of the replaced table would show the old source, or live on unseen."""
    settings = load_settings(
        file=_file(tmp_path, "[router.inner]\nwindow_s = 5.0\nenabled = true\n"),
        environ={"OSERVE_ROUTER__INNER": '{"window_s": 7}'},
        sets=["router.inner.enabled=true"],
    )
    section = settings.section("router", RouterLike)
    assert section.inner == Inner(window_s=7.0, enabled=True)
    lines = settings.show("router", section)
    assert "router.inner.window_s = 7.0  # OSERVE_ROUTER__INNER" in lines
    assert "router.inner.enabled = true  # --set" in lines


def test_show_keeps_passwords_to_itself() -> None:
    """--print-config in a bug report would publish the broker's password."""
    settings = load_settings(file=None, environ={"OSERVE_BUS__PASSWORD": "hunter2"})
    config = settings.section("bus", BusConfig)
    assert config.password == "hunter2"
    text = "\n".join(settings.show("bus", config))
    assert "hunter2" not in text
    assert 'bus.password = "***"  # OSERVE_BUS__PASSWORD' in text


def test_unknown_section_names_its_source_and_the_known_ones(tmp_path: Path) -> None:
    """A misspelt [ruoter] would be ignored, and its settings with it."""
    file = _file(tmp_path, "[ruoter]\npolicy = 'plan'\n")
    with pytest.raises(ConfigInvalid) as caught:
        load_settings(file=file, environ={})
    assert caught.value.field == "ruoter"
    assert caught.value.value == {"policy": "plan"}
    assert file in caught.value.remedy
    assert "router" in caught.value.remedy


def test_unknown_environment_section_names_the_variable() -> None:
    """A misspelt OSERVE_ variable would do nothing, silently."""
    error = _error(OSERVE_RUOTER__POLICY="plan")
    assert error.field == "ruoter"
    assert "OSERVE_RUOTER__POLICY" in error.remedy


@pytest.mark.parametrize(
    ("environ", "field", "value", "known"),
    [
        ({"OSERVE_ROUTER__POLCY": "x"}, "router.polcy", "x", "policy, inbox_max"),
        ({"OSERVE_ROUTER__INNER__WINDOW": "1"}, "router.inner.window", "1", "window_s, enabled"),
        (
            {"OSERVE_ROUTER__ITEMS": '[{"item_id":"a"},{"item_id":"b","x":2}]'},
            "router.items[1].x", 2, "item_id, inner",
        ),
    ],
)  # fmt: skip
def test_unknown_key_names_field_value_and_known_keys(
    environ: dict[str, str], field: str, value: object, known: str
) -> None:
    """A misspelt key would be ignored, or the operator would have to search the source."""
    error = _error(**environ)
    assert (error.field, error.value) == (field, value)
    assert f"known keys: {known}" in error.remedy


@pytest.mark.parametrize(
    ("environ", "field", "value"),
    [
        ({"OSERVE_ROUTER__INBOX_MAX": "many"}, "router.inbox_max", "many"),
        ({"OSERVE_ROUTER__INBOX_MAX": "1.5"}, "router.inbox_max", "1.5"),
        ({"OSERVE_ROUTER__INNER__ENABLED": "perhaps"}, "router.inner.enabled", "perhaps"),
        ({"OSERVE_ROUTER__ITEMS": '{"a": 1}'}, "router.items", {"a": 1}),
        ({"OSERVE_ROUTER__INNER": "[1]"}, "router.inner", [1]),
        ({"OSERVE_ROUTER__ITEMS": '[{"item_id": 5}]'}, "router.items[0].item_id", 5),
        ({"OSERVE_ROUTER__FREE": '{"k": 5}'}, "router.free[...]", "?"),
    ],
)
def test_wrong_type_names_field_and_value(
    environ: dict[str, str], field: str, value: object
) -> None:
    """The operator would not learn which of many settings is wrong."""
    error = _error(**environ)
    assert (error.field, error.value) == (field, value)
    assert "Expected" in error.remedy


def test_a_choice_lists_the_choices() -> None:
    """The operator would have to guess the engines there are."""
    settings = load_settings(file=None, environ={"OSERVE_MESH__ENGINE__KIND": "cuda"})
    with pytest.raises(ConfigInvalid, match="one of modelled, torch") as caught:
        settings.section("mesh", MeshConfig)
    assert caught.value.field == "mesh.engine.kind"


def test_missing_required_field_says_so() -> None:
    """A node without a name would be reported as a stack trace."""
    error = _error(OSERVE_ROUTER__ITEMS="[{}]")
    assert error.field == "router.items[0].item_id"
    assert "required" in error.remedy


@pytest.mark.parametrize(
    ("environ", "field"),
    [
        ({"OSERVE_ROUTER": "x"}, "OSERVE_ROUTER"),
        ({"OSERVE_ROUTER__": "x"}, "OSERVE_ROUTER__"),
        ({"OSERVE_ROUTER__ITEMS": "[1"}, "OSERVE_ROUTER__ITEMS"),
        (
            {"OSERVE_ROUTER__POLICY": "p", "OSERVE_ROUTER__POLICY__X": "1"},
            "OSERVE_ROUTER__POLICY__X",
        ),
    ],
)
def test_bad_variable_is_named(environ: dict[str, str], field: str) -> None:
    """A malformed variable would be blamed on --set, or on nothing."""
    assert _error(**environ).field == field


@pytest.mark.parametrize("item", ["router.policy", "policy=plan", "router.items.0.item_id=x"])
def test_bad_set_is_named(tmp_path: Path, item: str) -> None:
    """A malformed --set would be ignored."""
    file = _file(tmp_path, '[[router.items]]\nitem_id = "a"\n')
    with pytest.raises(ConfigInvalid) as caught:
        load_settings(file=file, environ={}, sets=[item])
    assert caught.value.field.startswith("--set")


def test_the_file_variable_itself_is_no_section() -> None:
    """OSERVE_CONFIG, which names the file, would be refused as an unknown section."""
    assert load_settings(file=None, environ={"OSERVE_CONFIG": "x.toml"}).values == {}


@pytest.mark.parametrize(
    ("content", "remedy"),
    [(None, "cannot read it"), (b"[router\n", "not TOML"), (b"\xff\xfe[router]", "not TOML")],
)
def test_unreadable_file(tmp_path: Path, content: bytes | None, remedy: str) -> None:
    """A missing or broken file would end in a stack trace."""
    path = tmp_path / "t.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigInvalid, match=remedy) as caught:
        load_settings(file=str(path), environ={})
    assert (caught.value.field, caught.value.value) == ("settings file", str(path))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """Naming the folder instead of the file would end in a stack trace."""
    with pytest.raises(ConfigInvalid, match="cannot read it"):
        load_settings(file=str(tmp_path), environ={})


def test_a_section_that_is_a_value_is_refused(tmp_path: Path) -> None:
    """``router = 5`` would crash the merge of the environment over it."""
    file = _file(tmp_path, "router = 5\n")
    with pytest.raises(ConfigInvalid, match="not a table"):
        load_settings(file=file, environ={"OSERVE_ROUTER__POLICY": "plan"})
    with pytest.raises(ConfigInvalid, match="Expected `object`"):
        load_settings(file=file, environ={}).section("router", RouterLike)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOG_LEVEL", "LOUD"), ("TRACE_RATIO", "1.5"), ("TRACE_RATIO", "-0.1"),
        ("METRICS_PORT", "70000"),
    ],
)  # fmt: skip
def test_telemetry_bounds(name: str, value: str) -> None:
    """A value out of range would crash the service on start, for ever restarted."""
    settings = load_settings(file=None, environ={f"OSERVE_TELEMETRY__{name}": value})
    with pytest.raises(ConfigInvalid) as caught:
        settings.section("telemetry", TelemetryConfig)
    assert caught.value.field == f"telemetry.{name.lower()}"
