"""Hugging Face -> model folder -> Hugging Face is bit-equal, and transformers loads what comes out."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_conversion_support import (
    ALIGNER,
    ORACLE_NAMES,
    ORACLES,
    TOWER,
    VOCAB,
    TorchSpeechLM,
    assert_bit_equal,
    read_state,
    save_state,
    torch,
)

from llaso_jax.conversion import (
    ExportOptions,
    Weights,
    export_llama,
    export_llaso,
    export_whisper,
    gather_weights,
    grow_vocabulary,
    load_model,
    load_params,
    read_info,
    save_model,
)
from llaso_jax.conversion.tensors import array_tensor
from llaso_jax.modeling.functional import flatten, param_shardings
from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.rope import RopeScaling
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.mesh import make_mesh


def round_trip(folder, tmp_path, mesh=None, **options):
    weights = gather_weights(folder)
    shardings = None if mesh is None else param_shardings(weights.cfg, mesh)
    native = tmp_path / "native"
    save_model(native, weights.cfg, load_params(weights, shardings), hf_config=weights.hf_config)
    cfg, params = load_model(native, mesh=mesh)
    assert cfg == weights.cfg
    out = tmp_path / "hf"
    export_llaso(
        out, cfg, params, hf_config=read_info(native).hf_config, options=ExportOptions(**options)
    )
    return out


@pytest.mark.parametrize("name", ORACLE_NAMES)
def test_upstream_checkpoint_comes_back_bit_equal(name, tmp_path):
    folder = ORACLES / name / "model"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine: upstream's checkpoints are not shipped")
    out = round_trip(folder, tmp_path, mesh=make_mesh("4x1"))
    assert_bit_equal(read_state(out), read_state(folder))
    given = json.loads((folder / "config.json").read_text())
    written = json.loads((out / "config.json").read_text())
    assert {k: written[k] for k in given} == given
    side_file = torch.load(out / "mm_audio_aligner.bin", weights_only=True)
    assert_bit_equal(
        side_file, torch.load(folder.parent / "mm_audio_aligner.bin", weights_only=True)
    )


@pytest.mark.parametrize(
    ("dtype", "weights", "shards"),
    [
        (torch.bfloat16, "safetensors", 3),
        (torch.float16, "safetensors", 1),
        (torch.bfloat16, "torch", 1),
        (torch.float32, "torch", 3),
    ],
)
def test_every_format_comes_back_bit_equal(dtype, weights, shards, tmp_path):
    reference = TorchSpeechLM(projector="mlp3x_gelu", tied=shards == 1)
    folder = reference.save(tmp_path / "in", weights=weights, shards=shards, dtype=dtype)
    out = round_trip(folder, tmp_path, max_shard_bytes=50_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert_bit_equal(read_state(out), reference.state(dtype=dtype))
    written = json.loads((out / "config.json").read_text())
    assert written["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_shards_of_every_mesh_hold_the_same_values(tmp_path):
    folder = TorchSpeechLM().save(tmp_path)
    weights = gather_weights(folder)
    want = flatten(load_params(weights, dtype="bfloat16"))
    for mesh in map(make_mesh, ("8x1", "4x2", "data=2,fsdp=2,tensor=2")):
        weights = gather_weights(folder, vocab_multiple_of=8)
        shardings = param_shardings(weights.cfg, mesh)
        got = flatten(load_params(weights, shardings, dtype="bfloat16"))
        for path, array in got.items():
            assert array.sharding == shardings[path]
            np.testing.assert_array_equal(np.asarray(array)[: want[path].shape[0]], want[path])


def test_stock_llama_is_what_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    for tied in (True, False):
        reference = TorchSpeechLM(tied=tied)
        weights = gather_weights(reference.save(tmp_path / f"in{tied}"), vocab_multiple_of=16)
        out = export_llama(
            tmp_path / f"out{tied}",
            weights.cfg,
            load_params(weights),
            hf_config=weights.hf_config,
            options=ExportOptions(max_shard_bytes=50_000),
        )
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ids = torch.arange(20)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, reference.llama(ids).logits)
        assert (model.config.eos_token_id, model.config.bos_token_id) == (2, 1)


def test_stock_whisper_is_what_transformers_loads(tmp_path):
    from transformers import WhisperModel

    reference = TorchSpeechLM(mels=128)
    weights = gather_weights(reference.save(tmp_path / "in"))
    out = export_whisper(tmp_path / "out", weights.cfg, load_params(weights))
    model, info = WhisperModel.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_bit_equal(model.encoder.state_dict(), reference.whisper.encoder.state_dict())
    mel = torch.randn(1, 128, 120)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encoder(mel).last_hidden_state, reference.whisper.encoder(mel).last_hidden_state
        )
    again = gather_weights(out)
    assert (again.parts, again.cfg.audio) == (("audio_tower",), weights.cfg.audio)


def test_whisper_and_llama_folders_make_a_model_with_a_seeded_projector(tmp_path):
    reference = TorchSpeechLM(mels=128, tied=False)
    reference.whisper.save_pretrained(tmp_path / "w")
    reference.llama.save_pretrained(tmp_path / "l")
    one = gather_weights(tmp_path / "l", tmp_path / "w", projector_type="linear", stack=2, seed=3)
    assert one.parts == ("audio_tower", "projector", "language_model")
    assert (one.cfg.projector.type, one.cfg.projector.stack) == ("linear", 2)
    assert one.cfg.text.rope_scaling == RopeScaling()
    assert any(name.startswith("decoder.") for name in one.ignored)
    first, same = load_params(one), load_params(one)
    other = load_params(
        gather_weights(tmp_path / "w", tmp_path / "l", projector_type="linear", stack=2, seed=4)
    )
    weight = first["projector"]["linear_0"]["weight"]
    assert weight.shape == (48, 64)
    assert 0.9 * 64**-0.5 < np.abs(weight).max() <= 64**-0.5
    np.testing.assert_array_equal(weight, same["projector"]["linear_0"]["weight"])
    assert not np.array_equal(weight, other["projector"]["linear_0"]["weight"])
    assert_bit_equal(
        {
            k: torch.from_numpy(np.array(v))
            for k, v in flatten(first["audio_tower"]["layer_norm"]).items()
        },
        dict(reference.whisper.encoder.layer_norm.state_dict().items()),
    )


def test_encoder_is_found_in_every_kind_of_whisper(tmp_path):
    from test_conversion_support import whisper_config
    from transformers import WhisperForConditionalGeneration

    config = whisper_config()
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "full")
    model.model.encoder.save_pretrained(tmp_path / "encoder")
    full = gather_weights(tmp_path / "full")
    alone = gather_weights(tmp_path / "encoder")
    assert full.cfg == alone.cfg
    assert len(full.ignored) > 20
    assert not alone.ignored
    a, b = flatten(load_params(full)), flatten(load_params(alone))
    assert all(np.array_equal(a[path], b[path]) for path in a | b)


def test_tower_and_projector_beside_the_checkpoint(tmp_path):
    reference = TorchSpeechLM()
    folder = reference.save(tmp_path, tower=False)
    found = gather_weights(folder)  # mm_audio_tower is ../whisper
    given = gather_weights(folder, tmp_path / "whisper", tmp_path / "mm_audio_aligner.bin")
    assert found.cfg == given.cfg
    assert any("mm_audio_tower" in note for note in found.notes)
    a, b = flatten(load_params(found)), flatten(load_params(given))
    assert all(np.array_equal(a[path], b[path]) for path in a | b)

    other = {
        f"base_model.model.{ALIGNER}{k}": v + 1 for k, v in reference.projector.state_dict().items()
    }
    torch.save(other, tmp_path / "other.bin")
    replaced = load_params(gather_weights(folder, tmp_path / "other.bin"))
    np.testing.assert_array_equal(
        replaced["projector"]["linear_1"]["bias"],
        (reference.projector[2].bias + 1).detach().numpy(),
    )
    # A stage 1 folder: the decoder's tensors, and the projector in the side file only.
    state = {k: v for k, v in reference.state(tower=False).items() if not k.startswith(ALIGNER)}
    save_state(folder, state)
    (tmp_path / "mm_audio_aligner.bin").rename(folder / "mm_audio_aligner.bin")
    c = flatten(load_params(gather_weights(folder)))
    assert all(np.array_equal(a[path], c[path]) for path in a | c)


def test_heads_of_a_tower_whose_whisper_is_gone_are_inferred(tmp_path):
    folder = TorchSpeechLM().save(tmp_path)
    exported = export_llaso(
        tmp_path / "ours", gather_weights(folder).cfg, load_params(gather_weights(folder))
    )
    (tmp_path / "whisper").rename(tmp_path / "gone")
    assert gather_weights(exported).cfg.audio.encoder_attention_heads == 4  # our own note of it
    with_whisper = gather_weights(folder, tmp_path / "gone")
    assert with_whisper.cfg.audio.encoder_attention_heads == 4


def test_new_rows_are_the_mean_and_padding_is_undone(tmp_path):
    for tied in (True, False):
        reference = TorchSpeechLM(tied=tied)
        reference.llama.save_pretrained(tmp_path / f"l{tied}")
        weights = gather_weights(tmp_path / f"l{tied}", vocab_size=VOCAB + 5, vocab_multiple_of=16)
        assert weights.cfg.text.padded_vocab_size == 80
        params = load_params(weights, param_shardings(weights.cfg, make_mesh("4x2")))
        tables = {"embed_tokens": reference.llama.model.embed_tokens.weight}
        if not tied:
            tables["lm_head"] = reference.llama.lm_head.weight
        for name, table in tables.items():
            got = np.asarray(params["language_model"][name]["weight"])
            old = table.detach().numpy()
            np.testing.assert_array_equal(got[:VOCAB], old)
            mean = np.broadcast_to(old.mean(0), (5, 48))
            np.testing.assert_allclose(got[VOCAB : VOCAB + 5], mean, atol=1e-6)
            assert not got[VOCAB + 5 :].any()
        out = export_llama(tmp_path / f"o{tied}", weights.cfg, params)
        assert read_state(out)["model.embed_tokens.weight"].shape == (VOCAB + 5, 48)
        assert json.loads((out / "config.json").read_text())["vocab_size"] == VOCAB + 5
    assert grow_vocabulary(weights, 3) is not None


def test_audio_mode_and_stack_survive(tmp_path):
    reference = TorchSpeechLM()
    reference.whisper.save_pretrained(tmp_path / "w")
    reference.llama.save_pretrained(tmp_path / "l")
    weights = gather_weights(tmp_path / "l", tmp_path / "w", audio_mode="trimmed", stack=4)
    out = export_llaso(tmp_path / "out", weights.cfg, load_params(weights))
    again = gather_weights(out)
    assert again.cfg == weights.cfg
    assert (again.cfg.audio_mode, again.cfg.projector.stack) == ("trimmed", 4)


def test_model_folder_loads_on_another_mesh_in_another_dtype(tmp_path):
    weights = gather_weights(TorchSpeechLM().save(tmp_path), vocab_multiple_of=8)
    cfg = weights.cfg
    shardings = param_shardings(cfg, make_mesh("8x1"))
    want = load_params(weights, shardings)
    save_model(tmp_path / "m", cfg, want)
    for options in ({}, {"mesh": make_mesh("4x2")}, {"dtype": "bfloat16"}):
        loaded_cfg, params = load_model(tmp_path / "m", **options)
        assert loaded_cfg == cfg
        for path, leaf in flatten(params).items():
            np.testing.assert_array_equal(leaf, flatten(want)[path].astype(leaf.dtype))
    _, part = load_model(tmp_path / "m", parts=("projector",))
    assert list(part) == ["projector"]


def test_tower_can_be_left_out(tmp_path):
    weights = gather_weights(TorchSpeechLM().save(tmp_path))
    params = load_params(weights)
    out = export_llaso(
        tmp_path / "o", weights.cfg, params, with_tower=False, tower_name="../whisper"
    )
    assert not any(name.startswith(TOWER) for name in read_state(out))
    assert gather_weights(out).cfg == weights.cfg


def test_a_step_that_donates_loaded_weights_changes_no_other_array():
    """On the CPU, devices share the memory a replicated weight was read into."""
    mesh = make_mesh("8x1")
    values = np.arange(2**20, dtype=np.float32).reshape(2**14, 64)  # 4 MB: pages of its own
    text = LlamaConfig(
        vocab_size=2**14, hidden_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    weights = Weights(
        cfg=SpeechLMConfig(text=text),
        parts=("language_model",),
        pieces={"language_model/embed_tokens/weight": [array_tensor(values)]},
        hf_config={},
        ignored=(),
        notes=(),
        source=None,
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = dict.fromkeys(weights.pieces, replicated)
    first, second = load_params(weights, shardings), load_params(weights, shardings)
    step = jax.jit(lambda table: table * 2, donate_argnums=0, out_shardings=replicated)
    (path,) = weights.pieces
    doubled = step(flatten(first)[path])
    for shard in doubled.addressable_shards:
        np.testing.assert_array_equal(shard.data, 2 * values)
    for shard in flatten(second)[path].addressable_shards:
        np.testing.assert_array_equal(shard.data, values)
