"""The built-in corpus: properties of every story, checked on a few thousand of them."""

import hashlib
import random
import re

import pytest

from data.tiny_stories.sample_stories import ANIMALS, NAMES, PARENTS, draw_words, stories


@pytest.fixture(scope='module')
def corpus():
    return list(stories(4000, 1337))


@pytest.fixture(scope='module')
def paragraphs(corpus):
    return '\n\n'.join(corpus).split('\n\n')


def test_stories_depend_on_the_seed_only():
    first = list(stories(50, 1))
    assert first[:20] == list(stories(20, 1)) and not set(first) & set(stories(50, 2))


def test_stories_of_the_default_seed_never_change():
    """Prepared data must not change with a new version."""
    text = '\n'.join(stories(500, 1337))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == '3d8cbd88dc964abc58d4fb45328a9c4b3f4117ca9e7ec9a4255367e2ffb23c5a'


def test_corpus_has_enough_text_of_few_words(corpus, paragraphs):
    """No paragraph comes twice, and the words are so few that a small model can learn each of them."""
    words = [len(story.split()) for story in corpus]
    assert len(corpus) == 4000 and min(words) >= 60 and max(words) <= 250
    assert sum(80 <= n <= 150 for n in words) > 0.95 * len(words)
    assert sum(map(len, corpus)) / len(corpus) * 20_000 > 10e6
    assert {story.count('\n\n') for story in corpus} <= {2, 3, 4}
    assert len(set(paragraphs)) == len(paragraphs)
    assert len({word for story in corpus for word in re.findall(r"[a-z']+", story.lower())}) < 1000


@pytest.mark.parametrize('wrong', [
    r'''[^A-Za-z ,.!?'"]''',  # such as a bracket of the grammar
    r'^(?!"?[A-Z])', r'(?<![.!?])(?<![.!?]")$',
    r'  | [,.!?]|[,.!?][A-Za-z]|,,|\.\.',
    r'[^,.!?]" [a-z]|\. [a-z]|[a-z], [A-Z]\w+ed\b',
    r'\b[Aa] [aeiou]|\b[Aa]n [^aeiou]',
    r'\b(\w+) \1\b',
])
def test_no_paragraph_has_mistakes(paragraphs, wrong):
    assert not [paragraph for paragraph in paragraphs if re.search(wrong, paragraph)][:3]


def test_quotation_marks_are_balanced_and_placed_right(paragraphs):
    for paragraph in paragraphs:
        told, spoken = paragraph.split('"')[::2], paragraph.split('"')[1::2]
        assert len(told) == len(spoken) + 1, paragraph
        assert all(re.fullmatch(r'\S(.*\S)?', text) and text[-1] in ',.!?' for text in spoken), paragraph
        assert all(text[-1:] in (' ', '') for text in told[:-1]), paragraph
        assert all(text[:1] in (' ', '') for text in told[1:]), paragraph


def test_no_sentence_comes_twice_in_a_story(corpus):
    for story in corpus:
        sentences = [s for s in re.findall(r'[^.!?"\n]+[.!?]', story) if len(s.split()) > 3]
        assert len(sentences) == len(set(sentences)), story  # shorter ones are "she said."


def test_hero_and_pronouns_agree(corpus):
    """The first sentence and the last paragraph name the hero; every he or she refers to somebody."""
    sex = {name: he for names in NAMES.values() for he, text in names.items() for name in text.split()}
    males, females = r'\b([Hh]e|[Hh]is|him)\b', r'\b([Ss]he|[Hh]ers?)\b'
    for story in corpus:
        kind, hero = re.search(r'(boy|girl|' + ANIMALS.replace(' ', '|') + r') named (\w+)',
                               story.split('.')[0]).groups()
        assert kind not in ('boy', 'girl') or kind == {'he': 'boy', 'she': 'girl'}[sex[hero]], story
        assert hero in story.split('\n\n')[-1], story
        names = {name for name in re.findall(r'\b[A-Z]\w+\b', story) if name in sex}
        present = {sex[name] for name in names}
        assert len(names) == len(present), story
        present |= {'she'} if re.search(r'\b([Mm]om|[Gg]randma|sister)\b', story) else set()
        present |= {'he'} if re.search(r'\b([Dd]ad|[Gg]randpa|brother|man)\b', story) else set()
        assert 'he' in present or not re.search(males, story), story
        assert 'she' in present or not re.search(females, story), story


def test_parents_have_their_pronouns():
    drawn = [draw_words(['child'], {}, random.Random(seed)) for seed in range(20)]
    assert all(words['phe'] == PARENTS[words['parent']] for words in drawn)
