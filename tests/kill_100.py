"""Kill training runs at random moments, a third of them inside a save, and see that nothing is lost.

    python tests/kill_100.py
    python tests/kill_100.py --kills 4 --dtype float16

After each kill the last checkpoint is whole and at most one interval back. A run that reaches its end, after
however many kills, has the metrics and the weights of one that was never killed, to the last bit.
"""

import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any working directory

import torch

from checkpoint import load_checkpoint
from configurator import configure, run
from tests import forked, tiny

kills = 100  # processes killed
seed = 0  # of the moments
dtype = 'float32'  # of the runs: float32, bfloat16 or float16 (with loss scaling)

_INTERVAL = 3  # steps between saves
_STEPS = 45  # an epoch is 37


def kill(pid, moment, out, aimed):
    """Kill a process at `moment`, or if `aimed` at the next save after it; returns whether it still lived."""
    while time.monotonic() < moment or (aimed and not any(out.glob('*.tmp'))):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def steps_shown(log):
    """The number of steps whose line has been printed."""
    return max((int(step) + 1 for step in re.findall(r'^step (\d+)/', log.read_text(), re.M)), default=0)


def ended(out):
    """The metrics and weights of a run that has reached its end."""
    return tiny.metrics(out), load_checkpoint(out / 'ckpt.pt')['model']


def same(one, other):
    """Whether two runs, as `ended` gives them, are equal to the last bit."""
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def main():
    torch.set_num_threads(1)
    moments, killed, in_save, finished = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        words = [*tiny.SETTINGS, f'--dataset={tiny.prepare(folder / "data")}', f'--max_iters={_STEPS}',
                 f'--eval_interval={_INTERVAL}', '--dropout=0.1', f'--dtype={dtype}', '--eval_iters=1']
        log, began = folder / 'log', time.monotonic()
        forked.finish([*words, f'--out_dir={folder / "whole"}'], log)
        whole = ended(folder / 'whole')
        length = time.monotonic() - began
        out = folder / 'run 0'
        while killed < kills or (out / 'ckpt.pt').exists():
            before = load_checkpoint(out / 'ckpt.pt')['iter'] if (out / 'ckpt.pt').exists() else -1
            go = [*words, f'--out_dir={out}'] + (['--init_from=resume'] if before >= 0 else [])
            if killed == kills:
                forked.finish(go, log)
                assert same(ended(out), whole), f'{out.name} is not the unbroken run'
                finished += 1
                break
            moment = time.monotonic() + moments.uniform(0, length / 2)  # most runs are killed more than once
            alive = kill(forked.fork(go, log), moment, out, aimed=killed % 3 == 0)
            killed += alive
            in_save += alive and any(out.glob('*.tmp'))
            shown = steps_shown(log)
            after = load_checkpoint(out / 'ckpt.pt')['iter'] if (out / 'ckpt.pt').exists() else -1
            assert after >= before and shown - max(after, 0) <= _INTERVAL, (before, after, shown)
            if not alive:
                assert same(ended(out), whole), f'{out.name} is not the unbroken run: {log.read_text()}'
                finished += 1
                out = folder / f'run {finished}'
    print(f'{killed} kills, {in_save} of them inside a save: each time a whole checkpoint at most '
          f'{_INTERVAL} steps back; {finished} runs reached their end, all equal to the unbroken one '
          'to the last bit')


if __name__ == '__main__':
    configure(globals())
    run(main)
