"""Kill training runs at random moments, a third of them during a save, and check that nothing is lost.

    python tests/hostile/kill_1000.py --kills 4 --dtype float16

In a third of the rounds two runs compete for the folder, and one of them must be refused. After each kill
the last checkpoint must be whole and at most one interval old. A run that completes, after however many
kills, must have exactly the metrics and the weights of a run that was never killed.
"""

import math
import random
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any working directory

from configurator import configure, run
from core.checkpoint import load_checkpoint
from tests.helpers.scripts import SETTINGS, Script, metrics, prepare, script

kills = 1000  # number of processes to kill
seed = 0  # random seed of the moments
dtype = 'float32'  # of the runs: float32, bfloat16 or float16 (with loss scaling)

_SAVE_INTERVAL = 3  # steps
_STEPS = 45  # one epoch is 37


def kill(runs, moment, out, during_save):
    """Kill the runs at `moment`, or during the first save after it; return whether one was still alive."""
    while time.monotonic() < moment or (during_save and not is_saving(out)):
        if not any(each.process.is_alive() for each in runs):
            return False
        time.sleep(0.0005)
    for each in runs:
        each.process.kill()
        each.process.join()
    return True


def is_saving(out):
    """Return whether a file in the run's folder is only half written."""
    return any(out.glob('.*.unfinished'))


def saved_step(out):
    """Return the step of the last checkpoint, or -1 if there is none."""
    path = out / 'ckpt.pt'
    return load_checkpoint(path)['iter'] if path.exists() else -1


def printed_steps(runs):
    """Return how many steps the runs say they have done."""
    output = ''.join(each.out for each in runs)
    return max((int(step) + 1 for step in re.findall(r'^step (\d+)/', output, re.M)), default=0)


def result(out):
    """Return the metrics and the exact weights of a run that has completed."""
    weights = load_checkpoint(out / 'ckpt.pt')['model']
    return metrics(out), {name: weight.tolist() for name, weight in weights.items()}


def check_refused(runs):
    """Check that each run that failed by itself was refused in one line; return their number."""
    failed = [each for each in runs if each.process.exitcode not in (0, -9)]
    for each in failed:
        assert re.fullmatch(r'train.py: .* (is in use|holds) .*\n', each.err), each.err
    return len(failed)


def main():
    moments = random.Random(seed)
    killed = killed_in_save = refused = completed = 0
    step = -1  # of the last checkpoint of the current run; -1: there is no run to resume
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = prepare(folder / 'data')
        words = ['train.py', *SETTINGS, f'--dataset={data}', f'--dtype={dtype}', '--dropout=0.1',
                 f'--max_iters={_STEPS}', f'--eval_interval={_SAVE_INTERVAL}', '--eval_iters=1']
        # The first run imports everything into the process that the others are forked from.
        script(*words, f'--out_dir={folder / "first"}')
        start = time.monotonic()
        script(*words, f'--out_dir={folder / "whole"}')
        seconds_of_a_run = time.monotonic() - start
        expected = result(folder / 'whole')

        while killed < kills or step >= 0:  # the last run may complete
            out = folder / f'run {completed}'
            resume = ['--init_from=resume'] if step >= 0 else []
            n_runs = moments.choice((1, 1, 2))
            runs = [Script(*words, f'--out_dir={out}', *resume) for _ in range(n_runs)]
            wait = math.inf
            if killed < kills:
                wait = moments.uniform(0, seconds_of_a_run / 3)  # most runs are killed more than once
            was_alive = kill(runs, time.monotonic() + wait, out, during_save=killed % 3 == 0)
            if was_alive:
                killed += 1
                killed_in_save += is_saving(out)
            refused += check_refused(runs)

            new_step = saved_step(out)
            lost = printed_steps(runs) - max(new_step, 0)
            assert new_step >= step and lost <= _SAVE_INTERVAL, (step, new_step, lost)
            if was_alive:
                step = new_step
            else:
                assert result(out) == expected, f'{out.name} differs from a run without kills: {runs[0].err}'
                completed += 1
                step = -1
    print(f'{killed} kills, {killed_in_save} of them during a save: each time the checkpoint was whole; '
          f'{refused} processes were refused a folder in use; {completed} runs completed, all exactly equal '
          'to the run without kills')


if __name__ == '__main__':
    configure(globals())
    run(main)
