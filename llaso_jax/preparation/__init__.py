"""Corpora from nothing but text: what is said, by whom, what is asked about it, and that nothing held out is in it.

texts -> plan of clips -> `llaso_jax.speech` renders them -> records in LLaSO's format, audit, data card.
"""
