"""train.py: its functions, and runs as a user starts them. tests/reference has its figures."""

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import train
from configurator import SettingError, UserError
from core.checkpoint import load_checkpoint
from core.distributed import MeansOverRanks, Ranks
from core.kernels import FastAttention, JoinedAttention
from data.shards import Split
from data.tokenizer import CharTokenizer
from model import GPT, Attention, GPTConfig
from tests.helpers.models import small_model
from tests.helpers.scripts import SETTINGS, metrics, rank_variables, script


@pytest.fixture
def given(monkeypatch):
    """given(name=value) sets settings of train.py."""
    def set_settings(**values):
        for name, value in values.items():
            monkeypatch.setattr(train, name, value)
    return set_settings


@pytest.fixture
def train_small(data, tmp_path):
    """train_small(*flags, status=0) trains a model of one layer in tmp_path/out, without loss.png."""
    def run(*flags, status=0):
        words = [*SETTINGS, '--n_layer=1', '--block_size=16', '--optimizer=adamw', '--eval_interval=99',
                 f'--dataset={data}', f'--out_dir={tmp_path}/out']
        if not any(flag.startswith('--max_epochs') for flag in flags):
            words.append('--max_iters=3')
        return script('train.py', *words, *flags, status=status)
    return run


# functions


def test_lr_factor_warms_up_and_decays_to_zero(given):
    given(warmup_iters=4)
    factors = [train.lr_factor(step, 10) for step in range(12)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0])
    given(warmup_iters=0)
    assert train.lr_factor(0, 10) == 1 and train.lr_factor(9, 10) == pytest.approx(0.1)
    given(warmup_iters=20)  # a warmup longer than the run
    assert all(0 < train.lr_factor(step, 10) <= 1 for step in range(10))


@pytest.mark.parametrize('device, kernels', [
    ('cpu', FastAttention), ('cuda', JoinedAttention), ('mps', Attention)])
def test_speed_up_puts_the_kernels_of_the_device_in_place(given, device, kernels):
    given(compile='False')
    run = SimpleNamespace(model=small_model())
    train_model, _ = train.speed_up(run.model, run, None, torch.device(device), None)
    assert train_model is run.model and type(run.model.blocks[0].attn) is kernels


def test_dropout_seeds_differ_by_seed_step_and_rank(given):
    drawn = set()
    for seed in 1, 2:
        given(seed=seed)
        for step in 1, 2:
            for rank in 0, 1:
                train.seed_dropout(step, rank)
                drawn.add(torch.rand(1).item())
    assert len(drawn) == 8
    train.seed_dropout(2, 1)
    assert torch.rand(1).item() in drawn


@pytest.mark.parametrize('batch, steps, advice', [
    (8, 3, '--batch_size 4 --gradient_accumulation_steps 6'), (1, 4, '--block_size'),
    (9, 1, '--batch_size 3 --gradient_accumulation_steps 3'),
    (7, 1, '--batch_size 1 --gradient_accumulation_steps 7')])
def test_suggest_less_memory_keeps_the_batches(given, batch, steps, advice):
    given(batch_size=batch, gradient_accumulation_steps=steps)
    assert advice in train.suggest_less_memory()


def test_suggest_less_memory_counts_the_sequences_of_a_rank(given, monkeypatch):
    for name, value in rank_variables(0, 8).items():
        monkeypatch.setenv(name, value)
    given(batch_size=32, gradient_accumulation_steps=1)  # a rank has 4 of these at once
    assert '--batch_size 2 --gradient_accumulation_steps 16' in train.suggest_less_memory()


@pytest.mark.parametrize('letter, position, changes, error', [
    ('a', 'rope', {}, None),
    ('a', 'rope', {'block_size': 8, 'dropout': 0.1}, None),
    ('', 'rope', {}, None),  # a model without a tokenizer is taken to have ours
    ('a', 'rope', {'block_size': 17}, 'block_size is 17'),
    ('a', 'learned', {'block_size': 8}, 'block_size is 8'),
    ('a', 'rope', {'n_layer': 3}, 'n_layer is 3'),
    ('b', 'rope', {}, '--tokenizer there')])
def test_load_weights_refuses_models_that_do_not_suit(given, monkeypatch, letter, position, changes, error):
    shape = {'block_size': 16, 'vocab_size': 9, 'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'position': position}
    theirs, ours = GPT(GPTConfig(**shape)), GPT(GPTConfig(**shape | changes))
    pretrained = {'config': asdict(theirs.config), 'model': theirs.state_dict(),
                  'tokenizer': CharTokenizer.train([letter]).state() if letter else None}
    monkeypatch.setattr(train, 'load_pretrained', {'there': pretrained}.get)
    given(init_from='there', dataset='mine')
    if error:
        with pytest.raises(UserError, match=error):
            train.load_weights(ours, CharTokenizer.train(['a']))
    else:
        train.load_weights(ours, CharTokenizer.train(['a']))
    assert torch.equal(ours.embedding.weight, theirs.embedding.weight) == (not error)


@pytest.mark.parametrize('changes, message', [
    ({'optimizer': 'adamw'}, 'optimizer is muon, but out/ckpt.pt has adamw'),
    ({'n_head': 4}, 'n_head is 2, but out/ckpt.pt has 4'),
    ({'iter': 11}, 'max_iters asks for 10 steps, but out/ckpt.pt has already done 11'),
    ({'fingerprint': 'f' * 64}, "data in mine is not what this run was trained on .* the run's ffffffff")])
def test_check_resumable_names_what_differs(given, data, changes, message):
    given(optimizer='muon', out_dir='out', dataset='mine')
    meta = Split(data, 'train').meta
    config = GPTConfig(n_head=2, n_embd=8)
    checkpoint = {'iter': 10, 'config': asdict(config), 'settings': {'optimizer': 'muon'},
                  'fingerprint': train.fingerprint(meta)}
    train.check_resumable(checkpoint, config, meta, max_steps=10)
    if 'optimizer' in changes:
        checkpoint['settings'] = changes
    elif 'n_head' in changes:
        checkpoint['config'] |= changes
    else:
        checkpoint |= changes
    with pytest.raises(SettingError, match=message):
        train.check_resumable(checkpoint, config, meta, max_steps=10)


def test_ranks_compare_the_checkpoints_that_they_resume(given, data, tmp_path, monkeypatch):
    run = SimpleNamespace(settings={'seed': 1, 'out_dir': 'out'}, step=5, meta=Split(data, 'train').meta,
                          folder=SimpleNamespace(path=tmp_path, resume=True))
    (tmp_path / 'ckpt.pt').touch()
    alone = train.facts_to_compare(run, torch.float32)
    assert alone['seed'] == 1 and alone['step'] == 5 and 'out_dir' not in alone and 'ckpt.pt' not in alone
    monkeypatch.setattr(train, 'get_ranks', lambda: Ranks(0, 0, 2))
    files = {'ckpt.pt': 'a file with sha256 e3b0c44298fc', 'best.pt': 'missing'}
    assert train.facts_to_compare(run, torch.float32) == alone | files


# runs


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
    files = {path.name for path in out.iterdir()}
    assert files == {'.lock', 'best.pt', 'ckpt.pt', 'loss.png', 'metrics.jsonl', 'run.json', 'samples.jsonl',
                     'tokenizer.json'}
    checkpoint = load_checkpoint(out / 'ckpt.pt')
    assert checkpoint['iter'] == 12 and checkpoint['settings']['n_embd'] == 32
    assert checkpoint['best_val_loss'] == min(line['val_loss'] for line in lines if 'val_loss' in line)


def test_a_step_that_is_checked_later_is_the_same(start, given, tmp_path):
    """As on a GPU, over evaluations, saved copies and the end; only the seconds differ."""
    results = []
    for devices in (), ('cpu',):
        given(_ASYNCHRONOUS=devices)
        start('--overwrite', '--max_iters=11', '--eval_interval=4', '--save_interval=3', '--dropout=0.1')
        copies = [load_checkpoint(tmp_path / 'out' / name) for name in ('ckpt_9.pt', 'best.pt', 'ckpt.pt')]
        assert [copy['iter'] for copy in copies][::2] == [9, 11]
        weights = torch.cat([weight.flatten() for copy in copies for weight in copy['model'].values()])
        results.append((metrics(tmp_path / 'out'), weights.tolist()))
    assert results[0] == results[1]


def test_a_gpu_has_the_next_gradients_to_compute_before_a_step_is_checked(start, given, monkeypatch):
    events = []

    def watch(owner, name, event):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            events.append(event)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(torch.Tensor, 'backward', 'gradients')
    watch(MeansOverRanks, 'read', 'check')
    watch(train, 'clip_and_step', 'update')
    watch(train, 'evaluate', 'evaluate')
    given(_ASYNCHRONOUS=('cpu',))
    start('--max_iters=3', '--eval_interval=9', '--gradient_accumulation_steps=1')
    assert ' '.join(events) == ('evaluate gradients update gradients check update gradients check update '
                                'check evaluate')


@pytest.mark.parametrize('n_ranks, rows', [(1, 4), (4, 2)])
def test_all_that_is_compiled_gets_one_shape(start, monkeypatch, n_ranks, rows):
    """Another shape, or another number of threads, would be compiled anew in the middle of the run."""
    calls = []

    def compile(function):
        def compiled(x, y):
            calls.append((function, x.shape, y.shape))
            return function(x, y)
        return compiled

    monkeypatch.setattr(torch, 'compile', compile)
    monkeypatch.delenv('OMP_NUM_THREADS')
    monkeypatch.setattr(torch, 'set_num_threads', None)  # not called
    monkeypatch.setattr(train, 'get_ranks', lambda: Ranks(0, 0, n_ranks))  # alone, with the share of a rank
    monkeypatch.setattr(train, 'join_ranks', lambda model, *_: model)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda _: None)
    start('--compile=True')
    model, score = {function: None for function, *_ in calls}
    one_shape = (rows, 64), (rows, 64)
    assert {*calls} == {(model, *one_shape), (score, *one_shape)}
    assert len(calls) > 20


def test_a_run_ends_after_its_epochs(train_small, data, tmp_path):
    tokens = Split(data, 'train').n_tokens  # a window has 16, a step 8 windows
    steps = math.ceil(0.15 * ((tokens - 1) // 16) / 8)
    done = train_small('--max_epochs=0.15')
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] == steps > 10
    assert f'; {steps} steps by max_epochs are 0.1' in done.out
    refused = train_small('--init_from=resume', '--max_epochs=0.001', status=2)
    assert f'asks for 1 steps, but {tmp_path}/out/ckpt.pt has already done {steps}' in refused.err
    train_small('--init_from=resume', f'--max_iters={steps + 1}')
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] == steps + 1


def test_the_best_loss_is_measured_again_if_it_was_measured_on_less(train_small, tmp_path):
    """With --eval_iters 1 the loss is that of one batch: it must not be compared with the whole split's."""
    train_small('--eval_iters=1', '--max_iters=6', '--eval_interval=2', '--learning_rate=0.01')
    before = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert before['best_iter'] == 6 and before['measured_on'].startswith('4 of ')
    done = train_small('--init_from=resume', '--eval_iters=0', '--max_iters=8', '--eval_interval=2',
                       '--learning_rate=1e-30')  # the weights stay what they are
    after = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    whole = [line['val_loss'] for line in metrics(tmp_path / 'out') if 'val_loss' in line][-1]
    assert after['best_val_loss'] == pytest.approx(whole, rel=1e-6)
    assert after['best_val_loss'] != before['best_val_loss']
    count = after['measured_on'].split()
    assert count[0] == count[2] and after['best_iter'] == 6
    assert (f"best.pt (step 6) has a validation loss of {whole:.4f} on {after['measured_on']}; the "
            f"{before['best_val_loss']:.4f} so far was on {before['measured_on']}") in done.out
    same = train_small('--init_from=resume', '--max_iters=8', '--eval_iters=0')
    assert 'best.pt (step' not in same.out


def test_going_back_to_an_earlier_checkpoint_keeps_the_best_and_says_what_is_later(train_small, tmp_path):
    out = tmp_path / 'out'
    train_small('--max_iters=6', '--eval_interval=2', '--save_interval=2', '--learning_rate=0.01')
    best = load_checkpoint(out / 'best.pt')
    assert best['iter'] == 6
    (out / 'ckpt_2.pt').replace(out / 'ckpt.pt')
    done = train_small('--init_from=resume', '--max_iters=3', '--learning_rate=1e-30')
    assert (f"later than ckpt.pt, which is of step 2: best.pt (step 6, validation loss "
            f"{best['best_val_loss']:.4f}), ckpt_4.pt, ckpt_6.pt; best.pt stays") in done.out
    assert 'metrics.jsonl and samples.jsonl go on at step 2: their later lines are removed' in done.out
    assert load_checkpoint(out / 'best.pt')['iter'] == 6
    assert load_checkpoint(out / 'ckpt.pt')['best_iter'] == 6


def test_a_resumed_run_says_if_best_pt_is_another_or_gone(train_small, tmp_path):
    out = tmp_path / 'out'
    train_small('--max_iters=4', '--eval_interval=2', '--save_interval=2', '--learning_rate=0.01')
    (out / 'best.pt').unlink()
    done = train_small('--init_from=resume', '--max_iters=4')
    assert 'best.pt is missing: the next evaluation makes a new one\n' in done.out
    loss = load_checkpoint(out / 'best.pt')['best_val_loss']

    earlier = load_checkpoint(out / 'ckpt_2.pt')
    (out / 'best.pt').unlink()
    torch.save(earlier | {'measured_on': '1 window \x1b[2J'}, out / 'best.pt')
    done = train_small('--init_from=resume', '--max_iters=4')
    assert 'best.pt is of step 2, and no longer of step 4 as ckpt.pt has it' in done.out
    assert (f"best.pt (step 2) has a validation loss of {earlier['best_val_loss']:.4f} on "
            f"{earlier['measured_on']}; the {earlier['best_val_loss']:.4f} so far was on 1 window \ufffd[2J\n"
            ) in done.out
    best = load_checkpoint(out / 'best.pt')
    assert best['iter'] == 4 and best['best_val_loss'] == pytest.approx(loss, rel=1e-6)

    (out / 'best.pt').unlink()
    (out / 'best.pt').write_text('half')
    done = train_small('--init_from=resume', '--max_iters=4')
    assert 'best.pt is damaged: it is now best.pt.damaged-' in done.out
    assert load_checkpoint(out / 'best.pt')['iter'] == 4


def test_a_resumed_run_says_if_its_data_comes_in_another_order(train_small):
    train_small()
    same = train_small('--init_from=resume', '--batch_size=2', '--gradient_accumulation_steps=4',
                       '--overwrite')
    assert 'another order' not in same.out
    assert 'overwrite has no effect, as the run is resumed\n' in same.out
    other = train_small('--init_from=resume', '--batch_size=3')
    assert ('the run had 8 sequences per step and seed 1337, and now has 6 sequences per step and seed 1337: '
            'from here on the data comes in another order') in other.out
    other = train_small('--init_from=resume', '--seed=5')
    assert ('the run had 6 sequences per step and seed 1337, and now has 8 sequences per step and seed 5'
            ) in other.out


def test_a_resumed_run_saves_although_windows_replaces_no_mapped_file(data, tmp_path):
    words = [*SETTINGS, f'--dataset={data}', '--eval_interval=1', '--save_interval=1']
    like_windows = {'LIKE_WINDOWS': '1'}
    out = tmp_path / 'out'
    script('train.py', *words, '--max_iters=1', f'--out_dir={out}', **like_windows)
    script('train.py', '--init_from=resume', '--max_iters=3', f'--out_dir={out}', **like_windows)
    assert load_checkpoint(out / 'ckpt.pt')['iter'] == 3
    script('train.py', *words, '--max_iters=1', f'--init_from={out}', f'--out_dir={out}', '--overwrite',
           **like_windows)
    assert load_checkpoint(out / 'ckpt.pt')['iter'] == 1


def test_a_kept_checkpoint_resumes_to_the_same_run(train_small, tmp_path):
    flags = '--max_iters=5', '--eval_interval=4', '--save_interval=2', '--seed=5', '--dropout=0.2'
    train_small(*flags)
    out = tmp_path / 'out'
    assert {path.name for path in out.glob('*.pt')} == {
        'ckpt_0.pt', 'ckpt_2.pt', 'ckpt_4.pt', 'ckpt.pt', 'best.pt'}
    for name, step in ('ckpt_0.pt', 0), ('ckpt_2.pt', 2), ('ckpt_4.pt', 4), ('ckpt.pt', 5):
        assert load_checkpoint(out / name)['iter'] == step
    before, weights = metrics(out), load_checkpoint(out / 'ckpt.pt')['model']
    weights = {name: weight.clone() for name, weight in weights.items()}
    (out / 'ckpt_2.pt').replace(out / 'ckpt.pt')
    train_small('--init_from=resume', *flags)
    assert metrics(out) == before
    for name, weight in load_checkpoint(out / 'ckpt.pt')['model'].items():
        assert torch.equal(weight, weights[name])
    train_small('--max_iters=1', '--overwrite')
    assert not list(out.glob('ckpt_*.pt'))  # they were another run's


def test_a_resumed_run_keeps_its_state_and_takes_the_settings_given_now(train_small, tmp_path):
    path = tmp_path / 'out' / 'ckpt.pt'
    train_small('--max_iters=2', '--dtype=float16', '--learning_rate=0.5')
    checkpoint = load_checkpoint(path)
    checkpoint['scaler']['scale'] = 1024.0
    path.unlink()  # its weights are still mapped from the old file
    torch.save(checkpoint, path)
    train_small('--init_from=resume', '--max_iters=3', '--dtype=float16', '--learning_rate=0.25',
                '--warmup_iters=0', '--weight_decay=0.5', '--log_interval=2')
    checkpoint = load_checkpoint(path)
    assert checkpoint['scaler']['scale'] == 1024.0
    assert checkpoint['optimizers'][0]['state'][0]['step'] == 3
    assert checkpoint['optimizers'][0]['param_groups'][0]['weight_decay'] == 0.5
    assert metrics(tmp_path / 'out')[-2]['lr'] == pytest.approx(0.25 / 3)  # the last of three steps


@pytest.mark.parametrize('before, after', [
    ('float16', 'bfloat16'), ('bfloat16', 'float16'), ('float32', 'float16'), ('float16', 'float32')])
def test_a_run_resumes_in_another_dtype(train_small, tmp_path, before, after):
    train_small('--max_iters=1', f'--dtype={before}')
    train_small('--init_from=resume', '--max_iters=2', f'--dtype={after}')
    checkpoint = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter'] == 2 and bool(checkpoint['scaler']) == (after == 'float16')


def test_a_run_whose_loss_is_not_finite_stops_and_saves_nothing_more(train_small, tmp_path):
    train_small('--max_iters=2', '--eval_interval=1')
    flags = '--max_iters=9', '--learning_rate=1e30', '--warmup_iters=0'
    done = train_small('--init_from=resume', *flags, status=1)
    assert 'step 3: the loss is' in done.err or 'not finite' in done.err
    way_back = f'cp {tmp_path}/out/best.pt {tmp_path}/out/ckpt.pt && python train.py --init_from resume'
    assert way_back in done.err
    assert done.err.count('\n') == 1
    for weight in load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['model'].values():
        assert weight.isfinite().all()


def test_a_pretrained_model_is_tuned_from_where_it_stands(run, data, tmp_path):
    script('train.py', '--init_from', run[0], '--dataset', data, '--out_dir', tmp_path / 'tuned',
           '--max_iters=2', '--device=cpu', '--dtype=float32', '--batch_size=4')
    best = min(line['val_loss'] for line in metrics(run[0]) if 'val_loss' in line)
    assert metrics(tmp_path / 'tuned')[0]['val_loss'] == pytest.approx(best, rel=1e-6)


def test_verify_data_finds_a_changed_token(train_small, data, tmp_path):
    copy = tmp_path / 'copy'
    copy.mkdir()
    for path in data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = copy / 'train_00000.bin'
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    refused = train_small(f'--dataset={copy}', '--verify_data', status=1)
    assert 'does not have the sha256' in refused.err
    train_small(f'--dataset={copy}', '--max_iters=1')
