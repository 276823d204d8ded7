"""Rendering: the same files whatever the number of processes, and after whatever interrupted it."""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from llaso_jax.data.audio import load_audio
from llaso_jax.data.sound import level_db
from llaso_jax.errors import ConfigError
from llaso_jax.speech.audio_file import encode
from llaso_jax.speech.augment import Augmentation
from llaso_jax.speech.clip import LEVEL_DB, clip_samples
from llaso_jax.speech.errors import RenderError, SynthesisError
from llaso_jax.speech.journal import JOURNAL_FILE
from llaso_jax.speech.render import BATCH, ClipSpec, RenderedClip, Utterance, render
from llaso_jax.speech.voice import Voice

pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed (extra tts)")

VOICES = [
    Voice("espeak", "en-us", "american", "male"),
    Voice("espeak", "en-gb-scotland+f2", "scottish", "female", seed=4),
]


def plan(count: int, suffix: str = ".flac") -> list[ClipSpec]:
    return [
        ClipSpec(
            f"{number % 3}/{number:03d}{suffix}",
            (Utterance(f"number {number}", VOICES[number % 2]),),
            augmentation=Augmentation(snr_db=20, narrow_band=number % 2 == 1),
            seed=number,
        )
        for number in range(count)
    ]


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != JOURNAL_FILE)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / JOURNAL_FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[RenderedClip]]:
    """A plan of 20 rendered without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, list(render(plan(20), folder, workers=0))


def test_clips_come_in_order_and_are_what_the_files_are(whole):
    folder, clips = whole
    assert [clip.path for clip in clips] == [spec.path for spec in plan(20)]
    for clip in clips:
        assert hashlib.sha256((folder / clip.path).read_bytes()).hexdigest() == clip.sha256
        assert load_audio(folder / clip.path).seconds_total == pytest.approx(clip.seconds, abs=0.01)
        assert clip.wer is None
    assert set(files(folder)) == {clip.path for clip in clips}
    assert len(lines(folder)) == 20


def test_processes_make_the_same_files_and_a_lost_one_is_told(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("llaso_jax.speech.render.BATCH", 1)  # most of 20 are not even handed out
    rendering = render(plan(20), tmp_path, workers=2)
    assert next(rendering) == whole[1][0]
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(RenderError, match=r"of 2 processes .* was killed"):
        list(rendering)
    assert list(render(plan(20), tmp_path, workers=2)) == whole[1]
    assert files(tmp_path) == files(whole[0])
    assert not multiprocessing.active_children()


def test_finished_clips_are_not_made_again(whole, tmp_path):
    folder = tmp_path
    list(render(plan(6), folder, workers=0))
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    assert list(render(plan(6), folder, workers=2)) == whole[1][:6]
    assert {name: (folder / name).stat().st_mtime_ns for name in files(folder)} == before
    assert len(lines(folder)) == 6


def test_a_clip_is_made_again_when_description_or_file_changed(tmp_path):
    specs = plan(6)
    list(render(specs, tmp_path, workers=0))
    before = files(tmp_path)
    specs[2] = replace(specs[2], seed=99)
    (tmp_path / specs[3].path).write_bytes(before[specs[3].path][:-1])
    (tmp_path / specs[4].path).unlink()
    list(render(specs, tmp_path, workers=0))
    after = files(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {specs[2].path}
    assert [line["clip"]["path"] for line in lines(tmp_path)[6:]] == [s.path for s in specs[2:5]]


def test_a_call_that_was_left_goes_on(whole, tmp_path):
    rendering = render(plan(20), tmp_path, workers=0)
    for _ in range(9):
        next(rendering)
    rendering.close()
    assert len(lines(tmp_path)) == 9
    # A kill while a line of the journal, or a file, was written.
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write('{"digest": "12')
    assert list(render(plan(20), tmp_path, workers=0)) == whole[1]
    assert files(tmp_path) == files(whole[0])
    assert len(lines(tmp_path)) == 20


# A shell that starts a program in the background has it ignore SIGINT; Ctrl-C is for one in the foreground.
PROGRAM = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from llaso_jax.speech.render import render
sys.path.insert(0, sys.argv[1])
from test_speech_render import plan

for clip in render(plan(4000), Path(sys.argv[2]), workers=2):
    print(clip.path, flush=True)
"""


@pytest.mark.parametrize(
    "signal_number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_killed_call_goes_on_with_whole_files(whole, tmp_path, signal_number):
    tests, folder = Path(__file__).parent, tmp_path / "clips"
    # A group of its own, as in a terminal, where Ctrl-C reaches every process.
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tests), str(folder)],
        cwd=tests.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if signal_number == signal.SIGINT:
            os.killpg(process.pid, signal_number)
        else:
            process.kill()
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == -signal_number, said
    deadline = time.monotonic() + 60
    while group_lives(process.pid):  # the processes of a killed call end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.05)
    made = files(folder)
    assert BATCH <= len(made) < 4000
    if signal_number == signal.SIGINT:
        assert "KeyboardInterrupt" in said
        assert said.count("Traceback") == 1  # the caller's, none of its processes'
        assert {line["clip"]["path"] for line in lines(folder)} == set(made)
    resumed = list(render(plan(20), folder, workers=0))
    assert resumed == whole[1]
    assert {clip.path: files(folder)[clip.path] for clip in resumed} == files(whole[0])


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_failing_text_is_told_at_its_turn_and_what_was_made_is_kept(tmp_path):
    specs = plan(4)
    specs[1] = replace(specs[1], utterances=(Utterance("...", VOICES[1]),))
    rendering = render(specs, tmp_path, workers=0)
    assert next(rendering).path == specs[0].path
    with pytest.raises(SynthesisError, match=r"no sound for '...' .*en-gb-scotland\+f2"):
        next(rendering)
    assert [line["clip"]["path"] for line in lines(tmp_path)] == [specs[0].path]
    specs[1] = plan(2)[1]
    assert len(list(render(specs, tmp_path, workers=0))) == len(lines(tmp_path)) == 4


def test_utterances_are_joined_at_one_level_with_pauses():
    loud = Utterance("hello there", VOICES[0])
    soft = Utterance("good bye", VOICES[1])
    alone = [clip_samples(ClipSpec("a.wav", (utterance,))) for utterance in (loud, soft, loud)]
    joined = clip_samples(ClipSpec("a.wav", (loud, soft, loud), pause_seconds=0.25))
    pause = np.zeros(4000, np.float32)
    np.testing.assert_array_equal(
        joined, np.concatenate([alone[0], pause, alone[1], pause, alone[2]])
    )
    for samples in alone:
        assert level_db(samples) == pytest.approx(LEVEL_DB, abs=0.01)


def test_every_field_of_a_clip_decides_the_file():
    base = ClipSpec("a.wav", (Utterance("one", VOICES[0]),) * 2)
    others = {
        "path": "b.wav",
        "utterances": base.utterances[:1],
        "pause_seconds": 0.5,
        "augmentation": Augmentation(gain_db=-3),
        "seed": 1,
    }
    assert set(others) == {field.name for field in fields(ClipSpec)}
    changed = [replace(base, **{field: value}) for field, value in others.items()]
    assert len({spec.digest() for spec in [base, *changed]}) == len(changed) + 1
    samples = clip_samples(base)
    assert not np.array_equal(samples, clip_samples(changed[2]))
    assert not np.array_equal(samples, clip_samples(changed[3]))
    noisy = replace(base, augmentation=Augmentation(snr_db=10))
    assert not np.array_equal(clip_samples(noisy), clip_samples(replace(noisy, seed=1)))


@pytest.mark.parametrize("suffix", [".opus", ".flac", ".wav"])
def test_bytes_depend_on_sound_and_serial_only(suffix):
    sound = np.sin(np.arange(16_000) * 0.1).astype(np.float32) * 0.3
    first, second = (encode(sound, suffix, serial=7) for _ in range(2))
    assert first == second
    assert (first == encode(sound, suffix, serial=8)) == (suffix != ".opus")
    decoded, rate = sf.read(io.BytesIO(first))
    assert rate == 16_000
    assert len(decoded) == len(sound)
    assert np.abs(decoded - sound)[800:-800].max() < (0.05 if suffix == ".opus" else 1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"path": "a.mp3"}, "'a.mp3' must end in one of .opus, .flac, .wav"),
        ({"path": "../a.wav"}, "must lie inside the folder"),
        ({"path": "/a.wav"}, "must lie inside the folder"),
        ({"utterances": ()}, "has no utterances"),
        ({"pause_seconds": -1}, "pauses of -1 s"),
        ({"seed": -1}, "the seed -1"),
    ],
)
def test_what_no_clip_can_be_is_told_in_words(change, told):
    with pytest.raises(ConfigError, match=told):
        replace(plan(1)[0], **change)


def test_mistakes_are_told_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"two clips have the path '0/000\.flac'"):
        render([plan(1)[0]] * 2, tmp_path / "new", workers=0)
    with pytest.raises(ConfigError, match="-1 workers"):
        render(plan(1), tmp_path / "new", workers=-1)
    assert not (tmp_path / "new").exists()
    (tmp_path / JOURNAL_FILE).write_text("[]\n")
    with pytest.raises(RenderError, match=f"line 1 of .*{JOURNAL_FILE} is none of a journal"):
        list(render(plan(1), tmp_path, workers=0))
