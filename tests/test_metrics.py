"""Word error rate and accuracy, on cases small enough to count by hand."""

import jiwer
import pytest

from llaso_jax.evaluation.metrics.error_rate import word_error_rate
from llaso_jax.evaluation.metrics.exact_match import accuracy
from llaso_jax.evaluation.metrics.text import whisper_english


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("the cat sat", "the cat sat", 0.0),
        ("the cat sat", "", 1.0),  # three deletions
        ("the cat sat", "the dog sat", 1 / 3),  # a substitution
        ("the cat sat", "cat", 2 / 3),  # two deletions
        ("cat", "the cat sat down", 3.0),  # three insertions for one word
        ("cat", "dog", 1.0),
    ],
)
def test_word_error_rate_counts_errors_over_words_of_the_reference(
    reference: str, hypothesis: str, expected: float
):
    assert word_error_rate([reference], [hypothesis]) == pytest.approx(expected)


def test_word_error_rate_is_of_the_corpus_and_not_a_mean_of_rates():
    references = ["one two three four five six seven eight nine ten", "cat"]
    assert word_error_rate(references, [references[0], "dog"]) == pytest.approx(1 / 2)
    # numbers become one word "12345678910" in the normaliser: plain words tell it better
    references = ["a quick brown fox jumps over the lazy dog tonight", "cat"]
    assert word_error_rate(references, [references[0], "dog"]) == pytest.approx(1 / 11)


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("Hello, World!", "hello world"),
        ("it's the colour grey", "it is the color gray"),
        ("twenty three", "23"),
        ("Mr. Smith [laughter] left", "mister smith left"),
        ("uh I see", "i see"),
    ],
)
def test_spelling_case_and_punctuation_do_not_count(reference: str, hypothesis: str):
    assert word_error_rate([reference], [hypothesis]) == 0
    assert accuracy([reference], [hypothesis]) == 1


def test_words_written_for_a_silent_reference_are_insertions():
    assert word_error_rate(["cat sat", ""], ["cat sat", "two more words"]) == pytest.approx(3 / 2)
    assert word_error_rate(["cat sat", "", "!"], ["cat sat", "", ""]) == 0


def test_references_without_words_have_no_error_rate():
    with pytest.raises(ValueError, match="no words"):
        word_error_rate(["", "!"], ["a", "b"])
    with pytest.raises(ValueError, match="no words"):
        word_error_rate([], [])


def test_numbers_of_texts_must_agree():
    with pytest.raises(ValueError, match="1 references for 2 hypotheses"):
        word_error_rate(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="2 references for 1 hypotheses"):
        accuracy(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 references for 0 hypotheses"):
        accuracy([], [])


def test_accuracy_is_the_share_of_equal_answers():
    assert accuracy(["male", "female", "male", "male"], ["Male.", "male", "", "MALE"]) == 0.5
    assert accuracy(["male"], ["male voice"]) == 0, "a longer answer is not the answer"


def test_agrees_with_jiwer_on_normalised_texts():
    references = ["The cat sat on the mat.", "A dog barked twice!", "Birds fly south"]
    hypotheses = ["the cat sat in mat", "dog barked", "birds birds fly to the south"]
    normalize = whisper_english
    expected = jiwer.wer([normalize(r) for r in references], [normalize(h) for h in hypotheses])
    assert word_error_rate(references, hypotheses) == pytest.approx(expected)
