"""Strangers' files: good ones, of which something was changed or dropped, are read or are one line."""

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import UserError
from core.checkpoint import RunFolder, load_checkpoint, load_model
from data.shards import Batches, Split
from data.tokenizer import load_tokenizer, tokenizer_from_state
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.plain import Safetensors
from formats.pretrained import load_pretrained, open_tokenizer
from model import GPT, GPTConfig
from tests.helpers.models import needs_export_packages
from tests.helpers.scripts import prepare
from tests.helpers.tokenizers import trained_tokenizer
from tests.unit.formats.test_formats import write

odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 2), st.floats(), st.text(max_size=9),
    st.sampled_from([2**31, 2**63, 10**12, 10**400, '../../etc', '\0', '\ud800', 'a' * 10**5]),
    st.builds(list), st.builds(dict), st.lists(st.integers(), max_size=3), st.builds(lambda: [[[[[]]]]]))


@st.composite
def changed(draw, tree):
    """The tree, a dict, with one to three entries, of it or below, dropped, replaced, nested or added."""
    tree = copied(tree)
    for _ in range(draw(st.integers(1, 3))):
        node, deeper = tree, True
        while deeper and node:
            keys = [*node] if isinstance(node, dict) else [*range(len(node))]
            key = draw(st.sampled_from(keys[:40]))
            deeper = isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 3))
            node = node[key] if deeper else node
        action = draw(st.sampled_from(['drop', 'replace', 'replace', 'nest', 'add']))
        if action == 'add' and isinstance(node, dict):
            node[draw(st.text(max_size=5))] = draw(odd)
        elif node and action == 'drop':
            del node[key]
        elif node:
            node[key] = [node[key]] if action == 'nest' else draw(odd)
    return tree


def copied(tree):
    if isinstance(tree, list):
        return [*map(copied, tree)]
    return {key: copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


many = settings(max_examples=500, deadline=None, database=None, derandomize=True,
                suppress_health_check=[*HealthCheck])


def read_safely(read):
    """Call read(): it works, or raises UserError with one line; in 2 seconds and with less than 1 GB more."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read()
    except UserError as error:
        assert str(error).strip()
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # kilobytes


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('strangers')


@pytest.fixture(scope='module')
def checkpoint():
    enc = trained_tokenizer('char')
    config = {'n_layer': 2, 'n_head': 2, 'n_embd': 8, 'vocab_size': enc.vocab_size, 'block_size': 8}
    return {'model': dict(GPT(GPTConfig(**config)).state_dict()), 'config': config, 'tokenizer': enc.state(),
            'settings': {'out_dir': 'out', 'dataset': 'd', 'n_layer': 2}, 'iter': 3, 'best_val_loss': 1.0,
            'best_iter': 2, 'fingerprint': 'a', 'infill_rate': 0.5}


@needs_export_packages
def test_checkpoints(place, checkpoint):
    @many
    @given(changed(checkpoint))
    def test(changed):
        try:
            torch.save(changed, place / 'ckpt.pt')
        except Exception:  # what cannot be saved
            return

        def read():
            found = load_checkpoint(place / 'ckpt.pt')
            tokenizer_from_state(found['tokenizer'])
            load_model(found)(torch.zeros(1, 4, dtype=torch.long))

        read_safely(read)
    test()


def test_prepared_data(place):
    folder = prepare(place / 'data')
    good = json.loads((folder / 'meta.json').read_text())

    @many
    @given(changed(good))
    def test(changed):
        (folder / 'meta.json').write_text(json.dumps(changed))

        def read():
            load_tokenizer(folder)
            batches = Batches(Split(folder, 'train', verify=True), 8, 4, 1, seed=0)
            Split(folder, 'val')
            batches(0)

        read_safely(read)
    test()


@needs_export_packages
@pytest.mark.parametrize('fmt, encoding, name', [
    (HuggingFace(), 'char', 'config.json'), (HuggingFace(), 'char', 'tokenizer.json'),
    (Safetensors(), 'char', 'tokenizer.json')])
def test_json_of_formats(place, fmt, encoding, name):
    folder = place / f'{type(fmt).__name__}-{name}'
    folder.mkdir()
    write(fmt, trained_tokenizer(encoding), folder)
    good = json.loads((folder / name).read_bytes())

    @many
    @given(changed(good))
    def test(changed):
        (folder / name).write_text(json.dumps(changed))
        read_safely(lambda: (open_tokenizer if 'tokenizer' in name else load_pretrained)(folder))
    test()


@needs_export_packages
@pytest.mark.parametrize('fmt, encoding, name', [
    (Safetensors(), 'char', 'model.safetensors'), (Safetensors(), 'bpe', 'tokenizer.model'),
    (Llama2c(), 'char', 'model.bin'), (Llama2c(), 'char', 'tokenizer.bin')])
def test_bytes_of_formats(place, fmt, encoding, name):
    folder = place / f'{type(fmt).__name__}-{name}'
    folder.mkdir()
    write(fmt, trained_tokenizer(encoding), folder)
    good = (folder / name).read_bytes()
    path = folder / 'model.bin' if isinstance(fmt, Llama2c) else folder

    @many
    @given(st.integers(0, min(len(good), 4000)), st.binary(max_size=9), st.integers(0, 9), st.booleans())
    def test(at, new, old, end):
        (folder / name).write_bytes(good[:at] + new + (b'' if end else good[at + old:]))
        read_safely(lambda: (open_tokenizer if 'tokenizer' in name else load_pretrained)(path))
    test()


def test_lines_of_a_run(place):
    folder = RunFolder(place, resume=True)

    @many
    @given(st.lists(changed({'iter': 3, 'loss': 2.5, 'story': 'Once', 'prompt': ''}), max_size=3))
    def test(lines):
        Path(place, 'samples.jsonl').write_text('\n'.join(map(json.dumps, lines)))
        for record in folder.records('samples.jsonl'):
            assert record['iter'] >= 0 and isinstance(record.get('story', ''), str)
    test()
