"""report.py from outside, against naive figures: the table that it prints, and what its page holds."""

import hashlib
import json
import math
import random
import re
import shutil
import struct
from itertools import pairwise

import pytest
import torch

from tests.helpers.scripts import script
from tests.reference import naive_prepare, naive_report, naive_sample

REPORT, SAMPLE, PREPARE = 'report.py', 'sample.py', 'data/tiny_stories/prepare.py'
WORDS = '\u732b\u72d7\u9b5a\u9ce5\u5c71\u6c34\u6708\u65e5\u4eba\u5927\u5c0f\u8d70'  # each is a word
NAMES = 'Al', 'Bo', 'Cy', 'Di'
LIMIT, N = 36, 12  # longest story, number of stories


def walk(rng, n):
    """Return n words, each followed by one of two others, so that runs of words come again."""
    i, text = rng.randrange(len(WORDS)), ''
    for _ in range(n):
        text += WORDS[i]
        i = (2 * i + rng.choice([1, 1, 1, 1, 1, 1, 5])) % len(WORDS)
    return text


def story(rng):
    name = rng.choice(NAMES)
    first = f'{walk(rng, 5)} {name} {walk(rng, 3)}.'
    more = [f'{walk(rng, rng.randint(5, 14))}.' for _ in range(rng.randint(1, 4))]
    return ' '.join([first, *more, f'{name} {walk(rng, 4)}.'])


RNG = random.Random(0)
TRAIN = [story(RNG) for _ in range(60)]
VAL = [story(RNG) for _ in range(15)]
VAL[3], VAL[8] = TRAIN[5], f'{walk(RNG, 9)}.'  # a copy; one of a sentence
VAL[10] = VAL[10].replace('.', '. \u9f8d.', 1)  # a word that no training story has


def bigram_checkpoint(tokenizer, texts, seed):
    """Return a checkpoint that mostly draws what follows a character in the texts."""
    characters = tokenizer.characters
    checkpoint = naive_sample.make_checkpoint(seed, 0.0, characters, block_size=128, n_embd=64)
    weights = checkpoint['model']
    ids = [1, *range(259, 259 + len(characters))]
    place = {token: 1 + i for i, token in enumerate(ids)}
    counts = torch.full((len(ids) + 1, len(ids) + 1), 0.02)
    for text in texts:
        stream = [1, *naive_prepare.encode(tokenizer, text), 1]
        for a, b in pairwise(stream):
            if a in place and b in place:
                counts[place[a], place[b]] += 1
    for name, w in weights.items():
        if 'attn.' in name or 'mlp.' in name:
            w *= 0.4
    weights['embedding.weight'][:, 1:] = 0
    weights['lm_head.weight'][:, 1:] = 0
    weights['lm_head.weight'][[0, *range(2, 259)], 0] = -3.0  # bytes are rare, but have a finite loss
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    for a in ids:
        weights['embedding.weight'][a, place[a]] = 4.0
        for b in ids:
            weights['lm_head.weight'][b, place[a]] = log_p[place[a], place[b]] / 6
    return checkpoint


def make_run(folder, data, checkpoint, name='best.pt', **settings):
    """Write a run's folder as train.py leaves it."""
    folder.mkdir(exist_ok=True)
    meta = json.loads((data / 'meta.json').read_text())
    hashes = [shard['sha256'] for split in ('train', 'val') for shard in meta['splits'][split]['shards']]
    named = json.dumps([meta['encoding'], meta['vocab_size'], hashes]).encode()
    about = {'fingerprint': hashlib.sha256(named).hexdigest(), 'infill_rate': meta['infill_rate'],
             'settings': {'dataset': str(data), 'batch_size': 4, 'gradient_accumulation_steps': 3,
                          'block_size': checkpoint['config']['block_size']} | settings}
    checkpoint = {key: value for key, value in checkpoint.items() if key != 'float64'}
    torch.save(checkpoint | about, folder / name)
    return folder


def read_stream(data, split):
    shard = (data / f'{split}_00000.bin').read_bytes()
    return list(struct.unpack(f'<{len(shard) // 2}H', shard))


def prepare(folder, train, val, *words):
    """Prepare stories; return the folder and the naive tokenizer."""
    source = folder.with_suffix('.source')
    source.mkdir()
    for name, stories in ('train', train), ('val', val):
        (source / f'{name}.txt').write_text('\n<|endoftext|>\n'.join(stories))
    script(PREPARE, '--source', source, '--out_dir', folder, '--offline', *words)
    return folder, naive_prepare.Char(train)


class World:
    """Prepared data, and a run whose model has learned what follows a character."""

    def __init__(self, folder):
        self.data, self.tokenizer = prepare(folder / 'data', TRAIN, VAL)
        self.best = bigram_checkpoint(self.tokenizer, TRAIN, 0)
        self.last = bigram_checkpoint(self.tokenizer, TRAIN[:20], 1)
        self.run = make_run(folder / 'run', self.data, self.best)
        make_run(folder / 'run', self.data, self.last, 'ckpt.pt')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp('report'))


def report(path, *words):
    """Return the lines that report.py prints, and what its page holds."""
    done = script(REPORT, f'--path={path}', '--device=cpu', *words)
    text = path.read_text()
    data = re.search('<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    lines = done.out.splitlines()
    assert lines[-1] == f'look at {path}'
    return lines[:-1], json.loads(data)


def written_by_sample(out_dir, n, *words):
    """Return the stories that sample.py writes with the same settings, and how many were not cut."""
    done = script(SAMPLE, f'--out_dir={out_dir}', '--device=cpu', *words)
    stories = done.out[:-1].split('\n---\n')
    n_cut = int(done.err.split(' of ')[0]) if done.err else 0
    assert len(stories) == n
    return stories, n - n_cut


def rows_of(page):
    """Return {label: (cells, real)} of all figures, in their order."""
    return {row['label']: (row['cells'], row['real']) for group in page['table'] for row in group['rows']}


def check_figure(label, text, value):
    """Compare a cell with a naive figure: four digits, and the rounding of float32."""
    if math.isnan(value):
        assert text == '', label
    else:
        assert float(text.replace(',', '')) == pytest.approx(value, rel=1.1e-3, abs=1e-9), label


def cut_to(tokenizer, stories, limit):
    """Return the texts of stories cut to `limit` tokens, and how many were not cut."""
    texts, n_ended = [], 0
    for text in stories:
        ids = naive_prepare.encode(tokenizer, text)[:limit]
        n_ended += len(ids) < limit
        texts.append(naive_sample.decode(ids, tokenizer.characters))
    return texts, n_ended


def expected_figures(world, checkpoint, written, n_ended, limit=LIMIT, n=N):
    """Return {label: (the model's value, that of real stories)}."""
    real, n_real_ended = cut_to(world.tokenizer, naive_report.evenly_spread(VAL, n), limit)
    n_bytes = min(sum(len(text.encode()) for text in texts) for texts in (written, real))
    ours = naive_report.text_figures(written, n_ended, TRAIN, n_bytes)
    theirs = naive_report.text_figures(real, n_real_ended, TRAIN, n_bytes)
    stream, n_val_bytes = read_stream(world.data, 'val'), sum(len(text.encode()) for text in VAL)
    table = {label: (value, math.nan)
             for label, value in naive_report.prediction(checkpoint, stream, n_val_bytes).items()}
    table |= {label: (ours[label], theirs[label]) for label in ours}
    measures = {'own ending, %': naive_report.own_endings, 'own name, %': naive_report.own_names}
    for label, measure in measures.items():
        value, asked = measure(checkpoint, world.tokenizer, VAL[:n])
        assert asked >= 10
        table[label] = value, math.nan
    return table


def check_table(names, lines, page, expected, column=0):
    """Compare all figures of one run with the naive ones, and the printed table with that of the page."""
    rows = rows_of(page)
    assert list(rows) == list(expected)
    for label, (value, real) in expected.items():
        cell, real_cell = rows[label][0][column], rows[label][1]
        if ' (real: ' in cell:  # where it is not the same for all runs
            assert label == 'compression' and real_cell == ''
            cell, real_cell = cell.removesuffix(')').split(' (real: ')
        check_figure(label, cell, value)
        check_figure(label, real_cell, real)
    printed = [(label, cells, real) for label, (cells, real) in rows.items()]
    assert lines == naive_report.table_lines(names, printed)


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
           {'iter': 4, 'loss': 4.0, 'lr': 0.2, 'val_part_loss': 4.25, 'seconds': 62.0}]


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
    for story in shown['stories']:
        start, stop, n_words = naive_report.longest_copy(story['text'], TRAIN)
        assert (story['copied'], story['words']) == ([start, stop], n_words)
        if n_words:
            run = tuple(naive_report.words(story['text'][start:stop]))
            assert story['source'] in TRAIN and run in naive_report.runs(story['source'], n_words)
        else:
            assert story['source'] == ''
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
        'val_part_loss': [[4, 4 * step, 62.0, 4.25]], 'val_acc': [[4, 4 * step, None, 0.25]],
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
