"""How long a run is: the first of a number of steps, tokens or FLOPs to be reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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

    def total_steps(self, spent: Callable[[int], tuple[float, float]]) -> int:
        """Updates until the first limit is reached or passed.

        Args:
          spent: total steps of a run -> (tokens, FLOPs) of the whole of it. Where a plan depends
            on the run's length it may fall a little here and there as the run gets longer; then
            a crossing of the limit is found, not always the first.

        Raises:
          UserError: no limit is set, or one is not positive.
        """
        limits = {"steps": self.steps, "tokens": self.tokens, "flops": self.flops}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        if not limits:
            raise UserError("the run has no end: set train.steps, train.tokens or train.flops")
        for name, limit in limits.items():
            if limit <= 0:
                raise UserError(f"train.{name}={limit}: it must be positive")

        def reached(steps: int) -> bool:
            costs = dict(zip(("tokens", "flops"), spent(steps), strict=True))
            return any(costs[name] >= limits[name] for name in costs if name in limits)

        if limits.keys() == {"steps"}:
            return self.steps
        return _first(reached, self.steps)


def _first(reached: Callable[[int], bool], limit: int | None) -> int:
    """The number at which `reached` turns true, by doubling and bisection; at most `limit`."""
    low, high = 0, 1
    while not reached(high):
        if limit is not None and high >= limit:
            return limit
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high if limit is None else min(high, limit)
