"""The composed model against one built from transformers and torch, and the properties of the batch contract."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.ad_checkpoint import print_saved_residuals
from reference import (
    arrays,
    gradients,
    jit,
    llama_params,
    make_batch,
    projector_params,
    random_params,
    tiny_config,
    torch_llama,
    torch_projector,
    torch_whisper,
    whisper_params,
)
from tolerances import COMPOSED, LEAF, assert_close

from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.frames import CHUNK_MEL_FRAMES, audio_slots, encoder_frames
from llaso_jax.modeling.functional import abstract_params, bind, flatten, unflatten
from llaso_jax.modeling.projector import ProjectorConfig, stack_frames
from llaso_jax.modeling.speech_lm import SpeechLMConfig

MEL = 24  # mel frames of the tiny encoder's whole window


@functools.cache
def params_of(cfg: SpeechLMConfig, seed: int = 0):
    """Random parameters of `cfg`."""
    return random_params(unflatten(abstract_params(cfg)), seed)


def run(cfg: SpeechLMConfig, method: str, batch, params=None, **kwargs):
    """One method of the model, compiled."""
    program = jit(lambda p, b: getattr(bind(cfg, p), method)(b, **kwargs))
    return program(params_of(cfg) if params is None else params, batch)


def loss_and_gradients(cfg: SpeechLMConfig, batch, compute: ComputeConfig | None = None):
    """Mean loss over supervised tokens, and its gradients by every parameter."""
    count = (batch["answer_index"] >= 0).sum()

    def mean_loss(params):
        return bind(cfg, params, compute).loss_sum(batch) / count

    return jit(jax.value_and_grad(mean_loss))(params_of(cfg))


# --- against transformers -------------------------------------------------------------------------

COMPOSITIONS = {
    "mlp2x_gelu, tied": tiny_config(),
    "mlp3x_gelu, untied, unscaled, explicit head_dim": tiny_config(
        text={"tie_word_embeddings": False, "rope_scaling": None, "head_dim": 6},
        projector=ProjectorConfig(type="mlp3x_gelu"),
    ),
    "linear, stack of 5": tiny_config(projector=ProjectorConfig(type="linear", stack=5)),
    "mlp1x_gelu": tiny_config(projector=ProjectorConfig(type="mlp1x_gelu")),
}

# Row 0: two audios, the first of two chunks. Row 1: one audio, shorter, two chunks unused.
ROWS = [
    [[[1, 2, 3], 24, 20, [4, 5], 7, [6, 8, 9, 10]]],
    [[[11, 12], 24, [13, 14, 15, 16, 17]]],
]


@pytest.mark.parametrize("cfg", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
def test_logits_loss_and_gradients_equal_the_torch_composition(cfg: SpeechLMConfig):
    tower, llm = torch_whisper(cfg.audio), torch_llama(cfg.text)
    projector = torch_projector(cfg.projector, cfg.audio.d_model, cfg.text.hidden_size)
    batch = make_batch(ROWS, cfg, mel_length=MEL)
    assert batch["mel"].shape[1] == 3
    assert not batch["mel"][1, 1:].any()

    # The reference, written as upstream: text and audio concatenated piece by piece, then padded.
    mel = torch.tensor(batch["mel"])
    embedded, labels, k = [], [], cfg.projector.stack
    for row, (pieces,) in enumerate(ROWS):
        parts: list[torch.Tensor] = []
        ids: list[int] = []
        chunk = 0
        for piece in pieces:
            if isinstance(piece, int):
                heard = tower(mel[row, chunk : chunk + 1]).last_hidden_state
                missing = -heard.shape[1] % k
                heard = torch.nn.functional.pad(heard, (0, 0, 0, missing))
                frames = projector(heard.reshape(1, -1, k * cfg.audio.d_model))[0]
                chunk += 1
                ids += [-100] * len(frames)
                parts.append(frames)
            else:
                parts.append(llm.model.embed_tokens(torch.tensor(piece)))
                ids += piece
        labels.append([-100] * (len(ids) - 3) + ids[-3:])
        embedded.append(torch.cat(parts))
    lengths = [len(e) for e in embedded]
    assert lengths[0] > lengths[1]
    inputs = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
    mask = torch.tensor([[i < n for i in range(max(lengths))] for n in lengths])
    targets = torch.tensor([row + [-100] * (max(lengths) - len(row)) for row in labels])
    expected = llm(inputs_embeds=inputs, attention_mask=mask, labels=targets)
    expected.loss.backward()

    params = {
        "audio_tower": whisper_params(arrays(tower), cfg.audio),
        "projector": projector_params(arrays(projector)),
        "language_model": llama_params(arrays(llm), cfg.text),
    }
    count = (batch["answer_index"] >= 0).sum()
    assert count == 6

    def mean_loss(params):
        model = bind(cfg, params)
        return model.loss_sum(batch) / count, model.language_model.logits(model.hidden(batch))

    (loss, logits), grads = jit(jax.value_and_grad(mean_loss, has_aux=True))(params)
    for row, n in enumerate(lengths):
        assert_close(
            logits[row, :n], expected.logits[row, :n].detach(), COMPOSED, "SpeechLM logits"
        )
    assert_close(loss, expected.loss.detach(), COMPOSED, "SpeechLM loss")
    assert_close(
        grads["projector"],
        projector_params(gradients(projector)),
        COMPOSED,
        "gradient of projector",
    )
    assert_close(
        grads["language_model"],
        llama_params(gradients(llm), cfg.text),
        COMPOSED,
        "gradient of LLM in SpeechLM",
    )
    assert_close(
        grads["audio_tower"],
        whisper_params(gradients(tower), cfg.audio),
        COMPOSED,
        "gradient of encoder in SpeechLM",
    )


# --- packing --------------------------------------------------------------------------------------

FIRST = [[1, 2, 3], 24, [4, 5, 6, 7]]
SECOND = [[8, 9], 24, [10, 11], 24, [12, 13, 14]]
THIRD = [[15, 16, 17, 18, 19]]


def test_packed_segments_equal_separate_rows():
    """Logits, loss and every gradient; the third sample has no audio at all."""
    cfg = tiny_config()
    packed = make_batch([[FIRST, SECOND, THIRD]], cfg, mel_length=MEL, sequence=60)
    apart = make_batch([[FIRST], [SECOND], [THIRD]], cfg, mel_length=MEL)
    np.testing.assert_array_equal(apart["mel"][0, 0], packed["mel"][0, 0])
    np.testing.assert_array_equal(apart["mel"][1], packed["mel"][0, 1:])

    together = run(cfg, "answer_logits", packed)[0]
    separate = run(cfg, "answer_logits", apart).reshape(together.shape)
    assert_close(together, separate, LEAF, "packed logits")
    loss, grads = loss_and_gradients(cfg, packed)
    loss_apart, grads_apart = loss_and_gradients(cfg, apart)
    assert_close(loss, loss_apart, LEAF, "packed loss")
    assert_close(grads, grads_apart, LEAF, "packed gradients")


def test_token_ids_at_audio_positions_and_padding_do_not_matter():
    cfg = tiny_config()
    batch = make_batch(ROWS, cfg, mel_length=MEL, chunks=4)
    expected = run(cfg, "answer_logits", batch)
    free = (batch["audio_slot"] >= 0) | (batch["segment_ids"] == 0)
    other = batch | {
        "tokens": np.where(free, 33, batch["tokens"]),
        "positions": np.where(batch["segment_ids"] == 0, 5, batch["positions"]),
        "mel": batch["mel"].copy(),
    }
    other["mel"][0, 3:] = other["mel"][1, 1:] = 100  # unused chunks
    np.testing.assert_array_equal(run(cfg, "answer_logits", other), expected)


def test_unsupervised_answer_slots_add_nothing():
    cfg = tiny_config()
    batch = make_batch(ROWS, cfg, mel_length=MEL)
    more = batch | {
        "answer_index": np.pad(batch["answer_index"], ((0, 0), (2, 3)), constant_values=-1),
        "answer_token": np.pad(batch["answer_token"], ((0, 0), (2, 3)), constant_values=9),
    }
    assert_close(run(cfg, "loss_sum", more), run(cfg, "loss_sum", batch), LEAF)
    none = batch | {"answer_index": np.full_like(batch["answer_index"], -1)}
    assert run(cfg, "loss_sum", none) == 0


def test_answer_only_head_equals_full_head():
    cfg = tiny_config()
    batch = make_batch(ROWS, cfg, mel_length=MEL)

    def both(params):
        model = bind(cfg, params)
        return model.answer_logits(batch), model.language_model.logits(model.hidden(batch))

    at_answers, everywhere = jit(both)(params_of(cfg))
    expected = np.take_along_axis(
        np.asarray(everywhere), np.maximum(batch["answer_index"], 0)[..., None], axis=1
    )
    assert_close(at_answers, expected, LEAF)


def test_text_only_batches_need_no_audio():
    cfg = tiny_config()
    batch = make_batch([[THIRD]], cfg, mel_length=MEL, chunks=1)
    text = {name: value for name, value in batch.items() if not name.startswith("mel")}
    assert_close(run(cfg, "answer_logits", text), run(cfg, "answer_logits", batch), LEAF)


# --- audio ----------------------------------------------------------------------------------------


def test_chunks_and_audios_keep_their_order():
    """Chunk c is frames c*T .. (c+1)*T - 1 of its row, and rows do not mix."""
    cfg = tiny_config()
    batch = make_batch([[[24, 20, [1, 2, 3]]], [[24, 24, [1, 2, 3]]]], cfg, mel_length=MEL)

    def encode(params, mel):
        lengths = np.full(mel.shape[:2], MEL, np.int32)
        return bind(cfg, params).encode_audio(mel, lengths)

    together = jit(encode)(params_of(cfg), batch["mel"])
    assert together.shape == (2, 24, 32)
    single = jit(encode)(params_of(cfg), batch["mel"].reshape(4, 1, *batch["mel"].shape[2:]))
    assert_close(together, single.reshape(2, 24, 32), LEAF)
    swapped = jit(encode)(params_of(cfg), batch["mel"][:, ::-1])
    assert_close(swapped, np.concatenate([together[:, 12:], together[:, :12]], 1), LEAF)
    assert np.abs(swapped - together).max() > 0.1


def test_trimmed_audio_is_the_first_frames_of_padded_audio():
    padded_cfg, cfg = tiny_config(), tiny_config(audio_mode="trimmed")
    rows = [[[[1, 2], 7, [3], 24, [4, 5, 6]]]]
    padded = make_batch(rows, padded_cfg, mel_length=MEL)
    trimmed = make_batch(rows, cfg, mel_length=MEL)
    np.testing.assert_array_equal(padded["mel"], trimmed["mel"])
    assert trimmed["tokens"].shape[1] == padded["tokens"].shape[1] - 8
    frames = run(padded_cfg, "embed", padded)[0]
    kept = run(cfg, "embed", trimmed)[0]
    dropped = np.arange(2 + 4, 2 + 12)  # frames 4..11 of the first chunk
    assert_close(kept, np.delete(np.asarray(frames), dropped, 0), LEAF)


@pytest.mark.parametrize("stack", [1, 3])
def test_true_length_is_independent_of_the_bucket_and_its_contents(stack: int):
    cfg = tiny_config(audio_mode="true_length", projector=ProjectorConfig(stack=stack))
    rows = [[[[1, 2], 7, [3], 13, [4, 5, 6]]]]
    expected = None
    for bucket, garbage in ((14, 0.0), (19, 50.0), (24, np.nan)):
        batch = make_batch(rows, cfg, mel_length=bucket)
        rng = np.random.default_rng(5)
        for chunk, valid in enumerate((7, 13)):
            batch["mel"][0, chunk, :, :valid] = rng.standard_normal((8, valid))
            batch["mel"][0, chunk, :, valid:] = garbage
        logits = run(cfg, "answer_logits", batch)
        expected = logits if expected is None else expected
        assert_close(logits, expected, LEAF, f"bucket of {bucket}")


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_stacking_concatenates_k_frames_and_fills_up_with_zeros(k: int):
    frames = np.arange(1, 1 + 2 * 7 * 3, dtype=np.float32).reshape(2, 7, 3)
    stacked = np.asarray(stack_frames(jnp.asarray(frames), k))
    groups = -(-7 // k)
    assert stacked.shape == (2, groups, 3 * k)
    for row in range(2):
        for g in range(groups):
            mine = frames[row, g * k : (g + 1) * k].reshape(-1)
            np.testing.assert_array_equal(stacked[row, g, : mine.size], mine)
            assert not stacked[row, g, mine.size :].any()


@pytest.mark.parametrize("mel_frames", [1, 2, 3, 21, 22, 23, 24])
@pytest.mark.parametrize("stack", [1, 4])
def test_slots_equal_the_frames_the_model_makes(mel_frames: int, stack: int):
    cfg = tiny_config(projector=ProjectorConfig(stack=stack))
    mel = jax.ShapeDtypeStruct((1, 1, 8, mel_frames), np.float32)
    lengths = jax.ShapeDtypeStruct((1, 1), np.int32)
    made = jax.eval_shape(lambda m, n: bind(cfg, params_of(cfg)).encode_audio(m, n), mel, lengths)
    assert made.shape[1] == audio_slots(mel_frames, mode="trimmed", stack=stack)
    assert audio_slots(mel_frames, mode="true_length", stack=stack) == made.shape[1]
    assert audio_slots(mel_frames, mode="padded", stack=stack) == -(-1500 // stack)
    assert encoder_frames(CHUNK_MEL_FRAMES) == 1500


# --- ways to compute the same ---------------------------------------------------------------------


@functools.cache
def _plain() -> Any:
    return loss_and_gradients(tiny_config(), make_batch(ROWS, tiny_config(), mel_length=MEL))


@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu", "pallas_gpu"])
def test_saving_products_saves_no_scores_of_attention(implementation, capsys):
    """`dots` keeps results of matrix products; those inside attention would be S x T for every layer."""
    cfg = tiny_config(text={"head_dim": 16})
    rows, length = 2, 3 * 128
    compute = ComputeConfig(remat="dots", attention=implementation)
    params = random_params(unflatten(abstract_params(cfg)))

    def forward(x):
        ids = jnp.ones((rows, length), jnp.int32)
        return bind(cfg, params, compute).language_model(x, ids, ids)[0].sum()

    print_saved_residuals(forward, jnp.ones((rows, length, cfg.text.hidden_size)))
    shapes = re.findall(r"^\w+\[([\d,]+)\]", capsys.readouterr().out, re.MULTILINE)
    kept = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
    # The widest result of a layer is the feed-forward's.
    widest = cfg.text.num_hidden_layers * rows * length * cfg.text.num_attention_heads * 16
    assert len(kept) > 5
    assert max(kept) <= widest


@pytest.mark.parametrize("remat", ["dots", "layer", "offload"])
def test_rematerialization_changes_neither_loss_nor_gradients(remat):
    cfg = tiny_config()
    batch = make_batch(ROWS, cfg, mel_length=MEL)
    loss, grads = loss_and_gradients(cfg, batch, ComputeConfig(remat=remat))
    expected_loss, expected = _plain()
    assert_close(loss, expected_loss, LEAF)
    assert_close(grads, expected, LEAF, f"gradients with remat {remat}")


def test_prefill_and_decode_equal_the_full_forward_pass():
    """Unequal prompts with audio, then four tokens: logits of every next token."""
    cfg = tiny_config()
    steps = 4
    tails = np.array([[20, 21, 22, 23], [24, 25, 26, 27]], np.int32)
    prompts = make_batch(ROWS, cfg, mel_length=MEL)
    longer = [[[*row[0], tail.tolist()]] for row, tail in zip(ROWS, tails, strict=True)]
    whole = make_batch(longer, cfg, mel_length=MEL)
    lengths = (prompts["segment_ids"] > 0).sum(-1)
    room = prompts["tokens"].shape[1] + steps

    def generate(params):
        model = bind(cfg, params)
        logits, cache = model.prefill(prompts, max_length=room)
        out = [logits]
        for token in tails.T:
            logits, cache = model.decode(jnp.asarray(token), cache)
            out.append(logits)
        return jnp.stack(out, 1)

    def full(params):
        model = bind(cfg, params)
        return model.language_model.logits(model.hidden(whole))

    everywhere = jit(full)(params_of(cfg))
    index = lengths[:, None] - 1 + np.arange(steps + 1)
    expected = np.take_along_axis(np.asarray(everywhere), index[..., None], axis=1)
    assert_close(jit(generate)(params_of(cfg)), expected, LEAF, "prefill + decode")


def test_padded_vocabulary_changes_neither_loss_nor_gradients():
    cfg = tiny_config(text={"vocab_size": 45})
    padded = tiny_config(text={"vocab_size": 45, "vocab_multiple_of": 16})
    batch = make_batch(ROWS, cfg, mel_length=MEL)

    def objective(c):
        return jit(jax.value_and_grad(lambda p: bind(c, p).loss_sum(batch)))

    params = flatten(params_of(cfg))
    name = "language_model/embed_tokens/weight"
    garbage = np.full((3, 32), 5, np.float32)
    grown = unflatten(params | {name: np.concatenate([params[name], garbage])})
    loss, grads = objective(cfg)(unflatten(params))
    padded_loss, padded_grads = objective(padded)(grown)
    assert_close(padded_loss, loss, LEAF)
    padded_grads = flatten(padded_grads)
    assert not np.asarray(padded_grads[name][45:]).any()
    padded_grads[name] = padded_grads[name][:45]
    assert_close(padded_grads, flatten(grads), LEAF, "gradients with padded vocabulary")


def test_unknown_projector_and_mode_are_errors_that_name_the_choices():
    with pytest.raises(ValueError, match=r"'mlp0x_gelu' is unknown: use 'linear' or 'mlpNx_gelu'"):
        ProjectorConfig(type="mlp0x_gelu")
    with pytest.raises(ValueError, match=r"stack=0 must be at least 1"):
        ProjectorConfig(stack=0)
    with pytest.raises(ValueError, match=r"'cut' is unknown: choose padded, trimmed, true_length"):
        SpeechLMConfig(audio_mode="cut")  # type: ignore[arg-type]
