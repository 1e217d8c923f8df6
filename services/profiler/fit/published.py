"""Measurements of whole engines that were published as single figures."""

from dataclasses import dataclass

INPUT_TOKENS, OUTPUT_TOKENS = 400, 800
"""Assumed of the runs below: they had contexts of 800 tokens on average, and how much of it was
prompt is not known. A context that grows from 400 to 1,200 tokens is one way to have 800; the more
of it was prompt, the more of the measured time is that of prompts, and the less overhead."""

OTHER_LENGTHS = ((533, 533), (1, 1600))
"""Two more ways to have 800 tokens on average, for the report: half prompt, and none of it."""

WORDS = "published end-to-end runs of vLLM on H100, median ITL by requests in flight"


@dataclass(frozen=True, slots=True)
class PublishedItl:
    """Median time between tokens with ``batch`` requests in flight."""

    gpu: str
    model: str
    tp: int
    batch: int
    itl_ms: float


ITLS = tuple(
    PublishedItl("h100", model, tp, batch, itl_ms)
    for model, tp, itls in (
        ("llama-3.1-8b", 1, (7.3, 11.5, 16.5, 26.1)),
        ("llama-3.1-70b", 4, (16.6, 22.4, 27.9, 39.8)),
    )
    for batch, itl_ms in zip((8, 64, 128, 256), itls, strict=True)
)
CALIBRATED_ON = "llama-3.1-8b"
"""Overheads are fitted to the rows of this model; those of the other judge them."""
