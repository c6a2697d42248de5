"""sample.py: what it asks of the model and makes of the answer."""

import pytest
import torch

import sample
from data.tokenizer import CharTokenizer
from model import GPTConfig


class Written(torch.nn.Module):
    """A model that writes given tokens, and keeps what it was asked."""

    config = GPTConfig(block_size=64)

    def __init__(self, *rows):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        self.rows = rows

    def generate(self, idx, *asked):
        self.asked = idx, *asked
        yield from torch.tensor(self.rows).T


@pytest.fixture
def tokenizer():
    return CharTokenizer.train(['abc '])


def test_a_story_ends_where_it_ends_though_others_go_on(tokenizer, monkeypatch):
    a, b, c = tokenizer.encode('abc')[1:]
    model = Written([a, 1, c, c, c], [b, b, b, 1, a], [c, c, c, c, c])
    monkeypatch.setattr(sample, 'num_samples', 3)
    assert list(sample.write_stories(model, tokenizer, 'c', '', stream=False)) == ['ca', 'cbbb', 'cccccc']


def test_all_settings_reach_the_model(tokenizer, monkeypatch):
    settings = {'num_samples': 1, 'max_new_tokens': 7, 'temperature': 0.7, 'top_k': 5, 'top_p': 0.6,
                'seed': 3, 'compile': True}
    for name, value in settings.items():
        monkeypatch.setattr(sample, name, value)
    model = Written([tokenizer.encode('a')[1]])
    assert list(sample.write_stories(model, tokenizer, 'b', '', stream=False)) == ['ba']
    idx, *asked = model.asked
    assert idx.tolist() == [[1, *tokenizer.encode('b')]]
    assert asked == [7, 0.7, 5, 0.6, 1, (tokenizer.blank, tokenizer.middle), 3, True]
