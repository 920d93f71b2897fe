"""Logits of one tile: scale, bias, soft cap and mask, in units of the base-2 exponential."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels.bias import Lowered
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.softmax import LOG2_E, LOWEST
from kernels.block_sparse_attention.tpu import biases
from kernels.block_sparse_attention.tpu.steps import (
    NT,
    Operand,
    Place,
    Steps,
    column,
    dot,
    per_block,
    per_pair_of_blocks,
)

# What a mask hides lies as far below the start of running maxima as that lies below 0: its
# exponential is exactly 0, even in a row that sees nothing.
HIDDEN = 2 * LOWEST


@dataclasses.dataclass(frozen=True)
class Logits:
    """How the kernels of one call compute logits; tiles are [keys, queries].

    Attributes:
      problem: see kernels.block_sparse_attention.problem.
      bias: what kernels do with the bias.
      steps: of the kernel.
    """

    problem: Problem
    bias: biases.Bias
    steps: Steps

    @classmethod
    def of(cls, problem: Problem, bias: Lowered, steps: Steps) -> Logits:
        return cls(problem, biases.of(problem, bias, cls._factor(problem)), steps)

    @staticmethod
    def _factor(problem: Problem) -> float:
        """What the exponential's base or the soft cap's tanh multiply scaled logits by."""
        return LOG2_E if problem.soft_cap is None else 1 / problem.soft_cap

    def operands(self) -> dict[str, tuple[Operand, ...]]:
        """What tiles need beside queries and keys. Nothing for a mask that no block needs."""
        found = {"query": (), "key": (), "pair": (), "bias": self.bias.operands(self.steps)}
        if not self.steps.has_partial:
            return found
        problem, spec = self.problem, self.steps.spec
        bq, bk = problem.block_q, problem.block_kv

        def query(x: jax.Array) -> Operand:
            lead = x.shape[:2]
            index = lambda at: (at.lead(lead), at.row, 0, 0)  # noqa: E731
            return per_block(x, bq), spec((None, None, 1, bq), index)

        def key(x: jax.Array) -> Operand:
            lead = x.shape[:2]
            index = lambda at: (at.lead(lead), at.col, 0, 0)  # noqa: E731
            return per_block(x, bk), spec((None, None, 1, bk), index)

        def pair(x: jax.Array) -> Operand:
            lead = x.shape[:2]
            index = lambda at: (at.lead(lead), at.row, at.col, 0, 0)  # noqa: E731
            return per_pair_of_blocks(x, bq, bk), spec((None, None, None, bk, bq), index)

        found["query"] = tuple(query(x) for x in problem.query)
        found["key"] = tuple(key(x) for x in problem.key)
        found["pair"] = tuple(pair(x) for x in problem.pair)
        return found

    def tile(
        self, q: jax.Array, k: jax.Array, refs: dict, place: Place, keys: slice
    ) -> tuple[jax.Array, jax.Array | None]:
        """Logits times log2(e) of all queries and some keys of a block, float32, before the mask.

        Args:
          q, k: [bq, Dh], [keys, Dh].
          refs: of `operands`.
          place: of the block.
          keys: which of the block's keys.

        Returns:
          [keys, bq]; and, under a soft cap, what it multiplies the gradient by.
        """
        factor, cap = self._factor(self.problem), self.problem.soft_cap
        logits = self.bias.added(dot(k, q, NT) * (self.problem.scale * factor), refs["bias"], keys)
        if cap is None:
            return logits, None
        tanh = jnp.tanh(logits)
        return tanh * (cap * LOG2_E), 1 - tanh * tanh

    def hidden(
        self, logits: jax.Array, refs: dict, place: Place, keys: slice, queries: slice
    ) -> jax.Array:
        """Logits [keys, queries] of some keys and some queries of a block, under the mask."""
        return jnp.where(self._visible(refs, place, keys, queries), logits, HIDDEN)

    def _visible(self, refs: dict, place: Place, keys: slice, queries: slice) -> jax.Array:
        bq, bk = self.problem.block_q, self.problem.block_kv
        shape = queries.stop - queries.start, keys.stop - keys.start
        q_slot = jax.lax.broadcasted_iota(jnp.int32, (1, shape[0]), 1)
        kv_slot = jax.lax.broadcasted_iota(jnp.int32, (shape[1], 1), 0)
        return self.problem.tile(
            place.row * bq + queries.start + q_slot,
            place.col * bk + keys.start + kv_slot,
            [ref[:, queries] for ref in refs["query"]],
            [column(ref[:, keys]) for ref in refs["key"]],
            [ref[keys, queries].astype(jnp.int32) for ref in refs["pair"]],
            place.flags,
        )

    def chunks(self, largest: int) -> list[slice]:
        """The keys of a block in parts of up to `largest`."""
        bk = self.problem.block_kv
        size = next(n for n in range(min(largest, bk), 0, -1) if bk % n == 0)
        return parts(slice(0, bk), size)


def parts(whole: slice, size: int) -> list[slice]:
    """Parts of `size`; the whole where it is no multiple, for lanes are cut at multiples alone."""
    if (whole.stop - whole.start) % size:
        return [whole]
    return [slice(start, start + size) for start in range(whole.start, whole.stop, size)]


def split(operands: Any) -> tuple[Any, Any]:
    """(arrays, specs) of a tree of operands."""
    is_operand = lambda x: isinstance(x, tuple) and len(x) == 2 and not isinstance(x[0], tuple)  # noqa: E731
    arrays = jax.tree.map(lambda x: x[0], operands, is_leaf=is_operand)
    return arrays, jax.tree.map(lambda x: x[1], operands, is_leaf=is_operand)
