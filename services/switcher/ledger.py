"""The plan in the bucket, as far as this switcher knows: read, written, looked at."""

from services.switcher.events import KEY
from shared.core import Load, Store
from shared.messages.plans import StoredPlan


class Ledger:
    def __init__(self) -> None:
        self.stored: StoredPlan | None = None  # what the bucket holds
        self.writing: StoredPlan | None = None  # what we have asked it to hold
        self.revision = 0
        self.looking = False  # a Load is under way that we do not wait for

    def load(self) -> Load:
        """Ask for it, and forget what we were about."""
        self.writing, self.looking = None, False
        return Load(KEY, StoredPlan)

    def look(self) -> Load:
        """Ask for it beside whatever goes on."""
        self.looking = True
        return Load(KEY, StoredPlan)

    def write(self, plan: StoredPlan) -> Store:
        self.writing = plan
        return Store(KEY, plan, self.revision)

    def holds(self, stored: StoredPlan) -> StoredPlan | None:
        """It is known to hold ``stored`` now; what we knew before."""
        before, self.stored, self.writing = self.stored, stored, None
        return before
