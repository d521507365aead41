import pytest

from kdjax.data.shards import Layout, lay_out, local_rows
from kdjax.errors import UserError


@pytest.mark.parametrize(
    ("batch_size", "most", "shards"),
    [
        (1, 64, 64),
        (4, 64, 64),
        (6, 64, 60),
        (64, 64, 64),
        (96, 64, 48),
        (128, 64, 64),
        (67, 64, 1),
        (8, 5, 4),
        (8, 9, 8),
    ],
)
def test_shards_depend_on_the_batch_alone(batch_size, most, shards):
    for count in (1, 2, 4):
        if batch_size % count == 0 and shards % count == 0:
            assert lay_out(batch_size, most, 0, count).shards == shards


@pytest.mark.parametrize(("batch_size", "most"), [(4, 64), (8, 9), (8, 4), (96, 64), (128, 64), (8, 8)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_no_shard_and_give_the_rows_of_one(batch_size, most, count):
    alone = lay_out(batch_size, most, 0, 1)
    several = [lay_out(batch_size, most, index, count) for index in range(count)]
    owned = [shard for layout in several for shard in layout.own]
    assert sorted(owned) == alone.own == list(range(alone.shards))
    for step in range(20):
        expanded = [
            [shard for layout in layouts for shard, rows in layout.turn(step).items() for _ in range(rows)]
            for layouts in (several, [alone])
        ]
        assert expanded[0] == expanded[1]
        assert len(expanded[0]) == batch_size


def test_every_shard_has_its_turn_equally_often():
    layout = Layout(4, 12)
    assert [list(layout.turn(step)) for step in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3]]
    assert Layout(8, 4, 1, 2).turn(5) == {2: 2, 3: 2}


def test_a_batch_that_does_not_split_names_the_nearest():
    with pytest.raises(UserError, match="batch_size 250 does not split over 8 processes; use 248 or 256"):
        lay_out(250, 64, 0, 8)
    with pytest.raises(UserError, match="use 8$"):
        local_rows(3, 0, 8)
    with pytest.raises(UserError, match="batch_size 96 over at most 64 data shards makes 48, .* 32 processes"):
        lay_out(96, 64, 0, 32)
