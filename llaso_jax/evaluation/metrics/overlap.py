"""Scores of free text by overlap with the reference: BLEU, chrF, TER and ROUGE-L."""

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from llaso_jax.evaluation.metrics.statistic import Statistic, mean

SacrebleuName = Literal["BLEU", "chrF", "TER"]
_METRICS: dict[SacrebleuName, type[Metric]] = {"BLEU": BLEU, "chrF": CHRF, "TER": TER}
# How sacrebleu cuts texts into words for BLEU.
_TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "char", "th": "char", "km": "char", "lo": "char"}


def sacrebleu_score(
    name: SacrebleuName, references: Sequence[str], answers: Sequence[str], language: str = "en"
) -> Statistic:
    """Corpus-level BLEU or chrF (0 to 100, higher is better) or TER (lower is better) by sacrebleu."""
    options = {"tokenize": _TOKENIZERS.get(language, "13a")} if name == "BLEU" else {}
    metric = _METRICS[name](**options)
    # The two halves of Metric.corpus_score, which every metric of sacrebleu defines: counts of each
    # segment, and the score of their sum.
    counts = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]))

    def score(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(sums.astype(counts.dtype).tolist()).score)

    def combine(sums: np.ndarray) -> np.ndarray:
        return np.apply_along_axis(score, -1, sums)

    return Statistic(counts.astype(np.float64), combine)


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> Statistic:
    """Mean F-measure of the longest common subsequence of stemmed words, 0 to 1, by rouge-score."""
    scorer = _rouge()
    pairs = zip(references, answers, strict=True)
    return mean([scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs])


@functools.cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)
