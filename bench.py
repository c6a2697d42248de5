"""Our figures, beside those of a peer where one is named: in turn, in one call, on the same machine and data.

    python bench.py --what time_to_loss --peer ../nanoGPT --text tiny_shakespeare.txt
    python bench.py --what train --peer ../llama2.c
    python bench.py --what sample --peer ../llama2.c --json sample.json
    python bench.py --what prepare --text stories.txt

A peer is a checkout of nanoGPT or llama2.c, which stays as it is. Figures are medians; a ratio above 1 says
that ours is faster. Let nothing else run meanwhile.
"""

import contextlib
import importlib.util
import io
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from json import dumps, loads
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

from checkpoint import load_checkpoint, load_model, save_checkpoint
from configurator import SettingError, UserError, configure, run, settings
from data.shards import Batches, ShardWriter, Split
from data.tiny_stories.sample_stories import stories
from data.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer, open_tokenizer
from device import DTYPES, autocast, choose_device, choose_dtype, keep_memory, peak_flops
from evaluate import evaluate
from formats.llama2c import Llama2c
from model import GPT, GPTConfig, to_int8

what = ''  # time_to_loss, train, load, sample, memory or prepare
peer = ''  # path of a checkout of nanoGPT or llama2.c; '': our figures alone
text = ''  # path of a text: tiny Shakespeare for time_to_loss; prepare's '' is the built-in corpus ten times
tokenizer = ''  # of prepare: a folder with GPT-2's vocabulary, where tiktoken cannot download it
json = ''  # file to write the figures to, with the key `ratio` where a peer is compared
repeats = 3  # rounds, each side once a round
out = 'loss_curves.png'  # picture of time_to_loss
shape = '15M'  # of train, load and sample: 15M, 42M, 110M (llama2.c's) or 124M (GPT-2's)
batch_size = 32  # sequences a training step, for every side
steps = 8  # timed steps of a round of train, after two that are not
device = 'auto'  # auto, cpu or cuda; memory and prepare are the CPU's

_HERE = Path(__file__).resolve().parent
_WHAT = 'time_to_loss', 'train', 'load', 'sample', 'memory', 'prepare'
_SIZES = 'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size'
_GPT2_BLOCK = {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'bias': True}
_SHAPES = {
    '15M': dict(zip(_SIZES, (6, 6, 288, 256, 4096), strict=True)),
    '42M': dict(zip(_SIZES, (8, 8, 512, 1024, 32000), strict=True)),
    '110M': dict(zip(_SIZES, (12, 12, 768, 1024, 32000), strict=True)),
    '124M': dict(zip(_SIZES, (12, 12, 768, 1024, 50259), strict=True)) | _GPT2_BLOCK,
}
_SMALL = {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'block_size': 64, 'device': 'cpu'}
# What nanoGPT's README has for a CPU, but the last checkpoint is kept whatever its loss, as we measure it.
_NANOGPT = _SMALL | {'batch_size': 12, 'max_iters': 2000, 'lr_decay_iters': 2000, 'dropout': 0.0,
                     'compile': False, 'eval_iters': 20, 'log_interval': 1, 'always_save_checkpoint': True}
# Of time_to_loss: nanoGPT's settings, ours, our steps to the target and what they change (on a CPU they are
# so few that a higher rate than the default is better), and the target, validation loss in nats a character.
# docs/experiments.md has what else was tried.
_RECIPES = {
    'cpu': (_NANOGPT, _SMALL | {'batch_size': 32}, 165, {'learning_rate': 0.03, 'warmup_iters': 3}, 1.886),
    # Its config file for a GPU, which overfits: its best checkpoint counts. Our steps are yet to be measured.
    'cuda': ({'log_interval': 1},
             {'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 256, 'dropout': 0.2, 'batch_size': 64,
              'device': 'cuda'}, 600, {}, 1.4697),
}
_COMPILE = 'gcc', '-Ofast', '-march=native', '-fopenmp'  # llama2.c's `make runomp`
_WRITING = {'vocab_size': 32000}  # in `sample`
_TOKENS = 256  # written by each side of `sample`


# Small helpers


def script(*words, cwd=_HERE):
    """Run a Python script; its stdout. Raises UserError with the last line of its stderr where it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise UserError(f'{words[0]} in {cwd} failed with status {done.returncode}: {reason}')
    return done.stdout


def flags(settings):
    return [f'--{name}={value}' for name, value in settings.items()]


def seconds_of(work):
    """How long work() takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(sides):
    """{name: [figure, ...]} of {name: function without arguments}: each in turn, `repeats` rounds of it."""
    figures = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            figures[name].append(side())
    return figures


def alone(function, *args):
    """function(*args) in a fresh process: its memory is its own, and no side inherits another's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), take_settings,
                             (settings(globals()),)) as pool:
        return pool.submit(function, *args).result()


def take_settings(values):
    globals().update(values)


def report(figures, unit):
    """Print the median and the range of each side; returns {name: median}."""
    for name, values in figures.items():
        print(f'{name:24} {median(values):12,.5g} {unit}  ({min(values):,.5g} to {max(values):,.5g})')
    return {name: median(values) for name, values in figures.items()}


def peer_kind():
    """'nanoGPT', 'llama2.c' or ''. Raises SettingError where `peer` is no checkout of either."""
    if not peer:
        return ''
    for kind, file in ('llama2.c', 'run.c'), ('nanoGPT', 'config/train_shakespeare_char.py'):
        if (Path(peer) / file).is_file():
            return kind
    raise SettingError(f'peer {peer!r} is no checkout of nanoGPT or llama2.c')


def peer_model(**sizes):
    """The peer's model with random weights, of the sizes that GPTConfig names."""
    spec = importlib.util.spec_from_file_location('peer_model', Path(peer) / 'model.py')
    module = sys.modules['peer_model'] = importlib.util.module_from_spec(spec)  # its dataclass looks there
    sys.dont_write_bytecode = True  # into the checkout
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):
        if peer_kind() == 'nanoGPT':
            return module.GPT(module.GPTConfig(**sizes, dropout=0.0, bias=False))
        theirs = {'n_embd': 'dim', 'n_layer': 'n_layers', 'n_head': 'n_heads', 'block_size': 'max_seq_len'}
        return module.Transformer(module.ModelArgs(
            multiple_of=32, **{theirs.get(name, name): size for name, size in sizes.items()}))


def alphabet(vocab_size):
    """A char tokenizer of that many ids: 259 that all have, ' ', made-up characters, <blank>, <middle>."""
    return CharTokenizer.train([''.join(chr(0x10000 + i) for i in range(vocab_size - 262))])


def random_data(folder, vocab_size, n_tokens):
    """A prepared folder of random tokens."""
    tokenizer = alphabet(vocab_size)
    tokenizer.save(folder)
    rng, splits = np.random.default_rng(0), {}
    for split, n in ('train', n_tokens), ('val', 2000):
        writer = ShardWriter(folder, split)
        writer.write(rng.integers(259, vocab_size - 2, n, dtype=np.uint16))
        splits[split] = {'tokens': n, 'bytes': n, 'shards': writer.close()}
    meta = {'encoding': 'char', 'vocab_size': tokenizer.vocab_size, 'splits': splits}
    (folder / 'meta.json').write_text(dumps(meta))


# Time to a loss


class Text(Split):
    """Token ids as a split, one a character."""

    meta = {}  # noqa: RUF012 (never written to)

    def __init__(self, ids):
        self.ids, self.n_tokens, self.n_bytes = np.array(ids, np.uint16), len(ids), len(ids)

    def read(self, start, length):
        return self.ids[start:start + length]


def nanogpt_times(printed):
    """From what nanoGPT's train.py prints: seconds of training before each step, and {step: validation loss}.

    The time of a step that evaluates includes the evaluation; the median stands in for it.
    """
    times = [float(ms) / 1000 for ms in re.findall(r'^iter \d+: .*time ([\d.]+)ms', printed, re.M)]
    evaluations = re.findall(r'^step (\d+): .*val loss ([\d.]+)', printed, re.M)
    losses = {int(step): float(loss) for step, loss in evaluations}
    usual = median(times)
    return np.cumsum([0.0] + [usual if i in losses else t for i, t in enumerate(times)]), losses


def our_times(lines, step_tokens):
    """The same from the lines of a metrics.jsonl with every step; ours stops the clock while it evaluates."""
    records = [loads(line) for line in lines]
    times = [step_tokens / record['tokens_per_s'] for record in records if 'tokens_per_s' in record]
    losses = {record['iter']: record['val_loss'] for record in records if 'val_loss' in record}
    return np.cumsum([0.0, *times]), losses


def run_nanogpt(checkout, val_ids, settings):
    """Train nanoGPT: (seconds to the step of its checkpoint, its loss over the whole validation split, curve
    [(seconds, loss), ...])."""
    words = 'train.py', 'config/train_shakespeare_char.py', '--dataset=bench', '--out_dir=out-bench'
    before, losses = nanogpt_times(script(*words, *flags(settings), cwd=checkout))
    saved = torch.load(checkout / 'out-bench' / 'ckpt.pt', weights_only=True)
    sizes = {name: size for name, size in saved['model_args'].items() if name in _SIZES}
    model = peer_model(**sizes).eval()
    model.load_state_dict(saved['model'])
    loss = evaluate(lambda x: model(x, x)[0], Text(val_ids), sizes['block_size'], 64)['val_loss']
    return before[saved['iter_num']], loss, [(before[step], losses[step]) for step in losses]


def run_ours(folder, val_text, ours, max_iters, seed):
    """Train ours with the settings `ours`; the same triple."""
    run_dir = folder / 'run'
    settings = {'dataset': folder, 'out_dir': run_dir, 'overwrite': True, 'seed': seed,
                'max_iters': max_iters, 'eval_interval': max(1, max_iters // 5), 'log_interval': 1}
    script('train.py', *flags(ours | settings))
    lines = (run_dir / 'metrics.jsonl').read_text().splitlines()
    before, losses = our_times(lines, ours['batch_size'] * ours['block_size'])
    ids = load_tokenizer(folder).encode(val_text)[1:]  # without the space that it puts before a text
    model = load_model(load_checkpoint(run_dir / 'ckpt.pt'))
    loss = evaluate(model, Text(ids), ours['block_size'], 64)['val_loss']
    return before[max(losses)], loss, [(before[step], losses[step]) for step in losses]


def time_to_loss():
    on = 'cuda' if choose_device(device).type == 'cuda' else 'cpu'
    nanogpt, mine, to_target, changed, target = _RECIPES[on]
    whole = Path(text).read_text(encoding='utf-8')
    val_text = whole[int(0.9 * len(whole)):]
    chars = {char: i for i, char in enumerate(sorted(set(whole)))}
    ids = np.array([chars[char] for char in whole], np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        checkout, ours = Path(folder) / 'nanoGPT', Path(folder) / 'ours'
        shutil.copytree(peer, checkout, ignore=shutil.ignore_patterns('.git', 'out*'))
        (checkout / 'data' / 'bench').mkdir()
        val_ids = ids[-len(val_text):]
        ids[:-len(val_text)].tofile(checkout / 'data' / 'bench' / 'train.bin')
        val_ids.tofile(checkout / 'data' / 'bench' / 'val.bin')
        (checkout / 'data' / 'bench' / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': len(chars)}))
        script('data/tiny_stories/prepare.py', f'--source={Path(text).resolve()}', '--encoding_type=char',
               f'--out_dir={ours}')
        runs = {'nanoGPT': [], 'ours, to the target': [], "ours, nanoGPT's time": []}
        for i in range(repeats):
            theirs = run_nanogpt(checkout, val_ids, nanogpt)
            short = run_ours(ours, val_text, mine | changed, to_target, seed=i)
            long = run_ours(ours, val_text, mine, int(to_target * theirs[0] / short[0]), seed=i)
            for done, result in zip(runs.values(), (theirs, short, long), strict=True):
                done.append(result)
    spent = report({name: [result[0] for result in done] for name, done in runs.items()}, 's of training')
    loss = report({name: [result[1] for result in done] for name, done in runs.items()}, 'nats per character')
    plot_curves(runs, target)
    theirs, short, long = runs
    figures = {'peer_seconds': spent[theirs], 'our_seconds': spent[short], 'our_long_seconds': spent[long],
               'peer_loss': loss[theirs], 'our_loss': loss[short], 'our_long_loss': loss[long]}
    if loss[short] > target:
        print(f'no ratio: {to_target} steps of ours do not reach {target}')
        return figures
    return figures | {'ratio': spent[theirs] / spent[short]}


def plot_curves(runs, target):
    """Draw the validation loss over training seconds of every run into `out`."""
    import matplotlib  # takes half a second to import

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for i, (name, done) in enumerate(runs.items()):
        for n, (_, _, curve) in enumerate(done):
            axes.plot(*zip(*curve, strict=True), f'C{i}', label=None if n else name)
    axes.axhline(target, color='grey', linestyle=':')
    axes.set(xlabel='seconds of training', ylabel='validation loss (nats per character)')
    axes.legend()
    figure.savefig(out)
    print(f'curves: {out}')


# Throughput


def matmul_peak(place, dtype):
    """FLOP/s of one large matrix multiplication, the best of several."""
    n = 8192 if place.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=place).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: (a @ b)[0, 0].item()) for _ in range(8))


def our_rate(folder, place):
    """Tokens/s of train.py, its defaults but for the shape and the batch."""
    sizes = {name: size for name, size in _SHAPES[shape].items() if name != 'vocab_size'}
    settings = {'dataset': folder, 'out_dir': folder / 'run', 'overwrite': True, 'batch_size': batch_size,
                'device': place, 'max_iters': steps + 2, 'eval_iters': 1, 'log_interval': 1}
    script('train.py', *flags(sizes | settings))
    records = map(loads, (folder / 'run' / 'metrics.jsonl').read_text().splitlines())
    return median([record['tokens_per_s'] for record in records if 'tokens_per_s' in record][2:])


def peer_rate(place, dtype):
    """Tokens/s of the peer's training step, its data in memory already; compiled on a GPU, its default."""
    sizes = {name: _SHAPES[shape][name] for name in _SIZES}
    model = peer_model(**sizes).to(place)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(0.1, 5e-4, (0.9, 0.95), place.type)
    fast = torch.compile(model) if place.type == 'cuda' else model
    x, y = torch.randint(sizes['vocab_size'], (2, batch_size, sizes['block_size']), device=place)

    def step():
        with autocast(place, dtype):
            result = fast(x, y)
            loss = model.last_loss if peer_kind() == 'llama2.c' else result[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return x.numel() / median([seconds_of(step) for _ in range(steps + 2)][2:])


def where_time_goes(place, dtype, step_seconds):
    """Print the share of our forward and backward pass in a step, and of its largest operations in itself."""
    keep_memory()  # as train.py does
    model = GPT(GPTConfig(**_SHAPES[shape])).to(place)
    idx = torch.randint(model.config.vocab_size, (batch_size, model.config.block_size), device=place)

    def work():
        with autocast(place, dtype):
            loss = model(idx, idx)
        loss.backward()
        return loss.item()

    share = median([seconds_of(work) for _ in range(5)]) / step_seconds
    print(f'forward and backward, not compiled: {share:.0%} of a step; the rest: clipping, the optimizer')
    with torch.profiler.profile() as profile:
        work()
    kind = 'self_device_time_total' if place.type == 'cuda' else 'self_cpu_time_total'
    spent = {event.key: getattr(event, kind) for event in profile.key_averages()}
    total = sum(spent.values())
    largest = sorted(spent, key=spent.get, reverse=True)[:10]
    print('of these: ' + ', '.join(f'{name} {spent[name] / total:.0%}' for name in largest))


def train():
    place = choose_device(device)
    default = choose_dtype('auto', place)
    model = GPT(GPTConfig(**_SHAPES[shape]))
    with tempfile.TemporaryDirectory() as folder:
        random_data(Path(folder), model.config.vocab_size, 2_000_000)
        sides = {'ours': partial(our_rate, Path(folder), place)}
        for dtype in (torch.float32, torch.bfloat16) if place.type == 'cpu' else (default,):
            if peer:
                sides[f'{peer_kind()}, {dtype}'.replace('torch.', '')] = partial(peer_rate, place, dtype)
        rates = report(in_turn(sides), 'tokens/s')
    needed = rates['ours'] * model.flops_per_token()
    for dtype in torch.float32, torch.bfloat16:
        peak = matmul_peak(place, dtype)
        print(f'{dtype}: a matrix multiplication runs at {peak / 1e9:,.0f} GFLOP/s, ours trains at '
              f'{needed / peak:.0%} of it')
    if peak_flops(place):
        print(f"MFU against the maker's peak: {needed / peak_flops(place):.1%}")
    tokens = batch_size * model.config.block_size
    alone(where_time_goes, place, default, tokens / rates['ours'])
    theirs = [rates[name] for name in list(rates)[1:]]
    ratios = dict(zip(('ratio', 'ratio_bfloat16'), (rates['ours'] / rate for rate in theirs), strict=False))
    return {'tokens_per_s': rates, **ratios}


def load():
    """A batch's cost against a step's: what a step would wait if nothing were loaded ahead."""
    config, place = _SHAPES[shape], choose_device(device)
    with tempfile.TemporaryDirectory() as folder:
        random_data(Path(folder), config['vocab_size'], 2_000_000)
        batches = Batches(Split(folder, 'train'), config['block_size'], batch_size, seed=0)
        batch = report({'batch': [seconds_of(lambda: batches(i)) for i in range(100)]}, 's')['batch']  # noqa: B023
        tokens = batch_size * config['block_size']
        step = report(in_turn({'step': lambda: tokens / our_rate(Path(folder), place)}), 's')['step']
    print(f'a batch costs {batch / step:.2%} of a step')
    return {'batch_seconds': batch, 'step_seconds': step, 'share': batch / step}


# Writing


def our_writing_rate(stories_at_once, dtype, compiled):
    """Tokens/s from the first to the last, all stories together; when compiled, from the 32nd."""
    keep_memory()
    place = choose_device(device)
    model = GPT(GPTConfig(**_SHAPES[shape] | _WRITING)).eval()
    model = to_int8(model) if dtype == 'int8' else model.to(place, DTYPES[dtype])
    prompt = torch.ones(stories_at_once, 1, dtype=torch.long, device=place)
    clock = []
    for tokens in model.generate(prompt, _TOKENS, compile=compiled):
        tokens.tolist()  # as sample.py does; a GPU has then done its work
        clock.append(time.perf_counter())
    clock = clock[32:] if compiled else clock
    return stories_at_once * (len(clock) - 1) / (clock[-1] - clock[0])


def nanogpt_writing_rate():
    """The same of nanoGPT's generate, which writes one story, by its forward passes, as it returns all tokens
    together; on a GPU in bfloat16, its default there."""
    place, sizes, clock = choose_device(device), _SHAPES[shape] | _WRITING, []
    model = peer_model(**{name: sizes[name] for name in _SIZES}).eval().to(place)

    def note(*_):
        if place.type == 'cuda':
            torch.cuda.synchronize()
        clock.append(time.perf_counter())

    model.register_forward_hook(note)
    with autocast(place, torch.bfloat16 if place.type == 'cuda' else torch.float32):
        model.generate(torch.ones(1, 1, dtype=torch.long, device=place), _TOKENS, temperature=0.8, top_k=200)
    return (len(clock) - 1) / (clock[-1] - clock[0])


def build_run(folder):
    """Compile llama2.c's `run` into `folder`, and write a model and a tokenizer for it."""
    program = str(folder / 'run')
    try:
        subprocess.run([*_COMPILE, str(Path(peer) / 'run.c'), '-lm', '-o', program],
                       check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, 'stderr', '') or str(error)).strip().splitlines()[-1]
        raise UserError(f"{' '.join(_COMPILE)} does not compile {peer}/run.c: {reason}") from None
    model = GPT(GPTConfig(**_SHAPES[shape] | _WRITING))
    checkpoint = {'config': asdict(model.config), 'model': model.state_dict()}
    Llama2c().write(folder, checkpoint, alphabet(model.config.vocab_size))


def run_writing_rate(folder):
    """What llama2.c's `run` says of itself."""
    words = ('-z', folder / 'tokenizer.bin', '-t', '1', '-p', '1', '-s', '1', '-n', str(_TOKENS))
    done = subprocess.run([folder / 'run', folder / 'model.bin', *words], capture_output=True)
    said = re.search(rb'tok/s: ([\d.]+)', done.stderr)
    if not said:
        raise UserError(f'{peer}/run.c failed with status {done.returncode}: {done.stderr.decode()}')
    return float(said[1])


def sample():
    place = choose_device(device)
    on_gpu = place.type == 'cuda'
    ways = [(dtype, False) for dtype in ('float32', 'bfloat16', 'int8')]
    if on_gpu:
        ways = [('bfloat16', False), ('bfloat16', True)]
    single, many = ({f'{n} at once, {dtype}{", compiled" * compiled}': partial(
        alone, our_writing_rate, n, dtype, compiled) for dtype, compiled in ways} for n in (1, 32))
    theirs = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if peer_kind() == 'llama2.c':
            build_run(folder)
            theirs = {"llama2.c's run": partial(run_writing_rate, folder)}
        elif peer_kind() == 'nanoGPT':
            theirs = {'nanoGPT': partial(alone, nanogpt_writing_rate)}
        rates = report(in_turn(single | many | theirs), 'tokens/s')
        quickstart_checkpoint(folder / 'best.pt')
        starts = report(in_turn({
            'import torch': lambda: seconds_of(lambda: script('-c', 'import torch')),
            'sample.py, 1 token': lambda: seconds_of(lambda: script(
                'sample.py', f'--out_dir={folder}', '--num_samples=1', '--max_new_tokens=1', '--device=cpu')),
        }), 's')
    one, all_ = (max(rates[name] for name in names) for names in (single, many))
    at_once = {name: rates[many_] / rates[name] for name, many_ in zip(single, many, strict=True)}
    at_once['the fastest'] = all_ / one
    print('32 stories at once, times one: ' + ', '.join(f'{name}: {n:.2f}' for name, n in at_once.items()))
    figures = {'tokens_per_s': rates, 'at_once_ratio': at_once, 'seconds_to_first_token': starts}
    for name in theirs:  # a GPU is there for many stories
        figures['ratio'] = (all_ if on_gpu else one) / rates[name]
    return figures


def quickstart_checkpoint(path):
    """A checkpoint as config/quickstart.py leaves, untrained."""
    tokenizer = BPETokenizer.train(stories(2000, 0), 1536)
    config = dict(zip(_SIZES, (4, 4, 128, 256, tokenizer.vocab_size), strict=True))
    save_checkpoint(path, {'model': GPT(GPTConfig(**config)).state_dict(), 'config': config, 'iter': 0,
                           'tokenizer': tokenizer.state(), 'settings': {}})


# Memory


def loss_memory(how, dtype):
    """(loss, peak MB, seconds) of a forward and backward pass with GPT-2's vocabulary, of a fresh process."""
    keep_memory()
    torch.manual_seed(0)
    model = GPT(GPTConfig(**_SHAPES['15M'] | {'vocab_size': 50259}))
    model.max_logits = 2**26 if how == 'in parts' else 2**62
    if how == "torch's":
        options, cast = torch.nn.LinearCrossEntropyOptions(), DTYPES[dtype]
        model.summed_loss = lambda x, targets: F.linear_cross_entropy(
            x.to(cast), model.lm_head.weight.to(cast), targets, reduction='sum', options=options)
    idx = torch.randint(50259, (batch_size, model.config.block_size + 1))

    def work():
        with autocast(torch.device('cpu'), DTYPES[dtype]):
            loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        return loss.item()

    loss, spent = work(), seconds_of(work)
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss, in bytes
    return loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, spent


def memory():
    ways = 'at once', 'in parts', *(["torch's"] if hasattr(torch.nn, 'LinearCrossEntropyOptions') else [])
    done = in_turn({f'{how}, {dtype}': partial(alone, loss_memory, how, dtype)
                    for dtype in ('float32', 'bfloat16') for how in ways})
    loss, peak, spent = (report({name: [result[i] for result in results] for name, results in done.items()},
                                unit) for i, unit in enumerate(('nats', 'MB', 's')))
    for name in loss:
        at_once = 'at once, ' + name.split(', ')[1]
        print(f'{name}: loss {loss[name] - loss[at_once]:+.1e}, peak {peak[name] / peak[at_once]:.2f} times, '
              f'time {spent[name] / spent[at_once]:.2f} times that at once')
    return {'loss': loss, 'peak_mb': peak, 'seconds': spent}


# Preparing


def prepare_rate(source, encoding, num_proc, *more):
    """MB/s that prepare.py tells of itself."""
    with tempfile.TemporaryDirectory() as folder:
        said = script('data/tiny_stories/prepare.py', '--offline', *more, *flags(
            {'source': source, 'encoding_type': encoding, 'num_proc': num_proc, 'out_dir': folder}))
    return float(re.search(r'([\d.]+) MB/s', said)[1])


def library_rate(texts, encode):
    """MB/s of encode(list of str) on all stories, one core."""
    return sum(len(story.encode()) for story in texts) / 1e6 / seconds_of(lambda: encode(texts))


def prepare():
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        source, model = Path(folder) / 'stories.txt', Path(folder) / 'tokenizer.model'
        if text:
            source = Path(text).resolve()
        else:
            source.write_text('\n<|endoftext|>\n'.join([*stories(22_000, 0)] * 10), encoding='utf-8')
        texts = [story.strip('\n') for story in source.read_text(encoding='utf-8').split('<|endoftext|>')]
        model.write_bytes(BPETokenizer.train(texts[:20_000], 1536).files[model.name])
        pieces = sentencepiece.SentencePieceProcessor(str(model))
        gpt2 = open_tokenizer(tokenizer) if tokenizer else GPT2Tokenizer.load()
        tiktoken = gpt2._bpe.encode_ordinary  # the library's own
        gpt2.save(folder)
        Path(folder, 'meta.json').write_text(dumps({'encoding': 'gpt2'}))
        bpe, gpt2_too = f'--tokenizer={model}', f'--tokenizer={folder}'
        rates = report(in_turn({
            'char': partial(prepare_rate, source, 'char', 1),
            'bpe': partial(prepare_rate, source, 'bpe', 1, bpe),
            'sentencepiece alone': partial(library_rate, texts, partial(pieces.encode, num_threads=1)),
            'gpt2': partial(prepare_rate, source, 'gpt2', 1, gpt2_too),
            'tiktoken alone': partial(library_rate, texts, lambda all: [*map(tiktoken, all)]),
            'bpe, all cores': partial(prepare_rate, source, 'bpe', 0, bpe),
            'gpt2, all cores': partial(prepare_rate, source, 'gpt2', 0, gpt2_too),
        }), 'MB/s')
    ratios = {'ratio': rates['bpe'] / rates['sentencepiece alone'],
              'ratio_gpt2': rates['gpt2'] / rates['tiktoken alone']}
    return {'mb_per_s': rates} | ratios


def main():
    if what not in _WHAT:
        raise SettingError(f"what is {what!r}; type --what and one of {', '.join(_WHAT)}")
    if shape not in _SHAPES:
        raise SettingError(f"shape is {shape!r}, not one of {', '.join(_SHAPES)}")
    for name in 'repeats', 'batch_size', 'steps':
        if globals()[name] < 1:
            raise SettingError(f'{name} is {globals()[name]}; it must be at least 1')
    kind = peer_kind()
    if what == 'time_to_loss' and not text:
        raise SettingError('time_to_loss learns tiny Shakespeare: name its file with --text')
    if what == 'time_to_loss' and kind != 'nanoGPT':
        raise SettingError('time_to_loss compares with nanoGPT: name its checkout with --peer')
    print(f'{what}, {repeats} rounds, torch {torch.__version__}, {torch.get_num_threads()} threads, '
          f'{os.cpu_count()} cores')
    figures = {'what': what} | globals()[what]()
    if 'ratio' in figures:
        print(f"ratio: {figures['ratio']:.2f}")
    if json:
        Path(json).write_text(dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    configure(globals())
    run(main)
