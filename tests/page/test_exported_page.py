"""The page that export.py writes, in a browser: it writes what its model does, whatever its tokens spell."""

import json

import pytest
import torch

from core.checkpoint import load_model
from core.generate import generate
from core.native import round_weights
from data.infill import prompt as infill_prompt
from data.tokenizer import CharTokenizer
from formats.page.page import (
    FOLDER,
    HTML,
    assemble_page,
    content_security_policy,
    facts_about,
    worker_script,
)
from tests.helpers.models import random_checkpoint, small_model
from tests.helpers.pages import EVIL, needs_browser
from tests.helpers.scripts import ROOT
from tests.helpers.tokenizers import BUILT_IN_STORIES, trained_tokenizer


def write_page(path, **choices):
    """Write a page with a random model; return (checkpoint, tokenizer)."""
    tokenizer = CharTokenizer.train([*BUILT_IN_STORIES, EVIL])
    sizes = {'block_size': 300, 'mlp_width': 64, 'std': 0.2}
    checkpoint = random_checkpoint(tokenizer, **sizes | choices)
    checkpoint['infill_rate'] = 0.5
    checkpoint['settings'] = {'out_dir': f'{EVIL}__WEIGHTS__', 'dataset': EVIL}
    checkpoint['model']['embedding.weight'][tokenizer.delimiter] = 0  # else the story may end at once
    HTML().write(path, checkpoint, tokenizer, validation_loss=EVIL)
    return checkpoint, tokenizer


def about_of(page):
    return json.loads(page.split('id="about">')[1].split('</script>')[0])


def fill(window, **texts):
    for field, text in texts.items():
        window.click(f'#{field}')
        window.type(text)


def finished(window, status='Stopped at the length'):
    """Wait until the story has ended with this status; return its text."""
    window.wait(f"document.getElementById('status').textContent.startsWith({json.dumps(status)})")
    assert not window.js('window.evil')
    return window.js("document.getElementById('story').textContent")


def write_greedily(checkpoint, tokenizer, ids, n_tokens):
    """Return the ids that the same rounded weights write in torch."""
    model = round_weights(load_model(checkpoint))
    tokens = generate(model, torch.tensor([ids]), n_tokens, temperature=0,
                      suppress=(tokenizer.blank, tokenizer.middle))
    return [token.item() for token in tokens]


@needs_browser
def test_page_continues_a_prompt_as_its_model_does(window, tmp_path):
    checkpoint, tokenizer = write_page(tmp_path / 'story.html')
    window.open(tmp_path / 'story.html')
    fill(window, prompt=EVIL, temperature='0', length='60')
    window.click('#write')
    shown = finished(window)
    prompt = [tokenizer.delimiter, *tokenizer.encode(EVIL)]
    assert shown == tokenizer.decode(prompt + write_greedily(checkpoint, tokenizer, prompt, 60))
    name = f'{EVIL}__WEIGHTS__'.split('/')[-1]  # the last part of out_dir
    assert window.js("document.getElementById('title').textContent") == name


@needs_browser
def test_page_writes_a_middle_as_its_model_does(window, tmp_path):
    checkpoint, tokenizer = write_page(tmp_path / 'story.html')
    window.open(tmp_path / 'story.html')
    window.click('#middle')
    fill(window, first='Tim ran.', last='They sat.', temperature='0', length='40')
    window.click('#write')
    prompt = infill_prompt(tokenizer, 'Tim ran.', 'They sat.')
    ids = write_greedily(checkpoint, tokenizer, prompt, 40)
    text = tokenizer.decode([tokenizer.delimiter, *tokenizer.encode('Tim ran.'), *ids])
    if not text[-1].isspace():
        text += ' '
    assert finished(window) == text + 'They sat.'


@needs_browser
def test_page_stops_within_a_tenth_of_a_second(window, tmp_path):
    write_page(tmp_path / 'story.html', block_size=1100, n_layer=6, n_embd=256, mlp_width=1024)
    window.open(tmp_path / 'story.html')
    fill(window, length='1000')
    window.click('#write')
    window.wait("document.querySelectorAll('.piece').length > 0")
    milliseconds = window.js("""new Promise(done => {
        const begun = performance.now(), status = document.getElementById('status');
        new MutationObserver(() => done(performance.now() - begun)).observe(status, {childList: true});
        document.getElementById('stop').click();
    })""")
    assert milliseconds < 100
    finished(window, 'Stopped.')


def damage_beginning(page):
    return page.replace('id="weights">eN', 'id="weights">eO')


def damage_end(page):
    return page[:-1000] + 'AAAA' + page[-996:]


@needs_browser
@pytest.mark.parametrize('damage', [damage_beginning, damage_end])
def test_damaged_page_says_so(window, tmp_path, damage):
    write_page(tmp_path / 'story.html')
    page = (tmp_path / 'story.html').read_text()
    assert damage(page) != page
    (tmp_path / 'story.html').write_text(damage(page))
    window.open(tmp_path / 'story.html')
    window.wait("document.getElementById('status').textContent.startsWith('This file is damaged')")


# without a browser --------------------------------------------------------------

def test_page_describes_its_model(tmp_path):
    checkpoint, tokenizer = write_page(tmp_path / 'story.html')
    about = about_of((tmp_path / 'story.html').read_text('utf-8'))
    assert about['infill'] is True
    assert about['blockSize'] == 300 and about['seed'] == 1337
    assert about['prompt'] == 'Once upon a time'
    assert about['config'] == checkpoint['config']
    assert about['tokenizer']['vocab_size'] == tokenizer.vocab_size
    assert ['validation loss', EVIL] in about['facts']
    assert ['trained on', f'{EVIL}, 3 steps'] in about['facts']


def test_facts_of_a_model_without_settings_say_nothing_of_training():
    model = small_model()
    weights = dict(model.named_parameters())
    facts = facts_about(model.config, weights, {'settings': {}}, 'not measured')
    n_params = f'{model.n_params():,} (matrices in 8 bits)'
    assert facts[:-1] == [
        ('parameters', n_params), ('shape', '2 layers of width 32, 4 heads'), ('context', '16 tokens'),
        ('vocabulary', '23 tokens'), ('validation loss', 'not measured')]
    assert facts[-1][0] == 'exported on'


def test_page_without_infilling_does_not_offer_it(tmp_path):
    tokenizer = trained_tokenizer('char')
    HTML().write(tmp_path / 'story.html', random_checkpoint(tokenizer), tokenizer)
    about = about_of((tmp_path / 'story.html').read_text('utf-8'))
    assert about['infill'] is False
    assert about['title'] == 'stories'
    assert ['validation loss', 'not measured'] in about['facts']
    assert HTML().recognizes(tmp_path / 'story.html')


def test_assemble_page_replaces_no_mark_in_what_it_puts_in():
    page = assemble_page({'title': '__WEIGHTS__ __PAGE__', 'end': '</script>'}, '__ABOUT__', 'AAAA')
    assert page.count('AAAA') == 1
    assert page.count('__ABOUT__') == 1
    assert about_of(page) == {'title': '__WEIGHTS__ __PAGE__', 'end': '</script>'}


def test_policy_allows_the_scripts_of_the_page_alone():
    policy = content_security_policy('alert(1)')
    assert "default-src 'none'" in policy and "form-action 'none'" in policy and "base-uri 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert policy != content_security_policy('alert(2)')
    script = (FOLDER / 'page.js').read_text('utf-8')
    assert f'content="{content_security_policy(script)}"' in assemble_page({}, '', '')


def test_page_in_docs_has_the_scripts_of_today():
    docs = (ROOT / 'docs' / 'quickstart.html').read_text('utf-8')
    today = assemble_page({'about': 1}, worker_script(), 'weights')
    assert without_model(docs) == without_model(today)
    assert len(docs.encode()) < 1_700_000


def without_model(page):
    """Return a page without what differs between models: `about` and the weights."""
    head, rest = page.split('id="about">')
    _, rest = rest.split('</script>', 1)
    scripts, _ = rest.split('id="weights">')
    return head + scripts
