"""A named part of a loss: a sum and a weight, so that accumulation and sharding stay exact."""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class Term:
    """One loss term of a batch; its value is `sum / weight`, taken over the whole global batch.

    The total loss is the sum over terms of `coefficient * sum / weight`, where sums and weights
    run over every device and every accumulated micro-batch. `weight` depends on the batch alone
    (never on parameters), so gradients of parts add up exactly.

    Attributes:
      sum: float32 scalar.
      weight: float32 scalar; a term of weight 0 counts as 0.
      coefficient: how much it counts in the total; 0 makes it a metric.
    """

    sum: jax.Array
    weight: jax.Array
    coefficient: float = flax.struct.field(pytree_node=False, default=1.0)
