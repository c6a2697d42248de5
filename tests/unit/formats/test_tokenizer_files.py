"""data/tokenizer_files.py on what formats/ writes and what others publish."""

import json
import shutil
import socket

import pytest
import requests
import tiktoken
import torch

from configurator import UserError
from data.tokenizer_files import FIRST, NORMAL, load_gpt2, open_tokenizer, tokenizer_of
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.plain import Safetensors
from tests.helpers.models import needs_export_packages, random_checkpoint, write_random_model
from tests.helpers.tokenizers import BUILT_IN_STORIES, NASTY, gpt2_file, needs_gpt2, trained_tokenizer


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


def test_open_tokenizer_reads_checkpoints_and_files(tmp_path):
    checkpoint = random_checkpoint(trained_tokenizer('char'))
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    for path in str(tmp_path), tmp_path / 'ckpt.pt':
        assert open_tokenizer(path).state() == checkpoint['tokenizer']
    bpe = trained_tokenizer('bpe')
    bpe.save(tmp_path)
    assert open_tokenizer(tmp_path / 'tokenizer.model').state() == bpe.state()


def test_open_tokenizer_says_what_to_name(tmp_path):
    with pytest.raises(UserError, match=r'absent is not a tokenizer: name .*vocab\.json'):
        open_tokenizer(tmp_path / 'absent')


def test_tokenizer_of_keeps_pieces_of_128_bytes():
    """Their length takes two bytes in sentencepiece's file."""
    pieces = [('a' * 2**i, float(i), NORMAL) for i in range(8)]
    assert tokenizer_of([*FIRST, *pieces]).encode('a' * 128)[-1] == len(FIRST) + 7


# GPT-2's vocabulary -------------------------------------------------------------

def gpt2_files():
    """Return {name: content} of all files that hold GPT-2's vocabulary."""
    merges = gpt2_file('vocab.bpe').read_text(encoding='utf-8')
    vocab = json.dumps(json.loads(gpt2_file('encoder.json').read_bytes()), indent=1)
    pairs = [line.split(' ') for line in merges.splitlines()[1:]]
    tokenizer = json.dumps({'version': '1.0', 'added_tokens': [{'id': 50256, 'content': '<|endoftext|>'}],
                            'model': {'type': 'BPE', 'vocab': json.loads(vocab), 'merges': pairs}})
    return {'vocab.json': vocab, 'encoder.json': vocab, 'tokenizer.json': tokenizer, 'vocab.bpe': merges,
            'merges.txt': merges.replace('\n', '\r\n')}


@needs_gpt2
@pytest.mark.parametrize('name', ['vocab.json', 'tokenizer.json', 'merges.txt'])
def test_open_tokenizer_reads_any_file_of_gpt2_in_a_folder_or_a_cache(tmp_path, name):
    cache = tmp_path / 'hub'
    folder = cache / 'models--gpt2' / 'snapshots' / '607a30d'
    folder.mkdir(parents=True)
    (folder.parent / 'older').mkdir()
    (cache / 'models--other--one' / 'snapshots' / 'f').mkdir(parents=True)
    (folder / name).write_bytes(gpt2_files()[name].encode())
    (folder / 'config.json').write_text('{"model_type": "gpt2", "n_layer": 12}')
    for path in folder / name, folder, cache / 'models--gpt2', cache, cache.parent:
        assert open_tokenizer(path).state() == trained_tokenizer('gpt2').state()


@needs_gpt2
@pytest.mark.parametrize('name, old, new', [
    ('merges.txt', 'h e\r\n', ''),
    ('vocab.json', '"!"', '"!!!!!"'),
    ('vocab.bpe', '#version: 0.2\n', '\u03a9 a\n'),
    ('tokenizer.json', '}}', '}')])
def test_open_tokenizer_rejects_changed_files_of_gpt2(tmp_path, name, old, new):
    content = gpt2_files()[name]
    assert old in content
    (tmp_path / name).write_bytes(content.replace(old, new, 1).encode())
    with pytest.raises(UserError, match=f"{name} is .*(not GPT-2's|damaged)"):
        open_tokenizer(tmp_path / name)


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
