"""Optimisers: frozen descriptions that build optax transformations.

Every one clips gradients by their global norm first and decays weights decoupled from the
gradient, in proportion to the learning rate. Norm scales, biases (of positions too) and other
vectors are never decayed: parameters are told apart by name, because scanned layers stack vectors
into matrices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5like.errors import UserError
from t5like.training.schedules import Constant, Cosine, InverseSquareRoot, Schedule, ScheduleFn


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Base of all optimisers.

    Attributes:
      learning_rate: the schedule, or a number for a constant one; the count it is a function of
        lives in the optimiser's state and equals the step.
      clip_norm: largest global gradient norm; None does not clip.
      weight_decay: fraction of a matrix taken away per update, times the learning rate.
    """

    learning_rate: Schedule = Cosine()
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0

    def __post_init__(self):
        if isinstance(self.learning_rate, (int, float)):
            object.__setattr__(self, "learning_rate", Constant(float(self.learning_rate)))
        if not isinstance(self.learning_rate, Schedule):
            name = type(self).__name__
            raise UserError(
                f"{name}.learning_rate is {self.learning_rate!r}; bind it to a number or to a "
                "schedule such as @Cosine()"
            )

    def schedule(self, total_steps: int) -> ScheduleFn:
        """step -> learning rate, for a run of total_steps."""
        return self.learning_rate.build(total_steps)

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """The whole transformation: gradients in, updates (to be added) out."""
        rule = self._rule(self.schedule(total_steps))
        if self.clip_norm is None:
            return rule
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)

    def _rule(self, schedule: ScheduleFn) -> optax.GradientTransformation:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Loshchilov & Hutter 2019, algorithm 2, with the decay scaled by the learning rate."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def _rule(self, schedule):
        return optax.adamw(
            schedule, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=decays
        )


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Shazeer & Stern 2018, algorithm 4: updates relative to the RMS of each parameter.

    The defaults are T5's (no clipping by global norm, no decay). Scanned layers share one RMS a
    stack, where unrolled layers have one each.

    Attributes:
      decay_rate: the second moment's decay at update t is 1 - t**-decay_rate.
      min_dim_size_to_factor: matrices with a smaller side keep a full second moment.
      update_clip: largest RMS of a parameter's update before scaling.
    """

    learning_rate: Schedule = InverseSquareRoot()
    clip_norm: float | None = None
    decay_rate: float = 0.8
    momentum: float | None = None
    min_dim_size_to_factor: int = 128
    multiply_by_parameter_scale: bool = True
    update_clip: float | None = 1.0

    def _rule(self, schedule):
        direction = optax.adafactor(
            learning_rate=None,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            decay_rate=self.decay_rate,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            clipping_threshold=self.update_clip,
            momentum=self.momentum,
            weight_decay_rate=self.weight_decay or None,
            weight_decay_mask=decays,
        )
        # Scaling last keeps the decay proportional to the learning rate, as elsewhere.
        return optax.chain(direction, optax.scale_by_learning_rate(schedule, flip_sign=False))


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """Chen et al. 2023, algorithm 2; use a third to a tenth of AdamW's learning rate."""

    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 1.0

    def _rule(self, schedule):
        return optax.lion(
            schedule, self.b1, self.b2, weight_decay=self.weight_decay, mask=decays
        )


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Orthogonalised momentum for hidden matrices (Jordan et al. 2024), AdamW for the rest.

    Updates are scaled to an RMS of `rms` whatever the shape (Liu et al. 2025, "Muon is Scalable
    for LLM Training", section 2.2), so that one learning rate serves both halves. Embeddings,
    heads' last layers, norms and biases are AdamW's; stacked layers are orthogonalised one by one.
    """

    beta: float = 0.95
    newton_schulz_steps: int = 5
    rms: float = 0.2
    weight_decay: float = 0.1
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8

    def _rule(self, schedule):
        matrices = optax.contrib.muon(
            schedule,
            ns_steps=self.newton_schulz_steps,
            beta=self.beta,
            weight_decay=self.weight_decay,
            consistent_rms=self.rms,
            muon_weight_dimension_numbers=_last_two_axes,
        )
        rest = optax.adamw(
            schedule,
            self.adam_b1,
            self.adam_b2,
            self.adam_eps,
            weight_decay=self.weight_decay,
            mask=decays,
        )
        return optax.partition({"matrices": matrices, "rest": rest}, _muon_labels)


def decays(params: Any) -> Any:
    """Tree of bools like `params`: whether weight decay applies."""
    return jax.tree_util.tree_map_with_path(_is_matrix, params)


def _is_matrix(path: tuple, leaf: Any) -> bool:
    names = _names(path)
    vector = names[-1] == "scale" or any(n.endswith("bias") or "norm" in n for n in names)
    return jnp.ndim(leaf) >= 2 and not vector


def _muon_labels(params: Any) -> Any:
    def label(path, leaf):
        names = _names(path)
        head = any(name.endswith("head") for name in names[-2:-1])  # its last layer alone
        outer = head or any("embed" in name for name in names)
        return "matrices" if _is_matrix(path, leaf) and not outer else "rest"

    return jax.tree_util.tree_map_with_path(label, params)


def _last_two_axes(params: Any) -> Any:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)


def _names(path: tuple) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").lower().split("/")
