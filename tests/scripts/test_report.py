"""report.py: what it writes for a trained run, what a browser shows of it, and what it rejects.

tests/reference/test_report.py compares all figures with naive ones.
"""

import errno
import json
import math
import os
import re
import shutil
import subprocess
from itertools import pairwise

import pytest
import torch

from configurator import SettingError, UserError, configure, settings
from core.checkpoint import load_checkpoint
from tests.helpers.scripts import STORIES, metrics, once, prepare, script
from tools import report
from tools.browser import PROGRAM
from tools.quality import Figure

REPORT = 'tools/report.py'
SMALL = ['--num_samples=14', '--max_new_tokens=40', '--device=cpu']


@pytest.fixture
def given():
    """given(*flags) sets the settings of report.py, in this process."""
    before = settings(vars(report))
    yield lambda *flags: configure(vars(report), once([*SMALL, *map(str, flags)]))
    vars(report).update(before)


@pytest.fixture(scope='module')
def page(run, tmp_path_factory):
    """Return what report.py prints about a run, and the path of the page."""
    path = tmp_path_factory.mktemp('report') / 'page.html'
    return script(REPORT, f'--out_dir={run[0]}', f'--path={path}', *SMALL).out, path


def data_of(path):
    """Return the data in a page."""
    pattern = '<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(pattern, path.read_text(), re.DOTALL)[1])


def figures_of(data):
    """Return {label: row} of a page's table."""
    return {row['label']: row for group in data['table'] for row in group['rows']}


# a run --------------------------------------------------------------------------

def test_page_has_the_facts_of_the_run(page, run):
    shown, = data_of(page[1])['runs']
    best = load_checkpoint(run[0] / 'best.pt')
    facts = dict(shown['facts'])
    n_params = sum(w.numel() for name, w in best['model'].items() if name != 'lm_head.weight')
    assert facts['parameters'] == f'{n_params:,}'
    assert facts['trained'] == f"{best['iter']} steps, {best['iter'] * 4 * 64:,} tokens"
    assert facts['to train on'].startswith('270 stories, ')
    assert facts['to validate'].startswith('30 stories, ')
    assert {'data', 'hardware', 'time', 'tokenizer'} <= set(facts)
    assert shown['settings']['n_embd'] == 32


def test_page_has_the_curves_and_samples_of_the_run(page, run):
    shown, = data_of(page[1])['runs']
    records = metrics(run[0])
    assert list(shown['curves']) == ['loss', 'val_loss', 'lr', 'val_acc']
    for key, curve in shown['curves'].items():
        found = [record for record in records if key in record]
        expected = [[record['iter'], record['iter'] * 256, record[key]] for record in found]
        assert [[step, tokens, value] for step, tokens, _, value in curve] == expected
    seconds = [point[2] for point in shown['curves']['loss']]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert [step for step, _ in shown['samples']] == [0, 6, 12]
    assert len({text[:16] for _, text in shown['samples']}) == 1  # all start alike


def test_table_has_the_lowest_validation_loss(page, run):
    out, path = page
    figures = figures_of(data_of(path))
    evaluations = [record for record in metrics(run[0]) if 'val_loss' in record]
    lowest = min(evaluations, key=lambda record: record['val_loss'])
    for label, key in ('bits per byte', 'val_bpb'), ('loss', 'val_loss'), ('perplexity', 'val_ppl'):
        assert float(figures[label]['cells'][0]) == pytest.approx(lowest[key], rel=1e-3)
    assert figures['whole, %']['real'] == '0'
    for label in figures:
        assert label in out
    assert out.endswith(f'look at {path}\n')


def test_page_has_stories_and_tokens(page):
    shown, = data_of(page[1])['runs']
    assert len(shown['stories']) == 12
    for story in shown['stories']:
        assert story['text'][:story['prompt']] == 'Once there was a'
        start, stop = story['copied']
        assert len(re.findall(r'\w+', story['text'][start:stop])) == story['words']
        assert story['text'][start:stop].lower() in story['source'].lower()
    assert ''.join(text for text, _, _ in shown['tokens']).startswith('Once there was a dog number')
    for _, p, others in shown['tokens']:
        probabilities = [q for _, q in others]
        assert p >= 0 and p + sum(probabilities) < 1.0001
        assert probabilities == sorted(probabilities, reverse=True)


def test_page_next_to_the_run_is_the_default(run, given):
    given(f'--out_dir={run[0]}', '--num_samples=2', '--max_new_tokens=3', '--eval_iters=1')
    report.main()
    data = data_of(run[0] / 'report.html')
    (run[0] / 'report.html').unlink()
    assert data['title'] == str(run[0])
    assert 'over 1 batches of the validation split' in figures_of(data)['loss']['note']


def test_sampling_settings_reach_the_stories(run, given, tmp_path, monkeypatch):
    """Also the evaluation: --eval_iters is a number of batches of 32 windows."""
    calls = []
    generate_stories, evaluate = report.generate_stories, report.evaluate

    def watched_stories(model, prompts, stop, max_new_tokens, seed, **sampling):
        calls.append((len(prompts), max_new_tokens, seed, sampling['temperature'], sampling['top_p']))
        return generate_stories(model, prompts, stop, max_new_tokens, seed, **sampling)

    def watched_evaluation(*args, max_rows, **kwargs):
        calls.append(max_rows)
        return evaluate(*args, max_rows=max_rows, **kwargs)

    monkeypatch.setattr(report, 'generate_stories', watched_stories)
    monkeypatch.setattr(report, 'evaluate', watched_evaluation)
    given(f'--out_dir={run[0]}', f'--path={tmp_path}/a.html', '--num_samples=3', '--max_new_tokens=9',
          '--seed=5', '--temperature=0.5', '--top_p=0.4', '--eval_iters=7')
    report.main()
    assert calls == [(3, 9, 5, 0.5, 0.4), (3, 9, 5, 0.5, 0.4), 7 * 32]


def test_ckpt_chooses_the_checkpoint(run, given, tmp_path):
    """best.pt has other weights here, so that the two differ."""
    folder = tmp_path / 'run'
    shutil.copytree(run[0], folder)
    best = load_checkpoint(run[0] / 'best.pt')
    torch.save(best | {'model': {name: 0 * w for name, w in best['model'].items()}}, folder / 'best.pt')
    losses = {}
    for name in 'best', 'last':
        given(f'--out_dir={folder}', f'--ckpt={name}', f'--path={tmp_path}/a.html', '--num_samples=2',
              '--max_new_tokens=3', '--eval_iters=1', '--temperature=1')
        report.main()
        losses[name] = float(figures_of(data_of(tmp_path / 'a.html'))['loss']['cells'][0])
    n_tokens = load_checkpoint(run[0] / 'best.pt')['config']['vocab_size']
    assert losses['best'] == pytest.approx(math.log(n_tokens), rel=1e-3) != losses['last']


# several runs -------------------------------------------------------------------

def test_runs_are_compared(run, tmp_path):
    """A run, and a single checkpoint of it outside of its folder: that one has no curves."""
    shutil.copy(run[0] / 'ckpt.pt', tmp_path / 'lone.pt')
    names = [str(run[0] / 'best.pt'), str(tmp_path / 'lone.pt')]
    out = script(REPORT, '--init_from', ','.join(names), '--path', tmp_path / 'page.html', *SMALL).out
    data = data_of(tmp_path / 'page.html')
    of_run, of_lone = data['runs']
    assert [of_run['name'], of_lone['name']] == names and data['title'] == ', '.join(names)
    assert of_run['curves']['loss'] and not of_lone['curves']['loss'] and not of_lone['samples']
    assert all(len(row['cells']) == 2 for row in figures_of(data).values())
    assert all(name in out.splitlines()[0] for name in names)


def test_merge_figures_of_the_same_and_of_different_stories():
    one = [Figure('text', 'words', 'a note', 10.0, 20.0), Figure('text', 'ended, %', '', 50.0, 100.0),
           Figure('grammar', 'name, %', 'kept', 1.5)]
    other = [Figure('text', 'words', 'a note', 11.0, 30.0), Figure('text', 'ended, %', '', 12345.678, 100.0)]
    rows = [tuple(row.values()) for row in report.merge_figures([one, other])]
    assert rows == [('text', 'words', 'a note', ['10 (real: 20)', '11 (real: 30)'], ''),
                    ('text', 'ended, %', '', ['50', '12,346'], '100'),
                    ('grammar', 'name, %', 'kept', ['1.5', ''], '')]


def test_print_table_aligns_its_columns(capsys):
    rows = [{'label': 'words', 'cells': ['1', '22'], 'real': '3'},
            {'label': 'a', 'cells': ['', '1.234'], 'real': ''}]
    report.print_table(['run', 'x'], rows)
    assert capsys.readouterr().out == ('        run       x   real stories\n'
                                       'words     1      22              3\n'
                                       'a             1.234               \n')


# what is rejected ---------------------------------------------------------------

@pytest.mark.parametrize('change, error', [
    ({'tokenizer': {'pieces': []}}, 'another tokenizer'),
    ({'fingerprint': 'another'}, 'is not what .* was trained on'),
    ({'settings': {}}, 'does not say what it was trained on'),
    ({'settings': {'dataset': 'nowhere'}}, 'no prepared data')])
def test_checkpoint_that_does_not_fit_the_data_is_rejected(run, given, tmp_path, change, error):
    checkpoint = load_checkpoint(run[0] / 'best.pt')
    if 'tokenizer' in change:
        change = {'tokenizer': checkpoint['tokenizer'] | change['tokenizer']}
    torch.save(checkpoint | change, tmp_path / 'best.pt')
    given(f'--out_dir={tmp_path}')
    with pytest.raises(UserError, match=error):
        report.main()


def test_dataset_chooses_other_data(run, given, tmp_path):
    other = prepare(tmp_path / 'other')
    checkpoint = load_checkpoint(run[0] / 'best.pt')
    torch.save(checkpoint | {'fingerprint': 'another', 'settings': {}}, tmp_path / 'best.pt')
    given(f'--out_dir={tmp_path}', f'--dataset={other}', '--num_samples=2', '--max_new_tokens=3')
    report.main()
    shown, = data_of(tmp_path / 'report.html')['runs']
    assert dict(shown['facts'])['data'] == 'other'


def test_settings_of_foreign_checkpoints_are_shown_only_if_plain(run, given, tmp_path):
    """A setting may be a number that JSON does not have."""
    checkpoint = load_checkpoint(run[0] / 'best.pt')
    odd = {'batch_size': 'many', 'a': math.inf, 'b': math.nan}
    checkpoint['settings'] = checkpoint['settings'] | odd
    torch.save(checkpoint, tmp_path / 'best.pt')
    given(f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=3')
    report.main()
    shown, = data_of(tmp_path / 'report.html')['runs']
    assert shown['settings']['batch_size'] == 'many' and not {'a', 'b'} & set(shown['settings'])


@pytest.mark.parametrize('flag', [
    '--num_samples=1', '--max_new_tokens=0', '--top_p=0', '--ckpt=first', '--temperature=-1',
    '--temperature=1e-40', '--seed=-1', '--eval_iters=-1', '--dtype=int8', '--out_dir= , '])
def test_impossible_settings_are_rejected(run, given, flag):
    given(f'--out_dir={run[0]}', flag)
    with pytest.raises(SettingError):
        report.main()


def test_path_that_cannot_be_written_is_rejected_at_once(given, tmp_path):
    for path in tmp_path / 'nowhere' / 'a.html', tmp_path:
        given('--out_dir=nowhere', f'--path={path}')
        with pytest.raises(SettingError, match='path'):
            report.main()


def test_page_that_cannot_be_written_names_path(run, given, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    given(f'--out_dir={run[0]}', f'--path={tmp_path}/a.html')
    monkeypatch.setattr(report, 'report_on', lambda model: ([], {}))
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(UserError, match=r'cannot write .*/a\.html .*or name another --path; what'):
        report.main()
    assert os.listdir(tmp_path) == []


def test_page_in_a_folder_that_cannot_be_written_to_is_rejected_at_once(given, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: path != tmp_path)  # root may write anywhere
    given('--out_dir=nowhere', f'--path={tmp_path}/a.html')
    with pytest.raises(SettingError, match='cannot be written to: name another --path'):
        report.main()


def test_files_of_the_user_next_to_the_page_stay(run, given, tmp_path):
    (tmp_path / 'a.html.tmp').write_text('mine')
    given(f'--out_dir={run[0]}', f'--path={tmp_path}/a.html', '--num_samples=2', '--max_new_tokens=3',
          '--eval_iters=1')
    report.main()
    assert sorted(os.listdir(tmp_path)) == ['a.html', 'a.html.tmp']
    assert (tmp_path / 'a.html.tmp').read_text() == 'mine'


@pytest.mark.parametrize('text, names', [
    ('a,b', ['a', 'b']),
    ('a, b', ['a', 'b']),
    ('lr=1,wd=2', ['lr=1,wd=2']),
    ('a,lr=1,wd=2,b', ['a', 'lr=1,wd=2', 'b']),
    ('end ', ['end ']),
    ('end ,a', ['end ', 'a']),
    ('lr=1,wd=3', ['lr=1', 'wd=3']),
    (','.join(300 * 'a'), 300 * ['a'])])
def test_list_names_finds_folders_with_commas_and_spaces(given, tmp_path, monkeypatch, text, names):
    monkeypatch.chdir(tmp_path)
    for name in 'a', 'b', 'lr=1,wd=2', 'end ':
        (tmp_path / name).mkdir()
    given(f'--out_dir={text}')
    assert report.list_names() == names


def test_curves_leave_out_steps_that_are_too_large_for_a_page(run, given, tmp_path):
    """Infinity is not JSON: the page would stay empty."""
    shutil.copy(run[0] / 'best.pt', tmp_path)
    lines = [{'iter': 3, 'loss': 2.0}, {'iter': 1e308, 'loss': 2.0}, {'iter': 10**300, 'loss': 2.0}]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(json.dumps(line) for line in lines))
    given(f'--out_dir={tmp_path}', '--num_samples=2')
    report.main()
    assert data_of(tmp_path / 'report.html')['runs'][0]['curves']['loss'] == [[3, 3 * 256, None, 2.0]]
    with pytest.raises(ValueError, match='not JSON compliant'):
        report.make_html(['a'], [], [{'curves': math.inf}])


@pytest.mark.parametrize('n', [1, 2000, 2001, 2002, 3999, 4001, 100_000])
def test_thin_curve_keeps_the_ends_and_the_mean(n):
    points = [[step, 256 * step, None if step % 2 else step / 10, step % 7] for step in range(n)]
    thinned = report.thin_curve(points)
    assert len(thinned) <= 2000 and thinned[0] == points[0] and thinned[-1] == points[-1]
    assert thinned == points or len(thinned) > 990
    steps = [step for step, *_ in thinned]
    assert steps == sorted(set(steps))
    gaps = [right - left for left, right in pairwise(steps[1:-1])]
    for i, (step, tokens, seconds, value) in enumerate(thinned):
        assert [tokens, seconds] == points[step][1:3]
        if n > 2000 and 0 < i < len(thinned) - 2:
            start = step - gaps[0] // 2
            assert value == pytest.approx(sum(point[3] for point in points[start:start + gaps[0]]) / gaps[0])


def test_thin_curve_has_no_infinity():
    points = report.thin_curve([[step, step, None, 1e308] for step in range(5000)])
    assert [value for *_, value in points] == pytest.approx([1e308] * len(points))


def test_page_of_a_long_run_is_small(run, given, tmp_path):
    shutil.copy(run[0] / 'best.pt', tmp_path)
    with open(tmp_path / 'metrics.jsonl', 'w') as file:
        for step in range(30_000):
            file.write(json.dumps({'iter': step, 'loss': 2.0, 'lr': 1e-3, 'seconds': step / 7}) + '\n')
    with open(tmp_path / 'samples.jsonl', 'w') as file:
        for step in range(0, 3001):
            file.write(json.dumps({'iter': step, 'story': f'Once {step}.'}) + '\n')
    given(f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=3', '--eval_iters=1')
    report.main()
    assert (tmp_path / 'report.html').stat().st_size < 500_000
    shown, = data_of(tmp_path / 'report.html')['runs']
    assert shown['curves']['loss'][-1] == [29_999, 29_999 * 256, 29_999 / 7, 2.0]
    steps = [step for step, _ in shown['samples']]
    assert len(steps) == len(set(steps)) == 200 and (steps[0], steps[-1]) == (0, 3000)
    assert shown['samples'][1] == [steps[1], f'Once {steps[1]}.']


# the page -----------------------------------------------------------------------

def test_excerpt_of_a_long_source_has_the_passage():
    passage = 'The "old" dog, ran'
    source = 'x' * 3000 + ' ' + 'the old dog ran' + ' ' + 'y' * 3000
    found = report.excerpt(source, passage)
    assert found == '…' + 'x' * 499 + ' the old dog ran ' + 'y' * 499 + '…'
    assert report.excerpt(source, 'another') == source[:4000]
    assert report.excerpt('a short one', 'short') == 'a short one'


def test_markup_in_a_story_is_text(run, given, tmp_path):
    evil = '</script><script>document.title = "evil"</script><img src=x onerror=alert(1)>'
    shutil.copy(run[0] / 'best.pt', tmp_path)
    (tmp_path / 'samples.jsonl').write_text(json.dumps({'iter': 0, 'story': evil}) + '\n')
    given(f'--out_dir={tmp_path}', '--num_samples=2')
    report.main()
    text = (tmp_path / 'report.html').read_text()
    assert text.count('</script>') == 2 and '<img' not in text
    assert data_of(tmp_path / 'report.html')['runs'][0]['samples'] == [[0, evil]]


def test_page_connects_to_nothing(page):
    text = page[1].read_text()
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\"" in text
    assert not re.search(r'\b(src|href|url\()\s*=?', text.split('<script type')[0].replace('-src', ''))


@pytest.mark.skipif(not PROGRAM, reason='no Chromium here')
def test_browser_shows_the_page(page, tmp_path):
    done = subprocess.run(
        [PROGRAM, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}',
         '--virtual-time-budget=2000', '--dump-dom', page[1].as_uri()], capture_output=True, text=True,
        timeout=120)
    shown, = data_of(page[1])['runs']
    text = re.sub('<script.*?</script>', '', done.stdout, flags=re.DOTALL)
    assert f"<title>{shown['name']}</title>" in text
    assert dict(shown['facts'])['parameters'] in text
    assert '<path class="val_loss" d="M' in text
    assert text.count('<circle') == 2 * 3  # the validation losses and accuracies
    assert text.count('class="piece') >= len(shown['tokens'])
    for story in shown['stories']:
        assert story['text'][:story['prompt']] in text
    assert STORIES[0][:16] in text
