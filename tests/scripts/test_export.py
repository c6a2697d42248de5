"""export.py: what it proves, what it refuses, what it leaves behind."""

import re
import sys

import pytest
import torch

import export
from configurator import SettingError, UserError
from core.checkpoint import FILES, load_model
from formats import base, llama2c, load_pretrained
from formats.gguf import GGUF
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from model import GPTConfig
from tests.helpers.models import GPT2_BLOCK, UNTIED, needs_export_packages, random_checkpoint
from tests.helpers.node import needs_node
from tests.helpers.tokenizers import trained_tokenizer

pytestmark = needs_export_packages
SHAPE = {'block_size': 80, 'mlp_width': 64, 'std': 0.2}
OTHER = {'rope_theta': 500.0, 'norm_eps': 0.1}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(format, config, **settings) exports a random model to tmp_path/to; returns what it prints."""
    def run(format, config, encoding='char', ckpt='best', **settings):
        (tmp_path / 'out').mkdir(exist_ok=True)
        checkpoint = random_checkpoint(trained_tokenizer(encoding), **SHAPE | config)
        torch.save(checkpoint, tmp_path / 'out' / FILES[ckpt])
        given = {'out_dir': str(tmp_path / 'out'), 'format': format, 'path': str(tmp_path / 'to')}
        for name, value in (given | {'ckpt': ckpt} | settings).items():
            monkeypatch.setattr(export, name, value)
        export.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize('name, dtype, encoding, config', [
    ('llama2c', 'f32', 'bpe', {}), ('llama2c-int8', 'f32', 'char', {}), ('hf', 'f32', 'gpt2', GPT2_BLOCK),
    ('hf', 'f32', 'bpe', OTHER | {'bias': True}), ('hf', 'f32', 'char', OTHER | GPT2_BLOCK | UNTIED),
    ('gguf', 'f32', 'bpe', OTHER | UNTIED), ('gguf', 'f32', 'char', OTHER | {'bias': True}),
    ('gguf', 'f16', 'bpe', GPT2_BLOCK), ('gguf', 'q8_0', 'char', OTHER | GPT2_BLOCK | UNTIED),
    ('safetensors', 'f32', 'char', {'qk_norm': True}),
    pytest.param('html', 'f32', 'bpe', OTHER | {'qk_norm': True}, marks=needs_node),
    pytest.param('html', 'f32', 'gpt2', GPT2_BLOCK | UNTIED, marks=needs_node)])
def test_every_format_proves_that_it_arrived(run, tmp_path, name, dtype, encoding, config):
    printed = run(name, config, encoding, ckpt='last', dtype=dtype)
    kl, bound, same = re.search(r'divergence (\S+) nats.*most (\S+)\); (\d+) of 64 greedy', printed).groups()
    assert float(kl) * 3 <= float(bound) and (same == '64' or bound == '0.05')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'to']  # nothing left over


def test_what_a_killed_export_left_is_removed(run, tmp_path):
    left = tmp_path / '.to.unfinished'
    for part in left, left / 'export':
        part.mkdir()
        (part / '.lock').touch()
    run('safetensors', {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'to']


def test_a_small_mistake_is_ten_times_the_largest_bound():
    tokenizer, fmt = trained_tokenizer('char'), Llama2c(int8=True)
    checkpoint = random_checkpoint(tokenizer, **SHAPE)
    assert fmt.bound >= max(GGUF('q8_0').bound, GGUF('f16').bound, HuggingFace().bound)
    weights, v = checkpoint['model'], 'blocks.0.attn.v.weight'
    here, there = 'blocks.0.attn.proj.weight', 'blocks.1.attn.proj.weight'
    ids = [*range(260), 261, 260, *range(262, tokenizer.vocab_size)]
    for name, changed in {
            'rotation': base.interleave(GPTConfig(**checkpoint['config']), weights),
            'layers': {here: weights[there], there: weights[here]},
            'two ids': {name: weights[name][ids] for name in ('embedding.weight', 'lm_head.weight')},
            'a row': {v: torch.cat((2 * weights[v][:1], weights[v][1:]))}}.items():
        fmt.model, fmt.tokenizer = load_model(checkpoint | {'model': weights | changed}), tokenizer
        with pytest.raises(UserError, match='nothing was kept') as error:
            export.compare(load_model(checkpoint), tokenizer, fmt)
        assert float(re.search(r'divergence of (\S+) nats', str(error.value))[1]) >= 10 * fmt.bound, name


@pytest.mark.parametrize('place, name, wrong, message', [
    (llama2c, 'pieces_of', lambda it, real=llama2c.pieces_of: real(it)[:270] + real(it)[:269:-1], 'as other'),
    (Llama2c, 'decode', lambda self, ids: 'Once', 'as other'),
    (Llama2c, 'logits', lambda self, ids, positions: torch.full((len(positions), 311), torch.nan), 'of nan')])
def test_what_did_not_arrive_is_not_kept(run, tmp_path, monkeypatch, place, name, wrong, message):
    run('llama2c', {})
    run('llama2c', {})  # in the place of the first
    before = (tmp_path / 'to/model.bin').stat().st_mtime_ns
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(UserError, match=f'{message}.*nothing was kept'):
        run('llama2c', {})
    assert (tmp_path / 'to/model.bin').stat().st_mtime_ns == before and len([*tmp_path.iterdir()]) == 2


def test_without_a_package_it_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    assert 'not checked: reading back by transformers needs pip install transformers' in run('hf', {})
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ModuleNotFoundError, match='safetensors'):  # for errors.run to tell
        load_pretrained(tmp_path / 'to')


@pytest.mark.parametrize('name, config, dtype, message', [
    ('llama2c', GPT2_BLOCK, '', r'norm layer, position learned, .*tiny_stories.py with --norm rms .* hf or'),
    ('llama2c', {'qk_norm': True}, '', r'--qk_norm False.* --format html or safetensors'),
    ('llama2c-int8', {'norm_eps': 1e-6, 'rope_theta': 500.0}, '',
     r'norm_eps 1e-06, rope_theta 500.0\): .*--norm_eps 1e-05 --rope_theta 10000.0, .* hf or gguf or html'),
    ('hf', GPT2_BLOCK | {'position': 'sinusoidal', 'mlp': 'relu'}, '',
     r'gpt2_89m.py with --position learned --mlp gelu, or take this one to --format html or safetensors'),
    ('hf', GPT2_BLOCK | {'n_kv_head': 2}, '', r'n_kv_head 2\): .*--n_kv_head 4, .*--format html or safet'),
    ('gguf', {'mlp': 'relu2'}, '', r'mlp relu2\): .*--mlp swiglu, .*--format html or safetensors'),
    ('gguf', {'mlp_width': 40}, 'q8_0', r'32 does not divide .* mlp_width 40.*--dtype f16'),
    ('gguf', {'n_embd': 40, 'n_kv_head': 4}, 'q8_0', r'32 does not divide n_embd 40')])
def test_refused_before_any_work(run, tmp_path, monkeypatch, name, config, dtype, message):
    monkeypatch.setattr(export, 'compare', None)
    with pytest.raises(SettingError, match=message):
        run(name, config, dtype=dtype or 'f32')
    assert not (tmp_path / 'to').exists()
