"""Words and sentence templates of the synthetic stories (data only).

Three tables describe the language that `cola_jax.data.stories` generates:

* `SLOTS`: the slots of the global factor.  Each row is one value of the slot and
  each column one *form* in which a sentence may show that value.
* `CHOICES`: the lists of words that are drawn locally, whatever the factor is.
* `NATURAL` and `ALIGNED`: the wordings of each sentence type, in narrative order.

A wording is plain text in which `{form}` stands for a form of a slot or for a list
of local choices.  The first letter of a sentence is made a capital when the grammar
is built.  Order matters in every table: a smaller grammar keeps the head of each
list, so genders alternate in `who` and the most useful wordings come first.
"""

# Forms that only show the gender of the hero.  All other forms must tell all values
# of their slot apart, which the grammar checks when it is built.
GENDER_FORMS = frozenset({"he", "his", "him", "child"})

# The slot that the gender forms belong to, and its form that names the hero.
HERO_SLOT, HERO_NAME = "who", "name"

_BOY = "he his him boy"
_GIRL = "she her her girl"

SLOTS = {
    "who": (
        "name he his him child",
        tuple(
            f"{name} {_GIRL if i % 2 else _BOY}"
            for i, name in enumerate(
                "Tom Lily Ben Mia Sam Anna Max Rosa Leo Nora Jack Ella "
                "Finn Ruby Hugo Clara Owen Zoe Theo Ivy Noah Maya Oscar Emma".split()
            )
        ),
    ),
    "where": (
        "place feature",
        (
            "forest trees",
            "garden flowers",
            "village houses",
            "castle towers",
            "valley hills",
            "cave rocks",
            "market stalls",
            "desert dunes",
            "harbor ships",
            "meadow bushes",
            "barn haystacks",
            "library shelves",
        ),
    ),
    "goal": (
        "goal use",
        (
            "kite fly",
            "key turn",
            "map read",
            "lantern light",
            "drum play",
            "crown wear",
            "ball throw",
            "coin spend",
            "ribbon tie",
            "mirror polish",
            "bell ring",
            "whistle blow",
            "wagon pull",
            "puzzle solve",
            "boat sail",
            "seed plant",
        ),
    ),
    "mood": (
        "mood moodly feeling reacted",
        (
            "happy happily joy smiled",
            "sad sadly sorrow cried",
            "brave bravely courage marched",
            "calm calmly peace rested",
            "angry angrily anger frowned",
            "proud proudly pride cheered",
        ),
    ),
    "ending": (
        "ended done outcome",
        (
            "kept kept treasure",
            "shared shared gift",
            "lost lost memory",
            "returned returned promise",
            "hid hidden secret",
            "sold sold bargain",
        ),
    ),
}

CHOICES = {
    "time": "morning evening afternoon night",
    "weekday": "Monday Tuesday Friday Saturday Sunday",
    "weather": "sunny rainy windy cloudy snowy",
    "trait": "little clever kind young cheerful",
    "relative": "mother father sister brother uncle",
    "colour": "red blue green golden silver",
    "look": "shiny dusty muddy tiny",
    "manner": "slowly carefully quietly quickly",
    "number": "two three four seven",
    "size": "tall huge long thick",
    "barrier": "wall fence hedge gate",
    "gloom": "dark cold silent empty",
    "degree": "very rather quite truly",
    "inside": "heart mind head soul",
    "helper": "rabbit fox bird turtle mouse",
    "manners": "friendly wise gentle sleepy",
    "cover": "leaf stone basket blanket",
    "gust": "strong warm sudden cool",
    "food": "soup bread cake honey",
    "meal": "breakfast lunch dinner supper",
}

NATURAL = {
    "introduction": (
        "one {time}, {name} walked into the {place}.",
        "{name} was a {trait} {child} who lived in the {place}.",
        "on a {weather} day, {name} came to the {place}.",
        "once upon a time, a {trait} {child} called {name} lived in the {place}.",
        "in the {place}, among the old {feature}, lived {name}.",
        "{name} and {his} {relative} went to visit the {place}.",
    ),
    "wish": (
        "{he} wanted a {colour} {goal} more than anything else.",
        "{he} wished for a {goal} to {use}.",
        "{name} had always dreamed of owning a {colour} {goal}.",
        "more than toys or sweets, {he} needed a {goal}.",
        "{his} {relative} had told {him} about a wonderful {goal}.",
        "{name} thought it must be fun to {use} a {goal}.",
    ),
    "search": (
        "{he} looked for the {goal} behind the {feature}.",
        "{he} searched the whole {place} {manner} for the {goal}.",
        "a {size} {barrier} stood between {him} and the {goal}.",
        "for {number} hours, {he} hunted among the {feature}.",
        "nobody in the {place} had ever seen such a {goal}.",
        "the {place} was {gloom}, and the {goal} was nowhere to be found.",
    ),
    "feeling": (
        "{he} felt {degree} {mood}.",
        "{name} was {mood} and {reacted} for a while.",
        "{his} {inside} was full of {feeling}.",
        "{he} told {his} {relative} how {mood} {he} was.",
        "{feeling} filled {name}, and {he} {reacted}.",
        "without a word, {he} sat down and {reacted} {moodly}.",
    ),
    "turn": (
        "then a {manners} {helper} showed {him} the {goal}.",
        "suddenly {he} saw the {goal} under a {cover}.",
        "at last, the {goal} appeared between the {feature}.",
        "{name} followed a {helper} and found the {look} {goal}.",
        "a {gust} wind blew the {goal} right to {his} feet.",
        "when {he} stopped looking, a {helper} dropped the {goal} from above.",
    ),
    "ending": (
        "in the end, {he} {moodly} {ended} the {goal}.",
        "{name} {ended} the {goal} and went home {moodly}.",
        "the {goal} was {done}, and {name} {reacted} all the way home.",
        "so the {goal} became {his} {outcome}, and everybody ate {food}.",
        "{name} {ended} the {goal} just before {meal}.",
        "that {time}, {he} {moodly} told {his} friends the {goal} was {done}.",
    ),
}

# Exactly seven words each, and no mark but the full stop.
ALIGNED = {
    "introduction": (
        "one {time} {name} walked into the {place}.",
        "{name} was a {child} from the {place}.",
        "on {weekday} {name} came to the {place}.",
        "the {trait} {child} {name} loved the {place}.",
        "{name} and {his} {relative} visited the {place}.",
        "deep in the {place} there lived {name}.",
    ),
    "wish": (
        "{he} wanted to find a {colour} {goal}.",
        "{he} wished for a {goal} to {use}.",
        "{name} had always dreamed of a {goal}.",
        "{his} {relative} spoke of a {colour} {goal}.",
        "{name} hoped to {use} a {colour} {goal}.",
    ),
    "search": (
        "{he} sought the {goal} behind the {feature}.",
        "{he} searched the {place} for the {goal}.",
        "a {size} {barrier} hid the {goal} completely.",
        "nobody in the {place} saw the {goal}.",
        "{name} {manner} hunted among the {feature} alone.",
    ),
    "feeling": (
        "{he} felt {degree} {mood} for a while.",
        "{name} was {mood} and {reacted} all {time}.",
        "{his} {inside} was now full of {feeling}.",
        "{feeling} filled {name} and so {he} {reacted}.",
        "{he} told {his} {relative} about {his} {feeling}.",
    ),
    "turn": (
        "then a {helper} showed {him} the {goal}.",
        "at last {he} found the {look} {goal}.",
        "the {goal} lay hidden among the {feature}.",
        "{name} followed a {helper} to the {goal}.",
        "a {gust} wind brought {him} the {goal}.",
    ),
    "ending": (
        "{he} {moodly} {ended} the {goal} that {time}.",
        "{name} {ended} the {goal} and {reacted} {moodly}.",
        "the {goal} was {done} and {he} {reacted}.",
        "so the {goal} became {his} {outcome} forever.",
        "everyone {moodly} heard the {goal} was {done}.",
    ),
}
