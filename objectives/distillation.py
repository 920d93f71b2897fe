"""Distillation: any objective that predicts tokens, with a trained teacher beside the text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from objectives import teacher as teacher_lib
from objectives.base import Objective
from objectives.composite import Composite
from objectives.mlm import MaskedLM
from objectives.next_token import NextToken, check_range
from t5like.data.examples import Example, Lengths, Record, Unit
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Composite):
    """Learns what a teacher would say, beside what the text says (Hinton et al. 2015, section 2).

    The student's examples are those of the objective it wraps. At every position that is asked
    for, the loss is

        (1 - weight) * hard + weight * temperature^2 * KL(teacher || student),

    with `hard` the wrapped objective's cross-entropy (and z-loss), both distributions softened by
    the temperature, and each a mean over positions: temperature^2 keeps the balance of the
    gradients as the temperature changes. weight = 1 and temperature = 1 are Well-Read Students'
    pre-trained distillation (Turc et al. 2019, section 3), weight = 0.5 and temperature = 1 the
    Alexa Teacher Model's (FitzGerald et al. 2022); BabyLlama (Timiryasov and Tastet 2023) takes
    0.5 and 2. The teacher is a finished run's model, of the same architecture and vocabulary and
    any size; it never has dropout, and no gradient reaches it.

    hidden_weight adds Patient Knowledge Distillation (Sun et al. 2019, section 3.2, equation 7):
    the squared distance of the states of both models, each scaled to length 1, averaged over all
    tokens of the predicting stack and over pairs of layers. Where widths differ, the student's
    states first go through one trained projection, as in TinyBERT (Jiao et al. 2020, section 3.1).

    Otherwise than the references:
    - the divergence is a mean over positions; BabyLlama's code divides its sum by the batch only,
      which makes it as many times larger as a row has tokens (its weight here is near 1);
    - PKD compares [CLS] alone, which a language model need not have; here all tokens count;
    - TinyBERT does not scale states to length 1, so that its loss grows with the width.

    Attributes:
      student: the objective that is trained: MaskedLM, or one that predicts next tokens.
      teacher_from: workdir of the teacher's run, or one checkpoint in it.
      teacher_model: its ModelConfig; None: as its run recorded it.
      temperature: divides the logits of both.
      weight: of the teacher's word against the text's.
      hidden_weight: of the distance between hidden states; 0: they are not compared.
      hidden_layers: (student's layer, teacher's layer) pairs: 0 is the first block's input, i the
        output of block i, negative ones count from the last, whose states are normalised; None:
        the last of each.
    """

    student: Objective
    teacher_from: str
    teacher_model: Any = None
    temperature: float = 2.0
    weight: float = 0.5
    hidden_weight: float = 0.0
    hidden_layers: Sequence[tuple[int, int]] | None = None

    def __post_init__(self):
        if not isinstance(self.student, (NextToken, MaskedLM)):
            name = getattr(type(self.student), "__name__", self.student)
            raise UserError(
                f"Distillation.student is {name}, which does not predict tokens by one "
                "cross-entropy: bind it to @MaskedLM(), @CausalLM(), @SpanCorruption() or the like"
            )
        check_range(self, "temperature", 1e-3, 1e6)
        check_range(self, "weight", 0.0, 1.0)
        check_range(self, "hidden_weight", 0.0, 1e6)
        pairs = ((-1, -1),) if self.hidden_layers is None else self.hidden_layers
        if not pairs or not all(len(pair) == 2 for pair in pairs):
            raise UserError(
                f"Distillation.hidden_layers is {self.hidden_layers}; it must be pairs of layers, "
                "[(student's, teacher's), ...]"
            )
        object.__setattr__(self, "hidden_layers", tuple((int(s), int(t)) for s, t in pairs))

    # --- host half, and what a trained model can be asked: the student's ---

    @property
    def parts(self) -> tuple[Objective]:
        return (self.student,)

    def with_parts(self, change: Callable[[Objective], Objective]) -> Self:
        return dataclasses.replace(self, student=change(self.student))

    @property
    def architectures(self) -> tuple[str, ...]:
        return self.student.architectures

    @property
    def features(self) -> tuple[str, ...]:
        return self.student.features

    @property
    def unit(self) -> Unit:
        return self.student.unit

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        return self.student.bounds(raw_length, rng)

    def corrupt(self, record: Record, rng: np.random.Generator) -> Example:
        return self.student.corrupt(record, rng)

    @property
    def keeps_documents_apart(self) -> bool:
        return self.student.keeps_documents_apart

    def readable(self, row: Mapping[str, np.ndarray], reader: Any) -> Any | None:
        return self.student.readable(row, reader)

    # --- device half ---

    @functools.cached_property
    def _teacher(self) -> Any:
        """Found when it is first needed: a student that is trained needs no teacher."""
        return teacher_lib.find(self.teacher_from, self.teacher_model, "Distillation.teacher_from")

    def frozen(self, config: Any) -> Any:
        """The teacher's backbone, {"model": parameters}, as t5like.training.state.Frozen.

        Raises:
          UserError: it is not there, or cannot teach this student.
        """
        self._check(config)
        return self._teacher.frozen()

    def _check(self, config: Any) -> None:
        """Raises UserError unless teacher and student read and predict the same tokens."""
        teacher, where = self._teacher.config, f"Distillation.teacher_from: {self._teacher.path}"
        ours, theirs = self.setting.vocabulary.fingerprint(), self._teacher.vocabulary
        if theirs and theirs != ours:
            raise UserError(
                f"{where} was trained with another vocabulary (fingerprint {theirs}, now {ours}): "
                "bind train.vocabulary to that one"
            )
        if teacher.vocab_size != config.vocab_size:
            raise UserError(
                f"{where} predicts {teacher.vocab_size} ids, the student {config.vocab_size}: set "
                f"ModelConfig.vocab_size to {teacher.vocab_size}"
            )
        if teacher.architecture != config.architecture:
            raise UserError(
                f"{where} is of architecture {teacher.architecture!r}, the student of "
                f"{config.architecture!r}: set ModelConfig.architecture, or take another teacher"
            )
        longest = max(self.lengths.inputs, self.lengths.targets)
        if teacher.position == "learned" and longest > teacher.max_length:
            raise UserError(
                f"{where} has learned positions for {teacher.max_length} tokens, but rows hold "
                f"{longest}: lower train.length"
            )
        for side, layers in enumerate(_layers(config) for config in (config, teacher)):
            for pair in self.hidden_layers:
                if not -layers - 1 <= pair[side] <= layers:
                    raise UserError(
                        f"Distillation.hidden_layers has the pair {pair}, but the "
                        f"{('student', 'teacher')[side]} has {layers} layers: name 0 to {layers}"
                    )

    @property
    def usual_predictions(self) -> int | None:
        return self.student.usual_predictions

    @property
    def device_key(self) -> Any:
        mine = (f.name for f in dataclasses.fields(self) if f.name not in ("setting", "student"))
        return ("distillation", self.student.device_key, *(getattr(self, name) for name in mine))

    def train_flops(self, config: Any, spec: Mapping[str, tuple]) -> float:
        """The student's, one forward pass of the teacher, and the projection of states."""
        from t5like.models.flops import forward_flops

        self._check(config)
        teacher = self._teacher.config
        total = self.student.train_flops(config, spec)
        total += forward_flops(teacher, spec, self.usual_predictions)
        if self._projects_to(config) is not None:
            (rows, length), _ = spec[f"{self._stack}_input_tokens"]
            product = 2.0 * rows * length * config.d_model * teacher.d_model
            total += 3 * product * len(self.hidden_layers)
        return total

    @property
    def _stack(self) -> str:
        """The one that predicts."""
        return "encoder" if self.setting.architecture == "encoder" else "decoder"

    def _projects_to(self, config: Any) -> int | None:
        """The teacher's width, where states of another width are compared with it."""
        if not self.hidden_weight or self._teacher.config.d_model == config.d_model:
            return None
        return self._teacher.config.d_model

    def network(self, config: Any) -> Any:
        """The student's, with `hidden_projection` where states of two widths are compared."""
        from objectives import heads_distillation

        if not self.hidden_weight:
            return self.student.network(config)
        return heads_distillation.ComparedModel(config, self._projects_to(config))

    def losses(self, apply, params, frozen, batch, rng, train: bool) -> dict[str, Any]:
        from objectives import heads_distillation

        return heads_distillation.distillation_losses(
            apply, params, self._teacher.config, frozen, batch, rng, train,
            stack=self._stack,
            temperature=self.temperature,
            weight=self.weight,
            hidden_weight=self.hidden_weight,
            hidden_layers=self.hidden_layers,
            z_loss=self.student.z_loss,
            label_smoothing=getattr(self.student, "label_smoothing", 0.0),
            predictions=self.usual_predictions,
        )  # fmt: skip


def _layers(config: Any) -> int:
    """Blocks of the stack that predicts."""
    stacks = config.stacks
    return stacks.get("decoder", stacks.get("encoder"))
