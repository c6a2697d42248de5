"""Our figures beside those of a peer: in turn, in one call, on the same machine and data.

    python bench.py --what time_to_loss --peer ../nanoGPT --text tiny_shakespeare.txt
    python bench.py --what train --peer ../llama2.c
    python bench.py --what sample --peer ../llama2.c --json sample.json
    python bench.py --what sample --peer llama.cpp
    python bench.py --what page --peer ../llama2.c
    python bench.py --what encodings --text stories.jsonl

A peer is a checkout of nanoGPT or llama2.c, which stays as it is, or llama.cpp, the package xllamacpp.
Figures are medians; a ratio above 1 says that ours is faster. `encodings` has no peer: it is char, bpe and
gpt2. Let nothing else run meanwhile.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

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
from core.device import DTYPES, choose_device, choose_dtype, configure_memory
from core.generate import generate
from core.quantize import to_int8
from data.shards import read_meta
from formats.page.page import HTML
from model import GPT, GPTConfig
from tools.baselines import (
    SIZES,
    export,
    llama2c_writes,
    llamacpp_writes,
    made_up_characters,
    nanogpt_writes,
    peer_kind,
    script,
    seconds_of,
    seconds_of_steps,
    train_nanogpt,
    training_rate,
)
from tools.browser import Browser

what = ''  # time_to_loss, train, sample, page or encodings
peer = ''  # path of a checkout of nanoGPT or llama2.c, or llama.cpp; '': our figures alone
text = ''  # path of the text or stories: tiny Shakespeare for time_to_loss; '' for encodings: built in
json = ''  # file to write the figures to, with the key `ratio` where a peer is compared
repeats = 3  # rounds, each side once a round
shape = '15M'  # of train and sample: 15M, 110M (llama2.c's) or 124M (GPT-2's)
batch_size = 32  # of train: sequences a step, for every side
steps = 8  # timed steps of a round of train, after two that are not
seconds = 60.0  # of training, of each side of encodings
picture = 'encodings.png'  # file to draw encodings to; '': none
device = 'auto'  # auto, cpu or cuda

_SHAPES = {
    '15M': dict(zip(SIZES, (6, 6, 288, 256, 4096), strict=True)),
    '110M': dict(zip(SIZES, (12, 12, 768, 1024, 32000), strict=True)),
    '124M': dict(zip(SIZES, (12, 12, 768, 1024, 50259), strict=True)) | {
        'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'bias': True},
}
_SMALL = {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'block_size': 64, 'device': 'cpu'}
# What nanoGPT's README has for a CPU, but the last checkpoint is kept whatever its loss, as we measure it.
_NANOGPT = _SMALL | {'batch_size': 12, 'max_iters': 2000, 'lr_decay_iters': 2000, 'dropout': 0.0,
                     'compile': False, 'eval_iters': 20, 'log_interval': 1, 'always_save_checkpoint': True}
# Of time_to_loss: nanoGPT's settings, ours, our steps to the target and what they change (on a CPU they are
# so few that a higher rate than the default is better), and the target, validation loss in nats a character.
_RECIPES = {
    'cpu': (_NANOGPT, _SMALL | {'batch_size': 32}, 85,
            {'learning_rate': 0.04, 'warmup_iters': 2, 'tie_embeddings': False}, 1.886),
    # Its config file for a GPU, which overfits: its best checkpoint counts. Our steps are yet to be measured.
    'cuda': ({'log_interval': 1},
             {'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 256, 'dropout': 0.2, 'batch_size': 64,
              'device': 'cuda'}, 600, {}, 1.4697),
}
_VOCAB_SIZE, _TOKENS = 32000, 256  # in `sample`: as llama2.c's models have; written by each side


# for all of them ------------------------------------------------------------------

def prepare(source, folder, **values):
    script('data/tiny_stories/prepare.py', source=source, out_dir=folder, **values)


def train_script(folder, **values):
    """The records of metrics.jsonl of our train.py, run on the data in `folder`."""
    script('train.py', dataset=folder, out_dir=folder / 'run', overwrite=True, log_interval=1, **values)
    return [*map(json_format.loads, (folder / 'run' / 'metrics.jsonl').read_text().splitlines())]


def in_turn(sides, unit):
    """{name: median} of {name: function that gives a figure}: each in turn, `repeats` rounds, printed."""
    rounds = [[side() for side in sides.values()] for _ in range(repeats)]
    figures = dict(zip(sides, zip(*rounds, strict=True), strict=True))
    for name, values in figures.items():
        print(f'{name:24} {median(values):12,.5g} {unit}  ({min(values):,.5g} to {max(values):,.5g})')
    return {name: median(values) for name, values in figures.items()}


# time to a loss -------------------------------------------------------------------

def run_ours(folder, values, **more):
    """Train ours: (seconds, loss over the whole validation text)."""
    records = train_script(folder, **values | more, eval_interval=more['max_iters'])
    tokens = values['batch_size'] * values['block_size']  # a step
    times = [tokens / record['tokens_per_s'] for record in records if 'tokens_per_s' in record]
    return seconds_of_steps(times, len(times)), records[-1]['val_loss']


def time_to_loss():
    nanogpt, ours, to_target, changed, target = _RECIPES[choose_device(device).type]
    rounds, names = [], ('nanoGPT', 'ours, to the target', "ours, nanoGPT's time")
    with tempfile.TemporaryDirectory() as folder:
        checkout, prepared = Path(folder) / 'nanoGPT', Path(folder) / 'ours'
        data = checkout / 'data' / 'shakespeare_char'
        shutil.copytree(peer, checkout, ignore=shutil.ignore_patterns('.git', 'out*'))
        shutil.copy(text, data / 'input.txt')
        script('prepare.py', cwd=data)
        val_ids = np.fromfile(data / 'val.bin', np.uint16)
        prepare(Path(text).resolve(), prepared, encoding_type='char', offline=True)
        for seed in range(repeats):
            theirs = train_nanogpt(checkout, val_ids, nanogpt)
            short = run_ours(prepared, ours | changed, max_iters=to_target, seed=seed)
            long = run_ours(prepared, ours, max_iters=int(to_target * theirs[0] / short[0]), seed=seed)
            rounds.append((theirs, short, long))
    seconds, losses = ([median(column) for column in zip(*values, strict=True)]  # of each of the three
                       for values in np.array(rounds).transpose(2, 0, 1))
    for name, spent, loss in zip(names, seconds, losses, strict=True):
        print(f'{name:24} {spent:8.2f} s of training, {loss:.4f} nats a character')
    ratio = seconds[0] / seconds[1] if losses[1] <= target else 0.0
    return {'seconds': seconds, 'losses': losses, 'target': target, 'ratio': ratio}


# training -------------------------------------------------------------------------

def our_rate(folder, torch_device):
    """Tokens/s of train.py, its defaults but for the shape and the batch."""
    sizes = {name: size for name, size in _SHAPES[shape].items() if name != 'vocab_size'}
    records = train_script(folder, batch_size=batch_size, device=torch_device, max_iters=steps + 2,
                           eval_iters=1, **sizes)
    return median([record['tokens_per_s'] for record in records if 'tokens_per_s' in record][2:])


def train():
    torch_device = choose_device(device)
    on_gpu = torch_device.type == 'cuda'
    dtypes = [choose_dtype('auto', torch_device)] if on_gpu else [torch.float32, torch.bfloat16]
    with tempfile.TemporaryDirectory() as folder:
        source, prepared = Path(folder, 'random.txt'), Path(folder, 'prepared')
        characters = np.array(made_up_characters(_SHAPES[shape]['vocab_size']))
        source.write_text(''.join(np.random.default_rng(0).choice(characters, 2_000_000)), 'utf-8')
        prepare(source, prepared, encoding_type='char', offline=True)
        sides = {'ours': partial(our_rate, prepared, torch_device)}
        sizes = {name: _SHAPES[shape][name] for name in SIZES}
        for ptdtype in dtypes if peer else ():
            sides[f'{peer_kind(peer)}, {str(ptdtype)[6:]}'] = partial(
                training_rate, peer, sizes, batch_size, steps, torch_device, ptdtype)
        rates = in_turn(sides, 'tokens/s')
    ours, *theirs = rates.values()
    ratios = zip(('ratio', 'ratio_bfloat16'), (ours / rate for rate in theirs), strict=False)
    return {'tokens_per_s': rates} | dict(ratios)


# writing --------------------------------------------------------------------------

def random_model(vocab_size=_VOCAB_SIZE):
    """The same each time."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**_SHAPES[shape] | {'vocab_size': vocab_size})).eval()


def we_write(dtype, **drawing):
    """Tokens/s, once it has written some; on a GPU, which is there for many stories, of 32, compiled."""
    torch_device = choose_device(device)
    on_gpu = torch_device.type == 'cuda'
    model = to_int8(random_model()) if dtype == 'int8' else random_model().to(torch_device, DTYPES[dtype])
    prompt = torch.ones(32 if on_gpu else 1, 1, dtype=torch.long, device=torch_device)

    def write():  # as sample.py does: with tolist() a GPU has done its work
        return [tokens.tolist() for tokens in generate(model, prompt, _TOKENS, compile=on_gpu, **drawing)]

    write()
    return prompt.numel() * _TOKENS / seconds_of(write)


def sample():
    torch_device, kind = choose_device(device), peer_kind(peer)
    configure_memory(torch_device)  # as sample.py does
    dtypes = ['bfloat16'] if torch_device.type == 'cuda' else ['float32', 'bfloat16', 'int8']
    with tempfile.TemporaryDirectory() as folder:
        if kind == 'llama.cpp':
            return beside_llamacpp(Path(folder))
        sides = {dtype: partial(we_write, dtype) for dtype in dtypes}
        if kind == 'nanoGPT':
            sizes = {name: _SHAPES[shape][name] for name in SIZES} | {'vocab_size': _VOCAB_SIZE}
            sides[kind] = partial(nanogpt_writes, peer, sizes, _TOKENS, torch_device)
        elif kind:
            sides[kind] = partial(llama2c_writes, peer, Path(folder), random_model(), _TOKENS)
        rates = in_turn(sides, 'tokens/s')
    ratio = {'ratio': max(rates[dtype] for dtype in dtypes) / rates[kind]} if kind else {}
    return {'tokens_per_s': rates} | ratio


def beside_llamacpp(folder):
    """The same weights in 8 bits on both sides, drawn from the 40 likeliest tokens, then greedy."""
    sides, model = {}, random_model()
    for name, temperature, top_k in ('top_k 40', 0.8, 40), ('greedy', 0.0, 0):
        sides[f'int8, {name}'] = partial(we_write, 'int8', temperature=temperature, top_k=top_k)
        sides[f'llama.cpp, {name}'] = partial(llamacpp_writes, folder, model, _TOKENS, temperature, top_k)
    rates = in_turn(sides, 'tokens/s')
    ours, theirs, ours_greedy, theirs_greedy = rates.values()
    return {'tokens_per_s': rates, 'ratio': ours / theirs, 'ratio_greedy': ours_greedy / theirs_greedy}


# a page ---------------------------------------------------------------------------

def page_writes(browser, path, firsts):
    """Tokens/s that a page tells in Chromium, once it has written; adds the seconds from opening it to the
    first word to `firsts`."""
    began = time.perf_counter()
    browser.open(path)
    browser.js(f"for (const [id, value] of [['prompt', ''], ['length', {_TOKENS - 2}]])"
               "  document.getElementById(id).value = value; document.getElementById('write').click()")
    browser.wait("document.querySelector('.piece') !== null", 60)
    firsts.append(time.perf_counter() - began)
    over = "document.getElementById('story').ariaBusy === 'false'"
    browser.wait(over, 60)
    browser.js("document.getElementById('again').click()")
    browser.wait(over, 60)
    return float(browser.js("document.getElementById('speed').textContent").split()[2].replace(',', ''))


def page():
    """Speed, seconds to the first word and size of export.py's page, with 32,000 tokens and with 4,096."""
    kind, sides, firsts, sizes = peer_kind(peer), {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, closing(Browser()) as browser:
        for vocab_size in _VOCAB_SIZE, 4096:
            name, path = f'page, {vocab_size:,} tokens', Path(folder, f'{vocab_size}.html')
            model = random_model(vocab_size)
            export(HTML(), path, model)
            sizes[name], firsts[name] = path.stat().st_size / model.n_params(), []
            sides[name] = partial(page_writes, browser, path, firsts[name])
        if kind:
            sides[kind] = partial(llama2c_writes, peer, Path(folder), random_model(), _TOKENS)
        rates = in_turn(sides, 'tokens/s')
    for name, first in firsts.items():
        print(f'{name:24} {median(first):.2f} s to the first word, {sizes[name]:.3f} bytes a parameter')
    ratio = {'ratio': rates[min(firsts)] / rates[kind]} if kind else {}  # both with 32,000
    return {'tokens_per_s': rates, 'first_word': firsts, 'bytes_a_parameter': sizes} | ratio


# encodings ------------------------------------------------------------------------

def evaluations(folder, seed):
    """The evaluations of train.py, of all validation stories, in `seconds` of training on `folder`. Its
    learning rate falls step by step, to 0 as the time ends: how many steps that will be, 30 tell, and
    where the machine then was slower or faster by 10%, the run itself, once."""
    train = partial(train_script, folder, config_file='config/quickstart.py', device=device, seed=seed)
    n, records = 30, train(max_iters=30, eval_interval=30, eval_iters=1)
    for _ in range(2):
        spent = records[-1]['seconds'] - records[1]['seconds']  # but for the first step, which is slower
        n = max(2, round(seconds * (n - 1) / spent))
        records = train(max_iters=n, eval_interval=n // 6 + 1)
        if abs(records[-1]['seconds'] / seconds - 1) < 0.1:
            break
    return [record for record in records if 'val_bpb' in record]


def encodings():
    """The quickstart on the same stories in each encoding: bits per byte after equal times of training.
    The context is equal in tokens, not in bytes: a token costs the same then, but for its row, and how
    far back they reach is part of what it gives. (1024 of them make char slower, and no better.)"""
    source, found = Path(text).resolve() if text else 'sample', {}
    share = min(10, 1e7 / max(source.stat().st_size, 1)) if text else 1  # for validation: about 100 KB
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, name) for name in ('char', 'bpe', 'gpt2')]
        for path in folders:
            prepare(source, path, encoding_type=path.name, val_percentage=share)
        rounds = [[evaluations(path, seed) for path in folders] for seed in range(repeats)]
        for path, runs in zip(folders, zip(*rounds, strict=True), strict=True):
            val = read_meta(path)['splits']['val']
            kept = 'val_bpb', 'seconds', 'iter'  # the last of each run
            figures = found[path.name] = {key: median(run[-1][key] for run in runs) for key in kept}
            figures |= {'parameters': load_model(load_checkpoint(path / 'run' / 'ckpt.pt')).n_params(),
                        'bytes': val['bytes'], 'tokens_per_byte': val['tokens'] / val['bytes'],
                        'curves': [[(at['seconds'], at['val_bpb']) for at in run] for run in runs]}
            print('{:5} {val_bpb:.4f} bits a byte in {seconds:.1f} s, {iter:,.0f} steps; {parameters:,}'
                  ' parameters, {tokens_per_byte:.3f} tokens a byte'.format(path.name, **figures))
    return {'encodings': found}


def draw(found):
    """Bits per byte over seconds of training, a line a run, as `picture`."""
    from matplotlib.figure import Figure  # takes half a second; where it is missing, `run` says so
    axes = Figure().subplots()
    for i, (name, figures) in enumerate(found.items()):
        for seed, curve in enumerate(figures['curves']):
            axes.semilogy(*zip(*curve, strict=True), f'C{i}.-', base=2, label=None if seed else name)
    axes.set(xlabel='seconds of training', ylabel='bits per byte of the validation stories')
    axes.yaxis.set_major_formatter('{x:g}')  # 0.5 and not 2 to the power of -1
    axes.legend()
    axes.figure.savefig(picture)


def main():
    one_of(('time_to_loss', 'train', 'sample', 'page', 'encodings'), what=what)
    one_of(_SHAPES, shape=shape)
    in_range(at_least=1, repeats=repeats, batch_size=batch_size, steps=steps, seconds=seconds)
    kind = peer_kind(peer)
    if what == 'page' and kind not in ('', 'llama2.c'):
        raise SettingError('the peer of a page is a checkout of llama2.c')
    if what == 'time_to_loss' and (kind != 'nanoGPT' or not text):
        raise SettingError('time_to_loss takes --text tiny_shakespeare.txt and --peer, a checkout of nanoGPT')
    if kind == 'llama.cpp' and (what != 'sample' or choose_device(device).type != 'cpu'):
        raise SettingError('llama.cpp is a peer of --what sample with --device cpu alone')
    if kind == 'llama.cpp':
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401, told before the others write
    if what == 'encodings' and picture:
        from matplotlib import figure  # noqa: F401, told before all the training
        if Path(picture).suffix not in ('.png', '.svg', '.pdf') or not Path(picture).parent.is_dir():
            raise SettingError(f'picture {picture} is no .png, .svg or .pdf in a folder that is there')
    print(f'{what}, {repeats} rounds, torch {torch.__version__}, {torch.get_num_threads()} threads')
    figures = {'what': what} | globals()[what]()
    if 'ratio' in figures:
        print(f"ratio: {figures['ratio']:.2f}")
    if json:
        Path(json).write_text(json_format.dumps(figures, indent=1) + '\n')
    if what == 'encodings' and picture:
        draw(figures['encodings'])


if __name__ == '__main__':
    configure(globals())
    run(main)
