"""Spoken questions and commands with short answers, made by rule.

Each kind gives (what is said, its answer, facts). Answers are drawn first, so that every one is as frequent as any
other, then words that have it: the same question is put in many ways, and no way of asking gives the answer away.
"""

import random
from typing import NamedTuple

from llaso_jax.preparation.grammar import DAYS, MONTHS, ONES, listed


class Spoken(NamedTuple):
    """text: what is said; answer: to it; written: text beside the recording, in the layout (a,t)."""

    text: str
    answer: str
    written: str = ""


# --- (a): the recording asks, and that is all -----------------------------------------------------
OPPOSITES = listed(
    "hot cold|big small|up down|left right|open closed|early late|day night|black white|young old|fast slow|"
    "full empty|happy sad|high low|loud quiet|rich poor|soft hard|wet dry|near far|strong weak|heavy light|"
    "long short|first last|clean dirty|true false|inside outside|above below|before after|north south|"
    "east west|push pull|buy sell|win lose"
)
NUMBERS = ONES[:13]


def arithmetic(choose: random.Random, answer: str) -> str:
    """A sum, a difference, or a neighbour of a number; `answer` is a number from zero to twelve."""
    value = NUMBERS.index(answer)
    first = choose.randint(0, value)
    taken = choose.randint(0, 12 - value)
    ways = [
        f"{NUMBERS[first]} plus {NUMBERS[value - first]}",
        f"{NUMBERS[value + taken]} minus {NUMBERS[taken]}",
    ]
    what = choose.choice(
        ["what is", "how much is", "tell me", "calculate", "can you tell me what is"]
    )
    said = [f"{what} {way}" for way in ways]
    if value:
        said.append(
            choose.choice(["what comes after", "which number follows"]) + f" {NUMBERS[value - 1]}"
        )
    if value < 12:
        said.append(
            choose.choice(["what comes before", "which number is just before"])
            + f" {NUMBERS[value + 1]}"
        )
    return choose.choice(said)


def calendar(choose: random.Random, answer: str) -> str:
    """The day or month before or after another one."""
    known, kind = (DAYS, "day") if answer in DAYS else (MONTHS, "month")
    place = known.index(answer)
    step = choose.choice([-1, 1])
    other = known[(place - step) % len(known)]
    relation = "after" if step > 0 else "before"
    return choose.choice(
        [
            f"which {kind} comes {relation} {other}",
            f"what {kind} is {relation} {other}",
            f"tell me the {kind} {relation} {other}",
            f"name the {kind} that comes right {relation} {other}",
            f"do you know the {kind} {relation} {other}",
        ]
    )


def opposite(choose: random.Random, answer: str) -> str:
    """The opposite of a word."""
    (pair,) = (pair.split() for pair in OPPOSITES if answer in pair.split())
    other = pair[1 - pair.index(answer)]
    return choose.choice(
        [
            f"what is the opposite of {other}",
            f"which word is the opposite of {other}",
            f"tell me the opposite of {other}",
            f"say the opposite of {other}",
            f"what do you call the opposite of {other}",
            f"{other} is the opposite of what",
        ]
    )


SPOKEN_ANSWERS = {
    arithmetic: tuple(NUMBERS),
    calendar: (*DAYS, *MONTHS),
    opposite: tuple(dict.fromkeys(word for pair in OPPOSITES for word in pair.split())),
}


def spoken_question(choose: random.Random, index: int) -> Spoken:
    """A question whose answer needs nothing but the recording; kinds and answers in turn by `index`."""
    kinds = list(SPOKEN_ANSWERS)
    kind, turn = kinds[index % len(kinds)], index // len(kinds)
    answers = SPOKEN_ANSWERS[kind]
    answer = answers[turn % len(answers)]
    lead = choose.choice(["", "", "", "excuse me, ", "hello, ", "a question, "])
    return Spoken(lead + kind(choose, answer), answer)


# --- (a,t): the recording asks about what is written -----------------------------------------------
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "green", "blue", "yellow", "white", "black", "brown", "orange"),
    "room": ("kitchen", "bedroom", "office", "garden", "garage", "bathroom", "library", "cellar"),
    "name": ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "animal": ("dog", "cat", "horse", "sheep", "rabbit", "goose", "tiger", "monkey"),
    "city": ("London", "Paris", "Berlin", "Tokyo", "Boston", "Sydney", "Madrid", "Cairo"),
    "price": (
        "two dollars",
        "five dollars",
        "nine dollars",
        "twelve dollars",
        "twenty dollars",
        "thirty dollars",
    ),
    "season": ("spring", "summer", "autumn", "winter"),
}
ASKED: dict[str, tuple[str, ...]] = {
    "colour": ("what colour is {it}", "which colour does {it} have", "tell me the colour of {it}"),
    "room": (
        "which room is {it} in",
        "what room should I look in for {it}",
        "tell me the room where {it} is",
    ),
    "name": (
        "what is the name of the owner of {it}",
        "who owns {it}",
        "tell me who {it} belongs to",
    ),
    "day": (
        "on which day does {it} arrive",
        "what day does {it} come",
        "tell me the day when {it} gets here",
    ),
    "animal": (
        "which animal is painted on {it}",
        "what animal is shown on {it}",
        "name the animal on {it}",
    ),
    "city": (
        "which city is {it} from",
        "what city does {it} come from",
        "tell me the city where {it} was made",
    ),
    "price": ("how much is {it}", "what does {it} cost", "tell me the price of {it}"),
    "season": (
        "in which season is {it} sold",
        "which season is {it} for",
        "tell me the season when {it} is sold",
    ),
}
WRITTEN: dict[str, str] = {
    "colour": "The colour of the {it} is {value}.",
    "room": "The {it} is in the {value}.",
    "name": "The {it} belongs to {value}.",
    "day": "The {it} arrives on {value}.",
    "animal": "There is a {value} on the {it}.",
    "city": "The {it} was made in {value}.",
    "price": "The {it} costs {value}.",
    "season": "The {it} is sold in {value}.",
}
OBJECTS = listed(
    "box lamp chair table basket bottle picture carpet cup vase clock bag umbrella mirror plate drum kite "
    "blanket pillow bucket hat coat ladder candle suitcase guitar statue bench wagon ticket"
)
FACTS = 4  # written beside a question


def written_question(choose: random.Random, index: int) -> Spoken:
    """A question about one of a few written facts; attributes and answers in turn by `index`."""
    names = list(ATTRIBUTES)
    asked, turn = names[index % len(names)], index // len(names)
    answer = ATTRIBUTES[asked][turn % len(ATTRIBUTES[asked])]
    thing = choose.choice(OBJECTS)
    facts = {name: choose.choice(ATTRIBUTES[name]) for name in choose.sample(names, FACTS)} | {
        asked: answer
    }
    lines = [WRITTEN[name].format(it=thing, value=value) for name, value in facts.items()]
    choose.shuffle(lines)
    said = choose.choice(ASKED[asked]).format(it=f"the {thing}")
    polite = choose.choice(["", "", "please ", "excuse me, "])
    return Spoken(polite + said, answer, " ".join(lines))


# --- (t,a): commands ------------------------------------------------------------------------------
INTENTS: dict[str, tuple[str, ...]] = {
    "activate": (
        "turn on {it}",
        "switch on {it}",
        "start {it}",
        "please turn {it} on",
        "can you switch {it} on",
    ),
    "deactivate": (
        "turn off {it}",
        "switch off {it}",
        "stop {it}",
        "please turn {it} off",
        "can you switch {it} off",
    ),
    "increase": (
        "turn up {it}",
        "make {it} stronger",
        "please turn {it} up",
        "set {it} higher",
        "raise {it} a little",
    ),
    "decrease": (
        "turn down {it}",
        "make {it} weaker",
        "please turn {it} down",
        "set {it} lower",
        "reduce {it} a little",
    ),
}
DEVICES = ("light", "fan", "radio", "heating", "music", "television", "lamp", "speaker")
ROOMS = ("kitchen", "bedroom", "office", "garden", "garage", "bathroom", "hallway", "cellar")


class Command(NamedTuple):
    """A command with what can be asked about it."""

    text: str
    intent: str
    device: str
    room: str


def command(choose: random.Random, index: int) -> Command:
    """Something to do in a house; intents, devices and rooms in turn by `index`."""
    intents = list(INTENTS)
    intent = intents[index % len(intents)]
    device = DEVICES[index // len(intents) % len(DEVICES)]
    room = ROOMS[(index // len(intents) // len(DEVICES) + index) % len(ROOMS)]
    where = choose.choice([f"the {room} {device}", f"the {device} in the {room}"])
    lead = choose.choice(["", "", "hey, ", "now "])
    return Command(lead + choose.choice(INTENTS[intent]).format(it=where), intent, device, room)
