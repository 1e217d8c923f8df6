"""Which bytes go where in a live switch: a planner of copies, and what checks its plans. Pure."""

from services.switcher.transfer.planner import plan_transfer
from services.switcher.transfer.problem import Held, Links, Move, TransferPlan, TransferProblem
from services.switcher.transfer.verify import verify_transfer

__all__ = [
    "Held", "Links", "Move", "TransferPlan", "TransferProblem", "plan_transfer", "verify_transfer",
]  # fmt: skip
