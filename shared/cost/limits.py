"""What a replica's engine may take on, as rates and latencies depend on it."""

import msgspec


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of the batch scheduler; the defaults are vLLM's for online serving. A KV block holds
    ``block_tokens``; a micro-batch computes at most ``batch_tokens_max`` tokens (longer prompts go
    in chunks); at most ``running_max`` requests run, ``waiting_max`` wait, and more are refused."""

    block_tokens: int = 16
    batch_tokens_max: int = 2048
    running_max: int = 256
    waiting_max: int = 1024

    def in_stages(self, stages: int) -> "EngineLimits":
        """Those of a pipeline's whole step, in which each of ``stages`` micro-batches has a token
        budget of its own, as in vLLM."""
        if stages == 1:
            return self
        return msgspec.structs.replace(self, batch_tokens_max=stages * self.batch_tokens_max)


DEFAULT_LIMITS = EngineLimits()
