"""Every metric of LLaSO-Eval on cases small enough to score by hand, and against the field's libraries."""

import time

import jiwer
import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import f1_score

from llaso_jax.evaluation.metrics import labels, numbers
from llaso_jax.evaluation.metrics.classification import (
    balanced_accuracy,
    confusions,
    macro_f1,
)
from llaso_jax.evaluation.metrics.entities import slot_micro_f1, slots
from llaso_jax.evaluation.metrics.error_rate import characters, error_rate, swapped, words
from llaso_jax.evaluation.metrics.exact_match import exact_match
from llaso_jax.evaluation.metrics.judge_score import (
    histogram,
    mean_missing_lowest,
    mean_where_scored,
    parse_score,
)
from llaso_jax.evaluation.metrics.overlap import bleu_tokenizer, rouge_l, sacrebleu_score
from llaso_jax.evaluation.metrics.phonemes import (
    ipa_symbols,
    letter_classes,
    letter_error_rate,
    phoneme_error_rate,
)
from llaso_jax.evaluation.metrics.pronunciation import (
    sentence_agreement,
    sentence_scores,
    word_agreement,
)
from llaso_jax.evaluation.metrics.statistic import ratio
from llaso_jax.evaluation.metrics.text import (
    lower_without_punctuation,
    normalizer_of,
    raw,
    whisper_english,
)

# --- error rates ----------------------------------------------------------------------------------

SAID = ["the cat sat on the mat", "a dog barked", "birds fly south"]
HEARD = ["the cat sat in mat", "dog barked twice today", "birds"]


def test_error_rates_of_a_corpus_are_those_of_jiwer():
    assert error_rate(SAID, HEARD, words).value() == pytest.approx(jiwer.wer(SAID, HEARD))
    assert error_rate(SAID, HEARD, characters).value() == pytest.approx(jiwer.cer(SAID, HEARD))


def test_a_swapped_rate_has_the_same_errors_over_the_lengths_of_the_answers():
    straight = error_rate(SAID, HEARD, words)  # 2 + 3 + 2 errors
    assert straight.value() == pytest.approx(7 / 12)
    assert swapped(straight, HEARD, words).value() == pytest.approx(7 / 10)


def test_the_rate_of_references_without_a_symbol_is_not_defined():
    assert np.isnan(error_rate([""], ["a"], words).value())
    assert error_rate(["", "a"], ["b", "a"], words).value() == 1  # the insertion counts


def test_raw_text_collapses_runs_only_and_words_split_at_blanks_only():
    assert raw("  a \n b\tc ") == "a b\tc"
    assert words(raw("a  b\tc")) == ["a", "b\tc"]
    assert lower_without_punctuation("It’s  a-b, C!") == "its ab c"


@pytest.mark.parametrize(
    ("language", "text", "normalised", "name"),
    [
        (
            "en",
            "Mr. Smith likes the colour, twenty-one!",
            "mister smith likes the color 21",
            "English",
        ),
        ("zh", "你好, 世界!", "你好世界", "blanks removed"),
        ("ja", "「ＡＢ」 です。", "abです", "blanks removed"),
        ("de", "Grüße, [Lachen] Welt!", "grüße welt", "basic"),
    ],
)
def test_the_normaliser_follows_the_language(language, text, normalised, name):
    normalizer = normalizer_of(language)
    assert normalizer.apply(text).strip() == normalised
    assert normalizer.name.endswith(name)


# --- phonemes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("ˈbiː t͡ʃ", ["b", "iː", "t", "ʃ"]),
        ("[tʰɛ̃]", ["tʰ", "ɛ̃"]),
        ("ː a ˌb", ["a", "b"]),  # a length mark with nothing before it
        ("Ç", ["ç"]),
        ("12 !", []),
    ],
)
def test_ipa_symbols_carry_their_marks(text: str, symbols: list[str]):
    assert ipa_symbols(text) == symbols


def test_phoneme_error_rate_is_of_the_corpus():
    # "biː" -> "bi" substitutes one of 2; "kæt" is whole: 1 of 5
    assert phoneme_error_rate(["biː", "kæt"], ["bi", "kæt"]).value() == pytest.approx(1 / 5)


def test_upstreams_phonemes_are_latin_letters_folded_as_timit_phones():
    assert letter_classes("a d ʃ") == [3, 3]  # both are class 3; the IPA letter is lost
    # one of two classes differs, then nothing in common: the mean of the two
    assert letter_error_rate(["ab", "k"], ["db", "a"]).value() == pytest.approx(1 / 2)
    assert letter_error_rate(["ab"], ["ba"]).value() == 1.0
    assert letter_error_rate(["", "ʃ"], ["", "a"]).value() == 0.5  # 0 where both are empty, else 1


# --- labels ---------------------------------------------------------------------------------------


def test_upstreams_accuracy_takes_substrings_unless_another_label_is_one():
    references = ["male", "female", "male"]
    # "female" holds "male"; equal counts first
    assert labels.substring_accuracy(references, ["male", "female", "a male voice"]).value() == 1
    assert labels.substring_accuracy(references, ["female", "Female.", "none"]).value() == 1 / 3


def test_abstention_is_an_answer_with_none_or_several_labels():
    references = ["Anger.", "sadness", "20-24"]
    answers = ["ANGER!", "anger or sadness", "She is 20-24 years old"]
    assert labels.abstention(references, answers).value() == pytest.approx(1 / 3)
    assert labels.abstention(["male", "female"], ["females", "female"]).value() == 0.5


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("It's an Australian English accent.", ("australian english",)),
        ("English", ("english",)),
        ("English or Australian English", ("australian english", "english")),
        ("englishman", ()),
        ("20-24", ("20-24",)),
        ("Forties", ("fourties",)),
    ],
)
def test_labels_are_found_whole_and_the_longest_first(answer, found):
    find = labels.LabelFinder(
        labels.label_set(["English", "Australian English", "20-24", "fourties"])
    )
    assert find(labels.label_text(answer)) == found


def test_synonyms_apply_where_only_the_other_word_is_a_label():
    known = ("anger", "happy", "joy")
    assert labels.with_synonyms("Angry and happy", known) == "anger and happy"
    assert labels.with_synonyms("Happiness", known) == "joy"
    assert labels.with_synonyms("Happy", ("joy",)) == "happy"  # happiness is no label on the way


def test_classification_scores_by_hand_and_by_sklearn():
    truth = ["a", "a", "a", "b"]
    found = ["a", "b", None, "b"]
    assert balanced_accuracy(truth, found) == pytest.approx((1 / 3 + 1) / 2)
    assert confusions(truth, found, ("a", "b")) == [[1, 1, 1], [0, 1, 0]]
    by_sklearn = f1_score(
        truth, [f or "-" for f in found], labels=["a", "b"], average="macro", zero_division=0
    )
    assert macro_f1(truth, found).value() == pytest.approx(by_sklearn)
    assert by_sklearn == pytest.approx((1 / 2 + 2 / 3) / 2)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "age", "pitch"),
    [
        ("42", 42, 42),
        (" about 30 years", 30, 30),
        ("20-25", 22, 22),  # 22.5 rounds to even
        ("between 20 and 31", 20, 20),
        ("62.7", 62, 63),
        ("It is 61.5 Hz", 61, 62),
        ("an adult", 22, None),
        ("-3", -3, -3),
        ("inf", None, None),
        ("nan", None, None),
        ("no idea", None, None),
    ],
)
def test_numbers_are_read_as_upstream_reads_them(text, age, pitch):
    assert (numbers.parse(text, "age"), numbers.parse(text, "pitch")) == (age, pitch)


@pytest.mark.parametrize("digits", [16, 400, 5000])
def test_numbers_of_an_answer_that_loops_are_none(digits):
    text = "7" * digits
    for quantity in ("age", "pitch"):
        for answer in (text, f"about {text}.{text}", f"{text}-{text}"):
            scores = numbers.absolute_errors([60], [answer], quantity)
            assert np.isnan(scores.parsed.value())
            assert scores.coverage.value() == 0
    assert parse_score(f"Score: {text}") is None
    said = "accuracy is {}, prosodic is 7, fluency is 9"
    assert sentence_scores(said.format(text)) is None
    assert sentence_agreement([said.format(8)], [said.format(text)]).usable == 0


def test_absolute_errors_of_both_protocols():
    scores = numbers.absolute_errors([20, 60, 40], ["22", "an adult", "no idea"], "age")
    assert scores.parsed.value() == pytest.approx(
        (2 + 38) / 2
    )  # "adult" is 22; the last is dropped
    # without a digit, or unparsable: as wrong as can be, 60 from either end
    assert scores.worst.value() == pytest.approx((2 + 60 + 60) / 3)
    assert scores.coverage.value() == pytest.approx(1 / 3)
    assert scores.constant == pytest.approx((20 + 20 + 0) / 3)


def test_a_pitch_out_of_range_is_dropped_upstream_and_worst_here_an_age_is_not_dropped():
    pitch = numbers.absolute_errors([60, 100], ["61", "440"], "pitch")
    assert (pitch.parsed.value(), pitch.worst.value()) == (1, (1 + 100) / 2)
    age = numbers.absolute_errors([60], ["160"], "age")
    assert (age.parsed.value(), age.worst.value()) == (100, 60)


# --- judge and companions -------------------------------------------------------------------------


def test_judges_scores():
    assert parse_score("Score: 4  \nExplanation: 2 of 3") == 4
    assert parse_score("I would say 4") is None
    scores = [5, None, 2]
    assert mean_where_scored(scores).value() == 3.5
    assert mean_missing_lowest(scores).value() == pytest.approx(8 / 3)
    assert histogram(scores) == {"1": 0, "2": 1, "3": 0, "4": 0, "5": 1}


def test_intents_and_commands_are_compared_as_plain_words():
    assert exact_match(["calendar_set", "Two."], ["Calendar set!", "two."]).value() == 1
    assert exact_match(["stop"], ["please stop"]).value() == 0


def test_slot_f1_counts_equal_pairs_with_their_number():
    assert slots("wake [Time : 5 AM] [time : 5 am]") == {("time", "5 am"): 2}
    # 1 of 2 and 1 slots in common, then 0 of 0 and 1: 2 * 1 / (3 + 1)
    f1 = slot_micro_f1(["[a : x] [a : x]", "none"], ["[a : x]", "[b : y]"])
    assert f1.value() == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("Accuracy is 8, prosodic: 7 and fluency = 9", (8, 7, 9)),
        ("8 for accuracy, 7 for prosody, 9 for fluency", (8, 7, 9)),
        ("accuracy is 8, fluency is 9", None),
        ("accuracy is 8. prosody is 7. fluency is 9. accuracy is 1", (1, 7, 9)),
    ],
)
def test_sentence_scores_are_read_in_both_orders(text, scores):
    found = sentence_scores(text)
    assert (found and tuple(found.values())) == scores


@pytest.mark.parametrize(
    "text",
    [
        "1 2 3 " + "accuracy is " * 1000,
        "accuracy is " * 1000 + "\n1 2 3",
        "accuracy " * 1000 + "1 2 3",
        "1 2 3 " + "4" * 5000,
    ],
)
def test_sentence_scores_of_an_answer_that_loops_take_no_time(text):
    start = time.process_time()
    assert sentence_scores(text) is None
    assert time.process_time() - start < 2  # with time that grows as the cube: minutes


def test_agreement_of_pronunciation():
    said = "accuracy is {}, prosodic is 7, fluency is 9"
    agreement = sentence_agreement([said.format(8)] * 3, [said.format(8), said.format(2), "well"])
    assert agreement.usable == 2
    assert agreement.of_usable["accuracy"].value() == 1 / 2
    assert agreement.of_all["accuracy"].value() == pytest.approx(1 / 3)
    assert agreement.of_all["fluency"].value() == pytest.approx(2 / 3)

    word = 'For "{}", accuracy is {}, stress is 10, and total score is 9.'
    truth = word.format("mark", 10) + word.format("is", 8)
    answer = word.format("Mark", 10) + word.format("is", 7).replace(", and", " and")
    assert word_agreement([truth], [answer]).value() == 1 / 2
    assert word_agreement([truth], [word.format("is", 8)]).value() == 0  # at another position


# --- overlap --------------------------------------------------------------------------------------


def test_overlap_scores_are_sacrebleus():
    assert sacrebleu_score("BLEU", SAID, HEARD).value() == pytest.approx(
        sacrebleu.corpus_bleu(HEARD, [SAID]).score
    )
    assert sacrebleu_score("chrF", SAID, HEARD).value() == pytest.approx(
        sacrebleu.corpus_chrf(HEARD, [SAID]).score
    )
    assert sacrebleu_score("TER", SAID, HEARD).value() == pytest.approx(
        sacrebleu.corpus_ter(HEARD, [SAID]).score
    )
    chinese = ["今天天气很好"]  # one word if split at blanks
    assert sacrebleu_score("BLEU", chinese, ["今天天气不好"], "zh").value() > 20


def test_rouge_l_by_hand():
    # common subsequence "cat mat": 2 of 3 and of 2 words
    assert rouge_l(["cat on mat"], ["cat mat"]).value() == pytest.approx(2 * 2 / (3 + 2))


def test_overlap_is_counted_in_the_words_or_characters_of_the_language():
    assert rouge_l(["die Tür ist auf"], ["die Tür war auf"], "de").value() == pytest.approx(3 / 4)
    assert rouge_l(["今天天气很好"], ["今天天气不好。"], "zh").value() == pytest.approx(5 / 6)
    assert rouge_l(["привет мир"], ["привет всем"], "ru").value() == pytest.approx(1 / 2)
    # one of six characters; of words split at blanks, all of one
    assert sacrebleu_score(
        "TER", ["今天天气很好"], ["今天天气不好"], "zh"
    ).value() == pytest.approx(100 / 6)
    assert sacrebleu_score("TER", ["ภาษาไทย"], ["ภาษาไทบ"], "th").value() == pytest.approx(100 / 7)
    for language, tokenizer in {"wuu": "zh", "my": "char", "bo": "char", "de": "13a"}.items():
        assert bleu_tokenizer(language) == tokenizer


def test_resampling_a_statistic_is_scoring_the_items_drawn():
    truth, heard = [whisper_english(t) for t in SAID], [whisper_english(t) for t in HEARD]
    drawn = [0, 2, 2]
    weights = np.bincount(drawn, minlength=3)[None].astype(float)
    for make in (
        lambda r, a: error_rate(r, a, words),
        lambda r, a: sacrebleu_score("BLEU", r, a),
        lambda r, a: sacrebleu_score("TER", r, a),
        lambda r, a: sacrebleu_score("chrF", r, a),
        rouge_l,
    ):
        direct = make([truth[i] for i in drawn], [heard[i] for i in drawn]).value()
        whole = make(truth, heard)
        assert whole.combine(weights @ whole.items)[0] == pytest.approx(direct)


def test_a_ratio_over_nothing_is_not_a_number():
    assert np.isnan(ratio([0.0], [0.0]).value())
