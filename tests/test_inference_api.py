"""LLaSOProcessor and LLaSOModel: what goes in, what comes out, and that company changes nothing."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile as sf
from reference import random_params, tiny_config
from tolerances import LEAF, assert_close

import llaso_jax
from llaso_jax import LLaSOModel, LLaSOProcessor
from llaso_jax.conversion import save_model
from llaso_jax.data.prompt import PromptConfig
from llaso_jax.data.tokenizer import load_tokenizer
from llaso_jax.errors import AudioError, CheckpointError, ConfigError, PromptError
from llaso_jax.inference.batched import generate_samples
from llaso_jax.inference.prompts import layout_of
from llaso_jax.modeling.functional import init_params
from llaso_jax.modeling.projector import ProjectorConfig

TOKENIZER = Path(llaso_jax.__file__).parent / "data" / "mini" / "tokenizer"
CFG = tiny_config(
    audio={"encoder_layers": 1, "max_source_positions": 1500},
    text={"num_hidden_layers": 1, "vocab_size": 1024},
    projector=ProjectorConfig(stack=8),
    audio_mode="true_length",
)
PROMPT = PromptConfig(system_prompt="")


@functools.cache
def params():
    tree = jax.eval_shape(lambda: init_params(CFG, jax.random.key(0)))
    return random_params(tree, seed=5)


@functools.cache
def tokenizer():
    return load_tokenizer(TOKENIZER)


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(int(seconds * 16_000))).astype(np.float32)


def make(mode: str = "true_length", **limits) -> tuple[LLaSOModel, LLaSOProcessor]:
    cfg = dataclasses.replace(CFG, audio_mode=mode)
    processor = LLaSOProcessor(tokenizer(), layout=layout_of(cfg), prompt=PROMPT, **limits)
    return LLaSOModel(cfg, params()), processor


def user_text(processor: LLaSOProcessor, inputs: dict[str, np.ndarray], row: int = 0) -> str:
    """The prompt as text, every run of audio slots written as @."""
    valid = inputs["segment_ids"][row] > 0
    slots = inputs.get("audio_slot", np.full_like(inputs["tokens"], -1))[row][valid]
    heard = slots >= 0
    starts = heard & ~np.concatenate([[False], heard[:-1]])
    text, run = "", []
    for token, is_audio, start in zip(inputs["tokens"][row][valid], heard, starts, strict=True):
        if start:
            text, run = text + processor.decode(run, skip_special_tokens=False) + "@", []
        if not is_audio:
            run.append(token)
    return text + processor.decode(run, skip_special_tokens=False)


# --- the processor --------------------------------------------------------------------------------


def test_text_and_audio_in_every_layout():
    _, processor = make()
    audio = {"audio": clip(0.5), "sampling_rate": 16_000}
    tagged = "<Audio><audio_start>@<audio_end></Audio>"

    def prompt(**arguments):
        text = user_text(processor, processor(**arguments))
        head, _, rest = text.partition("user<|end_header_id|>\n\n")
        assert head.endswith("<|start_header_id|>")
        assert rest.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        return rest.partition("<|eot_id|>")[0]

    assert prompt(**audio, text="say it") == f"say it\n{tagged}\n\n"
    assert prompt(**audio, text="say it<audio>") == f"say it\n{tagged}\n\n"
    assert prompt(**audio, text="say it", audio_first=True) == f"{tagged}\nsay it"
    assert prompt(**audio, text="<audio>say it") == f"{tagged}\nsay it"
    asked = "Please listen to the audio and answer the question."
    assert prompt(**audio) == f"{asked}\n{tagged}\n\n"
    assert prompt(text="say it") == "say it"
    both = {"audio": [[clip(0.5), clip(0.7)]], "sampling_rate": 16_000}
    assert prompt(**both, text="a<audio>b<audio>") == f"a\n{tagged}\n\nb\n{tagged}\n\n"


def test_arrays_files_and_batches_give_the_same_prompts(tmp_path):
    _, processor = make()
    sounds = [clip(0.5), clip(1.2, seed=1)]
    paths = [tmp_path / "a.wav", tmp_path / "b.flac"]
    for path, sound in zip(paths, sounds, strict=True):
        sf.write(path, sound, 16_000, subtype="PCM_16")
    from_files = processor(audio=paths, text="say it")
    from_arrays = processor(
        audio=[sf.read(path, dtype="float32")[0] for path in paths],
        text=["say it", "say it"],
        sampling_rate=16_000,
    )
    assert from_files.keys() == from_arrays.keys()
    for key in from_files:
        np.testing.assert_array_equal(from_files[key], from_arrays[key])
    np.testing.assert_allclose(from_files["audio_seconds"], [0.5, 1.2])
    assert not from_files["audio_seconds_dropped"].any()


@pytest.mark.parametrize(
    ("mode", "slots"), [("padded", 376), ("trimmed", 188 + 13), ("true_length", 188 + 13)]
)
def test_long_audio_is_read_in_30_s_chunks(mode, slots):
    _, processor = make(mode)
    inputs = processor(audio=clip(32.0), sampling_rate=16_000)
    np.testing.assert_array_equal(inputs["mel_frames"], [[3000, 200]])
    assert inputs["mel"].shape == (1, 2, 8, 3000)
    assert (inputs["audio_slot"] >= 0).sum() == slots
    assert inputs["audio_slot"].max() == 188 + slots - 188 - 1
    np.testing.assert_allclose(inputs["audio_seconds"], [32.0])


def test_audio_past_the_limit_is_an_error_or_on_record(caplog):
    long = {"audio": clip(2.0), "sampling_rate": 16_000}
    _, strict = make(max_audio_seconds=1.5)
    with pytest.raises(AudioError, match=r"2\.0 s long"):
        strict(**long)
    _, lenient = make(max_audio_seconds=1.5, audio_policy="truncate")
    inputs = lenient(**long)
    np.testing.assert_allclose(inputs["audio_seconds"], [1.5])
    np.testing.assert_allclose(inputs["audio_seconds_dropped"], [0.5])
    assert "0.5 s of audio are past max_audio_seconds=1.5" in caplog.text


def test_what_does_not_fit_together_is_refused():
    _, processor = make()
    rate = {"sampling_rate": 16_000}
    with pytest.raises(ConfigError, match="neither audio nor text"):
        processor()
    with pytest.raises(ConfigError, match="2 audio samples and 3 texts"):
        processor(audio=[clip(1), clip(1)], text=["a", "b", "c"], **rate)
    with pytest.raises(PromptError, match="2 <audio> in the conversation and 1 audios"):
        processor(audio=clip(1), text="<audio>a<audio>", **rate)
    with pytest.raises(ConfigError, match="audio_first"):
        processor(audio=clip(1), text="a<audio>", audio_first=True, **rate)
    with pytest.raises(AudioError, match="pass sampling_rate"):
        processor(audio=clip(1))
    with pytest.raises(AudioError, match="type float was given"):
        processor(audio=[0.1, 0.2], **rate)
    with pytest.raises(AudioError, match="does not exist"):
        processor(audio="missing.wav")
    with pytest.raises(TypeError, match="unexpected keyword"):
        processor(audios=clip(1))


# --- the model ------------------------------------------------------------------------------------


def answers(model, samples, *, batch_rows=2, window=16, **settings) -> list[list[int]]:
    generation = model.generation_config(max_new_tokens=8, **settings)
    return list(
        generate_samples(
            model.config, model.params, samples, generation, batch_rows=batch_rows, window=window
        )
    )


@pytest.mark.parametrize("mode", ["padded", "trimmed", "true_length"])
def test_a_prompt_reads_the_same_alone_and_in_a_batch(mode):
    """In true_length mode the short clip alone is even encoded in another bucket: 64 frames, not 192."""
    model, processor = make(mode)
    texts = ["say it", "<audio>who speaks now?"]
    audios = [clip(0.5), clip(1.9, seed=1)]
    samples = processor.samples(audios, texts, sampling_rate=16_000)
    settings = {"temperature": 1.0, "seed": 1}
    together = answers(model, samples, **settings)
    assert together[0] != together[1]
    assert [answers(model, [sample], **settings)[0] for sample in samples] == together
    inputs = processor(audios, texts, sampling_rate=16_000)
    assert model.generate(**inputs, max_new_tokens=8, **settings).tolist() == together


@pytest.mark.slow
def test_long_audio_alone_and_beside_a_short_clip():
    model, processor = make("trimmed")
    audios = [clip(31.0, seed=2), clip(0.5)]
    together = model.generate(**processor(audios, sampling_rate=16_000), max_new_tokens=8)
    for row in range(2):
        alone = model.generate(**processor(audios[row], sampling_rate=16_000), max_new_tokens=8)
        np.testing.assert_array_equal(alone[0], together[row])


def test_batched_prompts_come_back_in_order_whatever_the_window():
    model, processor = make()
    sounds = [clip(seconds, seed=i) for i, seconds in enumerate([0.5, 1.9, 0.3, 0.6, 0.4])]
    samples = processor.samples(sounds, "say it", sampling_rate=16_000)
    expected = [answers(model, [sample])[0] for sample in samples]
    assert len({tuple(ids) for ids in expected}) > 1
    assert answers(model, samples) == expected
    assert answers(model, iter(samples), window=1) == expected


def test_settings_have_the_names_and_habits_of_transformers():
    model, _ = make()
    model.eos_token_id = (5, 6)
    config = model.generation_config
    assert config().greedy
    assert config().eos_token_id == (5, 6)
    assert config(eos_token_id=7).eos_token_id == (7,)
    assert config(do_sample=True).temperature == 1.0
    assert config(temperature=0.2).temperature == 0.2
    assert config(do_sample=False, temperature=0.0).greedy
    with pytest.raises(ConfigError, match="do_sample=False and temperature"):
        config(do_sample=False, temperature=0.2)
    with pytest.raises(ConfigError, match="top_k=5"):
        config(top_k=5)
    with pytest.raises(TypeError, match="num_beams"):
        config(num_beams=4)


def test_logits_at_positions_are_those_of_the_model():
    model, processor = make()
    inputs = processor([clip(0.5), clip(1.9, seed=1)], sampling_rate=16_000)
    last = inputs["segment_ids"].sum(-1, keepdims=True) - 1
    got = model(**inputs, logits_at=last)
    assert got.shape == (2, 1, 1024)
    first = model.generate(**inputs, max_new_tokens=8)[:, :1]
    np.testing.assert_array_equal(got.argmax(-1), first)
    everywhere = model(**inputs)
    assert_close(np.take_along_axis(everywhere, last[..., None], 1), got, LEAF)


# --- folders --------------------------------------------------------------------------------------


def test_model_and_processor_come_back_from_a_folder(tmp_path):
    model, processor = make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for folder in (tmp_path / "model", tmp_path):  # a training run's output holds model/
        loaded = LLaSOModel.from_pretrained(folder)
        again = LLaSOProcessor.from_pretrained(folder)
    assert loaded.config == model.config
    assert loaded.compute.dtype == "float32"
    assert loaded.eos_token_id == processor.eos_token_id != ()
    assert loaded.pad_token_id == processor.pad_token_id
    assert (again.prompt, again.layout) == (processor.prompt, processor.layout)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params())
    ids = processor.tokenizer.encode("two words", add_special_tokens=False)
    assert again.batch_decode([[*ids, *again.eos_token_id]]) == ["two words"]


def test_a_folder_loads_onto_a_mesh(tmp_path):
    save_model(tmp_path / "model", CFG, params())
    model = LLaSOModel.from_pretrained(tmp_path / "model", mesh="4x2")
    weight = model.params["language_model"]["embed_tokens"]["weight"]
    assert weight.addressable_shards[0].data.shape == (512, 8)
    assert model.eos_token_id == ()


def test_folders_without_a_model_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist: a model folder is needed"):
        LLaSOModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        LLaSOProcessor.from_pretrained(tmp_path)
    save_model(tmp_path / "model", CFG, params())
    with pytest.raises(ConfigError, match="no tokenizer at"):
        LLaSOProcessor.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "llaso_prompt.json").write_text('{"sistem": ""}')
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="does not describe a prompt"):
        LLaSOProcessor.from_pretrained(tmp_path / "model")


def test_the_package_names_its_two_classes_only():
    with pytest.raises(AttributeError, match="no attribute 'LLaSO'"):
        _ = llaso_jax.LLaSO
