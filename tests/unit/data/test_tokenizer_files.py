"""Tokenizers of files and folders: which path means what, and what is imported and refused."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configurator import UserError
from data.tokenizer_files import open_tokenizer, sentencepiece_model, write_varint
from tests.helpers.scripts import ROOT, prepare
from tests.helpers.tokenizers import CORPUS, gpt2_file, needs_gpt2, small_tokenizer

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


def test_open_tokenizer_reads_hugging_face_folders(tmp_path):
    """Its pieces are the char tokenizer's, with one merge: so it is bpe."""
    chars = json.loads(small_tokenizer('char').files['tokenizer.json'])
    texts = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *chars, 'on']
    model = {'vocab': {text: i for i, text in enumerate(texts)}, 'merges': ['o n']}
    (tmp_path / 'tokenizer.json').write_text(json.dumps({'model': model}))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.encoding, tokenizer.vocab_size) == ('bpe', len(texts) + 2)
    assert tokenizer.encode('on') == [texts.index(' '), texts.index('on')]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in CORPUS)


@needs_gpt2
def test_open_tokenizer_reads_gpt2_files(tmp_path):
    for name in 'vocab.bpe', 'encoder.json':
        assert open_tokenizer(gpt2_file(name)).state() == small_tokenizer('gpt2').state()
    (tmp_path / 'vocab.json').write_text('{"a": 0}')
    with pytest.raises(UserError, match=r"vocab\.json is damaged.* not GPT-2's .*hf download gpt2"):
        open_tokenizer(tmp_path)


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
    ('tokenizer.json', b'{"model": {"vocab": [["a", 0]]}}', 'not an object of pieces and ids'),
    ('tokenizer.json', b'{"model": {"vocab": {"a": "0"}}}', 'not an object of pieces and ids'),
    ('tokenizer.json', b'{"model": {"vocab": {"a": 1}}}', 'its ids are not the numbers from 0 on'),
    ('tokenizer.json', b'{"model": {"vocab": {"a": 0}}}', 'no list of merges'),
    ('tokenizer.json', b'{"model": {"vocab": {"a": 0}, "merges": [1]}}', 'not a pair of pieces'),
    ('tokenizer.json', b'{"model": {"vocab": {"a": 0}, "merges": []}}', 'ids 3 to 258 are not the bytes'),
])
def test_open_tokenizer_refuses_foreign_and_damaged_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_tokenizer(tmp_path / name)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('number, data', [
    (0, b'\x00'), (1, b'\x01'), (127, b'\x7f'), (128, b'\x80\x01'), (300, b'\xac\x02'),
    (2**21, b'\x80\x80\x80\x01')])
def test_write_varint_equals_the_examples_of_protocol_buffers(number, data):
    assert write_varint(number) == data


def test_sentencepiece_model_is_read_by_sentencepiece():
    import sentencepiece

    pieces = [('<unk>', 0.0, 2), ('<s>', 0.0, 3), ('</s>', 0.0, 3), ('a', -1.5, 1), ('b' * 200, -2.5, 1)]
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(pieces))
    read = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    assert read == [(text, score) for text, score, _ in pieces]
