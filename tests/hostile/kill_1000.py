"""Kill training runs at random moments, a third of them inside a save, and see that nothing is lost.

    python tests/kill_1000.py --kills 4 --dtype float16

A third of the time two runs contend for the folder, of which one is refused. After each kill the last
checkpoint is whole and at most one interval back. A run that reaches its end, after however many kills, has
the metrics and the weights of one that was never killed, to the last bit.
"""

import math
import random
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any working directory

from configurator import configure, run
from core.checkpoint import load_checkpoint
from tests.helpers import scripts as tiny
from tests.helpers.scripts import Script, script

kills = 1000  # processes killed
seed = 0  # of the moments
dtype = 'float32'  # of the runs: float32, bfloat16 or float16 (with loss scaling)

_INTERVAL = 3  # steps between saves
_STEPS = 45  # an epoch is 37


def kill(runs, moment, out, aimed):
    """Kill the runs at `moment`, or if `aimed` at the next save after it; returns whether one still lived."""
    while time.monotonic() < moment or (aimed and not any(out.glob('*.tmp'))):
        if not any(each.process.is_alive() for each in runs):
            return False
        time.sleep(0.0005)
    for each in runs:
        each.process.kill()
        each.process.join()
    return True


def saved(out):
    """The step of the last checkpoint, or -1."""
    return load_checkpoint(out / 'ckpt.pt')['iter'] if (out / 'ckpt.pt').exists() else -1


def ended(out):
    """The metrics of a run that has reached its end, and its weights to the last bit."""
    weights = load_checkpoint(out / 'ckpt.pt')['model']
    return tiny.metrics(out), {name: weight.tolist() for name, weight in weights.items()}


def main():
    moments, killed, in_save, refused, finished, before = random.Random(seed), 0, 0, 0, 0, -1
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        words = ['train.py', *tiny.SETTINGS, f'--dataset={tiny.prepare(folder / "data")}', f'--dtype={dtype}',
                 '--dropout=0.1', f'--max_iters={_STEPS}', f'--eval_interval={_INTERVAL}', '--eval_iters=1']
        script(*words, f'--out_dir={folder / "first"}', MPLBACKEND='')  # to import, and fork from, everything
        began = time.monotonic()
        script(*words, f'--out_dir={folder / "whole"}', MPLBACKEND='')
        length = time.monotonic() - began
        whole = ended(folder / 'whole')
        while killed < kills or before >= 0:  # the last run may reach its end
            out = folder / f'run {finished}'
            goes_on = ['--init_from=resume'] * (before >= 0)
            runs = [Script(*words, f'--out_dir={out}', *goes_on, MPLBACKEND='')
                    for _ in range(moments.choice((1, 1, 2)))]  # two contend for the folder
            wait = moments.uniform(0, length / 3) if killed < kills else math.inf  # most die more than once
            alive = kill(runs, time.monotonic() + wait, out, aimed=killed % 3 == 0)
            killed += alive
            in_save += alive and any(out.glob('*.tmp'))
            losers = [each.err for each in runs if each.process.exitcode not in (0, -9)]
            for said in losers:
                assert re.fullmatch(r'train.py: .* (is in use by process|holds another) .*\n', said), said
            refused += len(losers)
            after, steps = saved(out), re.findall(r'^step (\d+)/', ''.join(each.out for each in runs), re.M)
            shown = max((int(step) + 1 for step in steps), default=0)
            assert after >= before and shown - max(after, 0) <= _INTERVAL, (before, after, shown)
            if not alive:
                assert ended(out) == whole, f'{out.name} is not the unbroken run: {runs[0].err}'
                finished += 1
            before = after if alive else -1
    print(f'{killed} kills, {in_save} of them inside a save, and each time a whole checkpoint; {refused} '
          f'processes were refused a folder in use; {finished} runs reached their end, all equal to the '
          'unbroken one to the last bit')


if __name__ == '__main__':
    configure(globals())
    run(main)
