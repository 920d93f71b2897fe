"""Requests in a few shapes."""

from __future__ import annotations

from hypothesis import given, strategies as st

from t5like.inference.batching import batches, bucket


def test_bucket_known_values():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 1025)] == [1, 1, 2, 4, 4, 8, 2048]
    assert bucket(3, minimum=16) == 16


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=40),
       st.integers(1, 9))  # fmt: skip
def test_every_request_comes_once_in_a_shape_that_holds_it(lengths, batch_size):
    seen = []
    for shape, rows, count in batches(lengths, batch_size):
        assert count <= batch_size
        assert len(rows) == bucket(count)
        assert set(rows[count:]) <= {rows[count - 1]}
        seen += rows[:count].tolist()
        for row in rows:
            for part, room in zip(lengths[row], shape, strict=True):
                assert part <= room
                assert room == bucket(part, 16)
    assert sorted(seen) == list(range(len(lengths)))
