"""engine.c against model.py with the same rounded weights, its memory, and what compiles it."""

import copy
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configurator import UserError
from core import native
from core.generate import generate
from core.native import NativeModel, pack_weights, position_table, round_to_int8, round_weights
from tests.helpers.models import CASES, small_model
from tests.helpers.scripts import ROOT

ODD_WIDTHS = {'n_embd': 39, 'n_head': 3, 'n_kv_head': 1, 'mlp_width': 37, 'position': 'learned'}
ALL_CASES = [*CASES, ODD_WIDTHS, {'n_head': 1, 'n_embd': 6, 'mlp_width': 1}]
WIDE = {'n_embd': 256, 'vocab_size': 500}  # wide enough for several threads

needs_sanitizers = pytest.mark.skipif(
    sys.platform != 'linux' or not shutil.which('gcc'), reason='sanitizers come with gcc')


@pytest.fixture
def n_threads():
    """Return a function that sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def read_one_by_one(model, idx):
    """Return the logits (B, T, V) of a NativeModel that reads one token after another."""
    cache = model.make_cache(idx.size(0))
    return torch.cat([model(token, cache) for token in idx.split(1, dim=1)], dim=1)


def read_at_once(model, idx):
    return model(idx, model.make_cache(idx.size(0)))


# weights ------------------------------------------------------------------------

def test_round_to_int8_is_exact_to_half_a_unit():
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    weight[3] = 0
    integers, scale = round_to_int8(weight)
    assert integers.dtype == torch.int8 and scale.dtype == torch.bfloat16
    errors = (integers.float() * scale.float()[:, None] - weight).abs().amax(1)
    assert (errors <= 0.51 * weight.abs().amax(1) / 127).all()


def test_rounded_weights_are_the_same_if_they_are_rounded_again():
    model = round_weights(small_model())
    before = copy.deepcopy(model.state_dict())
    for name, weight in round_weights(model).state_dict().items():
        assert torch.equal(weight, before[name])


def test_weights_that_are_not_finite_are_refused():
    model = small_model()
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match='not finite: did its training diverge'):
        NativeModel(model)


# logits -------------------------------------------------------------------------

@pytest.mark.parametrize('choices', ALL_CASES, ids=str)
def test_logits_are_those_of_the_rounded_weights(choices):
    model = small_model(**choices)
    engine = NativeModel(model)
    idx = torch.randint(0, 23, (3, 16))
    with torch.no_grad():
        expected = round_weights(model)(idx)
    logits = read_one_by_one(engine, idx)
    torch.testing.assert_close(logits, expected, atol=5e-4, rtol=0)
    assert torch.equal(read_at_once(engine, idx), logits[:, -1:])


def test_prompts_longer_than_what_is_read_at_once():
    model = small_model(block_size=100)
    engine = NativeModel(model)
    idx = torch.randint(0, 23, (3, 90))
    with torch.no_grad():
        expected = round_weights(model)(idx)
    torch.testing.assert_close(read_at_once(engine, idx), expected[:, -1:], atol=5e-4, rtol=0)
    cache = engine.make_cache(3)
    for part in idx[:, :40], idx[:, 40:41], idx[:, 41:]:
        logits = engine(part, cache)
    assert torch.equal(logits, read_at_once(engine, idx))


def test_many_stories_side_by_side_are_each_as_if_alone():
    engine = NativeModel(small_model())
    idx = torch.randint(0, 23, (70, 5))
    together = read_one_by_one(engine, idx)
    assert torch.equal(together[33], read_one_by_one(engine, idx[33:34])[0])
    assert torch.equal(together[69], read_one_by_one(engine, idx[69:])[0])


@pytest.mark.parametrize('B', [1, 40])
def test_the_number_of_threads_changes_nothing(n_threads, B):
    engine = NativeModel(small_model(**WIDE))
    idx = torch.randint(0, 500, (B, 16))
    n_threads(1)
    expected = read_one_by_one(engine, idx)
    for n in 2, 5:
        n_threads(n)
        assert torch.equal(read_one_by_one(engine, idx), expected)


def test_a_greedy_story_is_that_of_the_rounded_weights():
    """It is longer than the context, whose last half is read again when it is full."""
    model = small_model()
    engine = NativeModel(model)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    ours = list(generate(engine, prompt, 50, temperature=0))
    expected = list(generate(round_weights(model), prompt, 50, temperature=0))
    assert torch.equal(torch.stack(ours), torch.stack(expected))


@pytest.mark.parametrize('idx', [[[0, 23]], [[-1]], [[0], [1]], [[0] * 17]])
def test_what_would_be_read_out_of_bounds_is_refused(idx):
    engine = NativeModel(small_model())
    cache = engine.make_cache(1)
    with pytest.raises(ValueError):
        engine(torch.tensor(idx), cache)
    assert cache.length == 0


# memory -------------------------------------------------------------------------

@needs_sanitizers
@pytest.mark.parametrize('sanitizers', ['address,undefined', 'thread'])
def test_sanitizers_find_nothing(tmp_path, sanitizers):
    program = tmp_path / 'run'
    subprocess.run(
        ['gcc', '-O1', '-g', '-ffp-contract=off', '-fno-math-errno', '-pthread', f'-fsanitize={sanitizers}',
         '-fno-sanitize-recover=all', ROOT / 'tests' / 'helpers' / 'run_engine.c', '-o', program], check=True)
    for choices in *ALL_CASES, WIDE:
        model = small_model(**choices)
        engine = NativeModel(model)
        idx = torch.randint(0, model.config.vocab_size, (3, 16))
        table = b''
        if engine.positions is not None:
            table = engine.positions.numpy().tobytes()
        sizes = struct.pack('<4i', 3, 16, 3, len(table))
        weights = pack_weights(model).numpy().tobytes()
        tokens = idx.int().numpy().tobytes()
        path = tmp_path / 'model'
        path.write_bytes(bytes(engine.engine_config) + sizes + weights + table + tokens)

        printed = subprocess.run([program, path], capture_output=True)
        assert printed.returncode == 0, printed.stderr.decode()
        logits = torch.frombuffer(bytearray(printed.stdout), dtype=torch.float32).view(2, 3, 1, -1)
        assert torch.equal(logits[0], read_at_once(engine, idx))  # other flags, the same bits
        assert torch.equal(logits[1], logits[0])


# compiling ----------------------------------------------------------------------

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache folder."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(sys, 'platform', 'linux')
    folder = tmp_path / 'tiny-stories'
    folder.mkdir(mode=0o700)
    return folder


def test_the_library_is_compiled_once(cache, monkeypatch):
    native.load_library()
    [path] = cache.iterdir()
    monkeypatch.setattr(subprocess, 'run', None)
    native.load_library()
    assert [*cache.iterdir()] == [path]


def test_a_damaged_library_is_compiled_again(cache):
    name = f'engine-{native.fingerprint(native.find_compiler())}.so'
    (cache / name).write_bytes(b'\x7fELF')
    native.load_library()
    assert (cache / name).stat().st_size > 1000


@pytest.mark.skipif(os.name != 'posix', reason='permissions of POSIX')
def test_a_cache_folder_that_others_can_write_to_is_not_used(cache):
    cache.chmod(0o777)
    native.load_library()
    assert not [*cache.iterdir()]


def test_no_home_is_no_mistake(cache, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache / 'a' / 'file'))
    (cache / 'a').write_bytes(b'')
    native.load_library()
    assert [path.name for path in cache.iterdir()] == ['a']


@pytest.mark.parametrize('change', ['source', 'compiler', 'cpu'])
def test_a_library_is_for_one_source_compiler_and_cpu(tmp_path, monkeypatch, change):
    compiler = tmp_path / 'cc'
    compiler.write_bytes(b'one')
    source = tmp_path / 'engine.c'
    source.write_bytes(b'one')
    monkeypatch.setattr(native, 'SOURCE', source)
    before = native.fingerprint([str(compiler)])
    if change == 'source':
        source.write_bytes(b'two')
    elif change == 'compiler':
        compiler.write_bytes(b'three')
    else:
        monkeypatch.setattr(native, 'describe_cpu', str)
    assert native.fingerprint([str(compiler)]) != before


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    monkeypatch.setattr(native.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'^dtype int8 needs a C compiler.*: pip install ziglang$'):
        native.find_compiler()


def test_ziglang_is_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    monkeypatch.setattr(native.importlib.util, 'find_spec', lambda name: name == 'ziglang')
    assert native.find_compiler() == [sys.executable, '-m', 'ziglang', 'cc']


def test_a_compiler_that_knows_no_flag_for_the_cpu_is_good_enough(tmp_path, monkeypatch):
    tried = []
    run = subprocess.run

    def old_compiler(command, **options):
        tried.append(command)
        if any('native' in word for word in command):
            command = [command[0], '-no-such-flag']
        return run(command, **options)

    monkeypatch.setattr(subprocess, 'run', old_compiler)
    path = native.compile_engine(native.find_compiler(), tmp_path / 'engine.so')
    assert len(tried) == len(native.CPU_FLAGS) and Path(path).exists()


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(native, 'SOURCE', tmp_path / 'missing.c')
    with pytest.raises(UserError, match=r'cannot compile .*missing\.c for dtype int8'):
        native.compile_engine(native.find_compiler(), tmp_path / 'engine.so')
    assert not [*tmp_path.iterdir()]


def test_position_table_is_that_of_the_model():
    model = small_model(position='sinusoidal')
    assert torch.equal(position_table(model), model.sinusoids)
    assert position_table(small_model(position='learned')) is None
