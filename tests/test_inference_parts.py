"""Long recordings in parts: where they are cut, and that the answers to the parts make the answer."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile as sf
from test_evaluation_run import ask, small  # noqa: F401 - a fixture
from test_generate_cli import checkpoint  # noqa: F401 - a fixture
from test_inference_api import clip, make

from llaso_jax.data.audio import LoadedAudio, load_audio
from llaso_jax.data.pauses import split_at_pauses
from llaso_jax.errors import ConfigError
from llaso_jax.generate import main
from llaso_jax.inference.answers import generate_answers

RATE = 16_000


def spoken(*seconds: float, seed: int = 0) -> np.ndarray:
    """Noise of the first length, half a second of near silence, noise of the second, and so on."""
    pause = 0.001 * clip(0.5, seed=99)
    parts = [piece for i, long in enumerate(seconds) for piece in (clip(long, seed + i), pause)]
    return np.concatenate(parts[:-1])


def loaded(samples: np.ndarray) -> LoadedAudio:
    return load_audio(samples, sampling_rate=RATE)


@pytest.mark.parametrize("longest", [1.0, 2.5, 4.0, 7.3, 60.0])
@pytest.mark.parametrize("seconds", [0.2, 4.0, 4.1, 9.7, 31.0])
def test_parts_are_short_enough_none_is_a_scrap_and_nothing_is_lost(seconds, longest):
    audio = loaded(clip(seconds))
    parts = split_at_pauses(audio, longest)
    np.testing.assert_array_equal(np.concatenate([p.samples for p in parts]), audio.samples)
    lengths = [part.seconds_used for part in parts]
    assert lengths == [len(part.samples) / RATE for part in parts]
    assert max(lengths) <= longest
    assert len(parts) == 1 or min(lengths) >= longest / 4 - 1e-3
    assert len(parts) <= np.ceil(2 * seconds / longest)


def test_cuts_lie_in_pauses():
    parts = split_at_pauses(loaded(spoken(3.0, 2.0, 3.5)), 4.0)
    ends = np.cumsum([part.seconds_used for part in parts])[:-1]
    assert len(ends) == 2
    assert 3.0 < ends[0] < 3.5
    assert 5.5 < ends[1] < 6.0


def test_silence_is_cut_anywhere_and_what_was_dropped_counts_once():
    audio = dataclasses.replace(
        loaded(np.zeros(5 * RATE, np.float32)), seconds_total=7.0, seconds_dropped=2.0
    )
    parts = split_at_pauses(audio, 2.0)
    assert [part.seconds_dropped for part in parts] == [0.0] * (len(parts) - 1) + [2.0]
    assert sum(part.seconds_total for part in parts) == pytest.approx(7.0)


def test_the_answer_is_that_to_each_part_in_a_row():
    model, processor = make()
    sounds = [spoken(1.1, 0.7, seed=3), clip(0.4, seed=7), spoken(0.9, 0.9, 0.8, seed=5)]
    settings = model.generation_config(max_new_tokens=6)

    def texts(questions) -> list[str]:
        answers = generate_answers(model, processor, questions, settings, batch_rows=2, window=1)
        return [answer.text for answer in answers]

    whole = processor.questions(sounds, "say it", sampling_rate=RATE)
    split = processor.questions(sounds, "say it", sampling_rate=RATE, part_seconds=1.5)
    assert [len(parts) for parts in whole] == [1, 1, 1]
    assert [len(parts) for parts in split] == [2, 1, 3]
    by_hand = [[prompt] for parts in split for prompt in parts]
    one, two, three, *last = texts(by_hand)
    assert texts(split) == [f"{one} {two}", three, " ".join(last)]
    assert texts(whole) != texts(split)
    seconds = [answer.audio_seconds for answer in generate_answers(
        model, processor, split, settings, batch_rows=5)]  # fmt: skip
    assert seconds == pytest.approx([len(sound) / RATE for sound in sounds], abs=1e-3)


def test_one_recording_at_a_time_is_asked_about_in_parts():
    _, processor = make()
    two = [[clip(0.4), clip(0.5)]]
    with pytest.raises(ConfigError, match=r"has 2 audios and part_seconds=3"):
        processor.questions(two, "say it", sampling_rate=RATE, part_seconds=3)
    with pytest.raises(ConfigError, match=r"part_seconds=0.5 is not a number of at least 1"):
        processor.questions(clip(0.4), "say it", sampling_rate=RATE, part_seconds=0.5)
    for not_a_length in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"not a number"):
            split_at_pauses(loaded(clip(0.4)), not_a_length)
    assert len(processor.questions(None, "no recording", part_seconds=3)[0]) == 1


def test_generate_hears_a_long_file_in_parts(checkpoint, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "long.wav"
    sf.write(path, spoken(1.0, 1.0), RATE)
    arguments = ["--checkpoint", str(checkpoint), "--audio", str(path), "--text", "say it"]
    arguments += ["--max-new-tokens", "5", "--json"]

    def answer(*more: str) -> dict:
        assert main([*arguments, *more]) == 0
        return json.loads(capsys.readouterr().out)

    whole, split = answer(), answer("--part-seconds", "1.5")
    assert whole["audio_seconds"] == split["audio_seconds"] == 2.5
    assert split["new_tokens"] > whole["new_tokens"]
    assert main([*arguments, "--part-seconds", "0"]) == 1
    assert "part_seconds=0 is not a number of at least 1" in capsys.readouterr().err


def test_evaluation_hears_recordings_of_asr_in_parts_and_no_others(checkpoint, small, capsys):  # noqa: F811
    asr = json.loads((small / "data" / "ASR_test.json").read_text(encoding="utf-8"))
    sf.write(small / "long.wav", spoken(1.0, 1.0, 1.0), RATE)
    for question in asr:
        question["voice"] = [str(small / "long.wav")]
    for name in ("ASR", "vctk_gender_classification"):
        (small / "data" / f"{name}_test.json").write_text(json.dumps(asr), encoding="utf-8")
    assert ask(checkpoint, small, "--part-seconds", "1.6") == 0
    folder = small / "out" / "predictions" / "tiny"
    tokens = {
        path.name.removesuffix("_test.json"): json.loads(path.read_text("utf-8"))[0]["new_tokens"]
        for path in folder.glob("*_test.json")
    }
    assert tokens == {"ASR": 6, "vctk_gender_classification": 2}  # three parts, two tokens each
    capsys.readouterr()
    assert ask(checkpoint, small) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "part_seconds was 1.6 and is None" in told
    assert ask(small / "no-model", small, "--part-seconds", "0.2") == 1
    assert "part_seconds=0.2 is not a number of at least 1" in " ".join(
        capsys.readouterr().err.split()
    )
