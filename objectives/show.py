"""Examples as people read them: the laid-out row as JSON, or as styled runs of text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5like.data.examples import Aligned, Example

# (text, style name) in reading order; style names are the keys of STYLES.
Runs = list[tuple[str, str]]

# What each style marks, for a legend.
STYLES = {
    "given": "given",
    "target": "predicted",
    "sentinel": "stands for a span",
    "special": "special token",
    "mask": "hidden",
    "random": "replaced at random",
    "kept": "predicted though shown",
    "quiet": "",
}


def laid_out(example: Example, pipeline: Any) -> dict[str, np.ndarray]:
    """The example alone in a row: {feature: [L]}, as the pipeline would lay it out."""
    return {name: array[0] for name, array in pipeline.lay_out([[example]]).items()}


def as_json(drawn: Any, row: Mapping[str, np.ndarray], vocabulary: Any) -> dict[str, Any]:
    """{"index", "objective", "window", "features", "text"} of one t5like.data.pipeline.Drawn."""
    texts = {
        name: vocabulary.decode(tokens[_real(row, name)])
        for name, tokens in row.items()
        if name.endswith("_tokens")
    }
    return {
        "index": drawn.index,
        "objective": drawn.component.name,
        "window": drawn.record.tokens.tolist(),
        "features": {name: array.tolist() for name, array in row.items()},
        "text": {"window": vocabulary.decode(drawn.record.tokens), **texts},
    }


def as_runs(drawn: Any, row: Mapping[str, np.ndarray], vocabulary: Any) -> list[tuple[str, Runs]]:
    """Labelled lines of styled text: the window, then what the model sees and must say."""
    reader = _Reader(vocabulary)
    lines = [("window", reader.runs(drawn.record.tokens, lambda i: "quiet"))]
    if isinstance(drawn.example, Aligned):
        return lines + _aligned(row, reader)
    if "encoder_input_tokens" in row:
        inputs = row["encoder_input_tokens"][_real(row, "encoder_input_tokens")]
        targets = row["decoder_target_tokens"][_real(row, "decoder_target_tokens")]
        return [
            *lines,
            ("encoder sees", reader.runs(inputs, lambda i: "given")),
            ("decoder says", reader.runs(targets, lambda i: "target")),
        ]
    return lines + _one_row(row, reader)


def _one_row(row: Mapping[str, np.ndarray], reader: _Reader) -> list[tuple[str, Runs]]:
    """A decoder's row: what is given, then what is predicted."""
    real = _real(row, "decoder_target_tokens")
    targets = row["decoder_target_tokens"][real]
    asked = row["decoder_loss_weights"][real] > 0
    both_ways = int(row["decoder_causal_attention"][real].sum())
    split = int(asked.argmax()) if asked.any() else len(asked)
    lines = []
    if split:
        attention = "seen both ways" if both_ways else "seen from the left"
        lines.append((f"prefix ({attention})", reader.runs(targets[:split], lambda i: "given")))
    return [*lines, ("decoder says", reader.runs(targets[split:], lambda i: "target"))]


def _aligned(row: Mapping[str, np.ndarray], reader: _Reader) -> list[tuple[str, Runs]]:
    """Masked language modelling: the text as seen, and the tokens asked for in their places."""
    stack = "encoder" if "encoder_input_tokens" in row else "decoder"
    real = _real(row, f"{stack}_input_tokens")
    seen, wanted, weights = (
        row[f"{stack}_{name}"][real] for name in ("input_tokens", "target_tokens", "loss_weights")
    )

    def style(i: int) -> str:
        if not weights[i]:
            return "given"
        if seen[i] == reader.vocabulary.mask_id:
            return "mask"
        return "kept" if seen[i] == wanted[i] else "random"

    says: Runs = []
    for asked, run in itertools.groupby(range(len(wanted)), key=lambda i: weights[i] > 0):
        text = reader.vocabulary.decode(wanted[list(run)]) if asked else " · "
        says.append((text, "target" if asked else "quiet"))
    return [(f"{stack} sees", reader.runs(seen, style)), (f"{stack} says", says)]


def _real(row: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """bool [L]: the slots of a feature that are not padding."""
    return row[f"{name.partition('_')[0]}_segment_ids"] > 0


class _Reader:
    """Turns ids into text run by run, so that a run reads as it does within the whole."""

    def __init__(self, vocabulary: Any):
        self.vocabulary = vocabulary
        self._sentinels = set(vocabulary.sentinels.tolist())
        self._special = set(vocabulary.special_ids.tolist()) - self._sentinels

    def runs(self, ids: np.ndarray, style: Callable[[int], str]) -> Runs:
        """Runs of ids [n] that share a style; sentinels and special tokens stand alone."""
        styles = [self._style(int(token), style(i)) for i, token in enumerate(ids)]
        runs: Runs = []
        start = 0
        for stop in range(1, len(ids) + 1):
            alone = styles[start] in ("sentinel", "special")
            if stop == len(ids) or styles[stop] != styles[start] or alone:
                runs.append((self._text(ids, start, stop, styles[start]), styles[start]))
                start = stop
        return runs

    def _style(self, token: int, style: str) -> str:
        if style in ("mask", "random", "kept"):
            return style
        if token in self._sentinels:
            return "sentinel"
        return "special" if token in self._special else style

    def _text(self, ids: Sequence[int], start: int, stop: int, style: str) -> str:
        if style in ("sentinel", "special", "mask"):
            return "".join(f"{self.vocabulary.piece(int(i))} " for i in ids[start:stop])
        before, through = (self.vocabulary.decode(ids[:end]) for end in (start, stop))
        if through.startswith(before):
            return through[len(before) :]
        return self.vocabulary.decode(ids[start:stop])
