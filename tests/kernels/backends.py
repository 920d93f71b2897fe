"""What every attention backend must pass: one class, inherited by each backend's tests.

Everything is compared with the "reference" backend: outputs, log-sum-exps, and the gradients of a
scalar of both with respect to queries, keys, values and bias.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, strategies as st

from kernels import RelativeBias, attention, masks
from tests.kernels.drawn_masks import UNITS, drawn_masks, quick

# Compiling is most of these tests; the programs are tiny.
fast_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call, in blocks where lengths are concerned."""

    batch: int = 2
    q_blocks: float = 2.5
    kv_blocks: float = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32

    def lengths(self, block: int) -> tuple[int, int]:
        return int(self.q_blocks * block), int(self.kv_blocks * block)


def draw(shape: Shape, block: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """q, k and v of standard normal values."""
    rng = np.random.default_rng(0)
    q_len, kv_len = shape.lengths(block)
    sizes = [(q_len, shape.heads), *[(kv_len, shape.kv_heads)] * 2]
    return [
        jnp.asarray(rng.normal(size=(shape.batch, length, heads, shape.head_dim)), dtype)
        for length, heads in sizes
    ]


def segment_ids(block: int, length: int) -> np.ndarray:
    """[2, length]: uneven segments, the last slots padding; the second row pads its first block."""
    slots = np.arange(length)
    first = np.where(slots < length - 3, 1 + slots // (block + 3), 0)
    second = np.where(slots < block, 0, 1 + (slots > 2 * block))
    return np.stack([first, second]).astype(np.int32)


def mask_cases(block: int, q_len: int, kv_len: int) -> dict[str, masks.Mask]:
    """Masks by name; those whose arrays are JAX's have their blocks listed at run time."""
    q_ids, kv_ids = segment_ids(block, q_len), segment_ids(block, kv_len)
    rows = -(-q_len // block)
    index = np.array([[2, 0], [1, -1], [-1, -1]])[:rows]
    by_head = np.stack([index, index[::-1], index % 2, index])[None]  # [1, 4, R, 2]
    flags = (np.arange(kv_len) % (2 * block) == 3)[None]
    return {
        "full": masks.Full(),
        "causal": masks.Causal(),
        "window": masks.SlidingWindow(left=block // 2, right=3),
        "segments": masks.Segments(jnp.asarray(q_ids), jnp.asarray(kv_ids)) & masks.Causal(),
        "segments of the host": masks.Segments(q_ids, kv_ids),
        "prefix": masks.Causal() | masks.Prefix(jnp.array([block + 2, 0])),
        "isolated": masks.Segments(jnp.ones_like(q_ids), jnp.asarray(kv_ids != 0))
        | masks.SlidingWindow(0, 0),
        "dilated": masks.Dilated(3, 2, 5),
        "window and globals": masks.SlidingWindow(2, 2) | masks.GlobalTokens(count=2),
        "global columns": masks.SlidingWindow(2, 2)
        | masks.GlobalTokens(flags=jnp.asarray(flags), rows=False),
        "bigbird": masks.BigBird(block, 1, 1, 1) & masks.Causal(),
        "a shape": masks.AShape(sink=2, window=block),
        "vertical slash": masks.VerticalSlash(
            jnp.array([[[1, block + 4, -1]]]), jnp.array([[[0, block + 2, -1]]]), block
        ),
        "block index": masks.BlockIndex(jnp.asarray(by_head), block, block) & ~masks.Causal(-2),
        "dense": masks.Dense(
            jnp.asarray(np.random.default_rng(1).random((2, 4, q_len, kv_len)) < 0.3)
        ),
        "nothing": ~masks.Full(),
    }


MASKS = tuple(mask_cases(16, 40, 48))
BIASES = ("distances", "distances one way", "buckets", "array", "array of a row")


def make_bias(
    kind: str | None, shape: Shape, block: int, dtype: Any = jnp.float32
) -> jax.Array | RelativeBias | None:
    if kind is None:
        return None
    rng = np.random.default_rng(2)
    q_len, kv_len = shape.lengths(block)
    if kind.startswith("array"):
        sizes = (1, shape.heads, q_len, kv_len) if kind == "array" else (shape.batch, 1, 1, kv_len)
        return jnp.asarray(rng.normal(size=sizes), dtype)
    table = jnp.asarray(rng.normal(size=(8, shape.heads)), dtype)
    if kind == "buckets":
        positions = [
            jnp.asarray(rng.integers(0, 30, (n, length)))
            for n, length in zip((shape.batch, 1), (q_len, kv_len), strict=True)
        ]
        return RelativeBias(table, *positions, max_distance=20)
    return RelativeBias(table, bidirectional=kind == "distances", max_distance=2 * block)


def evaluate(backend: str, arrays, bias, mask, **options):
    """(output, log-sum-exp), and gradients with respect to (q, k, v) and bias."""

    def call(arrays, bias):
        return attention(
            *arrays, mask, bias=bias, backend=backend, return_residuals=True, **options
        )

    def scalar(arrays, values):
        output, log_sum_exp = call(arrays, with_values(bias, values))
        finite = jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp, 0.0)
        return jnp.sum(jnp.sin(output.astype(jnp.float32))) + jnp.sum(finite**2) * 0.1

    values = bias.table if isinstance(bias, RelativeBias) else bias
    return call(arrays, bias), jax.grad(scalar, argnums=(0, 1))(arrays, values)


def with_values(bias, values):
    if isinstance(bias, RelativeBias):
        return dataclasses.replace(bias, table=values)
    return values


def assert_same(actual, expected, tolerance: float) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        size = np.abs(e[np.isfinite(e)]).max(initial=1.0)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * size)


@functools.cache
def of_written_out(backend: str, **options: Any):
    """`evaluate` with a Dense mask as an argument, compiled once for all masks."""

    def call(arrays, seen):
        return evaluate(backend, arrays, None, masks.Dense(seen), **options)

    return fast_jit(call)


class BackendTests:
    """Attributes say how a backend is asked.

    Attributes:
      backend: its name.
      block: slots of its blocks in these tests.
      shape: of most cases.
      tolerance: of float32.
    """

    backend: str
    block: int = 16
    shape: Shape = Shape()
    tolerance: float = 2e-5

    def check(
        self, mask=None, *, shape=None, bias=None, dtype=jnp.float32, tolerance=None, **options
    ):
        """One call against the reference; returns what the backend gave."""
        shape = shape or self.shape
        arrays = draw(shape, self.block, dtype)
        bias = make_bias(bias, shape, self.block, dtype)
        mask = mask if isinstance(mask, masks.Mask) else self.mask(mask or "causal", shape)
        expected = fast_jit(functools.partial(evaluate, "reference", **options))(arrays, bias, mask)
        options["block_sizes"] = (self.block, self.block)
        # NumPy arrays of a mask are host knowledge: closed over, not passed.
        actual = fast_jit(
            lambda arrays, bias: evaluate(self.backend, arrays, bias, mask, **options)
        )(arrays, bias)
        assert_same(actual, expected, tolerance or self.tolerance)
        return actual

    def mask(self, name: str, shape: Shape | None = None) -> masks.Mask:
        return mask_cases(self.block, *(shape or self.shape).lengths(self.block))[name]

    @pytest.mark.parametrize("name", MASKS)
    def test_masks(self, name):
        (output, log_sum_exp), ((dq, dk, dv), _) = self.check(name)
        blind = np.broadcast_to(
            ~self.mask(name).dense(*self.shape.lengths(self.block)).any(-1),
            (self.shape.batch, self.shape.heads, output.shape[1]),
        ).swapaxes(1, 2)
        assert np.all(np.asarray(output)[blind] == 0) and np.all(np.asarray(dq)[blind] == 0)
        assert np.all(np.asarray(log_sum_exp)[blind] == -np.inf)

    @given(data=st.data(), as_written=st.sampled_from([False, False, True]))
    @quick(max_examples=10, phases=set(Phase) - {Phase.shrink, Phase.explain})
    def test_drawn_masks(self, data, as_written):
        """As they were written, compiled each, or written out, as data of one program."""
        blocks = self.shape.kv_blocks
        shape = Shape(q_blocks=blocks, kv_blocks=blocks, heads=2, kv_heads=1)
        arrays, length = draw(shape, self.block), int(blocks * self.block)
        mask = data.draw(drawn_masks(length // UNITS))
        seen = jnp.broadcast_to(mask.dense(length, length), (2, 1, length, length))
        expected = of_written_out("reference")(arrays, seen)
        options = {"block_sizes": (self.block, self.block)}
        if as_written:
            actual = fast_jit(lambda x: evaluate(self.backend, x, None, mask, **options))(arrays)
        else:
            actual = of_written_out(self.backend, **options)(arrays, seen)
        assert_same(actual, expected, self.tolerance)

    @pytest.mark.parametrize("kind", BIASES)
    def test_biases(self, kind):
        self.check("segments" if kind == "distances" else "causal", bias=kind)

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_head_dims(self, head_dim):
        self.check(shape=dataclasses.replace(self.shape, head_dim=head_dim))

    @pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (1, 1)])
    def test_grouped_queries(self, heads, kv_heads):
        shape = dataclasses.replace(self.shape, heads=heads, kv_heads=kv_heads)
        self.check("window", shape=shape, bias="distances")

    def test_soft_cap_and_scale(self):
        self.check("window", bias="distances", logits_soft_cap=2.0, scale=1.0)

    def test_bfloat16_accumulates_in_float32(self):
        self.check("segments", bias="distances", dtype=jnp.bfloat16, tolerance=3e-2)

    def test_large_logits_do_not_overflow(self):
        q, k, v = draw(self.shape, self.block)
        output = attention(
            q * 1e4, k * 1e4, v, masks.Causal(), backend=self.backend, block_sizes=(self.block,) * 2
        )
        assert np.isfinite(output).all()
        first = jnp.repeat(v[:, 0], q.shape[2] // v.shape[2], axis=1)
        np.testing.assert_allclose(output[:, 0], first, rtol=1e-6)

    @pytest.mark.parametrize("on_host", [True, False])
    def test_inactive_blocks_are_never_read(self, on_host):
        """NaN in block 1 stays in block 1, where rows see their own block alone; block 2 of the
        second row is padding: it sees nothing and nobody sees it."""
        shape = dataclasses.replace(self.shape, q_blocks=3, kv_blocks=3)
        clean = draw(shape, self.block)
        ids = np.repeat([[1, 2, 3], [1, 2, 0]], self.block, axis=1).astype(np.int32)
        where = np.repeat([[False, True, False], [False, True, True]], self.block, axis=1)
        ids_here = ids if on_host else jnp.asarray(ids)
        mask = masks.Segments(ids_here, ids_here)
        spoilt = [jnp.where(where[:, :, None, None], jnp.nan, x) for x in clean]

        def outputs(arrays):
            return attention(
                *arrays, mask, backend=self.backend, block_sizes=(self.block, self.block)
            )

        def kept(arrays):
            return jnp.where(where[:, :, None, None], 0.0, jnp.sin(outputs(arrays))).sum()

        compute = fast_jit(lambda arrays: (outputs(arrays), jax.grad(kept)(arrays)))
        for actual, expected in zip(
            *(jax.tree.leaves(compute(x)) for x in (spoilt, clean)), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(actual)[~where], np.asarray(expected)[~where])
        blind = ids == 0
        for leaf in jax.tree.leaves(compute(spoilt)):
            assert np.all(np.asarray(leaf)[blind] == 0)

    def test_vmap_scan_and_remat(self):
        """Over a leading axis of calls, the mask's data included: mapped, and one after another
        with recomputation."""
        arrays = [jnp.stack([x, 2 * x]) for x in draw(self.shape, self.block)]
        masks_ = jax.tree.map(lambda ids: jnp.stack([ids, ids[::-1]]), self.mask("segments"))
        options = {"block_sizes": (self.block, self.block)}

        def scalar(arrays, mask, backend, **options):
            return jnp.sin(attention(*arrays, mask, backend=backend, **options)).sum()

        @jax.checkpoint
        def one(call):
            return scalar(*call, self.backend, **options)

        def mapped(arrays):
            return jax.vmap(one)((arrays, masks_)).sum()

        def scanned(arrays):
            return jax.lax.scan(lambda total, x: (total + one(x), None), 0.0, (arrays, masks_))[0]

        def plain(arrays):
            calls = (jax.tree.map(lambda x, i=i: x[i], (arrays, masks_)) for i in range(2))
            return sum(scalar(*call, "reference") for call in calls)

        expected = fast_jit(jax.value_and_grad(plain))(arrays)
        for function in (mapped, scanned):
            assert_same(fast_jit(jax.value_and_grad(function))(arrays), expected, self.tolerance)

    def test_shard_map(self):
        """Batch and kv heads over a mesh, with the mask's data and the bias's heads sharded alike;
        the table's gradient is summed over the batch's shards."""
        if jax.device_count() < 4:
            pytest.skip("it takes four devices: tests/kernels/test_devices.py runs it with them")
        axes = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axes, devices=jax.devices()[:4])
        spec = jax.P("data", None, "tensor")
        arrays, mask = draw(self.shape, self.block), self.mask("segments")
        table = make_bias("distances", self.shape, self.block).table

        def call(arrays, table, mask, **options):
            return attention(*arrays, mask, bias=RelativeBias(table), **options)

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=([spec] * 3, jax.P(None, "tensor"), jax.P("data")),
            out_specs=spec,
            # Pallas' interpreter does not say along which axes its loops' values vary.
            check_vma=self.backend == "xla",
        )
        def sharded(arrays, table, mask):
            block_sizes = (self.block, self.block)
            return call(arrays, table, mask, backend=self.backend, block_sizes=block_sizes)

        def scalar(arrays, table):
            return jnp.sin(sharded(arrays, table, mask)).sum()

        def plain(arrays, table):
            return jnp.sin(call(arrays, table, mask, backend="reference")).sum()

        actual = fast_jit(jax.value_and_grad(scalar, (0, 1)))(arrays, table)
        expected = fast_jit(jax.value_and_grad(plain, (0, 1)))(arrays, table)
        assert_same(actual, expected, self.tolerance)
