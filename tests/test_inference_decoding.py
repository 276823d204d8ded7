"""Prefill and decode against full re-computation and transformers, on one device and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import arrays, llama_params, make_batch, random_params, tiny_config, torch_llama
from tolerances import COMPOSED, assert_close

from llaso_jax.errors import ConfigError
from llaso_jax.inference import decoding
from llaso_jax.inference.decoding import Generated, generate_tokens, place_params
from llaso_jax.inference.prompts import bucket
from llaso_jax.inference.sampling import GenerationConfig, Knobs, Method
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import bind, init_params
from llaso_jax.modeling.llama import KVCache
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.rules import FSDP_TENSOR

CFG = tiny_config(text={"num_hidden_layers": 1}, audio={"encoder_layers": 1})
TEXT = [[list(range(1, 10))], [[11, 12, 13, 14]], [[21, 22]]]
SPEECH = [
    [[1, 2, 3], 24, [4, 5, 6], 24, [7]],
    [[11, 12], 24, [13, 14]],
    [[21, 22, 23, 24]],
]
SAMPLED = {"temperature": 1.0, "top_k": 30, "top_p": 0.95, "seed": 3}


@functools.cache
def params():
    tree = jax.eval_shape(lambda: init_params(CFG, jax.random.key(0)))
    return random_params(tree, seed=5)


def prompts(rows, cfg=CFG) -> dict[str, np.ndarray]:
    batch = make_batch([[row] for row in rows], cfg, mel_length=24, answers=1)
    if not batch["mel"].size:
        del batch["mel"]
    return {key: value for key, value in batch.items() if not key.startswith("answer")}


@functools.cache
def speech_tokens(new: int = 12) -> Generated:
    return generate_tokens(CFG, params(), prompts(SPEECH), GenerationConfig(max_new_tokens=new))


def test_cached_decoding_is_the_full_forward_pass():
    """Greedy tokens are the argmax, at every step, of a forward pass over everything before."""
    new = speech_tokens()
    batch = prompts(SPEECH)
    lengths = batch["segment_ids"].sum(-1)
    room = np.zeros((3, 12), np.int32)
    full = {key: np.concatenate([batch[key], room], 1) for key in ("tokens", "segment_ids")}
    full["audio_slot"] = np.concatenate([batch["audio_slot"], room - 1], 1)
    for row, start in enumerate(lengths):
        full["tokens"][row, start : start + 12] = new.tokens[row]
        full["segment_ids"][row, start : start + 12] = 1
    full["positions"] = np.tile(np.arange(full["tokens"].shape[1], dtype=np.int32), (3, 1))
    full |= {"mel": batch["mel"], "mel_frames": batch["mel_frames"]}
    full["answer_index"] = (lengths[:, None] - 1 + np.arange(12)[None]).astype(np.int32)
    expected = jax.jit(lambda p, b: bind(CFG, p).answer_logits(b))(params(), full)
    np.testing.assert_array_equal(new.tokens, np.argmax(expected, -1))

    @jax.jit
    def cached(p, b, tokens):
        model = bind(CFG, p)
        logits, cache = model.prefill(b, max_length=b["tokens"].shape[1] + 12)

        def step(cache, token):
            logits, cache = model.decode(token, cache)
            return cache, logits

        _, rest = jax.lax.scan(step, cache, tokens.T[:-1])
        return jnp.concatenate([logits[:, None], rest.transpose(1, 0, 2)], 1)

    assert_close(cached(params(), batch, new.tokens), expected, COMPOSED, "logits")


def test_greedy_tokens_are_those_of_transformers():
    llama = torch_llama(CFG.text)
    mine = params() | {"language_model": llama_params(arrays(llama), CFG.text)}
    batch = prompts(TEXT)
    got = generate_tokens(CFG, mine, batch, GenerationConfig(max_new_tokens=12))
    for row, pieces in enumerate(TEXT):
        prompt = torch.tensor([pieces[0]])
        expected = llama.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        assert got.tokens[row].tolist() == expected[0, prompt.shape[1] :].tolist()


def test_rows_end_at_any_eos_and_are_padded():
    free = speech_tokens().tokens
    eos = (int(free[0, 2]), int(free[1, 4]))
    generation = GenerationConfig(max_new_tokens=12, eos_token_id=eos, pad_token_id=47)
    got = generate_tokens(CFG, params(), prompts(SPEECH), generation)
    for row in range(3):
        hits = np.flatnonzero(np.isin(free[row], eos))
        length = hits[0] + 1 if len(hits) else 12
        assert got.lengths[row] == length
        np.testing.assert_array_equal(got.tokens[row, :length], free[row, :length])
        assert (got.tokens[row, length:] == 47).all()
    assert got.lengths.min() < 12


def test_empty_rows_have_no_tokens_and_keep_nobody_waiting():
    batch = prompts(SPEECH)
    batch["segment_ids"][1] = 0
    got = generate_tokens(CFG, params(), batch, GenerationConfig(max_new_tokens=12))
    assert got.lengths.tolist() == [12, 0, 12]
    np.testing.assert_array_equal(got.tokens[[0, 2]], speech_tokens().tokens[[0, 2]])
    assert not got.tokens[1].any()


def test_prompts_alone_and_together_read_the_same():
    """Sampled, so that every row's randomness has to be its own too."""
    generation = GenerationConfig(max_new_tokens=12, **SAMPLED)
    batch = prompts(SPEECH)
    together = generate_tokens(CFG, params(), batch, generation).tokens
    assert (together != speech_tokens().tokens).any()
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        got = generate_tokens(CFG, params(), alone, generation)
        np.testing.assert_array_equal(got.tokens[0], together[row])


@pytest.mark.parametrize("mesh_text", [pytest.param("1x1", marks=pytest.mark.slow), "8x1", "4x2"])
def test_every_mesh_writes_the_same(mesh_text):
    mesh = make_mesh(mesh_text)
    placed = place_params(CFG, params(), mesh)
    generation = GenerationConfig(max_new_tokens=12)
    got = generate_tokens(CFG, placed, prompts(SPEECH), generation, mesh=mesh)
    np.testing.assert_array_equal(got.tokens, speech_tokens().tokens)
    assert got.tokens.shape == (3, 12)  # rows that filled up the mesh are gone


@pytest.mark.slow
def test_sampling_on_a_mesh_is_sampling_on_one_device():
    generation = GenerationConfig(max_new_tokens=12, **SAMPLED)
    mesh = make_mesh("4x2")
    placed = place_params(CFG, params(), mesh)
    got = generate_tokens(CFG, placed, prompts(SPEECH), generation, mesh=mesh)
    expected = generate_tokens(CFG, params(), prompts(SPEECH), generation)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


def test_same_shapes_compile_once(monkeypatch):
    traced = []
    original = decoding.bind
    monkeypatch.setattr(decoding, "bind", lambda *args: traced.append(1) or original(*args))
    cfg = tiny_config(text={"num_hidden_layers": 1, "vocab_size": 40})  # no other test's programs
    tree = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    mine = random_params(tree)

    def run(rows, **settings):
        generate_tokens(cfg, mine, prompts(rows), GenerationConfig(**settings))

    run(TEXT, max_new_tokens=3, temperature=0.5, eos_token_id=4)
    first = len(traced)
    assert first > 0
    run(TEXT[::-1], max_new_tokens=9, temperature=0.9, eos_token_id=5, seed=4)
    run([[list(range(20))], *TEXT[:2]], max_new_tokens=60, temperature=0.1, eos_token_id=6)
    assert len(traced) == first


@pytest.mark.slow
def test_the_cache_is_one_buffer_updated_in_place():
    cfg = tiny_config(text={"num_hidden_layers": 4, "hidden_size": 256})
    B, T, N, V = 4, 1024, 64, 48
    of = jax.ShapeDtypeStruct
    kv = of((4, B, 2, T, 64), jnp.float32)
    progress = decoding.Progress(
        tokens=of((B, N), jnp.int32),
        lengths=of((B,), jnp.int32),
        ended=of((B,), jnp.bool),
        step=of((), jnp.int32),
        logits=of((B, V), jnp.float32),
        cache=KVCache(kv, kv, of((B,), jnp.int32)),
    )
    f32, i32, u32 = (of((), dtype) for dtype in (jnp.float32, jnp.int32, jnp.uint32))
    knobs = Knobs(f32, f32, u32, of((B,), jnp.uint32))
    ends = decoding.Ends(of((8,), jnp.int32), i32)
    programs = decoding._programs(cfg, ComputeConfig(), None, decoding._ByIdentity(FSDP_TENSOR))
    tree = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    lowered = programs.decode.lower(
        tree, progress, i32, knobs, ends, method=Method.of(GenerationConfig())
    )
    memory = lowered.compile().memory_analysis()
    cache = 2 * kv.size * 4
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 0.4 * cache  # one layer's keys and values at a time


def test_bucket_sizes_are_few_and_tight():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= max(64, 1.25 * n) for n, size in enumerate(sizes, 1) if n > 256)
    assert len(set(sizes)) < 25
    assert [bucket(n) for n in (1, 64, 65, 300, 1600)] == [64, 64, 128, 320, 1792]


def test_batches_that_are_not_prompts_are_refused():
    generation = GenerationConfig(max_new_tokens=2)

    def refused(match, batch, generation=generation):
        with pytest.raises(ConfigError, match=match):
            generate_tokens(CFG, params(), batch, generation)

    good = prompts(SPEECH)
    refused("lacks positions", {k: v for k, v in good.items() if k != "positions"})
    packed = dict(good, segment_ids=np.maximum(good["segment_ids"], 2))
    refused("right-padded prompts", packed)
    refused("right-padded", dict(good, segment_ids=good["segment_ids"][:, ::-1]))
    refused("no rows", {key: value[:0] for key, value in good.items()})
    refused("mel has 4 bins", dict(good, mel=good["mel"][:, :, :4]))
    refused("past the 12 frames", dict(good, mel=good["mel"][:, :1]))
    refused("outside the model's vocabulary of 48", good, GenerationConfig(eos_token_id=48))
