"""Learning-rate schedules: frozen descriptions that build functions of the step.

`schedule.build(total_steps)(step)` is the float32 learning rate of the update that makes step
`step + 1` out of step `step`; steps count from 0. Linear warm-up gives the first update
`peak / warmup`, so that no update is wasted on a rate of 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

ScheduleFn = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base of all schedules.

    Attributes:
      peak: the highest learning rate.
      warmup: steps of linear warm-up; 0 for none.
      depends_on_total: whether the rate at a step changes when the run's length changes.
    """

    peak: float = 1e-3
    warmup: int = 0
    depends_on_total: ClassVar[bool] = False

    def build(self, total_steps: int) -> ScheduleFn:
        """Returns step -> learning rate for a run of total_steps updates."""

        def learning_rate(step: jax.Array) -> jax.Array:
            step = jnp.asarray(step, jnp.float32)
            return self.peak * self._warmup(step) * self._shape(step, total_steps)

        return learning_rate

    def _warmup(self, step: jax.Array) -> jax.Array:
        return jnp.minimum(1.0, (step + 1.0) / max(self.warmup, 1))

    def _shape(self, step: jax.Array, total_steps: int) -> jax.Array:
        """The factor after warm-up, in [0, 1]."""
        raise NotImplementedError

    def _progress(self, step: jax.Array, start: int, stop: int) -> jax.Array:
        """0 up to step `start`, 1 from step `stop` on, linear between."""
        return jnp.clip((step - start) / max(stop - start, 1), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The peak for ever."""

    def _shape(self, step, total_steps):
        return jnp.ones_like(step)


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """`peak * sqrt(warmup / max(step, warmup))`.

    With the defaults this is T5's 1 / sqrt(max(step, 10,000)), flat during warm-up (Raffel et
    al. 2020, section 3.1.2). `linear_warmup` ramps up instead, as Vaswani et al. 2017 do.
    """

    peak: float = 0.01
    warmup: int = 10_000
    linear_warmup: bool = False

    def _warmup(self, step):
        return super()._warmup(step) if self.linear_warmup else jnp.ones_like(step)

    def _shape(self, step, total_steps):
        warmup = max(self.warmup, 1)
        return jnp.sqrt(warmup / jnp.maximum(step, warmup))


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak to `final * peak` at the end (Loshchilov & Hutter 2017)."""

    final: float = 0.0
    depends_on_total: ClassVar[bool] = True

    def _shape(self, step, total_steps):
        progress = self._progress(step, self.warmup, total_steps)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from the peak to `final * peak` at the end (BERT's)."""

    final: float = 0.0
    depends_on_total: ClassVar[bool] = True

    def _shape(self, step, total_steps):
        return 1.0 - (1.0 - self.final) * self._progress(step, self.warmup, total_steps)


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """The peak until the last `decay` of the run, then down to `final * peak`.

    Hu et al. 2024 ("MiniCPM"), section 4; `shape` "sqrt" is 1 - sqrt(progress), the cooldown
    that Hägele et al. 2024, section 3, found best.

    Attributes:
      decay: the decaying part, as a fraction of the run.
    """

    decay: float = 0.1
    final: float = 0.0
    shape: Literal["linear", "sqrt"] = "linear"
    depends_on_total: ClassVar[bool] = True

    def _shape(self, step, total_steps):
        start = total_steps - round(self.decay * total_steps)
        progress = self._progress(step, start, total_steps)
        if self.shape == "sqrt":
            progress = jnp.sqrt(progress)
        return 1.0 - (1.0 - self.final) * progress
