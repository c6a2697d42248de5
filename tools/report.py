"""Compare trained models: figures on stdout, and a page with charts and stories in one HTML file.

    python tools/report.py --out_dir out-quickstart                     # writes out-quickstart/report.html
    python tools/report.py --out_dir out-a,out-b --path compared.html   # two runs side by side
    python tools/report.py --init_from gpt2 --dataset mine --path gpt2.html

The page needs no server and no network. Figures of stories are next to those of as many validation stories.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, so that the imports below are found

import json
import math
import os
import re
import shlex
import time
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from configurator import SettingError, UserError, configure, in_range, one_of, run
from core.checkpoint import FILES, RunFolder, load_model
from core.device import DTYPES, choose_device, choose_dtype
from core.evaluate import Evaluator, count_loss, evaluate, find_infill_rows
from core.generate import first_words, generate_stories
from core.kernels import use_fast_cpu_kernels
from core.memory import configure_memory
from core.progress import read_run_facts
from data.files import write_bytes_atomically
from data.shards import Split, fingerprint, prepared_folder
from data.tokenizer import Tokenizer, load_tokenizer
from formats.pretrained import load_with_tokenizer
from model import GPT
from tools.quality import (
    Figure,
    Stories,
    compare_stories,
    ending_figures,
    find_copies,
    read_stories,
    sample_evenly,
    split_words,
    token_probabilities,
)

out_dir = 'out-tiny-stories'  # folder of a run, or of several, separated by commas
ckpt = 'best'  # best (lowest validation loss) or last
init_from = ''  # instead of out_dir: a checkpoint or a pretrained model, or several, separated by commas
dataset = ''  # data to evaluate on: a folder under data/, or any path; '': what each run was trained on
path = ''  # the page to write; '': report.html in the folder of the first run
overwrite = False  # replace a file at path that is not a report
num_samples = 100  # stories to write for the figures, and validation stories to compare them with
max_new_tokens = 1000  # longest story
temperature = 0.8  # below 1 prefers likely tokens; 0: always take the likeliest
top_p = 0.95  # sample from the likeliest tokens that together have this probability; 1: from all
eval_iters = 0  # batches of the evaluation; 0: the whole validation split
seed = 1337  # same seed, same stories
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps
dtype = 'float32'  # float32, bfloat16, float16 or auto

_SHOWN = 12  # stories on the page, which continue the first words of validation stories
_CURVES = 'loss', 'val_loss', 'lr', 'val_acc'  # keys of metrics.jsonl that the page draws
_MOST_POINTS = 2000  # of a curve
_MOST_SAMPLES = 200  # stories written during training
_LARGEST_INT = 2**53  # that JavaScript knows exactly
_LONG_SOURCE = 4000  # characters of a training story that the page shows whole


def check_settings():
    """Check the settings. Raises SettingError."""
    one_of(FILES, ckpt=ckpt)
    one_of(('auto', *DTYPES), dtype=dtype)
    in_range(at_least=2, num_samples=num_samples)
    in_range(at_least=1, max_new_tokens=max_new_tokens)
    in_range(at_least=0, eval_iters=eval_iters)
    in_range(at_least=0, at_most=1e30, temperature=temperature)
    in_range(above=0, at_most=1, top_p=top_p)
    in_range(at_least=0, below=2**63, seed=seed)
    if 0 < temperature < 1e-30:  # float32 cannot divide by it
        raise SettingError(f'temperature is {temperature}; it must be 0, or at least 1e-30')


def list_names():
    """Return the runs or models to report on, as the user has named them. Raises SettingError."""
    names = []
    parts = (init_from or out_dir).split(',')
    while parts:
        n_parts = count_parts_of_first_name(parts)
        name = ','.join(parts[:n_parts])
        del parts[:n_parts]
        if not os.path.exists(name):  # then the spaces are next to a comma
            name = name.strip()
        if name:
            names.append(name)
    if not names:
        raise SettingError('there is nothing to report on: name a run with --out_dir')
    return names


def count_parts_of_first_name(parts):
    """Return how many parts the first name of a list has. A name may contain commas, if it is that of a path.

    Example: ['out-lr=1', 'wd=2', 'out-b'] -> 2 if there is a folder out-lr=1,wd=2
    """
    for n_parts in range(len(parts), 1, -1):
        name = ','.join(parts[:n_parts])
        if os.path.exists(name) or os.path.exists(name.strip()):
            return n_parts
    return 1


def page_path(names):
    """Return where to write the page. Raises SettingError if that is not possible."""
    if path or init_from:
        target = Path(path or 'report.html').resolve()
        if not target.parent.is_dir():
            raise SettingError(f'path {target} is in a folder that does not exist')
    else:
        target = (Path(names[0]) / 'report.html').resolve()  # loading the run says whether its folder exists
    if target.parent.is_dir() and not os.access(target.parent, os.W_OK):
        raise SettingError(f'path {target} is in a folder that cannot be written to: name another --path')
    if not target.exists():
        return target
    if not target.is_file():
        raise SettingError(f'path {target} is not a file')
    if not overwrite and not is_report(target):
        raise SettingError(f'path {target} is not a report: name another --path, or replace it (--overwrite)')
    return target


def template():
    return Path(__file__).resolve().with_name('report_template.html').read_text(encoding='utf-8')


def is_report(file):
    """Return whether a file begins as our reports do, up to the title."""
    beginning, title, _ = template().partition('<title>Report</title>')
    beginning = f'{beginning}{title}'.encode()
    with open(file, 'rb') as found:
        return found.read(len(beginning)) == beginning


# loading ------------------------------------------------------------------------

@dataclass
class Model:
    """A model to report on, with the data to evaluate it on."""
    name: str  # as the user has named it
    gpt: GPT
    tokenizer: Tokenizer
    settings: dict  # the settings of its training; {} for a pretrained model
    step: int  # steps of training; 0 for a pretrained model
    run: RunFolder
    data: Path  # the prepared folder
    train: Split
    val: Split


def load(name, torch_device):
    """Load a Model. Raises UserError if it is missing or damaged, or if the data does not fit it."""
    checkpoint, tokenizer = load_with_tokenizer(name if init_from else Path(name, FILES[ckpt]))
    gpt = load_model(checkpoint, torch_device).to(choose_dtype(dtype, torch_device))
    if torch_device.type == 'cpu':
        use_fast_cpu_kernels(gpt)
    settings = {key: value for key, value in checkpoint['settings'].items() if is_plain(value)}
    data = dataset or str(settings.get('dataset', ''))
    if not data:
        raise SettingError(f'{name} does not say what it was trained on: name prepared data with --dataset')
    folder = prepared_folder(data)
    train, val = Split(folder, 'train'), Split(folder, 'val')
    if load_tokenizer(folder).state() != checkpoint['tokenizer']:
        raise UserError(f'{data} was prepared with another tokenizer than that of {name}: prepare it with '
                        f'--tokenizer {shlex.quote(name)}')
    if not dataset and checkpoint.get('fingerprint', '') != fingerprint(train.meta):
        raise UserError(f'the data in {data} is not what {name} was trained on: prepare it as before, or '
                        'choose it with --dataset to evaluate on it anyway')
    run_folder = Path(name).parent if Path(name).is_file() else Path(name)
    return Model(name=name, gpt=gpt, tokenizer=tokenizer, settings=settings, step=checkpoint['iter'],
                 run=RunFolder(run_folder, resume=True), data=folder, train=train, val=val)


def is_plain(value):
    """Return whether a setting of a checkpoint, which may be foreign, can be shown on the page."""
    return isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


# measuring ----------------------------------------------------------------------

def prediction_figures(model):
    """Evaluate a model on the validation split; return Figures."""
    block_size = model.gpt.config.block_size
    device_of_model = model.gpt.device
    evaluator = Evaluator(partial(count_loss, model.gpt), block_size, batch_size=32, device=device_of_model)
    metrics = evaluate(evaluator, model.val, infill_rows=find_infill_rows(model.val, block_size),
                       max_rows=eval_iters * evaluator.batch_size)
    where = f'over {eval_iters} batches of the' if eval_iters else 'over the whole'
    where = f'{where} validation split'

    def figure(label, note, value):
        return Figure('prediction', label, f'{note}, {where}', value)

    figures = [
        figure('bits per byte', 'comparable between tokenizers', metrics['val_bpb']),
        figure('loss', 'nats per token', metrics['val_loss']),
        figure('perplexity', 'e to the loss', metrics['val_ppl']),
        figure('accuracy, %', 'tokens that were predicted', 100 * metrics['val_acc']),
    ]
    if 'val_infill_loss' in metrics:
        note = 'infilling, nats per token of the middle between two given ends'
        figures.append(figure('loss of middles', note, metrics['val_infill_loss']))
    return figures


def write(model, prompts, what):
    """Continue prompts, lists of token ids; return the new token ids of each. what: for the progress bar."""
    tokenizer = model.tokenizer
    prompts = [[tokenizer.delimiter, *prompt] for prompt in prompts]
    rows = generate_stories(
        model.gpt, prompts, tokenizer.delimiter, max_new_tokens, seed, name=f'{model.name}: {what}',
        temperature=temperature, top_p=top_p, suppress=(tokenizer.blank, tokenizer.middle))
    return list(rows)


def continue_first_words(model, texts):
    """Let the model continue the first words of texts. Return (the first words, the stories), two lists."""
    longest = model.gpt.config.block_size // 2
    prompts = [first_words(text, model.tokenizer, longest) for text in texts]
    rows = write(model, prompts, f'{len(prompts)} more for the page')
    starts = [model.tokenizer.decode(prompt) for prompt in prompts]
    stories = [model.tokenizer.decode([*prompt, *row]) for prompt, row in zip(prompts, rows, strict=True)]
    return starts, stories


def report_on(model):
    """Do all that needs the model. Return its Figures, and what the page shows of it, a dict for JSON."""
    tokenizer = model.tokenizer
    validation = list(read_stories(model.val, tokenizer))
    if not validation:
        raise UserError(f'{model.data} has no validation story')

    # as many real stories as stories of the model, none longer than these may become
    real_rows = sample_evenly(validation, tokenizer, num_samples, max_new_tokens)
    real_texts = [tokenizer.decode(row) for row in real_rows]
    n = len(real_rows)
    written_rows = write(model, [[]] * n, f'{n} stories')
    written_texts = [tokenizer.decode(row) for row in written_rows]

    starts, shown_texts = continue_first_words(model, real_texts[:_SHOWN])

    training = tqdm(read_stories(model.train, tokenizer), f'{model.name}: copies', unit=' stories',
                    leave=False, disable=None)
    matches = find_copies(real_texts + written_texts + shown_texts, training)
    real = Stories(real_rows, matches[:n])
    written = Stories(written_rows, matches[n:2 * n])
    shown = zip(matches[2 * n:], starts, strict=True)

    figures = prediction_figures(model)
    built_in = model.train.meta.get('source') == 'sample'
    figures += compare_stories(written, real, max_new_tokens, built_in)
    figures += ending_figures(model.gpt, tokenizer, validation[:num_samples])
    page = {
        'name': model.name,
        'facts': [*describe(model), ('stories for the figures', f'{n} written, {n} real')],
        'settings': model.settings,
        'curves': read_curves(model),
        'samples': read_samples(model),
        'stories': [story_for_page(match, start) for match, start in shown],
        'tokens': token_probabilities(model.gpt, tokenizer, [tokenizer.delimiter, *real_rows[0]]),
    }
    return figures, page


# facts and curves of a run ------------------------------------------------------

def tokens_per_step(model):
    """Return the number of tokens in a training step; 1 if the settings do not say."""
    product = 1
    for name in 'batch_size', 'gradient_accumulation_steps', 'block_size':
        value = model.settings.get(name, 1)
        if isinstance(value, int):
            product *= value
    return product


def describe(model):
    """Return facts about a model, a list of (label, text)."""
    config = model.gpt.config
    facts = [
        ('parameters', f'{model.gpt.n_params():,}'),
        ('shape', f'{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide'),
        ('context', f'{config.block_size:,} tokens'),
        ('tokenizer', f'{model.tokenizer.encoding}, {config.vocab_size:,} tokens'),
        ('data', model.data.name),
        ('to train on', describe_split(model.train, 'train')),
        ('to validate', describe_split(model.val, 'val')),
    ]
    if model.step > 0:
        n_tokens = model.step * tokens_per_step(model)
        facts.append(('trained', f'{model.step:,} steps, {n_tokens:,} tokens'))
    seconds = [record['seconds'] for record in model.run.records() if 'seconds' in record]
    if seconds:
        facts.append(('time', f'{tqdm.format_interval(seconds[-1])} of training'))
    hardware = read_run_facts(model.run.path).get('hardware')
    if hardware:
        facts.append(('hardware', hardware))
    return facts


def describe_split(split, name):
    text = f'{split.n_tokens:,} tokens'
    n_stories = split.meta['splits'][name].get('stories')
    if isinstance(n_stories, int):
        text = f'{n_stories:,} stories, {text}'
    return text


def read_curves(model):
    """Return {key: a list of [step, tokens, seconds or None, value], thinned} of a run's metrics.jsonl."""
    n_tokens = tokens_per_step(model)
    curves = {key: [] for key in _CURVES}
    for record in model.run.records():
        step = int(record['iter'])
        if step * n_tokens > _LARGEST_INT:  # a damaged line
            continue
        for key in _CURVES:
            if key in record:
                curves[key].append([step, step * n_tokens, record.get('seconds'), record[key]])
    return {key: thin_curve(points) for key, points in curves.items()}


def thin_curve(points):
    """Return a curve of at most _MOST_POINTS points. If there are more, those between the first and the last
    are means of neighbours, at the step in their middle.
    """
    if len(points) <= _MOST_POINTS:
        return points
    between = points[1:-1]
    n_neighbours = math.ceil(len(between) / (_MOST_POINTS - 2))
    thinned = [points[0]]
    for start in range(0, len(between), n_neighbours):
        neighbours = between[start:start + n_neighbours]
        mean = sum(value / len(neighbours) for *_, value in neighbours)  # of large values, too
        step, tokens, seconds, _ = neighbours[len(neighbours) // 2]
        thinned.append([step, tokens, seconds, mean])
    return [*thinned, points[-1]]


def read_samples(model):
    """Return [step, story] of each evaluation of a run; of at most _MOST_SAMPLES, evenly spread."""
    records = model.run.records('samples.jsonl')
    samples = [[record['iter'], record['story']] for record in records if 'story' in record]
    if len(samples) <= _MOST_SAMPLES:
        return samples
    last = len(samples) - 1
    return [samples[i * last // (_MOST_SAMPLES - 1)] for i in range(_MOST_SAMPLES)]


def story_for_page(match, start):
    """Return what the page shows of a story. start: its first words, which the model was given."""
    copy_start, copy_stop, n_words = match.longest
    return {'text': match.story, 'prompt': len(start), 'copied': [copy_start, copy_stop], 'words': n_words,
            'source': excerpt(match.source, match.story[copy_start:copy_stop])}


def excerpt(source, passage):
    """Return a training story; if it is long, only `passage` with 500 characters before and after it."""
    if len(source) < _LONG_SOURCE:
        return source
    words = [re.escape(word) for word in split_words(passage)]
    found = re.search(r'\W*'.join(words), source, re.IGNORECASE)
    if found is None:
        return source[:_LONG_SOURCE]
    start = max(0, found.start() - 500)
    return f'…{source[start:found.end() + 500]}…'


# the table ----------------------------------------------------------------------

def format_figure(value):
    """Return a figure as text, '' for nan."""
    if math.isnan(value):
        return ''
    if value >= 1000:
        return f'{value:,.0f}'
    return f'{value:.4g}'


def merge_figures(figures_of_models):
    """Merge the Figures of all models. Return the rows of the table, a list of dicts with the keys
    group, label, note, cells (a text for each model) and real (the text for real stories)."""
    tables = []
    keys = {}  # a dict keeps their order
    for figures in figures_of_models:
        table = {(figure.group, figure.label): figure for figure in figures}
        tables.append(table)
        keys |= dict.fromkeys(table)
    rows = []
    for group, label in keys:
        missing = Figure(group, label, note='', value=math.nan)
        figures = [table.get((group, label), missing) for table in tables]
        cells = [format_figure(figure.value) for figure in figures]
        real = [format_figure(figure.real) for figure in figures]
        if len(set(real) - {''}) > 1:  # the models were given different real stories
            cells = [f'{cell} (real: {real_cell})' for cell, real_cell in zip(cells, real, strict=True)]
            real = ['']
        note = max(figure.note for figure in figures)  # not the '' of a model without this figure
        rows.append({'group': group, 'label': label, 'note': note, 'cells': cells, 'real': max(real)})
    return rows


def print_table(names, rows):
    """Print the table in columns."""
    lines = [['', *names, 'real stories']]
    for row in rows:
        lines.append([row['label'], *row['cells'], row['real']])
    columns = list(zip(*lines, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        print('   '.join(cells))


def make_html(names, rows, runs):
    """Return the page. runs: for each model, the dict that `report_on` returns."""
    groups = {}
    for row in rows:
        groups.setdefault(row['group'], []).append(row)
    data = {
        'title': ', '.join(names),
        'made': time.strftime('%Y-%m-%d %H:%M'),
        'table': [{'group': group, 'rows': rows} for group, rows in groups.items()],
        'runs': runs,
    }
    text = json.dumps(data, allow_nan=False)  # JavaScript does not read NaN and Infinity
    text = text.replace('<', '\\u003c')  # no text of a story can end the script element
    return template().replace('__DATA__', text)


def main():
    check_settings()
    names = list_names()
    target = page_path(names)
    torch_device = choose_device(device)
    configure_memory(torch_device)
    models = [load(name, torch_device) for name in names]  # all, before anything takes long

    figures_of_models = []
    runs = []
    for model in models:
        figures, shown = report_on(model)
        figures_of_models.append(figures)
        runs.append(shown)
    rows = merge_figures(figures_of_models)

    print_table(names, rows)
    write_bytes_atomically(target, make_html(names, rows, runs).encode(), '--path')
    print(f'look at {target}')


def suggest_less_memory():
    return 'write fewer stories (--num_samples), or use --dtype bfloat16'


if __name__ == '__main__':
    configure(globals())
    run(main, suggest_less_memory)
