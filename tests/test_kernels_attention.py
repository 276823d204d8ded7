"""Every implementation of attention against the definition, and the definition against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from attention_cases import SMALL, Case, expected, random, run
from reference import jit
from tolerances import BFLOAT16, LEAF, assert_close

from llaso_jax.modeling.kernels.attention import UnsupportedAttentionError, api, attention, blocks
from llaso_jax.modeling.kernels.attention.reference import reference_attention
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.rules import FSDP_TENSOR, ShardingError, use_rules

CASES = {
    "encoder": Case(150, 150, 2, 2, 64, causal=False),
    "encoder, audio of two lengths": Case(150, 150, 2, 2, 64, causal=False, ids="lengths"),
    "decoder": Case(260, 260, 3, 1, 64, causal=True),
    "decoder, packed": Case(260, 260, 4, 2, 128, causal=True, ids="packed"),
    "more keys than queries": Case(70, 200, 4, 2, 64, causal=False, ids="packed"),
    "more queries than keys": Case(200, 70, 2, 2, 64, causal=False),
    "queries without any key": Case(140, 150, 2, 1, 64, causal=False, ids="apart"),
}
SPLASH = ("encoder", "decoder, packed", "queries without any key")


def test_the_definition_and_its_gradients_equal_torch():
    case = Case(7, 7, 6, 2, 8, causal=True, ids="packed")
    q, k, v, weight = case.inputs()
    segments, _ = case.segments()
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    mask = mask & np.tri(7, dtype=bool)
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), attn_mask=torch.tensor(mask), enable_gqa=True
    ).transpose(1, 2)
    (out * torch.tensor(weight)).sum().backward()
    ours = expected(case)
    assert_close(ours["out"], out.detach(), LEAF, "attention")
    for name, tensor in zip(("d_q", "d_k", "d_v"), tensors, strict=True):
        assert_close(ours[name], tensor.grad, LEAF, f"attention {name}")


# Of splash, which is JAX's own, three cases show that it is called and masked rightly.
CALLS = [
    pytest.param(
        implementation,
        name,
        marks=[pytest.mark.slow] * (implementation == "splash" and name not in SPLASH),
    )
    for implementation in SMALL
    for name in CASES
]


@pytest.mark.parametrize(("implementation", "name"), CALLS)
def test_outputs_and_gradients_are_those_of_the_definition(implementation: str, name: str):
    assert_close(run(implementation, CASES[name]), expected(CASES[name]), LEAF, implementation)


@pytest.mark.parametrize(
    "implementation",
    ["chunked", "pallas_tpu", "pallas_gpu", pytest.param("splash", marks=pytest.mark.slow)],
)
def test_bfloat16_sums_in_float32(implementation: str):
    case = CASES["decoder, packed"]
    results = run(implementation, case, jnp.bfloat16)
    assert_close(results, expected(case, rounded=True), BFLOAT16, implementation)


@pytest.mark.parametrize("implementation", [*SMALL, "reference"])
def test_a_query_without_any_key_gets_zeros_and_no_gradient(implementation: str):
    results = run(implementation, CASES["queries without any key"])
    assert not results["out"][0].any()
    assert not results["d_q"][0].any()
    assert not results["d_k"][0].any()
    assert not results["d_v"][0].any()
    assert results["out"][1].any(-1).all()
    third = 150 // 3
    assert results["d_v"][1, :third].any(-1).all()
    assert not results["d_v"][1, third:].any()


@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu", "pallas_gpu"])
def test_results_are_bit_equal_in_every_run(implementation: str):
    first, second = (run(implementation, CASES["decoder, packed"]) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize(
    "mesh", ["4x2", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)]
)
def test_a_mesh_gives_what_one_device_gives(implementation: str, mesh: str):
    q, k, v, weight = (
        random(4, 40, heads, 16, seed=seed) for seed, heads in enumerate((4, 2, 2, 4))
    )
    ids = np.repeat(np.arange(4)[None], 10, 1).repeat(4, 0).astype(np.int32)

    def results(q, k, v):
        def objective(q, k, v):
            out = attention(
                q,
                k,
                v,
                causal=True,
                q_segment_ids=ids,
                kv_segment_ids=ids,
                implementation=implementation,
            )
            return (out * weight).sum(), out

        return jax.value_and_grad(objective, (0, 1, 2), has_aux=True)(q, k, v)

    with use_rules(make_mesh(mesh), FSDP_TENSOR):
        program = jit(results).lower(q, k, v).compile()
    (_, out), gradients = program(q, k, v)
    assert out.sharding.shard_shape(out.shape) == (1, 40, 2, 16)
    if implementation != "chunked":  # a kernel's inputs and results stay where they are
        assert "all-gather" not in program.as_text()
    (_, one), expected_gradients = jit(results)(q, k, v)
    assert_close(out, one, LEAF)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert_close(ours, theirs, LEAF)


def test_heads_that_do_not_split_over_a_mesh_are_an_error_for_a_kernel_and_none_for_xla():
    q = random(4, 32, 3, 16, seed=0)

    def compute(implementation):
        with use_rules(make_mesh("4x2"), FSDP_TENSOR):
            return jax.jit(
                lambda q: attention(q, q, q, causal=True, implementation=implementation)
            )(q)

    with pytest.raises(ShardingError, match=r"3 along 'heads'.*2 devices of mesh axis tensor"):
        compute("pallas_tpu")
    one = attention(q, q, q, causal=True, implementation="reference")
    for name in ("auto", "chunked"):
        assert_close(compute(name), one, LEAF, name)


def _reference_relation(q_ids, kv_ids, block_q, block_kv, causal):
    """NONE, SOME or ALL of every pair of blocks, from the whole mask."""
    mask = q_ids[:, :, None] == kv_ids[:, None, :]
    if causal:
        mask = mask & np.tri(*mask.shape[1:], dtype=bool)
    rows, s, t = mask.shape
    parts = mask.reshape(rows, s // block_q, block_q, t // block_kv, block_kv)
    return np.where(parts.all((2, 4)), blocks.ALL, np.where(parts.any((2, 4)), blocks.SOME, 0))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block_q", "block_kv"), [(4, 4), (4, 8), (8, 4)])
def test_block_pairs_of_packed_rows_are_exactly_those_that_interact(causal, block_q, block_kv):
    """Ids that only grow, and 0 behind them; 29 positions, so that the last block has padding."""
    ids = np.array([[1] * 9 + [2] * 12 + [0] * 8, [1] * 3 + [2] * 3 + [3] * 23, [0] * 29], np.int32)
    padded = blocks.pad_ids(jnp.asarray(ids), jnp.asarray(ids), (29, 29), (block_q, block_kv))
    relation = np.asarray(blocks.relations(padded, block_q, block_kv, causal=causal))
    exact = _reference_relation(
        np.asarray(padded.q), np.asarray(padded.kv), block_q, block_kv, causal
    )
    np.testing.assert_array_equal(relation, exact)


def test_ids_in_any_order_lose_no_pair_that_interacts():
    rng = np.random.default_rng(0)
    q_ids, kv_ids = (rng.integers(0, 4, (8, 32)).astype(np.int32) for _ in range(2))
    padded = blocks.Padded(jnp.asarray(q_ids), jnp.asarray(kv_ids))
    relation = np.asarray(blocks.relations(padded, 2, 2, causal=False))
    exact = _reference_relation(q_ids, kv_ids, 2, 2, causal=False)
    assert ((exact == blocks.NONE) | (relation != blocks.NONE)).all()
    np.testing.assert_array_equal(relation == blocks.ALL, exact == blocks.ALL)


def test_blocks_above_the_diagonal_are_not_listed_and_others_are_not_fetched():
    ids = jnp.asarray(np.repeat([1, 2], 16)[None])
    relation = blocks.relations(blocks.Padded(ids, ids), 8, 8, causal=True)
    pairs = blocks.schedule(relation, 8, 8, causal=True, by="q")
    assert pairs.outer.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    # Queries of segment 2 repeat the block that is there until keys of segment 2 come.
    assert pairs.inner.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 2, 3]]
    none, some, every = blocks.NONE, blocks.SOME, blocks.ALL
    assert pairs.kind.tolist() == [[some, every, some, none, none, some, none, none, every, some]]
    spans = blocks.spans(relation)
    assert [x.tolist() for x in spans] == [
        [[0, 0, 2, 2]],  # start
        [[1, 0, 3, 2]],  # first block that is seen entirely
        [[1, 1, 3, 3]],  # first that is not again
        [[1, 2, 3, 4]],  # end
    ]


def test_no_array_of_all_scores_is_made_and_auto_sees_to_it():
    q = jax.ShapeDtypeStruct((1, 1500, 4, 64), np.float32)

    def scores(implementation):
        def objective(q):
            return attention(q, q, q, causal=True, implementation=implementation).sum()

        return "1500,1500" in str(jax.make_jaxpr(jax.grad(objective))(q))

    assert scores("reference")
    for name in ("auto", "chunked", "pallas_tpu", "pallas_gpu", "splash"):
        assert not scores(name)


@pytest.mark.parametrize(
    ("platform", "implementation", "message"),
    [
        ("gpu", "pallas_tpu", "runs on TPU"),
        ("gpu", "splash", "runs on TPU"),
        ("tpu", "pallas_gpu", "runs on GPU"),
        ("tpu", "cudnn", "runs on NVIDIA GPUs"),
    ],
)
def test_a_named_implementation_never_gives_way_to_another(
    monkeypatch, platform: str, implementation: str, message: str
):
    for module in (api, *_modules_of_kernels()):
        monkeypatch.setattr(module, "target_device", lambda: (platform, "some kind"))
    q = random(1, 8, 2, 16, seed=0)
    with pytest.raises(UnsupportedAttentionError, match=message):
        attention(q, q, q, causal=True, implementation=implementation)


def _modules_of_kernels():
    from llaso_jax.modeling.kernels.attention import cudnn, splash
    from llaso_jax.modeling.kernels.attention.pallas_gpu import attention as gpu
    from llaso_jax.modeling.kernels.attention.pallas_tpu import attention as tpu

    return cudnn, splash, gpu, tpu


@pytest.mark.parametrize(
    ("platform", "kernel"), [("tpu", "pallas_tpu"), ("gpu", "pallas_gpu"), ("cpu", None)]
)
def test_auto_prefers_the_kernel_of_the_platform(monkeypatch, platform: str, kernel: str | None):
    monkeypatch.setattr(api, "target_device", lambda: (platform, "some kind"))
    small, large = (api.preferences(scores, jnp.bfloat16) for scores in (64, api.LARGE))
    assert small == ((kernel, "reference") if kernel else ("reference",))
    assert large == ((kernel, "chunked") if kernel else ("chunked",))
    # Triton takes minutes to compile its f32 kernels.
    expected = ("pallas_tpu", "chunked") if kernel == "pallas_tpu" else ("chunked",)
    assert api.preferences(api.LARGE, jnp.float32) == expected


def test_what_a_kernel_cannot_do_is_an_error_and_auto_does_without_it(monkeypatch):
    q = random(1, 8, 2, 16, seed=0).astype(np.float16)
    for name in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(
            UnsupportedAttentionError, match=r"float32 or all bfloat16, got float16"
        ):
            attention(q, q, q, causal=True, implementation=name)
    odd = random(1, 8, 2, 24, seed=0)
    with pytest.raises(UnsupportedAttentionError, match=r"head_dim of 16, .* got 24"):
        attention(odd, odd, odd, causal=True, implementation="pallas_gpu")
    modules = _modules_of_kernels()
    for module in (api, *modules):
        monkeypatch.setattr(module, "target_device", lambda: ("gpu", "some kind"))
    ids = np.ones((1, 8), np.int32)
    with pytest.raises(UnsupportedAttentionError, match="no segment ids"):
        attention(
            q, q, q, causal=True, q_segment_ids=ids, kv_segment_ids=ids, implementation="cudnn"
        )
    with pytest.raises(UnsupportedAttentionError, match="bfloat16, got float32"):
        attention(odd, odd, odd, causal=True, implementation="cudnn")
    masks = {"causal": True, "q_segment_ids": None, "kv_segment_ids": None}
    assert_close(
        attention(odd, odd, odd, causal=True), reference_attention(odd, odd, odd, **masks), LEAF
    )


def test_shapes_that_do_not_fit_are_errors_with_the_numbers():
    q, k = random(1, 4, 4, 8, seed=0), random(1, 4, 3, 8, seed=1)
    with pytest.raises(ValueError, match=r"4 query heads .* 3 key/value heads"):
        attention(q, k, k, causal=True)
    with pytest.raises(ValueError, match="equal lengths, got 4 and 2"):
        attention(q, q[:, :2], q[:, :2], causal=True)
    with pytest.raises(ValueError, match="both q_segment_ids and kv_segment_ids"):
        attention(q, q, q, causal=True, q_segment_ids=np.ones((1, 4), np.int32))
    with pytest.raises(ValueError, match="'flesh'"):
        attention(q, q, q, causal=True, implementation="flesh")
