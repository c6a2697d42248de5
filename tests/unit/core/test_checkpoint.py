"""Checkpoints: whole or not at all, and nothing in them runs. The folder of a run."""

import json
import os
import resource
from functools import partial

import pytest
import torch

from configurator import SettingError, UserError
from core import checkpoint
from core.checkpoint import RunFolder, load_checkpoint, load_model
from data.files import report_write_errors, write_atomically
from model import GPT, GPTConfig

STATE = {
    'model': {'w': torch.arange(100_000.0)},
    'config': {'n_layer': 2},
    'tokenizer': {'files': {'a': b'\0\xff'}},
    'settings': {'seed': 1},
    'iter': 7,
}


def save(path, state):
    write_atomically(path, partial(torch.save, state))


def test_what_is_saved_is_loaded_and_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: calls.append(
        (os.readlink(f'/proc/self/fd/{fd}'), os.fstat(fd).st_size)))
    monkeypatch.setattr(os, 'replace', lambda old, new: (calls.append('renamed'), replace(old, new)))
    save(tmp_path / 'ckpt.pt', STATE)
    size = os.path.getsize(tmp_path / 'ckpt.pt')
    assert calls[:2] == [(f'{tmp_path}/ckpt.pt.tmp', size), 'renamed'] and calls[2][0] == str(tmp_path)
    loaded = load_checkpoint(tmp_path / 'ckpt.pt')
    assert torch.equal(loaded.pop('model')['w'], STATE['model']['w'])
    assert loaded == {key: value for key, value in STATE.items() if key != 'model'}


@pytest.mark.parametrize('room', [1000, 200_000])
def test_a_full_disk_leaves_the_old_file(tmp_path, room):
    save(tmp_path / 'ckpt.pt', STATE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r'write .*ckpt.pt \(File too large\): make room .* whole$'):
            save(tmp_path / 'ckpt.pt', STATE | {'iter': 8})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ['ckpt.pt'] and load_checkpoint(tmp_path / 'ckpt.pt')['iter'] == 7


@pytest.mark.parametrize('restarts, there, resume, overwrite, goes_on', [
    ('3', True, False, False, True), ('3', True, False, True, True), ('3', False, False, False, False),
    ('0', True, False, True, False), ('0', True, True, False, True), ('0', True, False, False, None)])
def test_what_torchrun_restarts_goes_on(tmp_path, monkeypatch, restarts, there, resume, overwrite, goes_on):
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', restarts)
    if there:
        save(tmp_path / 'ckpt.pt', STATE)
    if goes_on is None:
        with pytest.raises(SettingError, match='holds another run'):
            RunFolder(tmp_path)
    else:
        assert RunFolder(tmp_path, resume, overwrite).resume == goes_on


def test_a_bug_is_no_full_disk():
    with pytest.raises(RuntimeError, match='a bug'), report_write_errors('ckpt.pt'):
        raise RuntimeError('a bug')


class Payload:
    def __reduce__(self):
        return os.system, ('touch ran',)


def test_a_pickle_payload_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(STATE | {'model': Payload()}, 'ckpt.pt')
    with pytest.raises(UserError, match='was not run'):
        load_checkpoint('ckpt.pt')
    assert os.listdir() == ['ckpt.pt']


def truncated(data):
    return data[:len(data) // 2]


def flipped(data):
    weights = data.index(STATE['model']['w'].numpy().tobytes())
    return data[:weights] + bytes([data[weights] ^ 4]) + data[weights + 1:]


@pytest.mark.parametrize('harm', [truncated, flipped])
def test_damage_is_named_and_so_is_what_else_there_is(tmp_path, harm):
    last, best = files = tmp_path / 'ckpt.pt', tmp_path / 'best.pt'
    for file in files:
        save(file, STATE)
    whole = last.read_bytes()
    for file, advice in (last, r'type cp .*best.pt .*ckpt.pt$'), (best, r'--ckpt last$'):
        file.write_bytes(harm(whole))
        with pytest.raises(UserError, match=rf'{file.name} is damaged.* is whole: .*{advice}'):
            load_checkpoint(file)
        file.write_bytes(whole)
    copy = tmp_path / 'copy.pt'
    for file in copy, best, last:
        file.write_bytes(harm(whole))
        if file != best:  # of a copy nobody knows what it was, and at last nothing is whole
            with pytest.raises(UserError, match=rf'{file.name} is damaged[^;]*$'):
                load_checkpoint(file)


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path):
    with pytest.raises(UserError, match='train first'):
        load_checkpoint(tmp_path / 'ckpt.pt')
    without = [{key: value for key, value in STATE.items() if key != name} for name in STATE]
    for other in *without, [1, 2], torch.zeros(3):
        torch.save(other, tmp_path / 'ckpt.pt')
        with pytest.raises(UserError, match='not a checkpoint of this project'):
            load_checkpoint(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('claim', [
    {'n_layer': 10**7}, {'n_embd': 10**6, 'n_head': 10}, {'vocab_size': 10**12}, {'block_size': 10**12},
    {'block_size': 32.5}, {'n_layer': '2'}, {'n_layer': 3}, {'mlp_width': 10**9}, {'another': 1}])
def test_a_config_that_claims_another_size_takes_no_memory(claim):
    config = {'n_layer': 2, 'n_head': 2, 'n_embd': 8, 'vocab_size': 11}
    weights, used = GPT(GPTConfig(**config)).state_dict(), partial(resource.getrusage, resource.RUSAGE_SELF)
    before = used().ru_maxrss
    with pytest.raises(UserError, match='make no model of ours'):
        load_model({'config': config | claim, 'model': weights})
    assert used().ru_maxrss - before < 100_000  # kilobytes


def test_a_loaded_model_does_not_drop():
    config = {'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'vocab_size': 11, 'dropout': 0.5}
    model = load_model({'config': config, 'model': GPT(GPTConfig(**config)).state_dict()})
    idx = torch.arange(10)[None]
    assert not model.training and torch.equal(model(idx), model(idx))


def test_metrics_go_on_from_the_step_and_leave_out_bad_lines(tmp_path):
    lines = ['{"iter": 0, "loss": 1}', 'no line', '[1]', '{"loss": 3}', '{"iter": 1, "loss": 2}',
             '{"iter": 0, "loss": "high"}', '{"iter": 0, "loss": NaN}', '{"iter": 0, "loss": null}',
             '{"iter": 0, "loss": 1' + 400 * '0' + '}', '{"iter": 0, "story": 5}', '[' * 9**5, '{"iter": 2}',
             '{"it']
    (tmp_path / 'metrics.jsonl').write_bytes('\n'.join(lines).encode() + b'\xe9')
    folder = RunFolder(tmp_path, resume=True)
    folder.begin(STATE | {'iter': 2})
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"iter": 0, "loss": 1}\n{"iter": 1, "loss": 2}\n'
    folder.record(iter=2, loss=0.5)
    assert folder.records() == [{'iter': it, 'loss': loss} for it, loss in enumerate((1, 2, 0.5))]
    assert {*os.listdir(tmp_path)} == {'.lock', 'metrics.jsonl'}  # there is a checkpoint


def test_the_best_is_saved_before_the_last_that_says_how_good_it_was(tmp_path, monkeypatch):
    """Killed between the two, a run goes on from the one before and finds that best again."""
    saved, store, replace = [], torch.save, os.replace
    monkeypatch.setattr(os, 'replace', lambda old, new: (saved.append(new.name), replace(old, new)))
    monkeypatch.setattr(torch, 'save', lambda *args: (saved.append('torch.save'), store(*args)))
    folder = RunFolder(tmp_path)
    folder.save(STATE, best=True)
    assert (tmp_path / 'best.pt').read_bytes() == (tmp_path / 'ckpt.pt').read_bytes()
    folder.save(STATE)
    assert saved == ['torch.save', 'best.pt', 'ckpt.pt', 'torch.save', 'ckpt.pt']


def test_a_new_run_takes_the_place_of_an_old_one_when_it_is_saved(tmp_path, monkeypatch):
    old = {'ckpt.pt': b'old', 'best.pt': b'old', 'loss.png': b'old', 'metrics.jsonl': b'{"iter": 0}\n'}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, 'write_atomically', lambda *_: exec('raise KeyboardInterrupt'))
        RunFolder(tmp_path, overwrite=True).begin(STATE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != '.lock'} == old
    (tmp_path / 'best.pt.tmp').write_bytes(b'half')  # of a killed save
    RunFolder(tmp_path, overwrite=True).begin(STATE | {'iter': 0})
    RunFolder(tmp_path / 'new' / 'folder').begin(STATE)
    assert sorted(os.listdir(tmp_path)) == ['.lock', 'ckpt.pt', 'metrics.jsonl', 'new']
    assert load_checkpoint(tmp_path / 'ckpt.pt')['iter'] == 0
    assert json.loads(f"[{(tmp_path / 'metrics.jsonl').read_text()}]") == []
