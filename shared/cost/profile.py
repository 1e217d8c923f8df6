"""What has been measured of one model on one kind of GPU, as the profile files hold it.

``shared/cost/profiles/<gpu>/<model>.toml`` is a ``Profile``, ``<gpu>/gpu.toml`` the ``GpuFacts``
that all models on that GPU share. Times are those of *one layer* on the GPUs of one tensor-parallel
group, so that any split into pipeline stages can be worked out from them.
"""

import msgspec

FORMAT = 1
"""Raised when a field changes its meaning."""


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A way for bytes to go, in one direction; ``latency_s`` is paid once for each copy."""

    bytes_per_s: float
    latency_s: float


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of GPU and the node it sits in. ``reserved_bytes`` is what the runtime, its
    communicators, CUDA graphs and the largest activations take on each GPU; of the rest weights
    and KV cache may use the share ``usable``."""

    gpu: str
    memory_bytes: int
    usable: float
    reserved_bytes: int
    gpus_per_node: int
    price_per_hour: float  # US dollars, on demand
    local: Link  # within one GPU's memory
    peer: Link  # between two GPUs of a node (NVLink, or PCIe where there is none)
    host: Link  # between a GPU and its node's memory
    network: Link  # between GPUs of two nodes
    disk: Link  # from the node's disk to a GPU, per node
    engine_start_s: float  # process, communicators, CUDA graphs: all of a start but the weights
    source: str = ""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dense decoder's dimensions, as its config.json gives them. ``gated``: the MLP has a gate
    beside its up projection. ``tied``: embeddings and head share their weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    weight_bytes: int = 2  # of one weight: 2 bf16, 1 fp8
    kv_bytes: int = 2  # of one element of the KV cache
    positions: int = 0  # learned position embeddings (OPT); 0: none


class TensorTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer on ``tp`` GPUs of one node; all tuples run along ``tokens``, the knots between
    which times are interpolated linearly (and after the last one, extrapolated).

    ``dense_us``: everything whose time depends only on the number of tokens in the step:
    projections, MLP, norms, rotary embedding. ``collective_us``: its all-reduces (0 for tp 1).
    ``head_us``: the language-model head and embedding, once per step on the last stage, by sampled
    tokens. Decode attention of one layer: ``decode_us`` if any request decodes, plus
    ``decode_request_us`` for each, plus ``decode_context_ns`` for each token of context they hold.
    Prefill attention of one layer: ``prefill_chunk_us`` for each chunk of a prompt, plus
    ``prefill_pair_ns`` for each pair of a token and a token it attends to.
    """

    tp: int
    tokens: tuple[int, ...]
    dense_us: tuple[float, ...]
    collective_us: tuple[float, ...]
    head_us: tuple[float, ...]
    decode_us: float
    decode_request_us: float
    decode_context_ns: float
    prefill_chunk_us: float
    prefill_pair_ns: float


class Overheads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine adds to the operators: ``step_us`` for each step (scheduling, launches,
    sampling), ``request_us`` for each request in it, ``chunk_us`` for each prompt chunk in it,
    ``hop_us`` for each hop between pipeline stages beyond the copy itself."""

    step_us: float
    request_us: float
    chunk_us: float = 0.0
    hop_us: float = 0.0


class ErrorBar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far predictions were from measurements they were not fitted to, as relative errors:
    median and 90th percentile of |predicted / measured - 1|. ``basis`` says of what."""

    step_median: float
    step_p90: float
    ttft_p90: float
    itl_p90: float
    basis: str = ""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on one kind of GPU at one precision; ``times`` by ascending ``tp``."""

    format: int
    gpu: str
    model: str
    model_facts: ModelFacts
    times: tuple[TensorTimes, ...]
    overheads: Overheads
    error: ErrorBar
    source: str = ""
