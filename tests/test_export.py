"""export.py: what it proves, what it refuses, what it leaves behind."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import export
from checkpoint import save_checkpoint
from configurator import SettingError, UserError
from data.shards import ShardWriter, fingerprint, read_meta
from data.tiny_stories.sample_stories import stories
from data.tokenizer import CharTokenizer
from formats import gguf, llama2c
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
STORIES = list(stories(20, 1))
PACKAGES = {'hf': ('safetensors', 'transformers'), 'gguf': ('gguf', 'xllamacpp'), 'torch': ('safetensors',)}
FORMATS = [pytest.param(name, marks=pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in PACKAGES.get(name, ())),
    reason=f"pip install {' '.join(PACKAGES.get(name, ()))}"))
    for name in ('llama2c', 'llama2c-int8', 'hf', 'gguf', 'torch')]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(format, config, **settings) exports a random model to tmp_path/to; returns what it prints."""
    tokenizer = CharTokenizer.train(STORIES)

    def run(format, config=(), changed={}, **settings):  # noqa: B006 (only read)
        out, data = tmp_path / 'out', tmp_path / 'data'
        if not out.exists():
            out.mkdir()
            data.mkdir()
            tokenizer.save(data)
            splits = {}
            for split in 'train', 'val':
                writer = ShardWriter(data, split)
                ids, _ = tokenizer.encode_pieces([(text, True) for text in STORIES])
                writer.write(ids)
                splits[split] = {'shards': writer.close(), 'bytes': len(''.join(STORIES).encode())}
            (data / 'meta.json').write_text(json.dumps({
                'encoding': 'char', 'vocab_size': tokenizer.vocab_size, 'splits': splits}))
        torch.manual_seed(0)
        shape = {'n_layer': 2, 'n_head': 4, 'n_kv_head': 2, 'n_embd': 32, 'block_size': 80, 'mlp_width': 96}
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape | dict(config)))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.15, mean=float(p.dim() == 1))
        train = {'batch_size': 2, 'gradient_accumulation_steps': 1, 'optimizer': 'muon', 'dataset': str(data)}
        save_checkpoint(out / 'best.pt', {
            'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': tokenizer.state(),
            'settings': train | changed, 'iter': 1, 'fingerprint': fingerprint(read_meta(data)),
            'best_val_loss': 1.0})
        given = {'out_dir': str(out), 'format': format, 'path': str(tmp_path / 'to'), **settings}
        for name, value in given.items():
            monkeypatch.setattr(export, name, value)
        export.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize('name', FORMATS)
def test_every_format_proves_that_it_arrived(run, tmp_path, name):
    printed = run(name)
    assert 'read back by' in printed and 'greedy tokens the same' in printed
    if name == 'llama2c-int8':
        assert 'rounded likewise' in printed and 'validation loss ' in printed
    else:
        assert '64 of 64 greedy tokens' in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'out', 'to']  # nothing left over
    assert printed.replace(' ', '') == run(name).replace(' ', '')  # typed again


@pytest.mark.parametrize('name', [FORMATS[0], FORMATS[1], FORMATS[3]])
@pytest.mark.parametrize('dtype', ['f32', 'q8_0'])
def test_a_wrong_tensor_is_found_and_nothing_kept(run, tmp_path, monkeypatch, name, dtype):
    module = gguf if name == 'gguf' else llama2c
    monkeypatch.setattr(module, 'interleave', lambda w, n_head: w)  # the layout of rotations forgotten
    with pytest.raises(UserError, match=r'logits are .* off, more than .* nothing was kept'):
        run(name, dtype=dtype)
    assert not (tmp_path / 'to').exists()


def test_a_wrong_tokenizer_is_found(run, tmp_path, monkeypatch):
    real = llama2c.pieces_of
    monkeypatch.setattr(llama2c, 'pieces_of', lambda it: real(it)[:270] + real(it)[:269:-1])
    with pytest.raises(UserError, match='nothing was kept'):
        run('llama2c')
    assert not (tmp_path / 'to').exists()


def test_what_is_not_a_number_has_not_arrived(run, tmp_path, monkeypatch):
    monkeypatch.setattr(llama2c.Reader, 'logits', lambda self, ids, positions: np.full(
        (len(positions), self.config.vocab_size), np.nan, np.float32))
    with pytest.raises(UserError, match='nothing was kept'):
        run('llama2c')
    assert not (tmp_path / 'to').exists()


def test_without_the_reader_it_says_so(run, monkeypatch):
    pytest.importorskip('safetensors')
    monkeypatch.setattr(export, 'missing', lambda packages: [p for p in packages if p == 'transformers'])
    assert 'not checked: reading back by transformers needs pip install transformers' in run('hf')
    monkeypatch.setattr(export, 'missing', list)
    with pytest.raises(UserError, match='--format hf needs a package: pip install safetensors'):
        run('hf')


GPT2 = {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'bias': True, 'n_kv_head': 0}


@pytest.mark.parametrize('name, config, settings, message', [
    ('llama2c', GPT2, {}, r'norm layer, position learned, .*tiny_stories.py with --norm rms .*--format hf'),
    ('llama2c', {'qk_norm': True}, {}, r'--qk_norm False.* --format torch'),
    ('llama2c', {'norm_eps': 1e-6}, {}, r'norm_eps 1e-06.*--norm_eps 1e-05.*--format hf or gguf or torch'),
    ('llama2c', {'rope_theta': 500.0}, {}, r'rope_theta 500.0.*--rope_theta 10000.0'),
    ('llama2c-int8', {}, {'group_size': 20}, r'n_embd 32 and mlp_width 96\): type --group_size 16'),
    ('hf', GPT2 | {'position': 'sinusoidal', 'mlp': 'relu'}, {},
     r'gpt2_89m.py with --position learned --mlp gelu, or take this one to --format torch'),
    ('hf', GPT2 | {'n_kv_head': 2}, {}, r'n_kv_head 2\): .*--n_kv_head 4, .*--format torch'),
    ('gguf', GPT2, {'dtype': 'f32'}, r'type --dtype f16'),
    ('gguf', {'n_embd': 40, 'n_kv_head': 4}, {'dtype': 'q8_0'}, r'32 does not divide n_embd 40.*--dtype f16'),
    ('onnx', {}, {}, r"format is 'onnx'; type --format and one of llama2c, "),
    ('', {}, {}, r"format is ''"),
    ('hf', {}, {'ckpt': 'worst'}, r"ckpt is 'worst', not best or last"),
    ('gguf', {}, {'dtype': 'q4'}, r"dtype is 'q4', not f32, f16 or q8_0"),
    ('llama2c-int8', {}, {'group_size': -1}, r'group_size is -1'),
    ('hf', {}, {'path': ''}, r'path is empty: type --path and a folder'),
    ('hf', {}, {'path': __file__}, r'is a file; --format hf writes a folder'),
    ('gguf', {}, {'path': str(ROOT)}, r'is a folder; --format gguf writes a file'),
    ('llama2c', {}, {'path': str(ROOT)}, r'holds other files'),
])
def test_refused_before_any_work(run, tmp_path, monkeypatch, name, config, settings, message):
    monkeypatch.setattr(export, 'compare', None)
    with pytest.raises(SettingError, match=message):
        run(name, config, **settings)
    assert not (tmp_path / 'to').exists()


def test_the_loss_is_measured_on_the_data_of_the_training_alone(run, tmp_path, monkeypatch):
    assert ' -> ' in run('llama2c-int8')
    assert 'not measured' in run('llama2c-int8', changed={'dataset': str(tmp_path)})
    monkeypatch.setattr(export, 'fingerprint', lambda meta: 'of other data')
    assert 'data is not what the model was trained on' in run('llama2c-int8')


def test_as_a_user_types_it(run, tmp_path):
    run('llama2c')
    words = ['--out_dir', tmp_path / 'out', '--format', 'llama2c', '--path', tmp_path / 'again']
    done = subprocess.run([sys.executable, ROOT / 'export.py', *words], capture_output=True, text=True)
    assert done.returncode == 0 and '64 of 64 greedy tokens' in done.stdout and not done.stderr
    assert (tmp_path / 'again/model.bin').read_bytes() == (tmp_path / 'to/model.bin').read_bytes()
    done = subprocess.run([sys.executable, ROOT / 'export.py', *words[:4]], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and '--path' in done.stderr
