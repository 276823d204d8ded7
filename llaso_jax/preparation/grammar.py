"""Texts made by rule: numbers, times, dates, letters, menus and messages, which a language model rarely writes, and
sentences of a wide vocabulary.

Each function takes a generator and gives one text as it is spoken: no digits, no abbreviations.
"""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import yaml


def listed(words: str) -> list[str]:
    """Of words between blanks, or of phrases between bars."""
    return words.split("|") if "|" in words else words.split()


ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = listed(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
)
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed(
    "January February March April May June July August September October November December"
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALPHABET = listed(
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec "
    "romeo sierra tango uniform victor whiskey x-ray yankee zulu"
)
NAMES = listed(
    "Anna Ben Clara David Emma Frank Grace Henry Irene Jack Karen Laura Martin Nina Oliver Paula Robert Sarah "
    "Thomas Victor Wendy Adams Baker Carter Dixon Evans Fisher Griffin Hughes Irving Jensen Keller Lawson "
    "Miller Newman Owens Parker Quinn Russell Simmons Turner Vaughan Walker Young"
)
CITIES = listed(
    "Amsterdam Athens Atlanta Austin Berlin Boston Bristol Cairo Calgary Chicago Dallas Denver Detroit Dublin "
    "Geneva Glasgow Houston Istanbul Jakarta Lagos Lima Lisbon London Madrid Manila Memphis Miami Montreal "
    "Moscow Mumbai Nairobi Oslo Ottawa Paris Phoenix Prague Rome Seattle Seoul Sydney Tokyo Toronto Vienna "
    "Warsaw Zurich"
)
UNITS = listed(
    "dollars|people|miles|percent|new messages|minutes|seconds|points|pages|euros|degrees"
)
STREETS = listed(
    "Main Oak Park Maple Cedar Hill Lake Church Mill River Station Garden Forest Bridge Market"
)
SERVICES = listed(
    "billing|technical support|new orders|returns|reservations|opening hours|customer service|"
    "the sales department|the warehouse|lost luggage|ticket prices|the nurse|a list of doctors|"
    "road conditions|the weather report|directions|an account balance|a recent payment|a replacement card|"
    "the front desk|another language|driving lessons"
)
KEYS = (*ONES[:10], "star", "pound", "the star key", "the pound key", "the hash key")
THINGS = listed(
    "printer|hard disk|battery|keyboard|update|download|upload|document|folder|camera|microphone|network|"
    "server|account|backup|calendar|message|password|channel|recording|folder list|mailbox|greeting|line|"
    "extension|conference room|directory|connection|voicemail|call|caller|operator|transfer|number|queue|"
    "device|screen|program"
)
STATES = listed(
    "is ready|is full|is empty|was deleted|was saved|is busy|is locked|was not found|has been changed|"
    "is now complete|could not be opened|is not connected|has been restored|was moved|is out of date|"
    "is being checked|has stopped|is temporarily closed|was cancelled|has been added|is no longer active|"
    "will restart soon|was received"
)
ACTIONS = listed(
    "try again later|call us tomorrow|contact your administrator|hold the line|stay where you are|"
    "wait for the signal|say your full name|enter a shorter code|check the cable|restart the machine|"
    "choose another name|press any key|dial the operator|leave a short message|speak after the beep|"
    "spell your last name|use the other entrance|have your card ready|listen carefully|hang up and call back"
)


def number(value: int) -> str:
    """0 to 999,999 in words: 342 -> three hundred forty two."""
    if value < 20:
        return ONES[value]
    if value < 100:
        tens, ones = divmod(value, 10)
        return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")
    size, name = (1000, "thousand") if value >= 1000 else (100, "hundred")
    head, rest = divmod(value, size)
    return f"{number(head)} {name}" + (f" {number(rest)}" if rest else "")


def ordinal(day: int) -> str:
    """1 to 31: 21 -> twenty first."""
    if day <= 20:
        return ORDINALS[day - 1]
    return "thirtieth" if day == 30 else f"{TENS[day // 10 - 2]} {ORDINALS[day % 10 - 1]}"


def digits(choose: random.Random) -> str:
    """Three to ten digits, as of a telephone number."""
    return " ".join(choose.choice([*ONES[:10], "oh"]) for _ in range(choose.randint(3, 10)))


def amount(choose: random.Random) -> str:
    """A number with what it counts."""
    value = choose.choice(
        (choose.randrange(100), choose.randrange(1000), choose.randrange(100_000))
    )
    return f"{number(value)} {choose.choice(UNITS)}"


def clock(choose: random.Random) -> str:
    """A time of day."""
    hour, minute = choose.randint(1, 12), choose.randrange(60)
    exact = f"{ONES[hour]} o'clock"
    past = f"{ONES[hour]} {number(minute) if minute > 9 else 'oh ' + ONES[minute]}"
    said = choose.choice(
        [exact, past, past, f"half past {ONES[hour]}", f"a quarter to {ONES[hour]}"]
    )
    lead = choose.choice(
        [
            "",
            "it is now ",
            "the train leaves at ",
            "we open at ",
            "the meeting starts at ",
            "the time is ",
        ]
    )
    return (
        lead
        + said
        + choose.choice(["", "", " in the morning", " in the afternoon", " p m", " a m"])
    )


def date(choose: random.Random) -> str:
    """A day of the year, with or without weekday and year."""
    day, month = ordinal(choose.randint(1, 31)), choose.choice(MONTHS)
    said = choose.choice(
        [f"{month} {day}", f"the {day} of {month}", f"{choose.choice(DAYS)}, {month} the {day}"]
    )
    year = choose.choice(
        [
            "",
            "",
            f", nineteen {number(choose.randint(20, 99))}",
            f", twenty {number(choose.randint(10, 39))}",
        ]
    )
    return said + year


def spelled(choose: random.Random) -> str:
    """A name letter by letter, in letters or in the alphabet of radio operators."""
    name = choose.choice(NAMES)
    if choose.random() < 0.3:
        code = " ".join(choose.choice(ALPHABET) for _ in range(choose.randint(2, 5)))
        return f"{code} {choose.choice(ONES[:10])}"
    letters = (
        " ".join(name.upper())
        if choose.random() < 0.6
        else " ".join(choose.sample(LETTERS, choose.randint(3, 6)))
    )
    return choose.choice([letters, f"{name}, {' '.join(name.upper())}", f"the code is {letters}"])


def menu(choose: random.Random) -> str:
    """A choice of a telephone menu."""
    service, key = choose.choice(SERVICES), choose.choice(KEYS)
    verb = choose.choice(["press", "press", "dial", "say", "please press"])
    return choose.choice(
        [f"For {service}, {verb} {key}.", f"{verb.capitalize()} {key} for {service}."]
    )


def message(choose: random.Random) -> str:
    """What a computer says, and what to do about it."""
    said = f"{choose.choice(['The', 'Your', 'This', 'That'])} {choose.choice(THINGS)} {choose.choice(STATES)}."
    advice = f"Please {choose.choice(ACTIONS)}."
    return choose.choice([said, advice, f"{said} {advice}"])


def address(choose: random.Random) -> str:
    """Where someone lives, or where a train goes."""
    street = f"{number(choose.randint(1, 999))} {choose.choice(STREETS)} Street"
    city, other = choose.sample(CITIES, 2)
    return choose.choice(
        [
            f"{street}, {city}",
            f"from {city} to {other}",
            f"the flight to {city} leaves from gate {number(choose.randint(1, 60))}",
            f"the train from {city} arrives on platform {ONES[choose.randint(1, 19)]}",
            f"{choose.choice(NAMES)} is calling from {city}",
        ]
    )


@functools.cache
def _words() -> dict[str, list[str]]:
    text = (Path(__file__).parent / "words.yaml").read_text(encoding="utf-8")
    return {name: listed(words.strip()) for name, words in yaml.safe_load(text).items()}


def everyday(choose: random.Random) -> str:
    """A sentence about some person and some thing, from a wide vocabulary; rarely likely, always grammatical."""
    words = {name: choose.choice(some) for name, some in _words().items()}
    base, _, past = words["verbs"].partition("/")
    quality, where, when, manner = (
        words[name] for name in ("qualities", "places", "moments", "manners")
    )
    who = choose.choice([choose.choice(NAMES), f"the {words['people']}", f"my {words['people']}"])
    owner = choose.choice(["the", "the", "this", "that", "our", "her", "his", "their"])
    thing = f"{owner} {choose.choice([quality + ' ', ''])}{words['things']}"
    said = choose.choice(
        [
            f"{who} {past} {thing} {where}.",
            f"{who} {manner} {past} {thing}.",
            f"{when}, {who} {past} {thing}.",
            f"did {who} {base} {thing} {where}?",
            f"why did {who} {base} {thing}?",
            f"who {past} {thing} {when}?",
            f"{who} will {base} {thing} {where}.",
            f"please do not {base} {thing} {where}.",
            f"{thing} {where} is {choose.choice(_words()['qualities'])}.",
            f"is {thing} {where}?",
            f"they {past} {thing} and {choose.choice(_words()['verbs']).partition('/')[2]} it {when}.",
        ]
    )
    return said[0].upper() + said[1:]


# Everyday sentences as often as all others together.
RULES: tuple[Callable[[random.Random], str], ...] = (
    digits,
    amount,
    clock,
    date,
    spelled,
    menu,
    message,
    message,
    address,
    *9 * (everyday,),
)


def rule_text(choose: random.Random) -> str:
    """A text of any rule."""
    return choose.choice(RULES)(choose)
