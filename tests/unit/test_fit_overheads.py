"""Overheads found again from ITLs that were made with them."""

import msgspec
import pytest

from services.profiler.fit.build import shipped_models
from services.profiler.fit.gpus import A100, H100
from services.profiler.fit.overheads import NONE, calibrate, predicted_itl_ms
from services.profiler.fit.published import ITLS, PublishedItl
from shared.cost.library import gpu_facts, load_profile
from shared.cost.profile import Overheads


def test_overheads_are_recovered() -> None:
    """Calibration would put the time of prompts, or of a step, down to the requests."""
    gpu, profile = gpu_facts("h100"), load_profile("h100", "llama-3.1-8b")
    true = Overheads(step_us=400.0, request_us=15.0)
    made = msgspec.structs.replace(profile, overheads=true)
    rows = [
        PublishedItl("h100", "llama-3.1-8b", 1, row.batch, predicted_itl_ms(made, gpu, row))
        for row in ITLS
        if row.model == "llama-3.1-8b"
    ]
    found = calibrate(profile, gpu, rows)
    assert found.step_us == pytest.approx(400, rel=0.02)
    assert found.request_us == pytest.approx(15, rel=0.02)


def test_overheads_are_never_negative() -> None:
    """An engine faster than its operators would make larger batches look cheaper than they are."""
    gpu, profile = gpu_facts("h100"), load_profile("h100", "llama-3.1-8b")
    bare = msgspec.structs.replace(profile, overheads=NONE)
    rows = [
        PublishedItl("h100", "llama-3.1-8b", 1, row.batch, 0.8 * predicted_itl_ms(bare, gpu, row))
        for row in ITLS
        if row.model == "llama-3.1-8b"
    ]
    assert calibrate(profile, gpu, rows) == NONE


def test_eight_bit_models_only_where_the_gpu_computes_so() -> None:
    """An A100 would be planned with fp8 times that it cannot reach."""
    assert not [name for name, _ in shipped_models(A100) if name.endswith("-fp8")]
    assert [facts.weight_bytes for name, facts in shipped_models(H100) if "-fp8" in name] == [1] * 3
