"""The topology: what fits together, and what an operator is told when it does not."""

from typing import Any

import msgspec
import pytest

from shared.errors import ConfigInvalid
from shared.mesh import MeshConfig

TWO_NODES = [{"node_id": "n0", "gpus": 2}, {"node_id": "n1", "gpus": 1, "gpu_kind": "H200"}]


def _mesh(**settings: Any) -> MeshConfig:
    return msgspec.convert({"nodes": TWO_NODES, **settings}, MeshConfig)


def test_gpus_are_named_after_their_node() -> None:
    """Workers and plans would disagree on who owns which GPU."""
    mesh = _mesh().checked()
    assert [gpu.gpu_id for gpu in mesh.gpus()] == ["n0-g0", "n0-g1", "n1-g0"]
    assert mesh.gpus()[2].kind == "H200"
    assert mesh.node_of("n1-g0") == "n1"


def test_an_unknown_gpu_names_the_topology() -> None:
    """A worker started with a wrong id would report itself on no node."""
    with pytest.raises(ConfigInvalid, match=r"\[\[mesh\.nodes\]\]"):
        _mesh().node_of("n2-g0")


def test_the_default_is_a_mesh_of_nothing() -> None:
    """Services that need no topology could not start without one."""
    assert MeshConfig().checked().gpus() == ()


def test_replicas_that_fit() -> None:
    """A correct topology would be refused."""
    wishes = [
        {"replica_id": "a", "parallelism": "tp2", "gpus": ["n0-g0", "n0-g1"]},
        {"replica_id": "b", "gpus": ["n1-g0"]},
    ]
    assert len(_mesh(replicas=wishes).checked().replicas) == 2


def test_a_wish_names_its_model_or_gets_the_first() -> None:
    """A replica would load another model's weights than the operator meant."""
    mesh = _mesh(
        model={"model_id": "org/a-8b"},
        more_models=[{"model_id": "b", "context_tokens_max": 99}],
        replicas=[_wish(), _wish(replica_id="b0", model_id="b")],
    ).checked()
    assert mesh.model_ids == ("org/a-8b", "b")
    served = [mesh.model_of(wish.model_id) for wish in mesh.replicas]
    assert [model.model_id for model in served] == ["org/a-8b", "b"]
    assert served[1].context_tokens_max == 99
    with pytest.raises(ConfigInvalid, match="org/a-8b, b"):
        mesh.model_of("c")


def _wish(**settings: Any) -> dict[str, Any]:
    return {"replica_id": "a", **settings}


@pytest.mark.parametrize(
    ("settings", "field", "remedy"),
    [
        ({"nodes": [*TWO_NODES, {"node_id": "n0"}]}, "mesh.nodes.node_id", "its own id"),
        ({"nodes": [{"node_id": "n.0"}]}, "mesh.nodes.node_id", "letters, digits"),
        ({"nodes": [{"node_id": "n0", "gpus": 0}]}, "mesh.nodes.n0.gpus", "1 or more"),
        ({"nodes": [{"node_id": "n0", "gpus": -1}]}, "mesh.nodes.n0.gpus", "1 or more"),
        ({"engine": {"kind": "torch"}}, "mesh.model.path", "make-model"),
        (
            {
                "engine": {"kind": "torch"},
                "model": {"model_id": "m", "path": "m"},
                "more_models": [{"model_id": "m2"}],
            },
            "mesh.more_models.m2.path",
            "make-model",
        ),
        ({"model": {"model_id": ""}}, "mesh.model.model_id", "a letter or digit first"),
        ({"model": {"model_id": "m\n"}}, "mesh.model.model_id", "letters, digits"),
        ({"more_models": [{"model_id": "-m"}]}, "mesh.more_models.model_id", "digit first"),
        ({"more_models": [{"model_id": "modelled"}]}, "mesh.more_models.model_id", "its own id"),
        (
            {"model": {"model_id": "m", "context_tokens_max": 1}},
            "mesh.model.context_tokens_max",
            "2 or more",
        ),
        (
            {"more_models": [{"model_id": "m", "context_tokens_max": 0}]},
            "mesh.more_models.m.context_tokens_max",
            "2 or more",
        ),
        (
            {"more_models": [{"model_id": "m"}], "replicas": [_wish(model_id="n")]},
            "mesh.replicas.a.model_id",
            "modelled, m",
        ),
        ({"replicas": [_wish(), _wish()]}, "mesh.replicas.replica_id", "its own id"),
        ({"replicas": [_wish(replica_id="a b")]}, "mesh.replicas.replica_id", "letters"),
        ({"replicas": [_wish(parallelism="4")]}, "parallelism", 'write it as "tp4"'),
        ({"replicas": [_wish(gpus=["n0-g0", "n0-g1"])]}, "mesh.replicas.a.gpus", "needs 1 GPUs"),
        ({"replicas": [_wish(gpus=["n9-g0"])]}, "mesh.replicas.a.gpus", "known GPUs"),
        (
            {"replicas": [_wish(parallelism="tp2", gpus=["n0-g0", "n0-g0"])]},
            "mesh.replicas.a.gpus",
            "already taken by a",
        ),
        (
            {"replicas": [_wish(gpus=["n0-g0"]), _wish(replica_id="b", gpus=["n0-g0"])]},
            "mesh.replicas.b.gpus",
            "already taken by a",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    settings: dict[str, Any], field: str, remedy: str
) -> None:
    """A contradictory topology would start, and fail later in a place far from its cause."""
    with pytest.raises(ConfigInvalid) as caught:
        _mesh(**settings).checked()
    assert caught.value.field == field
    assert remedy in caught.value.remedy
