"""What synthetic voices say: plain words of a wide vocabulary, each text in one split, and right answers."""

import random
import re
from collections import Counter

import pytest

from llaso_jax.errors import DataError
from llaso_jax.preparation import grammar, questions
from llaso_jax.preparation.grams import HELD_OUT_GRAMS, Grams
from llaso_jax.preparation.texts import (
    SENTENCES,
    of_split,
    read_texts,
    split_of,
    spoken_words,
    transcript,
)

SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z',.?! -]*")


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return read_texts()


@pytest.fixture(scope="module")
def held_out() -> Grams:
    return Grams.load(HELD_OUT_GRAMS)


def test_sentences_are_distinct_and_open_in_many_ways(sentences):
    assert 300 <= len(sentences) <= 12_000
    assert len({transcript(text) for text in sentences}) == len(sentences)
    assert SENTENCES.stat().st_size <= 700_000
    openings = Counter(" ".join(spoken_words(text)[:3]) for text in sentences)
    assert openings.most_common(1)[0][1] <= 12


def test_texts_have_a_wide_vocabulary(sentences):
    choose = random.Random(0)
    texts = [*sentences, *(grammar.rule_text(choose) for _ in range(6000))]
    assert len({word for text in texts for word in spoken_words(text)}) > 2_400


def test_sentences_can_be_read_aloud(sentences):
    wrong = [text for text in sentences if not SPEAKABLE.fullmatch(text)]
    assert wrong == []
    assert {len(text.split()) for text in sentences} <= set(range(2, 15))


def test_the_file_says_where_its_texts_come_from():
    head = SENTENCES.read_text(encoding="utf-8").splitlines()[:2]
    assert all(line.startswith("#") for line in head)
    assert "SmolLM2-135M-Instruct (Apache-2.0) with seed" in head[1]


def test_sentences_share_nothing_with_held_out_prompts(sentences, held_out):
    assert [text for text in sentences if held_out.shared(text)] == []


def test_held_out_prompts_are_recognised_by_their_hashes(held_out):
    assert held_out.lengths == (4, 5)
    assert len(held_out.hashes) > 1_500
    # written otherwise, and in a longer text
    assert held_out.shared("PRESS 1 to record your temporary greeting!")
    assert held_out.shared("And then press one to record your temporary greeting, said the man.")
    assert held_out.shared("The pound key is on the left.") is None


@pytest.mark.parametrize("content", ["", "{}", '{"hashes": 3, "lengths": [5]}'])
def test_a_file_that_holds_no_runs_is_refused(tmp_path, content):
    (tmp_path / "grams.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"grams\.json holds no runs"):
        Grams.load(tmp_path / "grams.json")


def test_a_split_hangs_on_the_words_alone(sentences):
    assert split_of("Please hold the line.") == split_of("please HOLD the line")
    shares = Counter(map(split_of, sentences))
    assert shares["train"] / len(sentences) == pytest.approx(0.9, abs=0.04)
    assert shares["dev"] / len(sentences) == pytest.approx(0.05, abs=0.025)
    assert of_split(sentences, "dev") == [text for text in sentences if split_of(text) == "dev"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Well-known: it's 'Ann'!", "well known it's ann"),
        ("A B C, seven.", "a b c seven"),
        ("", ""),
    ],
)
def test_a_transcript_holds_words_only(text, words):
    assert transcript(text) == words


# --- by rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", {*grammar.RULES}, ids=lambda rule: rule.__name__)
def test_texts_by_rule_are_speakable_varied_and_the_same_for_a_seed(rule):
    choose, again = random.Random(0), random.Random(0)
    texts = [rule(choose) for _ in range(200)]
    assert texts == [rule(again) for _ in range(200)]
    assert len(set(texts)) > 100
    assert [text for text in texts if not SPEAKABLE.fullmatch(text) or "  " in text] == []
    assert max(len(text.split()) for text in texts) <= 30


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (342, "three hundred forty two"),
        (1000, "one thousand"),
        (90_017, "ninety thousand seventeen"),
        (999_999, "nine hundred ninety nine thousand nine hundred ninety nine"),
    ],
)
def test_numbers_in_words(value, words):
    assert grammar.number(value) == words


def test_days_of_the_month_in_words():
    said = [grammar.ordinal(day) for day in range(1, 32)]
    assert len(set(said)) == 31
    assert (said[0], said[19], said[20], said[29], said[30]) == (
        "first",
        "twentieth",
        "twenty first",
        "thirtieth",
        "thirty first",
    )


# --- questions ------------------------------------------------------------------------------------


def expected(text: str) -> str:
    """The answer to a spoken question, found another way than it was made."""
    value = {name: number for number, name in enumerate(grammar.ONES)}
    words = text.replace(",", "").split()
    if "plus" in words:
        at = words.index("plus")
        return grammar.ONES[value[words[at - 1]] + value[words[at + 1]]]
    if "minus" in words:
        at = words.index("minus")
        return grammar.ONES[value[words[at - 1]] - value[words[at + 1]]]
    if "opposite" in words:
        partner = {}
        for pair in questions.OPPOSITES:
            first, second = pair.split()
            partner |= {first: second, second: first}
        at = words.index("opposite")
        return partner[words[at - 3] if words[-1] == "what" else words[-1]]
    step = -1 if "before" in words else 1
    for circle in (grammar.DAYS, grammar.MONTHS):
        if words[-1] in circle:
            return circle[(circle.index(words[-1]) + step) % len(circle)]
    return grammar.ONES[value[words[-1]] + step]


def test_spoken_questions_have_the_right_answers():
    choose = random.Random(1)
    asked = [questions.spoken_question(choose, index) for index in range(3000)]
    wrong = [question for question in asked if expected(question.text) != question.answer]
    assert wrong == []
    assert len({question.text for question in asked}) > 1_000


def named(values: tuple[str, ...], text: str) -> bool:
    return any(re.search(rf"\b{value}\b", text) for value in values)


def test_written_facts_answer_the_question_and_no_answer_is_frequent():
    choose = random.Random(1)
    asked = [questions.written_question(choose, index) for index in range(800)]
    for question in asked:
        assert question.answer in question.written
        # one fact of each attribute, so that there is one answer
        kinds = [
            name for name, values in questions.ATTRIBUTES.items() if named(values, question.written)
        ]
        assert len(kinds) == question.written.count(".")
        asked_about = [
            name for name, values in questions.ATTRIBUTES.items() if question.answer in values
        ]
        assert asked_about[0] in kinds
    for values in questions.ATTRIBUTES.values():
        counts = Counter(q.answer for q in asked if q.answer in values)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_commands_are_balanced_over_intents_devices_and_rooms():
    choose = random.Random(1)
    said = [questions.command(choose, index) for index in range(1024)]
    for field in ("intent", "device", "room"):
        counts = Counter(getattr(command, field) for command in said)
        assert max(counts.values()) == min(counts.values()), field
    for command in said:
        assert command.device in command.text
        assert command.room in command.text
    pairs = Counter((command.intent, command.room) for command in said)
    assert max(pairs.values()) == min(pairs.values())
    assert len(pairs) == len(questions.INTENTS) * len(questions.ROOMS)
