"""Check this repository on a GPU or a Mac, and print what its authors would like to know.

    python tools/gpu_check.py > gpu_check.txt                       perhaps ten minutes on a large GPU
    python tools/gpu_check.py --peer ../nanoGPT > gpu_check.txt     the same, next to the speed of nanoGPT
    python tools/gpu_check.py --what numbers,writing                only these parts
    python tools/gpu_check.py --tiny                                try this script on any CPU

Please send us what it prints. If one part fails, the others go on.

    numbers      loss, gradients and logits, compared with those of model.py in float32 on the CPU
    compilation  whether the model compiles as a whole, gives the same numbers and is compiled only once
    speed        training at three shapes: tokens per second, memory, the kernels that take longest
    writing      tokens per second of one story and of 32 side by side, compiled and not
    runs         train.py, a run that is resumed, one that runs out of memory, and sample.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that the imports below are found

import json
import shutil
import subprocess
import tempfile
import time
import traceback
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from configurator import ROOT, SettingError, UserError, configure, run
from core.checkpoint import load_checkpoint
from core.device import autocast, choose_device, choose_dtype, peak_flops, to_device, try_compile
from core.evaluate import count_loss
from core.generate import generate
from core.kernels import use_fast_cpu_kernels, use_joined_products
from core.optim import clip_and_step, make_optimizers
from model import GPT, GPTConfig
from tools.baselines import SHAPE_NAMES, find_kind, seconds_of, training_rate

what = ''  # parts to check, separated by commas: numbers, compilation, speed, writing, runs; '': all
peer = ''  # speed: a checkout of nanoGPT to compare with; '': none
dataset = ''  # runs: a prepared folder to train on; '': prepare the built-in corpus
tiny = False  # small models and few steps, to try this script on a CPU
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps


class Shape(NamedTuple):
    config: dict  # arguments of GPTConfig
    n_rows: int  # sequences per micro-batch
    n_micro_batches: int  # per step


_110M = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024}
_GPT2 = {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu'}
_SHAPES = {
    'tiny_stories': Shape(
        {'n_layer': 8, 'n_head': 8, 'n_embd': 512, 'block_size': 512, 'vocab_size': 4096}, 64, 8),
    'llama_110m': Shape(_110M | {'mlp_width': 2048, 'vocab_size': 32000}, 16, 8),
    'gpt2_124m': Shape(_110M | _GPT2 | {'vocab_size': 50304}, 16, 4),
}
_TINY_SHAPE = Shape({'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 32, 'vocab_size': 300}, 4, 2)

# numbers: models that together have every choice of GPTConfig that changes a kernel, and how far from float32
# on the CPU their numbers may be, relative to their norm
_NUMBERS_SIZES = {'block_size': 128, 'vocab_size': 1000, 'n_layer': 2, 'n_head': 4, 'n_embd': 128}
_NUMBERS_CHOICES = [
    {},
    {'n_kv_head': 2},
    {'qk_norm': True},
    {'position': 'sinusoidal', 'mlp': 'relu2'},
    _GPT2 | {'bias': True, 'tie_embeddings': False},
]

_LARGEST_DIFFERENCES = {'float32': 1e-5, 'tf32': 1e-2, 'half': 1e-1}

_failed = []  # what has failed so far


def say(text):
    """Print a line that begins with the time."""
    print(time.strftime('%H:%M:%S'), text, flush=True)


def attempt(name, check, *arguments):
    """Call check(*arguments); if it fails, print the traceback and go on."""
    try:
        check(*arguments)
    except Exception as error:  # whatever a GPU that we do not know may raise
        _failed.append(name)
        say(f'{name} FAILED: {type(error).__name__}')
        traceback.print_exc(file=sys.stdout)


# models -------------------------------------------------------------------------

def shapes():
    """Return the shapes to measure, {name: Shape}."""
    return {'tiny': _TINY_SHAPE} if tiny else _SHAPES


def make_model(config, torch_device):
    """Return a GPT on the device, with the same random weights on each device. config: a dict."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**config)).to(torch_device)


def use_fast_kernels(model):
    """Put in place the kernels that train.py uses on the model's device."""
    device_type = model.device.type
    if device_type == 'cpu':
        use_fast_cpu_kernels(model)
    elif device_type == 'cuda':
        use_joined_products(model)


def make_batch(config, n_rows, torch_device):
    """Return inputs and targets (n_rows, block_size) on the device, the same random ones on each device."""
    generator = torch.Generator().manual_seed(1)
    size = 2, n_rows, config['block_size']
    x, y = torch.randint(config['vocab_size'], size, generator=generator)
    return x.to(torch_device), y.to(torch_device)


def loss_and_gradients(model, x, y, context):
    """Return the loss of a batch and all gradients in one tensor, on the CPU."""
    with context:
        loss = model(x, y)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return loss.detach().cpu(), gradients.cpu()


def difference(ours, expected):
    """Return how far a tensor is from the expected one, relative to the norm of that."""
    ours, expected = ours.double().cpu(), expected.double().cpu()
    return ((ours - expected).norm() / expected.norm()).item()


def wait_for(torch_device):
    """Wait until the device has computed all that it was given."""
    if torch_device.type == 'cuda':
        torch.cuda.synchronize()
    elif torch_device.type == 'mps':
        torch.mps.synchronize()


# numbers ------------------------------------------------------------------------

def check_numbers(torch_device, half):
    precisions = [('float32', torch.float32), ('half', half)]
    if torch_device.type == 'cuda':
        precisions.insert(1, ('tf32', torch.float32))
    for choices in _NUMBERS_CHOICES:
        expected = numbers_of(make_numbers_model(choices), torch.float32)
        for precision, dtype in precisions:
            model = make_numbers_model(choices).to(torch_device)
            use_fast_kernels(model)
            found = numbers_of(model, dtype, allow_tf32=precision == 'tf32')
            differences = {key: difference(found[key], expected[key]) for key in expected}
            name = f"numbers, {choices or 'the default'}, {precision}"
            say(f'{name}: ' + ', '.join(f'{key} {value:.1e}' for key, value in differences.items()))
            limit = _LARGEST_DIFFERENCES[precision]
            if not max(differences.values()) <= limit:  # also if one of them is nan
                _failed.append(f'{name} (more than {limit})')


def make_numbers_model(choices):
    """Return a small GPT on the CPU, with random weights as large as trained ones: then attention matters."""
    model = make_model(_NUMBERS_SIZES | choices, 'cpu')
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def numbers_of(model, dtype, allow_tf32=False):
    """Return what a model computes on a batch, {name: tensor}."""
    torch_device = model.device
    x, y = make_batch(_NUMBERS_SIZES, 9, torch_device)
    context = autocast(torch_device, dtype)  # allows TF32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    loss, gradients = loss_and_gradients(model, x, y, context)
    model.eval()
    with context, torch.no_grad():
        logits = model(x)
        total_loss, _ = count_loss(model, x, y)
    return {'loss': loss, 'evaluated loss': total_loss / y.numel(), 'gradients': gradients, 'logits': logits}


# compilation --------------------------------------------------------------------

def n_compiled_graphs():
    return torch._dynamo.utils.counters['stats']['unique_graphs']


def check_compilation(torch_device, half):
    shape = next(iter(shapes().values()))
    model = make_model(shape.config, torch_device)
    x, y = make_batch(shape.config, shape.n_rows, torch_device)
    context = autocast(torch_device, half)
    loss, gradients = loss_and_gradients(model, x, y, context)

    start = time.perf_counter()
    whole = torch.compile(model, fullgraph=True)  # raises an error if there is a graph break
    compiled_loss, compiled_gradients = loss_and_gradients(whole, x, y, context)
    say(f'compilation, as a whole: {time.perf_counter() - start:.0f} s; '
        f'it moves the loss by {difference(compiled_loss, loss):.1e}, '
        f'gradients by {difference(compiled_gradients, gradients):.1e}')

    compiled = try_compile(model, partial(count_loss, model), x, y, context)
    if compiled is None:
        raise UserError('try_compile fails')
    _, score = compiled
    before = n_compiled_graphs()
    model.eval()
    for n_rows in shape.n_rows, shape.n_rows // 2, 1:
        with context:
            score(x[:n_rows], y[:n_rows])
    if n_compiled_graphs() > before:
        raise UserError(f'batches with fewer rows were compiled again: {n_compiled_graphs() - before} graphs')
    say('compilation: batches with fewer rows were not compiled again')


# speed --------------------------------------------------------------------------

def check_speed(torch_device, half):
    for name, shape in shapes().items():
        attempt(f'speed, {name}', measure_training, name, shape, torch_device, half, True)
        if peer:
            attempt(f'speed, {name}, nanoGPT', measure_nanogpt, name, shape, torch_device, half)
    name, shape = next(iter(shapes().items()))
    attempt(f'speed, {name}, not compiled', measure_training, name, shape, torch_device, half, False)


def measure_training(name, shape, torch_device, half, is_compiled):
    """Print how fast a shape trains, as train.py does it, and what takes longest."""
    torch._dynamo.reset()
    model = make_model(shape.config, torch_device)
    use_fast_kernels(model)
    train_model = torch.compile(model) if is_compiled else model
    batch = [tensor.numpy() for tensor in make_batch(shape.config, shape.n_rows, 'cpu')]
    optimizers = make_optimizers(model, 'muon', 0.0, 0.1, (0.9, 0.95))
    scaler = torch.amp.GradScaler(torch_device.type, enabled=half == torch.float16)

    def accumulate():
        x, y = to_device(batch, torch_device)
        with autocast(torch_device, half):
            loss = train_model(x, y) / shape.n_micro_batches
        scaler.scale(loss).backward()
        wait_for(torch_device)

    def update():
        clip_and_step(model, optimizers, scaler, 1.0).item()

    def step():
        for _ in range(shape.n_micro_batches):
            accumulate()
        update()

    first = seconds_of(step)
    rate = shape.n_micro_batches * batch[0].size / median(seconds_of(step) for _ in range(5))
    micro_batch = median(seconds_of(accumulate) for _ in range(5))
    last = seconds_of(update)
    facts = [f'{rate:,.0f} tokens/s', f'first step {first:.1f} s', f'micro-batch {1000 * micro_batch:.1f} ms',
             f'update {1000 * last:.1f} ms']
    peak = peak_flops(torch_device)
    if peak > 0:
        facts.append(f'MFU {rate * model.flops_per_token() / peak:.1%}')
    how = 'compiled' if is_compiled else 'not compiled'
    say(f"speed, {name}, {how}: {', '.join(facts)}")
    if torch_device.type == 'cuda':
        say(f'speed, {name}, {how}: peak of the memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB')
        torch.cuda.reset_peak_memory_stats()
        print_kernels(accumulate)


def print_kernels(work):
    """Print how many kernels a function starts, and those that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    kernels = sorted(profile.key_averages(), key=lambda kernel: kernel.device_time_total, reverse=True)
    n_started = sum(kernel.count for kernel in kernels)
    total = sum(kernel.device_time_total for kernel in kernels)
    say(f'    {n_started} kernels per micro-batch, {total / 1000:.1f} ms')
    for kernel in kernels[:10]:
        say(f'    {kernel.device_time_total / 1000:6.2f} ms, {kernel.count:4} x {kernel.key[:80]}')


def measure_nanogpt(name, shape, torch_device, half):
    """Print how fast nanoGPT trains at the same sizes."""
    sizes = {size: shape.config[size] for size in SHAPE_NAMES}
    rate = training_rate(peer, sizes, shape.n_rows, 8, torch_device, half)
    say(f'speed, {name}, nanoGPT, one micro-batch per step: {rate:,.0f} tokens/s')


# writing ------------------------------------------------------------------------

def check_writing(torch_device, half):
    shape = next(iter(shapes().values()))
    n_tokens = min(250, shape.config['block_size'])
    model = make_model(shape.config, torch_device).eval()
    if torch_device.type == 'cuda':
        model = model.to(half)
        compiled_or_not = False, True
    else:
        use_fast_kernels(model)
        compiled_or_not = (False,)
    for is_compiled in compiled_or_not:
        for n_stories in 1, 32:
            name = f"writing {n_stories} at once, {'compiled' if is_compiled else 'not compiled'}"
            attempt(name, measure_writing, name, model, n_stories, n_tokens, is_compiled)


def measure_writing(name, model, n_stories, n_tokens, is_compiled):
    """Print how fast a model writes, and whether the same seed gives the same tokens."""
    torch_device = model.device
    prompt = torch.arange(1, n_stories + 1, device=torch_device)[:, None]
    written = []

    def write():
        steps = generate(model, prompt, n_tokens, temperature=0.9, compile=is_compiled)
        written.append([tokens.tolist() for tokens in steps])

    first = seconds_of(write)
    rate = n_stories * n_tokens / seconds_of(write)
    are_equal = 'equal' if written[0] == written[1] else 'NOT equal'
    say(f'{name}: {rate:,.0f} tokens/s, the first time {first:.1f} s; both times the tokens are {are_equal}')


# runs ---------------------------------------------------------------------------

def try_script(name, *words, status=0):
    """Run a script and print its exit status, which should be `status`, and its last lines."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, errors='replace',
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    say(f'runs, {name}: exit status {done.returncode}')
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for line in lines[-4:]:
        say(f'    {line[:250]}')
    if done.returncode != status:
        _failed.append(f'runs, {name}')


def check_runs(torch_device, half):
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed, data = f'{folder}/whole', f'{folder}/resumed', dataset
        if not data:
            data = f'{folder}/data'
            try_script('prepare', 'data/tiny_stories/prepare.py', '--source', 'sample', '--out_dir', data)
        recipe = ['config/tiny_stories.py']
        if tiny:
            recipe = ['config/quickstart.py', '--block_size', '32', '--batch_size', '2']
        train = ['train.py', *recipe, '--dataset', data, '--device', device, '--max_iters', '20',
                 '--eval_interval', '20', '--eval_iters', '4', '--log_interval', '1', '--save_interval', '10']
        try_script('train', *train, '--out_dir', whole)
        Path(resumed).mkdir()
        shutil.copy(f'{whole}/ckpt_10.pt', f'{resumed}/ckpt.pt')
        try_script('resume', 'train.py', '--init_from', 'resume', '--out_dir', resumed)
        compare_runs(Path(whole), Path(resumed))
        sample = ['sample.py', '--out_dir', whole, '--device', device, '--num_samples', '1']
        try_script('sample', *sample, '--dtype', 'auto')
        if torch_device.type != 'cpu':
            try_script('sample in int8, which is for a CPU', *sample, '--dtype', 'int8', status=2)
        if torch_device.type == 'cuda':
            try_script('sample, compiled', *sample, '--dtype', 'auto', '--compile')
            try_script('too large a batch', *train, '--out_dir', f'{folder}/large', '--compile', 'False',
                       '--batch_size', str(2**15), '--gradient_accumulation_steps', '1', status=1)


def compare_runs(whole, resumed):
    """Print how far a run that was resumed at step 10 is from the one that was not interrupted."""
    weights = []
    for path in whole, resumed:
        records = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
        rates = [record['tokens_per_s'] for record in records if 'tokens_per_s' in record]
        step = records[-2]  # the last step, before the last evaluation
        say(f"runs, {path.name}: loss {step['loss']:.6f} in step {step['iter']}, "
            f'{median(rates):,.0f} tokens/s')
        checkpoint = load_checkpoint(path / 'ckpt.pt')
        weights.append(torch.cat([weight.flatten() for weight in checkpoint['model'].values()]))
    say(f'runs: the weights differ by {difference(*weights):.1e}')


_PARTS = {'numbers': check_numbers, 'compilation': check_compilation, 'speed': check_speed,
          'writing': check_writing, 'runs': check_runs}


def check_settings():
    """Return the names of the parts to check. Raises SettingError."""
    names = what.split(',') if what else list(_PARTS)
    for name in names:
        if name not in _PARTS:
            raise SettingError(f"what has {name!r}; its parts are {', '.join(_PARTS)}")
    if find_kind(peer) not in ('', 'nanoGPT'):
        raise SettingError('the peer must be a checkout of nanoGPT')
    return names


def main():
    names = check_settings()
    torch_device = choose_device(device)
    half = choose_dtype('auto', torch_device)
    if half == torch.float32:
        half = torch.bfloat16
    say(f'torch {torch.__version__} on {torch_device}, half precision is {half}')
    if torch_device.type == 'cuda':
        free, total = torch.cuda.mem_get_info()
        say(f'{torch.cuda.get_device_name()}: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free')
    for name in names:
        attempt(name, _PARTS[name], torch_device, half)
    if _failed:
        raise UserError(f"failed: {'; '.join(_failed)}. Please send us what was printed")
    say('all parts have run')


if __name__ == '__main__':
    configure(globals())
    run(main)
