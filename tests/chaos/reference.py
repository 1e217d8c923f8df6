"""The text that a checkpoint is known to make, and what counts as the same text."""

from pathlib import Path
from typing import cast

from loadgen.client import ClientOptions
from loadgen.results import RequestResult
from loadgen.workload.prompts import PromptSource
from loadgen.workload.records import TraceRecord
from tests.unit.torch_oracle import Oracle, hf

TIE = 1e-4  # logits as near as this may swap with the batch they are computed in


class Reference:
    """The checkpoint in transformers, asked how close a choice of token was."""

    def __init__(self, folder: Path, options: ClientOptions) -> None:
        model = hf.LlamaForCausalLM.from_pretrained(folder).float().eval()
        self._oracle = Oracle(folder, model)
        self._prompts = PromptSource(
            seed=options.seed,
            vocabulary_min=options.vocabulary_min,
            vocabulary_max=options.vocabulary_max,
        )

    def shortfalls(self, record: TraceRecord, tokens: list[int]) -> list[float]:
        """For each token, how far its logit is below the best one, given those before it."""
        prompt = self._prompts.prompt(record, 0)
        logits = self._oracle.logits(prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, logits.new_tensor(tokens).long().unsqueeze(1)).squeeze(1)
        below = logits.max(dim=1).values - chosen
        return cast("list[float]", below.tolist())  # pyright: ignore[reportUnknownMemberType]  # untyped in torch


def assert_same_text(
    reference: Reference, record: TraceRecord, before: RequestResult, after: RequestResult
) -> None:
    """Up to the first tie: beyond it the two are different texts."""
    pairs = zip(before.token_ids, after.token_ids, strict=True)
    at = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    if at is None:
        return
    for result in (before, after):
        shortfall = reference.shortfalls(record, result.token_ids[: at + 1])[at]
        assert shortfall < TIE, f"request {after.index}, position {at}: {shortfall} is no tie"
