"""Numbers written in answers, which may be as long as the answer: a model that loops writes digits for ever."""

MOST_DIGITS = (
    15  # whole numbers of so many digits are exact as f64; no age, pitch or score comes near
)


def whole_number(text: str) -> int | None:
    """The whole number that `text` is; None if it is none, or has more than 15 digits."""
    try:
        value = int(text)
    except ValueError:  # no number, or one past Python's limit of 4,300 digits
        return None
    return value if abs(value) < 10**MOST_DIGITS else None


def number(text: str) -> float | None:
    """The number that `text` is; None if it is none, not finite, or has more than 15 digits before the point."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < 10**MOST_DIGITS else None  # NaN is not less either
