"""What a corpus will hold, before a sound is made: balanced, without a text in two splits, the same for a seed."""

import dataclasses
import itertools
import random
from collections import Counter, defaultdict
from typing import Any

import pytest

from llaso_jax.data.prompt import PURE_AUDIO_TEXT
from llaso_jax.errors import ConfigError
from llaso_jax.preparation import questions
from llaso_jax.preparation.grams import Grams
from llaso_jax.preparation.plan import (
    ESPEAK_ACCENTS,
    FAMILIES,
    LONGEST,
    PIPER_SHARE,
    Plan,
    PlannedClip,
    make_plan,
    shares,
)
from llaso_jax.preparation.records import ASR_TEMPLATES, record
from llaso_jax.preparation.texts import SPLITS, split_of, transcript
from llaso_jax.preparation.voice_tasks import VOICE_TASKS, allowed
from llaso_jax.speech.augment import Augmentation
from llaso_jax.speech.synthesis import known_voices

FIRST = ("sea", "land", "sun", "moon", "star", "rain", "snow", "wind")
SECOND = ("bird", "boat", "light", "stone", "song", "road", "gate", "hill")
NOUNS = [first + second for first in FIRST for second in SECOND]
_choose = random.Random(0)
SENTENCES = [" ".join(_choose.sample(NOUNS, _choose.randint(3, 12))) for _ in range(800)]
CLIPS = 600


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(SENTENCES, clips=CLIPS, seed=3, engines=("espeak", "piper"))


def asked(clips, task: str) -> list[tuple[PlannedClip, dict[str, Any]]]:
    return [(c, r) for c in clips for r in c.records if r["metadata"]["task"] == task]


def answer(item: dict[str, Any]) -> str:
    return item["conversations"][1]["value"]


def test_the_number_of_clips_is_the_one_asked_for(plan):
    assert len(plan.clips) == CLIPS
    assert Counter(clip.split for clip in plan.clips) == {"train": 528, "dev": 36, "test": 36}
    assert len({clip.spec.path for clip in plan.clips}) == CLIPS
    names = [item["id"] for clip in plan.clips for item in clip.records]
    assert len(set(names)) == len(names)


def test_every_family_is_in_every_split_of_the_smallest_corpus():
    small = make_plan(SENTENCES, clips=20, seed=0, engines=("espeak",))
    for split in SPLITS:
        assert {clip.family for clip in small.clips if clip.split == split} == set(FAMILIES)


@pytest.mark.parametrize("task", [*VOICE_TASKS, "IP"])
def test_answers_of_closed_tasks_are_balanced(plan, task):
    for split in SPLITS:
        some = asked([c for c in plan.clips if c.split == split], task)
        counts = Counter(answer(item) for _, item in some)
        labels = some[0][1]["metadata"]["labels"]
        assert max(counts.values()) - min(counts.get(label, 0) for label in labels) <= 1, split


def test_texts_are_of_one_split_each(plan):
    where = defaultdict(set)
    for clip in plan.clips:
        for utterance in clip.spec.utterances:
            where[transcript(utterance.text)].add(clip.split)
            assert split_of(utterance.text) == clip.split
    assert all(len(splits) == 1 for splits in where.values())


def test_training_sentences_share_no_run_of_words_with_dev_or_test():
    twins = [f"The old man went down to the {noun}." for noun in NOUNS]
    held = [text for text in twins if split_of(text) != "train"]
    assert held
    planned = make_plan([*SENTENCES, *twins], clips=400, seed=0, engines=("espeak",))
    spoken = {u.text for c in planned.clips if c.split == "train" for u in c.spec.utterances}
    assert not spoken & set(twins)
    assert planned.dropped["training sentences that shared words with dev or test"] >= 50


def test_nothing_shares_words_with_held_out_texts(plan):
    said = [u.text for clip in plan.clips for u in clip.spec.utterances]
    by_rule = next(text for text in said if text not in SENTENCES and len(text.split()) >= 6)
    grams = Grams.of([SENTENCES[7], by_rule])
    again = make_plan(SENTENCES, clips=CLIPS, seed=3, engines=("espeak", "piper"), held_out=[grams])
    assert any(grams.shared(text) for text in said)
    assert not any(grams.shared(u.text) for clip in again.clips for u in clip.spec.utterances)
    assert again.dropped["shared words with held-out texts"] >= 2


def test_a_plan_is_the_same_for_a_seed_and_begins_a_larger_one(plan):
    engines = ("piper", "espeak")  # in whatever order
    assert make_plan(SENTENCES, clips=CLIPS, seed=3, engines=engines) == plan
    assert make_plan(SENTENCES, clips=CLIPS, seed=4, engines=engines) != plan
    larger = make_plan(SENTENCES, clips=CLIPS + 200, seed=3, engines=engines)
    known = {clip.spec.path: clip for clip in larger.clips}
    assert all(known[clip.spec.path] == clip for clip in plan.clips)


def test_speech_is_of_one_text_up_to_thirty_words(plan):
    clips = [clip for clip in plan.clips if clip.family == "speech"]
    lengths = [len(transcript(clip.spec.text).split()) for clip in clips]
    assert max(lengths) <= LONGEST
    assert sum(length > 20 for length in lengths) > len(clips) / 8
    assert {len(clip.spec.utterances) for clip in clips} >= {1, 2, 3}
    for clip in clips:
        assert len({u.voice for u in clip.spec.utterances}) == 1


def test_all_18_templates_and_all_three_layouts_occur(plan):
    values = [r["conversations"][0]["value"] for c in plan.clips for r in c.records]
    assert {value.removesuffix("<audio>") for value in values} >= set(ASR_TEMPLATES)
    assert len(ASR_TEMPLATES) == 18
    layouts = Counter(
        "a" if v == PURE_AUDIO_TEXT + "<audio>" else "a,t" if v.startswith("<audio>") else "t,a"
        for v in values
    )
    assert set(layouts) == {"a", "a,t", "t,a"}
    for task in (*VOICE_TASKS, "IP"):
        assert len({r["conversations"][0]["value"] for _, r in asked(plan.clips, task)}) >= 4, task


def test_answers_hold_what_is_said_and_metadata_says_how_to_score(plan):
    for clip in plan.clips:
        said = transcript(clip.spec.text)
        for item in clip.records:
            metadata = item["metadata"]
            assert item["voice"] == [clip.spec.path]
            if metadata["task"] == "ASR":
                assert answer(item) == said
                assert metadata["metric"] == "wer"
            else:
                assert metadata["text"] == said
                assert metadata["metric"] == "accuracy"
                assert answer(item) in metadata["labels"]


def test_records_about_a_voice_need_no_words(plan):
    for clip in plan.clips:
        for item, spoken in zip(clip.records, clip.spoken, strict=True):
            assert spoken == (item["metadata"]["task"] not in VOICE_TASKS)


def test_both_engines_speak_and_one_has_many_pitches(plan):
    speech = [c.spec.utterances[0].voice for c in plan.clips if c.family != "voice"]
    engines = Counter(voice.engine for voice in speech)
    assert engines["piper"] / len(speech) == pytest.approx(PIPER_SHARE, abs=0.06)
    assert len({voice.pitch for voice in speech if voice.engine == "piper"}) > 50
    assert len({voice.name for voice in speech if voice.engine == "espeak"}) > 15
    assert {v.accent for v in speech if v.engine == "espeak"} == set(ESPEAK_ACCENTS)


def test_without_espeak_there_are_no_questions_about_voices():
    plan = make_plan(SENTENCES, clips=60, seed=0, engines=("piper",))
    assert {clip.family for clip in plan.clips} == {"speech", "question", "command"}
    assert {c.spec.utterances[0].voice.engine for c in plan.clips} == {"piper"}


# --- voices and what falsifies them ---------------------------------------------------------------

CHANGED = Augmentation(speed=1.1, narrow_band=True, snr_db=10.0, noise_color="white", gain_db=-5.0)
FALSIFIED = {
    "SGC": {"speed"},  # playing faster raises the pitch
    "AC": set(),
    "SPEED": {"speed"},
    "PITCH": {"speed"},
    "STYLE": {"snr_db"},  # a whisper is noise
}


@pytest.mark.parametrize("name", VOICE_TASKS)
def test_augmentation_that_falsifies_a_task_is_switched_off_and_no_other(name):
    kept = allowed(CHANGED, VOICE_TASKS[name])
    changed = {
        field.name
        for field in dataclasses.fields(Augmentation)
        if getattr(kept, field.name) != getattr(CHANGED, field.name)
    }
    assert changed == FALSIFIED[name]
    for field in changed:
        assert getattr(kept, field) == getattr(Augmentation(), field)


def test_clips_of_a_task_have_no_augmentation_that_falsifies_it(plan):
    seen = set()
    for name, fields in FALSIFIED.items():
        for clip, _ in asked(plan.clips, name):
            used = clip.spec.augmentation
            default = dataclasses.asdict(Augmentation())
            neutral = {k for k, value in dataclasses.asdict(used).items() if value == default[k]}
            assert fields <= neutral, name
            seen |= {f.name for f in dataclasses.fields(used)} - neutral
    assert seen == {field.name for field in dataclasses.fields(Augmentation)}


@pytest.mark.parametrize("name", VOICE_TASKS)
def test_a_picked_voice_has_what_its_label_says(name):
    task, voices, choose = VOICE_TASKS[name], known_voices("espeak"), random.Random(0)
    picked = {label: [task.pick(choose, label, voices) for _ in range(40)] for label in task.labels}
    for label, some in picked.items():
        if name == "SGC":
            assert {v.gender for v in some} == {label}
        elif name == "AC":
            assert {v.accent for v in some} == {label}
        elif name == "STYLE":
            assert {v.name.endswith("+whisper") for v in some} == {label == "whisper"}
    if name in ("SPEED", "PITCH"):
        field = {"SPEED": "rate", "PITCH": "pitch"}[name]
        values = [[getattr(v, field) for v in picked[label]] for label in task.labels]
        apart = 0.2 if name == "SPEED" else 2.0
        for lower, higher in itertools.pairwise(values):
            assert max(lower) + apart < min(higher)
    if name == "PITCH":
        assert {v.gender for some in picked.values() for v in some} == {"male"}


def test_a_task_without_its_voices_says_so():
    with pytest.raises(ValueError, match="no espeak-ng voice"):
        VOICE_TASKS["AC"].pick(random.Random(0), "scottish", known_voices("piper"))


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"clips": 19}, "at least 20"),
        ({"engines": ()}, "no engine"),
        ({"engines": ("festival",)}, "festival"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes, told):
    settings: dict[str, Any] = {"clips": 30, "seed": 0, "engines": ("espeak",)} | changes
    with pytest.raises(ConfigError, match=told):
        make_plan(SENTENCES, **settings)


def test_too_few_texts_are_refused():
    with pytest.raises(ConfigError, match="of the split"):
        make_plan(SENTENCES[:3], clips=30, seed=0, engines=("espeak",))


def test_shares_are_whole_complete_and_never_fall():
    assert shares(10, {"a": 0.55, "b": 0.45}) == {"a": 6, "b": 4}
    parts = {"a": 0.55, "b": 0.2, "c": 0.15, "d": 0.1}
    before = dict.fromkeys(parts, 1)
    for total in range(4, 300):
        counts = shares(total, parts)
        assert sum(counts.values()) == total
        for name, count in counts.items():
            assert count >= before[name]
            assert abs(count - parts[name] * total) < 3.5
        before = counts


def test_pure_audio_has_no_text_of_its_own():
    with pytest.raises(ValueError, match="no text of its own"):
        record("x", "AQA", "a.wav", "(a)", "What?", "that")


def test_labels_of_questions_are_told_apart():
    """An answer is scored by the one whole label that it names."""
    labels = [value.lower() for values in questions.ATTRIBUTES.values() for value in values]
    assert len(set(labels)) == len(labels)
    assert not [(a, b) for a in labels for b in labels if a != b and f" {a} " in f" {b} "]
