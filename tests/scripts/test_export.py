"""export.py: what it proves, what it refuses, what it leaves behind."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import export
from configurator import SettingError, UserError
from core.checkpoint import FILES, load_model
from core.native import round_weights
from data.shards import fingerprint, read_meta
from formats import base, llama2c
from formats.gguf import GGUF
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.pretrained import load_pretrained
from model import GPTConfig
from tests.helpers.models import GPT2_BLOCK, UNTIED, needs_export_packages, random_checkpoint
from tests.helpers.node import needs_node
from tests.helpers.tokenizers import trained_tokenizer
from tests.helpers.windows import windows_files

pytestmark = needs_export_packages
SHAPE = {'block_size': 80, 'mlp_width': 64, 'std': 0.2}
OTHER = {'rope_theta': 500.0, 'norm_eps': 0.1}


def save_random_run(folder, ckpt='best', encoding='char', **choices):
    """Save a checkpoint with random weights in a run's folder; return the checkpoint."""
    folder.mkdir(exist_ok=True)
    checkpoint = random_checkpoint(trained_tokenizer(encoding), **SHAPE | choices)
    torch.save(checkpoint, folder / FILES[ckpt])
    return checkpoint


@pytest.fixture
def run_export(tmp_path, monkeypatch, capsys):
    """run_export(**settings) exports the run in tmp_path/out to tmp_path/to; returns what it prints."""
    def run(**settings):
        places = {'out_dir': str(tmp_path / 'out'), 'path': str(tmp_path / 'to')}
        for name, value in (places | settings).items():
            monkeypatch.setattr(export, name, value)
        export.main()
        return capsys.readouterr().out

    return run


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# What it proves

@pytest.mark.parametrize('format, dtype, encoding, choices', [
    ('llama2c', '', 'bpe', {}),
    ('llama2c-int8', '', 'char', {}),
    ('hf', '', 'gpt2', GPT2_BLOCK),
    ('hf', 'f32', 'bpe', OTHER | {'bias': True}),
    ('hf', 'f16', 'char', OTHER | GPT2_BLOCK | UNTIED),
    ('hf', 'bf16', 'char', {}),
    ('gguf', '', 'bpe', OTHER | UNTIED),
    ('gguf', 'f32', 'char', OTHER | {'bias': True}),
    ('gguf', 'f16', 'bpe', GPT2_BLOCK),
    ('gguf', 'q8_0', 'char', OTHER | GPT2_BLOCK | UNTIED),
    ('safetensors', 'bf16', 'char', {'qk_norm': True}),
    pytest.param('html', '', 'bpe', OTHER | {'qk_norm': True}, marks=needs_node),
    pytest.param('html', '', 'gpt2', GPT2_BLOCK | UNTIED, marks=needs_node)])
def test_export_proves_that_the_model_arrived(tmp_path, run_export, format, dtype, encoding, choices):
    save_random_run(tmp_path / 'out', 'last', encoding, **choices)
    printed = run_export(format=format, ckpt='last', dtype=dtype)
    pattern = r'divergence (\S+) nats per token \(at most (\S+)\); (\d+) of 64 greedy tokens are the same'
    kl, limit, n_same = re.search(pattern, printed).groups()
    assert float(kl) * 3 <= float(limit)
    assert n_same == '64' or limit in ('0.05', '0.005')
    assert printed.endswith(f'wrote {tmp_path}/to\n')
    assert names_in(tmp_path) == ['out', 'to']


def test_export_takes_the_best_checkpoint_or_the_last(tmp_path, run_export):
    best = save_random_run(tmp_path / 'out', 'best')
    last = save_random_run(tmp_path / 'out', 'last', std=0.3)
    for ckpt, checkpoint in ('best', best), ('last', last):
        run_export(format='safetensors', ckpt=ckpt)
        weights = load_pretrained(tmp_path / 'to')['model']
        assert torch.equal(weights['embedding.weight'], checkpoint['model']['embedding.weight'])


def swapped_layers(weights):
    first, second = 'blocks.0.attn.proj.weight', 'blocks.1.attn.proj.weight'
    return weights | {first: weights[second], second: weights[first]}


def swapped_ids(weights):
    ids = torch.arange(len(weights['embedding.weight']))
    ids[[260, 261]] = torch.tensor([261, 260])
    return weights | {name: weights[name][ids] for name in ('embedding.weight', 'lm_head.weight')}


def doubled_row(weights):
    name = 'blocks.0.attn.v.weight'
    return weights | {name: torch.cat((2 * weights[name][:1], weights[name][1:]))}


def wrong_rotation(weights):
    config = GPTConfig(n_head=4, n_kv_head=2, n_embd=32)
    return base.to_interleaved(config, weights)


@pytest.mark.parametrize('damage', [swapped_layers, swapped_ids, doubled_row, wrong_rotation])
def test_small_mistakes_are_ten_times_the_largest_limit(damage):
    tokenizer = trained_tokenizer('char')
    checkpoint = random_checkpoint(tokenizer, **SHAPE)
    program = Llama2c(int8=True)
    assert program.max_kl >= max(GGUF('q8_0').max_kl, GGUF('f16').max_kl, HuggingFace().max_kl)
    program.model = load_model(checkpoint | {'model': damage(dict(checkpoint['model']))})
    program.tokenizer = tokenizer
    with pytest.raises(UserError, match='nothing was kept') as error:
        export.compare(load_model(checkpoint), tokenizer, program)
    kl = re.search(r'a KL divergence of (\S+) nats', str(error.value))[1]
    assert float(kl) >= 10 * program.max_kl


def swap_last_pieces(tokenizer, pieces_of=llama2c.pieces_of):
    pieces = pieces_of(tokenizer)
    return pieces[:270] + pieces[-3:269:-1] + pieces[-2:]


def decode_wrongly(self, ids):
    return 'Once'


def predict_nan(self, ids, positions):
    return torch.full((len(positions), 311), torch.nan)


@pytest.mark.parametrize('place, name, wrong, message', [
    (llama2c, 'pieces_of', swap_last_pieces, 'as other tokens than we do'),
    (Llama2c, 'decode', decode_wrongly, 'as other tokens than we do'),
    (Llama2c, 'logits', predict_nan, 'a KL divergence of nan nats')])
def test_a_wrong_export_does_not_replace_an_earlier_one(tmp_path, run_export, monkeypatch, place, name, wrong,
                                                        message):
    save_random_run(tmp_path / 'out')
    run_export(format='llama2c')
    run_export(format='llama2c')  # replaces the first
    before = (tmp_path / 'to/model.bin').stat().st_mtime_ns
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(UserError, match=f'{message}.*: nothing was kept'):
        run_export(format='llama2c')
    assert (tmp_path / 'to/model.bin').stat().st_mtime_ns == before
    assert names_in(tmp_path) == ['out', 'to']


@pytest.mark.parametrize('vocab_size, block_size', [
    (300, 80), (5000, 64), (50259, 1024), (3, 1), (2**16, 1024)])
def test_random_contexts_have_every_id_or_as_many_as_is_affordable(vocab_size, block_size):
    contexts = export.random_contexts(GPTConfig(vocab_size=vocab_size, block_size=block_size))
    assert all(len(ids) == max(block_size - 1, 1) for ids, _ in contexts)
    assert all(positions[-1] == len(ids) - 1 for ids, positions in contexts)
    n_positions = sum(len(positions) for _, positions in contexts)
    ids = {i for ids, _ in contexts for i in ids}
    assert ids <= set(range(vocab_size))
    if vocab_size**2 <= 2**20:
        assert len(ids) == vocab_size
    else:
        assert 2**19 <= n_positions * vocab_size <= 2**20


# What it leaves behind

def test_export_removes_what_a_killed_one_left(tmp_path, run_export):
    save_random_run(tmp_path / 'out')
    left = tmp_path / '.to.unfinished'
    for part in left, left / 'export':
        part.mkdir()
        (part / '.lock').touch()
    (left / 'file').touch()
    run_export(format='safetensors')
    assert names_in(tmp_path) == ['out', 'to']


@pytest.mark.parametrize('umask', [0o002, 0o022, 0o077])
def test_what_is_written_has_the_permissions_of_any_new_file(tmp_path, run_export, monkeypatch, umask):
    monkeypatch.setattr(export, 'check_export', lambda *_: None)  # it takes long
    save_random_run(tmp_path / 'out')
    before = os.umask(umask)
    try:
        for format in 'llama2c', 'hf', 'safetensors', 'gguf', 'html':
            run_export(format=format, path=str(tmp_path / format))
            for path in tmp_path / format, *(tmp_path / format).glob('*'):
                usual = 0o777 if path.is_dir() else 0o666
                assert path.stat().st_mode & 0o777 == usual & ~umask, path
    finally:
        os.umask(before)


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='only Linux shows what is mapped')
@pytest.mark.parametrize('format', ['llama2c', 'hf', 'safetensors', 'gguf', 'html'])
def test_export_closes_what_it_has_read_before_it_moves_it(tmp_path, run_export, monkeypatch, format):
    monkeypatch.setattr(export, '_PROBABILITIES', 2**12)
    save_random_run(tmp_path / 'out')
    with windows_files():
        run_export(format=format)
        run_export(format=format)  # replaces the first
    assert names_in(tmp_path) == ['out', 'to']


def test_staging_refuses_a_link_to_another_folder(tmp_path):
    (tmp_path / '.to.unfinished').symlink_to(tmp_path)
    with pytest.raises(UserError, match='is a link to another folder'), export.staging(tmp_path / 'to'):
        pass


def test_staging_refuses_a_second_export_to_the_same_place(tmp_path):
    with (export.staging(tmp_path / 'to'),
          pytest.raises(UserError, match='in use by another process: it, too, exports to'),
          export.staging(tmp_path / 'to')):
        pass


def test_export_says_what_it_could_not_check(tmp_path, run_export, monkeypatch):
    save_random_run(tmp_path / 'out')
    monkeypatch.setitem(sys.modules, 'transformers', None)
    printed = run_export(format='hf')
    assert 'not checked: reading back by transformers needs pip install transformers' in printed
    assert (tmp_path / 'to' / 'model.safetensors').exists()
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ModuleNotFoundError, match='safetensors'):  # `run` prints it
        load_pretrained(tmp_path / 'to')


# What it refuses

@pytest.mark.parametrize('format, choices, dtype, message', [
    ('llama2c', GPT2_BLOCK, '',
     r'norm layer, position learned, .*tiny_stories\.py with --norm rms .* --format hf or'),
    ('llama2c', {'qk_norm': True}, '', r'--qk_norm False.* --format html or safetensors'),
    ('llama2c-int8', {'norm_eps': 1e-6, 'rope_theta': 500.0}, '',
     r'norm_eps 1e-06, rope_theta 500\.0\): .*--norm_eps 1e-05 --rope_theta 10000\.0, .* hf or gguf or html'),
    ('hf', GPT2_BLOCK | {'position': 'sinusoidal', 'mlp': 'relu'}, 'f32',
     r'gpt2_89m\.py with --position learned --mlp gelu, or export this one with --format html or safet'),
    ('hf', GPT2_BLOCK | {'n_kv_head': 2}, 'f32', r'n_kv_head 2\): .*--n_kv_head 4, .*--format html or safet'),
    ('gguf', {'mlp': 'relu2'}, 'f32', r'mlp relu2\): .*--mlp swiglu, .*--format html or safetensors'),
    ('gguf', {'mlp_width': 40}, 'q8_0', r'32 does not divide .* mlp_width 40.*--dtype f16'),
    ('gguf', {'n_embd': 40, 'n_kv_head': 4}, 'q8_0', r'32 does not divide n_embd 40')])
def test_a_model_that_a_format_cannot_hold_is_refused(tmp_path, run_export, format, choices, dtype, message):
    save_random_run(tmp_path / 'out', **choices)
    with pytest.raises(SettingError, match=message):
        run_export(format=format, dtype=dtype)
    assert names_in(tmp_path) == ['out']


def test_a_gpt2_vocabulary_cannot_go_to_llama2c(tmp_path, run_export):
    save_random_run(tmp_path / 'out', encoding='gpt2')
    with pytest.raises(SettingError, match='--encoding_type bpe or char'):
        run_export(format='llama2c')


@pytest.mark.parametrize('settings, message', [
    ({'format': 'onnx'}, r"format is 'onnx'.*one of llama2c, .*safetensors"),
    ({'format': 'hf', 'ckpt': 'first'}, "ckpt is 'first'"),
    ({'format': 'gguf', 'dtype': 'bf16'}, "dtype is 'bf16', but --format gguf writes f32 or f16 or q8_0"),
    ({'format': 'hf', 'dtype': 'q8_0'}, "dtype is 'q8_0', but --format hf writes f32 or f16 or bf16"),
    ({'format': 'safetensors', 'dtype': 'half'}, "'half', but --format safetensors writes f32 or f16"),
    ({'format': 'llama2c', 'dtype': 'f16'}, "dtype is 'f16', but --format llama2c writes f32"),
    ({'format': 'llama2c-int8', 'dtype': 'f32'}, "dtype is 'f32', but --format llama2c-int8 writes int8"),
    ({'format': 'html', 'dtype': 'f16'}, "dtype is 'f16', but --format html writes int8"),
    ({'format': 'hf', 'path': ''}, 'path is empty: type --path and a new folder'),
    ({'format': 'gguf', 'path': ''}, 'path is empty: type --path and a file')])
def test_wrong_settings_are_refused(run_export, settings, message):
    with pytest.raises(SettingError, match=message):
        run_export(**settings)


@pytest.mark.parametrize('format, make, message', [
    ('hf', lambda to: to.touch(), 'is a file, but --format hf writes a folder'),
    ('html', lambda to: to.mkdir(), 'is a folder, but --format html writes a file'),
    ('gguf', lambda to: to.symlink_to('/nowhere'), 'is a link to /nowhere, which does not exist'),
    ('gguf', lambda to: os.mkfifo(to), 'is not a regular file'),
    ('hf', lambda to: (to.mkdir(), (to / 'README.md').touch()), r'holds other files \(README\.md'),
    ('hf', lambda to: (to / 'config.json').mkdir(parents=True), r'holds other files \(config\.json')])
@pytest.mark.parametrize('overwrite', [False, True])
def test_what_is_no_export_is_not_replaced(tmp_path, run_export, format, make, message, overwrite):
    make(tmp_path / 'to')
    with pytest.raises(SettingError, match=message):
        run_export(format=format, overwrite=overwrite)


def foreign_file(to):
    """Write a file that begins as all of its kind do."""
    to.write_bytes(b'GGUF\3\0\0\0' if to.name == 'gguf' else b'<!DOCTYPE html><html lang="en">')


def foreign_folder(to):
    to.mkdir()
    (to / ('model.bin' if to.name == 'llama2c' else 'config.json')).write_text('{"model_type": "llama"}')


@pytest.mark.parametrize('format, make', [
    ('llama2c', foreign_folder), ('hf', foreign_folder), ('safetensors', foreign_folder),
    ('gguf', foreign_file), ('html', foreign_file)])
def test_what_has_no_mark_of_an_export_is_replaced_only_with_overwrite(tmp_path, run_export, monkeypatch,
                                                                       format, make):
    """Earlier exports have none, so the message does not claim that somebody else wrote it."""
    monkeypatch.setattr(export, 'check_export', lambda *_: None)
    save_random_run(tmp_path / 'out')
    to = tmp_path / format
    make(to)
    line = rf'does not carry the mark of export\.py --format {format} \(exports made before .* either\): name'
    with pytest.raises(SettingError, match=line):
        run_export(format=format, path=str(to))
    run_export(format=format, path=str(to), overwrite=True)
    run_export(format=format, path=str(to), overwrite=False)  # an export is replaced without asking


def changed(file):
    file.write_bytes(file.read_bytes() + b' ')


@pytest.mark.parametrize('format, name, change, message', [
    ('llama2c', 'model.bin', changed, 'holds a model.bin that is not the one that export.py wrote: name'),
    ('llama2c', 'tokenizer.bin', changed, 'holds a tokenizer.bin that is not'),
    ('hf', 'model.safetensors', changed, 'holds a model.safetensors that is not'),
    ('hf', 'vocab.json', Path.touch, 'holds a vocab.json that is not'),
    ('safetensors', 'export.json', lambda file: file.write_text('[]'), 'does not carry the mark'),
    ('safetensors', 'export.json', lambda file: file.write_text('{"sha256": {}}'), 'does not carry the mark'),
    ('llama2c', 'model.bin', Path.unlink, '')])
def test_every_file_that_is_replaced_is_as_export_wrote_it(tmp_path, run_export, monkeypatch, format, name,
                                                           change, message):
    """A missing file is all right: an export that was killed while it moved its files leaves that."""
    monkeypatch.setattr(export, 'check_export', lambda *_: None)
    save_random_run(tmp_path / 'out')
    run_export(format=format)
    before = names_in(tmp_path / 'to')
    change(tmp_path / 'to' / name)
    if message:
        with pytest.raises(SettingError, match=message):
            run_export(format=format)
        run_export(format=format, overwrite=True)
    run_export(format=format, overwrite=False)
    assert names_in(tmp_path / 'to') == before


def test_an_export_in_another_format_is_not_replaced(tmp_path, run_export, monkeypatch):
    monkeypatch.setattr(export, 'check_export', lambda *_: None)
    save_random_run(tmp_path / 'out')
    run_export(format='safetensors')
    with pytest.raises(SettingError, match=r'does not carry the mark of export\.py --format hf'):
        run_export(format='hf')


@pytest.mark.parametrize('stop', range(5))
def test_an_export_that_is_killed_while_it_moves_its_files_can_be_repeated(tmp_path, run_export, monkeypatch,
                                                                           stop):
    monkeypatch.setattr(export, 'check_export', lambda *_: None)
    save_random_run(tmp_path / 'out')
    run_export(format='llama2c')
    names = names_in(tmp_path / 'to')
    calls = []

    def killed_later(function):
        def wrapped(*args, **kwargs):
            if Path(args[0]).name in names:
                calls.append(args)
                if len(calls) == stop + 1:
                    raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in 'unlink', 'replace':
            patch.setattr(os, name, killed_later(getattr(os, name)))
        run_export(format='llama2c')
    run_export(format='llama2c')
    assert names_in(tmp_path / 'to') == names == ['export.json', 'model.bin', 'tokenizer.bin']


# Where it writes

@pytest.mark.parametrize('path', ['.', '../to/', '{folder}', '../link'])
def test_an_empty_folder_is_used_and_stays(tmp_path, run_export, monkeypatch, path):
    """It may be the working directory or a mount point, and has its own permissions."""
    save_random_run(tmp_path / 'out')
    folder = tmp_path / 'to'
    folder.mkdir(mode=0o750)
    (tmp_path / 'link').symlink_to(folder)
    monkeypatch.chdir(folder)
    before = folder.stat()
    for _ in range(2):
        run_export(format='safetensors', path=path.format(folder=folder))
        assert 'model.safetensors' in os.listdir('.')
    after = folder.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / 'link').is_symlink()
    assert names_in(tmp_path) == ['link', 'out', 'to'] and '.to.unfinished' not in os.listdir(folder)


@pytest.mark.parametrize('path, message', [
    ('/', r'path / holds other files \('),
    ('..', r'path \.\. holds other files \('),
    ('new/..', r'path new/\.\. holds other files \(here \.\.\.\): name a new folder')])
def test_a_folder_with_other_files_is_refused(tmp_path, run_export, monkeypatch, path, message):
    (tmp_path / 'thesis.txt').touch()
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path if path == 'new/..' else tmp_path / 'here')
    with pytest.raises(SettingError, match=message):
        run_export(format='safetensors', path=path, overwrite=True)
    assert names_in(tmp_path) == ['here', 'thesis.txt']


def test_export_follows_a_link_at_its_place(tmp_path, run_export):
    save_random_run(tmp_path / 'out')
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'to').symlink_to(tmp_path / 'disk')
    run_export(format='safetensors')
    run_export(format='safetensors')
    assert (tmp_path / 'to').is_symlink() and (tmp_path / 'disk' / 'model.safetensors').exists()


def test_export_makes_no_folder_behind_a_broken_link(tmp_path, run_export):
    save_random_run(tmp_path / 'out')
    (tmp_path / 'disk').symlink_to(tmp_path / 'unmounted')
    with pytest.raises(UserError, match=r'disk is a link to .*unmounted, which does not exist'):
        run_export(format='safetensors', path=str(tmp_path / 'disk' / 'to'))
    assert names_in(tmp_path) == ['disk', 'out']


def test_what_appears_at_the_place_during_the_export_is_not_replaced(tmp_path, run_export, monkeypatch):
    save_random_run(tmp_path / 'out')

    def save_something(*_):
        (tmp_path / 'to').mkdir()
        (tmp_path / 'to' / 'thesis.txt').touch()

    monkeypatch.setattr(export, 'check_export', save_something)
    with pytest.raises(SettingError, match=r'holds other files \(thesis\.txt'):
        run_export(format='safetensors')
    assert names_in(tmp_path / 'to') == ['thesis.txt']


# The loss that a page shows

def run_on(data, **changes):
    """A checkpoint of a model that was trained on a prepared folder."""
    meta = read_meta(data)
    checkpoint = random_checkpoint(trained_tokenizer('char'), vocab_size=meta['vocab_size'], **SHAPE)
    return checkpoint | {'settings': {'dataset': str(data)}, 'fingerprint': fingerprint(meta)} | changes


def naive_loss(model, data):
    """The loss of every validation token, window by window, with torch alone."""
    tokens = torch.frombuffer(bytearray((data / 'val_00000.bin').read_bytes()), dtype=torch.uint16).long()
    losses = []
    for start in range(0, len(tokens) - 1, model.config.block_size):
        window = tokens[start:start + model.config.block_size + 1]
        log_p = model(window[None, :-1])[0].log_softmax(-1)
        losses += (-log_p[range(len(window) - 1), window[1:]]).tolist()
    return sum(losses) / len(losses)


@torch.no_grad()
def test_loss_in_8_bits_is_that_of_rounded_weights(data):
    checkpoint = run_on(data)
    model = load_model(checkpoint)
    exact = naive_loss(model, data)
    rounded = naive_loss(round_weights(model), data)
    words = export.loss_in_8_bits(checkpoint)
    found = re.fullmatch(r'(\S+) nats per token, in 8 bits (\S+) \((\S+)\)', words).groups()
    assert [float(number) for number in found] == pytest.approx([exact, rounded, rounded - exact], abs=1e-4)


def test_loss_in_8_bits_needs_the_data_of_the_model(data, tmp_path):
    other = run_on(data, fingerprint='another')
    assert export.loss_in_8_bits(other) == (
        'not measured, as data is not the data that the model was trained on')
    absent = run_on(data, settings={'dataset': str(tmp_path / 'absent')})
    assert export.loss_in_8_bits(absent) == "not measured, as the model's data is not here"
    assert export.loss_in_8_bits(run_on(data, settings={})).startswith('not measured')


@needs_node
def test_a_page_shows_the_loss_that_is_printed(data, tmp_path, run_export):
    (tmp_path / 'out').mkdir()
    torch.save(run_on(data, tokenizer=data_tokenizer(data)), tmp_path / 'out' / 'best.pt')
    printed = run_export(format='html')
    [loss] = re.findall('^validation loss: (.*)$', printed, re.M)
    assert 'in 8 bits' in loss
    page = Path(tmp_path / 'to').read_text('utf-8')
    about = json.loads(page.split('id="about">')[1].split('</script>')[0])
    assert ['validation loss', loss] in about['facts']


def data_tokenizer(data):
    return {'encoding': 'char', 'files': {'tokenizer.json': (data / 'tokenizer.json').read_bytes()}}
