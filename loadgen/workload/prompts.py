"""Prompts for records that only say how long they were.

A prompt is made of spans. A span of key k is 8 tokens that spell a 64-bit mix of (seed, k), then a
slice of one random pool at an offset taken from the same mix. Spans of different keys differ in
their first tokens, so no two prompts share a beginning unless the trace says so; slicing costs
about a microsecond where drawing each token would cost a benchmark its core.
"""

import random

from loadgen.workload.records import TraceRecord
from shared.errors import ConfigInvalid

_POOL_TOKENS = 65_536
_HEAD_TOKENS = 8
_MASK = (1 << 64) - 1
_VOCABULARY_SPAN_MIN = 16  # eight tokens of 16 values still tell 4 billion spans apart


class PromptSource:
    """Token ids in [vocabulary_min, vocabulary_max], decided by the seed and the index alone."""

    def __init__(self, *, seed: int, vocabulary_min: int, vocabulary_max: int) -> None:
        if vocabulary_min < 0 or vocabulary_max - vocabulary_min + 1 < _VOCABULARY_SPAN_MIN:
            raise ConfigInvalid(
                field="vocabulary",
                value=(vocabulary_min, vocabulary_max),
                remedy=f"give a range of at least {_VOCABULARY_SPAN_MIN} token ids, from 0 up",
            )
        self._first = vocabulary_min
        self._size = vocabulary_max - vocabulary_min + 1
        draws = random.Random(f"pool/{seed}")
        pool = draws.choices(range(vocabulary_min, vocabulary_max + 1), k=_POOL_TOKENS)
        self._pool = pool + pool  # any slice up to the pool's length is one copy
        self._seed = _mixed(seed & _MASK)

    def prompt(self, record: TraceRecord, index: int) -> list[int]:
        """``record.input_tokens`` ids; ``index`` is the record's place in the replay."""
        wanted = record.input_tokens
        block_tokens = record.hash_block_tokens
        tokens: list[int] = []
        for hash_id in record.hash_ids:
            left = wanted - len(tokens)
            if left <= 0:
                break
            tokens += self._span(2 * hash_id + 1, block_tokens)[:left]
        if len(tokens) < wanted:
            tokens += self._span(2 * index, wanted - len(tokens))
        return tokens

    def _span(self, key: int, length: int) -> list[int]:
        mixed = _mixed(self._seed ^ (key & _MASK))
        span: list[int] = []
        digits = mixed
        for _ in range(min(_HEAD_TOKENS, length)):
            digits, digit = divmod(digits, self._size)
            span.append(self._first + digit)
        offset = _mixed(mixed) % _POOL_TOKENS
        while len(span) < length:
            span += self._pool[offset : offset + min(_POOL_TOKENS, length - len(span))]
        return span


def _mixed(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection of 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
