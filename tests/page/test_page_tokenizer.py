"""The page's tokenizer, in JavaScript, against ours."""

import codecs
import io
import json
import random
from functools import cache

import pytest
import sentencepiece
from hypothesis import given, settings

from configurator import UserError
from data.infill import prompt
from data.tiny_stories.sample_stories import stories
from data.tokenizer import BPETokenizer
from data.tokenizer_files import CONTROL, FIRST, NORMAL, UNUSED, sentencepiece_model
from formats.page.vocabulary import USER_DEFINED, vocabulary
from tests.helpers import scripts as tiny
from tests.helpers.node import evaluate, needs_node
from tests.helpers.tokenizers import CORPUS, ENCODINGS, any_text, small_tokenizer
from tests.helpers.tokenizers import NASTY as ODD_TEXTS

pytestmark = needs_node
NASTY = [*ODD_TEXTS, f'x{3000 * " "}x', 5000 * 'a', 999 * 'ab', 999 * '\n', 99 * "'ll",
         99 * '\u2581', "'S 's's '", '\x1c\x1d \x0b\x0c \x85\x85 \ufeff\ufeff\u180e\u200b ', '\r\n\r\n \n\t ',
         '\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \ud55c\uae00\u1112\u1161 \u0627\u0644 \u0e01\u0e33',
         '1\u0661\u2167\u00bd\u4e00 \ufe0f', '__proto__ constructor </script><!-- \\ " $& $1']


@cache
def make(encoding):
    return others() if encoding == 'lossy' else small_tokenizer(encoding)


def others(**options):
    """A sentencepiece model that has no bytes."""
    model, usual = io.BytesIO(), {
        'vocab_size': 110, 'model_type': 'bpe', 'control_symbols': ['q', '<mask>'],
        'user_defined_symbols': ['Lily', '  ', 'd M', '.*', 'Max\u2581']}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=3, **usual | options)
    return BPETokenizer(model.getvalue())


@pytest.fixture(scope='module', params=[*ENCODINGS, 'lossy'])
def tokenizer(request):
    return make(request.param)


@cache
def said_of(tokenizer):
    return vocabulary(tokenizer)


def in_page(tokenizer, expression, x):
    """The value of an expression with x and t, the page's tokenizer."""
    return evaluate(f'((t, x) => {expression})(makeTokenizer(data[0]), data[1])', [said_of(tokenizer), x],
                    ['tokenizer.js'])


@cache
def texts():
    """Stories, and what hypothesis thinks of: collected, so that Node starts but once."""
    found = [*tiny.STORIES[:20], *stories(100, 1), *NASTY, ' \n'.join(NASTY), *map(chr, range(0x400))]

    @settings(max_examples=200, deadline=None, database=None)
    @given(any_text)
    def collect(text):
        found.append(text)

    collect()
    return found


def test_what_it_says_of_itself(tokenizer):
    names = {'vocabSize': 'vocab_size'} | {name: name for name in (
        'delimiter', 'blank', 'middle', 'lossless', 'prefix')}
    found = in_page(tokenizer, 'x.map((name) => t[name])', [*names])
    assert found == [getattr(tokenizer, name) for name in names.values()]


def test_texts(tokenizer):
    ids = [tokenizer.encode(text) for text in texts()]
    assert in_page(tokenizer, 'x.map(t.encode)', texts()) == ids
    assert in_page(tokenizer, 'x.map(t.decode)', ids) == [tokenizer.decode(each) for each in ids]


def test_every_code_point(tokenizer):
    """Of planes 4 to 16, which have no characters but those of private use, one in 61."""
    points = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 61)]
    blocks = [''.join(f' {chr(c)}' for c in points[i:i + 4096]) for i in range(0, len(points), 4096)]
    for text, ids in zip(blocks, in_page(tokenizer, 'x.map(t.encode)', blocks), strict=True):
        assert ids == tokenizer.encode(text), ascii(text[:9])


def test_any_ids(tokenizer):
    """Special ones, and bytes that are no UTF-8; all at once, and one by one as a model writes them."""
    rng, n = random.Random(1), tokenizer.vocab_size
    lists = [rng.choices(range(rng.choice([n, min(n, 259)])), k=k % 20) for k in range(2000)]
    lists += [tokenizer.encode(text)[:200] for text in NASTY]
    found = in_page(tokenizer, '''x.map((ids) => {
        const text = growing(t), inside = growing(t, '');
        return [t.decode(ids), ids.map(text.add), text.rest(), ids.map(inside.add).join('') + inside.rest()];
    })''', lists)
    for ids, (whole, parts, rest, inside) in zip(lists, found, strict=True):
        assert whole == tokenizer.decode(ids) == ''.join(parts) + rest
        pieces = [tokenizer._pieces[i] for i in ids]
        assert inside == b''.join(pieces).decode('utf-8', 'replace')
        decoder, lazy = codecs.getincrementaldecoder('utf-8')('replace'), ''
        for size, piece in enumerate(pieces, 1):  # Python's decoder waits for more bytes than it needs to
            lazy, text = lazy + decoder.decode(piece), ''.join(parts[:size])
            assert text.startswith(lazy.removeprefix(tokenizer.prefix))
            assert tokenizer.decode(ids[:size]) in (text, text + '\ufffd')


def test_infilling(tokenizer):
    ends = [(tiny.STORIES[0], tiny.STORIES[1]), ('', ''), ('a ', '\u2581'), ('<blank>', '<middle>')]
    assert in_page(tokenizer, 'x.map(([first, last]) => infillPrompt(t, first, last))', ends) == [
        prompt(tokenizer, first, last) for first, last in ends]


def test_half_a_character_is_replaced(tokenizer):
    halves = ['\ud83d', 'a\udc00b', '\ud800\ud800', '\udc00\ud83d x']
    found = in_page(tokenizer, 'x.map(t.encode)', halves)
    assert found == [tokenizer.encode(text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'))
                     for text in halves]


def test_sentencepiece_models_of_all_kinds():
    """Of equal scores, pieces that are never split, unused ones; with bytes and without."""
    rng, cases = random.Random(1), []
    for letters in ['ab ', 'ab .*[](\\|/-', 'a\u4f60\U0001f600 '] * 40:
        kinds = dict.fromkeys(rng.sample(letters, len(letters) - 1), NORMAL)
        for _ in range(20):
            pair = ''.join(rng.choices([*kinds], k=2))
            kinds[pair[:9]] = rng.choice([NORMAL, NORMAL, NORMAL, UNUSED, USER_DEFINED, CONTROL])
        pieces = [(text, -float(rng.randrange(6)), kind) for text, kind in kinds.items()]
        tokenizer = BPETokenizer(sentencepiece_model(FIRST[:rng.choice([3, 259])] + pieces))
        texts = [''.join(rng.choices(letters + 'a \u2581\0', k=k)) for k in range(40)]
        cases.append((tokenizer, texts))
    found = evaluate('data.map(([v, x]) => x.map(makeTokenizer(v).encode))',
                     [(vocabulary(tokenizer), texts) for tokenizer, texts in cases], ['tokenizer.js'])
    for (tokenizer, texts), lists in zip(cases, found, strict=True):
        assert lists == [tokenizer.encode(text) for text in texts], said_of(tokenizer)


def test_what_is_refused():
    """A unigram model, and one that has escape_whitespaces off."""
    for tokenizer in (others(model_type='unigram', vocab_size=70),
                      BPETokenizer(make('lossy').files['tokenizer.model'] + b'\x1a\x02\x28\0')):
        with pytest.raises(UserError, match='but of the usual bpe kind'):
            vocabulary(tokenizer)


def test_it_is_small(tokenizer):
    """Five bytes a piece; of gpt2, where what is sent is long, less than a third of its text."""
    size = len(json.dumps(said_of(tokenizer), ensure_ascii=False, separators=(',', ':')).encode())
    text = sum(map(len, tokenizer._pieces))
    assert size < (1.33 * text if tokenizer.encoding == 'gpt2' else 400 + text + 5 * tokenizer.vocab_size)


def test_long_prompts_take_no_time(tokenizer):
    texts = ['a' * 99_999, 'Once upon a time ' * 5000]
    ids, seconds = in_page(tokenizer, '[x.map(t.encode), performance.now() / 1000]', texts)
    assert ids == [tokenizer.encode(text) for text in texts] and seconds < 10
