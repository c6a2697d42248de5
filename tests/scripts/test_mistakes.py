"""Mistakes of users, script by script: each ends in its exit status and one line, and writes nothing.

The line must name what is wrong and what to type instead. Only names, numbers and paths are looked for, so
that messages can be reworded. For damaged checkpoints see tests/unit/core/test_checkpoint.py and
tests/hostile; for models that an export format cannot represent, tests/scripts/test_export.py.
"""

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
from tests.helpers import scripts

TRAIN = 'train.py'
SAMPLE = 'sample.py'
EXPORT = 'export.py'
PREPARE = 'data/tiny_stories/prepare.py'
TOKEN_FILES = 'data/token_files/prepare.py'
REPORT = 'tools/report.py'
BENCH = 'tools/bench.py'
USUAL_FLAGS = {
    TRAIN: ['--dataset=data', '--out_dir=new', *scripts.SETTINGS],
    SAMPLE: ['--out_dir=out', '--device=cpu'],
    EXPORT: ['--out_dir=out', '--format=gguf', '--path=new.gguf'],
    PREPARE: ['--source=s.txt', '--out_dir=new', '--offline'],
    TOKEN_FILES: ['--source=s', '--out_dir=new', '--tokenizer=data', '--offline'],
    REPORT: ['--out_dir=out', '--device=cpu'],
    BENCH: ['--what=train'],
}
END = '<|endoftext|>'


# what a test puts into its working directory, next to `data`, a prepared folder

def run_folder(**changes):
    """Return a function that makes `out`, a run with random weights, with some entries of it changed."""
    def make():
        os.mkdir('out')
        tokenizer = load_tokenizer('data')
        shape = {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'block_size': 64}
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
        checkpoint = {
            'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': tokenizer.state(),
            'settings': {'dataset': 'data'} | shape, 'iter': 1, 'best_val_loss': 1.0, 'optimizers': [],
            'scaler': {}, 'fingerprint': fingerprint(read_meta('data'))}
        for name in 'ckpt.pt', 'best.pt':
            torch.save(checkpoint | changes, Path('out', name))

    return make


def without_best():
    """Make `out`, a run that was killed before its first best.pt."""
    run_folder()()
    os.remove('out/best.pt')


def file(name, content=''):
    """Return a function that makes a file with this text or these bytes."""
    def make():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def empty_folder():
    os.mkdir('empty')


def reversed_shard():
    """Change the tokens of a shard, but not its size."""
    path = Path('data/val_00000.bin')
    path.write_bytes(path.read_bytes()[::-1])


def other_tokenizer():
    """Make `other`, data that was prepared with another tokenizer than `data`."""
    scripts.prepare(Path('other'))
    Path('other/tokenizer.json').write_text(Path('other/tokenizer.json').read_text().replace('O', 'Q'))


# Values that a script refuses before it reads anything
WRONG_VALUES = {
    TRAIN: 'n_layer=0 batch_size=0 batch_size=2000000 gradient_accumulation_steps=0 max_iters=0 '
           'eval_interval=-1 log_interval=0 learning_rate=-1 warmup_iters=-1 weight_decay=-1 grad_clip=-1 '
           'eval_iters=-1 seed=-1 beta1=1 beta2=1 block_size=0 optimizer=sgd compile=yes device=tpu '
           'device=cuda:99 dtype=int8 patience=-1 save_interval=-1 max_epochs=-1 dropout=1 norm=batch',
    SAMPLE: 'ckpt=old num_samples=0 max_new_tokens=0 temperature=-1 top_k=-1 seed=-1 top_p=0 top_p=2 '
            'dtype=int4 device=tpu min_new_tokens=-1',
    EXPORT: 'format=onnx ckpt=old dtype=int4 path=',
    PREPARE: 'encoding_type=word data_percentage=0 data_percentage=101 val_percentage=-1 val_percentage=100 '
             'infill_rate=-1 infill_rate=2 num_proc=-1 num_proc=2000000 seed=-1',
    TOKEN_FILES: 'encoding_type=word data_percentage=0 data_percentage=101 val_percentage=-1 '
                 'val_percentage=100',
    REPORT: 'ckpt=old num_samples=1 max_new_tokens=0 temperature=-1 top_p=0 seed=-1 dtype=int8 eval_iters=-1',
    BENCH: 'what=speed shape=7B repeats=0 batch_size=0 steps=0',
}
MISTAKES = []  # (script, flags, exit status, what the line mentions, *what to make before)
for script, cases in WRONG_VALUES.items():
    for case in cases.split():
        name, value = case.split('=')
        MISTAKES.append((script, f'--{case}', 2, f'{name} {value}'))
MISTAKES += [
    (TRAIN, '--batch_sise 4', 2, 'batch_sise batch_size'),
    (TRAIN, 'config/tiny', 2, 'config/tiny .py'),
    (TRAIN, '--dataset nowhere', 1, 'nowhere prepare.py --dataset'),
    (TRAIN, '--dataset data/meta.json', 1, 'meta.json prepare.py --dataset'),
    (TRAIN, '--verify_data', 1, 'val_00000.bin sha256 prepare.py', reversed_shard),
    (TRAIN, '--n_head 3', 2, 'n_head 3 n_embd 32'),
    (TRAIN, '--block_size 100000', 1, 'data 100000 --block_size'),
    (TRAIN, '--out_dir file/out', 1, 'file/out --out_dir', file('file')),
    (TRAIN, '--out_dir out', 2, 'out --init_from resume --overwrite --out_dir', file('out/ckpt.pt')),
    (TRAIN, '--init_from nowhere', 1, 'nowhere'),
    (TRAIN, '--max_iters 5 --max_epochs 1', 2, 'max_iters max_epochs leave out'),
    (TRAIN, '--init_from out', 2, 'n_layer 2 out 1', run_folder()),
    (TRAIN, '--init_from resume --out_dir out', 1, 'out/ckpt.pt --out_dir'),
    (TRAIN, '--init_from resume --out_dir out --n_embd 64', 2, 'n_embd 64 16 --out_dir', run_folder()),
    (TRAIN, '--init_from resume --out_dir out', 2, 'data --out_dir', run_folder(fingerprint='0')),
    (TRAIN, '--init_from resume --out_dir out', 1, 'ckpt.pt iter -7', run_folder(iter=-7)),

    (SAMPLE, '', 1, 'out/best.pt --out_dir'),
    (SAMPLE, '--ckpt last', 1, 'out/ckpt.pt --out_dir'),
    (SAMPLE, '', 1, 'out/best.pt out/ckpt.pt --ckpt last', without_best),
    (SAMPLE, '', 1, 'config n_layers', run_folder(config={'n_layers': 2})),
    (SAMPLE, '', 1, 'config weights', run_folder(config={})),
    (SAMPLE, '', 1, 'embedding.weight',
     run_folder(model={'embedding.weight': torch.ones(2, 2, dtype=torch.int8)})),
    (SAMPLE, '--init_from out', 1, 'out tokenizer', run_folder(tokenizer=None)),
    (SAMPLE, '--init_from nowhere', 1, 'nowhere'),
    (SAMPLE, '--init_from a --out_dir b', 2, 'init_from out_dir leave out'),
    (SAMPLE, '--init_from a --ckpt last', 2, 'ckpt --out_dir ckpt.pt'),
    (SAMPLE, '--dtype int8 --compile', 2, 'int8 compile leave out'),
    (SAMPLE, '--start FILE:nowhere.txt', 1, 'nowhere.txt', run_folder()),
    (SAMPLE, '--start FILE:latin.txt', 1, 'latin.txt UTF-8', run_folder(), file('latin.txt', b'caf\xe9')),
    (SAMPLE, '--start FILE:blank.txt --one_per_line', 1, 'blank.txt', run_folder(), file('blank.txt', '\n')),
    (SAMPLE, '--start FILE:/dev/zero', 1, '/dev/zero 10,000,000', run_folder()),
    (SAMPLE, f'--start {"B" * 99}', 1, '64', run_folder()),
    (SAMPLE, '--one_per_line', 2, 'one_per_line --start FILE:'),
    (SAMPLE, '--min_new_tokens 20 --max_new_tokens 10', 2, 'min_new_tokens 20 max_new_tokens 10'),
    (SAMPLE, '--first_sentence One.', 2, '--last_sentence'),
    (SAMPLE, '--first_sentence " " --last_sentence One.', 2, '--first_sentence'),
    (SAMPLE, '--first_sentence A. --last_sentence B. --start C', 2, 'start first_sentence'),
    (SAMPLE, '--first_sentence A. --last_sentence B.', 1, 'out --infill_rate', run_folder()),
    (SAMPLE, f'--first_sentence A. --last_sentence {"B" * 99}', 1, '64', run_folder(infill_rate=0.5)),

    (EXPORT, '', 1, 'out/best.pt --out_dir'),
    (EXPORT, '--format safetensors --path file', 2, 'file folder', file('file')),
    (EXPORT, '--path data', 2, 'data file'),
    (EXPORT, '--path s.txt', 2, 's.txt', file('s.txt', 'GG')),
    (EXPORT, '--format llama2c --path data', 2, 'data meta.json'),

    (PREPARE, '--source nowhere.txt', 1, 'nowhere.txt --source'),
    (PREPARE, '--source s.pdf', 1, 's.pdf .txt', file('s.pdf', 'A story.')),
    (PREPARE, '--source empty', 1, 'empty .txt', empty_folder),
    (PREPARE, '', 1, 's.txt blank', file('s.txt', f' \n{END}\n\n{END}')),
    (PREPARE, '', 1, 's.txt', file('s.txt', 'x')),
    (PREPARE, '', 1, 's.txt one', file('s.txt', f'one{END}one{END}')),
    (PREPARE, '--source s.jsonl', 1, 's.jsonl', file('s.jsonl')),
    (PREPARE, '--source s.json', 1, 's.json', file('s.json', '[]')),
    (PREPARE, '--source s', 1, 's/b.txt utf-8', file('s/a.txt', 'A.'), file('s/b.txt', b'\xff')),
    (PREPARE, '--source s', 1, 's/b.jsonl', file('s/a.jsonl', '{"text": "A."}'),
     file('s/b.jsonl', '{"text": "A"}\n{"text": "B')),
    (PREPARE, '--source s.jsonl', 1, 's.jsonl --text_column text story body',
     file('s.jsonl', '{"body": "A"}')),
    (PREPARE, '--source s.jsonl', 1, 's.jsonl 1 text number', file('s.jsonl', '{"text": 7}')),
    (PREPARE, '--source s.parquet', 1, 's.parquet', file('s.parquet', 'PAR1')),
    (PREPARE, '--source s', 1, 's', file('s/state.json', '{')),
    (PREPARE, '--source s', 1, 's state.json', file('s/data.arrow', 'x')),
    (PREPARE, '--text_encoding utf-99', 2, 'text_encoding utf-99 cp1252'),
    (PREPARE, '--text_encoding cp1252 --source s.parquet', 2, 'text_encoding s.parquet', file('s.parquet')),
    (PREPARE, '--text_column tale', 2, 'text_column s.txt', file('s.txt', f'A.{END}B.')),
    (PREPARE, '--separator=', 2, 'separator'),
    (PREPARE, '--separator x --source s.jsonl', 2, 'separator s.jsonl', file('s.jsonl', '{"text": "A"}')),
    (PREPARE, '--separator ===', 1, "s.txt '===' </s> --separator", file('s.txt', 'A.</s>B.')),
    (PREPARE, '--source s', 1, 's val', file('s/train.txt', 'A.'), file('s/val.txt')),
    (PREPARE, '--source s', 1, 's val.txt test.txt --source', file('s/val.txt', 'A.'),
     file('s/test.txt', 'B.')),
    (PREPARE, '--source s --val_percentage 50', 2, 'val_percentage s train.txt dev.txt',
     file('s/train.txt', 'A.'), file('s/dev.txt', 'B.')),
    (PREPARE, '--source=', 2, 'source empty'),
    (PREPARE, '--out_dir hf', 1, 'hf meta.json tokenizer.json --out_dir', file('hf/meta.json', '{}'),
     file('hf/tokenizer.json', '{}')),
    (PREPARE, '--infill_rate 1', 1, 's.txt --infill_rate', file('s.txt', f'A.{END}B.{END}C.{END}')),
    (PREPARE, '--vocab_size 500', 2, 'vocab_size --encoding_type bpe'),
    (PREPARE, '--encoding_type bpe --vocab_size 70000', 2, '70000 65536'),
    (PREPARE, '--encoding_type bpe --vocab_size -1', 2, 'vocab_size -1'),
    (PREPARE, '--tokenizer nowhere', 1, 'nowhere .model'),
    (PREPARE, '--tokenizer data --encoding_type bpe', 2, 'data char bpe'),
    (PREPARE, '--encoding_type gpt2', 1, '--tokenizer'),
    (PREPARE, '--out_dir file', 1, 'file --out_dir', file('file')),

    (TOKEN_FILES, '--source=', 2, '--source'),
    (TOKEN_FILES, '--source nowhere', 1, 'nowhere .bin'),
    (TOKEN_FILES, '--source empty', 1, 'empty .bin', empty_folder),
    (TOKEN_FILES, '--tokenizer=', 2, '--tokenizer --encoding_type gpt2', file('s/train.bin', b'\3\0' * 9)),
    (TOKEN_FILES, '--tokenizer nowhere', 1, 'nowhere', file('s/train.bin', b'\3\0' * 9)),
    (TOKEN_FILES, '--encoding_type gpt2', 2, 'data char gpt2', file('s/train.bin', b'\3\0' * 9)),
    (TOKEN_FILES, '', 1, 's/train.bin 19', file('s/train.bin', b'\3\0' * 9 + b'\3')),
    (TOKEN_FILES, '', 1, 's/train.bin 65535 data', file('s/train.bin', b'\xff\xff' * 9)),
    (TOKEN_FILES, '', 1, 's/val.bin', file('s/train.bin', b'\3\0' * 9), file('s/val.bin')),

    (REPORT, '', 1, 'out/best.pt --out_dir'),
    (REPORT, '--out_dir ,', 2, '--out_dir'),
    (REPORT, '--path nowhere/x.html', 2, 'nowhere/x.html', run_folder()),
    (REPORT, '', 1, 'data out --dataset', run_folder(fingerprint='0')),
    (REPORT, '--dataset nowhere', 1, 'nowhere prepare.py', run_folder()),
    (REPORT, '--dataset other', 1, 'other out --tokenizer', run_folder(), other_tokenizer),

    (BENCH, '--peer data', 2, 'data nanoGPT llama2.c'),
    (BENCH, '--what time_to_loss --text data/meta.json', 2, '--text --peer'),
    (BENCH, '--what encodings --picture picture.txt', 2, 'picture.txt .png'),
]


def all_files():
    """Return {path: content} of everything in the working directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob('*')}


@pytest.mark.parametrize(('script', 'flags', 'status', 'mentions', 'makers'),
                         [(*row[:4], row[4:]) for row in MISTAKES],
                         ids=[f'{row[0]} {row[1]}' for row in MISTAKES])
def test_script_reports_a_mistake_in_one_line(
        tmp_path, monkeypatch, capfd, script, flags, status, mentions, makers):
    monkeypatch.chdir(tmp_path)
    scripts.prepare(Path('data'))
    for make in makers:
        make()
    # a resumed run has its own settings
    usual_flags = ['--device=cpu'] if '--init_from resume' in flags else USUAL_FLAGS[script]
    if script == SAMPLE and '--init_from' in flags and '--out_dir' not in flags:
        usual_flags = ['--device=cpu']
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'none'))
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'none'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(sys, 'argv', scripts.once([script, *usual_flags, *shlex.split(flags)]))
    before = all_files()
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(scripts.ROOT / script), run_name='__main__')
    out, err = capfd.readouterr()
    assert exit.value.code == status, err
    assert err.count('\n') == 1 and err.startswith(f'{Path(script).name}: '), err
    assert not [name for name in mentions.split() if name not in err], err
    assert not out and all_files() == before
