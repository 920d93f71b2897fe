"""Examples as people read them: a laid-out row as JSON, or as labelled lines of styled text.

An objective whose examples mean more than tokens and targets says so itself, in `readable(row,
reader)`: it returns Lines made with the Reader and, where they fit, with `masked`, `generated`
and `members` below. Everybody else is shown by the form of their examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from objectives.show_reader import Lines, Reader, Runs, visible
from t5like.data.examples import Aligned, Members, Seq2Seq
from t5like.data.layout import FLAGS


def laid_out(example: Any, pipeline: Any) -> dict[str, np.ndarray]:
    """The example alone in a row: {feature: [L]} ([M, L] of members), as in a batch."""
    return {name: array[0] for name, array in pipeline.lay_out([[example]]).items()}


def reader_for(drawn: Any, vocabulary: Any) -> Reader:
    """A Reader that knows the tokens which the example's objective named."""
    return Reader(vocabulary, drawn.component.objective.named_tokens)


def as_json(drawn: Any, row: Mapping[str, np.ndarray], vocabulary: Any) -> dict[str, Any]:
    """{"index", "objective", "window", "features", "text"} of one t5like.data.pipeline.Drawn.

    A text is a string, of members a list of strings; tokens that the objective names (mode
    tokens) read as their names.
    """
    reader = reader_for(drawn, vocabulary)
    texts: dict[str, Any] = {"window": reader.text(drawn.record.tokens)}
    for name in (name for name in row if name.endswith("_tokens")):
        rows = members(row) if has_members(row) else [row]
        read = [reader.text(one[name][real(one, name.partition("_")[0])]) for one in rows]
        texts[name] = read if has_members(row) else read[0]
    return {
        "index": drawn.index,
        "objective": drawn.component.name,
        "window": drawn.record.tokens.tolist(),
        "features": {name: array.tolist() for name, array in row.items()},
        "text": texts,
    }


def as_lines(drawn: Any, row: Mapping[str, np.ndarray], vocabulary: Any) -> Lines:
    """The window, then what the model sees and must say."""
    reader = reader_for(drawn, vocabulary)
    own = drawn.component.objective.readable(row, reader)
    shown = by_form(drawn.example, row, reader) if own is None else own
    window = reader.runs(drawn.record.tokens, _window_style(drawn, reader))
    if _plain(window) == "".join(_plain(runs) for _, runs in shown):
        return shown  # the window itself, as a causal or a prefix language model has it
    return [("window", window), *shown]


def by_form(example: Any, row: Mapping[str, np.ndarray], reader: Reader) -> Lines:
    """Lines of a laid-out example, by what kind of example it is."""
    if isinstance(example, Members):
        return [
            (f"{m}. {label}", runs)
            for m, one in enumerate(members(row), 1)
            for label, runs in masked(one, reader)
        ]
    return masked(row, reader) if isinstance(example, Aligned) else generated(row, reader)


def masked(row: Mapping[str, np.ndarray], reader: Reader) -> Lines:
    """Of an Aligned example: the text as seen, and the tokens asked for in their places."""
    stack = "encoder" if "encoder_input_tokens" in row else "decoder"
    slots = real(row, stack)
    seen, wanted, weights = (
        row[f"{stack}_{name}"][slots] for name in ("input_tokens", "target_tokens", "loss_weights")
    )

    def style(i: int) -> str:
        if not weights[i]:
            return "given"
        if seen[i] == reader.vocabulary.mask_id:
            return "mask"
        return "kept" if seen[i] == wanted[i] else "random"

    says: Runs = []
    for asked, run in itertools.groupby(range(len(wanted)), key=lambda i: weights[i] > 0):
        text = visible(reader.text(wanted[list(run)])) if asked else " · "
        says.append((text, "target" if asked else "quiet"))
    lines = [(f"{stack} sees", reader.runs(seen, style))]
    return [*lines, (f"{stack} says", says)] if weights.any() else lines


def generated(row: Mapping[str, np.ndarray], reader: Reader) -> Lines:
    """Of a Seq2Seq example: what is given, in an encoder or as a prefix, and what is predicted."""
    slots = real(row, "decoder")
    targets = row["decoder_target_tokens"][slots]
    if "encoder_input_tokens" in row:
        inputs = row["encoder_input_tokens"][real(row, "encoder")]
        label, split = "encoder sees", 0
    else:
        asked = row["decoder_loss_weights"][slots] > 0
        split = int(asked.argmax()) if asked.any() else len(asked)
        inputs, targets = targets[:split], targets[split:]
        both_ways = FLAGS in row and row[FLAGS][slots].any()
        label = f"prefix (seen {'both ways' if both_ways else 'from the left'})"
    lines = [(label, reader.runs(inputs, "given"))] if len(inputs) else []
    spans = bool(reader.sentinel_numbers(inputs))
    if not len(inputs):  # spans that are taken out of a text and told behind it (CodeGen2)
        numbers = reader.sentinel_numbers(targets)
        spans = len(set(numbers)) < len(numbers)
    return [*lines, ("decoder says", reader.runs(targets, "target", spans=spans))]


def has_members(row: Mapping[str, np.ndarray]) -> bool:
    """Whether a row is [M, L], the members of one example."""
    return next(iter(row.values())).ndim == 2


def members(row: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """{feature: [M, L]} -> M times {feature: [L]}."""
    count = len(next(iter(row.values())))
    return [{name: array[m] for name, array in row.items()} for m in range(count)]


def real(row: Mapping[str, np.ndarray], stack: str) -> np.ndarray:
    """bool [L]: the slots of a stack that are not padding."""
    return row[f"{stack}_segment_ids"] > 0


def _plain(runs: Runs) -> str:
    return "".join(text for text, style in runs if style != "special")


def _window_style(drawn: Any, reader: Reader) -> str | Callable[[int], str]:
    """Where the window's spans or predicted tokens lie in it, if they can be found."""
    window, example = drawn.record.tokens, drawn.example
    if isinstance(example, Aligned) and np.array_equal(example.targets, window):
        return lambda i: "target" if example.weights[i] else "quiet"
    if not isinstance(example, Seq2Seq):
        return "quiet"
    filled = _fill(example, reader)
    if [token for token, _ in filled] != window.tolist():
        return "quiet"
    return lambda i: filled[i][1]


def _fill(example: Seq2Seq, reader: Reader) -> list[tuple[int, str]]:
    """(token, style) of the inputs, what the targets say for each sentinel, and what they add."""
    spans: dict[int, list[int]] = {}
    rest: list[int] = []
    at = rest
    for token in example.targets.tolist():
        if reader.number(token) is not None:
            at = spans.setdefault(reader.number(token), [])
        elif token != reader.vocabulary.eos_id:
            at.append(token)
    filled = []
    for token in example.inputs.tolist():
        number = reader.number(token)
        if number is not None:
            filled += [(t, f"span {number}") for t in spans.get(number, ())]
        elif token not in reader.names and token != reader.vocabulary.eos_id:
            filled.append((token, "quiet"))
    return filled + [(token, "target") for token in rest]
