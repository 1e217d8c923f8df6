"""What fits on a replica's GPUs: weights by stage, then KV cache in what they leave.

Counted are projections, MLP, embeddings and head of a dense decoder as tensor and pipeline
parallelism split them; the fullest GPU of each stage, since it limits the others (heads or columns
that do not divide leave one GPU with one more). Left out are norms and biases, less than 0.1 % of
any model in use, and what the runtime takes, which is ``GpuFacts.reserved_bytes``.
"""

from collections.abc import Sequence

from shared.cost.profile import GpuFacts, ModelFacts, Profile
from shared.cost.stages import stages_of
from shared.hardware import Parallelism

EMBEDDING_BYTES_MIN = 2  # quantised checkpoints keep embeddings and head in 16 bits


def layer_weight_bytes(facts: ModelFacts, tp: int) -> int:
    """One layer on the fullest of ``tp`` GPUs. KV heads are copied where GPUs outnumber them."""
    query = facts.hidden * _share(facts.heads, tp) * facts.head_dim
    key_or_value = facts.hidden * _share(facts.kv_heads, tp) * facts.head_dim
    matrices = 3 if facts.gated else 2
    mlp = matrices * facts.hidden * _share(facts.ffn, tp)
    return (2 * query + 2 * key_or_value + mlp) * facts.weight_bytes


def weight_bytes(
    facts: ModelFacts, shape: Parallelism, stages: Sequence[int] = ()
) -> tuple[int, ...]:
    """Bytes on the fullest GPU of each stage. Embeddings are on the first stage and the head on
    the last, both split by vocabulary; a tied head needs its own copy only on another stage.
    Learned positions are not split."""
    split = stages_of(facts, shape, stages)
    size = max(facts.weight_bytes, EMBEDDING_BYTES_MIN)
    vocabulary = facts.hidden * _share(facts.vocab, shape.tp) * size
    bytes_of = [layers * layer_weight_bytes(facts, shape.tp) for layers in split]
    bytes_of[0] += vocabulary + facts.hidden * facts.positions * size
    if not facts.tied or shape.pp > 1:
        bytes_of[-1] += vocabulary
    return tuple(bytes_of)


def kv_bytes_per_token(facts: ModelFacts, tp: int, layers: int) -> int:
    """Keys and values of one token in ``layers`` layers, on the fullest of ``tp`` GPUs."""
    return 2 * layers * _share(facts.kv_heads, tp) * facts.head_dim * facts.kv_bytes


def kv_capacity_tokens(
    profile: Profile, gpu: GpuFacts, shape: Parallelism, stages: Sequence[int] = ()
) -> int:
    """Tokens whose keys and values a replica of ``shape`` holds; the fullest GPU limits them all.
    0: the weights alone do not fit."""
    facts = profile.model_facts
    split = stages_of(facts, shape, stages)
    budget = int((gpu.memory_bytes - gpu.reserved_bytes) * gpu.usable)
    capacities = (
        (budget - weights) // kv_bytes_per_token(facts, shape.tp, layers)
        for weights, layers in zip(weight_bytes(facts, shape, split), split, strict=True)
    )
    return max(0, min(capacities))


def kv_blocks(
    profile: Profile,
    gpu: GpuFacts,
    shape: Parallelism,
    stages: Sequence[int] = (),
    *,
    block_tokens: int = 16,
) -> int:
    """Whole KV blocks of ``block_tokens`` tokens in the capacity."""
    return kv_capacity_tokens(profile, gpu, shape, stages) // block_tokens


def fits(
    profile: Profile,
    gpu: GpuFacts,
    shape: Parallelism,
    stages: Sequence[int] = (),
    *,
    tokens_min: int = 1,
) -> bool:
    """Whether weights and the KV cache of ``tokens_min`` tokens have room, and the model has
    layers enough for the stages and heads enough for the ranks."""
    facts = profile.model_facts
    if shape.pp > facts.layers or shape.tp > facts.heads:
        return False
    return kv_capacity_tokens(profile, gpu, shape, stages) >= tokens_min


def _share(count: int, tp: int) -> int:
    """Of ``count`` heads, columns or rows, what the fullest of ``tp`` GPUs holds."""
    return -(-count // tp)
