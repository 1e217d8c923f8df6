"""Online k-means: its centres, and the numbers they keep."""

import random

import pytest

from services.profiler.kmeans import Centre, OnlineKMeans, Placed, greedy_centres, lloyd


def kmeans(*centres: tuple[float, float], size: int = 4, memory: float = 1000.0) -> OnlineKMeans:
    return OnlineKMeans(
        size=size,
        memory=memory,
        refine_ln=1.5,
        refine_samples=3,
        coarsen_ln=0.75,
        centres=[Centre(x, y, 100.0) for x, y in centres],
    )


def test_greedy_seeding_takes_one_point_of_each_group() -> None:
    """Two of the first types would be halves of one, and another would be missing."""
    points = [(0.0, 0.0), (0.1, 0.0), (5.0, 0.0), (5.1, 0.0), (0.0, 5.0), (0.1, 5.0)]
    chosen = {(round(c.x), round(c.y)) for c in greedy_centres(points, 3)}
    assert chosen == {(0, 0), (5, 0), (0, 5)}


def test_seeding_ignores_a_lone_outlier() -> None:
    """One odd request in the first window would be a type for good."""
    rng = random.Random(3)
    points = [(rng.gauss(0, 0.3), rng.gauss(0, 0.3)) for _ in range(60)]
    points += [(rng.gauss(4, 0.3), rng.gauss(0, 0.3)) for _ in range(60)] + [(2.0, 3.0)]
    types = kmeans(size=2)
    types.seed(points)
    assert [(round(c.x), round(c.y)) for _, c in types.live()] == [(0, 0), (4, 0)]


def test_seeding_with_fewer_different_points_than_types() -> None:
    """A first window of equal requests would crash the profiler or make empty types."""
    types = kmeans()
    types.seed([(1.0, 1.0)] * 5 + [(3.0, 1.0)])
    assert [(c.x, c.weight) for _, c in types.live()] == [(1.0, 5.0), (3.0, 1.0)]
    assert types.centres[2:] == [None, None]


def test_lloyd_moves_centres_to_their_means() -> None:
    """The first centres would stay on single requests."""
    moved = lloyd([(0.0, 0.0), (1.0, 0.0), (9.0, 0.0)], [Centre(0, 0, 0), Centre(9, 0, 0)])
    assert [(c.x, c.weight) for c in moved] == [(0.5, 2.0), (9.0, 1.0)]


def test_a_centre_is_the_mean_of_its_samples() -> None:
    """The reported lengths of a type would not be those of its requests."""
    types = kmeans(size=1, memory=1e9)
    types.seed([(0.0, 0.0)])
    for value in (0.4, 0.8, 1.2):
        types.add((value, 0.0))
    ((_, centre),) = types.live()
    assert centre.x == pytest.approx(0.6)


def test_a_centre_follows_traffic_that_drifts() -> None:
    """After a day, a type's centre would no longer move with its requests."""
    types = kmeans((0.0, 0.0), size=1, memory=50.0)
    for _ in range(500):
        types.add((1.0, 0.0))
    assert types.live()[0][1].x > 0.95


def test_a_new_kind_of_request_gets_a_free_number_after_a_few() -> None:
    """A workload that starts after the first window would hide in the types of the first."""
    types = kmeans((0.0, 0.0))
    assert [types.add((6.0, 6.0)) for _ in range(4)] == [
        Placed(0),
        Placed(0),
        Placed(1),
        Placed(1),
    ]


def test_a_new_kind_without_a_free_number_makes_two_near_types_one() -> None:
    """Four types seeded in one workload would leave no type for the next one."""
    types = kmeans((0.0, 0.0), (0.5, 0.0), (5.0, 0.0), size=3)
    placed = [types.add((9.0, 9.0)) for _ in range(3)]
    assert placed[-1] == Placed(1, merged_into=0)
    assert next(round(c.x, 2) for _, c in types.live()) == 0.25
    assert types.nearest((9.0, 9.0)) == (1, 0.0)


def test_well_separated_types_never_merge() -> None:
    """A burst of odd requests would rewrite types that are in use."""
    types = kmeans((0.0, 0.0), (3.0, 0.0), size=2)
    assert {types.add((9.0, 9.0)).merged_into for _ in range(5)} == {None}
    assert len(types.live()) == 2


def test_odd_requests_of_different_windows_do_not_add_up() -> None:
    """One odd request an hour would become a type by the evening."""
    types = kmeans((0.0, 0.0))
    for _ in range(10):
        types.add((6.0, 6.0))
        types.end_window(idle_windows_max=60)
    assert len(types.live()) == 1


def test_an_unseen_type_gives_its_number_back_and_the_others_keep_theirs() -> None:
    """Numbers would run out, or routes made for one type would be used for another."""
    types = kmeans((0.0, 0.0), (5.0, 0.0))
    retired: list[list[int]] = []
    for _ in range(4):
        types.add((5.0, 0.0))
        retired.append(types.end_window(idle_windows_max=2))
    assert retired == [[], [], [0], []]
    assert [number for number, _ in types.live()] == [1]


def test_silence_retires_nothing() -> None:
    """A quiet night would forget all types."""
    types = kmeans((0.0, 0.0), (5.0, 0.0))
    assert [types.end_window(idle_windows_max=2) for _ in range(9)] == [[]] * 9


def test_an_unfinished_request_is_placed_by_its_input() -> None:
    """Requests aborted early would count as short-answer ones."""
    assert kmeans((1.0, 0.0), (5.0, 9.0)).nearest_by_input(4.5) == 1
