"""The error bar that goes into each profile.

``step_*``: steps put together from rows that were held out, of this model on this GPU, or of all
models on it where its very heads were not measured. ``itl_p90`` adds what engines add: the error of
published ITLs, each model predicted with the overheads calibrated on the other. ``ttft_p90`` adds
the error of prompts measured by Splitwise and DistServe, after one factor for each of their
engines, whose kernels are older. Both sums are of squares: the causes have nothing in common.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec
import numpy as np

from services.profiler.fit.build import Fitted, Tables
from services.profiler.fit.gpus import KINDS
from services.profiler.fit.validation import distserve, engines, held_out, splitwise
from services.profiler.fit.validation.compared import Comparison
from shared.cost.profile import ErrorBar, Profile

DECODE, PROMPT = "decode step", "prompt step"
NO_PROMPTS = "the prompts of no engine, since none were at hand"


def with_error_bars(
    tables: Tables, fitted: Fitted, wanted: Collection[tuple[str, str]]
) -> Iterator[Profile]:
    """The profiles of the ``wanted`` (GPU, model), each with its error bar; all that is ``fitted``
    judges them."""
    itl = _errors(engines.published_crossed(tables, fitted))
    prompts = _prompts(tables, fitted)
    for gpu in sorted({gpu for gpu, _ in wanted}):
        steps = list(held_out.steps(tables, fitted, KINDS[gpu]))
        for key, profile in sorted(fitted.profiles.items()):
            if key[0] == gpu and key in wanted:
                bar = _bar(profile.model, steps, itl, prompts)
                yield msgspec.structs.replace(profile, error=bar)


def _prompts(tables: Tables, fitted: Fitted) -> Sequence[float]:
    """Errors of other engines' prompts, of the GPUs and models that are at hand."""
    if tables.folder is None:
        return ()
    found = [*splitwise.compare(fitted, tables.folder)]
    found += distserve.compare_times(fitted, tables.folder)
    return _errors((one for one in found if one.what.startswith("prompt")), levelled=True)


def _bar(
    model: str, steps: Sequence[Comparison], itl: Sequence[float], prompts: Sequence[float]
) -> ErrorBar:
    own = [one for one in steps if one.model == model]
    judged = own or steps
    every = _errors(judged)
    decode = _quantile(_errors(one for one in judged if one.what == DECODE), 0.9)
    prompt = _quantile(_errors(one for one in judged if one.what == PROMPT), 0.9)
    whose = "of this model" if own else "of other models on this GPU (its heads were not measured)"
    ended = (
        f"{len(prompts)} prompts of Splitwise and DistServe after one factor for each engine"
        if prompts
        else NO_PROMPTS
    )
    return ErrorBar(
        step_median=round(_quantile(every, 0.5), 4),
        step_p90=round(_quantile(every, 0.9), 4),
        ttft_p90=round(float(np.hypot(prompt, _quantile(prompts, 0.9))), 4),
        itl_p90=round(float(np.hypot(decode, _quantile(itl, 0.9))), 4),
        basis=f"step: {len(every)} steps {whose}, from rows held out of the fit; itl: with "
        f"{len(itl)} published ITLs on h100, overheads calibrated on the other model; ttft: with "
        f"{ended}",
    )


def _errors(found: Iterable[Comparison], *, levelled: bool = False) -> Sequence[float]:
    errors: list[float] = []
    for one in found:
        predicted, measured = np.array(one.pairs, dtype=np.float64).T
        ratio = predicted / measured
        factor = float(np.median(1 / ratio)) if levelled else 1.0
        errors += np.abs(ratio * factor - 1).tolist()
    return errors


def _quantile(errors: Sequence[float], share: float) -> float:
    return float(np.quantile(errors, share)) if errors else 0.0
