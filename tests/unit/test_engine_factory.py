"""Several models in one topology: each replica gets the engine of its own."""

from pathlib import Path

import pytest

from services.worker.engine.factory import Building, EngineFactory, engine_factory
from services.worker.engine.interface import EngineRequest
from services.worker.engine.torch_engine.make_model import make_model
from services.worker.events import EngineStart
from shared.errors import ConfigInvalid, Rejected
from shared.mesh import EngineSpec, MeshConfig, ModelledEngineSettings
from shared.messages.plans import ReplicaSpec
from shared.messages.requests import SamplingParams
from shared.models import ModelSpec
from tests.checkpoints import byte_level, write_folder

PROMPT = list(range(5, 25))


def _tokens(factory: EngineFactory, model_id: str, *, output_tokens_max: int = 8) -> list[int]:
    """What a replica of ``model_id`` answers to PROMPT, at temperature 0."""
    spec = ReplicaSpec(replica_id="r", model_id=model_id, parallelism="tp1pp1", gpus=("g",))
    engine = factory.build(EngineStart(spec, 1), Building())
    sampling = SamplingParams(
        output_tokens_max=output_tokens_max, temperature=0.0, seed=1, ignore_eos=True
    )
    engine.add(EngineRequest(key="a", prompt_tokens=PROMPT, sampling=sampling, output_tokens=[]))
    tokens: list[int] = []
    while len(tokens) < output_tokens_max:
        for chunk in engine.step().chunks:
            tokens += chunk.tokens
    return tokens


def test_modelled_replicas_keep_to_their_model(tmp_path: Path) -> None:
    """A replica would make up tokens that its model's clients cannot read, or hold its prompts to
    another model's context."""
    path = write_folder(tmp_path, byte_level())
    mesh = MeshConfig(
        model=ModelSpec(model_id="bytes", context_tokens_max=24),
        more_models=(ModelSpec(model_id="words", path=path, context_tokens_max=4096),),
        engine=EngineSpec(modelled=ModelledEngineSettings()),
    )
    factory = engine_factory(mesh)
    letters = set(range(32, 127))  # as a tokenizer of bytes numbers them
    assert letters.issuperset(_tokens(factory, "bytes", output_tokens_max=4))
    with pytest.raises(Rejected):
        _tokens(factory, "bytes", output_tokens_max=400)
    assert not letters.issuperset(_tokens(factory, "words", output_tokens_max=400))


@pytest.mark.torch
def test_torch_replicas_load_their_own_weights(tmp_path: Path) -> None:
    """Requests for one model would be answered by the weights of another."""
    pytest.importorskip("torch", reason="needs the torch extra")
    specs: list[ModelSpec] = []
    for seed, name in enumerate(("m", "n")):
        make_model(tmp_path / name, size="tiny", seed=seed)
        path = str(tmp_path / name)
        specs.append(ModelSpec(model_id=name, path=path, context_tokens_max=64))
    engine = EngineSpec(kind="torch", torch={"kv_memory_bytes": 1 << 22})
    both = engine_factory(MeshConfig(engine=engine, model=specs[0], more_models=(specs[1],)))
    alone = engine_factory(MeshConfig(engine=engine, model=specs[1]))
    assert _tokens(both, "n") == _tokens(alone, "n")
    assert _tokens(both, "m") != _tokens(both, "n")


@pytest.mark.torch
def test_an_error_of_the_second_model_names_it(tmp_path: Path) -> None:
    """An operator would correct the first model's entry, which is right."""
    pytest.importorskip("torch", reason="needs the torch extra")
    make_model(tmp_path / "m", size="tiny")
    path = str(tmp_path / "m")
    mesh = MeshConfig(
        engine=EngineSpec(kind="torch"),
        model=ModelSpec(model_id="m", path=path, context_tokens_max=64),
        more_models=(ModelSpec(model_id="n", path=path, context_tokens_max=1 << 20),),
    )
    with pytest.raises(ConfigInvalid) as caught:
        engine_factory(mesh)
    assert caught.value.field == "mesh.more_models.n.context_tokens_max"
