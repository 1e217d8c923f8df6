"""The error that ends a replica whose ranks are no longer together."""

from shared.errors import EngineFailed


class RankLost(EngineFailed):
    """Rank ``rank`` is gone, silent or stuck: the replica is lost."""

    def __init__(self, rank: int, reason: str) -> None:
        self.rank, self.reason = rank, reason
        super().__init__(f"rank {rank}: {reason}")
