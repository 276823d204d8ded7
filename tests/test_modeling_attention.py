"""The one attention call against torch, and the cases it refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import jit
from tolerances import LEAF, assert_close

from llaso_jax.modeling.kernels.attention import api, attention
from llaso_jax.modeling.kernels.attention.chunked import chunked_attention
from llaso_jax.modeling.kernels.attention.reference import reference_attention


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2), (3, 1)])
def test_attention_and_its_gradients_equal_torch(
    monkeypatch, implementation: str, causal: bool, heads: int, kv: int
):
    monkeypatch.setattr(api, "chunked_attention", partial(chunked_attention, chunk=3))
    q, k, v = (
        random(2, 7, heads, 8, seed=0),
        random(2, 7, kv, 8, seed=1),
        random(2, 7, kv, 8, seed=2),
    )
    weight = random(2, 7, heads, 8, seed=3)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32)
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    if causal:
        mask = mask & np.tri(7, dtype=bool)
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), attn_mask=torch.tensor(mask), enable_gqa=True
    ).transpose(1, 2)
    (expected * torch.tensor(weight)).sum().backward()

    def objective(q, k, v):
        out = attention(
            q,
            k,
            v,
            causal=causal,
            q_segment_ids=segments,
            kv_segment_ids=segments,
            implementation=implementation,
        )
        return (out * weight).sum(), out

    (_, out), gradients = jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))(q, k, v)
    assert_close(out, expected.detach(), LEAF, "attention")
    for name, ours, theirs in zip("qkv", gradients, tensors, strict=True):
        assert_close(ours, theirs.grad, LEAF, f"attention gradient by {name}")


ROWS = {
    "no mask": (None, None),
    "segments": (np.array([[1, 1, 2, 2, 2, 3, 3, 0]] * 2), np.array([[1, 2, 2, 3, 0, 0]] * 2)),
    "rows without any key": (
        np.full((2, 8), 7),
        np.array([[1, 1, 1, 2, 2, 0], [7, 7, 7, 1, 1, 1]]),
    ),
}


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("name", ROWS)
def test_chunks_give_what_all_queries_at_once_give(name: str, chunk: int):
    q, k, v = random(2, 8, 6, 16, seed=0), random(2, 6, 2, 16, seed=1), random(2, 6, 2, 16, seed=2)
    weight = random(2, 8, 6, 16, seed=3)
    q_ids, kv_ids = ROWS[name]
    masks = {"causal": False, "q_segment_ids": q_ids, "kv_segment_ids": kv_ids}

    def results(function, **options):
        def objective(q, k, v):
            out = function(q, k, v, **masks, **options)
            return (out * weight).sum(), out

        (_, out), grads = jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    for ours, expected in zip(
        results(chunked_attention, chunk=chunk), results(reference_attention), strict=True
    ):
        assert_close(ours, expected, LEAF)


def test_bfloat16_chunks_sum_in_float32():
    q, k, v = (jnp.asarray(random(1, 64, 2, 32, seed=i), jnp.bfloat16) for i in range(3))
    weight = random(1, 64, 2, 32, seed=3)

    def gradients(dtype, **options):
        def objective(q, k, v):
            out = chunked_attention(
                q, k, v, causal=True, q_segment_ids=None, kv_segment_ids=None, **options
            )
            assert out.dtype == dtype
            return (out * weight).sum()

        grads = jit(jax.grad(objective, (0, 1, 2)))(*(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(grad, np.float32) for grad in grads]

    exact = gradients(jnp.float32)
    for ours, whole, expected in zip(
        gradients(jnp.bfloat16, chunk=2), gradients(jnp.bfloat16), exact, strict=True
    ):
        # Weights and results are rounded to bf16 (2**-9) a few times; many small chunks add nothing to that.
        scale = np.abs(expected).max()
        assert np.abs(ours - expected).max() < 2**-6 * scale
        assert np.abs(ours - whole).max() < 2**-7 * scale


def test_no_array_of_all_scores_is_made_and_auto_sees_to_it():
    q = jax.ShapeDtypeStruct((1, 1500, 4, 64), np.float32)

    def shapes(implementation):
        def objective(q):
            return attention(q, q, q, causal=True, implementation=implementation).sum()

        text = str(jax.make_jaxpr(jax.grad(objective))(q))
        return "1500,1500" in text, "256,1500" in text

    assert shapes("reference") == (True, False)
    assert shapes("chunked") == (False, True)
    assert shapes("auto") == (False, True)


def test_cases_it_cannot_do_are_errors_with_the_numbers():
    q, k = random(1, 4, 4, 8, seed=0), random(1, 4, 3, 8, seed=1)
    with pytest.raises(ValueError, match=r"4 query heads .* 3 key/value heads"):
        attention(q, k, k, causal=True)
    with pytest.raises(ValueError, match="equal lengths, got 4 and 2"):
        attention(q, q[:, :2], q[:, :2], causal=True)
    with pytest.raises(ValueError, match="both q_segment_ids and kv_segment_ids"):
        attention(q, q, q, causal=True, q_segment_ids=np.ones((1, 4), np.int32))
    with pytest.raises(ValueError, match="'flesh'"):
        attention(q, q, q, causal=True, implementation="flesh")
