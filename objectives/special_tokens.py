"""Tokens that objectives need beyond sentinels: mode tokens, separators, infilling marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t5like.errors import UserError

# Each name has a place of its own, counted from the vocabulary's last sentinel backwards, so that
# objectives that are mixed, or that follow each other, agree on what a token means.
PLACES = (
    "[R]", "[S]", "[X]",
    "<sep>", "<eom>",
    "<fim_prefix>", "<fim_middle>", "<fim_suffix>",
    "[M1]", "[M2]", "[M3]",
)  # fmt: skip


def special_tokens(vocabulary: Any, names: Sequence[str], who: str) -> dict[str, int]:
    """Name -> id: the vocabulary's own piece of that name, else a sentinel from the far end.

    Args:
      names: of PLACES, or any that the vocabulary has.
      who: the objective, for errors.

    Raises:
      UserError: there are too few sentinels, or a name has neither a piece nor a place.
    """
    return {name: _token(vocabulary, name, who) for name in names}


def _token(vocabulary: Any, name: str, who: str) -> int:
    own = vocabulary.named_id(name)
    if own is not None:
        return own
    if name not in PLACES:
        raise UserError(f"{who} needs a token {name!r}, which {vocabulary} does not have")
    place = PLACES.index(name) + 1
    if place > len(vocabulary.sentinels):
        raise UserError(
            f"{who} needs a token {name!r}, which the vocabulary does not have, nor the {place} "
            f"sentinels that would lend it one: raise {type(vocabulary).__name__}.extra_ids to at "
            f"least {len(PLACES)}"
        )
    return int(vocabulary.sentinels[-place])


def sentinels_left(vocabulary: Any, names: Sequence[str]) -> int:
    """Sentinels from the front that stay free when these names have what they need."""
    lent = [PLACES.index(name) + 1 for name in names if vocabulary.named_id(name) is None]
    return max(0, len(vocabulary.sentinels) - max(lent, default=0))
