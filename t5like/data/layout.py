"""Examples -> the arrays a model reads. The only place that shifts, puts BOS, flags and packs.

The features and their names are those of seqio's feature converters, with three differences:
segment ids and positions are always there, padding is where the segment id is 0 (token 0 may be
a real token), and in a row that is not full the slot after the last example holds BOS, packed or
not (seqio repeats the last target there when it does not pack). Nothing is lost at padding slots:
their weight is 0. A decoder's `decoder_causal_attention`, 1 at slots that see each other both
ways, is there only where an objective can set it: without it the model knows before it runs that
no slot sees a later one, and leaves out that half of attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t5like.data.examples import Aligned, Example, Members, Seq2Seq

FEATURES = {
    "encoder": (
        "encoder_input_tokens",
        "encoder_target_tokens",
        "encoder_loss_weights",
        "encoder_segment_ids",
        "encoder_positions",
    ),
    "decoder": (
        "decoder_input_tokens",
        "decoder_target_tokens",
        "decoder_loss_weights",
        "decoder_segment_ids",
        "decoder_positions",
    ),
    "encoder_decoder": (
        "encoder_input_tokens",
        "encoder_segment_ids",
        "encoder_positions",
        "decoder_input_tokens",
        "decoder_target_tokens",
        "decoder_loss_weights",
        "decoder_segment_ids",
        "decoder_positions",
    ),
}

FLAGS = "decoder_causal_attention"


class LayoutError(ValueError):
    """An example does not fit its row or its architecture: an objective broke its bounds.

    Attributes:
      row, example: which one, in the rows given to `lay_out`.
      reason: what does not fit.
    """

    def __init__(self, row: int, example: int, reason: str):
        super().__init__(f"example {example} of row {row}: {reason}")
        self.row, self.example, self.reason = row, example, reason


def spec(
    architecture: str,
    batch_size: int,
    length: int,
    targets_length: int | None,
    features: Sequence[str] = (),
    members: int = 1,
    sees_ahead: bool = False,
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{feature: (shape, dtype)} of a batch: int32, what ends in "weights" float32.

    Args:
      features: names of further features of the stack that predicts, without its name.
      members: M; shapes are [B, L], or [B, M, L] where M is more than 1.
      sees_ahead: whether slots of a decoder-only model may see later ones: adds
        `decoder_causal_attention`.
    """
    decoder = targets_length if architecture == "encoder_decoder" else length
    stack = "encoder" if architecture == "encoder" else "decoder"
    flags = (FLAGS,) if sees_ahead and architecture == "decoder" else ()
    rows = (batch_size,) if members == 1 else (batch_size, members)
    return {
        name: (
            (*rows, decoder if name.startswith("decoder") else length),
            np.dtype(np.float32 if name.endswith("weights") else np.int32),
        )
        for name in (*FEATURES[architecture], *flags, *(f"{stack}_{name}" for name in features))
    }


def lay_out(
    rows: Sequence[Sequence[Example]],
    *,
    architecture: str,
    length: int,
    targets_length: int | None = None,
    bos_id: int,
    pad_id: int,
    attend_across_documents: bool = True,
    features: Sequence[str] = (),
    members: int = 1,
    sees_ahead: bool = False,
) -> dict[str, np.ndarray]:
    """Lays rows of examples out for an architecture.

    Args:
      rows: B rows of one or more examples each.
      architecture: "encoder", "decoder" or "encoder_decoder".
      length: tokens a row; of the encoder, if there are two.
      targets_length: tokens of an encoder_decoder's decoder row.
      bos_id: what a decoder reads first, at the start of every segment.
      pad_id: token id of the empty slots.
      attend_across_documents: False gives each document of an example its own segment id, the
        same one on both sides of an encoder_decoder.
      features, members, sees_ahead: see `spec`.

    Returns:
      {feature: [B, L] or [B, M, L]} as in `spec`. Positions count from 0 within each example.

    Raises:
      LayoutError: an example does not fit, or has slots that see later ones without `sees_ahead`.
        Nothing is ever cut.
    """
    shapes = spec(architecture, len(rows), length, targets_length, features, members, sees_ahead)
    batch = {
        name: np.full(shape, pad_id if name.endswith("tokens") else 0, dtype)
        for name, (shape, dtype) in shapes.items()
    }
    place = _place_members if members > 1 else {
        "encoder": _place_in_encoder,
        "decoder": _place_in_decoder,
        "encoder_decoder": _place_in_both,
    }[architecture]
    ramp = np.arange(max(length, targets_length or 0), dtype=np.int32)
    for r, examples in enumerate(rows):
        row = {name: array[r] for name, array in batch.items()}
        at, segment = (0, 0), 1
        for e, example in enumerate(examples):
            try:
                at, segment = place(
                    row, at, segment, example, ramp, bos_id, attend_across_documents
                )
            except _DoesNotFit as error:
                raise LayoutError(r, e, str(error)) from None
    return batch


class _DoesNotFit(Exception):
    pass


def _place_members(row, at, segment, example, ramp, bos_id, across):
    if not isinstance(example, Members) or "encoder_input_tokens" not in row:
        raise _DoesNotFit("only an encoder is trained on Members, and on nothing else with them")
    ends = [
        _place_in_encoder(
            {name: array[m] for name, array in row.items()},
            at, segment, member, ramp, bos_id, across,
        )
        for m, member in enumerate(example.members)
    ]  # fmt: skip
    starts, segments = zip(*ends, strict=True)
    return max(starts), max(segments)


def _place_in_encoder(row, at, segment, example, ramp, bos_id, across):
    if not isinstance(example, Aligned):
        raise _DoesNotFit("an encoder is trained on Aligned examples only")
    documents = None if across else example.documents
    slots = _claim(row["encoder_segment_ids"], at[0], len(example.tokens), "tokens")
    row["encoder_input_tokens"][slots] = example.tokens
    row["encoder_target_tokens"][slots] = example.targets
    row["encoder_loss_weights"][slots] = example.weights
    row["encoder_segment_ids"][slots] = _segments(segment, documents)
    row["encoder_positions"][slots] = _positions(example, ramp)
    _place_features(row, "encoder", slots, example)
    return (slots.stop, 0), segment + _count(documents)


def _place_in_decoder(row, at, segment, example, ramp, bos_id, across):
    if isinstance(example, Aligned):
        documents = None if across else example.documents
        slots = _claim(row["decoder_segment_ids"], at[0], len(example.tokens), "tokens")
        row["decoder_input_tokens"][slots] = example.tokens
        row["decoder_target_tokens"][slots] = example.targets
        row["decoder_loss_weights"][slots] = example.weights
        row["decoder_segment_ids"][slots] = _segments(segment, documents)
        row["decoder_positions"][slots] = _positions(example, ramp)
        _let_see_ahead(row, slots)
        _place_features(row, "decoder", slots, example)
        return (slots.stop, 0), segment + _count(documents)
    split, size = len(example.inputs), len(example.inputs) + len(example.targets)
    slots = _claim(row["decoder_segment_ids"], at[0], size, "inputs and targets")
    documents = None if across else _joined_documents(example)
    row["decoder_target_tokens"][slots][:split] = example.inputs
    row["decoder_target_tokens"][slots][split:] = example.targets
    row["decoder_loss_weights"][slots][0 if example.loss_on_inputs else split :] = 1
    row["decoder_segment_ids"][slots] = _segments(segment, documents)
    row["decoder_positions"][slots] = ramp[:size]
    if split and example.bidirectional_inputs:
        # The inputs stand one slot late, behind BOS: the block is BOS and all `split` of them.
        _let_see_ahead(row, slice(slots.start, min(slots.start + split + 1, slots.stop)))
    _place_features(row, "decoder", slice(slots.start + split, slots.stop), example)
    _shift(row, slots, bos_id, documents)
    return (slots.stop, 0), segment + _count(documents)


def _place_in_both(row, at, segment, example, ramp, bos_id, across):
    if not isinstance(example, Seq2Seq):
        raise _DoesNotFit("an encoder_decoder is trained on Seq2Seq examples only")
    inputs = _claim(row["encoder_segment_ids"], at[0], len(example.inputs), "inputs")
    targets = _claim(row["decoder_segment_ids"], at[1], len(example.targets), "targets")
    in_documents = None if across else example.input_documents
    out_documents = None if across else example.target_documents
    row["encoder_input_tokens"][inputs] = example.inputs
    row["encoder_segment_ids"][inputs] = _segments(segment, in_documents)
    row["encoder_positions"][inputs] = ramp[: len(example.inputs)]
    row["decoder_target_tokens"][targets] = example.targets
    row["decoder_loss_weights"][targets] = 1
    row["decoder_segment_ids"][targets] = _segments(segment, out_documents)
    row["decoder_positions"][targets] = ramp[: len(example.targets)]
    _place_features(row, "decoder", targets, example)
    _shift(row, targets, bos_id, out_documents)
    used = max(_count(in_documents), _count(out_documents))
    return (inputs.stop, targets.stop), segment + used


def _place_features(row, stack: str, slots: slice, example: Aligned | Seq2Seq) -> None:
    """Further features; one that the batch does not have is left out."""
    for name, values in example.features.items():
        if (feature := f"{stack}_{name}") in row:
            row[feature][slots] = values


def _let_see_ahead(row, slots: slice) -> None:
    if FLAGS not in row:
        raise _DoesNotFit(
            "it has slots that see later ones, and its objective's `sees_ahead` is False"
        )
    row[FLAGS][slots] = 1


def _claim(segment_ids: np.ndarray, start: int, size: int, what: str) -> slice:
    if start + size > len(segment_ids):
        raise _DoesNotFit(
            f"{size} {what} do not fit the {len(segment_ids) - start} slots left of "
            f"{len(segment_ids)}; its objective promised smaller bounds"
        )
    return slice(start, start + size)


def _shift(row, slots: slice, bos_id: int, documents: np.ndarray | None) -> None:
    """Decoder inputs: the targets one slot later, BOS at the start of every segment."""
    inputs, targets = row["decoder_input_tokens"], row["decoder_target_tokens"]
    inputs[slots.start + 1 : slots.stop] = targets[slots.start : slots.stop][:-1]
    inputs[slots.start : slots.start + 1] = bos_id
    inputs[slots.stop : slots.stop + 1] = bos_id
    if documents is not None:
        inputs[slots][1:][documents[1:] != documents[:-1]] = bos_id


def _segments(first: int, documents: np.ndarray | None) -> np.ndarray | int:
    return first if documents is None else documents + first


def _count(documents: np.ndarray | None) -> int:
    """Segment ids that an example takes up."""
    return 1 if documents is None or not len(documents) else int(documents.max()) + 1


def _positions(example: Aligned, ramp: np.ndarray) -> np.ndarray:
    return ramp[: len(example.tokens)] if example.positions is None else example.positions


def _joined_documents(example: Seq2Seq) -> np.ndarray | None:
    """Documents of inputs and targets in one row; a side without them is document 0."""
    sides = (example.inputs, example.input_documents), (example.targets, example.target_documents)
    if all(documents is None for _, documents in sides):
        return None
    return np.concatenate(
        [np.zeros(len(x), np.int32) if documents is None else documents for x, documents in sides]
    )
