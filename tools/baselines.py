"""The programs that bench.py compares ours with: nanoGPT and llama2.c, checkouts that stay as they are, and
llama.cpp, a package. Each runs as its users run it."""

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

from configurator import SettingError, UserError
from core.device import autocast
from core.generate import SDPA_BACKENDS
from data.tokenizer import CharTokenizer
from formats.gguf import GGUF
from formats.llama2c import Llama2c

ROOT = Path(__file__).resolve().parents[1]  # where our scripts run
SIZES = 'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size'


def command(*words, cwd=ROOT):
    """What a program prints. Raises UserError, with the last line of its stderr, where it fails."""
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, errors='replace')
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise UserError(f"{' '.join(map(str, words[:3]))} failed with status {done.returncode}: {reason}")
    return done.stdout + done.stderr


def script(*words, cwd=ROOT, **flags):
    """What a Python script prints, run with these flags."""
    return command(sys.executable, *words, *(f'--{name}={value}' for name, value in flags.items()), cwd=cwd)


def seconds_of(work):
    """How long work() takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def seconds_of_steps(times, n, evaluated=()):
    """The time of the first n steps, where the median stands in for step 0, in which a model may compile, and
    for those that evaluate."""
    return sum(median(times) if i in {0, *evaluated} else t for i, t in enumerate(times[:n]))


def peer_kind(peer):
    """'nanoGPT', 'llama2.c', 'llama.cpp', or '' where `peer` is. Raises SettingError for anything else."""
    marks = {'llama2.c': 'run.c', 'nanoGPT': 'config/train_shakespeare_char.py'}
    kinds = [kind for kind, file in marks.items() if Path(peer, file).is_file()]
    if peer in ('', 'llama.cpp'):
        return peer
    if not kinds:
        raise SettingError(f'peer {peer!r} is no checkout of nanoGPT or llama2.c, and not llama.cpp')
    return kinds[0]


def peer_model(peer, **sizes):
    """The model of nanoGPT or llama2.c with random weights, of the sizes that GPTConfig names."""
    spec = importlib.util.spec_from_file_location('peer_model', Path(peer) / 'model.py')
    module = sys.modules['peer_model'] = importlib.util.module_from_spec(spec)  # its dataclass looks there
    sys.dont_write_bytecode = True  # into the checkout
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):
        if peer_kind(peer) == 'nanoGPT':
            return module.GPT(module.GPTConfig(**sizes, dropout=0.0, bias=False))
        theirs = {'n_embd': 'dim', 'n_layer': 'n_layers', 'n_head': 'n_heads', 'block_size': 'max_seq_len'}
        return module.Transformer(module.ModelArgs(
            multiple_of=32, **{theirs.get(name, name): size for name, size in sizes.items()}))


def made_up_characters(vocab_size):
    """As many as make a char vocabulary of that size: 259 ids are others, and ' ', <blank> and <middle>."""
    return [chr(0x10000 + i) for i in range(vocab_size - 262)]


# training -------------------------------------------------------------------------

@torch.no_grad()
def nanogpt_loss(model, ids, block_size):
    """Nats a character over the whole windows of the validation text, which our train.py takes too."""
    n = (len(ids) - 1) // block_size * block_size
    x, y = (torch.from_numpy(ids[i:i + n].astype(np.int64)).view(-1, block_size) for i in (0, 1))
    losses = [model(*part)[1].item() * len(part[0]) for part in zip(x.split(64), y.split(64), strict=True)]
    return sum(losses) / len(x)


def train_nanogpt(checkout, val_ids, values):
    """Train a copy of nanoGPT: (seconds to the step of its checkpoint, the loss of that)."""
    words = 'train.py', 'config/train_shakespeare_char.py', '--out_dir=out-bench'
    printed = script(*words, cwd=checkout, **values)
    times = [float(ms) / 1000 for ms in re.findall(r'^iter \d+: .*time ([\d.]+)ms', printed, re.M)]
    evaluated = [int(step) for step in re.findall(r'^step (\d+): ', printed, re.M)]
    saved = torch.load(checkout / 'out-bench' / 'ckpt.pt', weights_only=True)
    sizes = {name: size for name, size in saved['model_args'].items() if name in SIZES}
    model = peer_model(checkout, **sizes).eval()
    model.load_state_dict({name.removeprefix('_orig_mod.'): w for name, w in saved['model'].items()})
    seconds = seconds_of_steps(times, saved['iter_num'], evaluated)
    return seconds, nanogpt_loss(model, val_ids, sizes['block_size'])


def training_rate(peer, sizes, batch_size, steps, device, ptdtype):
    """Tokens/s of a training step, its data in memory already; compiled on a GPU, as is their default."""
    kind, model = peer_kind(peer), peer_model(peer, **sizes).to(device)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(0.1, 5e-4, (0.9, 0.95), device.type)
    compiled_model = torch.compile(model) if device.type == 'cuda' else model
    x, y = torch.randint(sizes['vocab_size'], (2, batch_size, sizes['block_size']), device=device)

    def step():
        with autocast(device, ptdtype):
            result = compiled_model(x, y)
            loss = model.last_loss if kind == 'llama2.c' else result[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return x.numel() / median([seconds_of(step) for _ in range(steps + 2)][2:])


# writing --------------------------------------------------------------------------

def nanogpt_writes(peer, sizes, n_tokens, device):
    """Tokens/s of nanoGPT's generate, which writes one story; on a GPU in bfloat16, its default there."""
    model = peer_model(peer, **sizes).eval().to(device)
    prompt = torch.ones(1, 1, dtype=torch.long, device=device)
    ptdtype = torch.bfloat16 if device.type == 'cuda' else torch.float32
    with autocast(device, ptdtype), sdpa_kernel(SDPA_BACKENDS):
        return n_tokens / seconds_of(lambda: model.generate(prompt, n_tokens, 0.8, 200).tolist())


def export(fmt, path, model):
    """Our export of a model."""
    tokenizer = CharTokenizer.train(made_up_characters(model.config.vocab_size))
    checkpoint = {'config': asdict(model.config), 'model': model.state_dict(), 'settings': {}}
    fmt.write(path, checkpoint, tokenizer)


def llama2c_writes(peer, folder, model, n_tokens):
    """What llama2.c's `run` says of itself; compiled when there is none in `folder`."""
    if not (folder / 'run').exists():
        make_runomp = 'gcc', '-Ofast', '-march=native', '-fopenmp'
        command(*make_runomp, Path(peer) / 'run.c', '-lm', '-o', folder / 'run')
        export(Llama2c(), folder, model)
    words = '-z', folder / 'tokenizer.bin', '-t', '1', '-p', '1', '-s', '1', '-n', n_tokens
    return float(re.search(r'tok/s: ([\d.]+)', command(folder / 'run', folder / 'model.bin', *words))[1])


def llamacpp_writes(folder, model, n_tokens, temperature, top_k):
    """What llama.cpp says of itself, in q8_0 with flash attention: in a process of its own, as its threads go
    on spinning for a while."""
    path = folder / 'model.gguf'
    if not path.exists():
        export(GGUF('q8_0'), path, model)
    drawing = {'temperature': temperature, 'top_k': top_k, 'samplers': ['top_k', 'temperature']}
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(ask_llamacpp, (path, n_tokens, torch.get_num_threads(), drawing))


def ask_llamacpp(path, n_tokens, n_threads, drawing):
    """Tokens/s, once it has written some."""
    torch.set_num_threads(n_threads)
    llamacpp = GGUF()
    llamacpp.read(path, exact=False)
    for _ in range(2):
        answer = llamacpp.ask('/completion', prompt=[1], n_predict=n_tokens - 1, ignore_eos=True, **drawing)
    return answer['timings']['predicted_per_second']
