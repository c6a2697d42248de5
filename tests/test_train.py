"""The parts of train.py, and the scripts run as a user runs them: train, resume, sample."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from checkpoint import load_checkpoint, save_checkpoint
from configurator import SettingError, configure
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
TINY = [
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=64',
    '--batch_size=4',
    '--max_iters=12',
    '--eval_interval=6',
    '--log_interval=1',
    '--device=cpu',
    '--dtype=float32',
]


def script(*words, cwd=ROOT, status=0):
    """Run a script as a user does; returns the finished process."""
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture
def settings(monkeypatch):
    return lambda **values: [monkeypatch.setattr(train, key, value) for key, value in values.items()]


def test_the_learning_rate_at_its_edges(settings):
    settings(warmup_iters=4, max_iters=10)
    factors = [train.lr_factor(it) for it in range(12)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0])
    settings(warmup_iters=0)
    assert train.lr_factor(0) == 1 and train.lr_factor(9) == pytest.approx(0.1)
    settings(warmup_iters=20)  # a warm-up longer than the run
    assert all(0 < train.lr_factor(it) <= 1 for it in range(10))


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize(
    'choices', [{}, {'norm': 'layer', 'position': 'learned', 'bias': True, 'tie_embeddings': False}]
)
def test_every_parameter_has_one_optimizer(settings, optimizer, choices):
    settings(optimizer=optimizer)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, **choices))
    optimizers = train.make_optimizers(model)
    held = [p for opt in optimizers for group in opt.param_groups for p in group['params']]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    for opt in optimizers:
        for group in opt.param_groups:
            for p in group['params']:
                assert (group['weight_decay'] > 0) == (p.dim() == 2)
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {
        names[id(p)]
        for opt in optimizers
        if isinstance(opt, torch.optim.Muon)
        for group in opt.param_groups
        for p in group['params']
    }
    matrices = {
        f'blocks.0.{name}.weight'
        for name in ('attn.q', 'attn.k', 'attn.v', 'attn.proj', 'mlp.up', 'mlp.gate', 'mlp.proj')
    }
    assert by_muon == (matrices if optimizer == 'muon' else set())


def test_indivisible_batches_name_the_nearest(settings):
    settings(batch_size=12, gradient_accumulation_steps=1)
    for ranks in 1, 2, 4:
        train.check_settings(ranks)
    with pytest.raises(SettingError, match='8 or 16'):
        train.check_settings(8)
    settings(gradient_accumulation_steps=8)
    train.check_settings(8)


def test_metrics_go_on_from_the_step(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"iter": 0, "loss": 1}\n{"iter": 1, "loss": 2}\n{"iter": 2, "loss": 3}\n{"iter": 3, "lo')
    train.keep_metrics(path, 2)
    assert path.read_text() == '{"iter": 0, "loss": 1}\n{"iter": 1, "loss": 2}\n'
    train.keep_metrics(tmp_path / 'none.jsonl', 0)
    assert (tmp_path / 'none.jsonl').read_text() == ''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A prepared folder and a trained one."""
    folder = tmp_path_factory.mktemp('run')
    lines = [
        f'Once there was a dog number {i}. It ran to the tree. It was happy.\n<|endoftext|>\n'
        for i in range(300)
    ]
    (folder / 'stories.txt').write_text(''.join(lines))
    script('data/tiny_stories/prepare.py', '--source', folder / 'stories.txt', '--out_dir', folder / 'data')
    done = script('train.py', '--dataset', folder / 'data', '--out_dir', folder / 'out', *TINY)
    return folder, done


def metrics(folder):
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != 'tokens_per_s'} for line in lines]


def test_a_run_shows_and_writes_what_it_should(run):
    folder, done = run
    lines = metrics(folder / 'out')
    assert [line['iter'] for line in lines if 'loss' in line] == list(range(12))
    assert [line['iter'] for line in lines if 'val_loss' in line] == [0, 6, 12]
    assert set(lines[0]) == {'iter', 'val_loss', 'val_ppl', 'val_bpb', 'val_acc'}
    assert set(lines[1]) == {'iter', 'loss', 'lr', 'grad_norm'}
    assert lines[-1]['val_loss'] < lines[0]['val_loss']
    assert 'step 12: validation loss' in done.stdout and 'bits per byte' in done.stdout
    assert (folder / 'out' / 'loss.png').stat().st_size > 1000
    checkpoint = load_checkpoint(folder / 'out' / 'ckpt.pt')
    assert checkpoint['iter'] == 12 and checkpoint['settings']['n_embd'] == 32
    assert checkpoint['best_val_loss'] == min(line['val_loss'] for line in lines if 'val_loss' in line)


def test_a_run_is_not_overwritten_unless_told(run):
    folder, _ = run
    words = ['train.py', '--dataset', folder / 'data', '--out_dir', folder / 'out', *TINY]
    done = script(*words, status=2)
    assert done.stderr.count('\n') == 1 and '--overwrite' in done.stderr
    assert load_checkpoint(folder / 'out' / 'ckpt.pt')['iter'] == 12


@pytest.mark.parametrize(
    'extra', [[], ['--dropout=0.2', '--gradient_accumulation_steps=2']], ids=['plain', 'dropout']
)
def test_a_resumed_run_is_the_unbroken_one(run, tmp_path, extra):
    """It is stopped by a signal, wherever that falls: a shorter run would have another schedule."""
    folder, _ = run
    words = ['train.py', '--dataset', folder / 'data', *TINY, '--max_iters=60', '--eval_interval=20', *extra]
    script(*words, '--out_dir', tmp_path / 'whole')
    process = subprocess.Popen(
        [sys.executable, *map(str, words), '--out_dir', tmp_path / 'broken'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith('step 9/'):
            process.terminate()
            break
    _, stderr = process.communicate()
    assert process.returncode == 143 and '--init_from resume' in stderr
    assert 9 <= load_checkpoint(tmp_path / 'broken' / 'ckpt.pt')['iter'] < 60
    script('train.py', '--init_from', 'resume', '--out_dir', tmp_path / 'broken')
    assert metrics(tmp_path / 'broken') == metrics(tmp_path / 'whole')
    whole, broken = (load_checkpoint(tmp_path / name / 'ckpt.pt')['model'] for name in ('whole', 'broken'))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_stories_need_the_checkpoint_alone(run, tmp_path):
    folder, _ = run
    words = [
        ROOT / 'sample.py',
        '--out_dir',
        folder / 'out',
        '--num_samples',
        '4',
        '--max_new_tokens',
        '50',
        '--seed',
        '5',
    ]
    (folder / 'data').rename(tmp_path / 'away')
    try:
        done = script(*words, '--start', 'Once there', cwd=tmp_path)
    finally:
        (tmp_path / 'away').rename(folder / 'data')
    stories = done.stdout.split('\n---\n')
    assert len(stories) == 4 and all(story.startswith('Once there') for story in stories)
    assert script(*words, '--start', 'Once there').stdout == done.stdout
    assert script(*words[:-1], '6', '--start', 'Once there').stdout != done.stdout
    (tmp_path / 'start.txt').write_text('A dog')
    greedy = script(
        *words, '--start', f'FILE:{tmp_path}/start.txt', '--temperature', '0', '--ckpt', 'last'
    ).stdout
    # only print's own line feed goes: a story that was cut may end in white space
    assert len(set(greedy.removesuffix('\n').split('\n---\n'))) == 1 and greedy.startswith('A dog')


def test_another_model_or_other_data_is_not_gone_on_with(run, tmp_path):
    folder, _ = run
    resume = ['train.py', '--init_from', 'resume', '--out_dir', folder / 'out']
    assert 'n_embd is 64, but' in script(*resume, '--n_embd', '64', status=2).stderr
    (tmp_path / 'stories.txt').write_text('One story.<|endoftext|>Another story.<|endoftext|>' * 50)
    script(
        'data/tiny_stories/prepare.py',
        '--source',
        tmp_path / 'stories.txt',
        '--out_dir',
        tmp_path / 'data',
        '--tokenizer',
        folder / 'out',
    )
    assert 'fingerprint' in script(*resume, '--dataset', tmp_path / 'data', status=2).stderr


@pytest.mark.parametrize(
    'config, vocab_size, millions',
    [('quickstart.py', 1536, 1.0), ('tiny_stories.py', 350, 25.5), ('tiny_stories.py', 4096, 27.4),
     ('tiny_stories.py', 50259, 51.0), ('char_1m.json', 350, 0.97), ('gpt2_89m.py', 50259, 89.3),
     ('infill.py', 4096, 15.7), ('quickstart_infill.py', 1536, 1.0)],
)
def test_configs_make_models_as_large_as_they_say(settings, config, vocab_size, millions):
    chosen = dict(vars(train))
    configure(chosen, [str(ROOT / 'config' / config)])
    settings(**{name: chosen[name] for name in train.settings(vars(train))})
    train.check_settings(1)
    with torch.device('meta'):
        assert GPT(train.make_config(vocab_size)).n_params() / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_model_is_tuned_from_where_it_stands(run, tmp_path):
    folder, _ = run
    words = [
        'train.py',
        '--init_from',
        folder / 'out',
        '--out_dir',
        tmp_path / 'tuned',
        '--max_iters=2',
        '--device=cpu',
        '--dtype=float32',
        '--batch_size=4',
    ]
    script(*words, '--dataset', folder / 'data')
    best = min(line['val_loss'] for line in metrics(folder / 'out') if 'val_loss' in line)
    assert metrics(tmp_path / 'tuned')[0]['val_loss'] == pytest.approx(best, rel=1e-6)
    (tmp_path / 'stories.txt').write_text('Other letters: xyz.<|endoftext|>A story.<|endoftext|>' * 50)
    script(
        'data/tiny_stories/prepare.py', '--source', tmp_path / 'stories.txt', '--out_dir', tmp_path / 'data'
    )
    done = script(*words, '--dataset', tmp_path / 'data', '--overwrite', status=1)
    assert f'--tokenizer {folder}/out' in done.stderr
    assert (
        'n_layer is 3'
        in script(*words, '--dataset', folder / 'data', '--overwrite', '--n_layer=3', status=2).stderr
    )


# What main() makes of its parts, on a model of two layers that learns nothing


@pytest.fixture
def quick(start, monkeypatch):
    """quick(losses, *flags) trains with these losses in place of evaluations, drawing and telling nothing."""
    monkeypatch.setattr(train, 'plot_losses', lambda folder: None)
    monkeypatch.setattr(train, 'sample_story', lambda *_: '')

    def run(losses, *flags):
        coming = iter(losses)
        monkeypatch.setattr(train, 'evaluate', lambda *_: {
            'val_loss': next(coming), 'val_ppl': 1.0, 'val_bpb': 1.0, 'val_acc': 0.0})
        start('--n_layer=1', '--block_size=16', '--optimizer=adamw', *flags)

    return run


def test_the_best_checkpoint_is_that_of_the_lowest_loss(quick, tmp_path):
    quick([3.0, 2.0, 4.0], '--max_iters=2', '--eval_interval=1')
    saved = {name: load_checkpoint(tmp_path / 'out' / name) for name in ('best.pt', 'ckpt.pt')}
    assert [saved['best.pt'][key] for key in ('iter', 'best_val_loss')] == [1, 2.0]
    assert [saved['ckpt.pt'][key] for key in ('iter', 'best_val_loss')] == [2, 2.0]
    quick([2.5], '--init_from=resume', '--max_iters=2')  # lower than the last, but not the lowest
    assert load_checkpoint(tmp_path / 'out' / 'best.pt')['iter'] == 1


def test_resuming_keeps_the_scale_of_the_loss_and_takes_a_given_rate(quick, tmp_path):
    quick([3.0, 3.0], '--max_iters=2', '--eval_interval=2', '--dtype=float16', '--learning_rate=0.5')
    path = tmp_path / 'out' / 'ckpt.pt'
    checkpoint = load_checkpoint(path)
    checkpoint['scaler']['scale'] = 1024.0
    save_checkpoint(path, checkpoint)
    quick([3.0, 3.0], '--init_from=resume', '--max_iters=3', '--eval_interval=3', '--dtype=float16',
          '--learning_rate=0.25', '--warmup_iters=0')
    assert load_checkpoint(path)['scaler']['scale'] == 1024.0
    assert metrics(tmp_path / 'out')[-2]['lr'] == pytest.approx(0.25 / 3)  # the last of three steps


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('grad_clip', [0.0, 0.01])
def test_gradients_are_clipped_at_their_own_size(quick, tmp_path, monkeypatch, dtype, grad_clip):
    """float16 scales them up, and clipping comes after they are scaled back."""
    norms, updates = [], []

    def measured(parameters, largest):
        parameters = list(parameters)
        norms.append((clip(parameters, math.inf).item(), largest))
        return clip(parameters, largest)

    def updated(opt, *_, **__):
        grads = [p.grad for group in opt.param_groups for p in group['params']]
        updates.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', measured)
    monkeypatch.setattr(torch.optim.AdamW, 'step', updated)
    quick([3.0, 3.0], '--max_iters=1', f'--dtype={dtype}', f'--grad_clip={grad_clip}')
    (norm, largest), = norms
    assert 0.1 < norm < 10 and largest == (grad_clip or math.inf)
    assert updates[0] == pytest.approx(min(norm, largest), rel=1e-3)
    assert metrics(tmp_path / 'out')[1]['grad_norm'] == pytest.approx(norm, rel=1e-4)


def test_each_step_and_rank_has_its_own_dropout(quick, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, 'manual_seed', lambda number: seeds.append(number) or seed(number))
    quick([3.0, 3.0], '--max_iters=3', '--eval_interval=3')
    assert [train.step_seed(it, 0) for it in range(3)] == seeds[-3:]
    assert len({train.step_seed(it, rank) for it in range(4) for rank in range(4)}) == 16


def test_the_rates_and_betas_of_the_optimizers(settings):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8))
    settings(optimizer='muon', learning_rate=0.0, beta1=0.8, beta2=0.7, weight_decay=0.3)
    muon, adamw = train.make_optimizers(model)
    assert {group['peak_lr'] for group in muon.param_groups} == {0.02}  # twice AdamW's
    assert {group['peak_lr'] for group in adamw.param_groups} == {0.01}
    assert {group['betas'] for group in adamw.param_groups} == {(0.8, 0.7)}
    assert {group['weight_decay'] for group in muon.param_groups} == {0.3}
    settings(optimizer='adamw', learning_rate=0.0)
    assert {group['peak_lr'] for group in train.make_optimizers(model)[0].param_groups} == {1e-3}
    settings(optimizer='muon', learning_rate=0.5)
    muon, adamw = train.make_optimizers(model)
    assert muon.param_groups[0]['peak_lr'] == 1.0 and adamw.param_groups[0]['peak_lr'] == 0.5


def test_a_rank_computes_on_its_own_device(start, monkeypatch):
    asked = []

    def choose(name, local_rank=0):
        asked.append(local_rank)
        raise SettingError('enough')

    monkeypatch.setattr(train, 'choose_device', choose)
    monkeypatch.setenv('LOCAL_RANK', '3')
    with pytest.raises(SettingError, match='enough'):
        start()
    assert asked == [3]
