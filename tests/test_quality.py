"""Figures of stories against answers known beforehand."""

import math
import random

import numpy as np
import pytest
import torch

import quality
from data import infill
from data.shards import Split
from data.tiny_stories.sample_stories import keeps, stories
from data.tokenizer import CharTokenizer, load_tokenizer
from evaluate import score
from model import GPT, GPTConfig
from quality import look_up
from tests.tiny import STORIES, prepare

TRAINING = ['One two three four five six seven eight.', 'Six seven, eight nine ten!', 'A b c d e f g.']
HEROES = ['Tim', 'Ann', 'Bob', 'Sue', 'Max', 'Eva', 'Leo', 'Mia', 'Sam', 'Lily', 'Tom', 'Zoe']
THINGS = ['ball', 'kite', 'boat', 'doll', 'drum', 'car', 'book', 'hat', 'ring', 'cup', 'bell', 'fan']
TALES = [f'One day {name} had a {thing}. It was new. {name} loved the {thing}.'
         for name, thing in zip(HEROES, THINGS, strict=True)]


def small(tokenizer, block_size):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size, tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16)).eval()


@pytest.fixture
def enc():
    return CharTokenizer.train(TALES)


@pytest.fixture
def oracle(monkeypatch):
    """oracle(tokenizer, likes): a row's log-probability is likes(text before, text that counts). The list
    that comes back has what was asked about."""
    def install(tokenizer, likes):
        asked = []

        def log_probs(model, rows, batch_size=32):
            parts = [np.split(ids, [n]) for ids, n in rows]
            texts = [[tokenizer.decode(part.tolist()) for part in pair] for pair in parts]
            asked.extend(texts)
            return np.array([likes(*text) for text in texts], float)

        monkeypatch.setattr(quality, 'log_probs', log_probs)
        return asked
    return install


@pytest.mark.parametrize('piece', [1, 7, 100, 10**6])
def test_stories_are_read_as_they_were(tmp_path, piece):
    """In pieces of any size, over shards, and turned around or not."""
    tokenizer = load_tokenizer(prepare(tmp_path))
    assert [*quality.read_stories(Split(tmp_path, 'val'), tokenizer, 1000)] == STORIES[270:]
    ids, _ = infill.encode(tokenizer, STORIES[:20], 0.5)
    assert (ids == tokenizer.middle).any()
    prepare(tmp_path, ids, ids, shard_tokens=99)
    assert [*quality.read_stories(Split(tmp_path, 'train'), tokenizer, piece)] == STORIES[:20]


def test_words():
    assert quality.words('"Don\u2019t!" said TIM\'s 2nd dog\u2014twice.') == [
        'don\u2019t', 'said', "tim's", '2nd', 'dog', 'twice']


def test_the_text_by_itself():
    assert quality.ended([[5, 5], [5, 5, 5], []], 3) == 2 / 3
    assert quality.length(['One, two.', "Don't go on so.", '']) == 2
    # a b c d, b c d a, c d a b, d a b c, a b c d: of five, one stood before; and one of another story
    assert quality.repetition(['a b c d a b c d', 'A b c d!', 'a b']) == 1 / 6
    assert quality.repetition(['no no no no no no no no']) == 4 / 5
    assert quality.told_before(['a', 'b', 'a', 'a']) == 0.5


def test_nothing_to_count():
    assert all(math.isnan(figure) for figure in (
        quality.ended([], 3), quality.length([]), quality.repetition(['a b c']), quality.told_before([]),
        quality.unknown_words(look_up([''], TRAINING)), quality.copies(look_up(['a b'], TRAINING), 5),
        quality.whole_copies([]), quality.kept(['Nothing.'], 'object')[0]))


def test_compression_at_equal_bytes():
    rng = random.Random(0)
    noise = [''.join(rng.choices('abcdefgh', k=1000)) for _ in range(80)]  # of 3 bits a byte
    assert quality.compression(noise, 40_000) == pytest.approx(8 / 3, rel=0.1)
    # a second half like the first, further back than gzip sees
    assert quality.compression(noise[:40] * 2, 80_000) == pytest.approx(16 / 3, rel=0.1)
    assert quality.compression(noise, 9000) == quality.compression(noise[:20], 9000)


@pytest.mark.parametrize('batch_size', [1, 2, 9])
def test_matches(batch_size):
    story = 'Oh: "TWO three; four five six seven", nine ten. And eleven.'
    match, other, same = look_up([story, 'c d e f g a b c d e f', TRAINING[1]], TRAINING, batch_size)
    assert match.copied.tolist() == [0, 6, 5, 0, 0, 0, 0, 0, 0, 0, 0]  # none over the end of a story
    start, stop, n = match.longest()
    assert (story[start:stop], n, match.source) == ('TWO three; four five six seven', 6, TRAINING[0])
    assert match.unknown == ['oh', 'and', 'eleven'] and not match.whole
    assert other.copied.tolist() == [5, 0, 0, 0, 0, 6, 5, 0, 0, 0, 0] and other.longest()[2] == 6
    assert same.whole and same.longest() == (0, len(TRAINING[1]) - 1, 5) and same.source == TRAINING[1]
    assert quality.unknown_words([match, other, same]) == 3 / 27
    assert quality.copies([match, other, same], 5) == (2 + 3 + 1) / (7 + 7 + 1)
    assert quality.copies([match, other, same], 6) == (1 + 1 + 0) / (6 + 6 + 0)
    assert quality.whole_copies([match, other, same]) == 1 / 3


def test_matches_against_a_search_by_hand():
    """Of random stories with few words, so that much is copied, and of some of them cut together."""
    rng = random.Random(1)
    training = [' '.join(rng.choices('abc', k=rng.randrange(40))) for _ in range(60)]
    ours = [' '.join(rng.choices('abcd', k=30)) for _ in range(8)]
    ours += [training[3] + ' ' + training[8], '']
    for story, match in zip(ours, look_up(ours, training, 7), strict=True):
        text = story.split()
        for i, copied in enumerate(match.copied):
            by_hand = max(n for n in range(len(text) - i + 1) if any(
                f' {" ".join(text[i:i + n])} ' in f' {other} ' for other in training) or not n)
            assert copied == (by_hand if by_hand >= quality.SHORTEST else 0)
        start, stop, n = match.longest()
        assert n == match.copied.max(initial=0) and story[start:stop] in match.source
    assert look_up(ours, training, 7)[-1].longest() == (0, 0, 0)


def test_copies_of_training_stories():
    corpus = [*stories(60, 1)]
    matches = look_up(corpus[10:20], corpus, 25)
    assert [quality.copies(matches, n) for n in (5, 8, 12)] == [1, 1, 1]
    assert quality.whole_copies(matches) == 1 and quality.unknown_words(matches) == 0
    assert [match.source for match in matches] == corpus[10:20]
    fresh = look_up([*stories(10, 2)], corpus)
    assert quality.copies(fresh, 5) > quality.copies(fresh, 8) > quality.copies(fresh, 12)
    assert quality.whole_copies(fresh) == 0


@pytest.mark.parametrize('batch_size', [1, 2, 32])
def test_log_probs_are_sums_over_what_counts(enc, batch_size):
    model = small(enc, 16)
    rows = [(np.array([1, 5, 6, 7, 8, 9]), 2), (np.array([1, 4, 3]), 1), (np.arange(17), 16)]
    found = quality.log_probs(model, rows, batch_size)
    for (ids, before), log_prob in zip(rows, found, strict=True):
        x, y = torch.tensor(ids[:-1])[None], torch.tensor(ids[1:])[None].clone()
        y[:, :before - 1] = -1
        assert log_prob == pytest.approx(-score(model, x, y)[0].item(), rel=1e-5)


def test_parted():
    assert quality.parted(['Too short. This.', 'One. Two!\n\nThree.', 'A. B. C.']) == [
        ('One. Two!', '\n\nThree.'), ('A. B.', ' C.')]


def test_endings(enc, oracle):
    """Of a model that knows which is its own, one that goes by the sentence alone, one that guesses."""
    model = small(enc, 200)
    asked = oracle(enc, lambda before, text: text.split()[0] in before)
    assert quality.endings(model, enc, TALES) == (1, 12)
    assert len(asked) == 12 + 12 * 10 and asked[0] == ['', 'Tim loved the ball.']
    assert asked[12:14] == [['One day Tim had a ball. It was new.', f'{name} loved the {thing}.']
                            for name, thing in (('Tim', 'ball'), ('Ann', 'kite'))]
    oracle(enc, lambda before, text: len(text))
    assert quality.endings(model, enc, TALES) == (0, 12)  # its worth anywhere is taken off
    rng = random.Random(0)
    oracle(enc, lambda before, text: rng.random())
    share, n = quality.endings(model, enc, TALES * 50)
    assert n == 600 and share == pytest.approx(0.1, abs=0.05)
    assert quality.endings(model, enc, TALES[:9])[1] == 0  # no nine others
    assert quality.endings(model, enc, [])[1] == 0


def test_names(enc, oracle):
    model = small(enc, 200)
    asked = oracle(enc, lambda before, text: text.split()[0] in before)
    assert quality.names(model, enc, TALES) == (1, 12)
    assert asked[:2] == [['One day Tim had a ball. It was new.', f'{name} loved the ball.']
                         for name in ('Tim', 'Ann')]
    oracle(enc, lambda before, text: 0)
    assert quality.names(model, enc, TALES) == (0, 12)  # a tie is no preference
    oracle(enc, lambda before, text: HEROES.index(text.split()[0]) % 2)  # goes by the name alone
    assert quality.names(model, enc, TALES)[0] == pytest.approx(0.5, abs=0.1)
    rng = random.Random(0)
    oracle(enc, lambda before, text: rng.random())
    share, n = quality.names(model, enc, TALES * 50)
    assert n == 600 and share == pytest.approx(0.5, abs=0.1)
    # no name: not within a sentence; nowhere before; in small letters, too
    nameless = ['Then he ran. He fell. Then he cried.', 'A dog ran. It fell. Tim cried.',
                'My mom ran. So Mom fell. Then Mom cried.']
    assert quality.names(model, enc, [*nameless, *TALES])[1] == 12


@pytest.mark.parametrize('block_size, n', [(200, 12), (50, 12), (30, 0)])
def test_all_endings_see_as_much_of_the_story(enc, block_size, n, monkeypatch):
    seen, log_probs = [], quality.log_probs
    monkeypatch.setattr(quality, 'log_probs', lambda model, rows, *more: (
        seen.append(rows), log_probs(model, rows, *more))[1])
    assert quality.endings(small(enc, block_size), enc, TALES)[1] == n
    for rows in seen[1:]:
        heads = {tuple(ids[:before]) for ids, before in rows}
        assert len(heads) == 1 and max(len(ids) for ids, _ in rows) <= block_size + 1
        assert block_size == 200 or max(len(ids) for ids, _ in rows) == block_size + 1


def test_the_grammar_keeps_all():
    corpus = [*stories(1000, 3)]
    for kind in 'name', 'animal', 'object', 'place':
        share, n = quality.kept(corpus, kind)
        assert share == 1 and n > 300, kind


TOY = 'In a quiet town, there lived a girl named Sue who had a red toy car.\n\n'


@pytest.mark.parametrize('story, lost', [
    (TOY + 'Sue played in the park with Tim.\n\nSue loved the toy car.', ''),
    (TOY + 'Sue played in the park with Anna.\n\nSue loved the toy car.', 'name'),
    (TOY + 'Sue played.\n\nTim loved the toy car.', 'name'),
    (TOY + 'Sue gave Rocky a hand.\n\nSue loved the toy car.', 'animal'),
    (TOY + 'Sue played.\n\nSue loved the car.', 'object'),
    (TOY + 'Sue ran to the clearing.\n\nSue loved the toy car.', 'place'),
    (TOY + 'I lost it near the gate. It was by the old tree.\n\nSue loved the toy car.', 'place'),
    (TOY.strip(), 'name object'),
    ('A fox had a hat.\n\nSo the fox had a hat.', 'name animal'),
])
def test_what_a_story_loses(story, lost):
    assert [kind for kind, kept in keeps(story).items() if not kept] == lost.split()
