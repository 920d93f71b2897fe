"""What the objectives that predict the next token share: fields, the device half, small arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, Self

import numpy as np

from objectives.base import Objective, Setting
from t5like.data.examples import Document, Lengths, Record, Seq2Seq, Unit, Window
from t5like.errors import UserError

Cut = Literal["window", "document"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """Base of objectives whose loss is the cross-entropy of shifted decoder targets.

    Attributes:
      cut: what a record is: a "window" over the stream of documents, or a "document" (longer
        ones in consecutive pieces).
      z_loss: coefficient of log(Z)^2 per token; T5 trains with 1e-4 (Mesh TensorFlow, and
        Chowdhery et al. 2022, section 5, who give it its name).
      label_smoothing: probability mass spread over the other tokens.
    """

    cut: Cut = "window"
    z_loss: float = 1e-4
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_choice(self, "cut", ("window", "document"))
        check_range(self, "z_loss", 0.0, 1.0)
        check_range(self, "label_smoothing", 0.0, 0.999)

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        if setting.vocabulary.eos_id is None:
            raise UserError(
                f"{type(setting.vocabulary).__name__} has no end-of-sequence token, which "
                f"{type(self).__name__} needs: use a vocabulary that has one"
            )
        return bound

    @functools.cached_property
    def _eos(self) -> int:
        return self.setting.vocabulary.eos_id

    @property
    def device_key(self) -> Any:
        return ("next token", self.z_loss, self.label_smoothing)

    # JAX is imported here, not above: a data loader's worker needs the host half only.

    def network(self, config: Any) -> Any:
        from objectives import heads

        return heads.LanguageModel(config)

    def losses(self, apply, params, frozen, batch, rng, train: bool) -> dict[str, Any]:
        from objectives import heads

        del frozen
        return heads.next_token_losses(
            apply, params, batch, rng, train,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            predictions=self.usual_predictions,
            groups=self._groups,
        )  # fmt: skip

    @property
    def _groups(self) -> Any | None:
        """Kinds of targets whose losses are told apart, heads.Groups, or None."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalText(NextToken):
    """Base of objectives whose decoder predicts every token of a text from those before it."""

    architectures = ("decoder",)

    @property
    def _raw_length(self) -> int:
        """Tokens of a record that fill a row at most, whatever is made of them."""
        raise NotImplementedError

    @property
    def unit(self) -> Unit:
        if self.cut == "document":
            return Document(self._raw_length)
        return Window(self._raw_length, separator=self._eos)

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.setting.length)

    def continuation(self, prefix: np.ndarray, rest: np.ndarray) -> Seq2Seq:
        return Seq2Seq(prefix, append(rest, self._eos), bidirectional_inputs=False)


def all_predicted(tokens: np.ndarray, documents: np.ndarray | None) -> Seq2Seq:
    """The example that asks a decoder for tokens int32 [n], of documents int32 [n] or of one."""
    return Seq2Seq(
        inputs=np.empty(0, np.int32),
        targets=tokens,
        target_documents=documents,
        bidirectional_inputs=False,
    )


# --- checks of fields ------------------------------------------------------------------------


def check_choice(objective: Objective, field: str, choices: tuple[str, ...]) -> None:
    """Raises UserError unless the field is one of the choices."""
    value = getattr(objective, field)
    if value not in choices:
        raise UserError(
            f"{type(objective).__name__}.{field} is {value!r}; set it to "
            f"{' or '.join(map(repr, choices))}"
        )


def check_range(objective: Objective, field: str, least: float, most: float) -> None:
    """Raises UserError unless least <= field <= most."""
    value = getattr(objective, field)
    if not least <= value <= most:
        raise UserError(
            f"{type(objective).__name__}.{field} is {value}; it must lie in [{least:g}, {most:g}]"
        )


def check_targets_length(objective: Objective, needed: int, who: str) -> None:
    """Raises UserError if a bound encoder-decoder's targets, `needed` tokens at most, do not fit.

    Args:
      who: what makes such targets, for the error.
    """
    setting = objective.setting
    given = setting.targets_length
    if setting.architecture == "encoder_decoder" and given is not None and given < needed:
        raise UserError(
            f"train.targets_length is {given}; {who} makes targets of up to {needed} tokens at "
            f"train.length={setting.length}: set it to {needed} or to None"
        )


def usual_predictions(most_targets: int) -> int:
    """Positions of a row to compute logits for, where one example has at most so many targets.

    A packed row of short texts has more targets than a full one: a tenth for those.
    """
    return 8 * math.ceil(1.1 * most_targets / 8)


# --- small arrays ----------------------------------------------------------------------------


def append(values: np.ndarray, value: int) -> np.ndarray:
    """values [n] with one more at the end, [n + 1]."""
    longer = np.empty(len(values) + 1, values.dtype)
    longer[:-1] = values
    longer[-1] = value
    return longer


def append_last(documents: np.ndarray | None) -> np.ndarray | None:
    """Document ids [n] with the last one repeated for an EOS, [n + 1]; None stays None."""
    if documents is None:
        return None
    return append(documents, documents[-1] if len(documents) else 0)


def prepend(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """values [n] with first [m] before them, [m + n], of the values' dtype."""
    longer = np.empty(len(first) + len(values), values.dtype)
    longer[: len(first)] = first
    longer[len(first) :] = values
    return longer


def prepend_first(documents: np.ndarray | None, count: int) -> np.ndarray | None:
    """Document ids [n] with the first one repeated `count` times, [count + n]; None stays None."""
    if documents is None:
        return None
    return prepend(documents, np.repeat(documents[:1] if len(documents) else 0, count))


def several_documents(record: Record) -> np.ndarray | None:
    """The record's document ids, or None where it is one document."""
    documents = record.documents
    if len(documents) == 0 or documents[0] == documents[-1]:
        return None
    return documents
