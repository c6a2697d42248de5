"""Checkpoints: whole or not at all, and nothing in them runs."""

import os

import pytest
import torch

import checkpoint
from checkpoint import load_checkpoint, load_model, save_checkpoint
from configurator import UserError
from model import GPT, GPTConfig

STATE = {
    'model': {'w': torch.arange(1000.0)},
    'config': {'n_layer': 2},
    'tokenizer': {'files': {'a': b'\0\xff'}},
    'settings': {'seed': 1},
    'iter': 7,
}


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path / 'ckpt.pt', STATE)
    loaded = load_checkpoint(tmp_path / 'ckpt.pt')
    assert torch.equal(loaded.pop('model')['w'], STATE['model']['w'])
    assert loaded == {key: value for key, value in STATE.items() if key != 'model'}
    assert os.listdir(tmp_path) == ['ckpt.pt']


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / 'ckpt.pt', STATE)

    def half_a_save(state, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoint.torch, 'save', half_a_save)
    with pytest.raises(UserError, match=r'cannot save .*ckpt.pt \(No space left on device\): what was saved'):
        save_checkpoint(tmp_path / 'ckpt.pt', STATE | {'iter': 8})
    assert load_checkpoint(tmp_path / 'ckpt.pt')['iter'] == 7
    assert os.listdir(tmp_path) == ['ckpt.pt']


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_payload_does_not_run(tmp_path):
    torch.save(STATE | {'model': Payload(f'touch {tmp_path}/ran')}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='was not run'):
        load_checkpoint(tmp_path / 'ckpt.pt')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('harm', ['truncated', 'flipped', 'empty', 'text'])
def test_damage_is_named_and_so_is_what_else_there_is(tmp_path, harm):
    save_checkpoint(tmp_path / 'ckpt.pt', STATE)
    save_checkpoint(tmp_path / 'best.pt', STATE)
    data = bytearray((tmp_path / 'ckpt.pt').read_bytes())
    weights = bytes(data).index(STATE['model']['w'].numpy().tobytes())
    if harm == 'truncated':
        data = data[: len(data) // 2]
    elif harm == 'flipped':
        data[weights + 100] ^= 4
    else:
        data = b'' if harm == 'empty' else b'weights'
    (tmp_path / 'ckpt.pt').write_bytes(data)
    with pytest.raises(UserError, match=r'ckpt.pt is damaged.*best.pt is whole.*cp .*best.pt .*ckpt.pt$'):
        load_checkpoint(tmp_path / 'ckpt.pt')
    (tmp_path / 'best.pt').write_bytes(b'')
    with pytest.raises(UserError, match=r'ckpt.pt is damaged[^;]*$'):  # nothing else is whole
        load_checkpoint(tmp_path / 'ckpt.pt')


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path):
    with pytest.raises(UserError, match='train first'):
        load_checkpoint(tmp_path / 'ckpt.pt')
    for other in {'state_dict': 1}, [1, 2], torch.zeros(3):
        torch.save(other, tmp_path / 'ckpt.pt')
        with pytest.raises(UserError, match='not a checkpoint of this project'):
            load_checkpoint(tmp_path / 'ckpt.pt')


def test_what_is_saved_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (calls.append(os.readlink(f'/proc/self/fd/{fd}')), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda old, new: (calls.append('renamed'), replace(old, new)))
    save_checkpoint(tmp_path / 'ckpt.pt', STATE)
    assert calls == [f'{tmp_path}/ckpt.pt.tmp', 'renamed', str(tmp_path)]


def test_a_loaded_model_does_not_drop():
    config = {'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'vocab_size': 11, 'dropout': 0.5}
    model = load_model({'config': config, 'model': GPT(GPTConfig(**config)).state_dict()})
    idx = torch.arange(10)[None]
    assert not model.training and torch.equal(model(idx), model(idx))
