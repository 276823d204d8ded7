"""The one attention call against torch, and the cases it refuses."""

import jax
import numpy as np
import pytest
import torch
from reference import jit
from tolerances import LEAF, assert_close

from llaso_jax.modeling.kernels.attention import attention


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2), (3, 1)])
def test_attention_and_its_gradients_equal_torch(causal: bool, heads: int, kv: int):
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
        out = attention(q, k, v, causal=causal, q_segment_ids=segments, kv_segment_ids=segments)
        return (out * weight).sum(), out

    (_, out), gradients = jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))(q, k, v)
    assert_close(out, expected.detach(), LEAF, "attention")
    for name, ours, theirs in zip("qkv", gradients, tensors, strict=True):
        assert_close(ours, theirs.grad, LEAF, f"attention gradient by {name}")


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
