"""The built-in corpus: what every story must be, checked over a few thousand of them."""
import re
from collections import Counter

import pytest

from data.tiny_stories import sample_stories
from data.tiny_stories.sample_stories import ANIMALS, NAMES, PLOTS, stories


@pytest.fixture(scope='module')
def corpus():
    return list(stories(4000, 1337))


def failures(corpus, wrong):
    """The first stories of which `wrong` is true, to be shown by a failing assert."""
    return [story for story in corpus if wrong(story)][:3]


def test_same_seed_same_stories():
    first = list(stories(50, 1))
    assert first == list(stories(50, 1))
    assert first[:20] == list(stories(20, 1))
    assert not set(first) & set(stories(50, 2))
    assert list(stories(0, 1)) == []


def test_no_paragraph_comes_twice(corpus):
    paragraphs = Counter(paragraph for story in corpus for paragraph in story.split('\n\n'))
    assert paragraphs.most_common(1)[0][1] == 1
    assert len(set(corpus)) == 4000


def test_size(corpus):
    words = [len(story.split()) for story in corpus]
    assert min(words) >= 60 and max(words) <= 250
    assert sum(80 <= n <= 150 for n in words) > 0.95 * len(words)
    assert sum(map(len, corpus)) / len(corpus) * 20_000 > 10e6


def test_small_alphabet_and_vocabulary(corpus):
    assert not failures(corpus, lambda story: re.search(r'''[^A-Za-z ,.!?'"\n]''', story))
    assert len({word for story in corpus for word in re.findall(r"[a-z']+", story.lower())}) < 1000


def test_sentences(corpus):
    """Each paragraph is whole: closed quotation marks, capitals, full stops, nothing left of the grammar."""
    for paragraph in (paragraph for story in corpus for paragraph in story.split('\n\n')):
        assert re.match(r'"?[A-Z]', paragraph), paragraph
        assert re.search(r'[.!?]"?$', paragraph), paragraph
        assert not re.search(r'  |\s[,.!?]|[,.!?][A-Za-z]|,,|\.\.', paragraph), paragraph
        assert not re.search(r'[^,.!?]" [a-z]|\. [a-z]|[a-z], [A-Z]\w+ed\b', paragraph), paragraph
        quotes = re.split('"', paragraph)
        assert len(quotes) % 2 == 1, paragraph
        for spoken in quotes[1::2]:
            assert re.fullmatch(r'\S(.*\S)?', spoken) and spoken[-1] in ',.!?', paragraph
        for before, after in zip(quotes[:-1:2], quotes[2::2], strict=True):
            assert not before or before[-1] == ' ', paragraph
            assert not after or after[0] == ' ', paragraph


def test_articles(corpus):
    assert not failures(corpus, lambda story: re.search(r'\b[Aa] [aeiou]|\b[Aa]n [^aeiou]', story))


def test_no_word_twice_in_a_row(corpus):
    assert not failures(corpus, lambda story: re.search(r'\b(\w+) \1\b', story))


def test_no_sentence_twice_in_a_story(corpus):
    def repeats(story):
        # shorter ones are "she said."
        sentences = [s for s in re.findall(r'[^.!?"\n]+[.!?]', story) if len(s.split()) > 3]
        return len(sentences) != len(set(sentences))
    assert not failures(corpus, repeats)


def test_hero_and_pronouns_agree(corpus):
    """First sentence and last paragraph name the hero; nobody is called he or she without being there."""
    sex = {name: he for names in NAMES.values() for he, text in names.items() for name in text.split()}
    males, females = r'\b([Hh]e|[Hh]is|him)\b', r'\b([Ss]he|[Hh]ers?)\b'
    for story in corpus:
        hero = re.search(r' named (\w+)', story.split('.')[0])[1]
        kind = re.search(r'(boy|girl|' + ANIMALS.replace(' ', '|') + ') named', story)[1]
        assert kind not in ('boy', 'girl') or kind == {'he': 'boy', 'she': 'girl'}[sex[hero]], story
        assert hero in story.split('\n\n')[-1], story
        present = {sex[name] for name in re.findall(r'\b[A-Z]\w+\b', story) if name in sex}
        present |= {'she'} if re.search(r'\b([Mm]om|[Gg]randma|sister)\b', story) else set()
        present |= {'he'} if re.search(r'\b([Dd]ad|[Gg]randpa|brother|man)\b', story) else set()
        assert 'he' in present or not re.search(males, story), story
        assert 'she' in present or not re.search(females, story), story
        names = {name for name in re.findall(r'\b[A-Z]\w+\b', story) if name in sex}
        assert len(names) <= 2 and len({sex[name] for name in names}) == len(names), story


@pytest.mark.parametrize('plot', PLOTS)
def test_each_plot_alone(monkeypatch, plot):
    monkeypatch.setattr(sample_stories, 'PLOTS', {plot: PLOTS[plot]})
    for story in stories(200, 0):
        assert 3 <= story.count('\n\n') + 1 <= 5, story
        assert 60 <= len(story.split()) <= 250, story
