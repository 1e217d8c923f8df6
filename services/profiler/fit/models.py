"""Dimensions of the models whose profiles are shipped, from their public config.json files."""

from shared.cost.profile import ModelFacts

LLAMA_8B = ModelFacts(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256
)  # meta-llama/Llama-3.1-8B
LLAMA_70B = ModelFacts(
    layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=128256
)  # meta-llama/Llama-3.1-70B
LLAMA_2_70B = ModelFacts(
    layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=32000
)  # meta-llama/Llama-2-70b-hf
LLAMA_30B = ModelFacts(
    layers=60, hidden=6656, heads=52, kv_heads=52, head_dim=128, ffn=17920, vocab=32000
)  # huggyllama/llama-30b
QWEN_32B = ModelFacts(
    layers=64, hidden=5120, heads=40, kv_heads=8, head_dim=128, ffn=27648, vocab=152064
)  # Qwen/Qwen2.5-32B
# facebook/opt: head and embedding are tied, 2,048 learned positions and 2 that are never used.
OPT_13B = ModelFacts(
    layers=40, hidden=5120, heads=40, kv_heads=40, head_dim=128, ffn=20480, vocab=50272,
    gated=False, tied=True, positions=2050,
)  # fmt: skip
OPT_30B = ModelFacts(
    layers=48, hidden=7168, heads=56, kv_heads=56, head_dim=128, ffn=28672, vocab=50272,
    gated=False, tied=True, positions=2050,
)  # fmt: skip
OPT_66B = ModelFacts(
    layers=64, hidden=9216, heads=72, kv_heads=72, head_dim=128, ffn=36864, vocab=50272,
    gated=False, tied=True, positions=2050,
)  # fmt: skip
OPT_175B = ModelFacts(
    layers=96, hidden=12288, heads=96, kv_heads=96, head_dim=128, ffn=49152, vocab=50272,
    gated=False, tied=True, positions=2050,
)  # fmt: skip

SHIPPED: dict[str, ModelFacts] = {
    "llama-2-70b": LLAMA_2_70B,
    "llama-3.1-70b": LLAMA_70B,
    "llama-3.1-8b": LLAMA_8B,
    "llama-30b": LLAMA_30B,
    "opt-30b": OPT_30B,
    "opt-66b": OPT_66B,
    "qwen2.5-32b": QWEN_32B,
}
SHIPPED_FP8 = ("llama-2-70b", "llama-3.1-70b", "llama-3.1-8b")
"""Also with 8-bit weights, as ``<name>-fp8``, on GPUs that compute in fp8; the KV cache stays in 16
bits, as vLLM leaves it unless told otherwise."""
