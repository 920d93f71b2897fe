"""Token ids as runs of text, each with a style that says what it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# (text, style) in reading order. A style is a key of STYLES; "sentinel" and "span" may carry a
# number after a space ("span 3"), by which a sentinel and what it stands for share a colour.
Runs = list[tuple[str, str]]
Lines = list[tuple[str, Runs]]

# What each style marks, for a legend.
STYLES = {
    "given": "given",
    "target": "predicted",
    "sentinel": "stands for a span",
    "span": "span of that sentinel",
    "named": "mark of the objective",
    "special": "special token",
    "mask": "hidden",
    "random": "replaced at random",
    "kept": "predicted though shown",
    "quiet": "",
}
# A name with a number, by which it stands for a span.
_NUMBERED = re.compile(r"_(\d+)>$")
_OF_A_TOKEN = ("sentinel", "named", "special")


def visible(text: str) -> str:
    """The text with line breaks that can be seen in one line."""
    return text.replace("\n", "⏎")


class Reader:
    """Turns ids into text run by run, so that a run reads as it does within the whole.

    Attributes:
      vocabulary: see t5like/data/vocabularies.
      names: id -> name of tokens that the objective gave a meaning.
    """

    def __init__(self, vocabulary: Any, names: Mapping[int, str] | None = None):
        self.vocabulary = vocabulary
        self.names = dict(names or {})
        self._numbers = {
            i: k for k, i in enumerate(vocabulary.sentinels.tolist()) if i not in self.names
        }
        numbered = ((i, _NUMBERED.search(name)) for i, name in self.names.items())
        self._numbers |= {i: int(match[1]) for i, match in numbered if match}
        self._special = set(vocabulary.special_ids.tolist())

    def number(self, token: int) -> int | None:
        """Of a sentinel, else None.

        A sentinel that the objective gave another meaning is none, and a token that it named and
        numbered, such as <mask_1>, is one.
        """
        return self._numbers.get(token)

    def sentinel_numbers(self, ids: np.ndarray) -> list[int]:
        """Numbers of the sentinels among ids [n], in order."""
        return [self._numbers[i] for i in ids.tolist() if i in self._numbers]

    def text(self, ids: np.ndarray) -> str:
        """The vocabulary's text of ids [n], with the names of named tokens in their places."""
        cuts = [i for i, token in enumerate(ids.tolist()) if token in self.names]
        parts, start = [], 0
        for cut in [*cuts, len(ids)]:
            parts += [self._between(ids, start, cut)]
            parts += [self.names[int(ids[cut])]] if cut < len(ids) else []
            start = cut + 1
        return "".join(parts)

    def runs(
        self, ids: np.ndarray, style: str | Callable[[int], str], *, spans: bool = False
    ) -> Runs:
        """Runs of ids [n] that share a style; sentinels, named and special tokens stand alone.

        Args:
          style: of all tokens, or of the i-th; "mask" wins over what a token is by itself,
            "random" and "kept" over all but its being named.
          spans: whether a sentinel's tokens follow it where it is named last, as in the targets
            of span corruption.
        """
        styles = self._styles(ids.tolist(), style, spans)
        runs: Runs = []
        start = 0
        for stop in range(1, len(ids) + 1):
            alone = stop < len(ids) and styles[start].split()[0] in (*_OF_A_TOKEN, "mask")
            if stop == len(ids) or styles[stop] != styles[start] or alone:
                runs.append((self._run(ids, start, stop, styles[start]), styles[start]))
                start = stop
        return runs

    def _styles(self, ids: list[int], style: str | Callable[[int], str], spans: bool) -> list[str]:
        styles, span = [], None
        last = {token: i for i, token in enumerate(ids)}
        for i, token in enumerate(ids):
            asked = style(i) if callable(style) else style
            kind = self._kind(token)
            if asked == "mask" or (asked in ("random", "kept") and kind != "named"):
                kind = None
            if kind == "sentinel":
                number = self._numbers[token]
                span = number if i == last[token] else None
                styles.append(f"sentinel {number}")
            elif kind is not None:
                span = None
                styles.append(kind)
            else:
                styles.append(f"span {span}" if spans and span is not None else asked)
        return styles

    def _kind(self, token: int) -> str | None:
        """Of _OF_A_TOKEN, or None for a token of text."""
        if token in self._numbers:
            return "sentinel"
        if token in self.names:
            return "named"
        return "special" if token in self._special else None

    def _run(self, ids: np.ndarray, start: int, stop: int, style: str) -> str:
        if style == "mask":
            return "[MASK]"
        if style.split()[0] in _OF_A_TOKEN:
            token = int(ids[start])
            return self.names.get(token) or self.vocabulary.piece(token)
        return self._between(ids, start, stop)

    def _between(self, ids: np.ndarray, start: int, stop: int) -> str:
        """ids[start:stop] as they read after ids[:start]."""
        before, through = (self.vocabulary.decode(ids[:end]) for end in (start, stop))
        if through.startswith(before):
            return through[len(before) :]
        return self.vocabulary.decode(ids[start:stop])
