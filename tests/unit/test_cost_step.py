"""Step times against sums done by hand; the profile is tests.support.costs.small_profile.

tp1, per layer: dense 10 us for 1 token, 1 us more for each up to 11 tokens, 2 us for each beyond;
decode attention 3 us, 1 us a request, 0.1 us a token; prefill attention 2 us a chunk, 0.05 us a
pair. Head 5 us up to 11 tokens. Overheads: 100 us a step, 1 us a request, 7 us a chunk, 4 us a hop.
Hops: 2 us, and 16 bytes a token at 1 GB/s: 0.016 us. Four layers.
"""

import msgspec
import pytest

from shared.cost.stages import even_stages
from shared.cost.step import Curve, Prefill, StepModel, pairs, step_model
from shared.errors import ConfigInvalid
from shared.hardware import Parallelism
from tests.support.costs import small_gpu, small_profile

US = 1_000_000


def model(
    shape: str = "tp1", *, nodes: int = 1, stages: tuple[int, ...] = (), speedup: float = 1.0
) -> StepModel:
    return step_model(
        small_profile(), small_gpu(), Parallelism.parse(shape),
        nodes=nodes, stages=stages, speedup=speedup,
    )  # fmt: skip


def test_a_lone_request_decodes() -> None:
    """Every simulated second would be wrong: 4 (10 + 3 + 1) + 5 + 100 + 1 = 162 us, 0.4 a token."""
    decode = model().decode(1)
    assert decode.fixed_ps == 162 * US
    assert decode.slope_ps == US * 4 // 10
    assert model().step_ps(1, 50) == (162 + 20) * US


def test_a_batch_decodes() -> None:
    """Batching would look free, or useless: 4 (15 + 3 + 6) + 5 + 100 + 6 = 207 us for 6."""
    assert model().decode(6).fixed_ps == 207 * US


def test_prompts_beside_decoding() -> None:
    """Chunked prefill would cost nothing, or twice: 6 requests with 60 tokens and 5 of a prompt:
    4 (20 + 2 + 3 + 6) + 4 (60 x 0.1 + 15 x 0.05) + 5 + 100 + 7 + 7 = 270 us."""
    prefill = Prefill(tokens=5, chunks=1, pairs=pairs(0, 5), ending=1)
    assert model().step_ps(6, 60, prefill) == 270 * US


def test_prompts_alone() -> None:
    """A lone prompt pays for no decode attention, and the head only for its end:
    4 (15 + 2) + 4 x 21 x 0.05 + 100 + 1 + 7 = 180.2 us, 5 more where it ends."""
    part = Prefill(tokens=6, chunks=1, pairs=pairs(0, 6))
    assert model().step_ps(0, 0, part) == 180_200_000
    ending = Prefill(tokens=6, chunks=1, pairs=pairs(0, 6), ending=1)
    assert model().step_ps(0, 0, ending) == 185_200_000


def test_pairs_count_each_token_it_attends_to() -> None:
    """Late chunks of a long prompt would look as cheap as its first: 3 tokens after 10 attend to
    11 + 12 + 13; chunks add up to the whole."""
    assert pairs(10, 3) == 36
    assert pairs(0, 10) + pairs(10, 3) == pairs(0, 13)


def test_tensor_parallelism_uses_its_own_times_and_collectives() -> None:
    """tp2 would be priced as tp1: 4 (6 + 1 + 3 + 1) + 5 + 101 = 150 us, 0.2 a token."""
    decode = model("tp2").decode(1)
    assert (decode.fixed_ps, decode.slope_ps) == (150 * US, US * 2 // 10)


def test_stages_do_not_help_a_lone_request() -> None:
    """Pipelines would look like tensor parallelism: 162 us as with one stage, and 2 x 4 us of hops,
    2 us there, 2 us back, 0.016 us for one token."""
    assert model("tp1pp2").decode(1).fixed_ps == 174_016_000


def test_a_full_pipeline_waits_for_its_slowest_stage() -> None:
    """The bubble, or the gain, of a pipeline would be wrong. 12 requests, 2 micro-batches of 6, a
    layer 24 us: last stage 2 (2 x 24 + 5) = 106; hops 12 + 2 x 6 x 0.016; overheads 112."""
    decode = model("tp1pp2").decode(12)
    assert decode.fixed_ps == (106 + 12 + 112) * US + 192_000
    assert decode.slope_ps == 2 * US // 10  # half the tokens pass each layer at a time


def test_an_uneven_split_waits_for_its_longest_stage() -> None:
    """A planner would put all layers into one stage: 2 x 3 x 24 = 144 us with stages (3, 1)."""
    decode = model("tp1pp2", stages=(3, 1)).decode(12)
    assert decode.fixed_ps == (144 + 12 + 112) * US + 192_000
    assert decode.slope_ps == 3 * US // 10
    # One request is in one stage at a time: the split does not matter to it.
    assert model("tp1pp2", stages=(3, 1)).decode(1) == model("tp1pp2").decode(1)


def test_the_head_may_hide_behind_a_longer_stage() -> None:
    """Shifting layers away from the head would never pay: with stages (1, 3) it adds 2 x 5 us."""
    before, after = model("tp1pp2", stages=(3, 1)), model("tp1pp2", stages=(1, 3))
    assert after.decode(12).fixed_ps - before.decode(12).fixed_ps == 10 * US


def test_a_chunk_passes_a_stage_in_one_piece() -> None:
    """A lone prompt would seem to be computed on all stages at once. 11 tokens beside 1 request:
    the heavy micro-batch has 12, 22 + 2 + 3 + 1 = 28 us a layer, and goes through 4, as does the
    request's context."""
    prefill = Prefill(tokens=11, chunks=1, pairs=66, ending=1)
    total = model("tp1pp2").step_ps(1, 10, prefill)
    attention = 4 * 66 * 50_000 + 4 * 10 * 100_000
    hops = 12 * US + 2 * 12 * 16_000
    assert total == 4 * 28 * US + 5 * US + attention + hops + (100 + 2 + 7) * US


def test_two_chunks_fill_two_stages() -> None:
    """Prompts in a row would be computed one at a time: 2 x 11 tokens as 2 micro-batches, 22 us a
    layer, 2 (2 x 22 + 5) = 98 us; half the pairs each."""
    prefill = Prefill(tokens=22, chunks=2, pairs=132, ending=2)
    total = model("tp1pp2").step_ps(0, 0, prefill)
    hops = 12 * US + 2 * 11 * 16_000
    assert total == 98 * US + 2 * 132 * 50_000 + hops + (100 + 2 + 14) * US


def test_a_long_chunk_is_cut_into_micro_batches() -> None:
    """Long prompts would gain nothing from stages: 4,096 tokens go as 2 x 2,048, and take half of
    what they take in one piece, but for overheads and hops."""
    one, two = model(), model("tp1pp2")
    prefill = Prefill(tokens=4096, chunks=1, pairs=pairs(0, 4096))
    in_one_piece = one.step_ps(0, 0, prefill) - 108 * US
    hops = 12 * US + 2 * 2048 * 16_000
    cut = two.step_ps(0, 0, prefill) - 108 * US - hops
    # 4 (20 + 2 (2048 - 11) + 2) for 4 (20 + 2 (4096 - 11) + 2), and half the pairs.
    assert cut == 4 * 4096 * US + 2 * pairs(0, 4096) * 50_000
    assert in_one_piece == 4 * 8192 * US + 4 * pairs(0, 4096) * 50_000


def test_a_first_token_waits_for_all_pieces_of_its_prompt() -> None:
    """A lone long prompt would seem as fast as one of many: its last piece starts one piece late,
    and has all layers before it."""
    one, two = model(), model("tp1pp2")
    going_on = two.step_ps(0, 0, Prefill(tokens=4096, chunks=1))
    ending = two.step_ps(0, 0, Prefill(tokens=4096, chunks=1, ending=1))
    single = Prefill(tokens=1, chunks=1)
    head = one.step_ps(0, 0, Prefill(tokens=1, chunks=1, ending=1)) - one.step_ps(0, 0, single)
    assert ending - going_on == 2 * 4096 * US + head


def test_hops_between_nodes_are_dearer() -> None:
    """A pipeline across nodes would cost as much as one in a node: 20 us each way for 2, 0.16 us
    for 16 bytes at 100 MB/s for 0.016."""
    near, far = model("tp1pp2").decode(1), model("tp1pp2", nodes=2).decode(1)
    assert far.fixed_ps - near.fixed_ps == 2 * 18 * US + 144_000


def test_only_hops_that_leave_a_node_use_the_network() -> None:
    """pp4 on 2 nodes has one hop of three over the network, and the way back: 2 x 18 us more."""
    near, far = model("tp1pp4").decode(1), model("tp1pp4", nodes=2).decode(1)
    assert far.fixed_ps - near.fixed_ps == 2 * 18 * US + 144_000


def test_tensor_parallelism_across_nodes_pays_its_collectives_there() -> None:
    """The planner would split layers over slow links: 2 rings of 2 x 16 bytes / 2 at 100 MB/s and
    2 x 20 us: 80.32 us for 1 token, for the 1 us measured in a node, in each of 4 layers."""
    near, far = model("tp2").decode(1), model("tp2", nodes=2).decode(1)
    assert far.fixed_ps - near.fixed_ps == 4 * (80_320_000 - US)
    # Two stages on two nodes keep each tensor-parallel group within one.
    assert model("tp2pp2", nodes=2).decode(1).fixed_ps < far.fixed_ps


def test_speedup_divides_everything() -> None:
    """Emulation at 10 times real time would run at some other pace."""
    assert model(speedup=10).step_ps(1, 50) == model().step_ps(1, 50) // 10


def test_many_steps_are_one_sum() -> None:
    """A leap of the simulator would end elsewhere than single steps do."""
    decode = model().decode(3)
    single = [model().step_ps(3, 30 + 3 * n) for n in range(1, 8)]
    assert decode.total_ps(30, 7) == sum(single)


def test_curves_do_not_fall_beyond_what_was_measured() -> None:
    """A noisy last pair of knots would make huge steps free."""
    assert [Curve((1, 3), (10, 30)).at(n) for n in (0, 1, 2, 3, 5)] == [10, 10, 20, 30, 50]
    assert Curve((1, 3), (30, 10)).at(100) == 10
    assert Curve((7,), (30,)).at(100) == 30


@pytest.mark.parametrize(
    ("shape", "stages", "nodes", "field"),
    [
        ("tp4", (), 1, "parallelism"),
        ("tp1pp2", (4,), 1, "stages"),
        ("tp1pp2", (3, 2), 1, "stages"),
        ("tp1pp2", (4, 0), 1, "stages"),
        ("tp1pp5", (), 1, "pp"),
        ("tp2", (), 3, "nodes"),
        ("tp2", (), 0, "nodes"),
    ],
)
def test_shapes_that_cannot_be_are_refused(
    shape: str, stages: tuple[int, ...], nodes: int, field: str
) -> None:
    """A plan would be priced with times that nobody measured."""
    with pytest.raises(ConfigInvalid) as caught:
        model(shape, stages=stages, nodes=nodes)
    assert caught.value.field == field


@pytest.mark.parametrize("speedup", [0.0, -1.0, float("nan"), float("inf")])
def test_a_speedup_must_be_a_pace(speedup: float) -> None:
    """Steps of no time would keep a simulation at one instant for ever."""
    with pytest.raises(ConfigInvalid, match="speedup"):
        model(speedup=speedup)


def test_layers_are_split_evenly() -> None:
    """The default split would have a needlessly long stage."""
    assert even_stages(80, 4) == (20, 20, 20, 20)
    assert even_stages(10, 4) == (3, 3, 2, 2)


def test_grouped_heads_are_in_the_profile() -> None:
    """The step model takes attention as measured for its tp; facts of heads must not change it."""
    profile = small_profile()
    facts = msgspec.structs.replace(profile.model_facts, kv_heads=4)
    other = msgspec.structs.replace(profile, model_facts=facts)
    shape = Parallelism(tp=2)
    assert step_model(other, small_gpu(), shape).decode(5) == step_model(
        profile, small_gpu(), shape
    ).decode(5)
