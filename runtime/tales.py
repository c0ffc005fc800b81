"""A corpus of short English tales from a seeded grammar, for machines with no network and for tests.

Its point is a known floor: the entropy of the source follows from the grammar's probabilities alone, so a loss curve
can be read against the best any model could do. The argument, in two steps:

1. *The grammar is unambiguous, and no tale is a prefix of another.* Every alternative of a rule starts with literal
   text (its head), and no head of a rule is a prefix of another head of the same rule (`conflicts` checks both); a
   rule with one alternative decides nothing. So a reader going left to right knows each choice from the next bytes,
   and knows where the tale ends. The persons and things of a tale are drawn once and mentioned again: their first
   mention is by a form that tells them apart (again prefix-free), and later mentions follow from it. Hence tale and
   derivation determine each other, and the entropy of a tale is the entropy of its derivation: the sum over rules of
   (expected uses) x (entropy of the choice).
2. *Tales are independent and self-delimiting*, so by the renewal theorem the entropy per byte of the stream is
   (entropy of a tale) / (expected bytes of a tale).

Expected uses solve a linear system, as for any stochastic context-free grammar (Booth & Thompson 1973). A model that
sees only its context window cannot remember a tale's hero for ever, so its own floor lies a little above this one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from tinygpt.runtime.threefry import TALES, purpose_key, uniforms

DEFAULT_BYTES = 1_200_000
DEFAULT_SEED = 1

_SYMBOL = re.compile(r"\{(\w+)\}")
_DRAWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Alternative:
    """One way to expand a rule: literal text with {symbols}, and its share of the rule's probability."""

    template: str
    weight: float = 1.0

    @property
    def head(self) -> str:
        return _SYMBOL.split(self.template, maxsplit=1)[0]

    @property
    def literal_bytes(self) -> int:
        return len(_SYMBOL.sub("", self.template).encode())

    @property
    def symbols(self) -> list[str]:
        return _SYMBOL.findall(self.template)


def _words(text: str) -> tuple[Alternative, ...]:
    return tuple(Alternative(word) for word in text.split("|"))


def _beings(child: str, he: str, his: str, him: str, names: str) -> tuple[dict[str, str], ...]:
    return tuple({"hero": name, "child": child, "he": he, "his": his, "him": him} for name in names.split())


def _nouns(symbol: str, phrases: str) -> tuple[dict[str, str], ...]:
    """`a_SYMBOL` is the phrase ("an old owl"), `SYMBOL` the phrase without its article."""
    return tuple({f"a_{symbol}": phrase, symbol: phrase.split(" ", 1)[1]} for phrase in phrases.split("|"))


def _places(phrases: str) -> tuple[dict[str, str], ...]:
    return tuple({"home": phrase} for phrase in phrases.split("|"))


# What a tale draws once, uniformly, before it begins: a tuple of the forms each possibility takes in the text. The
# first form listed is the one that introduces it.
CAST: dict[str, tuple[dict[str, str], ...]] = {
    "hero": (
        *_beings(
            "girl", "she", "her", "her",
            "Anna Bella Clara Daisy Ellen Flora Grace Hazel Ivy Julia Kate Lucy Mary Nora Olive Rose",
        ),
        *_beings(
            "boy", "he", "his", "him",
            "Adam Ben Colin David Edwin Felix George Henry Isaac James Leo Martin Nils Oscar Peter Tom",
        ),
    ),
    "home": _places(
        "in a mill by the river|at the edge of a dark forest|on a green hill|in a house by the sea|"
        "under an old stone bridge|beside a frozen lake|near the long road to the city|in a tower without stairs|"
        "behind the baker's shop|in a valley full of sheep|on an island in the mist|among the apple trees"
    ),
    "friend": _nouns(
        "friend",
        "a red fox|an old owl|a shy hare|a grey goose|a small hedgehog|a young badger|a blind mole|a brown wren|"
        "a wise toad|an otter|a lost donkey|a thin goat|a proud rooster|a sleepy bear|a clever crow|a lame wolf",
    ),
    "thing": _nouns(
        "thing",
        "a silver key|a wooden flute|a torn map|a glass bottle|a golden coin|a rusty sword|an empty purse|"
        "a paper boat|a warm cloak|a little lantern|an iron ring|a book of songs|a white feather|a round mirror|"
        "a cracked bell|a copper pot",
    ),
}  # fmt: skip

RULES: dict[str, tuple[Alternative, ...]] = {
    "tale": (Alternative("{opening}{nature}{finding}{meeting}{events}\n\n"),),
    "opening": (
        Alternative("Once upon a time, {hero} lived {home}."),
        Alternative("Long ago there was a child called {hero} who lived {home}."),
        Alternative("There once lived a child named {hero}, {home}."),
    ),
    "nature": (
        Alternative(" Everyone knew that {he} was {virtue}, but also {flaw}."),
        Alternative(" People said that no {child} was ever so {virtue}."),
        Alternative(" All year long {he} loved to {pastime}, for {he} was {virtue}."),
    ),
    "finding": (
        Alternative(" One {weather} {daytime}, {he} found {a_thing} {spot}."),
        Alternative(" On a {weather} {daytime}, {his} {relative} gave {him} {a_thing}."),
    ),
    "meeting": (
        Alternative(" Just then {a_friend} came {path} and said, \"{greeting}\""),
        Alternative(" Not far away sat {a_friend}, who looked {mood}."),
        Alternative(" That evening {hero} met {a_friend} {spot}."),
    ),
    "events": (
        Alternative(" They walked {distance} until they came to {landmark}.{events}", 3),
        Alternative(" Then the {friend} told {him} a story about {subject}.{events}", 2),
        Alternative(" It began to {storm}, so they hid {shelter}.{events}", 2),
        Alternative(" \"{question}\" asked the {friend}. \"{answer}\" said {hero}.{events}", 4),
        Alternative(" For {count} days {hero} and the {friend} {labour}.{events}", 2),
        Alternative(" So {hero} gave the {friend} {food}, and {he} felt {mood}.{events}", 2),
        Alternative(" But {danger} stood in the way, and {hero} had to {pastime}.{events}", 3),
        Alternative(" At night they dreamed of {subject}.{events}", 1),
        Alternative(" At last {he} gave the {thing} to the {friend}, and both were {mood} ever after.", 2),
        Alternative(" In the end {hero} went home with the {thing}, {mood} and tired.", 1),
        Alternative(" Nobody knows what became of the {thing}, but {hero} and the {friend} are still {mood} today.", 1),
    ),
    "virtue": _words("kind|brave|honest|patient|clever|gentle|quick|cheerful|strong|thoughtful|faithful|merry"),
    "flaw": _words(
        "lazy|afraid of the dark|too proud|always late|stubborn|careless|easily bored|very shy|greedy|noisy"
    ),
    "pastime": _words(
        "sing|climb trees|count the stars|run very fast|tell jokes|swim|bake bread|paint|listen|catch fish|"
        "dance|whistle"
    ),
    "weather": _words("cold|sunny|windy|foggy|quiet|rainy|golden|stormy|bright|snowy"),
    "daytime": _words("morning|evening|afternoon|night|day in spring|day in autumn"),
    "spot": _words(
        "under a hollow tree|in the tall grass|behind the well|by the garden wall|at the crossroads|"
        "on the sand|inside an old boot|near the spring|below the stairs|between two rocks"
    ),
    "relative": _words("mother|father|grandmother|uncle|aunt|sister|brother|teacher"),
    "path": _words("along the path|out of the bushes|down the hill|over the bridge|across the field|through the gate"),
    "greeting": _words(
        "Good day, my friend!|Have you any bread?|Will you help me?|I have waited for you.|"
        "Where are you going?|Do not be afraid.|What a fine day it is!|Please take me with you."
    ),
    "mood": _words("happy|sad|proud|content|hungry|grateful|surprised|calm|lonely|glad"),
    "distance": _words(
        "a long way|for an hour|all night|three miles|without a word|side by side|up and up|from dawn to dusk"
    ),
    "landmark": _words(
        "a wide river|a locked door|the king's castle|a village with no people|a cave full of bats|"
        "a burning house|the top of a mountain|a ship without sails|a market|the end of the world|"
        "a broken cart|a field of poppies"
    ),
    "subject": _words(
        "the moon|a dragon with cold feet|two brothers|a lost crown|the first winter|a fish that could speak|"
        "the north wind|a queen who never slept|seven swans|a giant|bread and honey|the deep sea"
    ),
    "storm": _words("rain|snow|hail|thunder|blow|grow dark"),
    "shelter": _words("in a barn|under a fallen oak|inside a church|beneath the {thing}|in the reeds|against a wall"),
    "question": _words(
        "Are you cold?|Who made the {thing}?|May I see the {thing}?|Shall we turn back?|"
        "What is beyond the hills?|Why do you weep?|Can you keep a secret?|How much does it cost?"
    ),
    "answer": _words(
        "Yes, of course,|No, never,|I do not know,|Only if you promise,|Ask me tomorrow,|Let us find out,|"
        "Nothing at all,|We must hurry,"
    ),
    "count": _words("two|three|four|five|six|seven|nine|ten|a hundred|many"),
    "labour": _words(
        "built a raft|followed the river|ate nothing but berries|worked in the fields|looked for a way out|"
        "slept|guarded the {thing}|learned to {pastime}"
    ),
    "food": _words(
        "a piece of cheese|half an apple|some nuts|the last of the bread|a bowl of soup|honey|warm milk|"
        "a plum"
    ),
    "danger": _words(
        "a troll|an angry farmer|a deep ditch|the night watch|a pack of dogs|a wall of thorns|"
        "the miller's ghost|ice"
    ),
}  # fmt: skip

_FORM_OF = {form: member for member, choices in CAST.items() for form in choices[0]}


def generate(size: int = DEFAULT_BYTES, seed: int = DEFAULT_SEED) -> bytes:
    """Whole tales, at least `size` bytes of them. The same seed gives the same bytes everywhere."""
    draw = _draws(seed)
    tales: list[str] = []
    total = 0
    while total < size:
        tales.append(tell(lambda: next(draw)))
        total += len(tales[-1])
    return "".join(tales).encode("ascii")


def tell(draw: Callable[[], float]) -> str:
    """One tale, each choice made by the next number `draw` returns, uniform in [0, 1)."""
    forms: dict[str, str] = {}
    for choices in CAST.values():
        forms |= choices[int(draw() * len(choices))]
    pieces: list[str] = []
    stack = ["{tale}"]
    while stack:
        literal, symbol, rest = (*_SYMBOL.split(stack.pop(), maxsplit=1), "", "")[:3]
        pieces.append(literal)
        if not symbol:
            continue
        stack.append(rest)
        stack.append(forms[symbol] if symbol in forms else _choose(RULES[symbol], draw()).template)
    return "".join(pieces)


def entropy_per_byte(rules: Mapping[str, tuple[Alternative, ...]] = RULES) -> float:
    """The entropy rate of the tales, in nats per byte: the loss that no model can beat on average."""
    uses = _expected_uses(rules)
    choices = sum(uses[name] * _entropy([alternative.weight for alternative in rule]) for name, rule in rules.items())
    casting = sum(math.log(len(members)) for members in CAST.values())
    return (choices + casting) / expected_bytes(rules)


def expected_bytes(rules: Mapping[str, tuple[Alternative, ...]] = RULES) -> float:
    """The mean length of a tale in bytes. A member of the cast is independent of every other choice, so a mention
    counts the mean length of its form."""
    uses = _expected_uses(rules)
    total = 0.0
    for name, rule in rules.items():
        for share, alternative in _shares(rule):
            mentions = sum(_mean_length(symbol) for symbol in alternative.symbols if symbol in _FORM_OF)
            total += uses[name] * share * (alternative.literal_bytes + mentions)
    return total


def conflicts(rules: Mapping[str, tuple[Alternative, ...]] = RULES) -> list[str]:
    """Why the grammar might be ambiguous: heads that are prefixes of one another, and introductions that are. None
    should be."""
    heads = {f"rule {name}": [a.head for a in rule] for name, rule in rules.items() if len(rule) > 1}
    heads |= {f"cast {name}": [next(iter(forms.values())) for forms in members] for name, members in CAST.items()}
    return [
        f"{where}: {first!r} begins {second!r}"
        for where, texts in heads.items()
        for first, second in permutations(texts, 2)
        if second.startswith(first)
    ]


def _draws(seed: int) -> Iterator[float]:
    key = purpose_key(seed, TALES)
    first = 0
    while True:
        yield from uniforms(key, first, _DRAWS_AT_ONCE).tolist()
        first += _DRAWS_AT_ONCE


def _choose(rule: tuple[Alternative, ...], draw: float) -> Alternative:
    mark = draw * sum(alternative.weight for alternative in rule)
    for alternative in rule:
        mark -= alternative.weight
        if mark < 0:
            return alternative
    return rule[-1]


def _shares(rule: tuple[Alternative, ...]) -> list[tuple[float, Alternative]]:
    total = sum(alternative.weight for alternative in rule)
    return [(alternative.weight / total, alternative) for alternative in rule]


def _entropy(weights: list[float]) -> float:
    total = sum(weights)
    return -sum(weight / total * math.log(weight / total) for weight in weights)


def _mean_length(form: str) -> float:
    members = CAST[_FORM_OF[form]]
    return sum(len(forms[form]) for forms in members) / len(members)


def _expected_uses(rules: Mapping[str, tuple[Alternative, ...]]) -> dict[str, float]:
    """How often each rule is expanded in a tale, on average: u = e_tale + M^T u, M[x, y] the mean number of y in one
    x."""
    names = list(rules)
    mean = np.zeros((len(names), len(names)))
    for row, name in enumerate(names):
        for share, alternative in _shares(rules[name]):
            for symbol in alternative.symbols:
                if symbol in rules:
                    mean[row, names.index(symbol)] += share
    start = np.array([float(name == "tale") for name in names])
    return dict(zip(names, np.linalg.solve(np.eye(len(names)) - mean.T, start).tolist(), strict=True))
