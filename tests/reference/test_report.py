"""tools/report.py from outside, against naive figures: the table that it prints, and what its page holds."""

import json
import random
import shutil

import pytest

from tests.reference import naive_prepare, naive_report, naive_sample
from tests.reference.report_cases import (
    LIMIT,
    TRAIN,
    VAL,
    N,
    World,
    check_figure,
    check_table,
    cut_to,
    expected_figures,
    make_run,
    prepare,
    read_stream,
    report,
    rows_of,
    story,
    walk,
    written_by_sample,
)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp('report'))


@pytest.fixture(scope='module')
def page(world):
    """Return the report of the best checkpoint: its lines, its page, and how its stories were drawn."""
    drawing = [f'--max_new_tokens={LIMIT}', '--temperature=0.9', '--top_p=0.9', '--seed=6']
    (world.run / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in RECORDS))
    sample = {'iter': 0, 'prompt': 'a', 'story': '<b>a</b>'}
    (world.run / 'samples.jsonl').write_text(json.dumps(sample) + '\n')
    (world.run / 'run.json').write_text(json.dumps({'name': 'x', 'hardware': 'an abacus'}))
    lines, page = report(world.run / 'report.html', f'--out_dir={world.run}', f'--num_samples={N}', *drawing)
    return lines, page, drawing


RECORDS = [{'iter': 0, 'loss': 5.5, 'lr': 0.1, 'seconds': 1.0}, {'iter': 4, 'val_loss': 4.5, 'val_acc': 0.25},
           {'iter': 4, 'loss': 4.0, 'lr': 0.2, 'seconds': 62.0}]


def test_every_figure(world, page):
    lines, page, drawing = page
    written, n_ended = written_by_sample(world.run, N, f'--num_samples={N}', *drawing)
    expected = expected_figures(world, world.best, written, n_ended)
    for label in 'ended, %', 'repeated, %', 'unknown, %', '5 words, %', '8 words, %', 'own ending, %':
        assert any(0 < value < 100 for value in expected[label]), label  # else much would pass
    check_table([str(world.run)], lines, page, expected)


def test_stories_to_look_at(world, page, tmp_path):
    _, page, drawing = page
    real, _ = cut_to(world.tokenizer, naive_report.evenly_spread(VAL, N), LIMIT)
    starts = [' '.join(text.split(' ')[:4]) for text in real]
    (tmp_path / 'starts.txt').write_text('\n'.join(starts))
    words = [f'--start=FILE:{tmp_path}/starts.txt', '--one_per_line', '--num_samples=1', *drawing]
    texts, _ = written_by_sample(world.run, N, *words)
    (shown,) = page['runs']
    assert [(story['text'], story['prompt']) for story in shown['stories']] == [
        (text, len(start)) for text, start in zip(texts, starts, strict=True)]
    for item in shown['stories']:
        start, stop, n_words = naive_report.longest_copy(item['text'], TRAIN)
        assert (item['copied'], item['words']) == ([start, stop], n_words)
        if n_words:
            run = tuple(naive_report.words(item['text'][start:stop]))
            assert item['source'] in TRAIN and run in naive_report.runs(item['source'], n_words)
        else:
            assert item['source'] == ''
    assert any(story['words'] for story in shown['stories'])


def test_tokens_of_the_first_real_story(world, page):
    (shown,) = page[1]['runs']
    ids = [1, *naive_prepare.encode(world.tokenizer, VAL[0])[:LIMIT]]
    probs = naive_report.log_probs(world.best, ids[:-1]).exp()
    assert len(shown['tokens']) == len(ids) - 1
    for k, (text, p, others) in enumerate(shown['tokens']):
        before = naive_sample.decode(ids[:k + 1], world.tokenizer.characters)
        assert before + text == naive_sample.decode(ids[:k + 2], world.tokenizer.characters)
        assert p == pytest.approx(probs[k, ids[k + 1]].item(), rel=1e-3, abs=1e-6)
        likely = [i for i in probs[k].argsort(descending=True).tolist() if i != ids[k + 1]][:5]
        assert [q for _, q in others] == pytest.approx(probs[k, likely].tolist(), rel=1e-3, abs=1e-6)


def test_facts_and_curves(world, page):
    _, page, _ = page
    (shown,), best = page['runs'], world.best
    train, val = read_stream(world.data, 'train'), read_stream(world.data, 'val')
    n_params = sum(w.numel() for w in best['model'].values())
    assert dict(shown['facts']) == {
        'parameters': f'{n_params:,}', 'shape': '2 layers, 4 heads, 64 wide', 'context': '128 tokens',
        'tokenizer': f"char, {best['config']['vocab_size']} tokens", 'data': 'data',
        'to train on': f'60 stories, {len(train):,} tokens',
        'to validate': f'15 stories, {len(val):,} tokens',
        'trained': f'5 steps, {5 * 4 * 3 * 128:,} tokens', 'time': '01:02 of training',
        'hardware': 'an abacus', 'stories for the figures': f'{N} written, {N} real'}
    step = 4 * 3 * 128
    assert shown['curves'] == {
        'loss': [[0, 0, 1.0, 5.5], [4, 4 * step, 62.0, 4.0]], 'val_loss': [[4, 4 * step, None, 4.5]],
        'val_acc': [[4, 4 * step, None, 0.25]],
        'lr': [[0, 0, 1.0, 0.1], [4, 4 * step, 62.0, 0.2]]}
    assert shown['samples'] == [[0, '<b>a</b>']] and shown['settings']['batch_size'] == 4
    assert page['title'] == shown['name'] == str(world.run)


def test_runs_side_by_side_with_defaults(world, tmp_path):
    """The last checkpoint next to the best one, by --init_from; drawn with the default settings."""
    shutil.copy(world.run / 'best.pt', tmp_path / 'best.pt')
    names = [str(world.run / 'ckpt.pt'), str(tmp_path / 'best.pt')]
    words = ['--num_samples=11', '--max_new_tokens=25']
    lines, page = report(tmp_path / 'page.html', f'--init_from={",".join(names)}', *words)
    for column, checkpoint in enumerate((world.last, world.best)):
        ckpt = '--ckpt=last' if column == 0 else '--ckpt=best'
        written, n_ended = written_by_sample(world.run, 11, ckpt, *words)
        expected = expected_figures(world, checkpoint, written, n_ended, 25, 11)
        check_table(names, lines, page, expected, column)
    assert [shown['name'] for shown in page['runs']] == names
    assert page['runs'][0]['curves']['loss'] and not page['runs'][1]['curves']['loss']


@pytest.mark.parametrize('n_iters', [0, 1])
def test_evaluation_of_middles_and_of_other_data(world, tmp_path, n_iters):
    """--dataset is not what was trained on, and longer than a batch of 32 windows."""
    rng, val = random.Random(1), []
    for _ in range(130):  # of 40 to 170 tokens, and with last sentences of all lengths
        middle = ' '.join(f'{walk(rng, 8)}.' for _ in range(rng.randint(0, 7)))
        val.append(f'{story(rng)} {middle} Al {walk(rng, rng.randint(1, 20))}.')
    data, _ = prepare(tmp_path / 'other', TRAIN, val, '--infill_rate=0.6', f'--tokenizer={world.run}')
    words = ['--num_samples=2', '--max_new_tokens=10', f'--dataset={data}', '--ckpt=last']
    lines, page = report(tmp_path / 'page.html', f'--out_dir={world.run}', f'--eval_iters={n_iters}', *words)
    stream = read_stream(data, 'val')
    assert len(stream) > 40 * 128
    n_bytes = sum(len(text.encode()) for text in val)
    expected = naive_report.prediction(world.last, stream, n_bytes, 32 if n_iters else None)
    if n_iters == 0:
        expected['loss of middles'] = naive_report.loss_of_middles(world.last, stream)
    rows = rows_of(page)
    assert ('loss of middles' in rows) == ('loss of middles' in lines[5])
    for label, value in expected.items():
        check_figure(label, rows[label][0][0], value)
    part = '1 batches of the' if n_iters else 'the whole'
    assert page['table'][0]['rows'][0]['note'].endswith(f'over {part} validation split')


TOY = 'In a quiet town, there lived a girl named Sue who had a red toy car.\n\n'
KEEPS = {  # which of name, animal, object and place a story keeps to its end; a missing one it does not have
    TOY + 'Sue played in the park with Tim.\n\nSue loved the toy car.': 'name animal object place',
    TOY + 'Sue played in the park with Anna.\n\nSue loved the toy car.': 'animal object place',
    TOY + 'Sue gave Rocky a hand.\n\nSue loved the toy car.': 'name object place',
    TOY + 'Sue ran to the clearing.\n\nSue loved the car.': 'name animal'}


def test_what_stories_of_the_built_in_corpus_keep(tmp_path):
    stories = list(KEEPS)
    data, tokenizer = prepare(tmp_path / 'data', stories, stories)
    meta = json.loads((data / 'meta.json').read_text())
    (data / 'meta.json').write_text(json.dumps(meta | {'source': 'sample'}))
    characters = tokenizer.characters
    checkpoint = naive_sample.make_checkpoint(0, 0.0, characters, block_size=64, n_layer=1)
    run = make_run(tmp_path / 'run', data, checkpoint)
    words = ['--num_samples=4', '--max_new_tokens=200', '--temperature=0']
    _, page = report(tmp_path / 'page.html', f'--out_dir={run}', *words)
    rows = rows_of(page)
    for kind in 'name', 'animal', 'object', 'place':
        share = naive_report.mean(kind in kept.split() for kept in KEEPS.values())
        assert float(rows[f'{kind}, %'][1]) == 100 * share
    new, _ = naive_sample.greedy(checkpoint, [1], 200)
    n_words = len(naive_report.words(naive_sample.decode(new, characters)))
    check_figure('words', rows['words'][0][0], n_words)
