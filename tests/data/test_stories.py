"""Tests of the synthetic stories and of their exact probabilities."""

import collections
import itertools
import math

import numpy as np
import pytest

from cola_jax.config import StoriesConfig
from cola_jax.data import stories_templates as templates
from cola_jax.data.stories import Stories, split_sentences

SLOTS = ("who", "where", "goal", "mood", "ending")

# Grammars small enough to list, about 1k to 35k stories each.
SMALL = {
    "natural": StoriesConfig(values=2, variants=2, choices=1),
    "aligned": StoriesConfig(values=2, variants=2, choices=1, aligned=True),
    "natural-choices": StoriesConfig(values=2, variants=1, choices=2, min_sentences=2, max_sentences=5),
    "aligned-choices": StoriesConfig(values=2, variants=1, choices=3, min_sentences=3, aligned=True),
    "hidden-slots": StoriesConfig(values=2, choices=1, min_sentences=2, max_sentences=3),
}
LARGE = {
    "default": StoriesConfig(),
    "aligned": StoriesConfig(aligned=True),
    "easy": StoriesConfig(values=8, variants=2, aligned=True),
    "short": StoriesConfig(min_sentences=2, max_sentences=3),
}


@pytest.fixture(params=SMALL.values(), ids=SMALL.keys(), scope="module")
def small(request):
    stories = Stories(request.param)
    return stories, list(stories.support())


@pytest.fixture(params=LARGE.values(), ids=LARGE.keys(), scope="module")
def large(request):
    return Stories(request.param)


@pytest.fixture(name="default", scope="module")
def build_default():
    return Stories()


def all_factors(stories):
    for values in itertools.product(*(stories.factors[slot] for slot in SLOTS)):
        prob = math.prod(stories.factors[s][v] for s, v in zip(SLOTS, values, strict=True))
        yield dict(zip(SLOTS, values, strict=True)), prob


def draw_pairs(stories, count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        factor = stories.sample_factor(rng)
        yield factor, stories.sample_given(factor, rng)


# ---- exactness on grammars that can be listed ------------------------------------


def test_support_is_a_distribution_that_log_prob_reproduces(small):
    stories, support = small
    assert len({text for text, _ in support}) == len(support) > 500
    assert math.fsum(math.exp(lp) for _, lp in support) == pytest.approx(1, abs=1e-9)
    for text, lp in support:
        assert stories.log_prob(text) == pytest.approx(lp, abs=1e-9)


def test_entropy_equals_the_sum_over_the_support(small):
    stories, support = small
    expected = -math.fsum(math.exp(lp) * lp for _, lp in support)
    assert stories.entropy() == pytest.approx(expected, abs=1e-9)


def test_conditionals_mix_to_the_marginal_and_give_conditional_entropy(small):
    stories, support = small
    factors = list(all_factors(stories))
    assert len(factors) == stories.num_factors == 32
    for text, lp in support[:: len(support) // 100]:
        logs = [stories.log_prob_given(text, factor) for factor, _ in factors]
        mixed = math.fsum(p * math.exp(x) for (_, p), x in zip(factors, logs, strict=True))
        assert mixed == pytest.approx(math.exp(lp), rel=1e-9)
    # Each g has its own support but the same entropy, so one g gives the average.
    logs = [stories.log_prob_given(text, factors[5][0]) for text, _ in support]
    logs = [x for x in logs if x > -math.inf]
    assert math.fsum(map(math.exp, logs)) == pytest.approx(1, abs=1e-9)
    entropy = -math.fsum(math.exp(x) * x for x in logs)
    assert stories.conditional_entropy() == pytest.approx(entropy, abs=1e-9)


def test_mean_and_max_tokens_equal_the_support(small):
    stories, support = small
    lengths = [text.count(" ") + 1 + text.count(",") + text.count(".") for text, _ in support]
    mean = math.fsum(n * math.exp(lp) for n, (_, lp) in zip(lengths, support, strict=True))
    assert stories.mean_tokens() == pytest.approx(mean, abs=1e-9)
    assert stories.max_tokens() == max(lengths)


def test_some_grammar_hides_slots():
    stories = Stories(SMALL["hidden-slots"])
    factor_entropy = -sum(p * math.log(p) for probs in stories.factors.values() for p in probs.values())
    shown = stories.entropy() - stories.conditional_entropy()
    assert 0 < shown < factor_entropy - 0.1
    # A hidden mood leaves the probability the same for each of its values.
    text = "One morning, Tom walked into the forest. Tom kept the kite just before breakfast."
    factor = dict(who="Tom", where="forest", goal="kite", ending="kept")
    logs = {stories.log_prob_given(text, {**factor, "mood": mood}) for mood in stories.factors["mood"]}
    assert len(logs) == 1 and min(logs) > -math.inf
    assert stories.parse(text).candidates["mood"] == {"happy", "sad"}
    assert stories.parse(text).factor == factor


@pytest.mark.parametrize("aligned", [False, True])
def test_sampled_frequencies_agree_with_log_prob(aligned):
    config = StoriesConfig(
        values=2,
        variants=1,
        choices=1,
        min_sentences=3,
        max_sentences=4,
        aligned=aligned,
    )
    stories, count = Stories(config), 12_000
    support = dict(stories.support())
    seen = collections.Counter(stories.story(3, i) for i in range(count))
    assert set(seen) <= set(support)
    expected = {text: count * math.exp(lp) for text, lp in support.items()}
    assert min(expected.values()) > 5
    chi2 = sum((seen[text] - e) ** 2 / e for text, e in expected.items())
    freedom = len(support) - 1
    # 4 standard deviations of a chi-square on either side.
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


# ---- the large grammars ----------------------------------------------------------


def test_entropies_equal_monte_carlo_estimates(large):
    pairs = list(draw_pairs(large, 2500, seed=7))
    joint = np.array([-large.log_prob(x) for _, x in pairs])
    given = np.array([-large.log_prob_given(x, g) for g, x in pairs])
    for sample, exact in (
        (joint, large.entropy()),
        (given, large.conditional_entropy()),
    ):
        error = sample.std() / math.sqrt(len(sample))
        assert 0 < error < 0.1
        assert abs(sample.mean() - exact) < 4 * error


def test_sampled_stories_parse_to_their_own_factor(large):
    complete = 0
    for factor, text in draw_pairs(large, 500, seed=1):
        parse = large.parse(text)
        assert parse.coherent and parse.valid_fraction == 1
        assert parse.factor.items() <= factor.items()
        assert all(factor[slot] in parse.candidates[slot] for slot in SLOTS)
        assert {"who", "where", "ending"} <= set(parse.factor)
        assert parse.sentences[0].type == "introduction"
        assert parse.sentences[-1].type == "ending"
        assert all(s.mentions for s in parse.sentences)
        complete += set(parse.factor) == set(SLOTS)
        count = math.prod(len(parse.candidates[slot]) for slot in SLOTS)
        assert parse.candidate_count == count
    assert complete > 100


def test_size_of_the_default_grammar(default):
    stories = default
    assert stories.num_factors >= 5000
    assert Stories(StoriesConfig(values=8)).num_factors >= 5000
    sizes = {slot: len(values) for slot, values in stories.factors.items()}
    assert sizes == {"who": 24, "where": 12, "goal": 16, "mood": 6, "ending": 6}
    for probs in stories.factors.values():
        assert sum(probs.values()) == pytest.approx(1)
        assert max(probs.values()) > 1.5 * min(probs.values())


def test_vocabulary_is_what_stories_use(default):
    stories = default
    vocabulary = stories.vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) >= 300
    used = set()
    for i in range(4000):
        used |= set(stories.story(0, i).replace(".", " .").replace(",", " ,").split())
    assert used == set(vocabulary)


def test_sentences_have_the_promised_lengths(large):
    config = large.config
    counts, lengths = set(), set()
    for i in range(1000):
        sentences = split_sentences(large.story(5, i))
        counts.add(len(sentences))
        for sentence in sentences:
            assert sentence[0].isupper()
            assert sentence.index(".") == len(sentence) - 1
            lengths.add(len(sentence.split()))
    assert counts == set(range(config.min_sentences, config.max_sentences + 1))
    assert lengths == ({7} if config.aligned else {4, 6, 7, 8, 9, 10, 11, 12, 13})
    if config.aligned:
        assert set("".join(large.vocabulary())) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.")


def test_story_is_pure_and_independent_of_order(default):
    stories = default
    forward = [stories.story(11, i) for i in range(50)]
    again = Stories()
    backward = [again.story(11, i) for i in reversed(range(50))][::-1]
    assert forward == backward
    assert len(set(forward)) == 50
    assert forward != [stories.story(12, i) for i in range(50)]
    assert stories.story(2**64 - 1, 2**64 - 1) == stories.story(2**64 - 1, 2**64 - 1)
    for seed, index in ((-1, 0), (0, -1), (2**64, 0)):
        with pytest.raises(ValueError, match="must be from 0"):
            stories.story(seed, index)


# ---- what must not count as a story ----------------------------------------------


def changes(stories, text):
    """Yields (slot, sentence index, text) with one slot's word changed in a sentence.

    Only slots that another sentence determines are changed, so the result contradicts
    itself.
    """
    parse = stories.parse(text)
    for slot in SLOTS:
        where = [i for i, s in enumerate(parse.sentences) if len(s.mentions.get(slot, "")) == 1]
        value = parse.factor.get(slot)
        names, rows = templates.SLOTS[slot]
        forms = next((r.split("/") for r in rows if r.split("/")[0] == value), [])
        other = next(r.split("/") for r in rows if r.split("/")[0] != value)
        for i in where if len(where) > 1 else []:
            words = parse.sentences[i].text.split(" ")
            hits = [
                (j, k)
                for j, w in enumerate(words)
                for k, form in enumerate(forms)
                if w.strip(",.").lower() == form.lower() and names.split()[k] not in templates.GENDER_FORMS
            ]
            if len(hits) == 1:
                ((j, k),) = hits
                word = other[k].capitalize() if words[j][0].isupper() else other[k]
                words[j] = words[j].replace(words[j].strip(",."), word)
                changed = [s.text for s in parse.sentences]
                changed[i] = " ".join(words)
                yield slot, i, " ".join(changed)


@pytest.mark.parametrize("aligned", [False, True])
def test_one_changed_slot_word_breaks_coherence_but_not_validity(aligned):
    stories = Stories(StoriesConfig(aligned=aligned))
    seen = collections.Counter()
    for n in range(200):
        text = stories.story(21, n)
        for slot, i, changed in changes(stories, text):
            parse = stories.parse(changed)
            assert not parse.coherent
            assert stories.log_prob(changed) == -math.inf
            assert all(s.valid for j, s in enumerate(parse.sentences) if j != i)
            # The changed sentence alone may contradict itself only by its pronouns.
            if parse.sentences[i].valid:
                assert parse.factor is None and parse.candidate_count == 0
                assert parse.candidates[slot] == frozenset()
                seen[slot] += 1
            else:
                assert slot == "who"
    assert all(seen[slot] > 20 for slot in ("who", "where", "goal", "mood"))


@pytest.mark.parametrize(
    "old, new, valid",
    [
        ("She wished", "He wished", True),  # The wrong pronoun.
        ("She wished", "Tom wished", False),  # No wording has a name there.
        ("a key to turn", "a key to fly", False),  # The use of another goal.
        ("behind the ships", "behind the trees", True),  # Part of another place.
        ("for the key", "for the kite", True),
        ("key to turn", "key to turm", False),
        ("key to turn.", "key to turn", False),
        ("wished for", "wished  for", False),
        ("harbor.", "harbor!", False),
    ],
)
def test_hand_made_corruptions(default, old, new, valid):
    stories = default
    text = (
        "Once upon a time, a little girl called Mia lived in the harbor. "
        "She wished for a key to turn. She looked for the key behind the ships. "
        "Mia sold the key and went home happily."
    )
    assert stories.parse(text).coherent
    assert stories.parse(text).factor == dict(who="Mia", where="harbor", goal="key", mood="happy", ending="sold")
    assert old in text
    parse = stories.parse(text.replace(old, new))
    assert not parse.coherent
    assert (parse.valid_fraction == 1) == valid


def test_mentions_of_single_sentences(default):
    stories = default
    parse = stories.parse("She felt very happy. Nonsense here. He kept")
    first, second, third = parse.sentences
    assert (first.valid, first.type) == (True, "feeling")
    assert first.mentions["mood"] == {"happy"}
    assert first.mentions["who"] == set(list(stories.factors["who"])[1::2])
    assert set(first.mentions) == {"who", "mood"}
    assert (second.valid, second.type, second.mentions) == (False, None, {})
    assert third.text == "He kept" and not third.valid
    assert parse.valid_fraction == pytest.approx(1 / 3)
    assert parse.factor == {"mood": "happy"} and not parse.coherent


def test_order_start_and_end_matter(large):
    rng = np.random.default_rng(5)
    for i in range(100):
        sentences = split_sentences(large.story(9, i))
        shuffled = list(rng.permutation(sentences))
        wrong = [sentences[1:], sentences[:-1], sentences[::-1], sentences + sentences[-1:]]
        wrong += [shuffled] if shuffled != sentences else []
        for parts in wrong:
            parse = large.parse(" ".join(parts))
            assert not parse.coherent
            assert parse.valid_fraction == 1


def test_count_of_sentences_is_limited():
    long = Stories(StoriesConfig(min_sentences=6))
    short = Stories(StoriesConfig(max_sentences=5))
    text = long.story(0, 0)
    assert long.parse(text).coherent
    assert short.parse(text).valid_fraction == 1
    assert not short.parse(text).coherent


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "...",
        "\n",
        "\x00",
        "Tom",
        "Ünïcødé 🙂 \ud800.",
        "." * 10_000,
        "He " * 100_000,
        "One " + "x" * 1_000_000,
        "A. " * 20_000,
    ],
    ids=lambda text: repr(text[:8]),
)
def test_hostile_strings_are_parsed(default, text):
    stories = default
    parse = stories.parse(text)
    assert not parse.coherent and parse.valid_fraction == 0
    assert parse.factor == {} and parse.candidate_count == stories.num_factors
    assert stories.log_prob(text) == -math.inf
    assert text.strip().startswith(stories.first_sentence(text))


def test_random_words_are_not_coherent(default):
    stories, rng = default, np.random.default_rng(0)
    vocabulary = stories.vocabulary()
    for _ in range(200):
        text = " ".join(rng.choice(vocabulary, size=40)).replace(" .", ".")
        assert not stories.parse(text).coherent


@pytest.mark.parametrize("edit", ["{} ", " {}", "{}\n", "{} Tom", "{} .", "x{}"])
def test_only_the_exact_text_is_in_the_support(large, edit):
    text = large.story(0, 0)
    assert large.log_prob(text) > -math.inf
    assert large.log_prob(edit.format(text)) == -math.inf
    assert not large.parse(edit.format(text)).coherent


def test_white_space_between_sentences_keeps_them_valid_only(default):
    stories = default
    text = stories.story(0, 0).replace(". ", ".\n")
    assert stories.parse(text).valid_fraction == 1
    assert not stories.parse(text).coherent


def test_coherent_with_prompt(default):
    stories = default
    text, other = stories.story(0, 0), stories.story(0, 1)
    prompt = stories.first_sentence(text)
    assert prompt.endswith(".") and text.startswith(prompt + " ")
    assert stories.coherent_with_prompt(prompt, text)
    assert stories.coherent_with_prompt("", text)
    assert not stories.coherent_with_prompt(prompt, other)
    assert not stories.coherent_with_prompt(prompt, prompt)
    assert not stories.coherent_with_prompt(prompt, text + " " + prompt)


# ---- bad arguments ---------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("values", -1, "at least 0"),
        ("variants", -2, "at least 0"),
        ("choices", -1, "at least 0"),
        ("min_sentences", 1, "from 2 to 6"),
        ("min_sentences", 7, "from 2 to 6"),
        ("max_sentences", 3, "from min_sentences = 4 to 6"),
        ("max_sentences", 7, "from 2 to 6"),
    ],
)
def test_bad_config_values_are_named(field, value, allowed):
    with pytest.raises(ValueError) as error:
        Stories(StoriesConfig(**{field: value}))
    message = str(error.value)
    assert message.startswith(f"config.data.stories.{field} = {value!r}: must be ")
    assert message.endswith(allowed) and "\n" not in message


def test_bad_factors_are_named(default):
    stories = default
    factor = stories.sample_factor(np.random.default_rng(0))
    text = stories.story(0, 0)
    with pytest.raises(ValueError, match="who='Nobody': must be one of"):
        stories.log_prob_given(text, {**factor, "who": "Nobody"})
    with pytest.raises(ValueError, match="factor slots"):
        stories.sample_given({"who": "Tom"}, np.random.default_rng(0))


@pytest.mark.parametrize(
    "kind, template, message",
    [
        ("feeling", "{he} felt {degree} {mood}.", "overlaps"),
        ("turn", "{he} felt truly {mood}.", "overlaps"),
        ("turn", "{he} saw it. and {he} smiled.", "full stop"),
        ("introduction", "{he} came to the {place}.", "name the hero"),
    ],
)
def test_ambiguous_tables_are_refused(monkeypatch, kind, template, message):
    table = {**templates.NATURAL, kind: (*templates.NATURAL[kind], template)}
    monkeypatch.setattr(templates, "NATURAL", table)
    with pytest.raises(ValueError, match=message):
        Stories()


def test_tables_with_doubled_words_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(templates, "CHOICES", {**templates.CHOICES, "time": "day night day"})
        with pytest.raises(ValueError, match="listed twice"):
            Stories()
    slots = {**templates.SLOTS, "where": ("place feature", ["a/b", "c/b"])}
    monkeypatch.setattr(templates, "SLOTS", slots)
    with pytest.raises(ValueError, match="share a word"):
        Stories()
