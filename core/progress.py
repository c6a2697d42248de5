"""What a run shows of its way, and keeps of it: plain lines, or on a terminal one that renews itself;
metrics.jsonl; samples.jsonl, a story from the same prompt and seed an evaluation; loss.png; a tracker."""

import contextlib
import importlib
import json
import os
import platform
import re
import shlex
import sys
import time
from operator import methodcaller
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError, one_of, printable, user_errors
from core.checkpoint import FILES
from core.distributed import resume_command
from data.files import write_atomically


def check_tracker(track):
    """Raises SettingError for another package than we know, ModuleNotFoundError where it is not installed."""
    if track:
        one_of(('wandb', 'trackio'), track=track)
        importlib.import_module(track)


class Progress:
    """Rank 0 has one, once the run in `folder`, a RunFolder, has begun or goes on at step `it`."""

    def __init__(self, folder, it, n_iters, step_tokens, peak, hardware, settings):
        """peak: tokens/s that the hardware could compute at most, 0 if that is not known. settings: of the
        run, of which `track` and `log_interval` count here."""
        self.folder, self.n_iters, self.step_tokens, self.peak = folder, n_iters, step_tokens, peak
        self.log_interval = settings['log_interval']
        self.before = max((record.get('seconds', 0) for record in folder.records()), default=0)
        self.start = self.line = it, 0.0  # step, seconds of this process: at its start, at the last line
        self.no_picture = False  # which was told
        self.bar = tqdm(total=n_iters, initial=it, file=sys.stdout, disable=not sys.stdout.isatty(),
                        leave=False, dynamic_ncols=True, bar_format='{n_fmt}/{total_fmt} {bar} {desc}')
        name = re.sub(r'[^\w.-]', '-', folder.path.resolve().name)
        name = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if folder.resume:
            name = run_facts(folder.path).get('name', name)
        facts = {'name': name, 'hardware': hardware} | settings
        text = json.dumps(facts, indent=1).encode()
        write_atomically(folder.path / 'run.json', methodcaller('write', text))
        self.tracker = None
        if track := settings['track']:
            self.tracker = importlib.import_module(track)
            os.environ.setdefault('WANDB_RUN_ID', name)  # wandb knows a run by it, trackio by its name
            with user_errors(track, 'does not begin'):
                self.tracker.init(project='tiny-stories', name=name, config=facts, resume='allow')

    def say(self, text):
        # above the line that renews itself; a terminal that was closed ends no run before it has saved
        with contextlib.suppress(OSError), tqdm.external_write_mode():
            print(printable(text), flush=True)

    def keep(self, it, seconds, **figures):
        """A line of metrics.jsonl, for the tracker too. seconds: of training, in this process."""
        figures |= {'seconds': round(self.before + seconds, 2)}
        self.folder.record(iter=it, **figures)
        if self.tracker:
            self.tracker.log(figures, step=it)

    def step(self, it, seconds, skipped, **figures):
        """Show step `it` of the run, which is done, and keep its figures (loss, lr, grad_norm) if a line is
        due. skipped: how many steps were, for an overflow."""
        (start_it, _), (line_it, line_seconds) = self.start, self.line
        speed = (it + 1 - line_it) * self.step_tokens / (seconds - line_seconds)
        left = tqdm.format_interval((self.n_iters - it - 1) * seconds / (it + 1 - start_it))
        end = (f'{speed:,.0f} tokens/s, {left} left' + (f', MFU {speed / self.peak:.1%}' if self.peak else '')
               + (f', {skipped} steps skipped' if skipped else ''))
        self.bar.set_description_str(f"loss {figures['loss']:.4f}, {end}", refresh=False)
        with contextlib.suppress(OSError):
            self.bar.update()
        if it % self.log_interval == 0:
            self.line = it + 1, seconds
            self.keep(it, seconds, **figures, tokens_per_s=speed)
            if self.bar.disable:
                self.say(f"step {it}/{self.n_iters}: loss {figures['loss']:.4f}, lr {figures['lr']:.2e}, "
                         f"grad norm {figures['grad_norm']:.2f}, {end}")

    def evaluated(self, it, seconds, result, prompt, story):
        """Show and keep an evaluation, and the story that the model wrote after `prompt`."""
        self.say(f'step {it}: ' + ', '.join(f'{name} {value:.4f}' for name, value in result.items()))
        self.say('    ' + story.replace('\n', '\n    '))
        self.keep(it, seconds, **result)
        self.folder.record('samples.jsonl', iter=it, prompt=prompt, story=story)
        if self.tracker:
            self.tracker.log({'story': story}, step=it)
        self.plot()

    def plot(self):
        """Draw metrics.jsonl as loss.png, if there is matplotlib."""
        try:
            from matplotlib.figure import Figure  # takes half a second to import
        except Exception as error:  # none, or one that does not suit
            if not self.no_picture:
                self.say(f'no loss.png is drawn ({error}): pip install matplotlib')
            self.no_picture = True
            return
        records = self.folder.records()

        def points(key):
            found = [(record['iter'], record[key]) for record in records if key in record]
            return np.array(found, float).reshape(-1, 2).T

        figure = Figure(figsize=(8, 7), layout='constrained')
        losses, rates = figure.subplots(2, height_ratios=(3, 1), sharex=True)
        steps, raw = points('loss')
        losses.plot(steps, raw, 'C0', alpha=0.25)
        losses.plot(steps, smoothed(raw), 'C0', label='training, smoothed')
        losses.plot(*points('val_part_loss'), 'C1', alpha=0.6, label='validation, a part')
        losses.plot(*points('val_loss'), 'C1o', label='validation')
        losses.set(yscale='log', ylabel='loss (nats per token)')
        low, high = losses.get_ylim()
        ticks = [tick for tick in np.outer(10.0**np.arange(-5, 5), (1, 2, 5)).flat if low <= tick <= high]
        ticks = ticks if len(ticks) > 2 else np.geomspace(low, high, 6)
        losses.set_yticks(ticks, [f'{tick:.3g}' for tick in ticks])
        losses.minorticks_off()
        losses.grid(alpha=0.3)
        losses.legend()
        tokens = losses.secondary_xaxis('top', functions=(lambda step: step * self.step_tokens / 1e6,
                                                          lambda tokens: tokens * 1e6 / self.step_tokens))
        tokens.set_xlabel('million tokens')
        rates.plot(*points('lr'), 'C2')
        rates.set(xlabel='step')
        rates.set_ylabel('learning rate', color='C2')
        accuracy = rates.twinx()
        accuracy.plot(*points('val_acc'), 'C3o-')
        accuracy.set_ylabel('validation accuracy', color='C3')
        figure.savefig(self.folder.path / 'loss.png')

    def close(self):
        """Take away the line that renews itself, and tell the tracker that all is said."""
        with contextlib.suppress(OSError):
            self.bar.close()
        if self.tracker:
            self.tracker.finish()


def diverged(it, what, out_dir, rate):
    """The UserError for a run whose loss, gradients or weights are not finite. rate: AdamW's peak."""
    if not os.path.exists(os.path.join(out_dir, FILES['best'])):
        return UserError(f'step {it}: {what}, before anything was saved: begin with other weights')
    good, last = (shlex.quote(os.path.join(out_dir, FILES[name])) for name in ('best', 'last'))
    return UserError(f'step {it}: {what}. {good} is good: go on from it with a lower rate (or, in float16, '
                     f'with --dtype float32): cp {good} {last} && {resume_command(out_dir)} --learning_rate '
                     f'{min(rate / 10, 0.005):g}')


def smoothed(values):
    """The exponential moving average of a curve, over a hundredth of it: a float array (len(values),)."""
    keep, mean, out = 1 - 1 / (1 + len(values) / 100), 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        mean = keep * mean + (1 - keep) * value
        out[i] = mean / (1 - keep ** (i + 1))  # as if there had been the same before
    return out


def run_facts(folder):
    """What run.json says of a run: its name for trackers and its hardware; {} where there is none."""
    path = Path(folder) / 'run.json'
    with user_errors(path):
        facts = json.loads(path.read_bytes()) if path.exists() else {}
        return {'name': str(facts['name']), 'hardware': str(facts['hardware'])} if facts else {}


def hardware(device, dtype, world_size):
    """What a run computes on, in words."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        cpus, name = Path('/proc/cpuinfo'), platform.processor() or platform.machine()
        found = re.search(r'model name\s*: (.*)', cpus.read_text()) if cpus.exists() else None
        name = f"{found[1] if found else name}, threads: {torch.get_num_threads()}"
    count = f'{world_size} x ' if world_size > 1 else ''
    return f"{count}{device.type} ({name}) in {str(dtype)[6:]}, torch {torch.__version__}"
