"""What an engine adds to its operators: found from end-to-end runs, since no operator table has it.

The sum of operators is too low, most so in large batches: each step costs the host its scheduling
and launches, each request in it its bookkeeping and sampling. Two numbers, the same for all GPUs
and models, since the host pays for them.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from services.profiler.fit.grid import non_negative
from services.profiler.fit.published import INPUT_TOKENS, OUTPUT_TOKENS, PublishedItl
from shared.cost.estimate import estimate
from shared.cost.model import replica_model
from shared.cost.profile import GpuFacts, Overheads, Profile
from shared.hardware import Parallelism

NONE = Overheads(step_us=0.0, request_us=0.0)
UNIT_US = 1000.0


def calibrate(profile: Profile, gpu: GpuFacts, rows: Sequence[PublishedItl]) -> Overheads:
    """The overheads with which ``profile`` predicts ``rows`` best, by relative least squares. The
    predictor is linear in them, so two probes give their coefficients."""
    columns: list[list[float]] = []
    rest: list[float] = []
    for row in rows:
        base = predicted_itl_ms(_with(profile, NONE), gpu, row)
        step = predicted_itl_ms(
            _with(profile, Overheads(step_us=UNIT_US, request_us=0.0)), gpu, row
        )
        request = predicted_itl_ms(
            _with(profile, Overheads(step_us=0.0, request_us=UNIT_US)), gpu, row
        )
        columns.append([(step - base) / row.itl_ms, (request - base) / row.itl_ms])
        rest.append((row.itl_ms - base) / row.itl_ms)
    found = non_negative(np.array(columns), np.array(rest)).tolist()
    step_us, request_us = (round(value * UNIT_US, 1) for value in found)
    return Overheads(step_us=step_us, request_us=request_us)


def predicted_itl_ms(
    profile: Profile,
    gpu: GpuFacts,
    row: PublishedItl,
    lengths: tuple[int, int] = (INPUT_TOKENS, OUTPUT_TOKENS),
) -> float:
    """By the very predictor that users ask; prompts of requests that follow are mixed in."""
    model = replica_model(profile, gpu, Parallelism(row.tp))
    found = estimate(model, batch=row.batch, input_tokens=lengths[0], output_tokens=lengths[1])
    return found.itl_s * 1e3


def _with(profile: Profile, overheads: Overheads) -> Profile:
    return msgspec.structs.replace(profile, overheads=overheads)
