import threading

import pytest

from kdjax.data.prefetch import ahead


def names():
    return [thread.name for thread in threading.enumerate()]


def counting(made, closed, fail_at=None):
    try:
        for i in range(10_000):
            if i == fail_at:
                raise RuntimeError(f"at {i}")
            made.append(i)
            yield i
    finally:
        closed.append(True)


def test_items_come_in_order_and_closing_stops_the_thread():
    made, closed = [], []
    items = ahead(counting(made, closed), 2)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert "kdjax-data" in names()
    items.close()
    assert "kdjax-data" not in names()
    assert closed == [True]
    assert len(made) <= 5 + 2 + 1


def test_an_error_comes_where_its_item_would():
    items = ahead(counting([], [], fail_at=3), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="at 3"):
        next(items)
    assert "kdjax-data" not in names()


def test_the_end_is_the_end():
    assert list(ahead((i for i in range(5)), 3)) == [0, 1, 2, 3, 4]
