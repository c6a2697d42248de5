"""What a path contains."""

import subprocess
import sys

import pytest
import torch

from configurator import UserError
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.plain import Safetensors
from formats.pretrained import find_importer, load_pretrained, load_with_tokenizer
from tests.helpers.models import needs_export_packages, random_checkpoint, write_random_model
from tests.helpers.scripts import ROOT
from tests.helpers.tokenizers import trained_tokenizer


@pytest.fixture
def checkpoint():
    return random_checkpoint(trained_tokenizer('char'))


def test_load_pretrained_prefers_the_best_checkpoint_of_a_run(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    assert load_pretrained(str(tmp_path))['iter'] == 3
    torch.save(checkpoint | {'iter': 2}, tmp_path / 'best.pt')
    assert load_pretrained(str(tmp_path))['iter'] == 2
    assert load_pretrained(tmp_path / 'ckpt.pt')['iter'] == 3


def test_load_pretrained_says_that_a_checkpoint_is_missing(tmp_path):
    with pytest.raises(UserError, match=r'no checkpoint .*absent\.pt'):
        load_pretrained(tmp_path / 'absent.pt')


@pytest.mark.parametrize('name', ['absent', 'empty', 'story.txt', 'tokenizer.bin', 'absent.bin'])
def test_load_pretrained_rejects_what_is_not_a_model(tmp_path, name):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'story.txt').write_text('Once')
    (tmp_path / 'tokenizer.bin').write_bytes(b'\4\0\0\0\0\0\0\0\5\0\0\0<unk>')
    with pytest.raises(UserError, match=f'{name} does not hold a model: name the folder of a run'):
        load_pretrained(tmp_path / name)


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n'


@needs_export_packages
@pytest.mark.parametrize('fmt, name', [
    (HuggingFace(), 'config.json'), (HuggingFace(), 'model.safetensors'),
    (HuggingFace(), 'pytorch_model.bin'),
    (Safetensors(), 'config.json'), (Safetensors(), 'model.safetensors'),
    (Llama2c(), 'model.bin'), (None, 'best.pt'), (None, 'model.gguf')])
@pytest.mark.parametrize('content, message', [
    (POINTER, 'is a Git LFS pointer, not the file itself'), (b'<!DOCTYPE html><p>404', 'is an HTML page')])
def test_load_pretrained_says_that_a_file_is_not_there_itself(tmp_path, fmt, name, content, message):
    if fmt is not None:
        write_random_model(fmt, trained_tokenizer('char'), tmp_path)
    if name == 'pytorch_model.bin':
        (tmp_path / 'model.safetensors').unlink()
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name if name in ('model.bin', 'model.gguf') else tmp_path
    with pytest.raises(UserError, match=f'{name} {message}'):
        load_pretrained(path)


@needs_export_packages
def test_load_pretrained_rejects_a_part_of_a_model(tmp_path):
    write_random_model(HuggingFace(), trained_tokenizer('char'), tmp_path)
    for name in 'model.safetensors', 'pytorch_model.bin':
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=f'{name} is one file of a model: name its folder, {tmp_path}'):
            load_pretrained(tmp_path / name)
    (tmp_path / 'adapter_config.json').touch()
    with pytest.raises(UserError, match=r'holds an adapter .*: merge it into its model'):
        load_pretrained(tmp_path)


@needs_export_packages
@pytest.mark.parametrize('fmt', [HuggingFace(), Safetensors(), Llama2c()])
def test_find_importer_recognizes_each_format(tmp_path, fmt):
    write_random_model(fmt, trained_tokenizer('char'), tmp_path)
    path = tmp_path / 'model.bin' if isinstance(fmt, Llama2c) else tmp_path
    assert type(find_importer(path)) is type(fmt)


@needs_export_packages
def test_load_pretrained_finds_a_model_in_the_cache_of_hugging_face(tmp_path):
    snapshot = tmp_path / 'models--gpt2' / 'snapshots' / '607a30d'
    snapshot.mkdir(parents=True)
    (snapshot.parent / 'older').mkdir()
    checkpoint = write_random_model(HuggingFace(), trained_tokenizer('char'), snapshot)
    for path in tmp_path, tmp_path / 'models--gpt2', snapshot:
        assert load_pretrained(path)['config'] == checkpoint['config']


@needs_export_packages
def test_load_with_tokenizer_needs_one(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / 'best.pt')
    found, tokenizer = load_with_tokenizer(tmp_path)
    assert found['iter'] == 3 and tokenizer.state() == checkpoint['tokenizer']
    (tmp_path / 'hf').mkdir()
    write_random_model(HuggingFace(), trained_tokenizer('char'), tmp_path / 'hf')
    (tmp_path / 'hf' / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match='hf has no tokenizer: put the one'):
        load_with_tokenizer(tmp_path / 'hf')


@needs_export_packages
def test_loading_does_not_import_what_takes_seconds(tmp_path):
    """torch._dynamo is what making a model on the meta device would import."""
    (tmp_path / 'hf').mkdir()
    write_random_model(HuggingFace(), trained_tokenizer('char'), tmp_path / 'hf')
    write_random_model(Llama2c(), trained_tokenizer('char'), tmp_path)
    code = """if True:
        import sys
        from formats.pretrained import load_pretrained
        load_pretrained('hf')
        load_pretrained('model.bin')
        slow = {'torch._dynamo', 'transformers', 'gguf', 'xllamacpp', 'datasets', 'matplotlib'}
        print(slow & set(sys.modules))
    """
    environment = {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, check=True)
    assert done.stdout == 'set()\n'
