"""The policies of a comparison, by name: what each configures in the production cores, and where
what is said of it comes from."""

from dataclasses import dataclass
from typing import Literal

from services.router.config import RouterConfig
from services.scheduler.config import SchedulerConfig
from services.switcher.config import SwitcherConfig

Migration = Literal["none", "llumnix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """``shape``: replicas of this one shape on all GPUs, in place of the topology's.
    ``start_s``: how long a new replica takes; None: as the cost model says, weights from disk.
    ``known`` and ``inferred``: what is known of the competitor, and what we had to assume."""

    name: str
    scheduler: SchedulerConfig
    router: RouterConfig
    switcher: SwitcherConfig
    shape: str = ""
    start_s: float | None = None
    migration: Migration = "none"
    known: str = ""
    inferred: str = ""
