"""Texts with some units hidden, behind a mask for each unit or for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from t5like.data.examples import Aligned
from t5like.data.lexicon import Lexicon, Units


def contiguous(
    tokens: np.ndarray,
    documents: np.ndarray | None,
    units: Units,
    hidden: np.ndarray,
    mask_id: int,
) -> Aligned:
    """Hides units behind as many masks as they have tokens, which are asked for in their places.

    Args:
      tokens: int32 [L].
      documents: int32 [L], or None where there is one.
      units: of the tokens.
      hidden: int64 [M], numbers of the units to hide, rising.
    """
    places, _ = _members(units.starts[hidden], units.sizes[hidden])
    seen, weights = tokens.copy(), np.zeros(len(tokens), np.float32)
    seen[places] = mask_id
    weights[places] = 1.0
    return Aligned(seen, tokens, weights, documents=documents)


def explicit(
    tokens: np.ndarray,
    documents: np.ndarray | None,
    units: Units,
    hidden: np.ndarray,
    mask_id: int,
    queries: np.ndarray,
) -> Aligned:
    """Hides each unit behind one mask, and asks for its tokens after the text.

    The text comes first, L' slots of it; a hidden unit is one slot. Then comes a query for each
    token of each hidden unit (Xiao et al. 2021, section 3.3): x1 [x2 x3] x4 [x5] x6, of which
    what is in brackets is hidden, becomes x1 [M] x4 [M] x6 | [M1] [M2] [M1].

    Args:
      tokens, documents, units, hidden: see `contiguous`.
      queries: int32 [3], ids of [M1], [M2] and [M3]; empty: there are no queries.

    Returns:
      An example of L' + Q slots. Targets are the fine-grained tokens (at a mask the unit's first),
      weights 1 at masks and queries. Queries have their mask's position, others the slot's.
      Features: "isolated", 1 at queries; "ngram_targets", at masks the unit's id in <V_F, V_N>,
      elsewhere 0; "unit_starts", 1 at the first slot of each unit of the text, hidden or not.
    """
    starts, sizes = units.starts[hidden], units.sizes[hidden]
    kept = np.ones(len(tokens), bool)
    for place in (1, 2):
        kept[starts[sizes > place] + place] = False
    slots = kept.cumsum() - 1  # of the tokens, in the shorter text
    masks, main = slots[starts], int(kept.sum())
    asked_sizes = sizes if len(queries) else np.zeros_like(sizes)
    asked, places = _members(starts, asked_sizes)

    source = np.concatenate([kept.nonzero()[0], asked])
    targets, length = tokens[source], len(source)
    seen, weights = targets.copy(), np.zeros(length, np.float32)
    seen[masks], seen[main:] = mask_id, queries[places]
    weights[masks] = weights[main:] = 1.0
    positions = np.arange(length, dtype=np.int32)
    positions[main:] = np.repeat(masks, asked_sizes)
    isolated, ngram_targets, unit_starts = np.zeros((3, length), np.int32)
    isolated[main:] = 1
    ngram_targets[masks] = units.ids[hidden]
    unit_starts[slots[units.starts]] = 1
    return Aligned(
        seen,
        targets,
        weights,
        positions=positions,
        documents=None if documents is None else documents[source],
        features={
            "isolated": isolated,
            "ngram_targets": ngram_targets,
            "unit_starts": unit_starts,
        },
    )


def _members(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tokens of units, and their places within them, from 0; both int64."""
    places = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    return np.repeat(starts, sizes) + places, places


# --- as people read them ---------------------------------------------------------------------


def readable(
    row: Mapping[str, np.ndarray], stack: str, reader: Any, lexicon: Lexicon
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Lines of an explicit example: units, what is seen, identities, queries with their answers.

    Args:
      row: {feature: [L]} of one example.
      stack: "encoder" or "decoder".
      reader, and what is returned: see objectives/show.py.
    """
    real = row[f"{stack}_segment_ids"] > 0
    seen, targets, weights, positions, ids = (
        row[f"{stack}_{name}"][real]
        for name in ("input_tokens", "target_tokens", "loss_weights", "positions", "ngram_targets")
    )
    main = np.flatnonzero(row.get(f"{stack}_isolated", np.zeros_like(real))[real] == 0)
    masks = main[weights[main] > 0]
    texts = [lexicon.tokens(int(ids[i])) if weights[i] else targets[[i]] for i in main]
    text = np.concatenate(texts) if texts else targets
    sizes = np.array([len(part) for part in texts], np.int64)
    starts_of_masks = set((sizes.cumsum() - sizes)[weights[main] > 0].tolist())

    def read(tokens: np.ndarray) -> str:
        return reader.text(tokens).replace("\n", "⏎")

    units, said, spelt = [], [], []
    cut = lexicon.cut(text)
    for start, size in zip(cut.starts.tolist(), cut.sizes.tolist(), strict=True):
        style = "target" if start in starts_of_masks else "given"
        units += [(read(text[start : start + size]), style), ("│", "quiet")]
    for mask in masks.tolist():
        said += [(f" {mask}:", "quiet"), (read(lexicon.tokens(int(ids[mask]))), "target")]
    for query in range(len(main), len(seen)):
        spelt += [(f" {positions[query]}:", "quiet"), *reader.runs(seen[[query]], "given")]
        spelt += [(read(targets[[query]]), "target")]
    lines = [("units", units[:-1]), (f"{stack} sees", reader.runs(seen[main], _style(weights)))]
    lines += [("names units", said)] if said else []
    return [*lines, ("spells them", spelt)] if spelt else lines


def _style(weights: np.ndarray):
    return lambda i: "mask" if weights[i] else "given"
