"""The programs that bench.py compares this project with, each run as its users run it.

nanoGPT and llama2.c are checkouts, which are not changed. llama.cpp is the Python package xllamacpp.
"""

import contextlib
import importlib.util
import io
import multiprocessing
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn.attention import sdpa_kernel

from configurator import ROOT, SettingError, UserError
from core.device import autocast
from core.generate import SDPA_BACKENDS
from data.tokenizer import CharTokenizer
from formats.gguf import GGUF
from formats.llama2c import Llama2c

SHAPE_NAMES = 'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size'  # in which all models are alike
# a file that only a checkout of the project has
CHECKOUTS = {'llama2.c': 'run.c', 'nanoGPT': 'config/train_shakespeare_char.py'}
LLAMA2C_NAMES = {'n_embd': 'dim', 'n_layer': 'n_layers', 'n_head': 'n_heads', 'block_size': 'max_seq_len',
                 'vocab_size': 'vocab_size'}


# running programs ---------------------------------------------------------------

def run_program(*words, cwd=ROOT):
    """Run a program and return what it prints. If it fails, raise UserError with its last line on stderr."""
    words = [str(word) for word in words]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, errors='replace')
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ['no message']
        raise UserError(f"{' '.join(words[:3])} failed with status {done.returncode}: {lines[-1]}")
    return done.stdout + done.stderr


def run_script(*words, cwd=ROOT, **flags):
    """Run a Python script with flags and return what it prints."""
    flags = [f'--{name}={value}' for name, value in flags.items()]
    return run_program(sys.executable, *words, *flags, cwd=cwd)


def seconds_of(work):
    """Return the seconds that work() takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_of_steps(times, n, evaluated=()):
    """Return the seconds of the first n steps of a run.

    The median replaces the time of step 0, which may compile the model, and of the steps that evaluate.
    """
    typical = median(times)
    return sum(typical if step == 0 or step in evaluated else times[step] for step in range(n))


# peers --------------------------------------------------------------------------

def find_kind(peer):
    """Return which project the setting `peer` means: nanoGPT, llama2.c, llama.cpp, or '' if it is ''.

    Raises SettingError if it is none of these.
    """
    if peer in ('', 'llama.cpp'):
        return peer
    for kind, file in CHECKOUTS.items():
        if Path(peer, file).is_file():
            return kind
    raise SettingError(f'peer {peer!r} is not llama.cpp, and not a checkout of nanoGPT or llama2.c')


def import_model_file(checkout):
    """Import the model.py of a checkout."""
    spec = importlib.util.spec_from_file_location('peer_model', Path(checkout) / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['peer_model'] = module  # where dataclasses look for it
    sys.dont_write_bytecode = True  # into the checkout
    spec.loader.exec_module(module)
    return module


def make_peer_model(checkout, shape):
    """Return the model of nanoGPT or llama2.c with random weights. shape: {name of SHAPE_NAMES: size}."""
    module = import_model_file(checkout)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        if find_kind(checkout) == 'nanoGPT':
            return module.GPT(module.GPTConfig(**shape, dropout=0.0, bias=False))
        theirs = {LLAMA2C_NAMES[name]: size for name, size in shape.items()}
        return module.Transformer(module.ModelArgs(multiple_of=32, **theirs))


def make_characters(vocab_size):
    """Return the characters of a char vocabulary of that size, besides its other tokens.

    Those are the first 259 ids (special tokens and bytes), the space, <blank> and <middle>.
    """
    return [chr(0x10000 + i) for i in range(vocab_size - 262)]


# training -----------------------------------------------------------------------

@torch.no_grad()
def nanogpt_loss(model, ids, block_size):
    """Return the loss (nats per character) of nanoGPT over the validation text, in whole windows.

    model(x, y) returns (logits, mean loss). Our own train.py evaluates on these windows, too.
    """
    n = (len(ids) - 1) // block_size * block_size
    x = torch.from_numpy(ids[:n].astype(np.int64)).view(-1, block_size)
    y = torch.from_numpy(ids[1:n + 1].astype(np.int64)).view(-1, block_size)
    total = 0.0
    for x_batch, y_batch in zip(x.split(64), y.split(64), strict=True):
        _, loss = model(x_batch, y_batch)
        total += loss.item() * len(x_batch)
    return total / len(x)


def train_nanogpt(checkout, val_ids, settings):
    """Train a copy of nanoGPT on Shakespeare. Return the seconds up to its checkpoint, and its loss then."""
    printed = run_script('train.py', 'config/train_shakespeare_char.py', '--out_dir=out-bench', cwd=checkout,
                         **settings)
    milliseconds = re.findall(r'^iter \d+: .*time ([\d.]+)ms', printed, re.M)
    times = [float(number) / 1000 for number in milliseconds]
    evaluated = {int(step) for step in re.findall(r'^step (\d+): ', printed, re.M)}

    saved = torch.load(checkout / 'out-bench' / 'ckpt.pt', weights_only=True)
    shape = {name: size for name, size in saved['model_args'].items() if name in SHAPE_NAMES}
    model = make_peer_model(checkout, shape).eval()
    weights = saved['model'].items()
    weights = {name.removeprefix('_orig_mod.'): w for name, w in weights}  # torch.compile adds the prefix
    model.load_state_dict(weights)
    loss = nanogpt_loss(model, val_ids, shape['block_size'])
    return seconds_of_steps(times, saved['iter_num'], evaluated), loss


def training_rate(checkout, shape, batch_size, n_steps, device, dtype):
    """Return the tokens/s of a peer's training steps; compiled on a GPU, as is the default of both.

    The data is in memory already. The median of n_steps steps counts, after two steps to warm up.
    """
    kind = find_kind(checkout)
    model = make_peer_model(checkout, shape).to(device)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(0.1, 5e-4, (0.9, 0.95), device.type)
    compiled_model = torch.compile(model) if device.type == 'cuda' else model
    x, y = torch.randint(shape['vocab_size'], (2, batch_size, shape['block_size']), device=device)

    def step():
        with autocast(device, dtype):
            result = compiled_model(x, y)
            loss = model.last_loss if kind == 'llama2.c' else result[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU

    times = [seconds_of(step) for _ in range(n_steps + 2)]
    return x.numel() / median(times[2:])


# generation ---------------------------------------------------------------------

def nanogpt_generation_rate(checkout, shape, n_tokens, device):
    """Return the tokens/s of nanoGPT's `generate`, for one story; on a GPU in bfloat16, its default there."""
    model = make_peer_model(checkout, shape).eval().to(device)
    prompt = torch.ones(1, 1, dtype=torch.long, device=device)
    dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32

    def write():
        model.generate(prompt, n_tokens, 0.8, 200).tolist()

    with autocast(device, dtype), sdpa_kernel(SDPA_BACKENDS):
        return n_tokens / seconds_of(write)


def export(fmt, path, model):
    """Write a model of ours to `path` in a format of formats/."""
    tokenizer = CharTokenizer.train(make_characters(model.config.vocab_size))
    checkpoint = {'config': asdict(model.config), 'model': model.state_dict(), 'settings': {}}
    fmt.write(path, checkpoint, tokenizer)


def llama2c_generation_rate(checkout, folder, model, n_tokens):
    """Return the tokens/s that llama2.c's `run` prints. If `folder` has no `run`, compile it there first."""
    program = folder / 'run'
    if not program.exists():
        run_program('gcc', '-Ofast', '-march=native', '-fopenmp', Path(checkout) / 'run.c', '-lm',
                    '-o', program)
        export(Llama2c(), folder, model)
    printed = run_program(program, folder / 'model.bin', '-z', folder / 'tokenizer.bin',
                          '-t', '1', '-p', '1', '-s', '1', '-n', n_tokens)
    return float(re.search(r'tok/s: ([\d.]+)', printed)[1])


def llamacpp_generation_rate(folder, model, n_tokens, temperature, top_k):
    """Return the tokens/s that llama.cpp reports, in q8_0 with flash attention.

    It runs in another process, because its threads keep spinning for a while.
    """
    path = folder / 'model.gguf'
    if not path.exists():
        export(GGUF('q8_0'), path, model)
    sampling = {'temperature': temperature, 'top_k': top_k, 'samplers': ['top_k', 'temperature']}
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(ask_llamacpp, (path, n_tokens, torch.get_num_threads(), sampling))


def ask_llamacpp(path, n_tokens, n_threads, sampling):
    """Let llama.cpp generate twice and return the tokens/s of the second time."""
    torch.set_num_threads(n_threads)
    llamacpp = GGUF()
    llamacpp.read(path, exact=False)
    for _ in range(2):
        answer = llamacpp.ask('/completion', prompt=[1], n_predict=n_tokens - 1, ignore_eos=True, **sampling)
    return answer['timings']['predicted_per_second']
