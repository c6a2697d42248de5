"""bench.py: what it reads out of logs, whose turn it is, and a comparison from end to end."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from configurator import SettingError, UserError
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from tests.helpers.models import needs_export_packages
from tests.helpers.scripts import STORIES, script
from tests.helpers.tokenizers import keep_gpt2
from tools import baselines, bench

# A nanoGPT that trains as a peer must, and does no more
FAKE_NANOGPT = '''
from types import SimpleNamespace as GPTConfig
import torch

class GPT(torch.nn.Embedding):
    def __init__(self, config):
        super().__init__(config.vocab_size, 4)

    def forward(self, x, y):
        logits = super().forward(x) @ self.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
'''


@pytest.fixture
def given(monkeypatch):
    """given(name=value) sets settings and functions of bench.py and of baselines.py."""
    def given(**values):
        for key, value in values.items():
            places = [module for module in (bench, baselines) if hasattr(module, key)]
            assert places, key
            for module in places:
                monkeypatch.setattr(module, key, value)

    return given


def test_nanogpt_s_seconds_and_loss_are_those_of_its_checkpoint(given, tmp_path):
    """Compiled, as on a GPU: the names in it have a prefix, and step 0 is not counted as slow as it was."""
    printed = ('step 0: train loss 4.2, val loss 4.1\niter 0: loss 4.2, time 9000.00ms, mfu -100.00%\n'
               'iter 1: loss 4.0, time 20.00ms, mfu -100.00%\nstep 2: train loss 3.9, val loss 3.8\n'
               'saving checkpoint to out-bench\niter 2: loss 3.9, time 8000.00ms, mfu -100.00%\n'
               'iter 3: loss 3.9, time 22.00ms, mfu 1.00%\niter 4: loss 3.9, time 24.00ms, mfu 1.00%\n')
    # in the place of 9 and 8 seconds the median of all five
    model = torch.nn.Linear(2, 3)
    (tmp_path / 'out-bench').mkdir()
    given(script=lambda *_, **__: printed, peer_model=lambda peer, **sizes: model,
          nanogpt_loss=lambda model, ids, size: (model.weight.sum().item(), ids, size))
    for steps, seconds in (5, 0.024 + 0.02 + 0.024 + 0.022 + 0.024), (2, 0.024 + 0.02):
        torch.save({'model': {'_orig_mod.weight': torch.ones(3, 2), '_orig_mod.bias': torch.ones(3)},
                    'model_args': {'block_size': 8, 'bias': False}, 'iter_num': steps},
                   tmp_path / 'out-bench/ckpt.pt')
        assert baselines.train_nanogpt(tmp_path, 'ids', {}) == (pytest.approx(seconds), (6, 'ids', 8))


def test_the_loss_of_nanogpt_is_the_mean_over_all_windows():
    torch.manual_seed(0)
    table, ids = torch.randn(10, 10).log_softmax(-1), np.random.default_rng(0).integers(0, 10, 1000)
    losses = [-table[ids[i], ids[i + 1]].item() for i in range(999 // 8 * 8)]
    found = baselines.nanogpt_loss(lambda x, y: (None, -table[x, y].mean()), ids.astype(np.uint16), 8)
    assert found == pytest.approx(np.mean(losses))


@pytest.mark.parametrize('losses, ratio', [((1.88, 1.9), 4), ((1.9, 1.88), 0)])
def test_the_ratio_of_times_counts_if_ours_reaches_the_target(given, tmp_path, losses, ratio):
    """Ours, of 32 x 64 tokens a step, tells of steps of 8 (it may have compiled), 2 and 2 seconds."""
    (tmp_path / 'data/shakespeare_char').mkdir(parents=True)
    (tmp_path / 'data/shakespeare_char/val.bin').touch()
    calls = []

    def trained(folder, **values):
        calls.append(values)
        steps = [{'tokens_per_s': 2048 / seconds} for seconds in (8, 2, 2)]
        return [*steps, {'val_loss': losses[len(calls) - 1]}]

    given(peer=str(tmp_path), text=__file__, device='cpu', repeats=1,
          script=lambda *_, **__: '', train_script=trained, train_nanogpt=lambda *_: (24.0, 1.88))
    figures = bench.time_to_loss()
    assert (figures['seconds'], figures['losses'], figures['ratio']) == ([24, 6, 6], [1.88, *losses], ratio)
    steps = bench._RECIPES['cpu'][2]
    assert [(call['max_iters'], call.get('learning_rate')) for call in calls] == [
        (steps, 0.04), (4 * steps, None)]


def test_sides_take_turns_and_our_fastest_counts(given, tmp_path, capsys):
    (tmp_path / 'run.c').touch()
    rates = iter(range(12))  # three rounds of four
    given(peer=str(tmp_path), device='cpu', repeats=3, we_write=lambda dtype: next(rates),
          llama2c_writes=lambda peer, folder, model, n_tokens: next(rates))
    medians = {'float32': 4, 'bfloat16': 5, 'int8': 6, 'llama2.c': 7}
    assert bench.sample() == {'tokens_per_s': medians, 'ratio': 6 / 7}
    assert '4 tokens/s  (0 to 8)' in capsys.readouterr().out


@needs_export_packages
def test_llama_cpp_writes_the_same_model_in_turn_with_us(given, monkeypatch):
    shape = dict(zip(bench.SIZES, (2, 2, 32, 64, 300), strict=True))
    given(peer='llama.cpp', device='cpu', repeats=1, _SHAPES={'15M': shape}, _VOCAB_SIZE=300, _TOKENS=16)
    figures = bench.sample()
    ours, theirs, greedy, theirs_greedy = figures['tokens_per_s'].values()
    assert min(figures['tokens_per_s'].values()) > 0
    assert (figures['ratio'], figures['ratio_greedy']) == (ours / theirs, greedy / theirs_greedy)
    given(what='train')
    with pytest.raises(SettingError, match='--what sample'):
        bench.main()


def test_training_beside_a_peer(tmp_path):
    checkout = tmp_path / 'nanoGPT'
    (checkout / 'config').mkdir(parents=True)
    (checkout / 'config' / 'train_shakespeare_char.py').touch()
    (checkout / 'model.py').write_text(FAKE_NANOGPT)
    done = script('bench.py', '--what=train', '--peer', checkout, '--repeats=1', '--steps=1',
                  '--batch_size=1', '--device=cpu', '--json', tmp_path / 'train.json', OMP_NUM_THREADS='1')
    figures = json.loads((tmp_path / 'train.json').read_text())
    rates = figures['tokens_per_s']
    assert figures['ratio'] == pytest.approx(rates['ours'] / rates['nanoGPT, float32'])
    assert f"ratio: {figures['ratio']:.2f}" in done.out
    assert sorted(path.name for path in checkout.iterdir()) == ['config', 'model.py']


def test_a_run_of_an_encoding_takes_its_seconds(given):
    """Step 0 takes 5 seconds, the others one, and half of it in the run that counts them out."""
    calls = []

    def trained(folder, max_iters, **values):
        calls.append((max_iters, values['eval_interval'], values['seed']))
        ends = [5 + i / (2 if len(calls) == 1 else 1) for i in range(max_iters)]
        evaluated = {'val_bpb': 1.0}
        return [evaluated | {'seconds': 0.0}, *({'seconds': end} for end in ends),
                evaluated | {'seconds': ends[-1]}]

    given(seconds=60.0, train_script=trained)
    assert bench.evaluations('folder', 7) == [{'val_bpb': 1.0, 'seconds': at} for at in (0, 64)]
    assert calls == [(30, 30, 7), (120, 21, 7), (60, 11, 7)]


@needs_export_packages
def test_encodings_are_of_the_same_stories(given, tmp_path, capsys):
    """prepare.py is the real one; in the place of train.py there is one with these rates."""
    keep_gpt2(tmp_path / 'gpt2')
    source = tmp_path / 'stories.jsonl'
    source.write_text(''.join(json.dumps({'text': text + ' \u00e9'}) + '\n' for text in STORIES))
    validation, rates = [], {'char': 300, 'bpe': 256, 'gpt2': 64}  # steps a second

    def run(*words, **flags):
        more = ['--vocab_size=400'] * (flags['encoding_type'] == 'bpe')  # there is not text for 4096
        words += *more, *(f'--{name}={value}' for name, value in flags.items())
        return script(*words, TIKTOKEN_CACHE_DIR=str(tmp_path / 'gpt2')).out

    def trained(folder, max_iters, **values):
        enc, ids = load_tokenizer(folder), np.fromfile(folder / 'val_00000.bin', '<u2')
        stories = np.split(ids, np.flatnonzero(ids == enc.delimiter))[1:]
        validation.append([enc.decode(story[1:].tolist()) for story in stories])
        model = GPT(GPTConfig(vocab_size=enc.vocab_size, n_layer=1, n_head=1, n_embd=4, block_size=8))
        (folder / 'run').mkdir(exist_ok=True)
        torch.save({'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': enc.state(),
                    'settings': {}, 'iter': max_iters}, folder / 'run' / 'ckpt.pt')
        ends = [(i + 1) / rates[folder.name] for i in range(max_iters)]
        bits = [8 + values['seed'], 8 / max_iters + values['seed']]
        evaluated = [{'iter': i, 'seconds': at, 'val_bpb': bpb}
                     for i, at, bpb in zip((0, max_iters), (0.0, ends[-1]), bits, strict=True)]
        return [evaluated[0], *({'seconds': end} for end in ends), evaluated[1]]

    given(script=run, train_script=trained, text=str(source), repeats=3, seconds=2.0,
          picture=str(tmp_path / 'encodings.png'))
    found = bench.encodings()['encodings']
    size = sum(len(story.encode()) for story in validation[0])
    assert 20 < len(validation[0]) < 45 and all(stories == validation[0] for stories in validation)
    for name, steps in ('char', 600), ('bpe', 512), ('gpt2', 128):
        figures = found[name]
        assert figures['bytes'] == size and figures['iter'] == steps
        assert figures['seconds'] == pytest.approx(2.0) and figures['val_bpb'] == 8 / steps + 1
        curve = np.array([(0, 8), (2, 8 / steps)])
        assert np.allclose(figures['curves'], [curve + np.array([0, seed]) for seed in range(3)])
    tokens = [found[name]['tokens_per_byte'] for name in rates]
    assert tokens[0] == pytest.approx(1, abs=0.02) and tokens[1] < 0.5 and tokens[2] < 0.5
    assert found['gpt2']['parameters'] - found['bpe']['parameters'] == (50259 - 400) * 4
    assert f'gpt2  {8 / 128 + 1:.4f} bits a byte in 2.0 s, 128 steps' in capsys.readouterr().out
    bench.draw(found)
    assert (tmp_path / 'encodings.png').read_bytes()[:4] == b'\x89PNG'


def test_a_program_that_fails_says_why():
    with pytest.raises(UserError, match=r'ls nowhere failed with status \d: .*No such file'):
        baselines.command('ls', 'nowhere')
