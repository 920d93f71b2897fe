"""What an objective reads (a record) and what it makes of it (an example).

text -> Corpus -> Record -> Objective.corrupt -> Example -> layout -> batch
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

# --- units: how a corpus is cut into records -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Window:
    """Fixed windows over the concatenated documents; a window may cross documents.

    Attributes:
      raw_length: tokens a window, before corruption. The last window of a corpus is shorter.
      separator: token id put after every document (T5's causal stream puts EOS), or None.
    """

    raw_length: int
    separator: int | None = None


@dataclasses.dataclass(frozen=True)
class Document:
    """One document a record; longer ones are cut into consecutive pieces, nothing is dropped.

    Attributes:
      max_raw_length: tokens a piece, before corruption.
    """

    max_raw_length: int


Unit = Window | Document


@dataclasses.dataclass(frozen=True)
class Record:
    """A piece of a corpus.

    Attributes:
      tokens: int32 [R].
      documents: int32 [R], the index of the document within this record, from 0 and rising.
      metadata: the corpus's metadata columns for the first document.
      ends_document: of a record cut by `Document`, whether it reaches its document's end.
    """

    tokens: np.ndarray
    documents: np.ndarray
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ends_document: bool = True


# --- examples: what a model is asked ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """Targets to be generated from inputs (which may be empty: a causal language model).

    An encoder-decoder reads `inputs` in its encoder; a decoder reads them as a prefix in the
    same row. Nothing here is shifted: layout does that.

    Attributes:
      inputs: int32 [I].
      targets: int32 [T].
      input_documents, target_documents: int32 [I] and [T], document of each token within the
        record, or None where the record is one document.
      bidirectional_inputs: on a decoder, whether the inputs see each other both ways.
      loss_on_inputs: on a decoder, whether the inputs are predicted too.
      features: name -> int32 [T], further values of the targets' slots, which reach the batch as
        `decoder_NAME` if the objective lists them in its `features`; 0 at all other slots.
    """

    inputs: np.ndarray
    targets: np.ndarray
    input_documents: np.ndarray | None = None
    target_documents: np.ndarray | None = None
    bidirectional_inputs: bool = True
    loss_on_inputs: bool = False
    features: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Aligned:
    """One target per token, at the token's own position, attention in both directions.

    Attributes:
      tokens: int32 [L], what the model sees.
      targets: int32 [L], what it must say there.
      weights: float32 [L], zero where nothing is asked.
      positions: int32 [L], or None for 0..L-1.
      documents: int32 [L], document of each token, or None where there is one.
      features: name -> int32 [L] (float32 where the name ends in "weights"), further values of
        the slots, which reach the batch as `encoder_NAME` (`decoder_NAME` on a decoder) if the
        objective lists them in its `features`; 0 at all other slots. The model itself reads
        "token_types" and "isolated" (see t5like/models/visibility.py).
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray | None = None
    documents: np.ndarray | None = None
    features: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Members:
    """Examples that are compared with each other, such as a pair that is to be ranked.

    They stay together: a batch is then [B, M, L], so that no sharding parts them. In a packed row
    they start at the same slot of their M rows, where `positions` is 0.

    Attributes:
      members: the same number M in every example of an objective.
    """

    members: tuple[Aligned, ...]


Example = Seq2Seq | Aligned | Members


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Upper bounds of an example's size, known before its tokens are read.

    Attributes:
      inputs: tokens of `Seq2Seq.inputs`, of `Aligned.tokens`, or of the longest of `Members`.
      targets: tokens of `Seq2Seq.targets`; 0 for the others.
    """

    inputs: int
    targets: int = 0
