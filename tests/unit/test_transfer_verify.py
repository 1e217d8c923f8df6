"""The checker of plans of copies finds each kind of fault."""

from dataclasses import replace

import msgspec
import pytest

from services.switcher.transfer import TransferPlan, TransferProblem, plan_transfer, verify_transfer
from shared.placement.copies import DISK, Copy
from shared.placement.sheets import Area, Rank, weight_bytes
from tests.support.transfers import SMALL, every_move, replicas

OLD = replicas("old", ["tp2", "tp1"], ["a0", "a1", "b0"])
NEW = replicas("new", ["tp1pp2"], ["a0", "a1"])
ROOM = weight_bytes(SMALL, Rank())
PROBLEM = TransferProblem(
    models={"m": SMALL},
    nodes={"a0": "a", "a1": "a", "b0": "b"},
    leaving=OLD[:1],
    staying=OLD[1:],
    arriving=NEW,
    moves=every_move(OLD[:1], NEW, 4),
    budget_bytes={"a0": ROOM, "a1": ROOM},
)
PLAN = plan_transfer(PROBLEM)


def changed(plan: TransferPlan, sheet: str, **fields: object) -> TransferPlan:
    """The first copy of ``sheet`` on a0 that comes from elsewhere, with other fields."""
    copies = list(plan.copies["a0"]["new0"])
    at = next(i for i, c in enumerate(copies) if c.sheet == sheet and c.source != "a0")
    copies[at] = msgspec.structs.replace(copies[at], **fields)
    return with_copies(plan, tuple(copies))


def with_copies(plan: TransferPlan, copies: tuple[Copy, ...]) -> TransferPlan:
    return replace(plan, copies={**plan.copies, "a0": {"new0": copies}})


def test_a_right_plan_has_no_faults() -> None:
    """The check would refuse plans that are right."""
    assert len(PLAN.stages) > 1
    assert verify_transfer(PROBLEM, PLAN) == []


MINE = PLAN.copies["a0"]["new0"]
FAULTS = {
    "exactly once": with_copies(PLAN, MINE[1:]),
    "fetched exactly once": with_copies(PLAN, (*MINE, MINE[-1])),
    "does not hold": changed(PLAN, "mlp", source="b9"),
    "is on a GPU": changed(PLAN, "mlp", source=DISK, replica_id=""),
    "KV cache from disk": changed(PLAN, "cache", source=DISK, replica_id=""),
    "no stage": changed(PLAN, "mlp", stage=99),
    "later stage": changed(PLAN, "cache", stage=1),
    "after old0 has freed it": with_copies(
        PLAN,
        tuple(msgspec.structs.replace(c, stage=len(PLAN.stages) - 1) for c in MINE),
    ),
    "is in place": with_copies(
        PLAN,
        tuple(
            msgspec.structs.replace(c, source="b0", replica_id="old1")
            if c.sheet == "mlp" and c.source == "a0"
            else c
            for c in MINE
        ),
    ),
    "has its weights": replace(
        PLAN,
        copies={
            **PLAN.copies,
            "b0": {"old1": (Copy("mlp", Area((0, 1), (0, 1)), "a0", "old0"),)},
        },
    ),
    "has no rank on": replace(PLAN, copies={**PLAN.copies, "b0": {"new0": MINE}}),
    "in stage": with_copies(PLAN, tuple(msgspec.structs.replace(c, stage=0) for c in MINE)),
    "are needed": replace(PLAN, cache_bytes_max={"a0": 0, "a1": 0}),
    "overlap": replace(PLAN, stages=(*PLAN.stages, (0, 6))),
    "bytes by link": replace(PLAN, bytes_by_link={}),
    "bytes in place": replace(PLAN, bytes_in_place=1),
    "bytes of KV cache": replace(PLAN, cache_bytes=1),
    "not the least": replace(PLAN, bytes_bound=1),
    "infeasible": replace(PLAN, infeasible="no"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_each_fault_is_found(fault: str) -> None:
    """Otherwise a wrong plan would pass every other test here."""
    assert any(fault in found for found in verify_transfer(PROBLEM, FAULTS[fault]))
