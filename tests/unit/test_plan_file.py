"""Plan files and demand files: what people write comes back, or is refused with file and line."""

from pathlib import Path

import pytest

from loadgen.planning.demand_file import models_named, read_demand
from loadgen.planning.plan_file import dump_plan, read_plan, write_plan
from services.scheduler.plan_id import make_plan
from shared.errors import ConfigInvalid
from shared.messages.plans import ReplicaSpec

PLAN = """\
# edited by hand
[[replicas]]
id = "big"
model = "llama-2-70b"
shape = "tp2"
gpus = ["n0-g0", "n0-g1"]

[[replicas]]
id = "small"
model = "llama-2-70b"
shape = "tp1"
gpus = ["n0-g2"]

[weights."*"]
big = 0.75
small = 0.25

[weights.0]
small = 1
"""
DEMAND = """\
horizon_s = 900

[[demand]]
type = "chat"
arrivals_rps = 6.0
arrivals_rps_p10 = 4.0
arrivals_rps_p90 = 9.0
input_tokens = 400
output_tokens = 250
classes = { interactive = 0.75, batch = 0.25 }

[[demand]]
model = "other"
type = 3
arrivals_rps = 1
input_tokens = 2000
output_tokens = 20
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "it.toml"


def test_a_plan_is_read_as_the_scheduler_would_write_it(file: Path) -> None:
    """A shape spelled otherwise than in force would restart every replica for nothing."""
    file.write_text(PLAN)
    plan = read_plan(file)
    big, small = plan.replicas
    assert (big.replica_id, big.parallelism, big.gpus) == ("big", "tp2pp1", ("n0-g0", "n0-g1"))
    assert (small.model_id, small.parallelism) == ("llama-2-70b", "tp1pp1")
    assert plan.weights == {"*": {"big": 0.75, "small": 0.25}, "0": {"small": 1.0}}
    assert plan.plan_id == make_plan(plan.replicas, plan.weights, reason="any").plan_id
    assert file.name in plan.reason


def test_a_plan_without_weights_means_equal_shares(file: Path) -> None:
    """Routers take it so; whoever writes replicas only would have to invent weights."""
    file.write_text(PLAN.partition("[weights")[0])
    assert read_plan(file).weights == {}


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("small = 0.25", "small = 0.2", 14, "sum to 0.95, not to 1: write big = 0.8"),
        ("small = 1", "small = 0", 18, "nobody gets requests of this type"),
        ("small = 1", 'small = "all"', 19, "a share from 0 to 1"),
        ("small = 1", "small = true", 19, "a share from 0 to 1"),
        ("small = 1", "small = nan", 19, "a share from 0 to 1"),
        ("small = 1", "tiny = 1", 19, "no such replica under [[replicas]]; there are: big, small"),
        ('["n0-g2"]', '["n0-g1"]', 12, "n0-g1 already belongs to big"),
        ('["n0-g0", "n0-g1"]', '["n0-g0", "n0-g0"]', 6, "n0-g0 already belongs to big"),
        ('["n0-g2"]', "[]", 12, "tp1 needs 1 GPUs, these are 0"),
        ('shape = "tp1"', 'shape = "one"', 11, 'write it as "tp4"'),
        ('id = "small"', 'id = "big"', 9, "its own id"),
        ('id = "small"', 'id = "s.m"', 9, "letters, digits"),
        ('id = "small"', 'name = "small"', 9, "unknown key"),
        ('model = "llama-2-70b"\nshape = "tp1"', 'shape = "tp1"', 8, "required"),
        ('model = "llama-2-70b"\nshape = "tp1"', 'model = ""\nshape = "tp1"', 10, "name the model"),
        ("[weights.0]", "[wieghts.0]", 18, "unknown key"),
    ],
)
def test_a_wrong_plan_is_refused_where_it_is_wrong(
    file: Path, old: str, new: str, line: int, said: str
) -> None:
    """A slip in a file of a thousand lines would be found by the mesh, one failed switch later."""
    assert old in PLAN
    file.write_text(PLAN.replace(old, new))
    with pytest.raises(ConfigInvalid) as caught:
        read_plan(file)
    text = str(caught.value)
    assert said in text
    assert f"{file}, line {line}:" in text, text


@pytest.mark.parametrize(
    ("text", "said"),
    [("[[replicas", "not TOML"), ("", "required"), ("replicas = []", "at least one")],
)
def test_what_is_no_plan_is_refused(file: Path, text: str, said: str) -> None:
    """An empty plan would stop all serving."""
    file.write_text(text)
    with pytest.raises(ConfigInvalid, match=said):
        read_plan(file)


def test_a_missing_file_is_told(file: Path) -> None:
    """A stack trace is no answer to a wrong path."""
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        read_plan(file)
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        read_demand(file, model_id="m")


def test_comments_cannot_break_the_file(file: Path) -> None:
    """A model's name or a path with odd characters would make a file that nobody can read."""
    spec = ReplicaSpec(
        replica_id="r", model_id='org/a "b"\\c', parallelism="tp1pp1", gpus=("n-g0",)
    )
    plan = make_plan([spec], {"*": {"r": 1.0}}, reason="")
    write_plan(plan, file, comments=["one\ntwo\x00three\r", "[[replicas]]"])
    assert read_plan(file).replicas == (spec,)
    assert "# one\n# two three" in file.read_text()


def test_a_long_list_of_gpus_is_wrapped() -> None:
    """Sixteen names on one line are no file to edit."""
    gpus = tuple(f"node-{n // 8}-g{n % 8}" for n in range(16))
    spec = ReplicaSpec(replica_id="r", model_id="m", parallelism="tp8pp2", gpus=gpus)
    text = dump_plan(make_plan([spec], {}, reason=""))
    assert max(map(len, text.splitlines())) <= 100


def test_a_demand_is_read(file: Path) -> None:
    """Everything planned rests on it."""
    file.write_text(DEMAND)
    assert models_named(file) == ("", "other")
    expected = read_demand(file, model_id="m", slo_class="interactive")
    first, second = expected.models
    assert (first.model_id, first.horizon_s, second.model_id) == ("m", 900.0, "other")
    (chat,), (other,) = first.types, second.types
    assert (chat.request_type, chat.arrivals_rps) == (0, 6.0)
    assert (chat.arrivals_rps_p10, chat.arrivals_rps_p90) == (4.0, 9.0)
    assert (chat.input_tokens_mean, chat.output_tokens_mean) == (400.0, 250.0)
    assert chat.class_shares == {"interactive": 0.75, "batch": 0.25}
    assert other.request_type == 3
    assert other.class_shares == {"interactive": 1.0}  # the file says nothing of its class
    assert expected.name("m", "0") == "chat"
    assert expected.name("other", "3") == "3"
    doubled = expected.scaled(2.0)
    assert doubled.arrivals_rps == 14.0
    assert doubled.models[0].types[0].arrivals_rps_p90 == 18.0


def test_numbers_of_a_running_mesh_are_kept_and_names_take_the_free_ones(file: Path) -> None:
    """Weights by number would be adopted for the wrong types."""
    entry = "[[demand]]\ntype = {}\narrivals_rps = 1\ninput_tokens = 9\noutput_tokens = 9\n"
    file.write_text("".join(entry.format(name) for name in ('"a"', "0", '"b"', "2")))
    (model,) = read_demand(file, model_id="m").models
    assert [kind.request_type for kind in model.types] == [1, 0, 3, 2]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("arrivals_rps = 6.0", "arrivals_rps = 0", 5, "leave out what never comes"),
        ("arrivals_rps = 6.0", "arrivals_rps = nan", 5, "requests/s"),
        ("arrivals_rps = 6.0", 'arrivals_rps = "6"', 5, "Expected `float`"),
        ("_p10 = 4.0", "_p10 = 7.0", 6, "use 0 to arrivals_rps, 6"),
        ("_p90 = 9.0", "_p90 = 5.0", 7, "use arrivals_rps, 6, or more"),
        ("input_tokens = 400", "input_tokens = 0", 8, "more than 0 tokens"),
        ("output_tokens = 250", "output_tokens = -1", 9, "use 0 to"),
        ("batch = 0.25", "batch = 0.2", 10, "sum to 0.95"),
        ("batch = 0.25", "gold = 0.25", 10, "none of interactive, standard, batch"),
        ("arrivals_rps = 6.0", "rate = 6.0", 5, "unknown key"),
        ("type = 3", "type = -3", 14, "a number from 0"),
        ("type = 3", "type = ' '", 14, "can be printed"),
        ('model = "other"\ntype = 3', 'type = "chat"', 13, "a name of its own"),
        ("horizon_s = 900", "horizon_s = 0", 1, "more than 0 s"),
    ],
)
def test_a_wrong_demand_is_refused_where_it_is_wrong(
    file: Path, old: str, new: str, line: int, said: str
) -> None:
    """A plan for a demand misread would be bought."""
    assert old in DEMAND
    file.write_text(DEMAND.replace(old, new))
    with pytest.raises(ConfigInvalid) as caught:
        read_demand(file, model_id="m")
    text = str(caught.value)
    assert said in text
    assert f"{file}, line {line}:" in text, text
