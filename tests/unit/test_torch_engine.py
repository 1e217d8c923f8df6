"""What the torch engine does beyond the contract of all engines."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from services.worker.engine.interface import EngineRequest  # noqa: E402
from services.worker.engine.torch_engine.make_model import make_model  # noqa: E402
from shared.errors import ConfigInvalid, EngineFailed, Rejected  # noqa: E402
from shared.messages.requests import SamplingParams  # noqa: E402
from shared.text import load_tokenizer  # noqa: E402
from tests.unit.engine_contract import run  # noqa: E402
from tests.unit.torch_oracle import (  # noqa: E402
    copy_folder,
    greedy_request,
    hf,
    load,
    load_file,
    prompt_of,
    save_file,
)

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    return folder


def test_made_model_is_read_by_transformers(folder: Path) -> None:
    """Otherwise the checkpoint would only work with ourselves, and prove nothing."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    text = "Grüße, 世界!\n\t\x00 two  blanks"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == list(text.encode())
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|bos|><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.encode(chat, add_special_tokens=False) == [256, 259, 72, 105, 261, 260]
    assert 1e6 < sum(weight.numel() for weight in model.parameters()) < 2e6
    assert load_tokenizer(str(folder)).eos_ids == {257, 261}


def test_made_model_does_not_repeat_itself_at_once(folder: Path) -> None:
    """Otherwise demos and tests of streaming would show one character over and over."""
    output = run(load(folder), greedy_request("a", list(b"Hello"), 100))["a"]
    assert len(set(output.tokens)) > 20
    assert sum(0x20 <= token < 0x7F for token in output.tokens) > 80


def test_made_model_depends_only_on_its_seed(folder: Path, tmp_path: Path) -> None:
    """Otherwise two nodes that make "the same" model would serve different ones."""
    make_model(tmp_path / "same")
    make_model(tmp_path / "other", seed=1)
    file = "model.safetensors"
    assert (tmp_path / "same" / file).read_bytes() == (folder / file).read_bytes()
    assert (tmp_path / "other" / file).read_bytes() != (folder / file).read_bytes()


def test_make_model_does_not_overwrite_by_accident(tmp_path: Path) -> None:
    """Otherwise a slip in the path could destroy a real checkpoint."""
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigInvalid, match="not empty"):
        make_model(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]
    make_model(tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").exists()
    with pytest.raises(ConfigInvalid, match="tiny, small"):
        make_model(tmp_path / "new", size="huge")
    with pytest.raises(ConfigInvalid, match="not a file"):
        make_model(tmp_path / "precious.txt")


def test_settings_and_making_models_need_no_torch(tmp_path: Path) -> None:
    """Otherwise every process that reads the settings would pay seconds and gigabytes."""
    code = (
        "import sys; from pathlib import Path;"
        "from services.worker.engine.torch_engine.config import TorchEngineConfig;"
        "from services.worker.engine.torch_engine.make_model import make_model;"
        "TorchEngineConfig().validate(); make_model(Path(sys.argv[1]));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_make_model_runs_as_a_program(folder: Path, tmp_path: Path) -> None:
    """Otherwise the command line, which may not import services, could not make a model, or
    would not say why it failed."""
    command = [sys.executable, "-m", "services.worker.engine.torch_engine.make_model"]
    subprocess.run([*command, str(tmp_path / "made"), "--size", "tiny"], check=True)
    file = "model.safetensors"
    assert (tmp_path / "made" / file).read_bytes() == (folder / file).read_bytes()
    again = subprocess.run(
        [*command, str(tmp_path / "made")], check=False, capture_output=True, text=True
    )
    assert again.returncode == 1
    assert "is not empty" in again.stderr.splitlines()[-1]


def test_broken_weights_fail_the_request_by_name(folder: Path, tmp_path: Path) -> None:
    """Otherwise a damaged model would stream nonsense, or take down the whole replica."""
    broken = copy_folder(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors")
    engine = load(broken)
    engine.add(greedy_request("a", [1, 2, 3], 5))
    (chunk,) = engine.step().chunks
    assert (chunk.finish, chunk.tokens) == ("failed", [])
    assert "not finite" in chunk.detail
    engine.check()
    assert not engine.has_work


def test_failing_device_loses_the_replica(folder: Path) -> None:
    """Otherwise a worker would meet an error that it cannot tell from a bug of its own, and its
    requests would hang instead of moving to another replica."""
    engine = load(folder)
    parts = engine._parts  # pyright: ignore[reportPrivateUsage]  # stands for a broken device
    assert parts is not None
    parts.stage.weights.layers[0].down.resize_(1, 1)
    engine.add(greedy_request("a", [1, 2, 3], 5))
    complete = EngineRequest(
        key="complete",
        prompt_tokens=[1],
        output_tokens=[2],
        sampling=SamplingParams(output_tokens_max=1),
    )
    engine.add(complete)
    with pytest.raises(EngineFailed, match="batch of 3 tokens"):
        engine.step()
    assert sorted(engine.drop_all()) == ["a", "complete"]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5},
        {"top_k": -1}, {"stop": ("",)}, {"logprobs": -1}, {"logprobs": 10**6},
        {"output_tokens_max": 0},
    ],
)  # fmt: skip
def test_senseless_sampling_is_refused(folder: Path, sampling: dict[str, object]) -> None:
    """Otherwise one request's bad number would raise in the middle of everyone's batch."""
    engine = load(folder)
    with pytest.raises(Rejected) as refused:
        engine.add(greedy_request("a", [1], 5, **sampling))
    assert refused.value.code == "invalid"
    assert not engine.has_work


def test_live_key_is_refused(folder: Path) -> None:
    """Otherwise two requests would write into one stream."""
    engine = load(folder)
    engine.add(greedy_request("a", [1], 5))
    with pytest.raises(Rejected, match="live already"):
        engine.add(greedy_request("a", [1], 5))


def test_kv_cache_takes_the_memory_it_is_given(folder: Path) -> None:
    """Otherwise the engine would waste memory, or take more than its share of the machine."""
    block_bytes = 4 * 2 * 16 * 4 * 16 * 4  # layers, keys and values, tokens, heads, width, float32
    assert load(folder, kv_memory_bytes=10 * block_bytes + 5).load().kv_blocks_total == 10
    few = load(folder, running_max=2, context_tokens_max=100, kv_memory_bytes=2**30)
    assert few.load().kv_blocks_total == 2 * 7  # no more than can ever be used


def test_mixed_long_and_short_requests_agree_with_each_alone(folder: Path) -> None:
    """Otherwise grouping attention by length would let padding leak into results."""
    requests = [
        greedy_request(f"r{n}", prompt_of(length, seed=n), 6)
        for n, length in enumerate((1, 400, 3, 64, 65, 300, 17, 128))
    ]
    together = run(load(folder, batch_tokens_max=900), *requests)
    one = load(folder)
    for request in requests:
        assert run(one, request)[request.key].tokens == together[request.key].tokens
