"""Tables of mistakes: each has its exit status, one line that names thing and remedy, and writes nothing."""

import math
import os
import runpy
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from data.shards import fingerprint, read_meta
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from tests.helpers import scripts as tiny

TRAIN, SAMPLE, PREPARE, EXPORT, BENCH = (
    'train.py', 'sample.py', 'data/tiny_stories/prepare.py', 'export.py', 'bench.py')
ALWAYS = {
    TRAIN: ['--dataset=data', '--out_dir=new', *tiny.SETTINGS],
    SAMPLE: ['--out_dir=out', '--device=cpu'],
    PREPARE: ['--source=s.txt', '--out_dir=new', '--offline'],
    EXPORT: ['--out_dir=out', '--format=gguf', '--path=new.gguf'],
    BENCH: ['--what=train'],
}
END = '<|endoftext|>'


def trained(**changes):
    """Makes the folder `out`: both checkpoints of a random model for `data`, with some entries changed."""
    def make():
        os.mkdir('out')
        tokenizer = load_tokenizer('data')
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, block_size=64))
        settings = {'dataset': 'data', 'block_size': 64, 'n_layer': 1, 'n_head': 2, 'n_embd': 16}
        for name in 'ckpt.pt', 'best.pt':
            torch.save({
                'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': tokenizer.state(),
                'settings': settings, 'iter': 1, 'best_val_loss': 1.0, 'optimizers': [], 'scaler': {},
                'fingerprint': fingerprint(read_meta('data'))} | changes, Path('out', name))
    return make


def wrote(name, content):
    """Makes a file."""
    def make():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return make


def reverse():
    """Other data of the same size."""
    path = Path('data/val_00000.bin')
    path.write_bytes(path.read_bytes()[::-1])


# Values that are refused, by the settings' own names, before anything is read
REFUSED = {
    TRAIN: 'n_layer=0 batch_size=0 batch_size=2000000 '
           'gradient_accumulation_steps=0 max_iters=0 eval_interval=-1 log_interval=0 '
           'learning_rate=-1 warmup_iters=-1 weight_decay=-1 grad_clip=-1 eval_iters=-1 seed=-1 beta1=1 '
           'beta2=1 block_size=0 optimizer=sgd compile=yes device=tpu device=cuda:9 dtype=int8',
    SAMPLE: 'ckpt=old num_samples=0 max_new_tokens=0 temperature=-1 top_k=-1 seed=-1 top_p=0 top_p=2',
    PREPARE: 'encoding_type=word data_percentage=0 data_percentage=101 val_percentage=0 '
             'val_percentage=100 infill_rate=-1 infill_rate=2 num_proc=-1 seed=-1',
    EXPORT: 'format=onnx ckpt=old dtype=int4 path=',
    BENCH: 'what=speed shape=7B repeats=0 batch_size=0 steps=0',
}
TABLE = [(script, f'--{case}', 2, case.replace('=', ' '))
         for script, cases in REFUSED.items() for case in cases.split()]
TABLE += [  # (script, its words, exit status, what its line holds, *what is made before)
    (TRAIN, '--batch_sise 4', 2, 'batch_sise batch_size'),
    (TRAIN, '--dataset nowhere', 1, 'nowhere prepare.py --dataset'),
    (TRAIN, '--dataset data/meta.json', 1, 'meta.json prepare.py --dataset'),
    (TRAIN, '--verify_data', 1, 'val_00000.bin sha256 prepare.py', reverse),
    (TRAIN, '--out_dir file/out', 1, 'file/out --out_dir', wrote('file', '')),
    (TRAIN, '--out_dir out', 2, 'out --init_from resume --overwrite --out_dir', wrote('out/ckpt.pt', '')),
    (TRAIN, '--out_dir out', 2, 'out --init_from resume --overwrite --out_dir', wrote('out/best.pt', '')),
    (TRAIN, '--init_from nowhere', 1, 'nowhere'),
    (TRAIN, '--init_from resume --out_dir out', 1, 'out/ckpt.pt --out_dir'),
    (TRAIN, '--init_from resume --out_dir out --n_embd 64', 2, 'n_embd 64 16 --out_dir', trained()),
    (TRAIN, '--init_from resume --out_dir out', 2, 'data fingerprint --out_dir', trained(fingerprint='0')),
    *((TRAIN, '--init_from resume --out_dir out', 1, name, trained(**{name: value})) for name, value in (
        ('best_val_loss', None), ('best_val_loss', math.nan), ('settings', [1]), ('iter', -7), ('iter', 1.5),
        ('fingerprint', 3), ('optimizers', {}), ('scaler', 'x'), ('infill_rate', 'x'))),
    (SAMPLE, '', 1, 'real numbers', trained(model={'embedding.weight': torch.ones(2, 2, dtype=torch.int8)})),
    (SAMPLE, '', 1, 'out/best.pt train --out_dir'),
    (SAMPLE, '--ckpt last', 1, 'out/ckpt.pt train --out_dir'),
    (SAMPLE, '', 1, 'config n_layers', trained(config={'n_layers': 2})),
    (SAMPLE, '', 1, 'config weights', trained(config={})),
    (SAMPLE, '--init_from out', 1, 'out no tokenizer', trained(tokenizer=None)),
    (SAMPLE, '--dtype int8', 2, 'int8 32 divides', trained()),
    (SAMPLE, '--start FILE:nowhere.txt', 1, 'nowhere.txt', trained()),
    (SAMPLE, '--start FILE:latin.txt', 1, 'latin.txt UTF-8 3', trained(), wrote('latin.txt', b'caf\xe9')),
    (SAMPLE, '--start FILE:/dev/zero', 1, '/dev/zero 10,000,000', trained()),
    (SAMPLE, '--first_sentence One.', 2, '--last_sentence'),
    (SAMPLE, '--first_sentence " " --last_sentence One.', 2, '--first_sentence'),
    (SAMPLE, '--first_sentence A. --last_sentence B. --start C', 2, 'leave out start'),
    (SAMPLE, '--first_sentence A. --last_sentence B.', 1, 'out not learned --infill_rate', trained()),
    (SAMPLE, f'--first_sentence A. --last_sentence {"B" * 99}', 1, 'two sentences 64 shorten',
     trained(infill_rate=0.5)),
    (PREPARE, '--source nowhere.txt', 1, 'nowhere.txt --source'),
    (PREPARE, '--source s.pdf', 1, 's.pdf .txt', wrote('s.pdf', 'A story.')),
    (PREPARE, '--source empty', 1, 'empty .txt', lambda: os.mkdir('empty')),
    (PREPARE, '', 1, 's.txt no stories blank', wrote('s.txt', f' \n{END}\n\n{END}')),
    (PREPARE, '', 1, 's.txt stories', wrote('s.txt', 'x')),
    (PREPARE, '--source s.jsonl', 1, 's.jsonl holds no stories', wrote('s.jsonl', '')),
    (PREPARE, '--source s.json', 1, 's.json no data', wrote('s.json', '[]')),
    (PREPARE, '', 1, 's.txt one story', wrote('s.txt', f'one{END}one{END}')),
    (PREPARE, '--source s', 1, 's/b.txt utf-8', wrote('s/a.txt', 'A.'), wrote('s/b.txt', b'\xff')),
    (PREPARE, '--source s', 1, 's/b.jsonl JSON', wrote('s/a.jsonl', '{"text": "A."}'),
     wrote('s/b.jsonl', '{"text": "A"}\n{"text": "B')),
    (PREPARE, '--source s.jsonl', 1, 's.jsonl text story body', wrote('s.jsonl', '{"body": "A"}')),
    (PREPARE, '--source s.jsonl', 1, 's.jsonl text int', wrote('s.jsonl', '{"text": 7}')),
    (PREPARE, '--source s.parquet', 1, 's.parquet', wrote('s.parquet', 'PAR1')),
    (PREPARE, '--source s', 1, 's', wrote('s/state.json', '{')),
    (PREPARE, '--source s', 1, 's val files', wrote('s/train.txt', 'A.'), wrote('s/val.txt', '')),
    (PREPARE, '--vocab_size 500', 2, 'vocab_size --encoding_type bpe'),
    (PREPARE, '--encoding_type bpe --vocab_size 70000', 2, '70000 65536'),
    (PREPARE, '--encoding_type bpe --vocab_size -1', 2, 'vocab_size -1'),
    (PREPARE, '--tokenizer nowhere', 1, 'nowhere .model'),
    (PREPARE, '--tokenizer data --encoding_type bpe', 2, 'data char bpe'),
    (PREPARE, '--encoding_type gpt2', 1, '--tokenizer'),
    (PREPARE, '--out_dir file', 1, 'file --out_dir', wrote('file', '')),
    # tests/test_export.py has what a format cannot hold
    (EXPORT, '', 1, 'out/best.pt --out_dir'),
    (EXPORT, '--format safetensors --path file', 2, 'file folder', wrote('file', '')),
    (EXPORT, '--path data', 2, 'data file'),
    (EXPORT, '--path s.txt', 2, 's.txt another new', wrote('s.txt', 'GG')),
    (EXPORT, '--format llama2c --path data', 2, 'data other new'),
    (BENCH, '--peer data', 2, 'data checkout'),
    (BENCH, '--what time_to_loss --text data/meta.json', 2, '--text --peer'),
]


def tree():
    """{path: its bytes} of all that lies in the working directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob('*')}


@pytest.mark.parametrize('script, words, status, named, make', [(*row[:4], row[4:]) for row in TABLE])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capfd, script, words, status, named, make):
    monkeypatch.chdir(tmp_path)
    tiny.prepare(Path('data'))
    for do in make:
        do()
    # of a run that goes on, its own settings
    always = ['--device=cpu'] if '--init_from resume' in words else ALWAYS[script]
    for key, value in ('TIKTOKEN_CACHE_DIR', 'none'), ('HF_HOME', 'none'), ('HF_HUB_OFFLINE', '1'):
        monkeypatch.setenv(key, str(tmp_path / value))
    monkeypatch.setattr(sys, 'argv', tiny.once([script, *always, *shlex.split(words)]))
    before = tree()
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(tiny.ROOT / script), run_name='__main__')
    out, err = capfd.readouterr()
    assert exit.value.code == status, err
    assert err.count('\n') == 1 and err.startswith(f'{Path(script).name}: '), err
    assert not [name for name in named.split() if name not in err], err
    assert not out and tree() == before
