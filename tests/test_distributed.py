"""Several ranks on one machine: the same batches and losses, saving and going on, and what ends a run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint import load_checkpoint
from tests import tiny

ROOT = Path(__file__).parent.parent
STEPS = ['--max_iters=50', '--eval_interval=25', '--optimizer=adamw']
# train.py, which also counts the exchanges of gradients: DDP calls the hook for every bucket it sends
COUNTING = """
import sys
sys.path.insert(0, {root!r})
import train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
sent = []

def count(group, bucket):
    sent.append(bucket.is_last())
    return allreduce_hook(group, bucket)

class Counting(train.DistributedDataParallel):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_comm_hook(None, count)

train.DistributedDataParallel = Counting
train.configure(vars(train), base=train.checkpoint_settings)
train.run(train.main)
print(sum(sent), 'exchanges')
"""


def start(ranks, *words, program=ROOT / 'train.py'):
    """train.py under torchrun as a user types it, in a process group of its own; returns the Popen."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    return subprocess.Popen(
        [*torchrun, program, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {'OMP_NUM_THREADS': '1'})


def finish(process, status=0):
    """Its (stdout, stderr) once it has ended with `status`."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    return out, err


def wait_for(process, text):
    """Read its stdout up to a line with `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'no {text!r} in what it prints: {process.stderr.read()}')


def train_all(folder, runs):
    """Runs, (ranks, flags) each, without torchrun and its time; `folder` is for what they print."""
    (folder / 'runs.json').write_text(json.dumps(runs))
    done = subprocess.run([sys.executable, ROOT / 'tests/forked.py', folder / 'runs.json'],
                          capture_output=True, text=True, timeout=300,  # 15 s on idle cores
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with prepared data and runs out-1, out-2 and out-4 on as many ranks; what out-2 printed."""
    folder = tmp_path_factory.mktemp('ranks')
    words = [*tiny.SETTINGS, f'--dataset={tiny.prepare(folder / "data")}', *STEPS]
    counting = folder / 'counting.py'
    counting.write_text(COUNTING.format(root=str(ROOT)))
    # of 2 ranks each has 2 micro-batches of a step
    two = start(2, *words, '--batch_size=2', '--gradient_accumulation_steps=4', f'--out_dir={folder}/out-2',
                program=counting)
    printed, _ = finish(two)
    train_all(folder, [(ranks, [*words, f'--out_dir={folder}/out-{ranks}']) for ranks in (1, 4)])
    return folder, printed


def assert_same_losses(one, other):
    """1e-4 between training losses, 1e-5 between validation losses: only the order of additions differs."""
    assert [line['iter'] for line in one] == [line['iter'] for line in other]
    for ours, theirs in zip(one, other, strict=True):
        for key, near in ('loss', 1e-4), ('grad_norm', 1e-2), ('val_loss', 1e-5):
            assert (key in ours) == (key in theirs)
            if key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=near), (key, ours, theirs)


@pytest.mark.parametrize('ranks', [2, 4])
def test_any_number_of_ranks_has_the_same_losses(runs, ranks):
    folder, _ = runs
    one = tiny.metrics(folder / 'out-1')
    assert len(one) == 53
    assert_same_losses(one, tiny.metrics(folder / f'out-{ranks}'))


def test_accumulation_exchanges_gradients_once_a_step(runs):
    _, printed = runs
    assert re.findall(r'(\d+) exchanges', printed) == ['50', '50']


def test_a_run_goes_on_with_another_number_of_ranks(runs, tmp_path):
    folder, _ = runs
    for saved_by in 1, 2:
        shutil.copytree(folder / f'out-{saved_by}', tmp_path / f'out-{saved_by}')
    words = ['--init_from=resume', '--max_iters=60']
    train_all(tmp_path, [(goes_on, [*words, f'--out_dir={tmp_path}/out-{saved_by}'])
                         for saved_by, goes_on in ((2, 1), (1, 2))])
    ended = [tiny.metrics(tmp_path / f'out-{ranks}') for ranks in (1, 2)]
    assert ended[0][-1]['iter'] == 60
    assert_same_losses(*ended)


def test_ctrl_c_saves_and_names_the_command(runs, tmp_path):
    """The terminal tells torchrun and the ranks, torchrun the ranks once more: still one Ctrl-C."""
    folder, _ = runs
    process = start(2, *tiny.SETTINGS, f'--dataset={folder}/data', f'--out_dir={tmp_path}/out',
                    '--max_iters=100000')
    wait_for(process, 'step 5/')
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    said = re.findall(r'stopped at step (\d+) and saved; go on with: (.*)', err)
    assert len(said) == 1, err
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] == int(said[0][0]) > 5
    assert said[0][1] == ('torchrun --standalone --nproc_per_node=2 train.py --init_from resume '
                          f'--out_dir {tmp_path}/out')


def test_a_rank_that_dies_takes_the_run_down(runs, tmp_path):
    """Rank 0, the one that saves."""
    folder, _ = runs
    process = start(2, *tiny.SETTINGS, f'--dataset={folder}/data', f'--out_dir={tmp_path}/out',
                    '--max_iters=100000', '--eval_interval=5')
    wait_for(process, 'step 8/')
    found = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {environment(pid)['RANK']: int(pid) for pid in found if 'RANK' in environment(pid)}
    os.kill(ranks['0'], signal.SIGKILL)
    began = time.monotonic()
    _, err = finish(process, status=1)
    assert time.monotonic() - began < 30
    assert 'another process of this run has ended' in err and '--init_from resume' in err
    assert 'RuntimeError' not in err
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] >= 5


def environment(pid):
    """The environment of a process, a dict."""
    try:
        lines = Path('/proc', pid, 'environ').read_bytes().decode().split('\0')
    except OSError:
        return {}
    return dict(line.split('=', 1) for line in lines if '=' in line)


def test_a_mistake_of_all_ranks_is_told_once(tmp_path):
    _, err = finish(start(2, f'--dataset={tmp_path}', f'--out_dir={tmp_path}/out', '--device=cpu'), status=1)
    assert len(re.findall('^train.py: .*prepare.py', err, re.M)) == 1
