"""Plain safetensors. test_base.py loads what was written."""

import json

import pytest
from safetensors import safe_open

from configurator import UserError
from formats.plain import Safetensors
from formats.pretrained import load_pretrained
from tests.helpers.models import damage_file, needs_export_packages, write_random_model
from tests.helpers.tokenizers import trained_tokenizer

pytestmark = needs_export_packages


def test_write_describes_the_model_for_any_program(tmp_path):
    tokenizer = trained_tokenizer('char')
    checkpoint = write_random_model(Safetensors(), tokenizer, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text()) == {
        'format': 'stories', 'config': checkpoint['config'], 'encoding': 'char',
        'tokenizer_file': 'tokenizer.json', 'delimiter': 1, 'blank': tokenizer.blank,
        'middle': tokenizer.middle}
    assert (tmp_path / 'tokenizer.json').read_bytes() == tokenizer.files['tokenizer.json']
    with safe_open(tmp_path / 'model.safetensors', 'pt') as file:
        assert set(file.keys()) == checkpoint['model'].keys() - {'lm_head.weight'}


@pytest.mark.parametrize('file, damage, message', [
    ('model.safetensors', -8, r'model\.safetensors is damaged'),
    ('model.safetensors', None, r'model\.safetensors is damaged'),
    ('config.json', {'config': []}, r'config\.json is damaged.*its config is not an object'),
    ('config.json', {'config': {'n_layer': '2'}}, "n_layer is '2'"),
    ('config.json', {'config': {'width': 2}}, "its config has 'width'"),
    ('config.json', {'config': {'n_layer': 2**31 - 1}}, 'is damaged'),
    ('tokenizer.json', b'[" ", "a"]', r'tokenizer\.json belongs to another model'),
    ('tokenizer.json', b'{', r'tokenizer\.json is damaged'),
    ('tokenizer.json', None, 'has no tokenizer')])
def test_load_rejects_damaged_files_in_one_line(tmp_path, file, damage, message):
    write_random_model(Safetensors(), trained_tokenizer('char'), tmp_path)
    damage_file(tmp_path / file, damage)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, message', [
    ('lm_head.weight', r'embedding\.weight is missing'), ('extra', 'the config has no place for extra')])
def test_load_names_a_tensor_too_few_or_too_many(tmp_path, name, message):
    from safetensors.torch import load_file, save_file

    write_random_model(Safetensors(), trained_tokenizer('char'), tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors[name] = tensors['norm.weight'].clone()
    if name == 'lm_head.weight':
        del tensors['embedding.weight']
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)
