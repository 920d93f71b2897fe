"""How long a run is: the first of a number of steps, tokens or FLOPs to be reached."""

from __future__ import annotations

import dataclasses
import math

from t5like.errors import UserError


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of a run; None sets no limit, but one must be set.

    Tokens are slots: batch size times row length (inputs plus targets), padding included. So a
    step costs the same whatever it holds, the length of the run is known before it starts (which
    schedules need), and a resumed run counts alike.

    Attributes:
      steps: updates.
      tokens: slots of all batches.
      flops: model floating-point operations, forward and backward.
    """

    steps: int | None = None
    tokens: float | None = None
    flops: float | None = None

    def total_steps(self, tokens_per_step: int, flops_per_step: float) -> int:
        """Updates until the first limit is reached or passed.

        Raises:
          UserError: no limit is set, or one is not positive.
        """
        steps = self._steps(tokens_per_step, flops_per_step)
        if not steps:
            raise UserError("the run has no end: set train.steps, train.tokens or train.flops")
        return min(steps.values())

    def _steps(self, tokens_per_step: int, flops_per_step: float) -> dict[str, int]:
        costs = {"steps": 1, "tokens": tokens_per_step, "flops": flops_per_step}
        steps = {}
        for name, cost in costs.items():
            limit = getattr(self, name)
            if limit is None:
                continue
            if limit <= 0:
                raise UserError(f"train.{name}={limit}: it must be positive")
            steps[name] = math.ceil(limit / cost)
        return steps
