"""The simulator's clients: whether they would notice that they were served wrongly."""

import pytest

from loadgen.simulator.clients import Client, Clients, Order
from loadgen.simulator.workshop import token_at
from services.ingress.events import RequestFailed
from services.ingress.journey import Taken
from tests.support.ingress_driver import journey


def a_client(**order: int) -> Client:
    wish = Order(request_id="a", at_s=0.0, output_tokens=3, **order)  # type: ignore[arg-type]
    return Client(wish, journey("a"), frozenset({"no_replica"}))


def taken(*positions: int) -> Taken:
    return Taken([token_at("a", position) for position in positions], None, positions[0])


def test_a_request_served_as_promised_is_no_fault() -> None:
    """Every seed would fail."""
    client = a_client()
    assert not client.on_tokens(taken(0, 1))
    assert not client.on_tokens(taken(2))
    client.on_end("length")
    assert (client.faults, client.end) == ([], "length")


@pytest.mark.parametrize(
    "second",
    [taken(0), taken(2), Taken([7], None, 1), Taken([token_at("b", 1)], None, 1)],
    ids=["repeated", "behind-a-gap", "wrong", "of-another-request"],
)
def test_wrong_tokens_are_faults(second: Taken) -> None:
    """Tokens could be lost or doubled in every seed, and no seed fail."""
    client = a_client()
    client.on_tokens(taken(0))
    client.on_tokens(second)
    assert client.faults


def test_a_stop_string_ends_the_request() -> None:
    """The path of stop strings through the ingress would never be simulated."""
    client = a_client(stop_tokens=2)
    assert [client.on_tokens(taken(0)), client.on_tokens(taken(1))] == [False, True]
    client.on_end("stop")
    assert not client.faults


def test_wrong_ends_are_faults() -> None:
    """Requests cut short, ended twice, or failed without need would pass for served."""
    short, twice, failed = a_client(), a_client(), a_client()
    short.on_tokens(taken(0))
    short.on_end("length")
    twice.on_tokens(taken(0, 1, 2))
    twice.on_end("length")
    twice.on_end("length")
    failed.on_fail(RequestFailed("a", "engine", "", 0.0))
    assert all(client.faults for client in (short, twice, failed))


def test_a_failure_that_may_happen_is_no_fault() -> None:
    """Ingresses that give up could not be simulated."""
    client = a_client()
    client.on_fail(RequestFailed("a", "no_replica", "", 0.0))
    assert (client.faults, client.end) == ([], "failed")


def test_an_end_that_its_client_never_hears_is_noticed() -> None:
    """A client would wait for ever for what the ingress has forgotten."""
    client = a_client()
    client.journey.phase = "ended"
    with pytest.raises(AssertionError, match="not told"):
        client.check()


def test_requests_of_a_dead_ingress_are_lost() -> None:
    """A run whose ingress crashed would never come to rest."""
    order = Order(request_id="a", at_s=0.0, output_tokens=3)
    clients = Clients([order], may_fail=())
    clients.arrive(order, journey("a"))
    assert (clients.open, clients.done) == (["a"], False)
    clients.lose()
    assert (clients.count("lost"), clients.done, clients.ahead()) == (1, True, [])
    assert not clients.leave("a")
