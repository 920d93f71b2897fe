"""Fill-in-the-middle."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, Self

import numpy as np

from objectives.base import Setting
from objectives.next_token import (
    CausalText,
    Cut,
    all_predicted,
    append,
    check_choice,
    check_range,
    several_documents,
)
from objectives.segments import rewritten, segments
from objectives.special_tokens import special_tokens
from t5like.data.examples import Lengths, Record, Seq2Seq
from t5like.errors import UserError
from t5like.inference.infill_formats import PrefixSuffixMiddle

_NAMES = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
_MARKS = len(_NAMES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FIM(CausalText):
    """Causal language modelling of documents whose middle is moved to their end.

    Bavarian et al. 2022, section 3. A document is permuted with probability `fim_rate`: it is cut
    at two places, each uniform over all, into prefix, middle and suffix, any of which may be
    empty, and is laid out as

        PSM:            <PRE> prefix <SUF> suffix <MID> middle EOS
        SPM, variant 1: <SUF> suffix <PRE> prefix <MID> middle EOS
        SPM, variant 2: <PRE> <SUF> suffix <MID> prefix middle EOS

    SPM with probability `spm_rate`. In variant 2 (section 3.1 and appendix D) prefix and middle
    are contiguous, so that PSM and SPM are one task where the prefix is empty. Attention is
    causal and every token has loss. The marks are the vocabulary's own pieces <fim_prefix>,
    <fim_suffix> and <fim_middle>, else sentinels.

    Cuts fall between tokens. The paper cuts between characters, and its text is then tokenised
    in three pieces; here a corpus is tokens already, and a prompt is cut where a token may end.

    With cut="document" documents are permuted before they are packed; one that is longer than a
    row is cut into pieces, and each piece is permuted as if it were a document (context-level
    FIM, section 3.2). With cut="window" the documents of a window are permuted in it.

    Otherwise than the reference (BigCode's fork of Megatron-LM):
    - nothing is cut: the three marks are in the plan of a row, where the reference cuts permuted
      rows back to their length, so that the last middle loses its end;
    - a piece that is permuted ends in EOS also where its document goes on, since a middle that
      does not end teaches no model to stop (end_every_middle; the reference's last has none);
    - in windows at most `max_permuted` documents are permuted, chosen among those that were
      drawn; the plan needs a limit;
    - the draws come from the example's own generator, so a run can be resumed.

    Attributes:
      cut: see above.
      fim_rate: share of documents that are permuted.
      spm_rate: share of those that are laid out as SPM.
      spm_variant: 1 or 2.
      end_every_middle: see above.
      max_permuted: most permuted documents of a window; None: one for each 128 tokens of a row.
    """

    cut: Cut = "document"
    fim_rate: float = 0.5
    spm_rate: float = 0.5
    spm_variant: Literal[1, 2] = 2
    end_every_middle: bool = True
    max_permuted: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "fim_rate", 0.0, 1.0)
        check_range(self, "spm_rate", 0.0, 1.0)
        check_choice(self, "spm_variant", (1, 2))
        if self.max_permuted is not None:
            check_range(self, "max_permuted", 1, 1e6)

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        special_tokens(setting.vocabulary, _NAMES, "FIM")
        if bound._raw_length < 2:
            raise UserError(
                f"train.length is {setting.length}; FIM permutes up to {bound._most_permuted} "
                f"documents of a row and needs at least {2 + setting.length - bound._raw_length}: "
                "raise it, or lower FIM.max_permuted"
            )
        return bound

    # --- tokens ---

    @functools.cached_property
    def _format(self) -> PrefixSuffixMiddle:
        ids = special_tokens(self.setting.vocabulary, _NAMES, "FIM")
        return PrefixSuffixMiddle(*(ids[name] for name in _NAMES), self._eos)

    def infilling(self) -> PrefixSuffixMiddle:
        return self._format

    @property
    def named_tokens(self) -> Mapping[int, str]:
        form = self._format
        return dict(zip((form.prefix_id, form.suffix_id, form.middle_id), _NAMES, strict=True))

    # --- lengths ---

    @property
    def _most_permuted(self) -> int:
        if not self.fim_rate:
            return 0
        if self.cut == "document":
            return 1
        if self.max_permuted is not None:
            return self.max_permuted
        return math.ceil(self.setting.length / 128)

    def _grown(self, raw_length: int, permuted: int) -> int:
        """Most tokens that a record with so many permuted documents becomes."""
        # A window's documents have their EOS already; its last may be given one.
        ends = self.cut == "document" or (permuted > 0 and self.end_every_middle)
        return raw_length + _MARKS * permuted + ends

    @property
    def _raw_length(self) -> int:
        return self.setting.length - self._grown(0, self._most_permuted)

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        permuted = self._most_permuted
        if self.cut == "document":
            permuted = len(self._chosen(1, rng))
        return Lengths(0, self._grown(raw_length, permuted))

    # --- permuting ---

    def _chosen(self, documents: int, rng: np.random.Generator) -> np.ndarray:
        """Numbers of the documents to permute, rising."""
        chosen = (rng.random(documents) < self.fim_rate).nonzero()[0]
        if len(chosen) > self._most_permuted:
            chosen = np.sort(rng.permutation(chosen)[: self._most_permuted])
        return chosen

    def corrupt(self, record: Record, rng: np.random.Generator) -> Seq2Seq:
        tokens, documents = record.tokens, several_documents(record)
        if self.cut == "document" and record.ends_document:
            tokens = append(tokens, self._eos)
        found = segments(tokens, documents, self._eos)
        chosen = self._chosen(len(found.starts), rng)
        suffix_first = rng.random(len(chosen)) < self.spm_rate
        starts, ends, stops = (edges[chosen] for edges in found)
        cuts = rng.integers(starts[:, None], ends[:, None], (len(chosen), 2), endpoint=True)
        cuts.sort(axis=1)
        texts = {}
        for d, start, end, stop, (first, second), spm in zip(
            chosen.tolist(), starts, ends, stops, cuts, suffix_first, strict=True
        ):
            parts = tokens[start:first], tokens[first:second], tokens[second:end]
            closed = self.end_every_middle or stop > end
            texts[d] = self._permuted(*parts, spm)[: None if closed else -1]
        tokens, documents = rewritten(tokens, documents, found, texts)
        return all_predicted(tokens, documents)

    def _permuted(self, prefix, middle, suffix, spm: bool) -> np.ndarray:
        """int32 [n + 4], with EOS."""
        form = self._format
        if not spm:
            return np.concatenate([form.prompt([prefix, suffix]), form.answer([middle])])
        pre, suf, mid = ([mark] for mark in (form.prefix_id, form.suffix_id, form.middle_id))
        if self.spm_variant == 1:
            pieces = suf, suffix, pre, prefix, mid, middle
        else:
            pieces = pre, suf, suffix, mid, prefix, middle
        return np.concatenate([*pieces, [self._eos]]).astype(np.int32)

    def unpermute(self, ids: np.ndarray) -> np.ndarray:
        """The stream of documents, int32, that ids of any layout, int32 [n], were made of.

        EOS stay where documents end, those that only end a middle too.
        """
        ids = np.asarray(ids, np.int32)
        stops = (ids == self._eos).nonzero()[0] + 1
        return np.concatenate([self._restored(text) for text in np.split(ids, stops)])

    def _restored(self, text: np.ndarray) -> np.ndarray:
        """One document, permuted or not, with or without its EOS."""
        form = self._format
        marks = np.isin(text, (form.prefix_id, form.suffix_id, form.middle_id)).nonzero()[0]
        if len(marks) != _MARKS:
            return text
        end = len(text) - (text[-1] == self._eos)
        one, two, three = np.split(text[:end], marks[1:])
        one, two, three = one[1:], two[1:], three[1:]
        # PSM and SPM of variant 2 differ in where the prefix stands, not in how it is read.
        pieces = (two, three, one) if text[0] == form.suffix_id else (one, three, two)
        return np.concatenate([*pieces, text[end:]])
