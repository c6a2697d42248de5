"""The built-in corpus: what every story must be, checked over a few thousand of them."""

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


def test_same_seed_same_stories():
    first = list(stories(50, 1))
    assert first[:20] == list(stories(20, 1)) and not set(first) & set(stories(50, 2))


def test_size(corpus, paragraphs):
    """Enough text, no paragraph of it twice, of few words, of which a small model can learn each."""
    words = [len(story.split()) for story in corpus]
    assert len(corpus) == 4000 and min(words) >= 60 and max(words) <= 250
    assert sum(80 <= n <= 150 for n in words) > 0.95 * len(words)
    assert sum(map(len, corpus)) / len(corpus) * 20_000 > 10e6
    assert {story.count('\n\n') for story in corpus} <= {2, 3, 4}
    assert len(set(paragraphs)) == len(paragraphs)
    assert len({word for story in corpus for word in re.findall(r"[a-z']+", story.lower())}) < 1000


@pytest.mark.parametrize('wrong', [
    r'''[^A-Za-z ,.!?'"]''',  # also what is left of the grammar
    r'^(?!"?[A-Z])', r'(?<![.!?])(?<![.!?]")$',
    r'  | [,.!?]|[,.!?][A-Za-z]|,,|\.\.',
    r'[^,.!?]" [a-z]|\. [a-z]|[a-z], [A-Z]\w+ed\b',
    r'\b[Aa] [aeiou]|\b[Aa]n [^aeiou]',
    r'\b(\w+) \1\b',
])
def test_no_paragraph_has(paragraphs, wrong):
    assert not [paragraph for paragraph in paragraphs if re.search(wrong, paragraph)][:3]


def test_quotation_marks(paragraphs):
    for paragraph in paragraphs:
        told, spoken = paragraph.split('"')[::2], paragraph.split('"')[1::2]
        assert len(told) == len(spoken) + 1, paragraph
        assert all(re.fullmatch(r'\S(.*\S)?', text) and text[-1] in ',.!?' for text in spoken), paragraph
        assert all(text[-1:] in (' ', '') for text in told[:-1]), paragraph
        assert all(text[:1] in (' ', '') for text in told[1:]), paragraph


def test_no_sentence_twice_in_a_story(corpus):
    for story in corpus:
        sentences = [s for s in re.findall(r'[^.!?"\n]+[.!?]', story) if len(s.split()) > 3]
        assert len(sentences) == len(set(sentences)), story  # shorter ones are "she said."


def test_hero_and_pronouns_agree(corpus):
    """First sentence and last paragraph name the hero; nobody is called he or she without being there."""
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
