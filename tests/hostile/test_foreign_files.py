"""Damaged and hostile files: each is read, or refused in one line, in little time and memory.

hypothesis takes a good file and drops, replaces, nests or adds values, or changes bytes.
"""

import json
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from configurator import UserError
from configurator import settings as settings_of
from core.checkpoint import Run, RunFolder, load_checkpoint, load_model
from core.optim import make_optimizers
from data.shards import Batches, Split, read_meta
from data.tokenizer import load_tokenizer, tokenizer_from_state
from data.tokenizer_files import open_tokenizer
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.plain import Safetensors
from formats.pretrained import load_pretrained
from model import GPT, GPTConfig
from tests.helpers.models import needs_export_packages, random_checkpoint
from tests.helpers.scripts import prepare
from tests.helpers.tokenizers import trained_tokenizer

many_examples = settings(max_examples=80, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(HealthCheck))

odd_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 2), st.floats(), st.text(max_size=9),
    st.sampled_from([2**31, 2**63, 10**12, 10**400, '../../etc', '\0', '\ud800', 'a' * 10**5]),
    st.builds(list), st.builds(dict), st.lists(st.integers(), max_size=3), st.builds(lambda: [[[[[]]]]]))


@st.composite
def changed(draw, tree):
    """Draw a copy of `tree`, a dict, with one to three changes at any depth."""
    tree = copy_of(tree)
    for _ in range(draw(st.integers(1, 3))):
        change_one(draw, tree)
    return tree


def change_one(draw, node):
    """Drop, replace or nest one entry of a dict or list, or of a dict or list inside it; or add an entry."""
    key = None
    while node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys[:40]))
        value = node[key]
        if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 3)) == 0:
            break
        node = value
    action = draw(st.sampled_from(['drop', 'replace', 'replace', 'nest', 'add']))
    if action == 'add' and isinstance(node, dict):
        node[draw(st.text(max_size=5))] = draw(odd_values)
    elif not node:
        return
    elif action == 'drop':
        del node[key]
    elif action == 'nest':
        node[key] = [node[key]]
    else:
        node[key] = draw(odd_values)


def copy_of(tree):
    """Return a copy of nested dicts and lists. Other values, such as tensors, are shared."""
    if isinstance(tree, list):
        return [copy_of(value) for value in tree]
    if isinstance(tree, dict):
        return {key: copy_of(value) for key, value in tree.items()}
    return tree


def read_safely(read):
    """Call read(): it must work or raise UserError, in 2 seconds of CPU time and with less than 1 GB more."""
    memory = peak_memory()
    start = time.process_time()
    try:
        read()
    except UserError as error:
        assert str(error).strip()
    assert time.process_time() - start < 2
    assert peak_memory() - memory < 1e9


def peak_memory():
    """Return the peak memory of this process in bytes."""
    if sys.platform == 'win32':
        return 0  # not measured
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('foreign')


def read_changed_checkpoints_safely(path, good, read):
    """Save the checkpoint `good` with many changes to `path`, and check that read() is safe after each."""
    @many_examples
    @given(changed(good))
    def test(checkpoint):
        try:
            torch.save(checkpoint, path)
        except Exception:  # torch cannot save every value
            return
        read_safely(read)

    test()


def test_load_checkpoint_reads_changed_files_safely(folder):
    tokenizer = trained_tokenizer('char')
    config = {'n_layer': 2, 'n_head': 2, 'n_embd': 8, 'vocab_size': tokenizer.vocab_size, 'block_size': 8}
    good = {
        'model': dict(GPT(GPTConfig(**config)).state_dict()), 'config': config,
        'tokenizer': tokenizer.state(), 'settings': {'out_dir': 'out', 'dataset': 'd', 'n_layer': 2},
        'iter': 3, 'best_val_loss': 1.0, 'best_iter': 2, 'fingerprint': 'a', 'infill_rate': 0.5}

    def read():
        checkpoint = load_checkpoint(folder / 'ckpt.pt')
        tokenizer_from_state(checkpoint['tokenizer'])
        load_model(checkpoint)(torch.zeros(1, 4, dtype=torch.long))

    read_changed_checkpoints_safely(folder / 'ckpt.pt', good, read)


def test_resuming_reads_changed_checkpoints_safely(folder, monkeypatch):
    """Resuming reads the settings, fingerprint, model, optimizers and scaler of the checkpoint."""
    data = prepare(folder / 'resumed')
    monkeypatch.setattr(train, 'dataset', str(data))
    meta = read_meta(data)
    tokenizer = load_tokenizer(data)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=tokenizer.vocab_size, block_size=8)
    model = GPT(config)
    optimizers = make_optimizers(model, 'muon', 0.01, 0.1, (0.9, 0.95))
    scaler = torch.amp.GradScaler('cpu')
    run_settings = settings_of(vars(train))
    run = Run(RunFolder(folder, resume=True), model, optimizers, scaler, tokenizer, meta, run_settings, '')
    tokens = torch.zeros(1, 4, dtype=torch.long)
    scaler.scale(model(tokens, tokens)).backward()
    for optimizer in optimizers:
        optimizer.step()  # so that it has a state
    good = run.checkpoint()

    def read():
        train.checkpoint_settings({'init_from': 'resume', 'out_dir': str(folder)})
        train.resume(run, max_steps=10)

    read_changed_checkpoints_safely(folder / 'ckpt.pt', good, read)


def test_split_and_tokenizer_read_changed_meta_files_safely(folder):
    data = prepare(folder / 'data')
    good = json.loads((data / 'meta.json').read_text())

    def read():
        load_tokenizer(data)
        batches = Batches(Split(data, 'train', verify=True), 8, 4, 1, seed=0)
        Split(data, 'val')
        batches(0)

    @many_examples
    @given(changed(good))
    def test(meta):
        (data / 'meta.json').write_text(json.dumps(meta))
        read_safely(read)

    test()


def written(folder, file_format, encoding, name):
    """Write a model in a foreign format; return the path to load it from and the path of its file `name`."""
    folder = folder / f'{type(file_format).__name__}-{name}'
    folder.mkdir()
    tokenizer = trained_tokenizer(encoding)
    file_format.write(folder, random_checkpoint(tokenizer), tokenizer)
    path = folder / 'model.bin' if isinstance(file_format, Llama2c) else folder
    return path, folder / name


def read_foreign(path, name):
    """Load the tokenizer at `path`, if `name` is a tokenizer's file, or else the model."""
    if 'tokenizer' in name:
        open_tokenizer(path)
    else:
        load_pretrained(path)


@needs_export_packages
@pytest.mark.parametrize(('file_format', 'name'), [
    (HuggingFace(), 'config.json'),
    (HuggingFace(), 'tokenizer.json'),
    (Safetensors(), 'tokenizer.json')])
def test_importers_read_changed_json_safely(folder, file_format, name):
    path, file = written(folder, file_format, 'char', name)
    good = json.loads(file.read_bytes())

    @many_examples
    @given(changed(good))
    def test(content):
        file.write_text(json.dumps(content))
        read_safely(lambda: read_foreign(path, name))

    test()


@needs_export_packages
@pytest.mark.parametrize(('file_format', 'encoding', 'name'), [
    (Safetensors(), 'char', 'model.safetensors'),
    (Safetensors(), 'bpe', 'tokenizer.model'),
    (Llama2c(), 'char', 'model.bin'),
    (Llama2c(), 'char', 'tokenizer.bin')])
def test_importers_read_changed_bytes_safely(folder, file_format, encoding, name):
    path, file = written(folder, file_format, encoding, name)
    good = file.read_bytes()

    @many_examples
    @given(st.integers(0, min(len(good), 4000)), st.binary(max_size=9), st.integers(0, 9), st.booleans())
    def test(position, new, n_replaced, cut):
        rest = b'' if cut else good[position + n_replaced:]
        file.write_bytes(good[:position] + new + rest)
        read_safely(lambda: read_foreign(path, name))

    test()


@pytest.mark.parametrize(('name', 'beginning', 'unit', 'message'), [
    ('tokenizer.json', '{"a": 0', ', "x": 1', 'and a tokenizer of 65,536 ids less than'),
    ('tokenizer.json', '', '[', 'maximum recursion depth'),
    ('tokenizer.json', '[" "', ', "a"', 'it has .* ids, and at most 65,534 fit'),
    ('tokenizer.json', '["', 'a', 'Unterminated string'),
    ('vocab.bpe', '', 'a b\n', 'it has .* ids, and at most 65,534 fit'),
    ('merges.txt', '#version: 0.2\n', 'a b\n', 'it has .* ids, and at most 65,534 fit'),
    ('tokenizer.model', '', '\x0a\x00', 'more than 100,000 ids or entries'),
    ('tokenizer.model', '\x0a\x00', '\x12\x02\x18\x02', 'more than 100,000 ids or entries'),
    ('tokenizer.model', '', '\x0a\x16' + '\x18\x02' * 11, 'more than 10 ids or entries|ids, and at most'),
    ('tokenizer.bin', '\0' * 8 + '\5\0\0\0<unk>', '\0' * 4 + '\1\0\0\0a', 'more than 65,534 ids'),
])
def test_open_tokenizer_refuses_huge_files_at_once(folder, name, beginning, unit, message):
    path = folder / 'huge'
    path.mkdir(exist_ok=True)
    size = 2**24 - 100 if 'less than' not in message else 2**25
    n_units = (size - len(beginning)) // len(unit)
    data = (beginning + unit * n_units).encode()
    if name == 'tokenizer.json' and beginning == '[" "':
        data += b']'
    (path / name).write_bytes(data)

    def read():
        with pytest.raises(UserError, match=message):
            open_tokenizer(path / name)

    read_safely(read)
    (path / name).unlink()


def test_records_skips_changed_lines(folder):
    run_folder = RunFolder(folder, resume=True)

    @many_examples
    @given(st.lists(changed({'iter': 3, 'loss': 2.5, 'story': 'Once', 'prompt': ''}), max_size=3))
    def test(lines):
        content = '\n'.join(json.dumps(line) for line in lines)
        (folder / 'samples.jsonl').write_text(content)
        for record in run_folder.records('samples.jsonl'):
            assert record['iter'] >= 0 and isinstance(record.get('story', ''), str)

    test()
