"""The parts of train.py, and runs as a user starts them."""

import contextlib
import copy
import math
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from configurator import SettingError, UserError
from core.checkpoint import load_checkpoint
from data.files import write_atomically
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig
from tests.helpers.scripts import metrics, script


@pytest.fixture
def given(monkeypatch):
    """given(name=value) sets settings of train.py."""
    return lambda **values: [monkeypatch.setattr(train, key, value) for key, value in values.items()]


def test_the_learning_rate_at_its_edges(given):
    given(warmup_iters=4)
    factors = [train.lr_factor(it, 10) for it in range(12)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0])
    given(warmup_iters=0)
    assert train.lr_factor(0, 10) == 1 and train.lr_factor(9, 10) == pytest.approx(0.1)
    given(warmup_iters=20)  # a warm-up longer than the run
    assert all(0 < train.lr_factor(it, 10) <= 1 for it in range(10))


@pytest.mark.parametrize('optimizer, rate, peaks', [
    ('muon', 0.0, [0.02, 0.01, 0.01]), ('muon', 0.5, [1.0, 0.5, 0.5]), ('adamw', 0.0, [1e-3, 1e-3])])
@pytest.mark.parametrize('choices', [
    {}, {'norm': 'layer', 'position': 'learned', 'bias': True, 'tie_embeddings': False}])
def test_every_parameter_has_one_optimizer(optimizer, rate, peaks, choices):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, **choices))
    optimizers = train.make_optimizers(model, optimizer, rate, 0.3, (0.8, 0.7))
    groups = [group for opt in optimizers for group in opt.param_groups]
    held = [(id(p), group['weight_decay']) for group in groups for p in group['params']]
    assert sorted(held) == sorted((id(p), 0.3 if p.dim() == 2 else 0.0) for p in model.parameters())
    in_blocks = [id(p) for p in model.blocks.parameters() if p.dim() == 2]
    assert ([id(p) for p in groups[0]['params']] == in_blocks) == (optimizer == 'muon')
    assert [group['peak_lr'] for group in groups] == peaks
    assert {group['betas'] for group in groups[-2:]} == {(0.8, 0.7)}


# What main() makes of its parts: a model of one layer, whose evaluations are given


class Watched(torch.nn.Module):
    """In the place of DDP. `passes`: of each forward pass, whether gradients are exchanged, and the seed."""

    def __init__(self, model, device):
        super().__init__()
        self.model, self.passes = model, []

    def forward(self, x, y):
        assert self.model.training
        self.passes.append((self.require_backward_grad_sync, torch.initial_seed()))
        return self.model(x, y)


@pytest.fixture
def quick(start, monkeypatch):
    """quick(losses, *flags) trains with these losses in place of evaluations; returns the Watched."""
    monkeypatch.setattr(train, 'sample_story', lambda *_: '')

    def run(losses, *flags):
        coming, joined = iter(losses), []
        monkeypatch.setattr(train, 'evaluate', lambda *_, **__: {'val_loss': next(coming)})
        monkeypatch.setattr(train, 'join_ranks', lambda *args: joined.append(Watched(*args)) or joined[0])
        start('--n_layer=1', '--block_size=16', '--optimizer=adamw', *flags)
        return joined[0]

    return run


def test_the_best_checkpoint_is_that_of_the_lowest_loss(quick, tmp_path):
    quick([3.0, 2.0, 4.0], '--max_iters=2', '--eval_interval=1')
    saved = {name: load_checkpoint(tmp_path / 'out' / name) for name in ('best.pt', 'ckpt.pt')}
    assert [saved['best.pt'][key] for key in ('iter', 'best_val_loss')] == [1, 2.0]
    assert [saved['ckpt.pt'][key] for key in ('iter', 'best_val_loss')] == [2, 2.0]
    quick([2.5], '--init_from=resume', '--max_iters=2')  # lower than the last, but not the lowest
    assert load_checkpoint(tmp_path / 'out' / 'best.pt')['iter'] == 1


def test_a_run_ends_by_epochs(quick, data, tmp_path, capsys):
    tokens = train.Split(data, 'train').n_tokens  # a window has 16, a step 8 windows
    steps = math.ceil(0.15 * ((tokens - 1) // 16) / 8)
    quick([3.0, 3.0], '--max_epochs=0.15', '--max_iters=3', '--eval_interval=99')
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] == steps > 10
    assert f'; {steps} steps by max_epochs are 0.1' in capsys.readouterr().out
    rates = [line['lr'] for line in metrics(tmp_path / 'out') if 'lr' in line]
    assert rates == pytest.approx([1e-3 * train.lr_factor(it, steps) for it in range(steps)])
    with pytest.raises(SettingError, match=f'1 steps are asked for, but .* has {steps}'):
        quick([3.0], '--init_from=resume', '--max_epochs=0.001')


def test_a_run_ends_when_its_patience_does(quick, tmp_path, capsys):
    """Counted from the best evaluation, over an interruption, and not by a run that needs none."""
    quick([3.0, 2.0, 2.5, 2.0], '--max_iters=3', '--eval_interval=1', '--patience=3')
    quick([2.1, 2.4], '--init_from=resume', '--max_iters=9', '--eval_interval=1')  # step 3 once more
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] == 4
    assert 'done at step 4/9: best validation loss 2.0000 at step 1;' in capsys.readouterr().out
    quick([2.1, 1.9, 2.0], '--init_from=resume', '--max_iters=6', '--eval_interval=1', '--patience=0')
    assert load_checkpoint(tmp_path / 'out' / 'best.pt')['iter'] == 5


def test_checkpoints_are_kept_by_step(quick, tmp_path):
    flags = '--max_iters=5', '--eval_interval=4', '--save_interval=2', '--seed=5'
    quick([3.0, 2.0, 2.5], *flags)
    names = 'ckpt_0.pt', 'ckpt_2.pt', 'ckpt_4.pt', 'ckpt.pt', 'best.pt'
    assert {path.name for path in (tmp_path / 'out').glob('*.pt')} == {*names}
    kept = [load_checkpoint(tmp_path / 'out' / name) for name in names]
    assert [saved['iter'] for saved in kept] == [0, 2, 4, 5, 4]
    (tmp_path / 'out' / 'ckpt_2.pt').replace(tmp_path / 'out' / 'ckpt.pt')
    before = metrics(tmp_path / 'out')
    quick([2.0, 2.5], '--init_from=resume', '--max_iters=5')  # from a kept one the run is the same again
    assert metrics(tmp_path / 'out') == before
    quick([3.0, 3.0], '--max_iters=1', '--overwrite')
    assert not [*(tmp_path / 'out').glob('ckpt_*.pt')]  # they were another run's


def test_resuming_keeps_the_state_and_takes_what_is_given_now(quick, tmp_path):
    quick([3.0, 3.0], '--max_iters=2', '--eval_interval=2', '--dtype=float16', '--learning_rate=0.5')
    path = tmp_path / 'out' / 'ckpt.pt'
    checkpoint = load_checkpoint(path)
    checkpoint['scaler']['scale'] = 1024.0
    write_atomically(path, partial(torch.save, checkpoint))  # whose weights are still a map of the old file
    quick([3.0, 3.0], '--init_from=resume', '--max_iters=3', '--eval_interval=3', '--dtype=float16',
          '--learning_rate=0.25', '--warmup_iters=0', '--weight_decay=0.5', '--log_interval=2')
    checkpoint = load_checkpoint(path)
    assert checkpoint['scaler']['scale'] == 1024.0
    assert checkpoint['optimizers'][0]['state'][0]['step'] == 3
    assert checkpoint['optimizers'][0]['param_groups'][0]['weight_decay'] == 0.5
    assert metrics(tmp_path / 'out')[-2]['lr'] == pytest.approx(0.25 / 3)  # the last of three steps


@pytest.mark.parametrize('flags', [
    ('--grad_clip=0',), ('--grad_clip=0.01',), ('--grad_clip=0', '--dtype=float16'),
    ('--grad_clip=0.01', '--dtype=float16'), ('--compile=True',)])
def test_a_step_takes_the_clipped_mean_gradient(quick, data, tmp_path, monkeypatch, capsys, flags):
    """Of all sequences of the step, whatever the number of micro-batches: against one pass over them all.
    float16 scales gradients up, and clipping comes after they are scaled back; the model is one graph."""
    found, compile = {}, partial(torch.compile, backend='aot_eager', fullgraph=True)

    def compiled(function):
        if not isinstance(function, Watched):
            return compile(function)
        function.model = compile(function.model)  # DDP is around the graph
        return function

    monkeypatch.setattr(torch, 'compile', compiled)
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda opt, *_, **__: found.update(
        {p: p.grad.clone() for group in opt.param_groups for p in group['params']}))
    watched = quick([3.0, 3.0], '--max_iters=1', '--batch_size=2', '--gradient_accumulation_steps=4', *flags)
    trial = [False] * ('--compile=True' in flags)  # each rank for itself
    assert [exchanged for exchanged, _ in watched.passes] == [*trial, False, False, False, True]
    assert 'torch.compile failed' not in capsys.readouterr().err
    batches = train.Batches(train.Split(data, 'train'), 16, 8, 1, seed=train.seed)
    with torch.compiler.set_stance('force_eager'):
        watched.model(*train.to_device(batches(0)[0], torch.device('cpu'))).backward()
    norm = torch.nn.utils.clip_grad_norm_(watched.model.parameters(), train.grad_clip or math.inf)
    assert metrics(tmp_path / 'out')[1]['grad_norm'] == pytest.approx(norm.item(), rel=1e-3)
    for p in watched.model.parameters():
        assert (found[p] - p.grad).norm() < 1e-3 * min(norm, train.grad_clip or norm)


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('which', [0, 1])  # Muon, AdamW
def test_an_overflow_changes_nothing_but_the_scale(quick, tmp_path, monkeypatch, value, which):
    """In one gradient of one optimizer: clipping spreads it to those of the other."""
    optimizers, states = [], []
    make, clip = train.make_optimizers, torch.nn.utils.clip_grad_norm_

    def planted(parameters, limit):
        parameters = list(parameters)
        if len(states) == 1:
            optimizers[which].param_groups[0]['params'][0].grad.view(-1)[3] = value
        states.append(copy.deepcopy((parameters, [opt.state_dict()['state'] for opt in optimizers])))
        return clip(parameters, limit)

    monkeypatch.setattr(train, 'make_optimizers', lambda *args: optimizers.extend(make(*args)) or optimizers)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', planted)
    quick([3.0, 3.0], '--max_iters=4', '--dtype=float16', '--optimizer=muon')
    overflow, after, later = states[1:]
    torch.testing.assert_close(after, overflow, rtol=0, atol=0)
    assert not torch.equal(later[0][0], after[0][0])
    scaler = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['scaler']
    assert (scaler['scale'], scaler['_growth_tracker']) == (2.0**15, 2)  # two good steps since
    assert [line['iter'] for line in metrics(tmp_path / 'out')] == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize('flag, message', [
    ('--max_iters=1', '1 steps are asked for, but .*ckpt.pt has 2'),
    ('--optimizer=muon', 'optimizer is muon, but .*ckpt.pt has adamw')])
def test_a_run_does_not_go_on_as_another(quick, flag, message):
    quick([3.0, 3.0], '--max_iters=2')
    with pytest.raises(SettingError, match=message):
        quick([3.0, 3.0], '--init_from=resume', '--max_iters=2', flag)


@pytest.mark.parametrize('before, after', [
    ('float16', 'bfloat16'), ('bfloat16', 'float16'), ('float32', 'float16'), ('float16', 'float32')])
def test_a_run_goes_on_in_another_dtype(quick, tmp_path, before, after):
    quick([3.0, 3.0], '--max_iters=1', f'--dtype={before}')
    quick([3.0, 3.0], '--init_from=resume', '--max_iters=2', f'--dtype={after}')
    checkpoint = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter'] == 2 and bool(checkpoint['scaler']) == (after == 'float16')


class Reads(TorchDispatchMode):
    """Counts what reads a lone number from a tensor: the processor would wait there for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize('dtype, reads', [('float32', 0), ('float16', 1)])
def test_a_step_waits_for_its_figures_alone(quick, dtype, reads):
    counts = []
    for steps in 2, 7:
        with Reads() as found:
            quick([3.0, 3.0], f'--max_iters={steps}', '--eval_interval=9', '--optimizer=muon',
                  f'--dtype={dtype}', '--overwrite')
        counts.append(found.count)
    assert counts[1] - counts[0] == 5 * reads


@pytest.mark.parametrize('failing', ['the model', 'its score'])
def test_a_failed_compile_is_told_once_and_leaves_nothing(given, monkeypatch, capsys, failing):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=20, block_size=4))
    arguments = model, model, *torch.ones(2, 2, 4, dtype=torch.long), contextlib.nullcontext()

    def compile(function):
        return raises if (function is model) == (failing == 'the model') else function

    def raises(*_):
        raise error

    given(compile='True')
    monkeypatch.setattr(torch, 'compile', compile)
    error = ValueError('no compiler')
    for rank, told in ('0', 'torch.compile failed (ValueError); going on without it\n'), ('1', ''):
        monkeypatch.setenv('RANK', rank)
        trained, scored = train.compiled(*arguments)
        assert trained is model and scored.func is train.score and model.training
        assert all(p.grad is None for p in model.parameters())
        assert capsys.readouterr().err == told
    error = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
    with pytest.raises(torch.OutOfMemoryError):  # plain, it would take more
        train.compiled(*arguments)


@pytest.mark.parametrize('batch, steps, advice', [
    (8, 3, '--batch_size 4 --gradient_accumulation_steps 6'), (1, 4, '--block_size'),
    (9, 1, '--batch_size 3 --gradient_accumulation_steps 3'),
    (7, 1, '--batch_size 1 --gradient_accumulation_steps 7')])
def test_the_same_batches_in_less_memory(given, monkeypatch, batch, steps, advice):
    given(batch_size=batch, gradient_accumulation_steps=steps)
    assert advice in train.less_memory()
    monkeypatch.setenv('WORLD_SIZE', '8')
    given(batch_size=32, gradient_accumulation_steps=1)  # of these a rank has 4 at once
    assert '--batch_size 2 --gradient_accumulation_steps 16' in train.less_memory()


def test_a_rank_has_its_own_device_and_each_of_its_steps_its_own_dropout(quick, monkeypatch):
    seeds, devices, batches, choose = set(), [], train.Batches, train.choose_device
    monkeypatch.setattr(train, 'Batches', lambda *args: batches(*args[:-2]))  # those of a lone rank
    monkeypatch.setattr(train, 'choose_device', lambda *args: devices.append(args) or choose(*args))
    for rank in '01':
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('LOCAL_RANK', rank * 2)
        watched = quick([3.0, 3.0], '--max_iters=3', '--eval_interval=3', '--overwrite')
        seeds |= {seed for _, seed in watched.passes}
    assert len(seeds) == 6 and devices == [('cpu', 0, 1), ('cpu', 11, 1)]


# As a user starts it


def test_a_run_shows_and_writes_what_it_should(run):
    out, done = run
    lines = metrics(out)
    assert [line['iter'] for line in lines if 'loss' in line] == list(range(12))
    assert [line['iter'] for line in lines if 'val_loss' in line] == [0, 6, 12]
    assert {*lines[0]} == {'iter', 'val_loss', 'val_ppl', 'val_bpb', 'val_acc', 'train_loss', 'train_acc'}
    assert {*lines[1]} == {'iter', 'loss', 'lr', 'grad_norm'}
    assert lines[-1]['val_loss'] < lines[0]['val_loss']
    assert f"step 12: val_loss {lines[-1]['val_loss']:.4f}, val_ppl" in done.out
    assert (out / 'loss.png').stat().st_size > 1000
    checkpoint = load_checkpoint(out / 'ckpt.pt')
    assert checkpoint['iter'] == 12 and checkpoint['settings']['n_embd'] == 32
    assert checkpoint['best_val_loss'] == min(line['val_loss'] for line in lines if 'val_loss' in line)


def test_a_model_is_tuned_from_where_it_stands(run, data, tmp_path):
    script('train.py', '--init_from', run[0], '--dataset', data, '--out_dir', tmp_path / 'tuned',
           '--max_iters=2', '--device=cpu', '--dtype=float32', '--batch_size=4')
    best = min(line['val_loss'] for line in metrics(run[0]) if 'val_loss' in line)
    assert metrics(tmp_path / 'tuned')[0]['val_loss'] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize('letter, position, changes, error', [
    ('a', 'rope', {'block_size': 8, 'dropout': 0.1}, None), ('a', 'rope', {'block_size': 17}, 'size is 17'),
    ('a', 'learned', {'block_size': 8}, 'size is 8'), ('a', 'rope', {'n_layer': 3}, 'n_layer is 3'),
    ('b', 'rope', {}, '--tokenizer scratch'), ('', 'rope', {}, None)])
def test_what_can_be_tuned(letter, position, changes, error):
    """Without a tokenizer beside it the model is taken to have ours."""
    shape = {'block_size': 16, 'vocab_size': 9, 'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'position': position}
    theirs, ours = GPT(GPTConfig(**shape)), GPT(GPTConfig(**shape | changes))
    pretrained = {'config': asdict(theirs.config), 'model': theirs.state_dict(),
                  'tokenizer': CharTokenizer.train([letter]).state() if letter else None}
    with pytest.raises(UserError, match=error) if error else contextlib.nullcontext():
        train.begin_from(pretrained, ours, CharTokenizer.train(['a']))
    assert torch.equal(ours.embedding.weight, theirs.embedding.weight) == (not error)
