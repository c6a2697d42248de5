"""The page's tokenizer, in JavaScript, against ours."""

import codecs
import random
from functools import cache

import pytest
from hypothesis import given, settings

from data.infill import prompt as infill_prompt
from data.sentencepiece_file import CONTROL, NORMAL, UNUSED, sentencepiece_model
from data.tiny_stories.sample_stories import stories
from data.tokenizer import BPETokenizer
from data.tokenizer_files import FIRST
from formats.page.vocabulary import USER_DEFINED, page_vocabulary
from tests.helpers.node import needs_node, run_js
from tests.helpers.pages import page_tokenizer
from tests.helpers.scripts import STORIES
from tests.helpers.tokenizers import ENCODINGS, NASTY, any_text

pytestmark = needs_node
ODD_TEXTS = [
    *NASTY,
    f'x{3000 * " "}x', 5000 * 'a', 999 * 'ab', 999 * '\n', 99 * "'ll", 99 * '\u2581',
    "'S 's's '",
    '\x1c\x1d \x0b\x0c \x85\x85 \ufeff\ufeff\u180e\u200b ', '\r\n\r\n \n\t ',
    '\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \ud55c\uae00\u1112\u1161 \u0627\u0644 \u0e01\u0e33',
    '1\u0661\u2167\u00bd\u4e00 \ufe0f',
    '__proto__ constructor </script><!-- \\ " $& $1',
]


@pytest.fixture(scope='module', params=[*ENCODINGS, 'lossy'])
def tokenizer(request):
    return page_tokenizer(request.param)


@cache
def vocabulary_of(tokenizer):
    return page_vocabulary(tokenizer)


def in_page(tokenizer, expression, x):
    """Return the value of a JavaScript expression with x and t, the page's tokenizer."""
    return run_js(f'((t, x) => {expression})(makeTokenizer(data[0]), data[1])', [vocabulary_of(tokenizer), x],
                  ['tokenizer.js'])


@cache
def collect_texts():
    """Return stories, odd texts and what hypothesis thinks of, in one list, so that Node starts only once."""
    found = [*STORIES[:20], *stories(100, 1), *ODD_TEXTS, ' \n'.join(ODD_TEXTS)]
    found += [chr(point) for point in range(0x400)]

    @settings(max_examples=200, deadline=None, database=None)
    @given(any_text)
    def collect(text):
        found.append(text)

    collect()
    return found


def test_tokenizer_has_the_same_special_ids(tokenizer):
    names = {'vocabSize': 'vocab_size', 'delimiter': 'delimiter', 'blank': 'blank', 'middle': 'middle',
             'lossless': 'lossless', 'prefix': 'prefix'}
    found = in_page(tokenizer, 'x.map((name) => t[name])', list(names))
    assert found == [getattr(tokenizer, name) for name in names.values()]


def test_encode_and_decode_give_the_same_as_ours(tokenizer):
    texts = collect_texts()
    ids = [tokenizer.encode(text) for text in texts]
    assert in_page(tokenizer, 'x.map(t.encode)', texts) == ids
    assert in_page(tokenizer, 'x.map(t.decode)', ids) == [tokenizer.decode(each) for each in ids]


def test_encode_gives_the_same_for_every_code_point(tokenizer):
    """Planes 4 to 16 have no characters but those for private use: one in 61 is taken."""
    points = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 61)]
    blocks = [''.join(f' {chr(point)}' for point in points[i:i + 4096]) for i in range(0, len(points), 4096)]
    for text, ids in zip(blocks, in_page(tokenizer, 'x.map(t.encode)', blocks), strict=True):
        assert ids == tokenizer.encode(text), ascii(text[:9])


def random_ids(tokenizer):
    """Return lists of ids: random ones with special ids and invalid UTF-8, and those of odd texts."""
    rng = random.Random(1)
    n = tokenizer.vocab_size
    lists = []
    for k in range(2000):
        among = rng.choice([n, min(n, 259)])  # half of them special ids and bytes
        lists.append(rng.choices(range(among), k=k % 20))
    return lists + [tokenizer.encode(text)[:200] for text in ODD_TEXTS]


def test_growing_decodes_token_by_token_what_decode_gives(tokenizer):
    lists = random_ids(tokenizer)
    found = in_page(tokenizer, '''x.map((ids) => {
        const text = growing(t);
        return [t.decode(ids), ids.map(text.add), text.rest()];
    })''', lists)
    for ids, (whole, parts, rest) in zip(lists, found, strict=True):
        assert whole == tokenizer.decode(ids) == ''.join(parts) + rest
        for size in range(len(ids) + 1):  # at every moment all that is complete is there
            text = ''.join(parts[:size])
            assert tokenizer.decode(ids[:size]) in (text, text + '\ufffd')


def test_growing_shows_a_character_as_soon_as_python_would(tokenizer):
    """Python's incremental decoder, of the bytes that our `decode` joins, may be later but never earlier."""
    lists = random_ids(tokenizer)
    found = in_page(tokenizer, 'x.map((ids) => ids.map(growing(t).add))', lists)
    pieces = in_page(tokenizer, 'Array.from({length: x}, (_, id) => Array.from(t.pieceBytes(id)))',
                     tokenizer.vocab_size)
    for ids, parts in zip(lists, found, strict=True):
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        expected = ''
        for size, i in enumerate(ids, 1):
            expected += decoder.decode(bytes(pieces[i]))
            assert ''.join(parts[:size]).startswith(expected.removeprefix(tokenizer.prefix))


def test_growing_inside_a_text_keeps_the_first_space(tokenizer):
    lists = random_ids(tokenizer)
    found = in_page(tokenizer, '''x.map((ids) => {
        const text = growing(t, '');
        return [ids.map(text.add).join('') + text.rest(), ids.flatMap((id) => Array.from(t.pieceBytes(id)))];
    })''', lists)
    for text, data in found:
        assert text == bytes(data).decode('utf-8', 'replace')


def test_infill_prompt_gives_the_same_ids(tokenizer):
    ends = [(STORIES[0], STORIES[1]), ('', ''), ('a ', '\u2581'), ('<blank>', '<middle>')]
    found = in_page(tokenizer, 'x.map(([first, last]) => infillPrompt(t, first, last))', ends)
    assert found == [infill_prompt(tokenizer, first, last) for first, last in ends]


def test_encode_replaces_half_a_character(tokenizer):
    halves = ['\ud83d', 'a\udc00b', '\ud800\ud800', '\udc00\ud83d x']
    replaced = [text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') for text in halves]
    assert in_page(tokenizer, 'x.map(t.encode)', halves) == [tokenizer.encode(text) for text in replaced]


def random_sentencepiece(rng, letters):
    """Return a model with few scores (so that many are equal) and pieces of every kind."""
    kinds = dict.fromkeys(rng.sample(letters, len(letters) - 1), NORMAL)
    for _ in range(20):
        pair = ''.join(rng.choices([*kinds], k=2))
        kinds[pair[:9]] = rng.choice([NORMAL, NORMAL, NORMAL, UNUSED, USER_DEFINED, CONTROL])
    pieces = [(text, -float(rng.randrange(6)), kind) for text, kind in kinds.items()]
    first = rng.choice([3, 259])  # without bytes, or with them
    return BPETokenizer(sentencepiece_model(FIRST[:first] + pieces))


def test_encode_gives_the_same_for_any_sentencepiece_model():
    rng = random.Random(1)
    cases = []
    for letters in ['ab ', 'ab .*[](\\|/-', 'a\u4f60\U0001f600 '] * 40:
        tokenizer = random_sentencepiece(rng, letters)
        texts = [''.join(rng.choices(letters + 'a \u2581\0', k=k)) for k in range(40)]
        cases.append((tokenizer, texts))
    found = run_js('data.map(([v, x]) => x.map(makeTokenizer(v).encode))',
                   [(page_vocabulary(tokenizer), texts) for tokenizer, texts in cases], ['tokenizer.js'])
    for (tokenizer, texts), lists in zip(cases, found, strict=True):
        assert lists == [tokenizer.encode(text) for text in texts], vocabulary_of(tokenizer)


def test_encode_takes_no_time_for_a_long_prompt(tokenizer):
    texts = ['a' * 99_999, 'Once upon a time ' * 5000]
    ids, seconds = in_page(tokenizer, '[x.map(t.encode), performance.now() / 1000]', texts)
    assert ids == [tokenizer.encode(text) for text in texts]
    assert seconds < 10
