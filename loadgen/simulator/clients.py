"""The clients: what each asks for and when, and whether it was served as promised.

A client checks every token it is shown, which a lost, repeated or foreign one does not pass, and
that its request ends once and rightly. What it finds wrong it notes, for the ingress answers for
whatever a client raises.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loadgen.simulator.workshop import token_at
from services.ingress.events import RequestFailed
from services.ingress.journey import Journey, Taken
from shared.messages.requests import FailureCode, FinishReason

End = Literal["length", "stop", "failed", "left", "lost"]
"""left: the client went away. lost: its ingress died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one client asks for. ``stop_tokens``: a stop string is complete after as many."""

    request_id: str
    at_s: float
    output_tokens: int
    stop_tokens: int | None = None
    patience_s: float | None = None


@dataclass(slots=True)
class Client:
    """One request, from its arrival to its end: a ``Choice`` of the ingress."""

    order: Order
    journey: Journey
    may_fail: frozenset[FailureCode]
    tokens: list[int] = field(default_factory=list[int])
    end: End | None = None
    faults: list[str] = field(default_factory=list[str])

    def on_tokens(self, taken: Taken) -> bool:
        if self.end is not None or taken.position != len(self.tokens):
            self._fault(f"{taken} after {len(self.tokens)} tokens and end {self.end}")
        for position, token in enumerate(taken.tokens, taken.position):
            if token != token_at(self.order.request_id, position):
                self._fault(f"token {token} at {position}")
        self.tokens += taken.tokens
        wanted = self.order.stop_tokens
        return wanted is not None and len(self.tokens) >= wanted

    def on_end(self, finish: FinishReason) -> None:
        wanted = self.order.stop_tokens or self.order.output_tokens
        right = "length" if self.order.stop_tokens is None else "stop"
        if finish != right or len(self.tokens) != wanted:
            self._fault(f"ended by {finish} after {len(self.tokens)} tokens, not {wanted}")
        self.close(right)

    def on_fail(self, failure: RequestFailed) -> None:
        if failure.code not in self.may_fail:
            self._fault(f"{failure}")
        self.close("failed")

    def close(self, end: End) -> None:
        if self.end is not None:
            self._fault(f"ended twice: {self.end}, then {end}")
        self.end = end

    def check(self) -> None:
        assert not self.faults, self.faults
        assert self.tokens == self.journey.tokens, self
        assert self.journey.live or self.end is not None, f"its client was not told: {self}"

    def _fault(self, what: str) -> None:
        self.faults.append(f"{self.order.request_id}: {what}")


class Clients:
    """All of a run; they outlive the ingress they talk to."""

    def __init__(self, orders: Iterable[Order], *, may_fail: Iterable[FailureCode]) -> None:
        self._may_fail = frozenset(may_fail)
        self._orders = {order.request_id: order for order in orders}
        self._arrived: dict[str, Client] = {}
        self._open: dict[str, Client] = {}

    def __len__(self) -> int:
        return len(self._orders)

    def ahead(self) -> list[Order]:
        return [o for o in self._orders.values() if o.request_id not in self._arrived]

    def order(self, request_id: str) -> Order:
        return self._orders[request_id]

    def arrive(self, order: Order, journey: Journey) -> Client:
        assert order.request_id not in self._arrived, order
        client = Client(order, journey, self._may_fail)
        self._arrived[order.request_id] = self._open[order.request_id] = client
        return client

    def leave(self, request_id: str) -> bool:
        """False if its request has ended before it lost patience."""
        client = self._open.get(request_id)
        if client is None or client.end is not None:
            return False
        client.close("left")
        return True

    def lose(self) -> None:
        """The ingress died, and with it every connection."""
        for client in self._open.values():
            client.close("lost")
        self._open.clear()

    def check(self) -> None:
        for client in list(self._open.values()):
            client.check()
            if client.end is not None:
                del self._open[client.order.request_id]

    @property
    def open(self) -> list[str]:
        return sorted(self._open)

    @property
    def done(self) -> bool:
        return not self._open and len(self._arrived) == len(self._orders)

    @property
    def attempts(self) -> int:
        return sum(client.journey.attempt + 1 for client in self._arrived.values())

    def count(self, *ends: End) -> int:
        return sum(client.end in ends for client in self._arrived.values())


def draw_orders(
    rng: random.Random, *, until_s: float, most: int = 25, lengths: Sequence[int] = (1, 4, 12, 40)
) -> list[Order]:
    """A few requests; most wait for all of their tokens."""
    orders: list[Order] = []
    for i in range(rng.randint(5, most)):
        output_tokens = rng.choice(lengths)
        stops, leaves = rng.random() < 0.15, rng.random() < 0.1  # noqa: PLR2004  # shares of all
        orders.append(
            Order(
                request_id=f"q{i}",
                at_s=rng.uniform(0.0, until_s),
                output_tokens=output_tokens,
                stop_tokens=rng.randint(1, output_tokens) if stops else None,
                patience_s=rng.uniform(0.0, 5.0) if leaves else None,
            )
        )
    return orders
