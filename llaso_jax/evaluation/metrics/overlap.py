"""Scores of free text by overlap with the reference: BLEU, chrF, TER and ROUGE-L."""

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from llaso_jax.evaluation.metrics.languages import UNSPACED
from llaso_jax.evaluation.metrics.statistic import Statistic, mean
from llaso_jax.evaluation.metrics.text import normalizer_of, unspaced

SacrebleuName = Literal["BLEU", "chrF", "TER"]
_METRICS: dict[SacrebleuName, type[Metric]] = {"BLEU": BLEU, "chrF": CHRF, "TER": TER}
CHINESE = frozenset({"zh", "yue", "wuu"})  # sacrebleu knows its characters from other words


def bleu_tokenizer(language: str) -> str:
    """How sacrebleu cuts texts of a `language_code` into words: characters where words are not spaced."""
    if language in CHINESE:
        return "zh"
    return "char" if language in UNSPACED else "13a"


def sacrebleu_score(
    name: SacrebleuName, references: Sequence[str], answers: Sequence[str], language: str = "en"
) -> Statistic:
    """Corpus-level BLEU or chrF (0 to 100, higher is better) or TER (lower is better) by sacrebleu.

    TER counts edits of characters in languages written without spaces.
    """
    options = {"tokenize": bleu_tokenizer(language)} if name == "BLEU" else {}
    if name == "TER" and language in UNSPACED:
        references = [" ".join(unspaced(text)) for text in references]
        answers = [" ".join(unspaced(text)) for text in answers]
    metric = _METRICS[name](**options)
    # The two halves of Metric.corpus_score, which every metric of sacrebleu defines: counts of each
    # segment, and the score of their sum.
    counts = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]))

    def score(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(sums.astype(counts.dtype).tolist()).score)

    def combine(sums: np.ndarray) -> np.ndarray:
        return np.apply_along_axis(score, -1, sums)

    return Statistic(counts.astype(np.float64), combine)


def rouge_l(references: Sequence[str], answers: Sequence[str], language: str = "en") -> Statistic:
    """Mean F-measure of the longest common subsequence, 0 to 1, by rouge-score.

    Of stemmed words in English, of normalised words in other languages, of characters where words are not spaced.
    """
    scorer = _rouge(language)
    pairs = zip(references, answers, strict=True)
    return mean([scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs])


class _Symbols(Tokenizer):
    """rouge-score's own tokenizer keeps a-z and 0-9 only: of other scripts nothing would be left."""

    def __init__(self, language: str) -> None:
        self._normalize = normalizer_of(language).apply
        self._spaced = language not in UNSPACED

    def tokenize(self, text: str) -> list[str]:
        """Words, or characters."""
        text = self._normalize(text)
        return text.split() if self._spaced else list(text)


@functools.cache
def _rouge(language: str) -> RougeScorer:
    tokenizer = None if language == "en" else _Symbols(language)
    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=tokenizer)
