"""A trained run for reports, and the comparison of tools/report.py with naive figures."""

import hashlib
import json
import math
import random
import re
import struct
from itertools import pairwise

import pytest
import torch

from tests.helpers.scripts import script
from tests.reference import naive_prepare, naive_report, naive_sample

REPORT, SAMPLE, PREPARE = 'tools/report.py', 'sample.py', 'data/tiny_stories/prepare.py'
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
