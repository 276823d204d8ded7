"""Metrics, one a file: pure functions of references and answers.

Where a score needs an uncertainty, a metric gives a `Statistic`: what each item contributes, and how the
sum of the contributions becomes the score.
"""
