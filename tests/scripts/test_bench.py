"""bench.py: what it reads in logs, whose turn it is, and comparisons from end to end."""

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

    def generate(self, idx, n_tokens, temperature, top_k):
        return idx
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


@pytest.fixture
def nanogpt(tmp_path):
    """Return a checkout of the fake nanoGPT."""
    checkout = tmp_path / 'nanoGPT'
    (checkout / 'config').mkdir(parents=True)
    (checkout / 'config' / 'train_shakespeare_char.py').touch()
    (checkout / 'model.py').write_text(FAKE_NANOGPT)
    return checkout


# baselines ----------------------------------------------------------------------

def test_find_kind(nanogpt, tmp_path):
    (tmp_path / 'run.c').touch()
    assert baselines.find_kind(str(nanogpt)) == 'nanoGPT'
    assert baselines.find_kind(str(tmp_path)) == 'llama2.c'
    assert baselines.find_kind('llama.cpp') == 'llama.cpp' and baselines.find_kind('') == ''
    with pytest.raises(SettingError, match='not a checkout of nanoGPT'):
        baselines.find_kind('nowhere')


def test_train_nanogpt_returns_seconds_and_loss_of_its_checkpoint(given, tmp_path):
    """Compiled, as on a GPU: names in its checkpoint have a prefix. Steps 0 and 2 count as the median."""
    printed = ('step 0: train loss 4.2, val loss 4.1\niter 0: loss 4.2, time 9000.00ms, mfu -100.00%\n'
               'iter 1: loss 4.0, time 20.00ms, mfu -100.00%\nstep 2: train loss 3.9, val loss 3.8\n'
               'saving checkpoint to out-bench\niter 2: loss 3.9, time 8000.00ms, mfu -100.00%\n'
               'iter 3: loss 3.9, time 22.00ms, mfu 1.00%\niter 4: loss 3.9, time 24.00ms, mfu 1.00%\n')
    model = torch.nn.Linear(2, 3)
    (tmp_path / 'out-bench').mkdir()
    given(run_script=lambda *_, **__: printed, make_peer_model=lambda peer, shape: model,
          nanogpt_loss=lambda model, ids, size: (model.weight.sum().item(), ids, size))
    for steps, seconds in (5, 0.024 + 0.02 + 0.024 + 0.022 + 0.024), (2, 0.024 + 0.02):
        torch.save({'model': {'_orig_mod.weight': torch.ones(3, 2), '_orig_mod.bias': torch.ones(3)},
                    'model_args': {'block_size': 8, 'bias': False}, 'iter_num': steps},
                   tmp_path / 'out-bench/ckpt.pt')
        assert baselines.train_nanogpt(tmp_path, 'ids', {}) == (pytest.approx(seconds), (6, 'ids', 8))


def test_nanogpt_loss_is_the_mean_over_all_windows():
    torch.manual_seed(0)
    table, ids = torch.randn(10, 10).log_softmax(-1), np.random.default_rng(0).integers(0, 10, 1000)
    losses = [-table[ids[i], ids[i + 1]].item() for i in range(999 // 8 * 8)]
    found = baselines.nanogpt_loss(lambda x, y: (None, -table[x, y].mean()), ids.astype(np.uint16), 8)
    assert found == pytest.approx(np.mean(losses))


def test_nanogpt_is_measured_and_its_checkout_stays_as_it_is(nanogpt):
    shape = dict.fromkeys(baselines.SHAPE_NAMES, 8)
    cpu = torch.device('cpu')
    assert baselines.training_rate(nanogpt, shape, 2, 1, cpu, torch.float32) > 0
    assert baselines.nanogpt_generation_rate(nanogpt, shape, 5, cpu) > 0
    assert sorted(path.name for path in nanogpt.iterdir()) == ['config', 'model.py']


def test_make_characters_gives_the_vocabulary_its_size():
    from data.tokenizer import CharTokenizer

    assert CharTokenizer.train(baselines.make_characters(300)).vocab_size == 300


def test_run_program_says_why_it_failed():
    with pytest.raises(UserError, match=r'ls nowhere failed with status \d: .*No such file'):
        baselines.run_program('ls', 'nowhere')


# bench --------------------------------------------------------------------------

@pytest.mark.parametrize('changes, message', [
    ({'what': 'speed'}, 'what'), ({'what': 'train', 'shape': '1M'}, 'shape'),
    ({'what': 'train', 'repeats': 0}, 'repeats'), ({'what': 'train', 'batch_size': 0}, 'batch_size'),
    ({'what': 'train', 'peer': 'llama.cpp'}, '--what sample'),
    ({'what': 'page', 'peer': 'llama.cpp'}, 'checkout of llama2.c'),
    ({'what': 'time_to_loss'}, 'needs --text'),
    ({'what': 'encodings', 'picture': 'a.bmp'}, 'must end in'),
    ({'what': 'encodings', 'picture': 'nowhere/a.png'}, 'does not exist')])
def test_impossible_settings_are_rejected(given, changes, message):
    given(device='cpu', **changes)
    with pytest.raises(SettingError, match=message):
        bench.main()


@pytest.mark.parametrize('losses, ratio', [((1.88, 1.9), 4), ((1.9, 1.88), 0)])
def test_time_to_loss_counts_if_ours_reaches_the_target(given, tmp_path, losses, ratio):
    """Steps of ours, of 32 * 64 tokens, take 8 seconds (it may have compiled), 2 and 2."""
    (tmp_path / 'data/shakespeare_char').mkdir(parents=True)
    (tmp_path / 'data/shakespeare_char/val.bin').touch()
    calls = []

    def train_ours(folder, **flags):
        calls.append(flags)
        records = [{'tokens_per_s': 2048 / seconds} for seconds in (8, 2, 2)]
        return [*records, {'val_loss': losses[len(calls) - 1]}]

    given(peer=str(tmp_path), text=__file__, device='cpu', repeats=1,
          run_script=lambda *_, **__: '', train_ours=train_ours, train_nanogpt=lambda *_: (24.0, 1.88))
    figures = bench.time_to_loss()
    assert (figures['seconds'], figures['losses'], figures['ratio']) == ([24, 6, 6], [1.88, *losses], ratio)
    steps = bench._RECIPES['cpu']['steps']
    assert [(call['max_iters'], call.get('learning_rate')) for call in calls] == [
        (steps, 0.04), (4 * steps, None)]


def test_sample_takes_turns_and_counts_our_fastest(given, tmp_path, capsys):
    (tmp_path / 'run.c').touch()
    rates = iter(range(12))  # three rounds of four sides
    given(peer=str(tmp_path), device='cpu', repeats=3, our_generation_rate=lambda dtype: next(rates),
          llama2c_generation_rate=lambda peer, folder, model, n_tokens: next(rates))
    medians = {'float32': 4, 'bfloat16': 5, 'int8': 6, 'llama2.c': 7}
    assert bench.sample() == {'tokens_per_s': medians, 'ratio': 6 / 7}
    assert '4 tokens/s  (0 to 8)' in capsys.readouterr().out


@needs_export_packages
def test_sample_next_to_llama_cpp(given):
    shape = dict(zip(bench.SHAPE_NAMES, (2, 2, 32, 64, 300), strict=True))
    given(peer='llama.cpp', device='cpu', repeats=1, _SHAPES={'15M': shape}, _VOCAB_SIZE=300, _N_TOKENS=16)
    figures = bench.sample()
    ours, theirs, ours_greedy, theirs_greedy = figures['tokens_per_s'].values()
    assert min(figures['tokens_per_s'].values()) > 0
    assert figures['ratio'] == ours / theirs and figures['ratio_greedy'] == ours_greedy / theirs_greedy


def test_page_measures_both_vocabularies(given, capsys):
    """The page itself is real; Chromium is not needed."""
    pages = []

    class FakeBrowser:
        def open(self, path):
            pages.append(path.stat().st_size)

        def js(self, expression):
            return '255 tokens, 400 per second'

        def wait(self, expression, seconds):
            pass

        def close(self):
            pass

    shape = dict(zip(bench.SHAPE_NAMES, (1, 2, 32, 64, 300), strict=True))
    given(Browser=FakeBrowser, repeats=2, _SHAPES={'15M': shape}, _VOCAB_SIZE=6000)
    figures = bench.page()
    assert figures['tokens_per_s'] == {'page, 6,000 tokens': 400, 'page, 4,096 tokens': 400}
    assert len(pages) == 4 and pages[0] > pages[1]
    assert [len(seconds) for seconds in figures['first_word'].values()] == [2, 2]
    assert '400 tokens/s' in capsys.readouterr().out


def test_train_compares_with_a_peer(given, nanogpt):
    small = {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'vocab_size': 300}
    given(_SHAPES={'15M': small}, peer=str(nanogpt), repeats=1, steps=1, batch_size=1, device='cpu')
    figures = bench.train()
    rates = figures['tokens_per_s']
    assert figures['ratio'] == pytest.approx(rates['ours'] / rates['nanoGPT, float32'])
    assert figures['ratio_bfloat16'] == pytest.approx(rates['ours'] / rates['nanoGPT, bfloat16'])


def test_evaluations_in_time_repeats_a_run_of_the_wrong_length(given):
    """Step 0 takes 5 seconds, the others one, and half a second in the run that counts the steps."""
    calls = []

    def train_ours(folder, max_iters, **flags):
        calls.append((max_iters, flags['eval_interval'], flags['seed']))
        ends = [5 + i / (2 if len(calls) == 1 else 1) for i in range(max_iters)]
        steps = [{'seconds': end} for end in ends]
        return [{'val_bpb': 1.0, 'seconds': 0.0}, *steps, {'val_bpb': 1.0, 'seconds': ends[-1]}]

    given(seconds=60.0, train_ours=train_ours)
    assert bench.evaluations_in_time('folder', 7) == [{'val_bpb': 1.0, 'seconds': at} for at in (0, 64)]
    assert calls == [(30, 30, 7), (120, 21, 7), (60, 11, 7)]


@needs_export_packages
def test_encodings_are_of_the_same_stories(given, tmp_path, capsys):
    """prepare.py is the real one; a stand-in for train.py takes so many steps per second."""
    keep_gpt2(tmp_path / 'gpt2')
    source = tmp_path / 'stories.jsonl'
    source.write_text(''.join(json.dumps({'text': text + ' \u00e9'}) + '\n' for text in STORIES))
    steps_per_second = {'char': 300, 'bpe': 256, 'gpt2': 64}
    validation = []

    def run_script(*words, **flags):
        if flags['encoding_type'] == 'bpe':
            flags['vocab_size'] = 400  # there is too little text for 4096
        words = [*words, *(f'--{name}={value}' for name, value in flags.items())]
        return script(*words, TIKTOKEN_CACHE_DIR=str(tmp_path / 'gpt2')).out

    def train_ours(folder, max_iters, seed, **flags):
        enc, ids = load_tokenizer(folder), np.fromfile(folder / 'val_00000.bin', '<u2')
        stories = np.split(ids, np.flatnonzero(ids == enc.delimiter))[1:]
        validation.append([enc.decode(story[1:].tolist()) for story in stories])
        model = GPT(GPTConfig(vocab_size=enc.vocab_size, n_layer=1, n_head=1, n_embd=4, block_size=8))
        (folder / 'run').mkdir(exist_ok=True)
        torch.save({'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': enc.state(),
                    'settings': {}, 'iter': max_iters}, folder / 'run' / 'ckpt.pt')
        ends = [(i + 1) / steps_per_second[folder.name] for i in range(max_iters)]
        first = {'iter': 0, 'seconds': 0.0, 'val_bpb': 8 + seed}
        last = {'iter': max_iters, 'seconds': ends[-1], 'val_bpb': 8 / max_iters + seed}
        return [first, *({'seconds': end} for end in ends), last]

    given(run_script=run_script, train_ours=train_ours, text=str(source), repeats=3, seconds=2.0,
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
    tokens = [found[name]['tokens_per_byte'] for name in steps_per_second]
    assert tokens[0] == pytest.approx(1, abs=0.02) and tokens[1] < 0.5 and tokens[2] < 0.5
    assert found['gpt2']['parameters'] - found['bpe']['parameters'] == (50259 - 400) * 4
    assert f'gpt2  {8 / 128 + 1:.4f} bits per byte in 2.0 s, 128 steps' in capsys.readouterr().out
    bench.draw_encodings(found)
    assert (tmp_path / 'encodings.png').read_bytes()[:4] == b'\x89PNG'
