"""A table of mistakes: each has its exit status, one line that names thing and remedy, and writes nothing."""

import json
import os
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from checkpoint import save_checkpoint
from data.shards import fingerprint, read_meta
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from tests import tiny

ROOT = Path(__file__).parent.parent
PREPARE, TRAIN, SAMPLE, EXPORT, BENCH = (
    'data/tiny_stories/prepare.py', 'train.py', 'sample.py', 'export.py', 'bench.py')
GARBAGE = bytes(range(256)) * 8
TEXT = '<|endoftext|>'.join(tiny.STORIES)


class Payload:
    def __reduce__(self):
        return os.system, ('touch ran',)


def checkpoint(**changes):
    """A checkpoint of a random model for the folder `data`, with some of its entries changed."""
    tokenizer = load_tokenizer('data')
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, block_size=64))
    settings = {'dataset': 'data', 'block_size': 64, 'n_layer': 1, 'n_head': 2, 'n_embd': 16}
    return {'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': tokenizer.state(),
            'settings': settings, 'iter': 1, 'best_val_loss': 1.0, 'optimizers': [], 'scaler': {},
            'fingerprint': fingerprint(read_meta('data'))} | changes


def trained(**changes):
    """Makes the folder `out` with both checkpoints."""
    def make():
        Path('out').mkdir()
        for name in 'ckpt.pt', 'best.pt':
            save_checkpoint(Path('out', name), checkpoint(**changes))
    return make


def damaged(name, change):
    """As `trained`, with the bytes of one file changed."""
    def make():
        trained()()
        path = Path('out', name)
        path.write_bytes(change(path.read_bytes()))
    return make


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


def pickled():
    trained()()
    torch.save({'model': Payload()}, 'out/best.pt')


def wrote(name, content):
    """Makes a file."""
    def make():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return make


def meta(change):
    """Changes data/meta.json."""
    def make():
        about = json.loads(Path('data/meta.json').read_text())
        change(about)
        Path('data/meta.json').write_text(json.dumps(about))
    return make


def resize(name, size):
    return lambda: os.truncate(name, size)


def parquet(**columns):
    def make():
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table(columns), 's.parquet')
    return make


def half_a_parquet():
    parquet(text=['A story.'] * 1000)()
    os.truncate('s.parquet', os.path.getsize('s.parquet') // 2)


def nothing():
    pass


# (script, its words, exit status, what its line holds, what is made before)
TABLE = [
    # settings, on the command line and in files: the same for every script
    (TRAIN, '--batch_sise 4', 2, 'batch_sise batch_size', nothing),
    (SAMPLE, '--temprature=1', 2, 'temprature temperature', nothing),
    (PREPARE, '--sauce sample', 2, 'sauce source', nothing),
    (EXPORT, '--formats gguf', 2, 'formats format', nothing),
    (TRAIN, '--n_layer two', 2, "n_layer int 'two'", nothing),
    (TRAIN, '--n_layer 2.5', 2, "n_layer int '2.5'", nothing),
    (TRAIN, '--dropout nan', 2, 'dropout finite', nothing),
    (TRAIN, '--learning_rate', 2, '--learning_rate value', nothing),
    (TRAIN, '--out_dir --overwrite', 2, '--out_dir value --out_dir=', nothing),
    (TRAIN, '--overwrite 1', 2, 'overwrite True False', nothing),
    (TRAIN, '-x', 2, '-x --help', nothing),
    (TRAIN, 'config/quickstrat.py', 2, 'quickstrat.py config', nothing),
    (TRAIN, 'mine.jsn', 2, 'mine.jsn mine.json', wrote('mine.json', '{}')),
    (TRAIN, 'mine.json', 2, 'mine.json directory', lambda: Path('mine.json').mkdir()),
    (TRAIN, 'mine.json', 2, 'mine.json line', wrote('mine.json', '')),
    (TRAIN, 'mine.json', 2, 'mine.json utf-8', wrote('mine.json', GARBAGE)),
    (TRAIN, 'mine.json', 2, 'mine.json object', wrote('mine.json', '[1, 2]')),
    (TRAIN, 'mine.json', 2, 'mine.json n_layers n_layer', wrote('mine.json', '{"n_layers": 2}')),
    (TRAIN, 'mine.json', 2, 'mine.json n_layer int', wrote('mine.json', '{"n_layer": "2"}')),
    (TRAIN, 'mine.json', 2, 'mine.json n_layer None int', wrote('mine.json', '{"n_layer": [null]}')),
    (TRAIN, 'mine.json', 2, 'mine.json n_layer twice', wrote('mine.json', '{"n_layer": 2, "n_layer": 3}')),
    (TRAIN, 'mine.py', 2, 'mine.py line', wrote('mine.py', 'n_layer = = 2')),
    (TRAIN, 'mine.py', 2, 'mine.py ZeroDivisionError', wrote('mine.py', '\nn_layer = 1 // 0')),
    (TRAIN, 'mine.py', 2, 'mine.py n_layers n_layer', wrote('mine.py', 'n_layers = 2')),
    (TRAIN, 'mine.py', 2, 'mine.py', wrote('mine.py', GARBAGE)),
    # train.py
    (TRAIN, '--n_embd 30 --n_head 4', 2, 'n_embd 30 n_head 4', nothing),
    (TRAIN, '--n_head 4 --n_kv_head 3 --n_embd 32', 2, 'n_head 4 n_kv_head 3', nothing),
    (TRAIN, '--n_head 2 --n_embd 6', 2, 'rope even', nothing),
    (TRAIN, '--n_layer 0', 2, 'n_layer 0 least', nothing),
    (TRAIN, '--n_embd -32', 2, 'n_embd -32 least', nothing),
    (TRAIN, '--block_size 0', 2, 'block_size 0 least', nothing),
    (TRAIN, '--batch_size 0', 2, 'batch_size 0 least', nothing),
    (TRAIN, '--max_iters -1', 2, 'max_iters -1 least', nothing),
    (TRAIN, '--seed -1', 2, 'seed -1 more', nothing),
    (TRAIN, '--dropout 1', 2, 'dropout 1 below', nothing),
    (TRAIN, '--beta2 1', 2, 'beta2 1 below', nothing),
    (TRAIN, '--norm batch', 2, 'norm batch rms layer', nothing),
    (TRAIN, '--optimizer sgd', 2, 'optimizer sgd muon adamw', nothing),
    (TRAIN, '--compile yes', 2, 'compile yes auto True False', nothing),
    (TRAIN, '--device cuda:9', 2, 'cuda:9 --device cpu', nothing),
    (TRAIN, '--device tpu', 2, 'tpu auto cpu cuda', nothing),
    (TRAIN, '--dtype int8', 2, 'int8 float32 bfloat16', nothing),
    (TRAIN, '--dataset nowhere', 1, 'nowhere prepare.py --dataset', nothing),
    (TRAIN, '--dataset data/meta.json', 1, 'meta.json prepare.py --dataset', nothing),
    (TRAIN, '--block_size 100000', 1, '100000 block_size', nothing),
    (TRAIN, '', 1, 'meta.json damaged prepare.py', wrote('data/meta.json', '')),
    (TRAIN, '', 1, 'meta.json damaged prepare.py', wrote('data/meta.json', GARBAGE)),
    (TRAIN, '', 1, 'meta.json splits prepare.py', meta(lambda about: about.pop('splits'))),
    (TRAIN, '', 1, '../train plain',
     meta(lambda about: about['splits']['train']['shards'][0].update(name='../train_00000.bin'))),
    (TRAIN, '', 1, 'val prepare.py', meta(lambda about: about['splits']['val'].update(shards=[]))),
    (TRAIN, '', 1, 'train_00000.bin missing prepare.py', lambda: os.remove('data/train_00000.bin')),
    (TRAIN, '', 1, 'train_00000.bin 1,000 bytes prepare.py', resize('data/train_00000.bin', 1000)),
    (TRAIN, '--verify_data', 1, 'val_00000.bin sha256 prepare.py',
     lambda: wrote('data/val_00000.bin', flipped(Path('data/val_00000.bin').read_bytes()))()),
    (TRAIN, '', 1, 'tokenizer.json missing prepare.py', lambda: os.remove('data/tokenizer.json')),
    (TRAIN, '', 1, 'tokenizer data', wrote('data/tokenizer.json', GARBAGE)),
    (TRAIN, '', 1, 'vocabulary 262 293 meta.json prepare.py', wrote('data/tokenizer.json', '[" "]')),
    (TRAIN, '', 1, 'token beyond vocabulary prepare.py', lambda: (
        wrote('data/tokenizer.json', '[" "]')(), meta(lambda about: about.update(vocab_size=262))())),
    (TRAIN, '--out_dir file', 1, 'file --out_dir', wrote('file', '')),
    (TRAIN, '--out_dir file/out', 1, 'file/out --out_dir', wrote('file', '')),
    (TRAIN, '--out_dir out', 2, 'out --init_from resume --overwrite --out_dir', trained()),
    (TRAIN, '--init_from resume --out_dir out', 1, 'out/ckpt.pt --out_dir', nothing),
    (TRAIN, '--init_from nowhere', 1, 'nowhere', nothing),
    (TRAIN, '--init_from resume --out_dir out --n_embd 64', 2, 'n_embd 64 16 --out_dir', trained()),
    (TRAIN, '--init_from resume --out_dir out', 2, 'data fingerprint --out_dir', trained(fingerprint='0')),
    (TRAIN, '--init_from resume --out_dir out', 1, 'ckpt.pt damaged cp out/best.pt',
     damaged('ckpt.pt', flipped)),
    (TRAIN, '--init_from resume --out_dir out', 1, 'ckpt.pt damaged cp out/best.pt',
     damaged('ckpt.pt', lambda data: data[:1000])),
    # sample.py
    (SAMPLE, '--out_dir nowhere', 1, 'nowhere/best.pt train --out_dir', nothing),
    (SAMPLE, '--out_dir out', 1, 'best.pt damaged --ckpt last', damaged('best.pt', lambda data: b'')),
    (SAMPLE, '--out_dir out', 1, 'best.pt damaged --ckpt last', damaged('best.pt', lambda data: GARBAGE)),
    (SAMPLE, '--out_dir out', 1, 'best.pt not run', pickled),
    (SAMPLE, '--out_dir out', 1, 'config n_layers', trained(config={'n_layers': 2})),
    (SAMPLE, '--out_dir out', 1, 'config n_embd', trained(config={'n_embd': 0})),
    (SAMPLE, '--out_dir out', 1, 'config weights', trained(config={})),
    (SAMPLE, '--out_dir out', 1, 'char tokenizer',
     trained(tokenizer={'encoding': 'char', 'files': {'tokenizer.json': GARBAGE}})),
    (SAMPLE, '--out_dir out', 1, 'tokenizer char bpe gpt2', trained(tokenizer={'encoding': 'word'})),
    (SAMPLE, '--out_dir out --ckpt old', 2, 'ckpt old best last', nothing),
    (SAMPLE, '--out_dir out --top_p 2', 2, 'top_p 2 most', nothing),
    (SAMPLE, '--out_dir out --top_k -1', 2, 'top_k -1 least', nothing),
    (SAMPLE, '--out_dir out --temperature -1', 2, 'temperature -1 least', nothing),
    (SAMPLE, '--out_dir out --dtype int8', 2, 'int8 32 divides', trained()),
    (SAMPLE, '--out_dir out --num_samples 0', 2, 'num_samples 0 least', nothing),
    (SAMPLE, '--out_dir out --max_new_tokens 0', 2, 'max_new_tokens 0 least', nothing),
    (SAMPLE, '--out_dir out --device cuda:9', 2, 'cuda:9 --device cpu', nothing),
    (SAMPLE, '--out_dir out --start FILE:nowhere.txt', 1, 'nowhere.txt', trained()),
    (SAMPLE, '--out_dir out --start FILE:data', 1, 'data directory', trained()),
    (SAMPLE, '--out_dir out --start FILE:data/train_00000.bin', 1, 'train_00000.bin UTF-8',
     lambda: (trained()(), wrote('data/train_00000.bin', GARBAGE)())),
    (SAMPLE, '--out_dir out --start FILE:long.txt', 1, 'context of 64 shorten',
     lambda: (trained()(), wrote('long.txt', 'long ' * 100)())),
    (SAMPLE, '--out_dir out --start \udcff', 1, 'surrogate', trained()),
    # prepare.py
    (PREPARE, '--source nowhere.txt', 1, 'nowhere.txt --source', nothing),
    (PREPARE, '--source stories.pdf', 1, 'stories.pdf .txt', wrote('stories.pdf', GARBAGE)),
    (PREPARE, '--source empty', 1, 'empty .txt', lambda: Path('empty').mkdir()),
    (PREPARE, '--source s.txt', 1, 's.txt', wrote('s.txt', '')),
    (PREPARE, '--source s.txt', 1, 's.txt', wrote('s.txt', ' \n<|endoftext|>\n\n<|endoftext|>')),
    (PREPARE, '--source s.txt', 1, 's.txt', wrote('s.txt', 'x')),
    (PREPARE, '--source s.txt', 1, 's.txt UTF-8', wrote('s.txt', b'A caf\xe9.<|endoftext|>' * 9)),
    (PREPARE, '--source s.txt', 1, 's.txt UTF-8', wrote('s.txt', GARBAGE)),
    (PREPARE, '--source s.jsonl', 1, 's.jsonl:2 JSON', wrote('s.jsonl', '{"text": "A"}\n{"text": "B')),
    (PREPARE, '--source s.jsonl', 1, 's.jsonl:1 text story', wrote('s.jsonl', '{"body": "A"}')),
    (PREPARE, '--source s.jsonl', 1, 's.jsonl:1 text int', wrote('s.jsonl', '{"text": 7}')),
    (PREPARE, '--source s.json', 1, 's.json fetch', wrote('s.json', '[{"text": "A"}, {"text": "B"},')),
    (PREPARE, '--source s.parquet', 1, 's.parquet fetch', half_a_parquet),
    (PREPARE, '--source s.parquet', 1, 's.parquet text story body', parquet(body=['A'])),
    (PREPARE, '--source some/stories', 1, 'some/stories --source sample', nothing),
    (PREPARE, '--source s.txt --encoding_type word', 2, 'word char bpe gpt2', nothing),
    (PREPARE, '--source s.txt --vocab_size 500', 2, 'vocab_size bpe', nothing),
    (PREPARE, '--source s.txt --encoding_type bpe --vocab_size 70000', 2, '70000 65536', nothing),
    (PREPARE, '--source s.txt --encoding_type bpe --vocab_size 100', 1, '100 least', wrote('s.txt', TEXT)),
    (PREPARE, '--source s.txt --encoding_type bpe --vocab_size 9000', 1, '9000 most', wrote('s.txt', TEXT)),
    (PREPARE, '--source s.txt --data_percentage 0', 2, 'data_percentage 0', nothing),
    (PREPARE, '--source s.txt --val_percentage 100', 2, 'val_percentage 100', nothing),
    (PREPARE, '--source s.txt --num_proc -1', 2, 'num_proc -1', nothing),
    (PREPARE, '--source s.txt --tokenizer nowhere', 1, 'nowhere .model', wrote('s.txt', 'A.<|endoftext|>B.')),
    (PREPARE, '--source s.txt --encoding_type gpt2', 1, '--tokenizer', wrote('s.txt', 'A.<|endoftext|>B.')),
    (PREPARE, '--source s.txt --out_dir file', 1, 'file --out_dir',
     lambda: (wrote('s.txt', 'A.<|endoftext|>B.')(), wrote('file', '')())),
    # export.py
    (EXPORT, '', 2, 'format llama2c gguf', nothing),
    (EXPORT, '--format onnx', 2, 'onnx llama2c gguf', nothing),
    (EXPORT, '--format torch', 2, '--path folder', nothing),
    (EXPORT, '--format torch --path file', 2, 'file folder', wrote('file', '')),
    (EXPORT, '--format gguf --path data', 2, 'data file', nothing),
    (EXPORT, '--format llama2c --path data', 2, 'data other new', nothing),
    (EXPORT, '--format gguf --path to.gguf --dtype int4', 2, 'int4 f32 f16', nothing),
    (EXPORT, '--format gguf --path to.gguf --ckpt old', 2, 'old best last', nothing),
    (EXPORT, '--format llama2c --path to --out_dir nowhere', 1, 'nowhere/best.pt --out_dir', nothing),
    (EXPORT, '--format llama2c --path to --out_dir out', 1, 'best.pt damaged', damaged('best.pt', flipped)),
    (BENCH, '', 2, '--what time_to_loss', nothing),
    (BENCH, '--what speed', 2, 'speed time_to_loss', nothing),
    (BENCH, '--what train --shape 7B', 2, '7B 15M', nothing),
    (BENCH, '--what train --repeats 0', 2, 'repeats least', nothing),
    (BENCH, '--what train --peer data', 2, 'data checkout', nothing),
    (BENCH, '--what time_to_loss', 2, '--text', nothing),
    (BENCH, '--what time_to_loss --text data/meta.json', 2, '--peer', nothing),
]


def tree():
    """{path: its bytes} of all that lies in the working directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob('*')}


@pytest.mark.parametrize('script, words, status, named, make', TABLE,
                         ids=[f'{Path(row[0]).stem} {row[1]} {i}' for i, row in enumerate(TABLE)])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capfd, script, words, status, named, make):
    monkeypatch.chdir(tmp_path)
    tiny.prepare(Path('data'))
    make()
    always = {TRAIN: ['--dataset=data', '--out_dir=new', *tiny.SETTINGS],
              PREPARE: ['--offline', '--out_dir=new'],
              SAMPLE: ['--device=cpu'], EXPORT: [], BENCH: []}[script]
    given = words.split()
    if '--init_from resume' in words:  # the run's own settings
        always = ['--device=cpu']
    for key, value in ('TIKTOKEN_CACHE_DIR', 'none'), ('HF_HOME', 'none'), ('HF_HUB_OFFLINE', '1'):
        monkeypatch.setenv(key, str(tmp_path / value))
    monkeypatch.setattr(sys, 'argv', [script, *always, *given])
    before = tree()
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    out, err = capfd.readouterr()
    assert exit.value.code == status, err
    assert err.count('\n') == 1 and err.startswith(f'{Path(script).name}: '), err
    assert not [name for name in named.split() if name not in err], err
    assert not out and tree() == before


def test_the_table_is_long_enough():
    assert len(TABLE) >= 60
