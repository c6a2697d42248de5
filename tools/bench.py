"""Compare speed with other projects: both sides in turn, in one call, on the same machine and data.

    python tools/bench.py --what time_to_loss --peer ../nanoGPT --text tiny_shakespeare.txt
    python tools/bench.py --what train --peer ../llama2.c
    python tools/bench.py --what sample --peer ../llama2.c --json sample.json
    python tools/bench.py --what sample --peer llama.cpp
    python tools/bench.py --what page --peer ../llama2.c
    python tools/bench.py --what encodings --text stories.jsonl

A peer is a checkout of nanoGPT or llama2.c, which is not changed, or llama.cpp (the package xllamacpp).
Figures are medians; a ratio above 1 means that this project is faster. `encodings` has no peer: it compares
char, bpe and gpt2. Run nothing else at the same time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that the imports below are found

import json as json_format
import shutil
import tempfile
import time
from contextlib import closing
from functools import partial
from statistics import median

import numpy as np
import torch

from configurator import SettingError, configure, in_range, one_of, run
from core.checkpoint import load_checkpoint, load_model
from core.device import DTYPES, choose_device, choose_dtype
from core.generate import generate
from core.kernels import use_fast_cpu_kernels
from core.memory import configure_memory
from core.native import NativeModel
from data.shards import read_meta
from formats.page.page import HTML
from model import GPT, GPTConfig
from tools.baselines import (
    SHAPE_NAMES,
    export,
    find_kind,
    llama2c_generation_rate,
    llamacpp_generation_rate,
    make_characters,
    nanogpt_generation_rate,
    run_script,
    seconds_of,
    seconds_of_steps,
    train_nanogpt,
    training_rate,
)
from tools.browser import Browser

what = ''  # time_to_loss, train, sample, page or encodings
peer = ''  # a checkout of nanoGPT or llama2.c, or llama.cpp; '': only measure this project
text = ''  # time_to_loss: the path of tiny Shakespeare; encodings: stories, '' for the built-in corpus
json = ''  # file to write the figures to; its key `ratio` compares with the peer
repeats = 3  # rounds; each side runs once per round
shape = '15M'  # train and sample: size of the model, 15M or 110M (llama2.c's) or 124M (GPT-2's)
batch_size = 32  # train: sequences per step, of both sides
steps = 8  # train: timed steps per round, after two that are not timed
seconds = 60.0  # encodings: seconds of training of each side
picture = 'encodings.png'  # encodings: file to draw the result to (.png, .svg, .pdf); '': none
device = 'auto'  # auto, cpu or cuda

_LLAMA_15M = {'n_layer': 6, 'n_head': 6, 'n_embd': 288, 'block_size': 256, 'vocab_size': 4096}
_LLAMA_110M = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'vocab_size': 32000}
_GPT2_124M = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'vocab_size': 50259,
              'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'bias': True}
_SHAPES = {'15M': _LLAMA_15M, '110M': _LLAMA_110M, '124M': _GPT2_124M}
_VOCAB_SIZE = 32000  # sample and page: that of llama2.c's models
_N_TOKENS = 256  # sample and page: tokens that each side generates

# time_to_loss: with our settings `ours` and `changes`, so many `steps` reach the target, a validation loss in
# nats per character. On a CPU they are so few that a higher learning rate than the default is better.
_SMALL = {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'block_size': 64, 'device': 'cpu'}
_RECIPES = {
    'cpu': {
        # from nanoGPT's README, except that the last checkpoint counts whatever its loss, as it does for ours
        'nanogpt': _SMALL | {
            'batch_size': 12, 'max_iters': 2000, 'lr_decay_iters': 2000, 'dropout': 0.0, 'compile': False,
            'eval_iters': 20, 'log_interval': 1, 'always_save_checkpoint': True},
        'ours': _SMALL | {'batch_size': 32},
        'steps': 85,
        'changes': {'learning_rate': 0.04, 'warmup_iters': 2, 'tie_embeddings': False},
        'target': 1.886,
    },
    'cuda': {
        # nanoGPT's own config file for a GPU; it overfits, so its best checkpoint counts
        'nanogpt': {'log_interval': 1},
        'ours': {'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 256, 'dropout': 0.2,
                 'batch_size': 64, 'device': 'cuda'},
        'steps': 600,  # not yet measured
        'changes': {},
        'target': 1.4697,
    },
}


def check_settings():
    """Check the settings. Raises SettingError."""
    one_of(('time_to_loss', 'train', 'sample', 'page', 'encodings'), what=what)
    one_of(_SHAPES, shape=shape)
    in_range(at_least=1, repeats=repeats, batch_size=batch_size, steps=steps, seconds=seconds)
    kind = find_kind(peer)
    if what == 'page' and kind not in ('', 'llama2.c'):
        raise SettingError('the peer of a page must be a checkout of llama2.c')
    if what == 'time_to_loss' and (kind != 'nanoGPT' or not text):
        raise SettingError('time_to_loss needs --text tiny_shakespeare.txt and --peer, a checkout of nanoGPT')
    if kind == 'llama.cpp' and (what != 'sample' or choose_device(device).type != 'cpu'):
        raise SettingError('llama.cpp is only a peer of --what sample with --device cpu')
    if what == 'encodings' and picture:
        if Path(picture).suffix not in ('.png', '.svg', '.pdf'):
            raise SettingError(f'picture {picture} must end in .png, .svg or .pdf')
        if not Path(picture).parent.is_dir():
            raise SettingError(f'picture {picture} is in a folder that does not exist')


def check_packages():
    """Import the optional packages that are needed at the end, so that a missing one is reported at once."""
    if peer == 'llama.cpp':
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    if what == 'encodings' and picture:
        from matplotlib import figure  # noqa: F401


# for all benchmarks ----------------------------------------------------------------

def prepare(source, folder, **flags):
    """Run prepare.py."""
    run_script('data/tiny_stories/prepare.py', source=source, out_dir=folder, **flags)


def train_ours(folder, **flags):
    """Run train.py on the data in `folder`; return the records of its metrics.jsonl."""
    run_script('train.py', dataset=folder, out_dir=folder / 'run', overwrite=True, log_interval=1, **flags)
    lines = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
    return [json_format.loads(line) for line in lines]


def measure_in_turn(sides, unit):
    """Run each side once per round and print the medians; return {name: median}.

    sides: {name: function that returns a figure}.
    """
    figures = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            figures[name].append(side())
    medians = {}
    for name, values in figures.items():
        medians[name] = median(values)
        print(f'{name:24} {medians[name]:12,.5g} {unit}  ({min(values):,.5g} to {max(values):,.5g})')
    return medians


def peer_shape(**changes):
    """Return the shape of the model, without what only ours has."""
    return {name: _SHAPES[shape][name] for name in SHAPE_NAMES} | changes


def make_random_model(vocab_size):
    """Return a GPT of the shape, with the same random weights each time."""
    torch.manual_seed(0)
    config = GPTConfig(**_SHAPES[shape] | {'vocab_size': vocab_size})
    return GPT(config).eval()


# time to a loss -------------------------------------------------------------------

def time_of_ours(folder, settings, **flags):
    """Train ours; return the seconds of training and the loss over the whole validation text."""
    flags = settings | flags
    records = train_ours(folder, **flags, eval_interval=flags['max_iters'])
    tokens_per_step = settings['batch_size'] * settings['block_size']
    times = [tokens_per_step / record['tokens_per_s'] for record in records if 'tokens_per_s' in record]
    return seconds_of_steps(times, len(times)), records[-1]['val_loss']


def prepare_shakespeare(folder):
    """Copy nanoGPT into `folder` and prepare the text for both sides.

    Returns (the copy, its validation ids, our prepared folder).
    """
    checkout = folder / 'nanoGPT'
    shutil.copytree(peer, checkout, ignore=shutil.ignore_patterns('.git', 'out*'))
    data = checkout / 'data' / 'shakespeare_char'
    shutil.copy(text, data / 'input.txt')
    run_script('prepare.py', cwd=data)
    prepared = folder / 'ours'
    prepare(Path(text).resolve(), prepared, encoding_type='char', offline=True)
    return checkout, np.fromfile(data / 'val.bin', np.uint16), prepared


def time_to_loss():
    """Train nanoGPT, ours up to the target, and ours for as long as nanoGPT."""
    recipe = _RECIPES[choose_device(device).type]
    names = 'nanoGPT', 'ours, to the target', "ours, nanoGPT's time"
    results = {name: [] for name in names}  # (seconds, loss) of each round
    with tempfile.TemporaryDirectory() as folder:
        checkout, val_ids, prepared = prepare_shakespeare(Path(folder))
        for seed in range(repeats):
            theirs = train_nanogpt(checkout, val_ids, recipe['nanogpt'])
            short = time_of_ours(prepared, recipe['ours'] | recipe['changes'], max_iters=recipe['steps'],
                                 seed=seed)
            steps_in_their_time = int(recipe['steps'] * theirs[0] / short[0])
            long = time_of_ours(prepared, recipe['ours'], max_iters=steps_in_their_time, seed=seed)
            for name, result in zip(names, (theirs, short, long), strict=True):
                results[name].append(result)

    return compare_times(results, recipe['target'])


def compare_times(results, target):
    """Print and return the medians. results: {name: (seconds, loss) of each round} of the three sides."""
    spent, losses = [], []
    for name, rounds in results.items():
        spent.append(median(train_seconds for train_seconds, _ in rounds))
        losses.append(median(loss for _, loss in rounds))
        print(f'{name:24} {spent[-1]:8.2f} s of training, {losses[-1]:.4f} nats per character')
    _, loss_of_ours, _ = losses
    ratio = spent[0] / spent[1] if loss_of_ours <= target else 0.0
    return {'seconds': spent, 'losses': losses, 'target': target, 'ratio': ratio}


# training -------------------------------------------------------------------------

def our_training_rate(folder, torch_device):
    """Return the tokens/s of train.py, with its default settings except for the shape and the batch."""
    sizes = {name: size for name, size in _SHAPES[shape].items() if name != 'vocab_size'}
    records = train_ours(folder, batch_size=batch_size, device=torch_device, max_iters=steps + 2,
                         eval_iters=1, **sizes)
    rates = [record['tokens_per_s'] for record in records if 'tokens_per_s' in record]
    return median(rates[2:])


def train():
    """Compare the speed of training, on random text with as many characters as the vocabulary has tokens."""
    torch_device = choose_device(device)
    if torch_device.type == 'cuda':
        dtypes = [choose_dtype('auto', torch_device)]
    else:
        dtypes = [torch.float32, torch.bfloat16]
    with tempfile.TemporaryDirectory() as folder:
        source, prepared = Path(folder, 'random.txt'), Path(folder, 'prepared')
        characters = np.array(make_characters(_SHAPES[shape]['vocab_size']))
        random_text = ''.join(np.random.default_rng(0).choice(characters, 2_000_000))
        source.write_text(random_text, 'utf-8')
        prepare(source, prepared, encoding_type='char', offline=True)
        sides = {'ours': partial(our_training_rate, prepared, torch_device)}
        if peer:
            for dtype in dtypes:
                name = f"{find_kind(peer)}, {str(dtype).removeprefix('torch.')}"
                sides[name] = partial(
                    training_rate, peer, peer_shape(), batch_size, steps, torch_device, dtype)
        rates = measure_in_turn(sides, 'tokens/s')
    figures = {'tokens_per_s': rates}
    ours, *theirs = rates.values()
    for key, rate in zip(('ratio', 'ratio_bfloat16'), theirs, strict=False):
        figures[key] = ours / rate
    return figures


# generation -----------------------------------------------------------------------

def our_generation_rate(dtype, **sampling):
    """Return our tokens/s after a first run: of one story, on a GPU of 32 at once and compiled."""
    torch_device = choose_device(device)
    on_gpu = torch_device.type == 'cuda'
    model = make_random_model(_VOCAB_SIZE)
    if dtype == 'int8':
        model = NativeModel(model)
    else:
        if not on_gpu:  # as sample.py does
            use_fast_cpu_kernels(model)
        model = model.to(torch_device, DTYPES[dtype])
    n_stories = 32 if on_gpu else 1
    prompt = torch.ones(n_stories, 1, dtype=torch.long, device=torch_device)

    def write():
        for tokens in generate(model, prompt, _N_TOKENS, compile=on_gpu, **sampling):
            tokens.tolist()  # waits for a GPU, as sample.py does

    write()
    return n_stories * _N_TOKENS / seconds_of(write)


def sample():
    """Compare the speed of generation."""
    torch_device = choose_device(device)
    configure_memory(torch_device)  # as sample.py does
    kind = find_kind(peer)
    dtypes = ['bfloat16'] if torch_device.type == 'cuda' else ['float32', 'bfloat16', 'int8']
    with tempfile.TemporaryDirectory() as folder:
        if kind == 'llama.cpp':
            return sample_next_to_llamacpp(Path(folder))
        sides = {dtype: partial(our_generation_rate, dtype) for dtype in dtypes}
        if kind == 'nanoGPT':
            sizes = peer_shape(vocab_size=_VOCAB_SIZE)
            sides[kind] = partial(nanogpt_generation_rate, peer, sizes, _N_TOKENS, torch_device)
        if kind == 'llama2.c':
            model = make_random_model(_VOCAB_SIZE)
            sides[kind] = partial(llama2c_generation_rate, peer, Path(folder), model, _N_TOKENS)
        rates = measure_in_turn(sides, 'tokens/s')
    figures = {'tokens_per_s': rates}
    if kind:
        figures['ratio'] = max(rates[dtype] for dtype in dtypes) / rates[kind]
    return figures


def sample_next_to_llamacpp(folder):
    """Compare with llama.cpp: the same weights in 8 bits; from the 40 likeliest tokens, then greedy."""
    sides = {}
    model = make_random_model(_VOCAB_SIZE)
    for name, temperature, top_k in ('top_k 40', 0.8, 40), ('greedy', 0.0, 0):
        sides[f'int8, {name}'] = partial(our_generation_rate, 'int8', temperature=temperature, top_k=top_k)
        sides[f'llama.cpp, {name}'] = partial(
            llamacpp_generation_rate, folder, model, _N_TOKENS, temperature, top_k)
    rates = measure_in_turn(sides, 'tokens/s')
    ours, theirs, ours_greedy, theirs_greedy = rates.values()
    return {'tokens_per_s': rates, 'ratio': ours / theirs, 'ratio_greedy': ours_greedy / theirs_greedy}


# the page of export.py ------------------------------------------------------------

_START_WRITING = f"""
    document.getElementById('prompt').value = '';
    document.getElementById('length').value = {_N_TOKENS - 2};
    document.getElementById('write').click();
"""
_HAS_WORD = "document.querySelector('.piece') !== null"
_HAS_FINISHED = "document.getElementById('story').ariaBusy === 'false'"


def page_generation_rate(browser, path, first_words):
    """Return the tokens/s that a page shows in Chromium for its second story.

    The seconds from opening the page to its first word are appended to `first_words`.
    """
    start = time.perf_counter()
    browser.open(path)
    browser.js(_START_WRITING)
    browser.wait(_HAS_WORD, 60)
    first_words.append(time.perf_counter() - start)
    browser.wait(_HAS_FINISHED, 60)
    browser.js("document.getElementById('again').click()")
    browser.wait(_HAS_FINISHED, 60)
    speed = browser.js("document.getElementById('speed').textContent")  # '255 tokens, 1234 per second'
    return float(speed.split()[2])


def page():
    """Measure the page of export.py: speed, seconds to the first word, size; for two sizes of vocabulary."""
    kind = find_kind(peer)
    sides, first_words, sizes = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, closing(Browser()) as browser:
        for vocab_size in _VOCAB_SIZE, 4096:
            name = f'page, {vocab_size:,} tokens'
            path = Path(folder, f'{vocab_size}.html')
            model = make_random_model(vocab_size)
            export(HTML(), path, model)
            sizes[name] = path.stat().st_size / model.n_params()
            first_words[name] = []
            sides[name] = partial(page_generation_rate, browser, path, first_words[name])
        if kind:
            model = make_random_model(_VOCAB_SIZE)
            sides[kind] = partial(llama2c_generation_rate, peer, Path(folder), model, _N_TOKENS)
        rates = measure_in_turn(sides, 'tokens/s')
    for name, size in sizes.items():
        first_word = median(first_words[name])
        print(f'{name:24} {first_word:.2f} s to the first word, {size:.3f} bytes per parameter')
    figures = {'tokens_per_s': rates, 'first_word': first_words, 'bytes_a_parameter': sizes}
    if kind:
        figures['ratio'] = rates[f'page, {_VOCAB_SIZE:,} tokens'] / rates[kind]
    return figures


# encodings ------------------------------------------------------------------------

def evaluations_in_time(folder, seed):
    """Train for `seconds` on the data in `folder`; return the records of the evaluations.

    The learning rate falls to 0 with the last step, so the number of steps must be known. 30 steps tell how
    many fit; if the run then takes 10% more or less time than it should, it is repeated once with the number
    that it tells itself.
    """
    train_on = partial(train_ours, folder, config_file='config/quickstart.py', device=device, seed=seed)
    n_steps = 30
    records = train_on(max_iters=n_steps, eval_interval=n_steps, eval_iters=1)
    for _ in range(2):
        spent = records[-1]['seconds'] - records[1]['seconds']  # without the first step, which is slower
        n_steps = max(2, round(seconds * (n_steps - 1) / spent))
        records = train_on(max_iters=n_steps, eval_interval=n_steps // 6 + 1)
        if abs(records[-1]['seconds'] / seconds - 1) < 0.1:
            break
    return [record for record in records if 'val_bpb' in record]


def encodings():
    """Train the quickstart on the same stories in each encoding; compare bits per byte after equal times.

    The context has equally many tokens, not bytes: then a token costs the same, except for the vocabulary.
    How far back the tokens reach is part of what an encoding gives.
    """
    source, val_percentage = 'sample', 0
    if text:
        source = Path(text).resolve()
    if text and source.is_file():
        val_percentage = min(10, 1e7 / max(source.stat().st_size, 1))  # about 100 KB
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, name) for name in ('char', 'bpe', 'gpt2')]
        for path in folders:
            prepare(source, path, encoding_type=path.name, val_percentage=val_percentage)
        runs = {path.name: [] for path in folders}
        for seed in range(repeats):
            for path in folders:
                runs[path.name].append(evaluations_in_time(path, seed))
        for path in folders:
            found[path.name] = figures_of_encoding(path, runs[path.name])
    return {'encodings': found}


def figures_of_encoding(folder, runs):
    """Print and return the figures of an encoding. runs: for each run, the records of its evaluations."""
    val = read_meta(folder)['splits']['val']
    model = load_model(load_checkpoint(folder / 'run' / 'ckpt.pt'))
    figures = {
        'val_bpb': median(records[-1]['val_bpb'] for records in runs),
        'seconds': median(records[-1]['seconds'] for records in runs),
        'iter': median(records[-1]['iter'] for records in runs),
        'parameters': model.n_params(),
        'bytes': val['bytes'],
        'tokens_per_byte': val['tokens'] / val['bytes'],
        'curves': [],
    }
    for records in runs:
        figures['curves'].append([(record['seconds'], record['val_bpb']) for record in records])
    line = ('{:5} {val_bpb:.4f} bits per byte in {seconds:.1f} s, {iter:,.0f} steps; '
            '{parameters:,} parameters, {tokens_per_byte:.3f} tokens per byte')
    print(line.format(folder.name, **figures))
    return figures


def draw_encodings(found):
    """Draw bits per byte over seconds of training to `picture`, a line for each run."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    for i, (name, figures) in enumerate(found.items()):
        for seed, curve in enumerate(figures['curves']):
            times = [second for second, _ in curve]
            bits = [bits for _, bits in curve]
            axes.semilogy(times, bits, f'C{i}.-', base=2, label=name if seed == 0 else None)
    axes.set(xlabel='seconds of training', ylabel='bits per byte of the validation stories')
    axes.yaxis.set_major_formatter('{x:g}')  # 0.5 instead of 2 to the power of -1
    axes.legend()
    axes.figure.savefig(picture)


_BENCHMARKS = {'time_to_loss': time_to_loss, 'train': train, 'sample': sample, 'page': page,
               'encodings': encodings}


def main():
    check_settings()
    check_packages()
    print(f'{what}, {repeats} rounds, torch {torch.__version__}, {torch.get_num_threads()} threads')
    measure = _BENCHMARKS[what]
    figures = {'what': what} | measure()
    if 'ratio' in figures:
        print(f"ratio: {figures['ratio']:.2f}")
    if json:
        Path(json).write_text(json_format.dumps(figures, indent=1) + '\n')
    if what == 'encodings' and picture:
        draw_encodings(figures['encodings'])


if __name__ == '__main__':
    configure(globals())
    run(main)
