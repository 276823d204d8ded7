#!/usr/bin/env python3
"""Build the mini corpus that ships in llaso_jax/data/mini (audio, LLaSO JSON, tokenizer, manifest).

Two kinds of speech go in: real prompts of the Asterisk core sounds shorter than four words (longer
ones are held out by the whole project and are never read), and espeak-ng voices, which speak a
closed grammar of about fifty words. Texts, voices and records are the same in every build; see
docs/mini-corpus.md for what is not.

    pip install -e '.[tts]'
    apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav
    python scripts/build_mini_corpus.py --asterisk asterisk-core-sounds-en*.deb
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import random
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from llaso_jax.data.prompt import PURE_AUDIO_TEXT
from llaso_jax.errors import DataError
from llaso_jax.preparation.asterisk import HELD_OUT_WORDS, PACKAGES, read_prompts
from llaso_jax.preparation.chance import generator
from llaso_jax.preparation.debian import unpack
from llaso_jax.preparation.records import ASR_TEMPLATES, write_records
from llaso_jax.speech.audio_file import encode
from llaso_jax.speech.errors import SpeechError
from llaso_jax.speech.espeak import EspeakLibrary
from llaso_jax.speech.samples import SAMPLE_RATE, trim

RATE = SAMPLE_RATE
SEED = 2508_15418  # every random choice derives from this and a name
KBITS = 12.25  # of Opus
MAX_SECONDS = 1.6  # the mel buckets of the quickstart end at 160 frames
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "llaso_jax" / "data" / "mini"

# ---------------------------------------------------------------------------------- the grammar
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
COLOURS = ["red", "green", "blue", "yellow", "white", "black"]
DEVICES = ["light", "fan", "radio"]
OPENINGS = ["door", "window"]
ROOMS = ["kitchen", "bedroom", "office", "garden"]
COMMANDS = ["yes", "no", "up", "down", "stop", "go", "on", "off"]
QUESTION_WORDS = ["what", "which", "is", "it", "plus", "comes", "after", "colour", "number", "room"]
SINGLES = [
    *DIGITS,
    *COLOURS,
    *DEVICES,
    *OPENINGS,
    *ROOMS,
    *COMMANDS,
    "turn",
    "open",
    "close",
    "the",
]

# ---------------------------------------------------------------------------------- the voices
# accent label -> espeak-ng voice; the first three are far apart and make the accent task.
ACCENTS = {
    "american": "en-us",
    "scottish": "en-gb-scotland",
    "midlands": "en-gb-x-gbcwmd",
    "british": "en-gb-x-rp",
}
ACCENT_WEIGHT = {"american": 4, "scottish": 3, "midlands": 3, "british": 2}
ACCENT_TASK = ("american", "scottish", "midlands")
TRAIN_VARIANTS = {
    "male": ["", "+m1", "+m3", "+m4", "+m7"],
    "female": ["+f1", "+f2", "+f4", "+f5"],
}
EVAL_VARIANTS = {"male": ["+m2", "+m6"], "female": ["+f3"]}
TRAIN_RATES, EVAL_RATES = (175, 190, 205, 220), (182, 198, 212)
TRAIN_PITCHES, EVAL_PITCHES = (35, 45, 55, 65), (40, 50, 60)

# ---------------------------------------------------------------------------------- the tasks
TEMPLATES = {
    "SCR": ["Which command is spoken?", "Name the spoken command.", "Recognize the command."],
    "IP": ["What is the intent?", "Name the intent.", "Classify the intent of the speaker."],
    "EE_colour": ["Which colour is named?", "Extract the colour.", "Name the colour entity."],
    "EE_number": ["Which number is named?", "Extract the number.", "Name the number entity."],
    "SGC": ["Is the voice male or female?", "Classify the gender.", "Name the gender."],
    "AC": ["Which accent is this?", "Classify the accent.", "Name the accent."],
    "SSD": ["Is the voice human or synthetic?", "Human or synthetic?", "Detect synthetic speech."],
    "SV": ["Same or different speaker?", "Verify the speaker.", "Do the speakers match?"],
}
INTENTS = ["activate", "deactivate", "open", "close"]
SAME = {"male": "same man", "female": "same woman"}
# task -> records in (instruct_train, eval); ASR is counted by clips below.
COUNTS = {
    "SCR": (220, 32),
    "IP": (300, 32),
    "EE": (480, 40),
    "SGC": (400, 32),
    "AC": (400, 36),
    "SSD": (300, 32),
    "SV": (480, 40),
    "AQA_at": (400, 36),
    "AQA_a": (420, 36),
}
ASR_EVAL, ASR_INSTRUCT, HUMAN_EVAL = 120, 1200, 24
# family -> synthetic clips in (training, eval)
FAMILIES = {
    "word": (640, 76),
    "digits": (440, 36),
    "entity": (360, 40),
    "command": (360, 40),
    "plus": (288, 32),
    "after": (120, 10),
    "attribute": (120, 18),
}
MARKUP = re.compile(r"<audio>")


@dataclass
class Clip:
    """One recording: what is said, by whom and how; `path` is relative to the corpus folder."""

    split: str
    source: str  # "human" or "synthetic"
    family: str
    text: str
    voice: str = ""
    accent: str = ""
    gender: str = ""
    rate: int = 0
    pitch: int = 0
    seed: int = 0
    band: str = "narrow"  # "narrow": telephone, 8 kHz; "wide": 16 kHz
    facts: dict[str, str] = field(default_factory=dict)  # what the tasks ask about
    path: str = ""
    seconds: float = 0.0
    sha256: str = ""
    origin: str = ""  # the Asterisk prompt it comes from


def rng(*names: object) -> random.Random:
    """The generator of this corpus for a choice of these names."""
    return generator(SEED, *names)


# ---------------------------------------------------------------------------------- audio
def same_take(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two recordings are one, at whatever level and shift (0.9 correlation)."""
    size = len(first) + len(second)
    spectrum = np.fft.rfft(first, size) * np.conj(np.fft.rfft(second, size))
    peak = np.abs(np.fft.irfft(spectrum, size)).max()
    return bool(peak > 0.9 * np.linalg.norm(first) * np.linalg.norm(second))


def finish(sound: np.ndarray, seed: int, band: str) -> np.ndarray:
    """Trim, limit the band, set the level, and add a little silence at both ends, by `seed`."""
    choose = random.Random(seed)
    sound = trim(sound)
    if band == "narrow":
        sound = soxr.resample(soxr.resample(sound, RATE, RATE // 2), RATE // 2, RATE)
    level = 10 ** (choose.uniform(-25, -20) / 20)
    sound = sound * (level / np.sqrt(np.mean(sound**2)))
    sound = np.clip(sound, -0.98, 0.98)
    head, tail = (int(choose.uniform(0.02, 0.06) * RATE) for _ in range(2))
    return np.pad(sound, (head, tail)).astype(np.float32)


# ---------------------------------------------------------------------------------- human clips
def human_prompts(root: Path) -> list[tuple[str, str, Path]]:
    """(name, normalised text, file) of every prompt that may be used: one to three plain words."""
    prompts = []
    for prompt in read_prompts(root):
        if prompt.name.startswith(("letters/", "spy-")) or prompt.words >= HELD_OUT_WORDS:
            continue
        words = prompt.text.lower().replace("-", " ").split()
        text = " ".join(word.strip(".,!?") for word in words)
        if re.fullmatch(r"[a-z']+( [a-z']+)*", text):
            prompts.append((prompt.name, text, prompt.file))
    return prompts


def forms(text: str) -> set[str]:
    """Its words as the tokenizer sees them: all but the first with a space before."""
    return set(re.findall(r" ?[a-z']+", text))


def human_clips(root: Path) -> list[tuple[Clip, np.ndarray]]:
    """Training and eval clips of the human voice; the words of eval all occur in training."""
    pool: list[tuple[str, str, np.ndarray]] = []
    for name, text, file in human_prompts(root):
        sound, rate = sf.read(file, dtype="float32")
        sound = trim(soxr.resample(sound, rate, RATE))
        if len(sound) > (MAX_SECONDS - 0.12) * RATE:  # room for the silence that finish() adds
            continue
        if any(text == other and same_take(sound, known) for _, other, known in pool):
            continue  # the package holds some recordings twice
        pool.append((name, text, sound))
    uses = Counter(form for _, text, _ in pool for form in forms(text))
    order = sorted(pool, key=lambda item: rng("human", item[0]).random())
    held_out: set[str] = set()
    for name, text, _ in order:
        if len(held_out) < HUMAN_EVAL and all(
            uses[form] > 1 or form in SINGLES for form in forms(text)
        ):
            held_out.add(name)
            uses.subtract(forms(text))
    clips = []
    for name, text, sound in pool:
        clip = Clip(
            split="eval" if name in held_out else "train",
            source="human",
            family="human",
            text=text,
            voice="allison",
            accent="american",
            gender="female",
            seed=rng("human-audio", name).getrandbits(31),
            origin=name,
        )
        clips.append((clip, sound))
    return clips


# ---------------------------------------------------------------------------------- synthetic
def say_word(choose: random.Random, index: int) -> tuple[str, dict[str, str]]:
    """Every single word in turn; the command words twice as often."""
    words = [*SINGLES, *COMMANDS]  # the command task needs more of its words
    word = words[index % len(words)]
    facts = {}
    if word in COMMANDS:
        facts["command"] = word
    return word, facts


def say_digits(choose: random.Random, index: int) -> tuple[str, dict[str, str]]:
    """Two to four digits, two as often as three and four together."""
    return " ".join(choose.choice(DIGITS) for _ in range((2, 3, 2, 4)[index % 4])), {}


def say_entity(choose: random.Random, index: int) -> tuple[str, dict[str, str]]:
    """A thing with a colour, a number or both, such as "blue door seven"."""
    colour, number = choose.choice(COLOURS), choose.choice(DIGITS)
    thing = choose.choice([*DEVICES, *OPENINGS, *ROOMS])
    pattern = (
        f"{colour} {thing}",
        f"the {colour} {thing}",
        f"{thing} {number}",
        f"{colour} {thing} {number}",
        f"the {thing} is {colour}",
        f"{number} {colour}",
    )[index % 6]
    facts = {}
    if colour in pattern.split():
        facts["colour"] = colour
    if number in pattern.split():
        facts["number"] = number
    return pattern, facts


def say_command(choose: random.Random, index: int) -> tuple[str, dict[str, str]]:
    """Something to do in the house, with its intent."""
    intent = INTENTS[index % 4]
    room = choose.choice(["", "", *(f"{room} " for room in ROOMS)])
    if intent in ("activate", "deactivate"):
        switch = "on" if intent == "activate" else "off"
        return f"turn {switch} the {room}{choose.choice(DEVICES)}", {"intent": intent}
    return f"{intent} the {room}{choose.choice(OPENINGS)}", {"intent": intent}


def say_plus(choose: random.Random, index: int) -> tuple[str, dict[str, str]]:
    """A sum of two numbers from one to four."""
    first, second = divmod(index % 16, 4)
    text = f"what is {DIGITS[first + 1]} plus {DIGITS[second + 1]}"
    return text, {"answer": DIGITS[first + second + 2]}


def say_after(choose: random.Random, index: int) -> tuple[str, dict[str, str]]:
    """Counting: the number that follows."""
    first = index % 10
    return f"what comes after {DIGITS[first]}", {"answer": DIGITS[first + 1]}


def say_attribute(choose: random.Random, index: int) -> tuple[str, dict[str, str]]:
    """A question about the facts that the text lists."""
    asks = ("colour", "room", "number")[index % 3]
    word = "which" if asks == "room" else "what"
    return f"{word} {asks}" + (" is it" if index % 2 else ""), {"asks": asks}


SPEAKERS: dict[str, Callable[[random.Random, int], tuple[str, dict[str, str]]]] = {
    "word": say_word,
    "digits": say_digits,
    "entity": say_entity,
    "command": say_command,
    "plus": say_plus,
    "after": say_after,
    "attribute": say_attribute,
}


def synthetic_plan() -> list[Clip]:
    """Every synthetic clip: text and voice, without its sound."""
    plan = []
    for family, counts in FAMILIES.items():
        for split, count in zip(("train", "eval"), counts, strict=True):
            variants = TRAIN_VARIANTS if split == "train" else EVAL_VARIANTS
            for index in range(count):
                choose = rng(family, split, index)
                text, facts = SPEAKERS[family](choose, index)
                accent = choose.choices(list(ACCENTS), list(ACCENT_WEIGHT.values()))[0]
                gender = choose.choice(["male", "female"])
                clip = Clip(
                    split=split,
                    source="synthetic",
                    family=family,
                    text=text,
                    accent=accent,
                    gender=gender,
                    voice=ACCENTS[accent] + choose.choice(variants[gender]),
                    rate=choose.choice(TRAIN_RATES if split == "train" else EVAL_RATES),
                    pitch=choose.choice(TRAIN_PITCHES if split == "train" else EVAL_PITCHES),
                    seed=choose.getrandbits(31),
                    band=choose.choice(["narrow", "wide"]),
                    facts=facts,
                )
                plan.append(clip)
    return plan


# ---------------------------------------------------------------------------------- records
def record(
    task: str, clips: Sequence[Clip], value: str, answer: str, labels: Sequence[str] | None = None
) -> dict:
    """One LLaSO record; `labels` None means that the answer is scored by word error rate."""
    if len(MARKUP.findall(value)) != len(clips):
        raise ValueError(f"{value!r} has not one <audio> for each of {len(clips)} recordings")
    metadata: dict[str, object] = {"task": task, "metric": "accuracy" if labels else "wer"}
    if labels:
        metadata["labels"] = list(labels)
    metadata["source"] = clips[0].source
    return {
        "id": "",
        "voice": [clip.path for clip in clips],
        "conversations": [
            {"from": "human", "value": value},
            {"from": "gpt", "value": answer},
        ],
        "metadata": metadata,
    }


def asr(choose: random.Random, clip: Clip) -> dict:
    """Transcription, (t,a)."""
    return record("ASR", [clip], choose.choice(ASR_TEMPLATES) + "<audio>", clip.text)


def first_lesson(clip: Clip) -> bool:
    """One or two words of the closed grammar: what a model from random weights learns first."""
    words = clip.text.split()
    return len(words) <= 2 and set(words) <= {*SINGLES, *QUESTION_WORDS}


def cycle(choose: random.Random, clips: Iterable[Clip], count: int, by: Callable) -> list[Clip]:
    """`count` clips, the same number for each value of `by`, each clip as rarely as possible."""
    groups: dict[object, list[Clip]] = defaultdict(list)
    for clip in clips:
        groups[by(clip)].append(clip)
    if not groups:
        raise ValueError("no clip suits this task")
    chosen: list[Clip] = []
    streams = []
    for key in sorted(groups, key=str):
        choose.shuffle(groups[key])
        streams.append(itertools.cycle(groups[key]))
    for stream in itertools.islice(itertools.cycle(streams), count):
        chosen.append(next(stream))
    return chosen


def task_records(task: str, clips: list[Clip], count: int, split: str) -> list[dict]:
    """`count` records of one task from the clips of one split, balanced over its labels."""
    choose = rng("task", task, split)
    synthetic = [clip for clip in clips if clip.source == "synthetic"]

    def ask(kind: str) -> str:
        return choose.choice(TEMPLATES[kind]) + "<audio>"

    def with_fact(name: str) -> list[Clip]:
        return [clip for clip in synthetic if name in clip.facts]

    out: list[dict] = []
    if task == "SCR":
        for clip in cycle(choose, with_fact("command"), count, lambda c: c.facts["command"]):
            out.append(record(task, [clip], ask("SCR"), clip.facts["command"], COMMANDS))
    elif task == "IP":
        for clip in cycle(choose, with_fact("intent"), count, lambda c: c.facts["intent"]):
            out.append(record(task, [clip], ask("IP"), clip.facts["intent"], INTENTS))
    elif task == "EE":
        for kind, labels in (("colour", COLOURS), ("number", DIGITS)):
            for clip in cycle(choose, with_fact(kind), count // 2, lambda c: c.facts[kind]):  # noqa: B023
                out.append(record(task, [clip], ask(f"EE_{kind}"), clip.facts[kind], labels))
    elif task == "SGC":
        clear = [clip for clip in synthetic if clear_gender(clip)]
        for clip in cycle(choose, clear, count, lambda c: (c.gender, c.accent)):
            out.append(record(task, [clip], ask("SGC"), clip.gender, ["male", "female"]))
    elif task == "AC":
        long = [c for c in synthetic if c.accent in ACCENT_TASK and len(c.text.split()) >= 3]
        for clip in cycle(choose, long, count, lambda c: c.accent):
            out.append(record(task, [clip], ask("AC"), clip.accent, ACCENT_TASK))
    elif task == "SSD":
        # both classes have telephone band and few words: neither band nor length tells them apart
        short = [c for c in clips if c.band == "narrow" and c.family in ("human", "word", "digits")]
        for clip in cycle(choose, short, count, lambda c: c.source):
            out.append(record(task, [clip], ask("SSD"), clip.source, ["human", "synthetic"]))
    elif task == "SV":
        out = speaker_pairs(choose, synthetic, count)
    elif task == "AQA_at":
        for clip in cycle(choose, with_fact("asks"), count, lambda c: c.facts["asks"]):
            facts = {
                "colour": choose.choice(COLOURS),
                "room": choose.choice(ROOMS),
                "number": choose.choice(DIGITS),
            }
            # one fact per line: the answer is then the same token as in the text, without a space
            labels = list(facts.values())
            value = "<audio>" + "\n".join(labels)
            out.append(record("AQA", [clip], value, facts[clip.facts["asks"]], labels))
    elif task == "AQA_a":
        for clip in cycle(choose, with_fact("answer"), count, lambda c: c.text):
            out.append(
                record("AQA", [clip], PURE_AUDIO_TEXT + "<audio>", clip.facts["answer"], DIGITS)
            )
    else:
        raise ValueError(f"unknown task {task!r}")
    return out


def clear_gender(clip: Clip) -> bool:
    """Low-pitched male and high-pitched female voices: espeak-ng's others are hard to tell."""
    return clip.pitch <= 45 if clip.gender == "male" else clip.pitch >= 55


def speaker_pairs(choose: random.Random, clips: list[Clip], count: int) -> list[dict]:
    """Two recordings each: the same man's, the same woman's, or a man's and a woman's, in turn.

    The answer names the gender of a voice that is the same: "same" or "different" alone is
    an exclusive or of two genders, which a model of this size did not learn in 900 steps.
    """
    short = [clip for clip in clips if len(clip.text.split()) <= 2 and clear_gender(clip)]
    by_gender = {gender: [c for c in short if c.gender == gender] for gender in SAME}
    by_voice: dict[str, dict[str, list[Clip]]] = {gender: defaultdict(list) for gender in SAME}
    for clip in short:
        by_voice[clip.gender][clip.voice].append(clip)
    out = []
    for index in range(count):
        gender = (*SAME, None)[index % 3]
        if gender is None:
            pair = [choose.choice(members) for members in by_gender.values()]
            choose.shuffle(pair)
        else:
            voices = sorted(v for v, members in by_voice[gender].items() if len(members) > 1)
            pair = choose.sample(by_voice[gender][voices[index // 3 % len(voices)]], 2)
        answer = SAME[gender] if gender else "different"
        value = choose.choice(TEMPLATES["SV"]) + "<audio><audio>"
        out.append(record("SV", pair, value, answer, [*SAME.values(), "different"]))
    return out


def build_records(clips: list[Clip]) -> dict[str, list[dict]]:
    """The three splits, shuffled, with ids."""
    train = [clip for clip in clips if clip.split == "train"]
    held = [clip for clip in clips if clip.split == "eval"]
    choose = rng("asr")
    human = [clip for clip in train if clip.source == "human"]
    spoken = [clip for clip in train if clip.source == "synthetic"]
    spoken = cycle(choose, spoken, ASR_INSTRUCT - len(human), lambda c: c.family)
    held_spoken = [clip for clip in held if clip.source == "synthetic"]
    held_spoken = cycle(choose, held_spoken, ASR_EVAL, lambda c: c.family)
    # Words that synthetic voices teach: most others were heard once, from the human voice alone.
    held_human = [
        clip
        for clip in held
        if clip.source == "human" and all(form in SINGLES for form in forms(clip.text))
    ]
    splits: dict[str, list[dict]] = {
        "align_train": [asr(choose, clip) for clip in train if first_lesson(clip)],
        "instruct_train": [asr(choose, clip) for clip in human + spoken],
        "eval": [asr(choose, clip) for clip in held_human + held_spoken],
    }
    for task, (train_count, eval_count) in COUNTS.items():
        splits["instruct_train"] += task_records(task, train, train_count, "train")
        splits["eval"] += task_records(task, held, eval_count, "eval")
    for name, records in splits.items():
        choose = rng("order", name)
        choose.shuffle(records)
        for index, item in enumerate(records):
            item["id"] = f"{name.split('_')[0]}-{index:04d}"
            if name != "eval":
                item["metadata"] = {"task": item["metadata"]["task"]}
    return splits


# ---------------------------------------------------------------------------------- tokenizer
SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<unk>", "<Audio>", "</Audio>", "<audio_start>", "<audio_end>",
]  # fmt: skip
SPLIT = r" ?[\p{L}\p{N}']+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tokenizer(splits: dict[str, list[dict]], folder: Path) -> None:
    """A byte-level BPE of the training text, saved as a transformers fast tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    text = ["user\n\n", "assistant\n\n", "system\n\n", "\n\n", "\n"]
    text += [form for word in SINGLES + QUESTION_WORDS for form in (word, f" {word}")] * 20
    for name in ("align_train", "instruct_train"):
        for item in splits[name]:
            for turn in item["conversations"]:
                text += ["\n\n" + piece for piece in MARKUP.split(turn["value"]) if piece]
    # past twenty uses all forms count the same, so that they all become one token
    counts = Counter(
        form for piece in text for form in re.findall(r" ?[A-Za-z']+|[^A-Za-z']+", piece)
    )
    sample = [form for form in sorted(counts) for _ in range(min(counts[form], 20))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # written by hand: save_pretrained of transformers 5 names a class that version 4 does not have
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "additional_special_tokens": SPECIAL_TOKENS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    text_form = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text_form, encoding="utf-8")


# ---------------------------------------------------------------------------------- all of it
def write_audio(
    clips: list[Clip], sounds: dict[int, np.ndarray], output: Path, espeak: EspeakLibrary
) -> list[Clip]:
    """Synthesise, encode and write every clip; those that are too long are left out and named.

    One library speaks all of them, in this order: the shipped recordings were made so, and what
    espeak-ng says depends a little on what it said before.
    """
    kept = []
    numbers: Counter[str] = Counter()
    for clip in clips:
        if clip.source == "synthetic":
            sound = espeak.say(clip.text, clip.voice, rate=clip.rate, pitch=clip.pitch)
        else:
            sound = sounds[id(clip)]
        sound = finish(sound, clip.seed, clip.band)
        clip.seconds = round(len(sound) / RATE, 3)
        if clip.seconds > MAX_SECONDS:
            print(f"left out, {clip.seconds:.2f} s: {clip.text!r} ({clip.voice})", file=sys.stderr)
            continue
        folder = "human" if clip.source == "human" else clip.voice.replace("+", "-")
        numbers[folder] += 1
        clip.path = f"audio/{folder}/{numbers[folder]:03d}.opus"
        data = encode(sound, ".opus", serial=clip.seed, kbits=KBITS)
        clip.sha256 = hashlib.sha256(data).hexdigest()
        (output / clip.path).parent.mkdir(parents=True, exist_ok=True)
        (output / clip.path).write_bytes(data)
        kept.append(clip)
        if len(kept) % 200 == 0:
            print(f"{len(kept)} clips", file=sys.stderr)
    return kept


def write_manifest(clips: list[Clip], path: Path) -> None:
    """One line per clip: how it was made."""
    columns = (
        "path split source voice accent gender rate pitch band seed seconds sha256 origin text"
    )
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns.split())
        for clip in clips:
            writer.writerow([getattr(clip, column) for column in columns.split()])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--asterisk", type=Path, nargs="+", required=True, metavar="PATH",
        help="folder with both Asterisk packages unpacked, or the two .deb files",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR",
        help="corpus folder; its audio/ and tokenizer/ are replaced (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    try:
        espeak = EspeakLibrary()
    except SpeechError as error:
        raise SystemExit(f"build_mini_corpus: {error}") from error
    with espeak, tempfile.TemporaryDirectory() as scratch:
        try:
            human = human_clips(unpack(arguments.asterisk, Path(scratch), fetch=PACKAGES))
        except DataError as error:
            raise SystemExit(f"--asterisk: {error}") from error
        for folder in ("audio", "tokenizer"):
            shutil.rmtree(output / folder, ignore_errors=True)
        clips = [clip for clip, _ in human] + synthetic_plan()
        clips = write_audio(clips, {id(clip): sound for clip, sound in human}, output, espeak)
    splits = build_records(clips)
    for name, records in splits.items():
        write_records(records, output / f"{name}.json")
    write_manifest(clips, output / "manifest.csv")
    build_tokenizer(splits, output / "tokenizer")
    for name, records in splits.items():
        counts = Counter(item["metadata"]["task"] for item in records)
        print(f"{name}: {len(records)} records, {dict(sorted(counts.items()))}")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    seconds = sum(clip.seconds for clip in clips)
    print(f"{len(clips)} clips, {seconds:.0f} s, {size / 1e6:.2f} MB in {output}")


if __name__ == "__main__":
    main()
