"""Writes the HTTP request of a record: a streamed completion of its prompt, of a forced length."""

import msgspec

from loadgen.pool import Target
from loadgen.workload.prompts import PromptSource
from loadgen.workload.records import TraceRecord
from shared.slo import SloClass

_SEED_MAX = 2**31 - 1


class ClientOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to talk to the server. The vocabulary defaults to ids that every tokenizer has."""

    url: str
    model: str
    api_key: str = ""
    slo_class: SloClass | None = None  # of records that name none; sent only if given
    seed: int = 0
    temperature: float = 0.0
    timeout_s: float = 600.0
    connect_timeout_s: float = 10.0
    connections_max: int = 8192
    vocabulary_min: int = 32
    vocabulary_max: int = 255
    keep_tokens: bool = False
    chunk_times_max: int = 16_384


class _StreamOptions(msgspec.Struct):
    include_usage: bool = True


class _Completion(msgspec.Struct, omit_defaults=True):
    """Body of POST /v1/completions; ``ignore_eos`` forces the trace's output length."""

    model: str
    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    stream: bool
    stream_options: _StreamOptions
    return_token_ids: bool
    user: str = ""


class RequestWriter:
    """Requests are decided by the seed, the record and its index: two replays send the same."""

    def __init__(self, options: ClientOptions, target: Target) -> None:
        self._options, self._target = options, target
        self._heads: dict[SloClass | None, bytes] = {}
        self._prompts = PromptSource(
            seed=options.seed,
            vocabulary_min=options.vocabulary_min,
            vocabulary_max=options.vocabulary_max,
        )

    def payload(self, record: TraceRecord, index: int) -> bytes:
        """Head and body."""
        options = self._options
        body = msgspec.json.encode(
            _Completion(
                model=options.model,
                prompt=self._prompts.prompt(record, index),
                max_tokens=record.output_tokens,
                temperature=options.temperature,
                seed=(options.seed * 1_000_003 + index) & _SEED_MAX,
                ignore_eos=True,
                stream=True,
                stream_options=_StreamOptions(),
                return_token_ids=True,
                user=record.tenant,
            )
        )
        head = self._head(record.slo_class or options.slo_class)
        return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)

    def _head(self, slo_class: SloClass | None) -> bytes:
        head = self._heads.get(slo_class)
        if head is None:
            headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            if self._options.api_key:
                headers["Authorization"] = f"Bearer {self._options.api_key}"
            if slo_class is not None:
                headers["x-oserve-slo-class"] = slo_class
            head = self._heads[slo_class] = self._target.head("POST", "/v1/completions", headers)
        return head
