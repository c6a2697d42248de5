"""A page that export.py writes, in a browser: it writes what its model does, whatever its tokens spell."""

import json

import pytest
import torch

from core.checkpoint import load_model
from core.generate import generate
from data.infill import prompt
from data.tokenizer import CharTokenizer
from formats.page.page import HTML, assembled, engine, round_weights
from tests.helpers.models import random_checkpoint
from tests.helpers.scripts import ROOT
from tests.helpers.tokenizers import BUILT_IN_STORIES as STORIES
from tools import browser as browsers

needs_browser = pytest.mark.skipif(not browsers.PROGRAM, reason='no Chromium here')
EVIL = '<script>window.evil = 1</script><img src=x onerror="window.evil = 1">'


@pytest.fixture(scope='module')
def window():
    browser = browsers.Browser()
    yield browser
    browser.close()


def write_page(path, **config):
    """(checkpoint, tokenizer) of a page that is written to `path`."""
    tokenizer = CharTokenizer.train([*STORIES, EVIL])
    sizes = {'block_size': 300, 'mlp_width': 64, 'std': 0.2}
    checkpoint = random_checkpoint(tokenizer, **sizes | config) | {'infill_rate': 0.5, 'settings': {
        'out_dir': f'{EVIL}__WEIGHTS__', 'dataset': EVIL}, 'iter': 7}
    checkpoint['model']['embedding.weight'][tokenizer.delimiter] = 0  # else it may end at once
    HTML().write(path, checkpoint, tokenizer)
    return checkpoint, tokenizer


def story(window, ending='Cut at the length'):
    window.wait(f"document.getElementById('status').textContent.startsWith({json.dumps(ending)})")
    assert not window.js('window.evil')
    return window.js("document.getElementById('story').textContent")


def greedy(checkpoint, tokenizer, ids, n):
    """The ids that the same rounded weights write in torch."""
    model = round_weights(load_model(checkpoint))
    steps = generate(model, torch.tensor([ids]), n, temperature=0,
                     suppress=(tokenizer.blank, tokenizer.middle))
    return [token.item() for token in steps]


@needs_browser
def test_a_page_writes_what_its_model_writes(window, tmp_path):
    checkpoint, tokenizer = write_page(tmp_path / 'story.html')
    window.open(tmp_path / 'story.html')
    for field, text in ('prompt', EVIL), ('temperature', '0'), ('length', '60'):
        window.click(f'#{field}')
        window.type(text)
    window.click('#write')
    shown = story(window)
    head = [tokenizer.delimiter, *tokenizer.encode(EVIL)]
    assert shown == tokenizer.decode(head + greedy(checkpoint, tokenizer, head, 60))
    assert [url for url in window.requests if not url.startswith(('file:', 'blob:'))] == []
    assert window.complaints == []
    assert window.js("document.getElementById('title').textContent") == f'{EVIL}__WEIGHTS__'.split('/')[-1]


@needs_browser
def test_a_middle_is_the_models_too(window, tmp_path):
    checkpoint, tokenizer = write_page(tmp_path / 'story.html')
    window.open(tmp_path / 'story.html')
    window.click('#middle')
    for field, text in ('first', 'Tim ran.'), ('last', 'They sat.'), ('temperature', '0'), ('length', '40'):
        window.click(f'#{field}')
        window.type(text)
    window.click('#write')
    ids = greedy(checkpoint, tokenizer, prompt(tokenizer, 'Tim ran.', 'They sat.'), 40)
    text = tokenizer.decode([tokenizer.delimiter, *tokenizer.encode('Tim ran.'), *ids])
    assert story(window) == text + ('' if text[-1].isspace() else ' ') + 'They sat.'


@needs_browser
def test_stop_stops_within_a_tenth_of_a_second(window, tmp_path):
    write_page(tmp_path / 'story.html', block_size=1100, n_layer=6, n_embd=256, mlp_width=1024)
    window.open(tmp_path / 'story.html')
    window.click('#length')
    window.type('1000')
    window.click('#write')
    window.wait("document.querySelectorAll('.piece').length > 0")
    took = window.js("""new Promise(done => {
        const begun = performance.now(), status = document.getElementById('status');
        new MutationObserver(() => done(performance.now() - begun)).observe(status, {childList: true});
        document.getElementById('stop').click();
    })""")
    assert took < 100 and story(window, 'Stopped.')


@needs_browser
@pytest.mark.parametrize('damage', [lambda text: text.replace('id="weights">eN', 'id="weights">eO'),
                                    lambda text: text[:-1000] + 'AAAA' + text[-996:]])
def test_a_damaged_page_says_so(window, tmp_path, damage):
    write_page(tmp_path / 'story.html')
    text = (tmp_path / 'story.html').read_text()
    assert damage(text) != text
    (tmp_path / 'story.html').write_text(damage(text))
    window.open(tmp_path / 'story.html')
    assert window.wait("document.getElementById('status').textContent.startsWith('This file is damaged')")


def test_the_page_in_docs_has_todays_engine():
    text = (ROOT / 'docs' / 'quickstart.html').read_text('utf-8')
    today = assembled({'about': 1}, engine(), 'weights')
    for mark in 'id="about">', 'id="weights">':  # what differs
        for page in text, today:
            assert page.count(mark) == 1
    parts = [[page.split('id="about">')[0], page.split('id="about">')[1].split('</script>', 1)[1]
              .split('id="weights">')[0]] for page in (text, today)]
    assert parts[0] == parts[1]
    assert len(text.encode()) < 1_700_000
