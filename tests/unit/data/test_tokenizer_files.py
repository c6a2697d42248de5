"""Tokenizers of files and folders: which path means what, and what is imported and refused."""

import json
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import tiktoken
import torch

from configurator import UserError
from data.sentencepiece_file import NORMAL
from data.tokenizer_files import FIRST, load_gpt2, open_tokenizer, tokenizer_of
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.plain import Safetensors
from tests.helpers.models import needs_export_packages, write_random_model
from tests.helpers.scripts import ROOT, prepare
from tests.helpers.tokenizers import (
    BUILT_IN_STORIES,
    NASTY,
    gpt2_file,
    needs_gpt2,
    small_tokenizer,
    trained_tokenizer,
)

MODULES = """
import sys
from pathlib import Path
from data.tokenizer_files import open_tokenizer
encoding = open_tokenizer(sys.argv[1]).encoding
print(encoding, *sorted({'torch', 'core', 'formats', 'model'} & sys.modules.keys()))
"""


def save_run(folder, tokenizer, with_file=True):
    """Write what of a run matters here: its checkpoint, and the tokenizer's file, which older runs lack."""
    folder.mkdir(exist_ok=True)
    torch.save({'tokenizer': tokenizer.state(), 'model': {'w': torch.zeros(2)}}, folder / 'ckpt.pt')
    if with_file:
        tokenizer.save(folder)
    return folder


@pytest.mark.parametrize('encoding', ['char', 'bpe'])
def test_open_tokenizer_reads_prepared_folders_runs_and_checkpoints(tmp_path, encoding):
    tokenizer = small_tokenizer(encoding)
    run = save_run(tmp_path / 'run', tokenizer)
    older = save_run(tmp_path / 'older', tokenizer, with_file=False)
    for path in run, run / tokenizer.file_name, run / 'ckpt.pt', older, str(older):
        assert open_tokenizer(path).state() == tokenizer.state()
    prepared = prepare(tmp_path / 'prepared')
    assert open_tokenizer(prepared).encoding == 'char'


def test_open_tokenizer_asks_the_checkpoint_if_a_run_has_files_of_two_tokenizers(tmp_path):
    run = save_run(tmp_path / 'run', small_tokenizer('bpe'))
    small_tokenizer('char').save(run)
    assert open_tokenizer(run).encoding == 'bpe'


@pytest.mark.parametrize('with_file, imported', [(True, []), (False, ['torch'])], ids=['run', 'older run'])
def test_open_tokenizer_imports_torch_for_checkpoints_only(tmp_path, with_file, imported):
    run = save_run(tmp_path / 'run', small_tokenizer('char'), with_file)
    done = subprocess.run([sys.executable, '-c', MODULES, str(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ['char', *imported], done.stderr


def test_open_tokenizer_reads_the_characters_of_a_txt(tmp_path):
    path = tmp_path / 'input.txt'
    path.write_text('abc\u00e9', encoding='utf-8')
    assert json.loads(open_tokenizer(path).files['tokenizer.json']) == [' ', 'a', 'b', 'c', '\u00e9']


def write_llama2c(folder):
    """Write llama2.c's tokenizer.bin of the char tokenizer, and a file that could be its model."""
    chars = json.loads(small_tokenizer('char').files['tokenizer.json'])
    texts = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *chars]
    data = struct.pack('<i', 6)
    for text in texts:
        data += struct.pack('<fi', 0.0, len(text.encode())) + text.encode()
    folder.mkdir()
    (folder / 'tokenizer.bin').write_bytes(data)
    (folder / 'model.bin').write_bytes(struct.pack('<7i', *range(1, 8)))
    return folder


def test_open_tokenizer_finds_the_tokenizer_next_to_llama2c_models(tmp_path):
    folder = write_llama2c(tmp_path / 'llama2c')
    for path in folder / 'model.bin', folder / 'tokenizer.bin', folder:
        assert open_tokenizer(path).state() == small_tokenizer('char').state()
    (folder / 'tokenizer.bin').unlink()
    with pytest.raises(UserError, match=r'has no tokenizer\.bin'):
        open_tokenizer(folder / 'model.bin')


@needs_export_packages
@pytest.mark.parametrize('fmt, encoding', [
    (Llama2c(), 'char'), (Llama2c(), 'bpe'), (Llama2c(), 'lossy'),
    (HuggingFace(), 'char'), (HuggingFace(), 'bpe'), (HuggingFace(), 'gpt2'), (HuggingFace(), 'lossy'),
    (Safetensors(), 'char'), (Safetensors(), 'bpe'), (Safetensors(), 'gpt2')])
def test_open_tokenizer_reads_what_each_format_writes(tmp_path, fmt, encoding):
    tokenizer = trained_tokenizer(encoding)
    write_random_model(fmt, tokenizer, tmp_path)
    opened = open_tokenizer(tmp_path / 'model.bin' if isinstance(fmt, Llama2c) else tmp_path)
    assert (opened.encoding, opened.vocab_size) == (tokenizer.encoding, tokenizer.vocab_size)
    assert opened.lossless == (encoding != 'lossy')
    for text in BUILT_IN_STORIES[:9] + NASTY:
        assert opened.encode(text) == tokenizer.encode(text)


def test_open_tokenizer_runs_no_pickle(tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return Path.touch, (Path('ran'),)

    monkeypatch.chdir(tmp_path)
    torch.save({'tokenizer': Payload()}, 'ckpt.pt')
    with pytest.raises(UserError, match='not a checkpoint of this project, and was not run'):
        open_tokenizer('ckpt.pt')
    assert not Path('ran').exists()


def test_open_tokenizer_notices_a_changed_byte_in_a_checkpoint(tmp_path):
    path = save_run(tmp_path, small_tokenizer('char'), with_file=False) / 'ckpt.pt'
    data = path.read_bytes()
    path.write_bytes(data.replace(b'", "a", "', b'", "?", "'))
    assert path.read_bytes() != data
    with pytest.raises(UserError, match='Bad CRC-32'):
        open_tokenizer(path)


@pytest.mark.parametrize('name, content, message', [
    ('absent', None, r'absent is not a tokenizer: name .* vocab\.json'),
    ('absent.pt', None, r'no checkpoint .*absent\.pt'),
    ('a.pt', b'PK', 'not a checkpoint of this project'),
    ('tokenizer.model', b'garbage', 'tokenizer.model is damaged'),
    ('tokenizer.tiktoken', b'IQ== 0', 'tokenizer.tiktoken is damaged.*sha256'),
    ('tokenizer.bin', struct.pack('<ifi', 9, 0, 2**31 - 1) + b'<unk>', 'damaged.*breaks off'),
    ('tokenizer.json', b'{', 'tokenizer.json is damaged'),
    ('tokenizer.json', b'7', 'neither a list of characters nor a vocabulary'),
    ('tokenizer.json', b'{"model": {}}', 'the type of its model is None'),
    ('vocab.json', b'{"a": "0"}', 'not an object of pieces and ids'),
    ('vocab.json', b'{"a": 1}', 'its ids are not the numbers from 0 on'),
    ('vocab.json', b'{"a": 0}', "it is not GPT-2's vocabulary: .*hf download gpt2"),
    ('vocab.txt', b'[PAD]\n[UNK]\n[CLS]\nthe\n##s\n', "looks like a vocabulary, such as BERT's"),
    ('vocab.txt', b'<unk>\n<s>\n</s>\nthe\n', 'it looks like a vocabulary'),
    ('v.txt', '<unk>\t0\n<s>\t0\n</s>\t0\n\u2581t\t-0\nhe\t-1.5e-05\n'.encode(), 'pieces: name its .model'),
    ('gpt2.txt', b'IQ== 0\nIg== 1\nIw== 2\n', 'of tiktoken: rename it to .tiktoken'),
    ('t.txt', b'{"version": "1.0",\n "added_tokens": [],', 'rename it to .json'),
    ('merges.txt', '\u0120 t\n\u0120 a\nh e\ni n\nr e\no n\n\u0120t he\ner'.encode(), "except GPT-2's own"),
    ('story.txt', b'', 'it is empty'),
    ('story.txt', 'Once'.encode('utf-16-le'), 'it has a byte 0'),
    ('story.txt', b'PK\x03\x04', 'a zip archive'),
    ('story.txt', 'a\nZürich'.encode('latin-1'), r'line 2: byte 0xfc \(at offset 3\) is not utf-8: convert'),
    ('story.txt', 'Zürich'.encode('utf-16'), 'byte 0xff .* is not utf-8: convert it with iconv'),
    ('story.txt', b'<!DOCTYPE html><html>', 'an HTML page'),
    ('tokenizer.json', b'version https://git-lfs.github.com/spec/v1\noid', 'a Git LFS pointer'),
    ('tokenizer.model', b'version https://git-lfs.github.com/spec/v1\noid', 'a Git LFS pointer'),
    ('tokenizer.bin', b'version https://git-lfs.github.com/spec/v1\noid', 'a Git LFS pointer'),
    ('ckpt.pt', b'version https://git-lfs.github.com/spec/v1\noid', 'a Git LFS pointer'),
])
def test_open_tokenizer_refuses_foreign_and_damaged_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_tokenizer(tmp_path / name)
    assert '\n' not in str(error.value)


def test_tokenizer_of_keeps_pieces_of_128_bytes():
    """Their length takes two bytes in sentencepiece's file."""
    pieces = [('a' * 2**i, float(i), NORMAL) for i in range(8)]
    assert tokenizer_of([*FIRST, *pieces]).encode('a' * 128)[-1] == len(FIRST) + 7


# GPT-2's vocabulary -------------------------------------------------------------

@needs_gpt2
@pytest.mark.parametrize('name', ['vocab.json', 'merges.txt'])
def test_open_tokenizer_finds_gpt2_in_a_folder_or_a_cache(tmp_path, name):
    cache = tmp_path / 'hub'
    folder = cache / 'models--gpt2' / 'snapshots' / '607a30d'
    folder.mkdir(parents=True)
    (folder.parent / 'older').mkdir()
    (cache / 'models--other--one' / 'snapshots' / 'f').mkdir(parents=True)
    shutil.copy(gpt2_file({'vocab.json': 'encoder.json', 'merges.txt': 'vocab.bpe'}[name]), folder / name)
    (folder / 'config.json').write_text('{"model_type": "gpt2", "n_layer": 12}')
    for path in folder, cache / 'models--gpt2', cache, cache.parent:
        assert open_tokenizer(path).state() == trained_tokenizer('gpt2').state()


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    """A folder that both tiktoken and Hugging Face use as their cache."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    return tmp_path


def no_network(*args, **options):
    raise OSError('no network')


@pytest.mark.parametrize('offline, message', [
    (False, r'and cannot be downloaded \(ConnectionError\)'), (True, "'s\\) or ")])
def test_load_gpt2_says_how_to_get_it(empty_caches, monkeypatch, offline, message):
    resolve = None if offline else no_network  # None: nobody may call it
    monkeypatch.setattr(socket, 'getaddrinfo', resolve)
    with pytest.raises(UserError, match=rf'{message}.*: .*hf download gpt2 .* --tokenizer gpt2'):
        load_gpt2(offline)


@needs_gpt2
def test_load_gpt2_finds_it_in_the_cache_of_hugging_face(empty_caches, monkeypatch):
    monkeypatch.setattr(socket, 'socket', no_network)
    snapshot = empty_caches / 'models--openai-community--gpt2' / 'snapshots' / '607a30d'
    snapshot.mkdir(parents=True)
    shutil.copy(gpt2_file('encoder.json'), snapshot / 'vocab.json')
    assert load_gpt2().state() == trained_tokenizer('gpt2').state()


@needs_gpt2
def test_load_gpt2_downloads_it_once(empty_caches, monkeypatch):
    with monkeypatch.context() as online:
        online.setattr(requests, 'head', lambda url, timeout: None)
        online.setattr(tiktoken.registry, 'ENCODINGS', {})
        online.setattr(tiktoken.load, 'read_file', lambda url: gpt2_file(url.split('/')[-1]).read_bytes())
        load_gpt2()
    monkeypatch.setattr(socket, 'socket', no_network)
    assert load_gpt2(offline=True).state() == load_gpt2().state() == trained_tokenizer('gpt2').state()
