"""Masks that hypothesis draws: any, and any two of them joined."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import HealthCheck, settings, strategies as st

from kernels import masks

# A drawn mask is over 6 units of slots; its blocks are 2 units.
UNITS = 6


def drawn_ids(draw, unit):
    row = st.lists(st.integers(0, 2), min_size=UNITS, max_size=UNITS)
    ids = np.array(draw(st.lists(row, min_size=2, max_size=2)), np.int32)
    return np.repeat(ids, unit, axis=1)


@st.composite
def simple_masks(draw, unit):
    kind = draw(st.integers(0, 9))
    few, side = st.integers(0, 3), st.integers(0, 3 * unit)
    if kind == 0:
        return masks.Causal(offset=draw(st.integers(-2 * unit, 2 * unit)))
    if kind == 1:
        return masks.Prefix(drawn_ids(draw, unit))
    if kind == 2:
        return masks.Segments(drawn_ids(draw, unit), drawn_ids(draw, unit))
    if kind == 3:
        return masks.SlidingWindow(draw(st.none() | side), draw(st.none() | side))
    if kind == 4:
        bits = draw(st.integers(0, 2 ** (UNITS * UNITS) - 1))
        flags = np.array([bits >> i & 1 for i in range(UNITS * UNITS)], bool)
        return masks.Dense(np.kron(flags.reshape(UNITS, UNITS), np.ones((unit, unit), bool)))
    if kind == 5:
        return masks.Dilated(draw(few), draw(few), draw(st.integers(1, 3 * unit)))
    if kind == 6:
        return masks.GlobalTokens(
            flags=drawn_ids(draw, unit), rows=draw(st.booleans()), columns=draw(st.booleans())
        )
    if kind == 7:
        counts = [draw(st.integers(0, 1)) for _ in range(2)]
        return masks.BigBird(2 * unit, 1, *counts, causal=draw(st.booleans()))
    if kind == 8:
        columns = draw(st.lists(st.integers(-1, 2), min_size=6, max_size=6))
        return masks.BlockIndex(np.array(columns).reshape(1, 1, 3, 2), 2 * unit, 2 * unit)
    return masks.Full()


@st.composite
def drawn_masks(draw, unit=1):
    """Any mask of the host's, over 6 * unit slots of queries and of keys and 2 rows."""
    left, right = draw(simple_masks(unit)), draw(simple_masks(unit))
    join = draw(st.sampled_from(["left", "not", "and", "or"]))
    return {"left": left, "not": ~left, "and": left & right, "or": left | right}[join]


quick = functools.partial(
    settings,
    deadline=None,
    # Classes that inherit a property run it each for itself.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
