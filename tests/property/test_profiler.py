"""What holds of the profiler for any traffic."""

import random
from math import dist

from hypothesis import given, settings
from hypothesis import strategies as st

from services.profiler.config import ProfilerConfig
from services.profiler.core import Profiler, WindowDeadline
from services.profiler.kmeans import OnlineKMeans
from shared.core import Loaded, Publish, Started, Stored
from shared.messages.demand import DemandReport
from shared.messages.requests import RequestCompleted, RequestsCompleted

GRID = [(x, y) for x in (2.0, 5.0, 8.0) for y in (2.0, 5.0, 8.0)]


@settings(max_examples=40)
@given(
    centres=st.lists(st.sampled_from(GRID), min_size=1, max_size=4, unique=True),
    late=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_separated_types_are_found_also_those_that_come_late(
    centres: list[tuple[float, float]], late: int, seed: int
) -> None:
    """Kinds of request that differ twentyfold in length would be one type to the scheduler."""
    rng = random.Random(seed)
    types = OnlineKMeans(size=4, memory=1000.0, refine_ln=1.5, refine_samples=3, coarsen_ln=0.75)

    def sample(among: list[tuple[float, float]]) -> tuple[float, float]:
        x, y = rng.choice(among)
        return rng.gauss(x, 0.25), rng.gauss(y, 0.25)

    early = centres[: max(1, len(centres) - late)]
    types.seed([sample(early) for _ in range(64)])
    for _ in range(600):
        types.add(sample(centres))
    for centre in centres:
        _, d2 = types.nearest(centre)
        assert d2**0.5 < 0.8, (centre, types.live())
    for _, found in types.live():
        assert min(dist((found.x, found.y), centre) for centre in centres) < 1.5


def batches() -> st.SearchStrategy[list[RequestsCompleted]]:
    one = st.builds(
        RequestCompleted,
        request_id=st.integers(0, 300).map(str),
        outcome=st.sampled_from(["completed", "completed", "aborted", "rejected", "failed"]),
        model_id=st.sampled_from(["m", "m", "n", "o"]),
        input_tokens=st.integers(-1, 10**6),
        output_tokens=st.integers(-1, 10**6),
        ttft_s=st.none() | st.floats(0, 100),
    )
    batch = st.lists(one, max_size=25).map(
        lambda done: RequestsCompleted(ingress_id="i", completed=tuple(done))
    )
    return st.lists(batch, max_size=12)


@settings(max_examples=60)
@given(windows=st.lists(batches(), max_size=6), loaded_at=st.integers(0, 6))
def test_reports_add_up_and_memory_is_bounded(
    windows: list[list[RequestsCompleted]], loaded_at: int
) -> None:
    """Requests would be lost or counted twice between the windows, or fill the memory."""
    config = ProfilerConfig(requests_max=60, models_max=2, seed_samples=5, idle_windows_max=1)
    profiler = Profiler(config, models=("m",), unix_offset_s=0.0)
    profiler.step(Started(), 0.0)
    now_s = 0.0
    for index, batches_ in enumerate(windows):
        if index == loaded_at:
            profiler.step(Loaded(key="profiler"), now_s)
        for batch in batches_:
            profiler.step(batch, now_s)
            profiler.check()
        now_s += 10.0
        effects = profiler.step(WindowDeadline(), now_s)
        profiler.step(Stored(key="profiler", revision=index + 1), now_s)
        profiler.check()
        reports = [e.message for e in effects if isinstance(e, Publish)]
        assert 1 <= len(reports) <= 2
        for report in reports:
            assert isinstance(report, DemandReport)
            if index > loaded_at:
                assert sum(t.requests for t in report.types) == report.completed
            assert all(t.arrivals_rps * 10.0 >= t.requests - 1e-6 for t in report.types)
            assert report.completed <= config.requests_max
