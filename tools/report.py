"""What runs have learned: figures, and one page to look at that needs no server and no network.

    python report.py --out_dir out-quickstart                            writes out-quickstart/report.html
    python report.py --out_dir out-a,out-b --path compared.html          two runs side by side
    python report.py --init_from gpt2 --dataset mine --path gpt2.html    a pretrained model, on prepared data

Each figure stands beside the same one of as many validation stories, which says what good is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

import json
import math
import re
import shlex
import time
from functools import partial
from operator import methodcaller

from tqdm import tqdm

from configurator import SettingError, UserError, configure, in_range, one_of, run, user_errors
from core.checkpoint import FILES, RunFolder, load_model
from core.device import DTYPES, choose_device, choose_dtype, configure_memory
from core.evaluate import evaluate, infill_rows, score
from core.generate import first_words, generate_stories
from core.progress import run_facts
from data.files import write_atomically
from data.shards import Split, fingerprint, prepared_folder
from data.tokenizer import load_tokenizer
from formats.pretrained import load_with_tokenizer
from tools import quality

out_dir = 'out-tiny-stories'  # folder of a run, or several with commas between them, to compare
ckpt = 'best'  # best (lowest validation loss) or last
init_from = ''  # instead: a pretrained model or a single checkpoint, or several with commas between them
dataset = ''  # what to evaluate on: a folder under data/, or any path; '': what each run was trained on
path = ''  # of the page; '': report.html in the first run's folder
num_samples = 100  # stories written for the figures, and as many of the validation split beside them
max_new_tokens = 1000  # longest story
temperature = 0.8  # of the stories; below 1: likelier words
top_p = 0.95  # draw from the likeliest tokens that make up this probability; 1: all
eval_iters = 0  # batches of the evaluation; 0: the whole validation split
seed = 1337  # same seed, same stories
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps
dtype = 'float32'  # float32, bfloat16, float16 or auto

_SHOWN = 12  # stories on the page, after the beginnings of as many validation stories
_CURVES = 'loss', 'val_loss', 'val_part_loss', 'lr', 'val_acc'


def check_settings():
    """Refuse what no report can mean. Raises SettingError."""
    one_of(FILES, ckpt=ckpt)
    one_of(('auto', *DTYPES), dtype=dtype)
    in_range(at_least=2, num_samples=num_samples)
    in_range(at_least=1, max_new_tokens=max_new_tokens)
    in_range(at_least=0, eval_iters=eval_iters)
    in_range(at_least=1e-30 if temperature > 0 else 0, at_most=1e30, temperature=temperature)
    in_range(at_least=0, below=2**63, seed=seed)
    in_range(above=0, at_most=1, top_p=top_p)


class Model:
    """A model to report on, what it was trained on, and the stories that both have."""

    def __init__(self, name, torch_device):
        self.name = name
        checkpoint, self.tokenizer = load_with_tokenizer(name if init_from else Path(name, FILES[ckpt]))
        self.settings, self.iter = checkpoint['settings'], checkpoint['iter']
        self.folder = RunFolder(Path(name).parent if Path(name).is_file() else name, resume=True)
        self.gpt = load_model(checkpoint, torch_device).to(choose_dtype(dtype, torch_device))
        data = dataset or self.settings.get('dataset', '')
        if not data:
            raise SettingError(f'{name} does not say what it was trained on: name a prepared --dataset')
        self.data = prepared_folder(data)
        self.train, self.val = Split(self.data, 'train'), Split(self.data, 'val')
        if load_tokenizer(self.data).state() != checkpoint['tokenizer']:
            raise UserError(f'{data} was prepared with another tokenizer than {name} has: prepare it with '
                            f'--tokenizer {shlex.quote(name)}')
        if not dataset and checkpoint.get('fingerprint', '') != fingerprint(self.train.meta):
            raise UserError(f'the data in {data} is not what {name} was trained on: prepare it as before, or '
                            'say with --dataset that it is what to evaluate on')
        self.facts, self.built_in = self.describe(), self.train.meta['source'] == 'sample'

    def write(self, prompts, what):
        """The ids of a story for each of the prompts (lists of ids), without the prompt."""
        enc = self.tokenizer
        return [*generate_stories(self.gpt, [[enc.delimiter, *prompt] for prompt in prompts], enc.delimiter,
                           max_new_tokens, seed, f'{self.name}: {what}', top_p=top_p, temperature=temperature,
                           suppress=(enc.blank, enc.middle))]

    def look(self):
        """All that needs the model, for the table and for the page."""
        enc, limit = self.tokenizer, max_new_tokens
        validation = [*quality.read_stories(self.val, enc)]
        if not validation:
            raise UserError(f'{self.data} has no validation story')
        real = quality.alike(validation, enc, num_samples, limit)
        self.facts.append(('stories for the figures', f'{len(real)} written, {len(real)} real'))
        n, texts = len(real), [enc.decode(row) for row in real]
        written = self.write([[]] * n, f'{n} stories')
        beginnings = [first_words(text, enc, self.gpt.config.block_size // 2) for text in texts[:_SHOWN]]
        continuations = self.write(beginnings, f'{len(beginnings)} more to look at')
        texts += [enc.decode(row) for row in written]
        texts += [enc.decode([*both[0], *both[1]]) for both in zip(beginnings, continuations, strict=True)]
        training = tqdm(quality.read_stories(self.train, enc), f'{self.name}: copies', unit=' stories',
                        leave=False, disable=None)
        matches = quality.look_up(texts, training)
        self.shown = [*zip([len(enc.decode(ids)) for ids in beginnings], matches[2 * n:], strict=True)]
        self.tokens = quality.token_probabilities(self.gpt, enc, [enc.delimiter, *real[0]])
        self.table = self.prediction() + quality.figures(
            self.gpt, enc, (written, matches[n:2 * n]), (real, matches[:n]), validation[:num_samples], limit,
            self.built_in)

    def prediction(self):
        """The figures of evaluate.py as (group, label, note, value, that of real stories: there is none)."""
        size = self.gpt.config.block_size
        result = evaluate(partial(score, self.gpt), self.val, size, 32, infill_rows(self.val, size),
                          max_batches=eval_iters, device=next(self.gpt.parameters()).device)
        part = f'{eval_iters} batches of the' if eval_iters else 'the whole'
        return [('prediction', label, f'{note}, over {part} validation split', factor * result[key], math.nan)
                for key, label, note, factor in (
                    ('val_bpb', 'bits per byte', 'comparable between tokenizers', 1),
                    ('val_loss', 'loss', 'nats a token', 1), ('val_ppl', 'perplexity', 'e to the loss', 1),
                    ('val_acc', 'accuracy, %', 'tokens that were held likeliest', 100),
                    ('val_infill_loss', 'loss of middles', 'nats a token between two given ends', 1))
                if key in result]

    def describe(self):
        """What it is: a list of (label, text)."""
        config, splits = self.gpt.config, self.train.meta['splits']
        facts = [('parameters', f'{self.gpt.n_params():,}'),
                 ('shape', f'{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide'),
                 ('context', f'{config.block_size:,} tokens'),
                 ('tokenizer', f'{self.tokenizer.encoding}, {config.vocab_size:,} tokens'),
                 ('data', self.data.name),
                 ('to train on', f"{splits['train']['stories']:,} stories, {self.train.n_tokens:,} tokens"),
                 ('to validate', f"{splits['val']['stories']:,} stories, {self.val.n_tokens:,} tokens")]
        if self.iter:
            seen = self.iter * self.step_tokens()
            facts += [('trained', f'{self.iter:,} steps, {seen:,} tokens')]
        seconds = [record['seconds'] for record in self.folder.records() if 'seconds' in record]
        facts += [('time', f'{tqdm.format_interval(seconds[-1])} of training')] if seconds else []
        return facts + [(key, text) for key, text in run_facts(self.folder.path).items() if key == 'hardware']

    def step_tokens(self):
        return math.prod(self.settings.get(key, 1)
                         for key in ('batch_size', 'gradient_accumulation_steps', 'block_size'))

    def page(self):
        """What the page shows of it."""
        step, records = self.step_tokens(), self.folder.records()
        curves = {key: [[record['iter'], record['iter'] * step, record.get('seconds'), record[key]]
                        for record in records if key in record] for key in _CURVES}
        samples = [[record['iter'], record['story']] for record in self.folder.records('samples.jsonl')
                   if 'story' in record]
        stories = []
        for prompt, match in self.shown:
            start, stop, n_words = match.longest
            stories.append({'text': match.story, 'prompt': prompt, 'copied': [start, stop],
                            'words': n_words, 'source': around(match.story[start:stop], match.source)})
        return {'name': self.name, 'facts': self.facts, 'settings': self.settings, 'curves': curves,
                'samples': samples, 'stories': stories, 'tokens': self.tokens}


def around(passage, source):
    """A training story, or of a long one what stands around the words of `passage`."""
    if len(source) < 4000:
        return source
    place = re.search(r'\W*'.join(map(re.escape, quality.words(passage))), source, re.IGNORECASE)
    return f'…{source[max(0, place.start() - 500):place.end() + 500]}…' if place else source[:4000]


def side_by_side(models):
    """The table of all: a list of (group, label, note, a text for each model, that of real stories)."""
    tables, rows = [{row[:2]: row[2:] for row in model.table} for model in models], []
    for key in dict.fromkeys(key for table in tables for key in table):
        found = [table.get(key, ('', math.nan, math.nan)) for table in tables]
        notes, values, real = zip(*found, strict=True)
        values, real = [*map(shown, values)], [*map(shown, real)]
        if len({*real} - {''}) > 1:  # of different data
            values, real = [f'{x} (real: {y})' for x, y in zip(values, real, strict=True)], ['']
        rows.append((*key, max(notes), values, max(real)))
    return rows


def shown(value):
    """A figure as text, '' where there is none."""
    return '' if math.isnan(value) else f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'


def print_table(names, rows):
    lines = [('', *names, 'real stories'), *((row[1], *row[3], row[4]) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        print(first.ljust(widths[0]), *map(str.rjust, rest, widths[1:]), sep='   ')


def main():
    check_settings()
    torch_device = choose_device(device)
    configure_memory(torch_device)
    names = [name.strip() for name in (init_from or out_dir).split(',') if name.strip()]
    if not names:
        raise SettingError('there is nothing to report on: name a run with --out_dir')
    target = Path(path or ('report.html' if init_from else Path(names[0]) / 'report.html')).resolve()
    if (path or init_from) and not (target.parent.is_dir() and (target.is_file() or not target.exists())):
        raise SettingError(f'path {target} is no file, or in no folder that is there')
    models = []
    for name in names:
        with user_errors(f'{name} or its data'):
            models.append(Model(name, torch_device))
    for model in models:
        model.look()
    rows = side_by_side(models)
    print_table(names, rows)
    groups = {group: [dict(zip(('label', 'note', 'cells', 'real'), row[1:], strict=True))
                      for row in rows if row[0] == group] for group, *_ in rows}
    data = {'title': ', '.join(names), 'made': time.strftime('%Y-%m-%d %H:%M'),
            'runs': [model.page() for model in models],
            'table': [{'group': group, 'rows': rows} for group, rows in groups.items()]}
    template = Path(__file__).with_name('report_template.html').read_text(encoding='utf-8')
    page = template.replace('__DATA__', json.dumps(data).replace('<', '\\u003c'))  # ends no element
    write_atomically(target, methodcaller('write', page.encode()))
    print(f'look at {target}')


if __name__ == '__main__':
    configure(globals())
    run(main, 'write fewer stories (--num_samples), or with --dtype bfloat16')
