"""Token files of others, against what they were made of."""

import io
import pickle

import numpy as np
import pytest
import sentencepiece

from configurator import SettingError, UserError
from data import streams
from data.shards import read_meta
from data.tiny_stories import prepare
from data.tokenizer import load_tokenizer
from tests.helpers.scripts import STORIES
from tests.scripts.test_prepare import prepared  # noqa: F401, a fixture

TEXT = 'To be, or not to be:\nthat is the question \u00e9\u4f60!\n' * 40
CHARS = sorted(set(TEXT))


def tokens(path, ids):
    path.parent.mkdir(exist_ok=True)
    np.array(ids, '<u2').tofile(path)


def shards(folder, split):
    return np.concatenate([np.fromfile(path, '<u2') for path in sorted(folder.glob(f'{split}_*.bin'))])


@pytest.fixture
def take(prepared, tmp_path, monkeypatch):  # noqa: F811
    """take(tokenizer, **settings) is prepare.main() for the folder `theirs`: ({split: ids}, meta.json)."""
    monkeypatch.setattr('tests.scripts.test_prepare.read', lambda folder: folder)

    def run(tokenizer, **given):
        folder = prepared(tmp_path / 'theirs', tokenizer=str(tokenizer), **given)
        return {split: shards(folder, split) for split in ('train', 'val')}, read_meta(folder)
    return run


@pytest.fixture(scope='module')
def model():
    """A sentencepiece model without pieces for bytes, which has none for `z` and what is no ASCII."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES), model_writer=file, vocab_size=60, model_type='bpe', minloglevel=3,
        normalization_rule_name='identity', hard_vocab_limit=False)
    return file.getvalue()


@pytest.mark.parametrize('files', ['train.bin val.bin', 'train.bin'])
def test_characters_of_nanogpt(take, tmp_path, capsys, monkeypatch, files):
    """Numbered by their order in the text, which is given. No pickle is read."""
    monkeypatch.setattr(pickle, 'load', None)
    monkeypatch.setattr(streams, 'CHUNK', 100)
    theirs = tmp_path / 'theirs'
    parts = {'train': TEXT[:1000], 'val': TEXT[1000:]} if 'val' in files else {'train': TEXT}
    for split, text in parts.items():
        tokens(theirs / f'{split}.bin', [CHARS.index(char) for char in text])
    (theirs / 'input.txt').write_text(TEXT, encoding='utf-8')
    (theirs / 'meta.pkl').write_bytes(b'no pickle')
    found, meta = take(theirs / 'input.txt', val_percentage=25.0)
    enc, cut = load_tokenizer(tmp_path / 'out'), 1000 if 'val' in files else len(TEXT) * 3 // 4
    assert enc.decode(found['train']) == TEXT[:cut] and enc.decode(found['val']) == TEXT[cut:]
    assert meta['splits']['val']['bytes'] == len(TEXT[cut:].encode())
    assert f'such as {TEXT[cut:][:40]!r}' in capsys.readouterr().out
    half, _ = take(theirs / 'input.txt', val_percentage=25.0, data_percentage=50.0)
    assert enc.decode(half['train']) == TEXT[:cut // 2]


def test_stories_of_llama2c_with_a_model_that_loses_what_it_has_no_piece_for(take, tmp_path, model, capsys):
    enc = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [STORIES[:5], ['A \u4f60\u4f60 lazy zebra.', *STORIES[5:200]], STORIES[200:]]
    files = [[i for text in part for i in [1, *enc.encode(text)]] for part in texts]
    for n, ids in enumerate(files):
        tokens(tmp_path / 'theirs' / f'data{n:02}.bin', ids)
    (tmp_path / 'tok.model').write_bytes(model)
    found, meta = take(tmp_path / 'tok.model')
    assert found['val'].tolist() == files[0] and found['train'].tolist() == files[1] + files[2]
    said, unknown = capsys.readouterr().out, sum(ids.count(0) for ids in files)
    assert unknown > 3 and f'lost: {unknown} tokens are unknown' in said and repr(STORIES[0][:9])[:-1] in said
    assert meta['splits']['val'] | {'stories': 5, 'bytes': len(''.join(texts[0]))} == meta['splits']['val']
    assert (meta['vocab_size'], meta['blank']) == (enc.get_piece_size() + 2, enc.get_piece_size())
    for name, texts in ('data00.json', STORIES), ('data01.json', ['A \u4f60\u4f60 lazy zebra.']):
        (tmp_path / 'theirs' / name).write_text(str(texts).replace("'", '"'))
    take(tmp_path / 'tok.model')  # the stories themselves, as they are there
    known = {enc.id_to_piece(i) for i in range(enc.get_piece_size())} | {' '}
    lost = sum(char not in known for text in [*STORIES, 'A \u4f60\u4f60 lazy zebra.'] for char in text)
    assert lost > 3 and f'lost: {lost} characters' in capsys.readouterr().out


@pytest.mark.parametrize('ids, given, message', [
    ([1, 5, 60] * 9, {}, r'train.bin has token 60, beyond the \d+ of .*tok.model: name the tokenizer'),
    (None, {}, 'train.bin has 3 bytes: tokens of uint16 have two each'),
    ([1, 5], {}, 'theirs has too few tokens for training and validation'),
    ([1, 5] * 9, {'infill_rate': 0.5}, 'theirs has tokens: leave it out')])
def test_what_is_refused(take, tmp_path, model, ids, given, message):
    tokens(tmp_path / 'theirs' / 'train.bin', ids or [1])
    if not ids:
        (tmp_path / 'theirs' / 'train.bin').write_bytes(b'123')
    (tmp_path / 'tok.model').write_bytes(model)
    with pytest.raises((UserError, SettingError), match=message):
        take(tmp_path / 'tok.model', **given)
    assert not (tmp_path / 'out').exists()


def test_without_a_tokenizer_or_with_the_wrong_characters(take, tmp_path):
    tokens(tmp_path / 'theirs' / 'train.bin', [1, 5] * 9)
    with pytest.raises(UserError, match=r'tokens as \.bin with their --tokenizer'):
        take('')
    (tmp_path / 'input.txt').write_text('\u2581')
    with pytest.raises(UserError, match=r'U\+2581'):
        take(tmp_path / 'input.txt')
    assert prepare.tokenizer
