"""token_files/prepare.py: token files of nanoGPT and llama2.c, compared with what they were made of."""

import io
import pickle

import numpy as np
import pytest
import sentencepiece

from configurator import SettingError, UserError, settings
from data.shards import read_meta
from data.token_files import prepare
from data.tokenizer import load_tokenizer
from tests.helpers.permissions import locked, needs_permissions
from tests.helpers.scripts import STORIES, script
from tests.helpers.tokenizers import keep_gpt2, needs_gpt2, small_tokenizer

TEXT = 'To be, or not to be:\nthat is the question \u00e9\u4f60!\n' * 40
CHARS = sorted(set(TEXT))


@pytest.fixture
def theirs(tmp_path):
    """Return the folder for the token files."""
    (tmp_path / 'theirs').mkdir()
    return tmp_path / 'theirs'


@pytest.fixture
def prepared(theirs, tmp_path, monkeypatch):
    """Return prepared(tokenizer, **settings): it runs prepare.main() and returns ({split: ids}, meta)."""
    defaults = settings(vars(prepare))

    def run(tokenizer='', **given):
        out = tmp_path / 'out'
        always = {'source': str(theirs), 'tokenizer': str(tokenizer), 'out_dir': str(out), 'offline': True}
        for name, value in (defaults | always | given).items():
            monkeypatch.setattr(prepare, name, value)
        prepare.main()
        return {split: read_shards(out, split) for split in ('train', 'val')}, read_meta(out)
    return run


def write_tokens(path, ids):
    np.array(ids, '<u2').tofile(path)


def read_shards(folder, split):
    return np.concatenate([np.fromfile(path, '<u2') for path in sorted(folder.glob(f'{split}_*.bin'))])


@pytest.fixture(scope='module')
def model():
    """Return a sentencepiece model without pieces for bytes: it has none for `z` and for non-ASCII text."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES), model_writer=file, vocab_size=60, model_type='bpe', minloglevel=3,
        normalization_rule_name='identity', hard_vocab_limit=False)
    return file.getvalue()


@pytest.mark.parametrize('files', ['train.bin val.bin', 'train.bin'])
def test_nanogpt_characters_become_ours(prepared, theirs, tmp_path, capsys, monkeypatch, files):
    """Their tokens are the places of the characters in the sorted text. No pickle is read."""
    monkeypatch.setattr(pickle, 'load', None)
    monkeypatch.setattr(prepare, '_CHUNK', 100)
    parts = {'train': TEXT[:1000], 'val': TEXT[1000:]} if 'val' in files else {'train': TEXT}
    for split, text in parts.items():
        write_tokens(theirs / f'{split}.bin', [CHARS.index(char) for char in text])
    (theirs / 'input.txt').write_text(TEXT, encoding='utf-8')
    (theirs / 'meta.pkl').write_bytes(b'not a pickle')
    percentage = 0.0 if 'val' in files else 25.0
    found, meta = prepared(theirs / 'input.txt', val_percentage=percentage)
    enc = load_tokenizer(tmp_path / 'out')
    cut = 1000 if 'val' in files else len(TEXT) * 3 // 4
    assert enc.decode(found['train']) == TEXT[:cut] and enc.decode(found['val']) == TEXT[cut:]
    assert meta['splits']['val']['bytes'] == len(TEXT[cut:].encode())
    assert f'the first of validation: {TEXT[cut:][:40]!r}' in capsys.readouterr().out

    half, _ = prepared(theirs / 'input.txt', val_percentage=percentage, data_percentage=50.0)
    assert enc.decode(half['train']) == TEXT[:cut // 2]
    assert enc.decode(half['val']) == TEXT[cut:][:(len(TEXT) - cut) // 2]


def test_llama2c_tokens_stay_and_unknown_ones_are_counted(prepared, theirs, tmp_path, model, capsys):
    enc = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [STORIES[:5], ['A \u4f60\u4f60 lazy zebra.', *STORIES[5:200]], STORIES[200:]]
    files = []
    for n, part in enumerate(texts):
        ids = []
        for text in part:
            ids += [1, *enc.encode(text)]
        write_tokens(theirs / f'data{n:02}.bin', ids)
        files.append(ids)
    (tmp_path / 'tok.model').write_bytes(model)
    found, meta = prepared(tmp_path / 'tok.model')
    assert found['val'].tolist() == files[0] and found['train'].tolist() == files[1] + files[2]
    out = capsys.readouterr().out
    n_unknown = files[1].count(0)
    assert n_unknown > 3 and f'lost: {n_unknown} tokens are unknown' in out
    assert repr(STORIES[0][:9])[:-1] in out
    assert meta['splits']['val'] | {'stories': 5, 'bytes': len(''.join(texts[0]))} == meta['splits']['val']
    assert (meta['vocab_size'], meta['blank']) == (enc.get_piece_size() + 2, enc.get_piece_size())


@needs_gpt2
def test_gpt2_tokens_need_no_tokenizer(prepared, theirs, tmp_path, monkeypatch):
    keep_gpt2(tmp_path / 'cache')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    ids = small_tokenizer('gpt2').encode(TEXT)
    write_tokens(theirs / 'train.bin', ids)
    write_tokens(theirs / 'val.bin', ids[:50])
    found, meta = prepared(encoding_type='gpt2')
    assert found['train'].tolist() == ids and found['val'].tolist() == ids[:50]
    assert meta['encoding'] == 'gpt2'


@pytest.mark.parametrize('ids, given, message', [
    ([1, 5, 60] * 9, {}, r'train.bin has token 60, beyond the \d+ of .*tok.model: name the tokenizer'),
    (None, {}, 'train.bin has 3 bytes: tokens of uint16 have two each'),
    ([1, 5], {}, 'theirs has too few tokens for training and validation'),
    ([1, 5] * 9, {'encoding_type': 'gpt2'}, 'tok.model is bpe: leave out --encoding_type gpt2'),
    ([1, 5] * 9, {'encoding_type': 'bpe'}, 'it must be one of auto, gpt2'),
    ([1, 5] * 9, {'tokenizer': ''}, 'name the tokenizer that made the tokens'),
    ([1, 5] * 9, {'source': ''}, 'with --source'),
    ([1, 5] * 9, {'source': 'absent'}, 'absent holds no token files'),
    ([1, 5] * 9, {'val_percentage': 100.0}, 'val_percentage is 100'),
])
def test_what_cannot_be_prepared_is_refused(prepared, theirs, tmp_path, model, ids, given, message):
    if ids is None:
        (theirs / 'train.bin').write_bytes(b'123')
    else:
        write_tokens(theirs / 'train.bin', ids)
    (tmp_path / 'tok.model').write_bytes(model)
    with pytest.raises((UserError, SettingError), match=message):
        prepared(**{'tokenizer': tmp_path / 'tok.model'} | given)
    assert not (tmp_path / 'out').exists()


MANY = np.arange(2000) % 300


@pytest.mark.parametrize('content, message', [
    (MANY.astype('<u4').tobytes(), "train.bin has 4 bytes for each token.*fromfile.*'<u4'"),
    ((MANY + 70_000).astype('<u4').tobytes(), 'train.bin has 4 bytes for each token.*65,535 do not fit'),
    (MANY.astype('<i8').tobytes(), "train.bin has 8 bytes for each token.*fromfile.*'<u8'"),
    (np.array([20240520, 1, 2000, *[0] * 253], '<i4').tobytes() + MANY.astype('<u2').tobytes(),
     r'header of llm.c and modded-nanogpt.*tail -c \+1025'),
    (np.array([20240801, 7, 9], '<i4').tobytes(), "llm.c's header for tokens of 4 bytes"),
    (MANY.astype('>u4').tobytes(), "train.bin has 4 bytes for each token.*fromfile.*'>u4'"),
    (MANY.astype('>i8').tobytes(), "train.bin has 8 bytes for each token.*fromfile.*'>u8'"),
    (b'Once upon a time, there was a dog.\n' * 9, 'is text, not tokens'),
    (b'LITPKDS' + bytes(40), "litgpt's packed"),
    (b'\x93NUMPY\x01\x00' + bytes(120), 'is an .npy file'),
    (b'\x1f\x8b' + bytes(40), 'is compressed: unpack it'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'a Git LFS pointer.*git lfs pull'),
])
def test_files_of_another_layout_are_refused(prepared, theirs, tmp_path, content, message):
    (theirs / 'train.bin').write_bytes(content)
    (tmp_path / 'input.txt').write_text(TEXT, encoding='utf-8')
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / 'input.txt')
    write_tokens(theirs / 'train.bin', [3] * 40)
    (theirs / 'val.bin').write_bytes(content)
    with pytest.raises(UserError, match=message.replace('train.bin', 'val.bin', 1)):
        prepared(tmp_path / 'input.txt')


@pytest.mark.parametrize('tokens', [[2, 0, 1, 3] * 20, [40, 0, 41, 9] * 20, [9, 4, 0, 1] * 20, [7, 0, 8, 0]])
def test_token_type_takes_small_tokens_for_what_they_are(tokens):
    assert prepare.token_type(np.array(tokens, '<u2')) == '<u2'


def test_empty_stories_have_no_space_and_no_bytes(prepared, theirs, tmp_path, model):
    (tmp_path / 'tok.model').write_bytes(model)
    enc = sentencepiece.SentencePieceProcessor(model_proto=model)
    write_tokens(theirs / 'train.bin', [1, 1, 1, *enc.encode('The dog.'), 1, 1, *enc.encode('It ran.')])
    write_tokens(theirs / 'val.bin', [1, 1, *enc.encode('The dog.'), 1])
    _, meta = prepared(tmp_path / 'tok.model')
    assert meta['splits']['train']['bytes'] == len('The dog.It ran.')
    write_tokens(theirs / 'val.bin', [1] * 40)
    with pytest.raises(UserError, match=r'the val tokens of .* spell no text'):
        prepared(tmp_path / 'tok.model')


@pytest.mark.parametrize('names, message', [
    (['val', 'test'], r'theirs has test.bin, but no train\*.bin'),
    (['fineweb_train_000001'], r'theirs has fineweb_train_000001.bin, but no train\*.bin'),
    ([], 'theirs holds no token files'),
])
def test_missing_training_files_are_named(prepared, theirs, names, message):
    for name in names:
        write_tokens(theirs / f'{name}.bin', [1, 5] * 9)
    with pytest.raises(UserError, match=message):
        prepared(encoding_type='gpt2')


@needs_permissions
def test_source_that_cannot_be_read_is_not_taken_for_an_empty_one(prepared, theirs):
    write_tokens(theirs / 'train.bin', [1] * 100)
    with locked(theirs), pytest.raises(PermissionError, match=f'{theirs}'):
        prepared(encoding_type='gpt2')


def test_a_file_as_the_source_is_refused(prepared, theirs):
    write_tokens(theirs / 'train.bin', [1, 5] * 9)
    with pytest.raises(UserError, match=r'train.bin is a file: name its folder'):
        prepared(encoding_type='gpt2', source=str(theirs / 'train.bin'))


def test_val_percentage_is_refused_if_there_are_files_for_validation(prepared, theirs, tmp_path):
    for name in 'train', 'val':
        write_tokens(theirs / f'{name}.bin', [3] * 40)
    (tmp_path / 'input.txt').write_text(TEXT, encoding='utf-8')
    with pytest.raises(SettingError, match=r'val_percentage is .*theirs has val.bin: leave it out'):
        prepared(tmp_path / 'input.txt', val_percentage=50.0)


def test_the_use_of_each_file_is_printed(prepared, theirs, tmp_path, capsys):
    (tmp_path / 'input.txt').write_text(TEXT, encoding='utf-8')
    for name in 'train', 'train_2', 'trainer', 'val':
        write_tokens(theirs / f'{name}.bin', [3] * 400)
    prepared(tmp_path / 'input.txt')
    out = capsys.readouterr().out
    assert 'training: train.bin, train_2.bin; validation: val.bin\nnot used: trainer.bin\n' in out
    (theirs / 'val.bin').unlink()
    found, _ = prepared(tmp_path / 'input.txt')
    out = capsys.readouterr().out
    assert 'training: train.bin, train_2.bin; validation: the last 1% of these tokens\n' in out
    assert len(found['val']) == 8


def test_text_with_the_space_mark_is_refused(prepared, theirs, tmp_path):
    """This character is three tokens of CharTokenizer."""
    write_tokens(theirs / 'train.bin', [1, 5] * 9)
    (tmp_path / 'input.txt').write_text('\u2581', encoding='utf-8')
    with pytest.raises(UserError, match=r'U\+2581'):
        prepared(tmp_path / 'input.txt')


def test_script_prints_the_next_command(theirs, tmp_path):
    write_tokens(theirs / 'train.bin', [CHARS.index(char) for char in TEXT])
    (theirs / 'input.txt').write_text(TEXT, encoding='utf-8')
    out = tmp_path / 'out'
    done = script('data/token_files/prepare.py', '--source', theirs, '--tokenizer', theirs / 'input.txt',
                  '--out_dir', out)
    assert done.err == ''
    assert done.out.splitlines()[-1] == f'next: python train.py --dataset {out}'
