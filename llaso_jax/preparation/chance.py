"""Random choices that do not depend on each other's order."""

import hashlib
import random


def generator(*names: object) -> random.Random:
    """An independent generator for each sequence of names, so that one choice never shifts another."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
