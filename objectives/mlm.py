"""Masked language modelling."""

from __future__ import annotations

import dataclasses
from typing import Any

from objectives.masking import Masking


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Masking):
    """Predicts hidden tokens at their own positions, seeing both sides.

    The defaults are BERT's (Devlin et al. 2019, section 3.1, task 1; no next-sentence task):
    max(1, round(rate * tokens)) positions, the number exact and [CLS] and [SEP] counted among
    the tokens but never chosen; of those 80% show [MASK], 10% a token drawn uniformly from the
    whole vocabulary and 10% themselves; all are predicted. An encoder or a bidirectional decoder
    is trained, and targets are not shifted on either.

    The other fields are those of `Masking`:

    - max_predictions: BERT has 20 at 128 tokens.
    - whole_word: as in BERT's released code, each piece of a word has its own 80/10/10 draw.
    - selection="iid": every token with probability `rate`, as in ModernBERT (Warner et al. 2024,
      section 2.2; rate 0.3) and in EuroBERT (Boizard et al. 2025; 100% [MASK]).

    Otherwise than the references: the draw is new in every epoch, where BERT repeats a few fixed
    ones; separators between documents of a window are never chosen; ModernBERT draws random
    tokens up to the largest id in the batch and may choose special tokens, which is not done.

    Attributes:
      z_loss: coefficient of log(Z)^2 per predicted token; no reference uses it.
    """

    z_loss: float = 0.0

    @property
    def device_key(self) -> Any:
        return ("masked LM", self.z_loss)

    def network(self, config: Any) -> Any:
        from objectives import heads

        return heads.LanguageModel(config)

    def losses(self, apply, params, frozen, batch, rng, train: bool) -> dict[str, Any]:
        from objectives import heads

        del frozen
        return heads.next_token_losses(
            apply, params, batch, rng, train,
            stack=self.setting.architecture,
            z_loss=self.z_loss,
            predictions=self.usual_predictions,
        )  # fmt: skip
