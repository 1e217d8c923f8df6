"""The routing policies, one choice at a time."""

from collections import Counter
from itertools import pairwise
from math import log1p

import pytest

from services.router.loads import ReplicaLoad, decayed, freshness
from services.router.policies import (
    Ask,
    Candidate,
    Memory,
    Options,
    free_kv,
    kv_cost,
    least_load,
    plan,
    prefix_affinity,
    round_robin,
)
from services.router.request_types import TenantHistory, TypeModel, from_report, posterior
from shared.messages.demand import DemandReport
from shared.messages.replicas import ReplicaReport


def memory_of(size: int, *, instance_id: str = "r", prefixes_max: int = 100) -> Memory:
    memory = Memory(
        instance_id=instance_id,
        load_gain=4.0,
        prefix_load_slack=0.25,
        prefixes_max=prefixes_max,
    )
    memory.replan(size)
    return memory


def options_of(*shares: float, loads: tuple[float, ...] | None = None) -> Options:
    candidates = [
        Candidate(index=i, replica_id=f"r{i}", leader_id=f"g{i}", load=ReplicaLoad(decisions_max=9))
        for i in range(len(shares))
    ]
    return Options(candidates, list(loads or [0.0] * len(shares)), list(shares))


ASK = Ask(request_type=0)


def test_plan_gives_each_replica_its_share() -> None:
    """The scheduler's weights would not be what happens."""
    memory = memory_of(3)
    counts = Counter(plan(options_of(0.5, 0.3, 0.2), ASK, memory) for _ in range(1000))
    assert [counts[i] for i in range(3)] == pytest.approx([500, 300, 200], abs=2)


def test_plan_spreads_a_share_evenly_over_time() -> None:
    """A replica would get its share in bursts, and queue in between."""
    memory = memory_of(2)
    choices = [plan(options_of(0.5, 0.5), ASK, memory) for _ in range(20)]
    assert all(a != b for a, b in pairwise(choices))


def test_plan_bends_under_load() -> None:
    """A replica that has fallen behind would get its full share on top of its queue."""
    memory = memory_of(2)
    options = options_of(0.5, 0.5, loads=(2.0, 0.2))
    counts = Counter(plan(options, ASK, memory) for _ in range(1000))
    assert counts[0] < 100


def test_plan_never_uses_a_weightless_replica_while_a_weighted_one_is_left() -> None:
    """A type would run on a shape the scheduler ruled out for it."""
    memory = memory_of(3)
    assert {plan(options_of(0.0, 1.0, 0.0), ASK, memory) for _ in range(50)} == {1}


def test_plan_spills_to_weightless_replicas_rather_than_failing() -> None:
    """Requests would fail while a healthy replica stands idle."""
    memory = memory_of(2)
    assert {plan(options_of(0.0, 0.0), ASK, memory) for _ in range(10)} == {0, 1}


def test_types_keep_separate_accounts() -> None:
    """Two types in turn would each always meet the same replica."""
    memory = memory_of(2)
    pairs: Counter[tuple[int, int]] = Counter()
    for i in range(100):
        pairs[i % 2, plan(options_of(0.5, 0.5), Ask(request_type=i % 2), memory)] += 1
    assert min(pairs.values()) >= 24
    assert len(pairs) == 4


def test_least_load_never_takes_the_busiest() -> None:
    """Load would not matter to the policy named after it."""
    memory = memory_of(4)
    options = options_of(1, 1, 1, 1, loads=(0.9, 0.1, 0.5, 0.3))
    counts = Counter(least_load(options, ASK, memory) for _ in range(600))
    assert 0 not in counts
    assert counts[1] > counts[3] > counts[2]


def test_least_load_with_one_or_two_options() -> None:
    """The usual small mesh would fall outside what the policy was made for."""
    memory = memory_of(2)
    assert least_load(options_of(1.0), ASK, memory) == 0
    picks = {least_load(options_of(0.5, 0.5, loads=(0.4, 0.3)), ASK, memory) for _ in range(9)}
    assert picks == {1}


def test_round_robin_goes_on_where_it_was_when_options_change() -> None:
    """With a replica in and out of service, its neighbour would get twice its turn."""
    memory = memory_of(4)
    memory.last_index = 0
    everyone = options_of(1, 1, 1, 1)
    without_two = Options([c for c in everyone.candidates if c.index != 2], [0.0] * 3, [1.0] * 3)
    chosen = [
        options.candidates[round_robin(options, ASK, memory)].index
        for options in (everyone, without_two, everyone, everyone, without_two)
    ]
    assert chosen == [1, 3, 0, 1, 3]


def test_prefix_goes_home() -> None:
    """Prompts with a common beginning would be prefilled anew on each replica."""
    memory = memory_of(4)
    options = options_of(0.25, 0.25, 0.25, 0.25)
    home = prefix_affinity(options, Ask(0, (1, 2, 3)), memory)
    assert {prefix_affinity(options, Ask(0, (1, 2, 3, n)), memory) for n in range(10, 30)} == {home}


def test_longest_known_prefix_wins() -> None:
    """A conversation would go to whoever served another with the same system prompt."""
    memory = memory_of(2)
    memory.homes.update({1: "r0", 2: "r1"})
    assert prefix_affinity(options_of(0.5, 0.5), Ask(0, (1, 2)), memory) == 1


def test_a_busy_home_is_left() -> None:
    """One popular prompt would overload one replica while the others are idle."""
    memory = memory_of(2)
    memory.homes[7] = "r0"
    options = options_of(0.5, 0.5, loads=(0.9, 0.1))
    counts = Counter(prefix_affinity(options, Ask(0, (7,)), memory) for _ in range(4))
    assert counts[1] >= 3
    assert memory.homes[7] == "r1"


def test_prefix_memory_is_bounded_and_keeps_the_latest() -> None:
    """The router would grow with each prompt it has seen."""
    memory = memory_of(2, prefixes_max=5)
    for i in range(50):
        prefix_affinity(options_of(0.5, 0.5), Ask(0, (1, 100 + i)), memory)
    assert len(memory.homes) == 5
    assert 1 in memory.homes
    assert 149 in memory.homes


def test_credit_of_two_instances_starts_apart() -> None:
    """Routers would walk through the replicas in step and load each in waves."""
    first = memory_of(16, instance_id="a").credits_of(0)
    second = memory_of(16, instance_id="b").credits_of(0)
    assert first != second
    assert sum(first) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("age_s", "expected"), [(0.0, 1.0), (1.0, 1.0), (2.0, 0.5), (3.0, 0.0), (9.0, 0.0)]
)
def test_freshness(age_s: float, expected: float) -> None:
    """A replica's word would be believed for ever, or forgotten at once."""
    assert freshness(age_s, stale_s=1.0, dead_s=3.0) == expected


def test_an_idle_report_fades_to_busy_and_a_busy_one_stays() -> None:
    """A silent replica would attract requests by a number from the past."""
    assert decayed(0.0, 0.5) == 0.5
    assert decayed(3.0, 0.5) == 3.0


TYPES = TypeModel(
    numbers=(0, 1),
    inputs_ln=(log1p(100), log1p(100)),
    outputs_ln=(log1p(50), log1p(2000)),
    shares=(0.5, 0.5),
)


def chances(output_tokens_max: int, prior: tuple[float, ...] = (0.5, 0.5)) -> list[float]:
    return posterior(
        TYPES,
        input_tokens=100,
        output_tokens_max=output_tokens_max,
        prior=prior,
        spread_ln=0.7,
    )


def test_a_low_output_limit_speaks_for_short_answers() -> None:
    """Requests limited to a few tokens would be routed as if they wrote essays."""
    assert chances(100)[0] > 0.95
    assert chances(100_000) == pytest.approx([0.5, 0.5], abs=0.01)


def test_the_prior_decides_where_lengths_do_not() -> None:
    """A type that hardly ever comes would be given half of the ambiguous requests."""
    assert chances(100_000, prior=(0.9, 0.1))[0] == pytest.approx(0.9, abs=0.01)


def test_a_request_unlike_any_type_still_has_chances() -> None:
    """A very long prompt would divide by zero."""
    far = posterior(
        TYPES, input_tokens=10**9, output_tokens_max=0, prior=(0.5, 0.5), spread_ln=0.01
    )
    assert sum(far) == pytest.approx(1.0)


def test_an_empty_report_keeps_the_types() -> None:
    """A window before the profiler knows its types would make the router forget its own."""
    empty = DemandReport(model_id="m", window_start_s=0.0, window_s=10.0)
    assert from_report(empty, TYPES) is TYPES


def test_tenants_are_bounded_least_recent_first() -> None:
    """A client with ever new tenant names would fill the router's memory."""
    history = TenantHistory(tenants_max=2)
    for tenant in ("a", "b", "a", "c"):
        history.add(model_id="m", tenant=tenant, request_type=1)
    assert len(history) == 2
    assert history.prior(TYPES, model_id="m", tenant="a")[1] > 0.5
    assert history.prior(TYPES, model_id="m", tenant="b") == TYPES.shares


def reported(
    *replicas: tuple[int, int, int], decided: tuple[int, ...] = (), total: int = 1000
) -> Options:
    """Options whose replicas report (running, waiting, KV blocks used); ``decided``: how many
    decisions of ours each has on top."""
    options = options_of(*[1.0] * len(replicas))
    for place, (running, waiting, used) in enumerate(replicas):
        load = options.candidates[place].load
        load.update(
            ReplicaReport(
                replica_id=f"r{place}", worker_id=f"g{place}", incarnation="a", epoch=1,
                phase="serving", running=running, waiting=waiting, running_max=64,
                kv_blocks_used=used, kv_blocks_total=total,
            ),
            now_s=0.0, decision_lag_s=0.0,
        )  # fmt: skip
        for number in range(decided[place] if decided else 0):
            load.decide(f"q{place}-{number}", 0.0)
    return options


def test_free_kv_takes_the_most_free_blocks_per_request() -> None:
    """It would be least load by another name: the fuller replica has fewer requests here."""
    memory = memory_of(3)
    assert free_kv(reported((9, 0, 100), (2, 0, 500), (9, 0, 400)), ASK, memory) == 1
    assert free_kv(reported((0, 0, 0), (0, 0, 0)), ASK, memory) == 0


def test_free_kv_counts_what_waits_and_what_was_just_sent() -> None:
    """A burst between two reports would land on one replica."""
    memory = memory_of(2)
    assert free_kv(reported((4, 4, 400), (4, 0, 500)), ASK, memory) == 1
    assert free_kv(reported((4, 0, 400), (4, 0, 500), decided=(4, 0)), ASK, memory) == 1


def test_free_kv_prefers_replicas_whose_cache_is_known() -> None:
    """One that reports no KV cache would look as if it had all of it free."""
    options = reported((4, 0, 400), (60, 0, 900))
    options.candidates[0].load.report = None
    assert free_kv(options, ASK, memory_of(2)) == 1


def test_kv_cost_prefers_the_cached_prefix_until_it_is_too_full() -> None:
    """Dynamo's router would be blind to caches, or blind to load."""
    memory = memory_of(2)
    ask = Ask(0, tuple(range(10)), input_tokens=1600)  # 100 blocks
    assert kv_cost(reported((1, 0, 50), (1, 0, 60)), ask, memory) == 0
    assert kv_cost(reported((1, 0, 150), (1, 0, 60)), ask, memory) == 0  # 150 < 60 + 100
    assert kv_cost(reported((1, 0, 170), (1, 0, 60)), ask, memory) == 1
    other = Ask(0, tuple(range(90, 100)), input_tokens=1600)
    assert kv_cost(reported((1, 0, 60), (1, 0, 50)), other, memory) == 1


def test_kv_cost_counts_half_a_prefix_as_half() -> None:
    """A shared system prompt would weigh as much as the whole conversation."""
    memory = memory_of(2)
    kv_cost(reported((1, 0, 0), (1, 0, 9)), Ask(0, (1, 2), input_tokens=320), memory)
    longer = Ask(0, (1, 2, 3, 4), input_tokens=640)  # 40 blocks, 20 of them cached on r0
    assert kv_cost(reported((1, 0, 19), (1, 0, 0)), longer, memory) == 0
    memory = memory_of(2)
    kv_cost(reported((1, 0, 0), (1, 0, 9)), Ask(0, (1, 2), input_tokens=320), memory)
    assert kv_cost(reported((1, 0, 21), (1, 0, 0)), longer, memory) == 1


def test_kv_cost_counts_waiting_prompts_twice() -> None:
    """A queue of prompts, to be computed and then held, would look like nothing."""
    memory = memory_of(2)
    ask = Ask(0, (), input_tokens=160)
    assert kv_cost(reported((10, 2, 100), (10, 0, 139)), ask, memory) == 1
    assert kv_cost(reported((10, 2, 100), (10, 0, 141)), ask, memory) == 0


def test_kv_cost_remembers_several_holders_and_is_bounded() -> None:
    """A popular prefix would have one home, or the table would grow for ever."""
    memory = memory_of(2, prefixes_max=5)
    ask = Ask(0, (1,), input_tokens=160)
    kv_cost(reported((1, 0, 0), (1, 0, 9)), ask, memory)
    kv_cost(reported((1, 0, 99), (1, 0, 9)), ask, memory)
    assert memory.holders[1] == ("r0", "r1")
    for i in range(50):
        kv_cost(reported((1, 0, 0)), Ask(0, (1, 100 + i), input_tokens=16), memory)
    assert len(memory.holders) == 5
    assert 1 in memory.holders
