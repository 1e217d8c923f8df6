"""Which loads are news to routers."""

from typing import Any

import msgspec
import pytest

from services.worker.reporting import noticeable
from shared.messages.replicas import ReplicaReport

TOLD = ReplicaReport(
    replica_id="r", worker_id="w", incarnation="i", epoch=1, phase="serving",
    running=3, waiting=1, kv_blocks_used=100, kv_blocks_total=1000, running_max=8, waiting_max=4,
    requests_total=10, output_tokens_total=500, tokens_pending=70, step_s=0.01,
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 2},
        {"phase": "draining"},
        {"running": 2},
        {"waiting": 0},
        {"requests_total": 11},
        {"running_max": 16},
        {"waiting_max": 0},
        {"kv_blocks_total": 0},
        {"kv_blocks_used": 121},
        {"kv_blocks_used": 79},
    ],
)
def test_what_moves_a_choice_is_news(change: dict[str, Any]) -> None:
    """Routers would decide by a load that is no more."""
    assert noticeable(msgspec.structs.replace(TOLD, **change), TOLD)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_blocks_used": 120},
        {"kv_blocks_used": 80},
        {"output_tokens_total": 600},
        {"tokens_pending": 10},
        {"step_s": 0.02},
    ],
)
def test_what_moves_none_is_not(change: dict[str, Any]) -> None:
    """Each token of each replica would be a report, and the broker carry little else."""
    assert not noticeable(msgspec.structs.replace(TOLD, **change), TOLD)
