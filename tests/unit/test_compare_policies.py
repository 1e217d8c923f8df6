"""The registry of policies, the static deployments of a topology, and what options mean."""

from pathlib import Path

import msgspec
import pytest

from loadgen.compare.asked import workload_of
from loadgen.compare.hindsight import best_of
from loadgen.compare.options import (
    Options,
    parse_forecast,
    parse_jobs,
    parse_loads,
    parse_names,
    parse_slo,
    parse_traces,
)
from loadgen.compare.study import expand
from loadgen.compare.workload import history
from loadgen.simulator.demand import Demand, busy
from loadgen.simulator.deployments import (
    Deployment,
    Site,
    candidates,
    default,
    deployment,
    fluid_scale,
    gpus_by_shape,
    own,
    splits,
    uniform,
)
from loadgen.simulator.policies import FORECASTS, POLICIES, policy_named
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from shared.mesh import MeshConfig, NodeSpec, ReplicaWish
from shared.models import ModelSpec
from tests.support.comparisons import metrics_of

TP1, TP4 = Parallelism(1, 1), Parallelism(4, 1)


def site_of(*gpus: int, more_models: tuple[str, ...] = ()) -> Site:
    nodes = tuple(
        NodeSpec(node_id=f"n{i}", gpus=count, gpu_kind="modelled") for i, count in enumerate(gpus)
    )
    more = tuple(ModelSpec(model_id=name) for name in more_models)
    return Site(MeshConfig(model=ModelSpec(model_id="m"), more_models=more, nodes=nodes))


DEMAND = (Demand("m", 5.0, 500.0, 100.0),)


def test_every_named_policy_says_what_is_known_and_what_is_inferred() -> None:
    """A reader could not tell a competitor from our idea of it."""
    for name, policy in POLICIES.items():
        assert policy.name == name
        assert len(policy.known) > 20, name
        assert len(policy.inferred) > 20, name
        for section in (policy.scheduler, policy.router, policy.switcher, policy.profiler):
            section.checked()


@pytest.mark.parametrize("name", ["oserve", "oserve-paper", "dynamo", "uniform-fast"])
def test_a_suffix_chooses_the_forecast(name: str) -> None:
    """Oracle and real forecasts of one policy could not be compared in one table."""
    for forecast in FORECASTS:
        found = policy_named(f"{name}@{forecast}")
        assert (found.name, found.forecast) == (f"{name}@{forecast}", forecast)
        assert found.scheduler == policy_named(name).scheduler


@pytest.mark.parametrize("name", ["oserv", "static-", "static-tp0", "oserve@tomorrow", ""])
def test_an_unknown_name_is_told_the_names(name: str) -> None:
    """A typing mistake would cost a look into the source."""
    with pytest.raises(ConfigInvalid) as error:
        policy_named(name)
    wanted = "@oracle" if "@" in name else "static-<shape>, static, static-best"
    assert wanted in str(error.value)


def test_static_shapes_expand_to_what_fits() -> None:
    """A uniform shape would be missing from the comparison that it might win."""
    names = [policy.name for policy in expand(("static-all", "oserve"), site_of(4))]
    assert names == [
        "static-tp1", "static-tp1pp2", "static-tp1pp4", "static-tp2", "static-tp2pp2",
        "static-tp4", "oserve",
    ]  # fmt: skip
    everything = [policy.name for policy in expand(("all",), site_of(4))]
    assert set(everything) == set(names) | set(POLICIES) - {"static"}  # it names no replicas
    mesh = msgspec.structs.replace(
        site_of(4).mesh, replicas=(ReplicaWish(replica_id="r", parallelism="tp2"),)
    )
    assert "static" in [policy.name for policy in expand(("all",), Site(mesh))]
    assert own(Site(mesh)).name == "1 tp2"


def test_uniform_uses_all_gpus_that_nodes_allow() -> None:
    """A static deployment would lose for GPUs left idle, or span nodes with one TP group."""
    site = site_of(4, 2)
    found = uniform(site, "m", TP1)
    assert (found.name, len(found.replicas)) == ("6 tp1", 6)
    assert uniform(site, "m", TP4).name == "1 tp4"
    assert [w.gpus for w in uniform(site, "m", TP4).replicas] == [
        tuple(f"n0-g{i}" for i in range(4))
    ]
    found.on(site.mesh).checked()
    with pytest.raises(ConfigInvalid, match="tp1, tp1pp2"):
        uniform(site, "m", Parallelism(8, 1))


def test_candidates_are_ranked_by_fluid_load_and_bounded() -> None:
    """Pre-screening would throw the good ones away."""
    site = site_of(4)
    found = candidates(site, DEMAND, most=12)
    assert found[0].name == "4 tp1"  # with settings for times the base is paid by every shape
    assert {option.name for option in found} >= {"4 tp1", "2 tp2", "1 tp4"}
    assert [option.name for option in candidates(site, DEMAND, most=1)] == ["4 tp1"]


def test_splits_give_the_busier_model_more() -> None:
    """With several models the reference would be a poor one, and everyone would beat it."""
    site = site_of(4, 4, more_models=("big",))
    demand = (Demand("m", 1.0, 500.0, 100.0), Demand("big", 6.0, 500.0, 100.0))
    found = splits(site, demand, most=3)
    assert len(found) == 3
    gpus = {"m": 0, "big": 0}
    for wish in found[0].replicas:
        gpus[wish.model_id] += len(wish.gpus)
    assert gpus == {"m": 1, "big": 7}
    for option in found:
        assert {wish.model_id for wish in option.replicas} == {"m", "big"}
        option.on(site.mesh).checked()


def test_a_fluid_bears_twice_as_much_on_twice_the_gpus() -> None:
    """The search for saturation would begin far from it."""
    one, two = (uniform(site_of(gpus), "m", TP1) for gpus in (2, 4))
    scales = [fluid_scale(site_of(4), option, DEMAND) for option in (one, two)]
    assert scales[1] == pytest.approx(2 * scales[0])
    assert fluid_scale(site_of(4), two, ()) == 1.0


def test_default_serves_every_model() -> None:
    """A model with little traffic would get no replica at all."""
    site = site_of(4, more_models=("idle",))
    found = default(site, (Demand("m", 100.0, 500.0, 100.0), Demand("idle", 0.01, 10.0, 1.0)))
    assert {wish.model_id for wish in found.replicas} == {"m", "idle"}
    assert found.name == "1 idle tp1, 3 m tp1"


def test_what_finds_no_room_is_no_deployment() -> None:
    """A plan with fewer replicas than its name says would be simulated."""
    assert deployment(site_of(2, 2), {("m", TP4): 1}) is None


def test_history_knows_kinds_and_not_what_comes_later(tmp_path: Path) -> None:
    """A policy that begins with what it plans for the warm-up would see the future."""
    rows = ["timestamp_s,input_tokens,output_tokens,label"]
    rows += [f"{i}.0,{1000 if i % 2 else 10},{10 if i % 2 else 100},x" for i in range(60)]
    rows += [f"{60 + i}.0,9000,900,x" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    mesh = site_of(4).mesh
    workload = workload_of(
        {"": str(tmp_path / "t.csv")}, mesh, start_s=0.0, duration_s=None, slo_class="standard"
    )
    found = history(workload, 60.0)
    assert [(kind.label, kind.requests) for kind in found] == [
        ("long-in/short-out", 30), ("short-in/long-out", 30),
    ]  # fmt: skip
    assert [(kind.input_tokens, kind.output_tokens) for kind in found] == [(1000, 10), (10, 100)]
    assert history(workload, 0.0) == ()


def test_busy_is_work_per_second() -> None:
    """Twice the requests must look twice the load, and a larger replica less busy."""
    site = site_of(4)
    small, large = site.replica("m", TP1, "modelled"), site.replica("m", TP4, "modelled")
    assert small is not None
    assert large is not None
    once = busy(small, DEMAND)
    assert busy(small, [*DEMAND, *DEMAND]) == pytest.approx(2 * once)
    assert once / 4 < busy(large, DEMAND) < once
    assert busy(small, [Demand("m", 1.0, 1e9, 1.0)]) == float("inf")


def test_hindsight_chooses_by_goodput_and_by_tail() -> None:
    """static-best would not be the best."""
    a, b, c = (Deployment(name, ()) for name in "abc")
    scored = [
        (a, [metrics_of(5.0, e2e_ms_p99=100.0), metrics_of(5.0, e2e_ms_p99=None)]),
        (b, [metrics_of(4.0, e2e_ms_p99=50.0), metrics_of(4.0, e2e_ms_p99=50.0)]),
        (c, [metrics_of(5.0, e2e_ms_p99=900.0), metrics_of(5.0, e2e_ms_p99=900.0)]),
    ]
    found = best_of(scored)
    assert (found["best"].name, found["best-p99"].name) == ("c", "b")


def test_gpus_by_shape_reads_what_plans_are_called() -> None:
    """The picture of shapes over time would be empty."""
    assert gpus_by_shape("2 tp4, 4 tp2pp2, 1 tp1") == {"tp4": 8, "tp2pp2": 16, "tp1": 1}
    assert gpus_by_shape("2 llama-70b tp4, 1 opt tp4") == {"tp4": 12}


def test_loads() -> None:
    """The last load of a range would be lost to rounding."""
    assert parse_loads("0.5:1.1:0.1") == (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
    assert parse_loads("0.9") == (0.9,)
    assert parse_loads("0.5,1") == (0.5, 1.0)


@pytest.mark.parametrize(
    "text", ["", "1:0.5:0.1", "0.5:1", "0.5:1:0", "0:1:0.5", "a", "0.9,0.5", "nan", "0.1:99:0.001"]
)
def test_bad_loads_name_the_field(text: str) -> None:
    """A wrong range would run for hours, or not at all, without a word."""
    with pytest.raises(ConfigInvalid) as error:
        parse_loads(text)
    assert error.value.field == "load"


def test_slo_and_forecast_and_jobs() -> None:
    """Options would be taken for what they are not."""
    assert parse_slo("class") is None
    assert parse_slo("relative:5") == 5.0
    assert parse_forecast("last") == "last"
    assert parse_names(" a, b ,") == ("a", "b")
    for call in (
        lambda: parse_slo("relative:0.5"),
        lambda: parse_slo("strict"),
        lambda: parse_slo("relative:x"),
        lambda: parse_forecast("tomorrow"),
        lambda: parse_jobs(0),
        lambda: parse_names(","),
    ):
        with pytest.raises(ConfigInvalid):
            call()


def test_traces_by_model(tmp_path: Path) -> None:
    """A model would be compared on another's trace."""
    a, odd = tmp_path / "a.csv", tmp_path / "m=b.csv"
    a.touch()
    odd.touch()
    assert parse_traces([str(a)]) == {"": str(a)}
    assert parse_traces([f"m={a}", f"n={odd}"]) == {"m": str(a), "n": str(odd)}
    assert parse_traces([str(odd)]) == {"": str(odd)}
    for bad in ([str(a), str(a)], [f"m={a}", f"m={a}"], [str(tmp_path / "no.csv")], ["m="]):
        with pytest.raises(ConfigInvalid):
            parse_traces(bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seeds", 0),
        ("candidates", 0),
        ("start_s", -1.0),
        ("duration_s", 0.0),
        ("saturation_scale", float("inf")),
        ("policies", ("oserve", "oserve")),
    ],
)
def test_options_are_checked_before_anything_runs(field: str, value: object) -> None:
    """The mistake would show after the first hour."""
    good = Options(
        traces={"": "t"}, policies=("oserve",), loads=(1.0,), seeds=3, reference="oserve"
    )
    assert good.checked() == good
    assert good.warmup_of(100.0) == 10.0
    assert good.warmup_of(86_400.0) == 300.0
    with pytest.raises(ConfigInvalid):
        msgspec.structs.replace(good, **{field: value}).checked()
    with pytest.raises(ConfigInvalid):
        msgspec.structs.replace(good, warmup_s=100.0).warmup_of(100.0)
