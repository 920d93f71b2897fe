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
from hypothesis import HealthCheck, given, settings, strategies as st

from kernels import RelativeBias, attention, masks

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
        "dense": masks.Dense(jnp.asarray(np.random.default_rng(1).random((q_len, kv_len)) < 0.3)),
        "nothing": ~masks.Full(),
    }


MASKS = tuple(mask_cases(16, 40, 48))
BIASES = ("distances", "distances one way", "buckets", "array", "array of a row")


def make_bias(kind: str | None, shape: Shape, block: int) -> jax.Array | RelativeBias | None:
    if kind is None:
        return None
    rng = np.random.default_rng(2)
    q_len, kv_len = shape.lengths(block)
    if kind.startswith("array"):
        sizes = (1, shape.heads, q_len, kv_len) if kind == "array" else (shape.batch, 1, 1, kv_len)
        return jnp.asarray(rng.normal(size=sizes), jnp.float32)
    table = jnp.asarray(rng.normal(size=(8, shape.heads)), jnp.float32)
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
        bias = make_bias(bias, shape, self.block)
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
        """Over a leading axis of calls: mapped, and one after another with recomputation."""
        arrays = [jnp.stack([x, 2 * x]) for x in draw(self.shape, self.block)]
        mask, options = self.mask("segments"), {"block_sizes": (self.block, self.block)}

        def scalar(arrays, backend, **options):
            return jnp.sin(attention(*arrays, mask, backend=backend, **options)).sum()

        @jax.checkpoint
        def one(arrays):
            return scalar(arrays, self.backend, **options)

        def mapped(arrays):
            return jax.vmap(one)(arrays).sum()

        def scanned(arrays):
            return jax.lax.scan(lambda total, x: (total + one(x), None), 0.0, arrays)[0]

        def plain(arrays):
            return sum(scalar([x[i] for x in arrays], "reference") for i in range(2))

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


Q_LEN, KV_LEN, SMALL_BLOCK = 6, 6, 2


def drawn_ids(draw):
    rows = st.lists(st.integers(0, 2), min_size=Q_LEN, max_size=Q_LEN)
    return np.array(draw(st.lists(rows, min_size=2, max_size=2)), np.int32)


@st.composite
def simple_masks(draw):
    """Any mask, over 6 slots of queries and of keys."""
    kind = draw(st.integers(0, 9))
    few = st.integers(0, 3)
    if kind == 0:
        return masks.Causal(offset=draw(st.integers(-2, 2)))
    if kind == 1:
        return masks.Prefix(drawn_ids(draw))
    if kind == 2:
        return masks.Segments(drawn_ids(draw), drawn_ids(draw))
    if kind == 3:
        sides = st.none() | st.integers(-1, 3)
        return masks.SlidingWindow(draw(sides), draw(sides))
    if kind == 4:
        bits = draw(st.integers(0, 2 ** (Q_LEN * KV_LEN) - 1))
        flags = [bits >> i & 1 for i in range(Q_LEN * KV_LEN)]
        return masks.Dense(np.array(flags, bool).reshape(Q_LEN, KV_LEN))
    if kind == 5:
        return masks.Dilated(draw(few), draw(few), draw(st.integers(1, 3)))
    if kind == 6:
        return masks.GlobalTokens(
            flags=drawn_ids(draw), rows=draw(st.booleans()), columns=draw(st.booleans())
        )
    if kind == 7:
        return masks.BigBird(SMALL_BLOCK, 1, draw(st.integers(0, 1)), draw(st.integers(0, 1)))
    if kind == 8:
        columns = draw(st.lists(st.integers(-1, 2), min_size=6, max_size=6))
        return masks.BlockIndex(np.array(columns).reshape(1, 1, 3, 2), SMALL_BLOCK, SMALL_BLOCK)
    return masks.Full()


@st.composite
def drawn_masks(draw):
    left, right = draw(simple_masks()), draw(simple_masks())
    join = draw(st.sampled_from(["left", "not", "and", "or"]))
    return {"left": left, "not": ~left, "and": left & right, "or": left | right}[join]


any_mask = given(mask=drawn_masks())
quick = functools.partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow])
