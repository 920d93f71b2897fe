"""Who sees whom in a laid-out row, as a small picture of block characters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from objectives.show import has_members, members, real
from objectives.show_reader import Lines, Reader, Runs, visible

# What a line of text shows of two queries: neither, the upper, the lower or both see the key.
_BLOCKS = np.array([" ", "▀", "▄", "█"])
# Columns that a line's label may take.
_LABEL = 12


def masks_of(row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Attention -> bool [Q, K], true where the query sees the key; padding slots are left out.

    Args:
      row: {feature: [L]} as objectives.show.laid_out gives it, of one member.

    Returns:
      "encoder" and "decoder" for self-attention, "decoder to encoder" for cross-attention, as
      far as the row has them.
    """
    from t5like.models import visibility

    batch = {name: array[None] for name, array in row.items()}
    stacks = [stack for stack in ("encoder", "decoder") if f"{stack}_segment_ids" in row]
    masks = {stack: (visibility.self_mask(batch, stack), stack, stack) for stack in stacks}
    if len(stacks) == 2:
        masks["decoder to encoder"] = (visibility.cross_mask(batch), "decoder", "encoder")
    found = {}
    for name, (mask, query, key) in masks.items():
        lengths = (len(row[f"{stack}_segment_ids"]) for stack in (query, key))
        dense = np.asarray(mask.dense(*lengths))[0, 0]
        found[name] = dense[real(row, query)][:, real(row, key)]
    return found


def as_json(row: Mapping[str, np.ndarray]) -> Any:
    """The same for JSON: for each query a string of 0 and 1. Of members, a list of such."""
    if has_members(row):
        return [as_json(one) for one in members(row)]
    return {
        name: ["".join(line) for line in np.where(mask, "1", "0").tolist()]
        for name, mask in masks_of(row).items()
    }


def pictures(row: Mapping[str, np.ndarray], reader: Reader, width: int = 64) -> Lines:
    """(title, picture) for each attention of a row.

    A picture has a column for each key and half a line for each query, or for each group of them
    where a row has more than `width` slots; a mark means that some query of the group sees some
    key. Above stand the keys' first letters, and the last digits of the segments where there are
    several; on the left the queries. Lines of queries that are asked for something have the style
    "target". Where everybody sees everybody there is no picture. Members have theirs one by one.
    """
    if has_members(row):
        each = enumerate((pictures(one, reader, width) for one in members(row)), 1)
        return [(f"{m}. {title}", runs) for m, lines in each for title, runs in lines]
    found = []
    for name, mask in masks_of(row).items():
        query, _, key = name.partition(" to ")
        queries, keys = (_side(row, stack, width) for stack in (query, key or query))
        whom = f"the {key}'s {len(keys.tokens)}" if key else "each other"
        title = f"the {query}'s {len(queries.tokens)} slots see {whom}"
        if mask.all():
            found.append((f"{title}, all of them", []))
            continue
        title += " (queries downwards, keys across"
        if queries.group * keys.group > 1:
            title += f"; a mark is {queries.group} by {keys.group} slots"
        found.append((title + ")", _picture(_grouped(mask, queries, keys), queries, keys, reader)))
    return found


class _Side(NamedTuple):
    """One side of a picture: its n slots, and how many of them share a mark."""

    tokens: np.ndarray
    segments: np.ndarray
    asked: np.ndarray
    group: int


def _side(row: Mapping[str, np.ndarray], stack: str, width: int) -> _Side:
    slots = real(row, stack)
    asked = row.get(f"{stack}_loss_weights", np.zeros(len(slots)))[slots] > 0
    tokens, segments = (row[f"{stack}_{x}"][slots] for x in ("input_tokens", "segment_ids"))
    return _Side(tokens, segments, asked, -(-len(tokens) // width))


def _grouped(mask: np.ndarray, queries: _Side, keys: _Side) -> np.ndarray:
    """bool [Q, K] -> [Q / group, K / group]: whether any of a group's pairs is true."""
    rows = np.arange(0, mask.shape[0], queries.group)
    columns = np.arange(0, mask.shape[1], keys.group)
    return np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1)


def _picture(marks: np.ndarray, queries: _Side, keys: _Side, reader: Reader) -> Runs:
    upper, lower = marks[::2], np.zeros_like(marks[::2])
    lower[: len(marks) // 2] = marks[1::2]
    runs = _head(queries, keys, reader)
    for i, line in enumerate(_BLOCKS[upper + 2 * lower]):
        slots = slice(2 * i * queries.group, 2 * (i + 1) * queries.group)
        label = _margin(queries, slots.start) + _label(queries.tokens[slots], reader)
        runs.append((label.ljust(len(_margin(queries, 0)) + _LABEL + 1), "quiet"))
        runs.append(("".join(line) + "\n", "target" if queries.asked[slots].any() else "given"))
    return runs


def _label(tokens: np.ndarray, reader: Reader) -> str:
    text = "".join(text for text, _ in reader.runs(tokens, "quiet"))
    text = visible(text).replace("<extra_id_", "<")
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


def _head(queries: _Side, keys: _Side, reader: Reader) -> Runs:
    """What stands above the columns: digits of segments, and the keys' first letters."""
    indent = " " * (len(_margin(queries, 0)) + _LABEL + 1)
    firsts = range(0, len(keys.tokens), keys.group)
    runs: Runs = []
    if np.ptp(keys.segments):
        runs.append((indent + "".join(_margin(keys, i)[0] for i in firsts) + "\n", "quiet"))
    runs.append((indent, "quiet"))
    for i in firsts:
        ((text, style),) = reader.runs(keys.tokens[i : i + 1], "quiet")
        name, _, number = style.partition(" ")
        letters = number if name == "sentinel" else visible(text).lstrip(" <[|")
        runs.append((letters[:1] or " ", style))
    return [*runs, ("\n", "quiet")]


def _margin(side: _Side, slot: int) -> str:
    """The last digit of a slot's segment and a space; nothing where there is one segment."""
    return f"{side.segments[slot] % 10} " if np.ptp(side.segments) else ""
