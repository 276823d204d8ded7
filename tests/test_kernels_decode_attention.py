"""Attention of one query per row to a cache: every implementation against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import random
from reference import jit
from tolerances import BFLOAT16, LEAF, assert_close

from llaso_jax.modeling.kernels.attention import decode as module
from llaso_jax.modeling.kernels.attention import decode_attention, reference
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.rules import FSDP_TENSOR, use_rules

LAYERS, ROWS, ROOM = 2, 4, 300
IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu", "pallas_gpu")
LENGTHS = np.array([1, 128, 300, 0], np.int32)


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    """The cache of these tests is short: blocks of 128 keys, the last of 44."""
    plain, tpu, gpu = (module.DECODERS[name] for name in IMPLEMENTATIONS[1:])
    monkeypatch.setitem(module.DECODERS, "chunked", functools.partial(plain, block=128))
    monkeypatch.setitem(module.DECODERS, "pallas_tpu", functools.partial(tpu, block=128))
    monkeypatch.setitem(module.DECODERS, "pallas_gpu", functools.partial(gpu, part=128, block=64))


def inputs(heads: int, kv_heads: int, head_dim: int, dtype=jnp.float32):
    """Queries, and the keys and values of both layers."""
    q = random(ROWS, heads, head_dim, seed=0)
    k, v = (random(LAYERS, ROWS, kv_heads, ROOM, head_dim, seed=seed) for seed in (1, 2))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def expected(q, k, v, layer: int) -> np.ndarray:
    """Row by row, what attention gives for the filled part alone."""
    q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    rows = []
    for row, length in enumerate(LENGTHS):
        if not length:
            rows.append(np.zeros_like(q[0]))
            continue
        keys, values = (x[layer, row, :, :length].swapaxes(0, 1)[None] for x in (k, v))
        masks = {"causal": False, "q_segment_ids": None, "kv_segment_ids": None}
        out = reference.reference_attention(q[row][None, None], keys, values, **masks)
        rows.append(np.asarray(out)[0, 0])
    return np.stack(rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (2, 2, 32)])
def test_a_step_sees_the_filled_part_of_its_layer(implementation, heads, kv_heads, head_dim):
    q, k, v = inputs(heads, kv_heads, head_dim)
    step = jit(functools.partial(decode_attention, implementation=implementation))
    for layer in range(LAYERS):
        out = step(q, k, v, LENGTHS, layer)
        assert_close(out, expected(q, k, v, layer), LEAF, implementation)
        assert not np.asarray(out[3]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_sums_in_float32(implementation: str):
    q, k, v = inputs(6, 2, 64, jnp.bfloat16)
    out = jit(functools.partial(decode_attention, implementation=implementation))(q, k, v, LENGTHS)
    assert out.dtype == jnp.bfloat16
    assert_close(np.asarray(out, np.float32), expected(q, k, v, 0), BFLOAT16, implementation)


@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu", "pallas_gpu"])
def test_a_mesh_gives_what_one_device_gives(implementation: str):
    q, k, v = inputs(4, 2, 32)
    step = functools.partial(decode_attention, implementation=implementation)
    with use_rules(make_mesh("4x2"), FSDP_TENSOR):
        out = jit(lambda *x: step(*x))(q, k, v, LENGTHS, 1)
    assert out.sharding.shard_shape(out.shape) == (1, 2, 32)
    assert_close(out, expected(q, k, v, 1), LEAF, implementation)


def test_no_copy_of_a_layer_is_made():
    q, k, v = inputs(6, 2, 64)
    layer = f"f32[1,{ROWS},2,{ROOM},64]"
    programs = {
        name: str(
            jax.make_jaxpr(functools.partial(decode_attention, implementation=name))(
                q, k, v, LENGTHS, 1
            )
        )
        for name in ("reference", "chunked")
    }
    assert layer in programs["reference"]
    assert layer not in programs["chunked"]


def test_lengths_beyond_the_cache_end_with_it():
    q, k, v = inputs(2, 2, 32)
    full, beyond = (np.full(ROWS, length, np.int32) for length in (ROOM, ROOM + 5))
    for name in IMPLEMENTATIONS:
        step = jit(functools.partial(decode_attention, implementation=name))
        np.testing.assert_array_equal(step(q, k, v, beyond), step(q, k, v, full))


def test_shapes_that_do_not_fit_are_errors_with_the_numbers():
    q, k, v = inputs(3, 2, 32)
    with pytest.raises(ValueError, match=r"3 query heads .* 2 key/value heads"):
        decode_attention(q, k, v, LENGTHS)
    with pytest.raises(ValueError, match="'flesh'"):
        decode_attention(q, k, v, LENGTHS, implementation="flesh")
