"""From LLaSO JSON and audio files to packed, static-shape batches.

records (index on disk) -> prompt + audio -> log-mel -> sample -> packed batch -> pipeline.
"""
