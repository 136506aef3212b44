"""The quickstart's text: made-up words, and questions about them with exactly one right answer.

Nothing here is taken from anyone. A word is two or three syllables drawn from the letters below ("tramilo"),
so there are millions of them and none means anything: a model can only answer by doing what it is asked to
do, letter by letter. Three kinds of questions use them:

- `operations`: what the base is pre-trained for, such as "reverse: tramilo" -> "olimart";
- `stories`: one sentence and a question about it, "Tramilo has a red hat. Who has a hat?" -> "Tramilo";
- `pig_latin`: what only fine-tuning teaches, "pig latin: tramilo" -> "amilotray": the consonants before the
  first vowel move behind the word, then comes "ay". No pre-training text asks for it, or ends in "ay".

Every word belongs to one side for good: `is_held_out` puts one word in ten (by checksum) aside. Held-out
questions use only those words and all training uses only the others, so a right held-out answer cannot be
remembered.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from zlib import crc32

Message = dict[str, str]

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnprstvwz"
CLUSTERS = ("br", "cl", "dr", "fl", "gr", "kl", "pl", "sk", "sp", "st", "str", "tr", "sh", "ch", "th")
CODAS = "lmnrst"
COLOURS = ("red", "blue", "green", "white", "black", "pink")
THINGS = ("hat", "ball", "cup", "drum", "kite", "lamp")


def is_held_out(word: str) -> bool:
    """True for the one word in ten that no training text contains."""
    return crc32(word.encode()) % 10 == 0


def make_word(rng: random.Random, held_out: bool) -> str:
    """A pronounceable word of 4 to 9 letters that starts with one to three consonants."""
    while True:
        word = ""
        for _ in range(rng.choice((2, 2, 3))):
            word += rng.choice(CLUSTERS) if rng.random() < 0.25 else rng.choice(CONSONANTS)
            word += rng.choice(VOWELS)
            if rng.random() < 0.2:
                word += rng.choice(CODAS)
        if 4 <= len(word) <= 9 and is_held_out(word) == held_out:
            return word


def split_onset(word: str) -> tuple[str, str]:
    """The consonants before the first vowel, and the rest: "tramilo" -> ("tr", "amilo")."""
    first_vowel = next(i for i, letter in enumerate(word) if letter in VOWELS)
    return word[:first_vowel], word[first_vowel:]


def pig_latin(word: str) -> str:
    """The fine-tuning task: "tramilo" -> "amilotray"."""
    onset, rest = split_onset(word)
    return rest + onset + "ay"


# name -> (what it does to one word, the ways to ask for it; {} is where the words go)
OPERATIONS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "repeat": (lambda w: w, ("repeat: {}", "Say {}", "Copy {} as it is")),
    "spell": ("-".join, ("spell: {}", "Spell {}", "Put hyphens into {}")),
    "reverse": (lambda w: w[::-1], ("reverse: {}", "Reverse {}", "Write {} backwards")),
    "uppercase": (str.upper, ("upper case: {}", "Shout {}", "Write {} in capitals")),
    "capitalize": (str.capitalize, ("capital: {}", "Capitalize {}", "Start {} with a capital")),
    "double": (
        lambda w: "".join(c + c for c in w),
        ("double: {}", "Double all of {}", "Write {} with twins"),
    ),
    "first": (lambda w: w[0], ("first letter: {}", "How does {} start?")),
    "last": (lambda w: w[-1], ("last letter: {}", "How does {} end?")),
    "onset": (lambda w: split_onset(w)[0], ("onset: {}", "What comes before the vowel in {}?")),
    "rest": (lambda w: split_onset(w)[1], ("from the vowel: {}", "Drop the onset of {}")),
    "vowels": (lambda w: "".join(c for c in w if c in VOWELS), ("vowels: {}", "Only the vowels of {}")),
    "consonants": (
        lambda w: "".join(c for c in w if c not in VOWELS),
        ("no vowels: {}", "Drop vowels from {}"),
    ),
    "rotate": (lambda w: w[1:] + w[0], ("rotate: {}", "Move the first letter of {} to the end")),
}
# operations that are asked of two words at a time now and then
ON_TWO_WORDS = ("repeat", "reverse", "uppercase", "capitalize", "first", "last", "onset", "rest")
SUFFIX_FORMS = ("add {1}: {0}", "Put {1} after {0}")
PREFIX_FORMS = ("lead with {1}: {0}", "Put {1} before {0}")
SWAP_FORMS = ("swap: {0} {1}", "Swap {0} and {1}")
PIG_LATIN_FORMS = ("pig latin: {}", "Say in pig latin: {}", "Write {} in pig latin")


def ask(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def affix(rng: random.Random) -> str:
    """A short ending or beginning; it holds no y, so no answer can end in "ay"."""
    return rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(("", *CODAS))


def operation_row(rng: random.Random, name: str, held_out: bool) -> list[Message]:
    """One question of the operation `name`, a key of OPERATIONS."""
    apply, forms = OPERATIONS[name]
    num_words = 2 if name in ON_TWO_WORDS and rng.random() < 0.15 else 1
    words = [make_word(rng, held_out) for _ in range(num_words)]
    return ask(rng.choice(forms).format(" ".join(words)), " ".join(map(apply, words)))


def story_row(rng: random.Random, held_out: bool) -> list[Message]:
    """A sentence about somebody's thing, and a question that the sentence answers."""
    name = make_word(rng, held_out).capitalize()
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    story = f"{name} has a {colour} {thing}."
    question, answer = rng.choice(
        (
            (f"Who has a {thing}?", name),
            (f"What has {name}?", f"A {colour} {thing}."),
            (f"Which colour has the {thing}?", colour.capitalize() + "."),
            ("Say it as a question.", f"Has {name} a {colour} {thing}?"),
        )
    )
    return ask(f"{story} {question}", answer)


def pretraining_row(rng: random.Random, held_out: bool) -> list[Message]:
    """One conversation of the pre-training corpus: any operation, an affix, a swap or a story."""
    kind = rng.choice((*OPERATIONS, "affix", "swap", "story"))
    if kind in OPERATIONS:
        return operation_row(rng, kind, held_out)
    if kind == "story":
        return story_row(rng, held_out)
    word = make_word(rng, held_out)
    if kind == "swap":
        other = make_word(rng, held_out)
        return ask(rng.choice(SWAP_FORMS).format(word, other), f"{other} {word}")
    extra = affix(rng)
    if rng.random() < 0.5:
        return ask(rng.choice(SUFFIX_FORMS).format(word, extra), word + extra)
    return ask(rng.choice(PREFIX_FORMS).format(word, extra), extra + word)


def pig_latin_rows(rng: random.Random, num_rows: int, held_out: bool) -> list[list[Message]]:
    """`num_rows` fine-tuning conversations, each about another word."""
    words: dict[str, None] = {}
    while len(words) < num_rows:
        words[make_word(rng, held_out)] = None
    return [ask(rng.choice(PIG_LATIN_FORMS).format(word), pig_latin(word)) for word in words]
