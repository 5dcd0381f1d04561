import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax.nn import visibility
from cola_jax.nn.visibility import BlockPlan, Place, visible

# (sizes of blocks, copies, segments of a copy, who sees whom: a line for each query, # where it sees the key)
ONE_DOCUMENT = """
    ## . .. | .. . ..
    ## . .. | .. . ..
    ## # .. | .. . ..
    ## # ## | .. . ..
    ## # ## | .. . ..

    .. . .. | ## . ..
    .. . .. | ## . ..
    ## . .. | .. # ..
    ## # .. | .. . ##
    ## # .. | .. . ##
"""
TWO_DOCUMENTS = """
    #. . .. | .. . ..
    .# . .. | .. . ..
    .# # .. | .. . ..
    #. . #. | .. . ..
    .# # .# | .. . ..

    .. . .. | #. . ..
    .. . .. | .# . ..
    .# . .. | .. # ..
    #. . .. | .. . #.
    .# # .. | .. . .#
"""
TWO_NOISY_COPIES = """
    # .. | . .. | . ..
    # ## | . .. | . ..
    # ## | . .. | . ..

    . .. | # .. | . ..
    # .. | . ## | . ..
    # .. | . ## | . ..

    . .. | . .. | # ..
    # .. | . .. | . ##
    # .. | . .. | . ##
"""
TABLES = [
    ((2, 1, 2), 2, (0, 0, 0, 0, 0), ONE_DOCUMENT),
    ((2, 1, 2), 2, (0, 1, 1, 0, 1), TWO_DOCUMENTS),
    ((1, 2), 3, (5, 5, 5), TWO_NOISY_COPIES),
]


def row(sizes, copies, segments, xp) -> Place:
    block = np.repeat(np.arange(len(sizes)), sizes)
    fields = (np.repeat(np.arange(copies), len(block)), np.tile(block, copies), np.tile(segments, copies))
    return Place(*(xp.asarray(field) for field in fields))


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(("sizes", "copies", "segments", "table"), TABLES)
def test_who_sees_whom_is_as_written_here(sizes, copies, segments, table, xp):
    wanted = [[mark == "#" for mark in line if mark in "#."] for line in table.split("\n") if line.strip()]
    place = row(sizes, copies, segments, xp)
    seen = visible(place, place)
    assert isinstance(seen, np.ndarray) == (xp is np)
    np.testing.assert_array_equal(seen, wanted)


def test_queries_and_keys_may_be_other_positions_of_a_batch():
    place = row(*TABLES[1][:3], np)
    some = Place(*(x[None, 3:7] for x in place))
    documents = Place(place.copy[None], place.block[None], np.stack([place.segment, np.zeros(10, int)]))
    seen, one_document = visible(some, documents), row(*TABLES[0][:3], np)
    np.testing.assert_array_equal(seen[0], visible(place, place)[3:7])
    others = visible(one_document, one_document)[3:7] & (place.segment[3:7, None] == 0)
    np.testing.assert_array_equal(seen[1], others)


def test_the_clean_copy_alone_is_block_causal_or_causal():
    np.testing.assert_array_equal(visibility.block_causal(BlockPlan.equal(1), 5)[0], np.tri(5, dtype=bool))
    pairs = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(visibility.block_causal(BlockPlan.equal(2), 5)[0], np.array(pairs, bool))
    uneven = [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(visibility.block_causal(BlockPlan.of_sizes((1, 3, 7)), 5)[0], np.array(uneven, bool))


def test_of_a_cache_every_query_sees_what_is_held():
    held = np.array([[True, False, True, True], [False] * 4])
    seen = visibility.of_cache(jnp.asarray(held), 3)
    np.testing.assert_array_equal(seen, np.repeat(held[:, None], 3, axis=1))


PLANS = [  # plan, length, block of each position
    (BlockPlan.equal(3), 8, [0, 0, 0, 1, 1, 1, 2, 2]),
    (BlockPlan.equal(1), 3, [0, 1, 2]),
    (BlockPlan.equal(5), 3, [0, 0, 0]),
    (BlockPlan.of_sizes((2, 1, 4)), 7, [0, 0, 1, 2, 2, 2, 2]),
    (BlockPlan.of_sizes((2, 1, 4)), 5, [0, 0, 1, 2, 2]),
    (BlockPlan.of_sizes((2, 1, 4)), 3, [0, 0, 1]),
]


@pytest.mark.parametrize(("plan", "length", "ids"), PLANS)
def test_a_plan_says_the_blocks_of_a_sequence(plan, length, ids):
    starts = [ids.index(block) for block in range(ids[-1] + 1)]
    sizes = [ids.count(block) for block in range(ids[-1] + 1)]
    assert plan.ids(length).tolist() == ids
    assert plan.starts(length).tolist() == starts
    assert plan.block_sizes(length).tolist() == sizes
    assert plan.count(length) == len(sizes)
    offsets = [position - starts[block] for position, block in enumerate(ids)]
    positions = np.arange(length)
    for xp, ask in (
        (np, lambda method: method(positions)),
        (jnp, lambda method: jax.jit(method)(jnp.asarray(positions))),
    ):
        block, offset = ask(plan.id_of), ask(plan.offset_of)
        assert isinstance(block, np.ndarray) == isinstance(offset, np.ndarray) == (xp is np)
        np.testing.assert_array_equal(block, ids)
        np.testing.assert_array_equal(offset, offsets)


def test_stretches_of_equal_blocks():
    assert BlockPlan.equal(4).runs(10) == [(0, 10, 4)]
    plan = BlockPlan.of_sizes((2, 2, 5, 1, 1, 1))
    assert plan.runs(12) == [(0, 4, 2), (4, 9, 5), (9, 12, 1)]
    assert plan.runs(7) == [(0, 4, 2), (4, 7, 5)]
    assert plan.runs(4) == [(0, 4, 2)]


def test_values_are_a_block_s_where_there_is_one_for_each():
    plan = BlockPlan.of_sizes((2, 1, 3))
    assert plan.stretches(6, 3) == (2, 1, 3)
    assert plan.stretches(6, 6, copies=2) == (2, 1, 3, 2, 1, 3)
    assert plan.stretches(6, 1) is plan.stretches(6, 6) is BlockPlan.equal(2).stretches(6, 3) is None


def test_where_a_sequence_ends_with_a_block():
    assert [n for n in range(1, 8) if BlockPlan.equal(3).is_whole(n)] == [3, 6]
    assert [n for n in range(1, 8) if BlockPlan.of_sizes((2, 1, 4)).is_whole(n)] == [2, 3, 7]


def test_plans_are_static_values():
    assert BlockPlan.of_sizes([2, 3]) == BlockPlan.of_sizes((2, 3))
    assert len({BlockPlan.equal(2), BlockPlan.equal(2), BlockPlan.of_sizes((2,)), BlockPlan.of_sizes((2, 2))}) == 3


@pytest.mark.parametrize("make", [lambda: BlockPlan.equal(0), lambda: BlockPlan.of_sizes(()), BlockPlan])
def test_a_plan_has_blocks_of_at_least_one_position(make):
    with pytest.raises(ValueError, match="block sizes .*must be"):
        make()


def test_a_sequence_must_not_be_longer_than_its_blocks():
    with pytest.raises(ValueError, match="8 positions: .* but hold 7"):
        BlockPlan.of_sizes((2, 1, 4)).ids(8)
