"""The page of what runs have learned, as report.py writes it and as a browser shows it."""

import json
import math
import re
import shutil
import subprocess

import pytest

from configurator import SettingError, UserError, configure, settings
from core.checkpoint import load_checkpoint
from tests.helpers.scripts import metrics, once, prepare, script
from tools import report

SMALL = ['--num_samples=14', '--max_new_tokens=40', '--device=cpu']


@pytest.fixture
def given(monkeypatch):
    """given(*flags) sets settings of report.py."""
    before = settings(vars(report))
    yield lambda *flags: configure(vars(report), once([*SMALL, *map(str, flags)]))
    vars(report).update(before)


@pytest.fixture(scope='module')
def page(run, tmp_path_factory):
    """What report.py says of one run, and its page."""
    path = tmp_path_factory.mktemp('report') / 'page.html'
    return script('report.py', f'--out_dir={run[0]}', f'--path={path}', *SMALL).out, path


def data_of(path):
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>',
                                path.read_text(), re.DOTALL)[1])


def test_a_page_has_the_run(page, run):
    said, path = page
    data, lines = data_of(path), metrics(run[0])
    (shown,), best = data['runs'], load_checkpoint(run[0] / 'best.pt')
    facts = dict(shown['facts'])
    weights = {name: weight for name, weight in best['model'].items() if name != 'lm_head.weight'}
    assert facts['parameters'] == f'{sum(weight.numel() for weight in weights.values()):,}'
    assert facts['trained'] == f"{best['iter']} steps, {best['iter'] * 4 * 64:,} tokens"
    assert {'data', 'hardware', 'time', 'tokenizer'} <= set(facts) and shown['settings']['n_embd'] == 32
    for key in 'loss', 'lr', 'val_loss', 'val_acc':
        expected = [[line['iter'], line['iter'] * 256, line[key]] for line in lines if key in line]
        assert [[step, tokens, value] for step, tokens, _, value in shown['curves'][key]] == expected
    seconds = [point[2] for point in shown['curves']['loss']]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert [step for step, _ in shown['samples']] == [0, 6, 12]
    assert len({text[:16] for _, text in shown['samples']}) == 1  # from the same prompt
    figures = {row['label']: row for group in data['table'] for row in group['rows']}
    lowest = min((line for line in lines if 'val_loss' in line), key=lambda line: line['val_loss'])
    for label, key in ('bits per byte', 'val_bpb'), ('loss', 'val_loss'), ('perplexity', 'val_ppl'):
        assert float(figures[label]['cells'][0]) == pytest.approx(lowest[key], rel=1e-3)
    assert figures['whole, %']['real'] == '0' and len(shown['stories']) == 12
    for name in figures:
        assert name in said
    assert said.endswith(f'look at {path}\n')


def test_a_page_shows_stories_and_tokens(page):
    (shown,) = data_of(page[1])['runs']
    for story in shown['stories']:
        assert story['text'][:story['prompt']] == 'Once there was a'
        start, stop = story['copied']
        assert len(re.findall(r'\w+', story['text'][start:stop])) == story['words']
        assert story['text'][start:stop].lower() in story['source'].lower()
    assert ''.join(text for text, _, _ in shown['tokens']).startswith('Once there was a dog number')
    for _, p, others in shown['tokens']:
        assert p >= 0 and p + sum(q for _, q in others) < 1.0001
        assert [q for _, q in others] == sorted((q for _, q in others), reverse=True)


def test_runs_are_compared(run, tmp_path):
    """A run and a lone checkpoint of it, which is a model like those of others: no curves stand beside it."""
    shutil.copy(run[0] / 'ckpt.pt', tmp_path / 'lone.pt')
    names = f"{run[0] / 'best.pt'},{tmp_path / 'lone.pt'}"
    said = script('report.py', '--init_from', names, '--path', tmp_path / 'page.html', *SMALL).out
    both = data_of(tmp_path / 'page.html')
    assert [shown['name'] for shown in both['runs']] == names.split(',') and both['runs'][0]['curves']['loss']
    assert not both['runs'][1]['curves']['loss'] and not both['runs'][1]['samples']
    assert all(len(row['cells']) == 2 for group in both['table'] for row in group['rows'])
    assert all(name in said.splitlines()[0] for name in names.split(','))


def test_figures_of_different_stories_stand_beside_their_own():
    rows = [('text', 'words', 'a note', 10.0, 20.0), ('text', 'ended, %', '', 50.0, 100.0),
            ('grammar', 'name, %', '', 1.5, math.nan)]
    other = [('text', 'words', 'a note', 11.0, 30.0), ('text', 'ended, %', '', 12345.678, 100.0)]
    models = [type('', (), {'table': table}) for table in (rows, other)]
    assert report.side_by_side(models) == [
        ('text', 'words', 'a note', ['10 (real: 20)', '11 (real: 30)'], ''),
        ('text', 'ended, %', '', ['50', '12,346'], '100'), ('grammar', 'name, %', '', ['1.5', ''], '')]


@pytest.mark.parametrize('change, error', [
    ({'about': 'a'}, 'another tokenizer'), ({}, 'is not what .* was trained on'), (None, 'no prepared')])
def test_other_data_is_refused(run, given, tmp_path, monkeypatch, change, error):
    checkpoint = load_checkpoint(run[0] / 'best.pt')
    if change is not None:
        prepare(tmp_path / 'data', **change)
    if change:
        checkpoint['tokenizer'] = checkpoint['tokenizer'] | {'pieces': []}
    checkpoint['settings'] |= {'dataset': str(tmp_path / 'data')}
    checkpoint['fingerprint'] = 'another'
    monkeypatch.setattr('core.checkpoint.load_checkpoint', lambda _: checkpoint)
    given(f'--out_dir={run[0]}')
    with pytest.raises(UserError, match=error):
        report.main()


def test_what_no_report_can_mean_is_refused(run, given):
    for flag in '--num_samples=1', '--top_p=0', '--ckpt=first':
        given(f'--out_dir={run[0]}', flag)
        with pytest.raises(SettingError):
            report.main()


def test_markup_in_a_story_is_text(run, given, tmp_path, monkeypatch):
    evil = '</script><script>document.title = "evil"</script><img src=x onerror=alert(1)>'
    monkeypatch.setattr(report.RunFolder, 'records', lambda _, name='metrics.jsonl': (
        [{'iter': 0, 'story': evil}] if name == 'samples.jsonl' else []))
    given(f'--out_dir={run[0]}', f'--path={tmp_path}/page.html')
    report.main()
    text = (tmp_path / 'page.html').read_text()
    assert text.count('</script>') == 2 and '<img' not in text
    assert data_of(tmp_path / 'page.html')['runs'][0]['samples'] == [[0, evil]]


def test_the_page_may_connect_to_nothing(page):
    text = page[1].read_text()
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\"" in text
    assert not re.search(r'\b(src|href|url\()\s*=?', text.split('<script type')[0].replace('-src', ''))


@pytest.mark.skipif(not shutil.which('chromium'), reason='no Chromium here')
def test_a_browser_shows_the_page(page, tmp_path):
    done = subprocess.run(
        ['chromium', '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}',
         '--virtual-time-budget=2000', '--dump-dom', page[1].as_uri()], capture_output=True, text=True,
        timeout=120)
    (shown,) = data_of(page[1])['runs']
    text = re.sub('<script.*?</script>', '', done.stdout, flags=re.DOTALL)
    assert f"<title>{shown['name']}</title>" in text
    assert dict(shown['facts'])['parameters'] in text and '<path class="val_loss" d="M' in text
    assert text.count('class="piece') >= len(shown['tokens'])
    for story in shown['stories']:
        assert story['text'][:story['prompt']] in text
