"""int8 weights for generation on a CPU: core/engine.c, compiled by the machine's C compiler.

    NativeModel(model)   a GPT with int8 weights, for core/generate.py

The time per token is mostly that of reading the weights, so they are int8. The engine is compiled when it is
first needed, and kept in the user's cache folder.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch

from configurator import UserError

SOURCE = Path(__file__).resolve().with_name('engine.c')
# -ffp-contract=off: every compiler computes the same bits
FLAGS = ['-O3', '-ffp-contract=off', '-fno-math-errno', '-shared', '-fPIC', '-pthread']
# for this machine's CPU: the first that the compiler knows
CPU_FLAGS = [['-march=native', '-mprefer-vector-width=512'], ['-march=native'], ['-mcpu=native'], []]
COMPILERS = 'cc', 'gcc', 'clang'

# the numbers of these choices in engine.c
NORMS = 'rms', 'layer'
POSITIONS = 'rope', 'learned', 'sinusoidal'
MLPS = 'swiglu', 'gelu', 'relu', 'relu2'
ALIGNMENT = 64  # of each part of the weights, in bytes
MAX_THREADS = 64  # in engine.c


# weights ------------------------------------------------------------------------

class EngineConfig(ctypes.Structure):
    """Config in engine.c."""

    _fields_ = [
        ('n_layer', ctypes.c_int32), ('n_head', ctypes.c_int32), ('n_kv_head', ctypes.c_int32),
        ('n_embd', ctypes.c_int32), ('block_size', ctypes.c_int32), ('vocab_size', ctypes.c_int32),
        ('mlp_width', ctypes.c_int32),
        ('norm', ctypes.c_int32), ('position', ctypes.c_int32), ('mlp', ctypes.c_int32),
        ('qk_norm', ctypes.c_int32), ('bias', ctypes.c_int32), ('tie_embeddings', ctypes.c_int32),
        ('norm_eps', ctypes.c_float),
    ]


def engine_config(config):
    """Return a GPTConfig as engine.c has it."""
    numbers = {name: getattr(config, name) for name, _ in EngineConfig._fields_}
    numbers['norm'] = NORMS.index(config.norm)
    numbers['position'] = POSITIONS.index(config.position)
    numbers['mlp'] = MLPS.index(config.mlp)
    return EngineConfig(**numbers)


def round_to_int8(weight):
    """Round a matrix (out, in) to int8; returns it and one bfloat16 scale per row: weight = int8 * scale."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
    rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127)
    return rounded.to(torch.int8), scale


def round_weights(model):
    """Round the matrices of a GPT as 8 bits do, but keep them in float32. Returns the model."""
    for p in model.parameters():
        if p.dim() == 2:
            integers, scale = round_to_int8(p)
            p.data = integers.float() * scale.float()[:, None]
    return model


def pack_weights(model):
    """Return the weights of a GPT as one tensor of bytes, in the order of `take_weights` in engine.c."""
    parts = []

    def add(tensor):
        data = tensor.detach().contiguous().view(torch.uint8).flatten()
        parts.append(data)
        parts.append(data.new_zeros(-len(data) % ALIGNMENT))

    def add_matrix(*layers):
        """Add the matrices of layers with the same input, one below the other, and their biases."""
        integers, scale = round_to_int8(torch.cat([layer.weight for layer in layers]))
        add(integers)
        add(scale.float())
        if getattr(layers[0], 'bias', None) is not None:
            add(torch.cat([layer.bias for layer in layers]).float())

    def add_norm(norm):
        add(norm.weight.float())
        if getattr(norm, 'bias', None) is not None:
            add(norm.bias.float())

    add_matrix(model.embedding)
    if model.config.position == 'learned':
        add_matrix(model.position)
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        add_norm(block.attn_norm)
        add_matrix(attn.q, attn.k, attn.v)
        if model.config.qk_norm:
            add_norm(attn.q_norm)
            add_norm(attn.k_norm)
        add_matrix(attn.proj)
        add_norm(block.mlp_norm)
        if mlp.kind == 'swiglu':
            add_matrix(mlp.gate, mlp.up)
        else:
            add_matrix(mlp.up)
        add_matrix(mlp.proj)
    add_norm(model.norm)
    if not model.config.tie_embeddings:
        add_matrix(model.lm_head)
    return torch.cat(parts)


def position_table(model):
    """Return the table that engine.c needs, float32 with a row per position, or None if it needs none."""
    if model.config.position == 'rope':
        return torch.cat((model.cos, model.sin), dim=1).float()
    if model.config.position == 'sinusoidal':
        return model.sinusoids.float().contiguous()
    return None


# the model ----------------------------------------------------------------------

class NativeModel:
    """A GPT with int8 weights that runs in engine.c. It can only generate, on a CPU.

    Called as a GPT is, with token ids (B, T) and a cache that `make_cache` returned, it adds the tokens to
    the cache and returns the logits (B, 1, V) of the token after the last one.
    Raises UserError if there is no C compiler, or a weight is not finite.
    """

    def __init__(self, model):
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError("the model's weights are not finite: did its training diverge?")
        self.config = model.config
        self.device = torch.device('cpu')
        self.library = load_library()
        self.engine_config = engine_config(model.config)
        self.weights = pack_weights(model)
        self.positions = position_table(model)
        if len(self.weights) != self.library.weights_size(self.engine_config):
            raise ValueError('pack_weights does not pack what engine.c reads')

    def make_cache(self, B):
        return NativeCache(self, B)

    def __call__(self, idx, cache):
        B, T = idx.shape
        if cache.length + T > self.config.block_size:
            raise ValueError(f'{cache.length + T} tokens do not fit into block_size {self.config.block_size}')
        if B != cache.B or idx.amin() < 0 or idx.amax() >= self.config.vocab_size:
            raise ValueError(f'token ids must be (B, T) with B = {cache.B}, below {self.config.vocab_size}')
        tokens = idx.int().contiguous()
        logits = torch.empty(B, 1, self.config.vocab_size)
        self.library.forward(cache.engine, tokens.data_ptr(), B, T, cache.length, logits.data_ptr())
        cache.length += T
        return logits


class NativeCache:
    """Keys and values of the tokens seen so far, for B sequences, with an engine of their own."""

    def __init__(self, model, B):
        library, config = model.library, model.engine_config
        n_threads = min(torch.get_num_threads(), MAX_THREADS)
        self.B = B
        self.length = 0  # tokens in the cache
        memory = torch.zeros(library.engine_size(config, B, n_threads), dtype=torch.uint8)
        self.engine = library.engine_open(memory.data_ptr(), config, model.weights.data_ptr(), B, n_threads)
        if model.positions is not None:
            n_bytes = 4 * model.positions.numel()
            ctypes.memmove(library.position_table(self.engine), model.positions.data_ptr(), n_bytes)
        weakref.finalize(self, close_engine, library, self.engine, memory, model.weights)


def close_engine(library, engine, *memory):
    """End the threads of an engine. memory: what they use, so that it is freed only afterwards."""
    library.engine_close(engine)


# compiling ----------------------------------------------------------------------

def load_library():
    """Return engine.c as a library of ctypes. It is compiled unless the user's cache folder has it.

    Raises UserError if there is no C compiler, or it fails.
    """
    compiler = find_compiler()
    name = f'engine-{fingerprint(compiler)}.so'
    folder = cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # Windows keeps it in use
            return open_library(compile_engine(compiler, Path(temporary, name)))
    try:
        return open_library(folder / name)
    except OSError:  # it is not there, or damaged
        return open_library(compile_engine(compiler, folder / name))


def find_compiler():
    """Return the command of a C compiler. Raises UserError if there is none."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return [path]
    if importlib.util.find_spec('ziglang') is not None:
        return [sys.executable, '-m', 'ziglang', 'cc']
    raise UserError('dtype int8 needs a C compiler, and there is none: pip install ziglang')


def fingerprint(compiler):
    """Return a name for what a compiler makes of engine.c on this CPU."""
    program = os.stat(compiler[0])
    facts = [compiler, program.st_size, program.st_mtime_ns, FLAGS, CPU_FLAGS, describe_cpu()]
    return hashlib.sha256(SOURCE.read_bytes() + repr(facts).encode()).hexdigest()[:16]


def describe_cpu():
    """Return what the system says of the instructions that the CPU knows."""
    text = f'{platform.system()} {platform.machine()} {platform.processor()}'
    try:
        lines = Path('/proc/cpuinfo').read_text(errors='replace').splitlines()
    except OSError:  # not Linux
        return text
    return '\n'.join([text, *[line for line in lines if line.startswith(('flags', 'Features'))][:1]])


def cache_folder():
    """Return a folder for compiled files that only this user can write to, or None if there is none."""
    try:
        if sys.platform == 'win32':
            base = Path(os.environ.get('LOCALAPPDATA') or Path.home() / 'AppData/Local')
        elif sys.platform == 'darwin':
            base = Path.home() / 'Library/Caches'
        else:
            base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
        folder = base / 'tiny-stories'
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name == 'posix':  # a library that somebody else put there would run as this user
            status = folder.stat()
            if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
        return folder if os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # no home, or a disk that cannot be written to
        return None


def compile_engine(compiler, path):
    """Compile engine.c for this CPU as the library `path`, and return the path. Raises UserError."""
    unfinished = path.with_name(f'{path.name}.{os.getpid()}')
    try:
        for cpu_flags in CPU_FLAGS:
            command = [*compiler, *FLAGS, *cpu_flags, '-o', str(unfinished), str(SOURCE)]
            result = subprocess.run(command, capture_output=True, text=True, errors='replace')
            if result.returncode == 0:
                os.replace(unfinished, path)
                return path
    finally:
        unfinished.unlink(missing_ok=True)
    lines = result.stderr.strip().splitlines() or [f'status {result.returncode}']
    raise UserError(f'{compiler[0]} cannot compile {SOURCE} for dtype int8 ({lines[-1]}): install another C '
                    'compiler')


def open_library(path):
    """Load the library at `path` and declare its functions."""
    library = ctypes.CDLL(str(path))
    pointer, config = ctypes.c_void_p, ctypes.POINTER(EngineConfig)
    library.weights_size.argtypes = [config]
    library.weights_size.restype = ctypes.c_size_t
    library.engine_size.argtypes = [config, ctypes.c_int, ctypes.c_int]
    library.engine_size.restype = ctypes.c_size_t
    library.engine_open.argtypes = [pointer, config, pointer, ctypes.c_int, ctypes.c_int]
    library.engine_open.restype = pointer
    library.position_table.argtypes = [pointer]
    library.position_table.restype = pointer
    library.forward.argtypes = [pointer, pointer, ctypes.c_int, ctypes.c_int, ctypes.c_int, pointer]
    library.forward.restype = None
    library.engine_close.argtypes = [pointer]
    library.engine_close.restype = None
    return library
