"""The Llama decoder against transformers, module by module; causality, packing and the key/value cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from reference import (
    TINY_SCALING,
    apply,
    arrays,
    attention_params,
    gradients,
    hf_llama_config,
    jit,
    layer_params,
    llama_heads,
    llama_params,
    pure,
    random_params,
    torch_llama,
)
from tolerances import COMPOSED, LEAF, assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import unflatten
from llaso_jax.modeling.kernels.attention import attention
from llaso_jax.modeling.layers import RMSNorm
from llaso_jax.modeling.llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
)
from llaso_jax.modeling.rope import RopeScaling, inverse_frequencies, rotary_table, rotate

F32 = ComputeConfig()


def config(width=32, layers=2, heads=4, kv=2, scaling=TINY_SCALING, **other) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        rope_scaling=scaling,
        **other,
    )


CONFIGS = {
    "grouped, llama3 scaling, tied": config(),
    "multi-head, no scaling, untied": config(
        kv=4, layers=1, scaling=None, tie_word_embeddings=False, rope_theta=1e4
    ),
    "multi-query, explicit head_dim, 3 layers": config(
        width=24, layers=3, heads=3, kv=1, head_dim=16, rms_norm_eps=1e-3
    ),
}
each_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positions_of(b: int, s: int) -> np.ndarray:
    return np.broadcast_to(np.arange(s, dtype=np.int32), (b, s))


def torch_rope(cfg: LlamaConfig, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    rope = LlamaRotaryEmbedding(hf_llama_config(cfg))
    return rope(torch.zeros(1), torch.tensor(np.array(positions)))


def torch_causal_mask(s: int) -> torch.Tensor:
    return torch.full((1, 1, s, s), -torch.inf).triu(1)


def our_rope(cfg: LlamaConfig, positions: np.ndarray):
    table = inverse_frequencies(cfg.head_width, cfg.rope_theta, cfg.rope_scaling)
    return rotary_table(jnp.asarray(positions), table)


def attend_causally(q, k, v):
    return attention(q, k, v, causal=True), None


# --- leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm_equals_transformers(eps: float):
    reference = LlamaRMSNorm(24, eps=eps)
    torch.nn.init.normal_(reference.weight)
    x = random(2, 5, 24) * 0.1
    actual = apply(lambda rngs: RMSNorm(24, eps=eps, rngs=rngs), arrays(reference), x)
    assert_close(actual, reference(torch.tensor(x)).detach(), LEAF, "RMSNorm")


@pytest.mark.parametrize("scaling", [None, RopeScaling(), TINY_SCALING], ids=repr)
@pytest.mark.parametrize(("head_dim", "theta"), [(16, 1e4), (64, 1e5), (80, 1e4), (128, 5e5)])
def test_rotary_table_equals_transformers_at_long_positions(head_dim, theta, scaling):
    """128 and 5e5 are Llama-3.2-3B's, 64 and 1e5 are SmolLM2's; 131071 is Llama-3.2's last position."""
    cfg = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_theta=theta,
        rope_scaling=scaling,
    )
    positions = np.array([[0, 1, 2, 257, 1500, 2047, 8191, 32768, 131071]], np.int32)
    cos, sin = torch_rope(cfg, positions)
    half = head_dim // 2
    ours = our_rope(cfg, positions)
    assert_close(ours[0][:, :, 0], cos[..., :half], LEAF, "RoPE cosines")
    assert_close(ours[1][:, :, 0], sin[..., :half], LEAF, "RoPE sines")


@pytest.mark.parametrize(
    ("head_dim", "scaling"), [(128, RopeScaling()), (8, TINY_SCALING)], ids=["3B", "tiny"]
)
def test_llama3_scaling_slows_long_waves_keeps_short_ones_and_blends_between(head_dim, scaling):
    ratio = inverse_frequencies(head_dim, 5e5, None) / inverse_frequencies(head_dim, 5e5, scaling)
    assert ratio[0] == 1
    assert ratio[-1] == scaling.factor
    assert (np.diff(ratio) >= 0).all()
    assert ((ratio > 1.1) & (ratio < 0.9 * scaling.factor)).any()


def test_rotation_is_computed_in_f32_whatever_the_dtype():
    x = random(1, 300, 2, 8)
    frequencies = inverse_frequencies(8, 1e4, None)
    table = jit(lambda p: rotary_table(p, frequencies))(positions_of(1, 300))
    exact = jit(rotate)(x, table)
    narrow = jit(rotate)(x.astype(jnp.bfloat16), table)
    assert narrow.dtype == jnp.bfloat16
    # bf16 keeps 8 bits of the input and of the result; angles in bf16 would be off by a radian.
    assert_close(narrow.astype(jnp.float32), exact, 2**-7)


@each_config
def test_attention_equals_transformers(cfg: LlamaConfig):
    reference = torch_llama(cfg).model.layers[0].self_attn
    x, positions = random(2, 9, cfg.hidden_size), positions_of(2, 9) + 5
    expected, _ = reference(
        torch.tensor(x), torch_rope(cfg, positions), attention_mask=torch_causal_mask(9)
    )

    class Causal(nnx.Module):
        def __init__(self, rngs):
            self.attention = LlamaAttention(cfg, rngs=rngs)

        def __call__(self, x):
            return self.attention(x, our_rope(cfg, positions), attend_causally)[0]

    params = attention_params(arrays(reference), llama_heads(cfg))
    actual = apply(Causal, {"attention": params}, x)
    assert_close(actual, expected.detach(), LEAF, "Llama attention")


@each_config
def test_mlp_equals_transformers(cfg: LlamaConfig):
    reference = torch_llama(cfg).model.layers[0].mlp
    x = random(2, 5, cfg.hidden_size)
    params = unflatten({name.replace(".", "/"): w for name, w in arrays(reference).items()})
    actual = apply(lambda rngs: LlamaMLP(cfg, rngs=rngs), params, x)
    assert_close(actual, reference(torch.tensor(x)).detach(), LEAF, "Llama MLP")


@each_config
def test_decoder_layer_equals_transformers(cfg: LlamaConfig):
    reference = torch_llama(cfg).model.layers[-1]
    x, positions = random(2, 9, cfg.hidden_size), positions_of(2, 9)
    expected = reference(
        torch.tensor(x),
        attention_mask=torch_causal_mask(9),
        position_embeddings=torch_rope(cfg, positions),
    )

    class Causal(nnx.Module):
        def __init__(self, rngs):
            self.layer = LlamaDecoderLayer(cfg, rngs=rngs)

        def __call__(self, x):
            return self.layer(x, our_rope(cfg, positions), attend_causally)[0]

    params = layer_params(arrays(reference), llama_heads(cfg))
    actual = apply(Causal, {"layer": params}, x)
    assert_close(actual, expected.detach(), LEAF, "Llama layer")


# --- the whole decoder ----------------------------------------------------------------------------


@each_config
def test_logits_and_gradients_equal_transformers(cfg: LlamaConfig):
    reference = torch_llama(cfg)
    x, weight = random(2, 9, cfg.hidden_size), random(2, 9, cfg.vocab_size, seed=1)
    torch_x = torch.tensor(x, requires_grad=True)
    expected = reference(inputs_embeds=torch_x).logits
    (expected * torch.tensor(weight)).sum().backward()
    if cfg.tie_word_embeddings:
        assert reference.lm_head.weight is reference.model.embed_tokens.weight
    else:
        # Embeddings enter from outside: only the head has a gradient.
        assert reference.model.embed_tokens.weight.grad is None
        reference.model.embed_tokens.weight.grad = torch.zeros(cfg.vocab_size, cfg.hidden_size)

    graph, _ = pure(lambda rngs: LlamaModel(cfg, F32, rngs=rngs))

    def objective(params, x):
        model = nnx.merge(graph, nnx.State(params))
        hidden, _ = model(x, positions_of(2, 9), np.ones((2, 9), np.int32))
        logits = model.logits(hidden)
        return (logits * weight).sum(), logits

    (_, logits), (by_params, by_x) = jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    )(llama_params(arrays(reference), cfg), x)
    assert_close(logits, expected.detach(), COMPOSED, "LlamaModel logits")
    assert_close(by_x, torch_x.grad, COMPOSED, "gradient by embeddings")
    wanted = llama_params(gradients(reference), cfg)
    if not cfg.tie_word_embeddings:
        assert not np.asarray(by_params.pop("embed_tokens")["weight"]).any()
        wanted.pop("embed_tokens")
    assert_close(by_params, wanted, COMPOSED, "gradient of LlamaModel")


def test_embedding_and_hidden_states_equal_transformers():
    cfg = CONFIGS["grouped, llama3 scaling, tied"]
    reference = torch_llama(cfg)
    tokens = np.array([[3, 1, 4, 1, 5, 9]], np.int32)
    expected = reference.model(torch.tensor(tokens), output_hidden_states=True)
    graph, _ = pure(lambda rngs: LlamaModel(cfg, F32, rngs=rngs))

    def run(params):
        model = nnx.merge(graph, nnx.State(params))
        x = model.embed(jnp.asarray(tokens))
        return x, *model(x, positions_of(1, 6), np.ones((1, 6), np.int32), hidden_states=True)

    x, last, states = jit(run)(llama_params(arrays(reference), cfg))
    inputs = [state.detach() for state in expected.hidden_states[:-1]]
    assert_close(x, inputs[0], LEAF, "embedding")
    assert_close(states[:-1], np.stack(inputs), COMPOSED, "layer inputs")
    assert_close(last, expected.last_hidden_state.detach(), COMPOSED, "hidden states")


@functools.cache
def tiny():
    """(merge function, parameters, config) of one decoder."""
    cfg = config()
    graph, params = pure(lambda rngs: LlamaModel(cfg, F32, rngs=rngs))
    return (lambda p: nnx.merge(graph, nnx.State(p))), random_params(params), cfg


def test_no_position_depends_on_a_later_one_or_on_another_segment():
    """By gradient: d hidden[s] / d x[t] is zero exactly where s must not see t."""
    model, params, cfg = tiny()
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0]], np.int32)
    direction = random(cfg.hidden_size, seed=3)

    def summary(x):
        hidden, _ = model(params)(x, positions, segments)
        return hidden[0] @ direction

    jacobian = jit(jax.jacrev(summary))(random(1, 8, cfg.hidden_size))[:, 0]
    depends = np.abs(jacobian).max(-1) > 0
    s, t = np.indices((8, 8))
    allowed = (s >= t) & (segments[0][s] == segments[0][t])
    np.testing.assert_array_equal(depends, allowed)


def test_decode_equals_full_forward_for_rows_of_unequal_length():
    """Read prompts of 2, 5 and 4, then four more tokens each, one at a time."""
    model, params, cfg = tiny()
    lengths, steps, s = np.array([2, 5, 4]), 4, 5
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab_size, (3, s + steps)).astype(np.int32)
    whole = (np.arange(s + steps)[None] < (lengths + steps)[:, None]).astype(np.int32)
    prompt = (np.arange(s)[None] < lengths[:, None]).astype(np.int32)

    def full(params):
        m = model(params)
        return m(m.embed(jnp.asarray(tokens)), positions_of(3, s + steps), whole)[0]

    def cached(params):
        m = model(params)
        x = m.embed(jnp.asarray(tokens[:, :s]))
        first, cache = m.prefill(x, positions_of(3, s), prompt, max_length=s + steps)
        filled = [cache.length]
        hidden = []
        for i in range(steps):
            following = jnp.asarray(tokens[np.arange(3), lengths + i])[:, None]
            out, cache = m.decode(m.embed(following), cache)
            hidden.append(out[:, 0])
        return first, jnp.stack(hidden, 1), jnp.stack([*filled, cache.length])

    expected = jit(full)(params)
    first, hidden, filled = jit(cached)(params)
    np.testing.assert_array_equal(filled, [lengths, lengths + steps])
    for row, n in enumerate(lengths):
        assert_close(first[row, :n], expected[row, :n], LEAF, "prefill")
        assert_close(hidden[row], expected[row, n : n + steps], LEAF, "decode")


def test_padded_vocabulary_changes_no_logit_and_gets_no_probability():
    model, params, cfg = tiny()
    padded_cfg = config(vocab_multiple_of=16)  # 40 -> 48 rows
    graph, shapes = pure(lambda rngs: LlamaModel(padded_cfg, F32, rngs=rngs))
    table = np.full((48, cfg.hidden_size), 9, np.float32)  # garbage in the padding
    table[:40] = params["embed_tokens"]["weight"]
    assert shapes["embed_tokens"]["weight"].shape == table.shape
    hidden = random(2, 3, cfg.hidden_size)
    padded = params | {"embed_tokens": {"weight": table}}

    expected = jit(lambda p: model(p).logits(hidden))(params)
    logits = jit(lambda p: nnx.merge(graph, nnx.State(p)).logits(hidden))(padded)
    assert_close(logits[..., :40], expected, LEAF)
    assert (np.asarray(jax.nn.softmax(logits))[..., 40:] == 0).all()


def test_sizes_that_do_not_fit_are_errors_with_both_numbers():
    with pytest.raises(ValueError, match=r"num_attention_heads=3 .* num_key_value_heads=2"):
        config(width=24, heads=3, kv=2)
    with pytest.raises(ValueError, match=r"hidden_size=30 .* num_attention_heads=4"):
        config(width=30)
    with pytest.raises(ValueError, match=r"head_dim=5 must be even"):
        config(head_dim=5)
    with pytest.raises(ValueError, match=r"high_freq_factor=1.0 must exceed low_freq_factor=1.0"):
        RopeScaling(high_freq_factor=1.0)
