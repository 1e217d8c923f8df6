"""Rank groups of torch.distributed: gloo for CPUs of several hosts, NCCL for one GPU a rank.

See process_groups.py for how they are made, and ended.
"""

import abc
import collections
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from services.worker.engine.torch_engine.ranks.group import parts_for
from services.worker.engine.torch_engine.ranks.lost import RankLost
from services.worker.engine.torch_engine.ranks.membership import RankSession
from services.worker.engine.torch_engine.ranks.mesh import Members

CALL_S_MAX = 30.0
"""How long gloo itself waits for a peer. A session that is lost wakes the caller long before; only
the group's own thread may hang on for so long."""
IN_FLIGHT_BYTES_MAX = 8 << 20  # of tensors sent to one rank that it may not have received
IN_FLIGHT_MAX = 64
PAIR = 2  # ranks, whose sum is the same in either order


class CollectiveGroup(abc.ABC):
    """What gloo and NCCL have in common: tensors are sent as copies that are kept for a while, as
    neither lets go of a tensor before the receiver has come for it."""

    def __init__(self, session: RankSession, members: Members, process_group: Any) -> None:  # noqa: ANN401  # torch has no types for these
        self.rank, self.size = members.rank, members.size
        self._session, self._members = session, members
        self._group: Any = process_group
        self._in_flight: dict[int, collections.deque[tuple[Any, torch.Tensor]]] = {
            number: collections.deque() for number in range(self.size)
        }
        session.on_lost(self._on_lost)

    @property
    def in_flight_bytes(self) -> int:
        return IN_FLIGHT_BYTES_MAX

    def gather(
        self, tensor: torch.Tensor, to: int = 0, *, shapes: Sequence[Sequence[int]] | None = None
    ) -> list[torch.Tensor] | None:
        if self.rank != to:
            self.send(tensor, to)
            return None
        parts = parts_for(tensor, to, self.size, shapes)
        for number, part in enumerate(parts):
            if number != to:
                self.recv(part, number)
        return parts

    def send(self, tensor: torch.Tensor, to: int) -> None:
        if tensor.numel() == 0:
            return
        kept, waiting = tensor.clone(), self._in_flight[to]
        waiting.append((self._perform(lambda: self._towards(to).send([kept], to, 0)), kept))
        while len(waiting) > IN_FLIGHT_MAX or (
            len(waiting) > 1 and sum(sent.nbytes for _, sent in waiting) > IN_FLIGHT_BYTES_MAX
        ):
            work, _ = waiting.popleft()
            self._perform(work.wait)

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        if tensor.numel():
            self._perform(lambda: self._from(source).recv([tensor], source, 0).wait())

    def close(self) -> None:
        self._in_flight.clear()
        self._group = None

    def _towards(self, to: int) -> Any:  # noqa: ANN401, ARG002  # a torch process group
        """What carries tensors to the member ``to``."""
        return self._group

    def _from(self, source: int) -> Any:  # noqa: ANN401, ARG002
        """What brings those of the member ``source``."""
        return self._group

    @abc.abstractmethod
    def _perform(self, call: Callable[[], Any]) -> Any:  # noqa: ANN401  # torch's Work, or nothing
        """Its result; RankLost where it fails, or the session is lost."""

    def _failed(self, error: BaseException) -> RankLost:
        """torch does not say whose fault it was: the next rank's, as far as this one can tell."""
        rank = self._members.ranks[(self.rank + 1) % self.size]
        self._session.lose(rank, f"or another rank of its group has failed: {error}")
        return self._session.lost or RankLost(rank, str(error))

    @abc.abstractmethod
    def _on_lost(self, lost: RankLost) -> None:
        """Wake whoever waits in a call."""


class GlooGroup(CollectiveGroup):
    """gloo's waits cannot be woken: a thread of the group's own performs them."""

    def __init__(self, session: RankSession, members: Members, process_group: Any) -> None:  # noqa: ANN401
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="rank-gloo", daemon=True)
        self._thread.start()
        super().__init__(session, members, process_group)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if self.size == PAIR:
            self._perform(lambda: self._group.allreduce([tensor]).wait())
            return
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._perform(lambda: self._group.allgather([parts], [tensor]).wait())
        torch.add(parts[0], parts[1], out=tensor)
        for part in parts[2:]:
            tensor.add_(part)

    def close(self) -> None:
        """A call that still hangs is left to its thread, for CALL_S_MAX at most."""
        self._calls.put(None)
        if self._session.lost is None:
            self._thread.join(CALL_S_MAX)
        if self._group is not None and not self._thread.is_alive():
            self._group.shutdown()
        super().close()

    def _perform(self, call: Callable[[], Any]) -> Any:  # noqa: ANN401
        if (lost := self._session.lost) is not None:
            raise lost
        self._calls.put(call)
        result = self._results.get()
        if isinstance(result, RankLost):
            raise result
        if isinstance(result, BaseException):
            raise self._failed(result) from result
        return result

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                result = call()
            except Exception as error:  # noqa: BLE001  # the caller gets it
                result = error
            self._results.put(result)

    def _on_lost(self, lost: RankLost) -> None:
        self._results.put(lost)


class NcclGroup(CollectiveGroup):
    """Calls are put on a stream and return at once; a loss aborts what is on it.

    On one communicator all that two ranks send each other is done in order, and a large send ends
    when it is received. So stages that send hidden states up while logits come down, each before
    it receives, would wait for each other: down has a communicator of its own."""

    def __init__(
        self,
        session: RankSession,
        members: Members,
        process_group: Any,  # noqa: ANN401
        downwards: Any,  # noqa: ANN401  # the same members again
    ) -> None:
        self._down: Any = downwards
        super().__init__(session, members, process_group)

    def _towards(self, to: int) -> Any:  # noqa: ANN401
        return self._group if to > self.rank else self._down

    def _from(self, source: int) -> Any:  # noqa: ANN401
        return self._group if source < self.rank else self._down

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._perform(lambda: self._group.allreduce([tensor]).wait())

    def close(self) -> None:
        lost = self._session.lost is not None
        for group in (self._group, self._down):
            if group is not None:
                group.abort() if lost else group.shutdown()
        self._down = None
        super().close()

    def _perform(self, call: Callable[[], Any]) -> Any:  # noqa: ANN401
        if (lost := self._session.lost) is not None:
            raise lost
        try:
            return call()
        except RuntimeError as error:
            raise self._failed(error) from error

    def _on_lost(self, lost: RankLost) -> None:  # noqa: ARG002
        for group in (self._group, self._down):
            if group is not None:
                group.abort()
