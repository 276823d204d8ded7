"""Types of command-line arguments that several commands take."""

import argparse
from collections.abc import Callable


def at_least(lowest: int) -> Callable[[str], int]:
    """For `type=` of an argument: a whole number from `lowest` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value}: at least {lowest} is needed")
        return value

    return number
