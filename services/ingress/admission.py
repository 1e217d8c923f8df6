"""From an HTTP request to journeys: who asks, what for, and whether it can be served at all."""

import secrets
import zlib
from array import array

from services.ingress.config import IngressConfig
from services.ingress.journey import Journey
from services.ingress.keys import Identity, KeyRing
from services.ingress.models import ServedModels
from services.ingress.openai_api import ParsedRequest
from services.ingress.openai_errors import invalid_request
from services.ingress.tokenise import Tokenise, output_tokens_allowed
from shared.messages.requests import SamplingParams
from shared.slo import SLO_CLASSES, SloClass

PREFIX_BLOCK_TOKENS = 256
PREFIX_BLOCKS_MAX = 16


class Admission:
    def __init__(self, config: IngressConfig, *, keys: KeyRing, models: ServedModels) -> None:
        self._config, self._keys = config, keys
        self.models = models
        self._tokenise = Tokenise()

    def authenticate(self, authorization: str | None, wanted_class: str | None) -> Identity:
        """Raises ApiError 401, or 400 for a class that the key does not allow."""
        identity = self._keys.authenticate(authorization)
        if self._keys.open:
            identity.slo_class = self._config.default_slo_class
        if wanted_class is None:
            return identity
        if wanted_class not in SLO_CLASSES:
            raise invalid_request(
                f"x-oserve-slo-class: {wanted_class[:40]!r} is none of {', '.join(SLO_CLASSES)}.",
                param="x-oserve-slo-class",
            )
        if not self._keys.open and _urgency(wanted_class) > _urgency(identity.slo_class):
            raise invalid_request(
                f"x-oserve-slo-class: this key allows at most {identity.slo_class}.",
                param="x-oserve-slo-class",
            )
        return Identity(
            key_id=identity.key_id,
            tenant=identity.tenant,
            slo_class=wanted_class,
            requests=identity.requests,
            tokens=identity.tokens,
        )

    async def journeys(
        self, parsed: ParsedRequest, identity: Identity, *, request_id: str, now_s: float
    ) -> tuple[list[Journey], int]:
        """One journey per choice, and the prompt tokens counted once per prompt. Raises ApiError:
        404, 400, 413, 429, 503."""
        model = self.models.named(parsed.model)
        prompts = await self._tokenise.prompts(parsed, model.tokenizer)
        allowed = [
            output_tokens_allowed(
                parsed,
                prompt_tokens=len(prompt),
                context_tokens_max=model.spec.context_tokens_max,
            )
            for prompt in prompts
        ]
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        identity.admit(tokens=prompt_tokens + sum(allowed) * parsed.n, now_s=now_s)
        seed = parsed.seed if parsed.seed is not None else secrets.randbits(48)
        journeys: list[Journey] = []
        for prompt, output_tokens_max in zip(prompts, allowed, strict=True):
            hashes = prefix_hashes(prompt)
            for _ in range(parsed.n):
                index = len(journeys)
                journey = Journey(
                    request_id=f"{request_id}-{index}" if parsed.num_choices > 1 else request_id,
                    model_id=parsed.model,
                    prompt_tokens=prompt,
                    sampling=_sampling(parsed, output_tokens_max, seed + index),
                    slo_class=identity.slo_class,
                    tenant=identity.tenant,
                    arrived_s=now_s,
                    deadline_s=now_s + self._config.request_s,
                    prefix_hashes=hashes,
                )
                journeys.append(journey)
        return journeys, prompt_tokens

    def close(self) -> None:
        self._tokenise.close()


def prefix_hashes(tokens: list[int]) -> tuple[int, ...]:
    """A hash for each whole leading block, each covering all before it: equal hashes mean equal
    prefixes (but for collisions, which cost a cache hit and nothing else)."""
    blocks = min(len(tokens) // PREFIX_BLOCK_TOKENS, PREFIX_BLOCKS_MAX)
    hashes: list[int] = []
    value = 0
    for block in range(blocks):
        start = block * PREFIX_BLOCK_TOKENS
        data = array("q", tokens[start : start + PREFIX_BLOCK_TOKENS]).tobytes()
        value = zlib.crc32(data, value)
        hashes.append(value)
    return tuple(hashes)


def _sampling(parsed: ParsedRequest, output_tokens_max: int, seed: int) -> SamplingParams:
    return SamplingParams(
        output_tokens_max=output_tokens_max,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        top_k=parsed.top_k,
        seed=seed & 0x7FFF_FFFF_FFFF_FFFF,
        stop=parsed.stop,
        ignore_eos=parsed.ignore_eos,
        logprobs=parsed.logprobs,
    )


def _urgency(slo_class: SloClass) -> int:
    return -SLO_CLASSES.index(slo_class)
