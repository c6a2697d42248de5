"""What a run shows and records: log lines or a progress bar, metrics.jsonl, samples.jsonl, loss.png."""

import contextlib
import importlib
import json
import math
import os
import sys
import warnings
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import is_our_bug, one_of, printable, reason_of, user_errors
from core.checkpoint import make_run_name
from core.device import describe_hardware, peak_flops
from data.files import write_bytes_atomically

MOST_POINTS = 2000  # of a curve in loss.png


def check_tracker(track):
    """Raise SettingError for an unknown tracker, ModuleNotFoundError if its package is not installed."""
    if track:
        one_of(('wandb', 'trackio'), track=track)
        importlib.import_module(track)


def make_progress(run, max_steps, tokens_per_step, device, dtype, ranks):
    """Return the Progress of a Run; that of a rank other than 0 shows and records nothing."""
    if ranks.rank > 0:
        return NoProgress()
    peak_tokens_per_s = peak_flops(device) * ranks.world_size / run.model.flops_per_token()
    name = run.name
    if not name:  # the run goes on from an old checkpoint, which does not have it
        folder = run.folder.path
        name = read_run_facts(folder).get('name') or make_run_name(folder)
    facts = {'name': name, 'hardware': describe_hardware(device, dtype, ranks.world_size)} | run.settings
    return Progress(run.folder, run.step, max_steps, tokens_per_step, peak_tokens_per_s, facts)


class NoProgress:
    """The progress of a rank that shows and records nothing."""

    def log_step(self, step, seconds, **figures):
        pass

    def log_evaluation(self, step, metrics, prompt, story):
        pass

    def close(self):
        pass


class Progress:
    """The progress of rank 0, from the step at which the run starts or is resumed."""

    def __init__(self, folder, start_step, max_steps, tokens_per_step, peak_tokens_per_s, facts):
        """folder: a RunFolder. peak_tokens_per_s: what the hardware can compute at most; 0: not known.

        facts: what run.json and the tracker get: the run's 'name', the 'hardware', and all settings.
        """
        self.folder = folder
        self.start_step = start_step
        self.max_steps = max_steps
        self.tokens_per_step = tokens_per_step
        self.peak_tokens_per_s = peak_tokens_per_s
        self.log_interval = facts['log_interval']
        self.curves = Curves()
        self.seconds_before = 0.0  # of training, before this process
        for record in folder.records():
            self.curves.add(record)
            self.seconds_before = max(self.seconds_before, record.get('seconds', 0))
        self.seconds = 0.0  # of training, in this process
        self.skipped_steps = 0
        self.logged_step = start_step  # where the last log line ended, and when
        self.logged_seconds = 0.0
        self.warned = False
        self.bar = tqdm(total=max_steps, initial=start_step, file=sys.stdout, disable=not sys.stdout.isatty(),
                        leave=False, dynamic_ncols=True, bar_format='{n_fmt}/{total_fmt} {bar} {desc}')
        write_bytes_atomically(folder.path / 'run.json', json.dumps(facts, indent=1).encode())
        self.tracker = start_tracker(facts)

    def log_step(self, step, seconds, **figures):
        """Show a finished step, and record its figures (loss, lr, grad_norm) if a log line is due.

        seconds: how long the step took. A step whose grad_norm is not finite was skipped.
        """
        self.seconds += seconds
        if not math.isfinite(figures['grad_norm']):
            self.skipped_steps += 1
        n_steps = step + 1 - self.logged_step
        tokens_per_s = n_steps * self.tokens_per_step / (self.seconds - self.logged_seconds)
        status = self.status(step, tokens_per_s)
        self.bar.set_description_str(f"loss {figures['loss']:.4f}, {status}", refresh=False)
        with contextlib.suppress(OSError):  # a terminal that was closed
            self.bar.update()
        if step % self.log_interval == 0:
            self.logged_step = step + 1
            self.logged_seconds = self.seconds
            self.record(step, **figures, tokens_per_s=tokens_per_s)
            if self.bar.disable:
                self.print(f"step {step}/{self.max_steps}: loss {figures['loss']:.4f}, "
                           f"lr {figures['lr']:.2e}, grad norm {figures['grad_norm']:.2f}, {status}")

    def status(self, step, tokens_per_s):
        """Return the speed and the time left, in words."""
        steps_left = self.max_steps - step - 1
        seconds_per_step = self.seconds / (step + 1 - self.start_step)
        parts = [f'{tokens_per_s:,.0f} tokens/s',
                 f'{tqdm.format_interval(steps_left * seconds_per_step)} left']
        if self.peak_tokens_per_s > 0:
            parts.append(f'MFU {tokens_per_s / self.peak_tokens_per_s:.1%}')
        if self.skipped_steps > 0:
            parts.append(f'{self.skipped_steps} steps skipped')
        return ', '.join(parts)

    def log_evaluation(self, step, metrics, prompt, story):
        """Show and record an evaluation, and the story that the model wrote after `prompt`; draw loss.png."""
        self.print(f'step {step}: ' + ', '.join(f'{name} {value:.4f}' for name, value in metrics.items()))
        self.print('    ' + story.replace('\n', '\n    '))
        self.record(step, **metrics)
        self.folder.record('samples.jsonl', iter=step, prompt=prompt, story=story)
        if self.tracker:
            self.tracker.log({'story': story}, step=step)
        self.draw()

    def print(self, text):
        """Print above the progress bar. A closed terminal must not end the run before it has saved."""
        with contextlib.suppress(OSError), tqdm.external_write_mode():
            print(printable(text), flush=True)

    def record(self, step, **figures):
        """Add a line to metrics.jsonl, and to the tracker.

        Values that are not finite, as the gradient norm of a skipped step, are left out: JSON has no inf.
        """
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        figures['seconds'] = round(self.seconds_before + self.seconds, 2)
        self.folder.record(iter=step, **figures)
        self.curves.add({'iter': step} | figures)
        if self.tracker:
            self.tracker.log(figures, step=step)

    def draw(self):
        """Draw the curves as loss.png. If matplotlib is missing or fails, say so once; training goes on."""
        try:
            from matplotlib.figure import Figure  # takes half a second to import

            with warnings.catch_warnings(action='ignore'):  # of numbers that are too large for an axis
                figure = Figure(figsize=(8, 7), layout='constrained')
                plot_metrics(figure, self.curves, self.tokens_per_step)
                figure.savefig(self.folder.path / 'loss.png')
        except Exception as error:  # matplotlib raises errors of many classes
            if is_our_bug(error):
                raise
            if not self.warned:
                advice = ': pip install matplotlib' if isinstance(error, ModuleNotFoundError) else ''
                self.print(f'loss.png was not drawn ({reason_of(error)}){advice}')
            self.warned = True

    def close(self):
        """Remove the progress bar and finish the tracker."""
        with contextlib.suppress(OSError):
            self.bar.close()
        if self.tracker:
            self.tracker.finish()


def start_tracker(facts):
    """Start the tracker of a run, wandb or trackio, and return its module, or None if there is none.

    facts: those of run.json; `track` names the tracker.
    """
    track = facts['track']
    if not track:
        return None
    tracker = importlib.import_module(track)
    with user_errors(track, 'could not start a run'):
        os.environ.setdefault('WANDB_RUN_ID', facts['name'])  # wandb's id of a run; trackio takes its name
        tracker.init(project='tiny-stories', name=facts['name'], config=facts, resume='allow')
    return tracker


def read_run_facts(folder):
    """Return {'name', 'hardware'} of a run, from its run.json; {} if that is missing or damaged."""
    try:
        facts = json.loads((Path(folder) / 'run.json').read_bytes())
        return {key: str(facts[key]) for key in ('name', 'hardware')}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


# loss.png ---------------------------------------------------------------------

class Curves:
    """The metrics that loss.png shows, each as the steps and the values of its points."""

    def __init__(self):
        self.points = {key: (array('d'), array('d')) for key in ('loss', 'lr', 'val_loss', 'val_acc')}

    def add(self, record):
        """Add the figures of a line of metrics.jsonl, a dict."""
        for key, (steps, values) in self.points.items():
            if key in record:
                steps.append(record['iter'])
                values.append(record[key])

    def thinned(self, key):
        """Return the steps and the values of a metric, two arrays of at most MOST_POINTS points."""
        steps, values = self.points[key]
        return thin(steps), thin(values)


def thin(values):
    """Return numbers as an array of at most MOST_POINTS, each the mean of neighbours if there are more."""
    values = np.array(values)
    group = math.ceil(len(values) / MOST_POINTS)
    if group <= 1:
        return values
    starts = np.arange(0, len(values), group)
    counts = np.diff(starts, append=len(values))
    return np.add.reduceat(values, starts) / counts


def plot_metrics(figure, curves, tokens_per_step):
    """Draw losses, learning rate and accuracy, a Curves, into a matplotlib figure."""
    losses, rates = figure.subplots(2, height_ratios=(3, 1), sharex=True)

    steps, loss = curves.thinned('loss')
    losses.plot(steps, loss, 'C0', alpha=0.25)
    losses.plot(steps, smooth(loss), 'C0', label='training, smoothed')
    losses.plot(*curves.thinned('val_loss'), 'C1o-', label='validation')
    losses.set(yscale='log', ylabel='loss (nats per token)')
    set_loss_ticks(losses)
    losses.grid(alpha=0.3)
    losses.legend()

    def to_million_tokens(step):
        return step * tokens_per_step / 1e6

    def to_step(million_tokens):
        return million_tokens * 1e6 / tokens_per_step

    top = losses.secondary_xaxis('top', functions=(to_million_tokens, to_step))
    top.set_xlabel('million tokens')

    rates.plot(*curves.thinned('lr'), 'C2')
    rates.set(xlabel='step')
    rates.set_ylabel('learning rate', color='C2')
    accuracy = rates.twinx()
    accuracy.plot(*curves.thinned('val_acc'), 'C3o-')
    accuracy.set_ylabel('validation accuracy', color='C3')


def smooth(values):
    """Return the exponential moving average of a curve, over a hundredth of its length."""
    keep = 1 - 1 / (1 + len(values) / 100)
    mean = 0.0
    smoothed = np.empty(len(values))
    for i, value in enumerate(values):
        mean = keep * mean + (1 - keep) * value
        smoothed[i] = mean / (1 - keep ** (i + 1))  # without the bias towards the 0 at the start
    return smoothed


def set_loss_ticks(axes):
    """Label a logarithmic axis at 1, 2 and 5 times powers of ten; evenly if it shows too few of these."""
    low, high = axes.get_ylim()
    ticks = np.outer(10.0 ** np.arange(-5, 5), (1, 2, 5)).ravel()
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    if len(ticks) <= 2:
        ticks = np.geomspace(low, high, 6)
    axes.set_yticks(ticks, [f'{tick:.3g}' for tick in ticks])
    axes.minorticks_off()
