"""Several ranks on one machine, as torchrun starts them: the same losses, saving, resuming, lost ranks."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import load_checkpoint
from data.files import lock_folder
from tests.helpers.scripts import ROOT, SETTINGS, metrics, on_ranks, prepare, start_ranks

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='looks for ranks in /proc')


def torchrun(*words, restarts=0):
    """train.py on two ranks as a user types it, in a process group of its own; returns the Popen."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               f'--max-restarts={restarts}', 'train.py', *SETTINGS, '--max_iters=100000', *words]
    # without the second, restarted ranks look for each other where the dead ones were
    around = {'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=os.environ | around)


def kill_rank(process, rank):
    found = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    pid, = [int(pid) for pid in found
            if b'\0RANK=%d\0' % rank in Path('/proc', pid, 'environ').read_bytes()]
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope='module')
def runs(data, tmp_path_factory):
    """A folder with runs out-1, out-2 and out-4 on as many ranks."""
    folder = tmp_path_factory.mktemp('ranks')
    words = [*SETTINGS, f'--dataset={data}', '--max_iters=50', '--eval_interval=25', '--optimizer=adamw']
    # of 2 ranks each has 2 micro-batches of a step, of 4 a part of one
    for ranks, *more in (1,), (2, '--batch_size=2', '--gradient_accumulation_steps=4'), (4,):
        on_ranks(ranks, *words, *more, f'--out_dir={folder}/out-{ranks}')
    return folder


def assert_same_losses(one, other):
    """1e-4 between training losses, 1e-5 between validation losses: only the order of additions differs."""
    assert [line['iter'] for line in one] == [line['iter'] for line in other]
    for ours, theirs in zip(one, other, strict=True):
        for key, near in ('loss', 1e-4), ('grad_norm', 1e-2), ('val_loss', 1e-5):
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=near), (key, ours, theirs)


@pytest.mark.parametrize('ranks', [2, 4])
def test_any_number_of_ranks_has_the_same_losses(runs, ranks):
    one = metrics(runs / 'out-1')
    assert len(one) == 53
    assert_same_losses(one, metrics(runs / f'out-{ranks}'))


def test_a_run_goes_on_with_another_number_of_ranks(runs, tmp_path):
    ended = []
    for saved_by, goes_on in (2, 1), (1, 2):
        out = tmp_path / f'out-{saved_by}'
        shutil.copytree(runs / out.name, out)
        on_ranks(goes_on, '--init_from=resume', '--max_iters=60', f'--out_dir={out}')
        ended.append(metrics(out))
    assert ended[0][-1]['iter'] == 60
    assert_same_losses(*ended)


@pytest.mark.parametrize('flag, message', [
    ('--max_iters=4', 'max_iters is 4 on rank 1, but 3 on rank 0: start all ranks with the same command'),
    ('--seed=5', 'seed is 5 on rank 1, but 1337 on rank 0'),
    ('--dataset=OTHER', 'the fingerprint of the data is ')])
def test_ranks_that_do_not_agree_are_refused(data, tmp_path, flag, message):
    """They would train on a mixture, or wait for each other forever."""
    other = prepare(tmp_path / 'other', train=np.arange(3, 3000, dtype='<u2') % 300)
    words = ['train.py', *SETTINGS, f'--dataset={data}', '--max_iters=3', f'--out_dir={tmp_path}/out']
    runs = start_ranks([words, [*words, flag.replace('OTHER', str(other))]])
    for run in runs:
        run.finish(status=1)
        assert message in run.err and run.err.count('\n') == 1
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


def test_ranks_with_other_checkpoints_are_refused(runs, tmp_path):
    """As on two machines, each with a copy of the folder; only the optimizer's state differs."""
    folders = [shutil.copytree(runs / 'out-2', tmp_path / str(rank)) for rank in range(2)]
    before = (folders[0] / 'ckpt.pt').read_bytes()
    checkpoint = load_checkpoint(runs / 'out-2' / 'ckpt.pt')
    checkpoint['optimizers'][0]['state'][0]['exp_avg'].add_(1)
    torch.save(checkpoint, folders[1] / 'ckpt.pt')
    for run in start_ranks([['train.py', '--init_from=resume', '--max_iters=60', f'--out_dir={folder}']
                            for folder in folders]):
        run.finish(status=1)
        assert re.search(r'ckpt.pt is a file with sha256 \w+ on rank 1, but a file with sha256 \w+ on rank 0',
                         run.err)
        assert run.err.count('\n') == 1
    assert (folders[0] / 'ckpt.pt').read_bytes() == before


def test_ctrl_c_saves_and_names_the_command(data, tmp_path):
    """The terminal tells torchrun and the ranks, torchrun the ranks once more: still one Ctrl-C."""
    process = torchrun(f'--dataset={data}', f'--out_dir={tmp_path}/out')
    assert any('step 5/' in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    (step, command), = re.findall(r'stopped at step (\d+) and saved; resume with: (.*)', err)
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] == int(step) > 5
    assert command == ('torchrun --standalone --nproc_per_node=2 train.py --init_from resume '
                       f'--out_dir {tmp_path}/out')


def test_a_rank_that_dies_takes_the_run_down(data, tmp_path):
    """Rank 0, the one that saves."""
    process = torchrun(f'--dataset={data}', f'--out_dir={tmp_path}/out', '--eval_interval=5')
    assert any('step 8/' in line for line in process.stdout)
    kill_rank(process, 0)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    assert 'cannot reach the other ranks' in err and '--init_from resume' in err
    assert 'RuntimeError' not in err
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] >= 5


# A train.py in which one rank fails before it updates its weights
FAILING_STEP = """
import os, runpy, torch
from core import optim

def fail(*_):
    raise {error}

if os.environ['RANK'] == '{rank}':
    optim.clip_and_step = fail
runpy.run_path('{path}', run_name='__main__')
"""


@pytest.mark.parametrize('rank, error, reason', [
    (0, "OSError(28, 'No space left on device')", 'train.py: No space left on device'),
    (1, "torch.OutOfMemoryError('CUDA out of memory')", 'out of memory: type --batch_size 2 --gradient_')])
def test_a_rank_that_fails_says_why_before_the_others_end(data, tmp_path, rank, error, reason):
    program = tmp_path / 'train.py'
    program.write_text(FAILING_STEP.format(rank=rank, error=error, path=ROOT / 'train.py'))
    ranks = start_ranks([[program, *SETTINGS, f'--dataset={data}', f'--out_dir={tmp_path}/out']] * 2)
    for script in ranks:
        script.finish(status=1)
    failing, other = ranks[rank], ranks[1 - rank]
    assert reason in failing.err and failing.err.count('\n') == 1
    assert f'rank {1 - rank} cannot reach the other ranks' in other.err and other.err.count('\n') == 1
    written = [Path(script.folder, 'err').stat().st_mtime_ns for script in (failing, other)]
    assert written == sorted(written)


def test_a_folder_in_use_ends_all_ranks(data, tmp_path):
    """Rank 0 alone locks the folder, while the others begin to evaluate."""
    folder = tmp_path / 'out'
    folder.mkdir()
    with lock_folder(folder, 'wait'):
        first, second = start_ranks([['train.py', *SETTINGS, f'--dataset={data}', f'--out_dir={folder}']] * 2)
        first.finish(status=1)
        second.finish(status=1)
    assert 'is in use by another process' in first.err and first.err.count('\n') == 1
    assert 'rank 1 cannot reach the other ranks' in second.err and second.err.count('\n') == 1


def test_torchrun_restarts_a_run_from_its_last_checkpoint(data, tmp_path):
    process = torchrun(f'--dataset={data}', f'--out_dir={tmp_path}/out', '--eval_interval=5', restarts=1)
    assert any('step 8/' in line for line in process.stdout)
    kill_rank(process, 1)
    assert any('parameters on 2 cpu' in line for line in process.stdout)  # once more
    first = next(line for line in process.stdout if re.match(r'step \d+/', line))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    step = int(first.removeprefix('step ').split('/')[0])
    assert step >= 5 and step % 5 == 0
    losses = [line['iter'] for line in metrics(tmp_path / 'out') if 'loss' in line]
    assert losses == list(range(len(losses))) and len(losses) > step
