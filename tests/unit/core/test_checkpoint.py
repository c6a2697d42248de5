"""Checkpoints: whole or not at all, and nothing in them runs. The folder and the state of a run."""

import contextlib
import json
import math
import os
import resource
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from configurator import SettingError, UserError
from core import checkpoint
from core.checkpoint import (
    DivergedError,
    Run,
    RunFolder,
    check_size,
    describe_file,
    load_checkpoint,
    load_model,
    parameter_shapes,
)
from core.optim import make_optimizers
from data.files import write_atomically
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig
from tests.helpers.models import CASES
from tests.helpers.scripts import rank_variables

TOKENIZER = CharTokenizer.train(['abc'])
STATE = {
    'model': {'w': torch.arange(100_000.0)},
    'config': {'n_layer': 2},
    'tokenizer': {'files': {'a': b'\0\xff'}},
    'settings': {'seed': 1},
    'iter': 7,
}
SMALL = {'n_layer': 2, 'n_head': 2, 'n_embd': 8, 'vocab_size': 11}


def save(path, state):
    write_atomically(path, partial(torch.save, state))


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_checkpoint_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: calls.append(
        (os.readlink(f'/proc/self/fd/{fd}'), os.fstat(fd).st_size)))
    monkeypatch.setattr(os, 'replace', lambda old, new: (calls.append('renamed'), replace(old, new)))
    save(tmp_path / 'ckpt.pt', STATE)
    size = os.path.getsize(tmp_path / 'ckpt.pt')
    assert calls[:2] == [(f'{tmp_path}/.ckpt.pt.unfinished', size), 'renamed']
    assert calls[2][0] == str(tmp_path)


def test_load_checkpoint_returns_what_was_saved(tmp_path):
    save(tmp_path / 'ckpt.pt', STATE)
    loaded = load_checkpoint(tmp_path / 'ckpt.pt')
    assert torch.equal(loaded.pop('model')['w'], STATE['model']['w'])
    assert loaded == {key: value for key, value in STATE.items() if key != 'model'}


@pytest.mark.parametrize('room', [1000, 200_000])
def test_a_full_disk_leaves_the_old_file(tmp_path, room):
    save(tmp_path / 'ckpt.pt', STATE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r'write .*ckpt.pt \(File too large\): free some space .* whole$'):
            save(tmp_path / 'ckpt.pt', STATE | {'iter': 8})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ['ckpt.pt'] and load_checkpoint(tmp_path / 'ckpt.pt')['iter'] == 7


class Payload:
    def __reduce__(self):
        return os.system, ('touch ran',)


def test_a_pickle_payload_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(STATE | {'model': Payload()}, 'ckpt.pt')
    with pytest.raises(UserError, match='was not run'):
        load_checkpoint('ckpt.pt')
    assert os.listdir() == ['ckpt.pt']


def truncate(data):
    return data[:len(data) // 2]


def flip_a_bit(data):
    weights = data.index(STATE['model']['w'].numpy().tobytes())
    return data[:weights] + bytes([data[weights] ^ 4]) + data[weights + 1:]


@pytest.mark.parametrize('damage', [truncate, flip_a_bit])
def test_a_damaged_checkpoint_is_named_and_so_is_a_whole_one(tmp_path, damage):
    last, best = files = tmp_path / 'ckpt.pt', tmp_path / 'best.pt'
    for file in files:
        save(file, STATE)
    whole = last.read_bytes()
    for file, advice in (last, r'type cp .*best.pt .*ckpt.pt$'), (best, r'--ckpt last, or .*--init_from$'):
        file.write_bytes(damage(whole))
        with pytest.raises(UserError, match=rf'{file.name} is damaged.* is whole: .*{advice}'):
            load_checkpoint(file)
        file.write_bytes(whole)
    copy = tmp_path / 'copy.pt'
    for file in copy, best, last:
        file.write_bytes(damage(whole))
        if file != best:  # nobody knows what the copy was, and in the end no file is whole
            with pytest.raises(UserError, match=rf'{file.name} is damaged[^;]*$'):
                load_checkpoint(file)


def test_load_checkpoint_rejects_foreign_files(tmp_path):
    with pytest.raises(UserError, match='train first'):
        load_checkpoint(tmp_path / 'ckpt.pt')
    incomplete = [{key: value for key, value in STATE.items() if key != name} for name in STATE]
    wrong = [STATE | {'iter': -1}, STATE | {'iter': '7'}, STATE | {'iter': 10**5000},
             STATE | {'best_val_loss': math.nan}, STATE | {'optimizers': {}}]
    for other in *incomplete, *wrong, [1, 2], torch.zeros(3):
        torch.save(other, tmp_path / 'ckpt.pt')
        with pytest.raises(UserError, match='not a checkpoint of this project'):
            load_checkpoint(tmp_path / 'ckpt.pt')


def nested(n):
    """Return a list that holds itself 2**n times, in little memory."""
    value = 'x'
    for _ in range(n):
        value = [value, value]
    return value


@pytest.mark.parametrize('name, key, value, message', [
    ('config', 'norm', nested(28), r'norm is \[\['),
    ('config', 'n_layer', '2', "n_layer is '2'"),
    ('config', 'colour', 2, "its config has 'colour'"),
    ('settings', 'out_dir', ['out'], r"its setting 'out_dir' is \['out'\]"),
    ('settings', 'dataset', 5, "its setting 'dataset' is 5"),
    ('settings', 'beta1', nested(28), "its setting 'beta1'"),
    ('settings', 7, 7, 'its setting 7')])
def test_load_checkpoint_rejects_values_that_are_not_plain(tmp_path, name, key, value, message):
    torch.save(STATE | {name: STATE[name] | {key: value}}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / 'ckpt.pt')


def test_load_checkpoint_rejects_compressed_and_overlapping_records(tmp_path):
    """torch would map the compressed bytes as weights."""
    save(tmp_path / 'good.pt', STATE)
    with zipfile.ZipFile(tmp_path / 'good.pt') as good, \
            zipfile.ZipFile(tmp_path / 'ckpt.pt', 'w', zipfile.ZIP_DEFLATED) as compressed:
        for name in good.namelist():
            compressed.writestr(name, good.read(name))
    with pytest.raises(UserError, match=r'data\.pkl is compressed'):
        load_checkpoint(tmp_path / 'ckpt.pt')
    with zipfile.ZipFile(tmp_path / 'ckpt.pt', 'w') as archive:
        archive.writestr('a', b'x' * 1000)
        archive.filelist += [archive.filelist[0]] * 9
    with pytest.raises(UserError, match='records of 10,000'):
        load_checkpoint(tmp_path / 'ckpt.pt')


# models


@pytest.mark.parametrize('choices', [*CASES, {'tie_embeddings': False}, {'n_kv_head': 2, 'qk_norm': True}],
                         ids=str)
def test_parameter_shapes_are_those_of_the_model(choices):
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=32, **choices))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert parameter_shapes(model.config) == expected


@pytest.mark.parametrize('claim', [
    {'n_layer': 10**7}, {'n_embd': 10**6, 'n_head': 10}, {'vocab_size': 10**12}, {'block_size': 10**12},
    {'block_size': 32.5}, {'n_layer': '2'}, {'n_layer': 3}, {'mlp_width': 10**9}, {'another': 1},
    {'bias': 1}, {'norm': 3}, {'norm': ['rms']}])
def test_a_config_that_claims_another_size_takes_no_memory(claim):
    weights = GPT(GPTConfig(**SMALL)).state_dict()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match='do not make a model of this project'):
        load_model({'config': SMALL | claim, 'model': weights})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize('name, value, reason', [
    ('norm.weight', None, 'norm.weight is missing'),
    ('norm.weight', torch.zeros(9), r'norm.weight has the shape \[9\], but the config makes it \[8\]'),
    ('norm.weight', torch.zeros(8, dtype=torch.int64), 'not a tensor of real numbers'),
    ('norm.weight', [0.0] * 8, 'not a tensor of real numbers')])
def test_check_size_names_the_weight_that_does_not_fit(name, value, reason):
    model = GPT(GPTConfig(**SMALL))
    weights = dict(model.state_dict())
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    with pytest.raises(ValueError, match=reason):
        check_size(model.config, weights)


def test_load_model_loads_every_weight_and_does_not_drop():
    config = SMALL | {'dropout': 0.5}
    original = GPT(GPTConfig(**config))
    model = load_model({'config': config, 'model': original.state_dict()})
    assert not model.training
    for ours, theirs in zip(model.state_dict().items(), original.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


# the folder of a run


def begin(folder, step=0, tokenizer=TOKENIZER):
    folder.begin(STATE | {'iter': step}, tokenizer)
    folder.lock.lock.release()  # the next one is of this process, too


@pytest.mark.parametrize('restarts, has_checkpoint, resume, overwrite, resumes', [
    ('3', True, False, False, True), ('3', True, False, True, True), ('3', False, False, False, False),
    ('0', True, False, True, False), ('0', True, True, False, True)])
def test_a_run_that_torchrun_restarts_is_resumed(tmp_path, monkeypatch, restarts, has_checkpoint, resume,
                                                 overwrite, resumes):
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', restarts)
    if has_checkpoint:
        save(tmp_path / 'ckpt.pt', STATE)
    assert RunFolder(tmp_path, resume, overwrite).resume == resumes


@pytest.mark.parametrize('name', [
    'ckpt.pt', 'best.pt', 'metrics.jsonl', 'samples.jsonl', 'run.json', 'loss.png', 'ckpt_5.pt'])
def test_a_folder_that_holds_another_run_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(SettingError, match=rf'holds another run \({name}\)'):
        RunFolder(tmp_path)


def test_files_of_the_user_stay(tmp_path):
    """Only names that are exactly ours are removed."""
    users = {'thesis.tmp', 'ckpt.pt.tmp', 'ckpt_of_a_friend.pt', '.my_best.pt.unfinished', 'notes.txt'}
    for name in *users, '.ckpt_3.pt.unfinished', '.ckpt.pt.unfinished', '.best.pt.unfinished', 'ckpt_9.pt':
        (tmp_path / name).touch()
    begin(RunFolder(tmp_path, overwrite=True))
    assert {*os.listdir(tmp_path)} == users | {'.lock', 'ckpt.pt', 'tokenizer.json'}


def test_records_of_a_resumed_run_end_before_its_step_and_skip_bad_lines(tmp_path):
    lines = ['{"iter": 0, "loss": 1}', 'no line', '[1]', '{"loss": 3}', '{"iter": 1, "loss": 2}',
             '{"iter": 0, "loss": "high"}', '{"iter": 0, "loss": NaN}', '{"iter": 0, "loss": null}',
             '{"iter": 0, "loss": 1' + 400 * '0' + '}', '{"iter": 0, "lr": 1e308}', '{"iter": 1e308}',
             '{"iter": 1.0}', '{"iter": true}', '{"iter": 0, "loss": true}', '{"iter": 9223372036854775808}',
             '{"iter": 0, "story": 5}', '[' * 9**5, '{"iter": 2}',
             '{"it']
    (tmp_path / 'metrics.jsonl').write_bytes('\n'.join(lines).encode() + b'\xe9')
    folder = RunFolder(tmp_path, resume=True)
    begin(folder, step=2)
    assert (tmp_path / 'metrics.jsonl').read_text() == '\n'.join(lines[:5]) + '\n'
    assert folder.last_recorded_step() == 1
    folder.record(iter=2, loss=0.5)
    assert folder.last_recorded_step() == 2
    assert list(folder.records()) == [{'iter': step, 'loss': loss} for step, loss in enumerate((1, 2, 0.5))]
    assert {*os.listdir(tmp_path)} == {'.lock', 'metrics.jsonl', 'tokenizer.json'}  # no new checkpoint


@pytest.mark.parametrize('step', [0, 1, 500, 9999, 20_000])
def test_records_of_a_long_run_are_cut_from_their_end(tmp_path, step):
    lines = [json.dumps({'iter': i, 'loss': 2.5}) + '\n' for i in range(10_000)]  # 280 KB
    (tmp_path / 'metrics.jsonl').write_text(''.join(lines))
    folder = RunFolder(tmp_path, resume=True)
    assert folder.last_recorded_step() == 9999
    folder.cut_records(step)
    assert (tmp_path / 'metrics.jsonl').read_text() == ''.join(lines[:step])


def test_the_best_checkpoint_is_saved_before_the_last_which_says_how_good_it_was(tmp_path, monkeypatch):
    """A run that is killed between the two resumes from the step before and finds that best again."""
    saved, torch_save, replace = [], torch.save, os.replace
    monkeypatch.setattr(os, 'replace', lambda old, new: (saved.append(new.name), replace(old, new)))
    monkeypatch.setattr(torch, 'save', lambda *args: (saved.append('torch.save'), torch_save(*args)))
    folder = RunFolder(tmp_path)
    folder.save(STATE, is_best=True)
    assert (tmp_path / 'best.pt').read_bytes() == (tmp_path / 'ckpt.pt').read_bytes()
    folder.save(STATE, keep=True)
    assert saved == ['torch.save', 'best.pt', 'ckpt.pt', 'torch.save', 'ckpt_7.pt', 'ckpt.pt']


def test_a_new_run_replaces_an_old_one_only_when_it_is_saved(tmp_path, monkeypatch):
    old = {'ckpt.pt': b'old', 'best.pt': b'old', 'loss.png': b'old', 'metrics.jsonl': b'{"iter": 0}\n',
           'ckpt_5.pt': b'old', 'tokenizer.model': b'old', 'tokenizer.json': b'old'}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)

    def interrupt(*_):
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path, overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, 'write_atomically', interrupt)
        begin(folder)
    folder.lock.lock.release()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != '.lock'} == old
    (tmp_path / '.best.pt.unfinished').write_bytes(b'half')  # left by a save that was killed
    begin(RunFolder(tmp_path, overwrite=True))
    assert sorted(os.listdir(tmp_path)) == ['.lock', 'ckpt.pt', 'metrics.jsonl', 'tokenizer.json']
    assert load_checkpoint(tmp_path / 'ckpt.pt')['iter'] == 0
    assert (tmp_path / 'tokenizer.json').read_bytes() == TOKENIZER.files['tokenizer.json']
    assert json.loads(f"[{(tmp_path / 'metrics.jsonl').read_text()}]") == []


@pytest.mark.parametrize('n_calls', range(10))
def test_a_run_that_is_killed_while_it_replaces_another_never_leaves_files_of_both(
        tmp_path, monkeypatch, n_calls):
    """The process ends at each call that changes the folder."""
    old = {'ckpt.pt', 'best.pt', 'loss.png', 'run.json', 'ckpt_5.pt', 'tokenizer.model'}
    for name in old:
        save(tmp_path / name, STATE | {'run_name': 'old'})
    n_left = n_calls

    def killed_at(call):
        def killed(*args, **kwargs):
            nonlocal n_left
            if args and Path(args[0]).name in ('tokenizer.json', 'tokenizer.tiktoken'):  # not there
                return call(*args, **kwargs)
            n_left -= 1
            if n_left < 0:
                raise KeyboardInterrupt
            return call(*args, **kwargs)
        return killed

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, 'replace', killed_at(os.replace))
        patch.setattr(Path, 'unlink', killed_at(Path.unlink))
        begin(RunFolder(tmp_path, overwrite=True))
    left = {path.name for path in tmp_path.iterdir() if path.suffix != '.unfinished' and path.name != '.lock'}
    if load_checkpoint(tmp_path / 'ckpt.pt').get('run_name') == 'old':
        assert left <= old
    else:
        assert left <= {'ckpt.pt', 'tokenizer.json'}


def test_a_run_makes_its_folder(tmp_path):
    begin(RunFolder(tmp_path / 'new' / 'folder'))
    assert {*os.listdir(tmp_path / 'new' / 'folder')} == {'.lock', 'ckpt.pt', 'tokenizer.json'}


@pytest.mark.parametrize('resume', [False, True])
def test_a_tokenizer_that_is_not_the_runs_is_not_replaced(tmp_path, resume):
    (tmp_path / 'tokenizer.json').write_text('{"of": "somebody else"}')
    with pytest.raises(UserError, match=r'tokenizer.json is not the tokenizer of this run: name another'):
        begin(RunFolder(tmp_path, resume))
    assert (tmp_path / 'tokenizer.json').read_text() == '{"of": "somebody else"}'
    assert not (tmp_path / 'ckpt.pt').exists()


# the state of a run


def make_run(path, **changes):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SMALL))
    optimizers = make_optimizers(model, 'muon', 0.0, 0.1, (0.9, 0.95))
    scaler = torch.amp.GradScaler('cpu', init_scale=512.0)
    meta = {'encoding': 'char', 'vocab_size': 11, 'splits': {
        split: {'shards': [{'sha256': split}]} for split in ('train', 'val')}}
    run = Run(RunFolder(path, resume=True), model, optimizers, scaler, TOKENIZER, meta, {'seed': 1},
              '5 windows')
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def save_best(run, **changes):
    write_atomically(run.folder.path / 'best.pt', partial(torch.save, run.checkpoint() | changes))


def train_one_step(run):
    run.model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    for optimizer in run.optimizers:
        optimizer.step()


def test_a_restored_run_has_the_whole_state(tmp_path):
    run = make_run(tmp_path, step=9, best_val_loss=1.5, best_step=9)
    train_one_step(run)
    run.save(is_best=True)
    other = make_run(tmp_path, measured_on='9 windows')
    other.optimizers[1].param_groups[0]['weight_decay'] = 0.7  # given now
    other.restore(load_checkpoint(tmp_path / 'best.pt'))
    assert (other.step, other.best_val_loss, other.best_step) == (9, 1.5, 9)
    assert other.best_measured_on == '5 windows'
    assert other.scaler.get_scale() == 512.0
    assert other.optimizers[1].param_groups[0]['weight_decay'] == 0.7
    for ours, theirs in zip(other.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(other.optimizers, run.optimizers, strict=True):
        torch.testing.assert_close(ours.state_dict()['state'], theirs.state_dict()['state'], rtol=0, atol=0)


def test_a_later_best_checkpoint_stays_the_best(tmp_path):
    """The run was killed before it saved ckpt.pt, or the user has gone back to an earlier checkpoint."""
    run = make_run(tmp_path, step=4, best_val_loss=3.0, best_step=2)
    run.save()
    later = make_run(tmp_path, step=8, name=run.name)
    later.update_best(1.0)
    save_best(later)
    other = make_run(tmp_path)
    other.restore(load_checkpoint(tmp_path / 'ckpt.pt'))
    assert (other.step, other.best_val_loss, other.best_step) == (4, 1.0, 8)
    assert other.best_measured_on == '5 windows'


@pytest.mark.parametrize('best, loss, step, measured_on', [
    ({'iter': 6, 'best_iter': 6, 'best_val_loss': 2.5, 'measured_on': '4 windows'}, 2.0, 6, '5 windows'),
    ({'iter': 3, 'best_iter': 3, 'best_val_loss': 3.5, 'measured_on': '4 windows'}, 3.5, 3, '4 windows'),
    ({'iter': 3, 'best_iter': 3, 'best_val_loss': 3.5, 'measured_on': '5 windows'}, 3.5, 3, '5 windows'),
    # a copy of ckpt_8.pt: its own loss is not known, so it will be measured
    ({'iter': 8, 'best_iter': 6, 'best_val_loss': 2.0, 'measured_on': '5 windows'}, 2.0, 8, '')])
def test_the_best_loss_is_that_of_the_file(tmp_path, best, loss, step, measured_on):
    """ckpt.pt may know it better, as it was measured again, but only if best.pt is still the same."""
    run = make_run(tmp_path, step=9, best_val_loss=2.0, best_step=6)
    save_best(run, **best)
    run.restore(run.checkpoint())
    assert (run.best_val_loss, run.best_step, run.best_measured_on) == (loss, step, measured_on)


def test_a_damaged_best_checkpoint_gets_another_name(tmp_path, capsys):
    run = make_run(tmp_path, step=4, best_val_loss=3.0, best_step=2)
    run.save()
    (tmp_path / 'best.pt').write_bytes(b'half')
    other = make_run(tmp_path)
    other.restore(load_checkpoint(tmp_path / 'ckpt.pt'))
    assert other.best_val_loss == math.inf and (tmp_path / 'best.pt').exists()
    other.begin()
    kept, = tmp_path.glob('best.pt.damaged-*')
    assert kept.read_bytes() == b'half' and not (tmp_path / 'best.pt').exists()
    assert capsys.readouterr().out.startswith(f'best.pt is damaged: it is now {kept.name}, and the next')


def test_a_run_keeps_its_name_and_another_one_has_its_own(tmp_path, monkeypatch):
    """The names of runs that begin in the same second differ, too: a tracker would merge them."""
    monkeypatch.setattr('core.checkpoint.time.strftime', lambda _: 'now')
    run, other = make_run(tmp_path / 'a b'), make_run(tmp_path / 'a b')
    assert run.name != other.name and run.name.startswith('a-b-now-')
    other.restore(run.checkpoint())
    assert other.name == run.name
    old = run.checkpoint()
    del old['run_name']
    other.restore(old)
    assert other.name == '' and other.checkpoint()['run_name'] == ''  # as in the old best.pt


def test_a_run_without_a_name_is_resumed_again_and_again(tmp_path):
    """Its best.pt may stay as an old version saved it, without an entry for the name."""
    run = make_run(tmp_path, step=4, best_val_loss=3.0, best_step=4)
    old = run.checkpoint()
    del old['run_name']
    save(tmp_path / 'best.pt', old)
    for _ in range(2):
        other = make_run(tmp_path)
        other.restore(old)
        assert other.best_val_loss == 3.0
        old = other.checkpoint()


def test_without_a_best_checkpoint_the_next_evaluation_makes_one(tmp_path):
    run = make_run(tmp_path, step=4, best_val_loss=3.0, best_step=2)
    other = make_run(tmp_path)
    other.restore(run.checkpoint())
    assert other.step == 4 and other.update_best(9.0)


@pytest.mark.parametrize('name', ['fingerprint', 'run_name'])
def test_a_best_checkpoint_of_another_run_is_not_replaced(tmp_path, name):
    run = make_run(tmp_path, step=4)
    save_best(run, **{name: 'other'})
    with pytest.raises(UserError, match=r'best.pt is of another run than ckpt.pt: move it'):
        run.restore(run.checkpoint())


def test_later_checkpoints_are_those_of_later_steps(tmp_path):
    left = '.ckpt_70.pt.unfinished'
    for name in 'ckpt_5.pt', 'ckpt_40.pt', 'ckpt_100.pt', 'ckpt_60.pt', 'ckpt_best.pt', left:
        (tmp_path / name).touch()
    folder = RunFolder(tmp_path, resume=True)
    assert folder.later_checkpoints(40) == ['ckpt_60.pt', 'ckpt_100.pt']
    assert folder.last_recorded_step() == -1


@pytest.mark.parametrize('change', [
    {'optimizers': []}, {'optimizers': [1, 2]}, {'optimizers': [{'state': {0: {'momentum_buffer': 5}}}, {}]},
    {'optimizers': [{'state': {0: {'momentum_buffer': torch.zeros(3)}}}, {}]}, {'model': {}},
    {'scaler': {'scale': 1.0}}])
def test_a_state_that_does_not_fit_is_one_line(tmp_path, change):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match='is damaged or not what it should be'):
        run.restore(run.checkpoint() | change)


def test_only_rank_0_saves(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    for name, value in rank_variables(1, 2).items():
        monkeypatch.setenv(name, value)
    run.save()
    assert os.listdir(tmp_path) == []


def test_describe_file_tells_files_apart(tmp_path):
    texts = set()
    for name, content in ('a', b'1'), ('b', b'2'), ('c', b'1'):
        (tmp_path / name).write_bytes(content)
        texts.add(describe_file(tmp_path / name))
    assert len(texts) == 2 and all(text.startswith('a file with sha256 ') for text in texts)
    assert describe_file(tmp_path / 'd') == 'missing'
    assert describe_file(tmp_path) == 'something else'


def test_update_best_keeps_the_lowest_loss(tmp_path):
    run = make_run(tmp_path)
    found = []
    for run.step, val_loss in enumerate((3.0, 2.0, 2.0, 2.5, 1.0)):
        found.append(run.update_best(val_loss))
    assert found == [True, True, False, False, True]
    assert (run.best_val_loss, run.best_step) == (1.0, 4)


def test_patience_counts_evaluations_since_the_best(tmp_path):
    run = make_run(tmp_path, best_step=10)
    for run.step, expected in (10, False), (24, False), (25, True), (30, True):
        assert run.out_of_patience(3, eval_every=5) == expected
    assert not run.out_of_patience(0, eval_every=5)


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_run_that_diverged_saves_nothing_and_names_the_way_back(tmp_path, value):
    run = make_run(tmp_path, step=7)
    message = r'^step 7: the validation loss is .*, before the first good evaluation: '
    with pytest.raises(DivergedError, match=message):
        run.update_best(value)
    (tmp_path / 'best.pt').touch()
    with torch.no_grad():
        run.model.norm.weight[2] = value
    with pytest.raises(DivergedError) as error:
        run.save()
    best, last = tmp_path / 'best.pt', tmp_path / 'ckpt.pt'
    assert str(error.value) == (
        f'step 7: some weights are not finite. {best} is good: resume from it with a lower '
        f'learning rate (or, in float16, with --dtype float32): cp {best} {last} && python train.py '
        f'--init_from resume --out_dir {tmp_path} --learning_rate 0.001')
    assert os.listdir(tmp_path) == ['best.pt']
