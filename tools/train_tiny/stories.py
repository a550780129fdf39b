"""A small grammar of short stories: everything the embedded model will ever know.

A story is an *opening* ("Once upon a time, there was a small rabbit. One day, she") followed by a
*plot* ("lost a red ball near the garden. She looked ..."). Both are templates in one notation:

    {name}       a name bound once for the whole story: {hero}, {friend}, {place}, {his} ...
                 with a capital letter ({Hero}, {He}) the same name as it begins a sentence;
    [a|b|c]      a choice between phrases. Choices may hold names, but no other choices.

Names are bound before the first word is written, which is what keeps characters, pronouns and
objects the same from the first sentence to the last.

Every choice is *skewed*: the likeliest option has well over half of the probability and more
than three times that of the next (see `WEIGHTS`). A model trained on these stories then has a
clear favourite for every next token, so greedy decoding gives the same text in float32 and in
bfloat16.

A fixed favourite would tell the same story every time. So the order of likelihood depends on how
the story begins: openings list their own heroes and plots, heroes list their own friends, places
and things, and each hero's `manner` rotates the options of every [a|b|c]. What is likeliest for
Tom is second or third for the little fox.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

WEIGHTS = (0.66, 0.18, 0.10, 0.06)
"""Weight of the first, second, third and fourth option of a choice: the skew of the grammar."""


@dataclass(frozen=True)
class Hero:
    """Who a story is about, with this hero's own favourites, likeliest first."""

    name: str
    pronoun: str
    friends: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    crafts: tuple[str, ...]
    plots: tuple[str, ...]

    @property
    def intro(self) -> str:
        if self.name.startswith("the "):
            return self.name.replace("the", "a", 1)
        return f"a {'boy' if self.pronoun == 'he' else 'girl'} named {self.name}"


HEROES: tuple[Hero, ...] = (
    Hero(
        "Tom", "he", friends=("Lily", "Grandpa", "Ben"),
        places=("park", "river", "market"), things=("red ball", "shiny key", "paper boat"),
        crafts=("kite", "wooden boat", "drum"), plots=("help", "lose", "find", "make"),
    ),
    Hero(
        "Anna", "she", friends=("Tom", "Grandma", "Lily"),
        places=("beach", "garden", "library"), things=("silver coin", "blue hat", "little bell"),
        crafts=("basket", "lamp", "kite"), plots=("find", "noise", "help", "make"),
    ),
    Hero(
        "Ben", "he", friends=("Grandpa", "Anna", "Tom"),
        places=("farm", "lake", "hill"), things=("wooden horse", "paper map", "red ball"),
        crafts=("bird house", "toy train", "basket"), plots=("make", "help", "noise", "lose"),
    ),
    Hero(
        "Lily", "she", friends=("Anna", "Ben", "Grandma"),
        places=("meadow", "school", "park"), things=("blue scarf", "picture book", "silver coin"),
        crafts=("paper star", "drum", "lamp"), plots=("dream", "find", "lose", "help"),
    ),
    Hero(
        "the little fox", "he", friends=("the wise owl", "the small rabbit", "the brown bear"),
        places=("river", "old mill", "forest"), things=("golden ring", "shiny key", "green hat"),
        crafts=("wooden boat", "warm nest", "drum"), plots=("share", "find", "noise", "quest"),
    ),
    Hero(
        "the small rabbit", "she", friends=("the brown bear", "the little fox", "the wise owl"),
        places=("garden", "meadow", "forest"), things=("little bell", "green hat", "golden ring"),
        crafts=("warm nest", "basket", "bird house"), plots=("share", "lose", "make", "help"),
    ),
    Hero(
        "the brown bear", "he", friends=("the small rabbit", "the wise owl", "the little fox"),
        places=("waterfall", "forest", "hill"), things=("honey pot", "blue scarf", "paper map"),
        crafts=("drum", "bird house", "lamp"), plots=("noise", "make", "share", "find"),
    ),
    Hero(
        "the brave knight", "he", friends=("the kind king", "the young princess", "the wise owl"),
        places=("castle", "village", "bridge"), things=("silver cup", "golden ring", "paper map"),
        crafts=("wooden horse", "lamp", "toy train"), plots=("quest", "help", "lose", "share"),
    ),
    Hero(
        "the young princess", "she", friends=("the brave knight", "the kind king", "the wise owl"),
        places=("tower", "lake", "castle"), things=("picture book", "silver cup", "little bell"),
        crafts=("lamp", "paper star", "kite"), plots=("dream", "noise", "find", "make"),
    ),
    Hero(
        "the tiny robot", "he", friends=("the old baker", "Lily", "Tom"),
        places=("station", "market", "bridge"), things=("shiny key", "paper boat", "wooden horse"),
        crafts=("toy train", "paper star", "wooden boat"), plots=("help", "make", "lose", "find"),
    ),
)  # fmt: skip

# What no hero has a favourite of.
COMMON = {
    "creature": ("wet kitten", "baby bird", "tiny mouse", "white puppy"),
    "beast": ("dragon", "giant", "sea monster"),
    "missing": ("mother", "home", "brother"),
    "food": ("soup", "milk", "rice", "porridge"),
}

PRONOUNS = {"he": ("him", "his"), "she": ("her", "her")}
"""The object and possessive forms of each subject pronoun."""


# How a story may begin: a template, and the heroes and plots it favours, likeliest first.
OPENINGS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "Once upon a time, there was {intro} who lived near the {place}. One day, {he}",
        ("the small rabbit", "the tiny robot", "the little fox", "Lily"),
        ("lose", "share", "make", "help"),
    ),
    (
        "Long ago, {intro}",
        ("the brave knight", "the young princess", "the brown bear"), ("quest", "noise", "help"),
    ),
    (
        "One rainy day, {hero}",
        ("the brown bear", "Ben", "Anna", "the tiny robot"), ("make", "share", "noise"),
    ),
    (
        "One sunny morning, {hero}",
        ("the little fox", "Lily", "Tom", "Anna"), ("help", "dream", "lose"),
    ),
    (
        "One dark night, {hero}",
        ("the young princess", "Anna", "Ben", "the little fox"), ("noise", "quest", "help"),
    ),
    (
        "Deep in the forest lived {intro}. One cold evening, {he}",
        ("the brown bear", "the little fox", "the small rabbit"), ("share", "noise", "find"),
    ),
    (
        "Every morning, {hero} walked to the {place} to see {friend}. One day, {he}",
        ("the tiny robot", "Tom", "Ben", "Lily"), ("find", "lose", "make"),
    ),
    (
        "There was once {intro} who [loved to sing|was always happy|was never afraid]. "
        "One winter, {he}",
        ("the brave knight", "the little fox", "Tom", "the young princess"),
        ("make", "quest", "share"),
    ),
    (
        "Far away, near the {place}, lived {intro}. One summer day, {he}",
        ("Anna", "the young princess", "the brave knight", "Ben"), ("lose", "dream", "quest"),
    ),
)  # fmt: skip

PLAIN_SHARE = 0.5
"""Share of the stories that open with the hero's name alone ("Tom went to ..."), any hero."""

PLOTS: dict[str, tuple[str, ...]] = {
    "help": (
        "went to the {place} [to play|to pick flowers|for a walk] and met a {creature}.",
        '"Why are you so [sad|quiet|cold]?" asked {hero}.',
        '"I cannot find my {missing}," said the {creature}.',
        "{Hero} [took a lamp|called its name|looked at the map] and asked {friend} to help.",
        "They [walked and walked|looked everywhere|followed the tracks] until the sun went down.",
        "At last, they found its {missing} [behind the hill|under a tall tree|at the old gate].",
    ),
    "find": (
        "found a {thing} near the {place}.",
        "[It was very pretty|Nobody was there|The sun was shining], and {he} wanted to keep it.",
        "[Then|Soon|But] {he} saw {friend}, who was looking for something.",
        '"I lost my {thing}, and I am so [sad|sorry|tired]," said {friend}.',
        "{Hero} [smiled|nodded|thought for a moment] and gave it back.",
        "{Friend} [was so happy that they danced|gave {him} a warm cookie|thanked {him} twice].",
    ),
    "make": (
        "wanted to make a {craft} for {friend}.",
        "{He} worked all [day|morning|night], "
        "but the {craft} [fell apart|broke in two|would not hold].",
        "{He} was [angry|tired|sad] and wanted to stop.",
        '{Friend} [smiled|came in|sat down] and said, "[Try|Do it|Begin] once more."',
        "So {he} tried again, [step by step|slowly and with care|with a new plan].",
        "This time, the {craft} was [just right|perfect|better than ever].",
    ),
    "lose": (
        "lost a {thing} on the way to the {place}.",
        "{He} looked [in the tall grass|behind every tree|under the stones], but it was gone.",
        "{He} [began to cry|felt very sad|was worried] and told {friend} about it.",
        "They [walked back|looked everywhere|searched for hours] together.",
        "At last, {friend} saw the {thing} [in a bush|under a bench|on a branch].",
        "{Hero} [jumped for joy|laughed out loud|hugged {friend}].",
    ),
    "share": (
        "was very hungry and had only a little {food}.",
        "{He} sat down [under a tree|by the fire|near the {place}] to eat.",
        "Just then, {friend} came by and looked [hungry|tired|cold] too.",
        '"[Please sit down|Come and eat|There is enough for two]," said {hero}.',
        "They shared the {food} and [told stories|sang songs|talked] until the moon came up.",
        "The next day, {friend} brought {him} a basket of [berries|apples|nuts].",
    ),
    "noise": (
        "heard a [strange|loud|soft] noise near the {place}.",
        "{He} was [afraid|worried|alone], but {he} [took a lamp|stood up|was curious] "
        "and went to look.",
        "It was only a {creature}, [cold and hungry|lost in the night|far from home].",
        "{Hero} [gave it some warm milk|carried it home|wrapped it in a blanket].",
        "Soon it [fell asleep|felt better|was warm], "
        "and {friend} gave it a name: [Button|Star|Pepper].",
    ),
    "quest": (
        "set out to find the {beast} of the {place}.",
        "Everyone was afraid of it, [but {hero} was not|and no one went there|even {friend}].",
        "But the {beast} was not angry at all; it was only [lonely|hungry|sad].",
        '"[Will you be my friend|Can you stay a while|Do you like music]?" asked the {beast}.',
        "{Hero} [told it a story|sang it a song|said yes].",
        "After that, the {beast} [kept everyone safe|came to every feast|never hid again].",
    ),
    "dream": (
        "fell asleep near the {place} and dreamed of a [small|golden|friendly] {beast}.",
        "In the dream, they [flew over the sea|danced on the clouds|raced to the moon] together.",
        "When {he} woke up, {friend} was there with a bowl of hot {food}.",
    ),
}
"""Each plot as its sentences; the first goes on from the opening, so it begins with a verb."""

ENDING = (
    "[From that day on, they were best friends|It was the best day of all"
    "|Then {he} went home with a happy heart]."
)


def choose(rng: random.Random, options: Sequence[str], manner: int = 0) -> str:
    """Pick one of at most four options by `WEIGHTS`, the order rotated by `manner` places."""
    rank = rng.choices(range(len(options)), weights=WEIGHTS[: len(options)])[0]
    return options[(rank + manner) % len(options)]


def bind(rng: random.Random, hero: Hero, manner: int) -> dict[str, str]:
    """Choose the names of one story: what each {name} of its templates stands for."""
    him, his = PRONOUNS[hero.pronoun]
    names = {"hero": hero.name, "intro": hero.intro, "he": hero.pronoun, "him": him, "his": his}
    own = {"friend": hero.friends, "place": hero.places, "thing": hero.things, "craft": hero.crafts}
    names |= {key: choose(rng, options) for key, options in own.items()}
    names |= {key: choose(rng, options, manner) for key, options in COMMON.items()}
    capitals = {key.capitalize(): name[0].upper() + name[1:] for key, name in names.items()}
    return names | capitals


def expand(rng: random.Random, template: str, names: dict[str, str], manner: int) -> str:
    """Fill a template in: first a phrase for every [a|b|c], then a name for every {name}."""

    def phrase(match: re.Match[str]) -> str:
        return choose(rng, match[1].split("|"), manner)

    return re.sub(r"\[(.*?)\]", phrase, template).format_map(names)


def story(rng: random.Random) -> str:
    """Tell one story of 4 to 8 sentences; the same state of `rng` tells the same story."""
    by_name = {hero.name: hero for hero in HEROES}
    if rng.random() < PLAIN_SHARE:
        hero = rng.choice(HEROES)
        begin, plot = "{Hero}", choose(rng, hero.plots)
    else:
        begin, heroes, plots = rng.choice(OPENINGS)
        hero, plot = by_name[choose(rng, heroes)], choose(rng, plots)
    manner = HEROES.index(hero)
    template = " ".join((begin, *PLOTS[plot], ENDING))
    return expand(rng, template, bind(rng, hero, manner), manner)
