"""Scores of generated text against references."""
