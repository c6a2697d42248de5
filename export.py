"""Export a trained model and its tokenizer to another program, and verify the result.

    python export.py --out_dir out-quickstart --format llama2c --path for-llama2c
    python export.py --out_dir out-quickstart --format gguf --dtype q8_0 --path stories.gguf
    python export.py --out_dir out-quickstart --format html --path story.html     a page that writes stories

The export is written to a temporary place and read back, by an independent program if there is one. It is
moved to --path if that program predicts the same as our model, or, with a message, if it is not installed.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this repository comes before PYTHONPATH

import numpy as np
import torch

from configurator import SettingError, UserError, configure, one_of, run
from core.checkpoint import FILES, load_model
from core.evaluate import Evaluator, count_loss, evaluate
from core.generate import generate
from core.native import round_weights
from data.files import lock_folder, report_write_errors, unfinished_name
from data.shards import Split, fingerprint, prepared_folder
from formats.base import read_json_object
from formats.gguf import GGUF
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.page.page import HTML
from formats.plain import Safetensors
from formats.pretrained import load_with_tokenizer

out_dir = 'out-tiny-stories'  # folder of the run
ckpt = 'best'  # best (lowest validation loss) or last
format = ''  # required: llama2c, llama2c-int8, hf, gguf, html or safetensors
path = ''  # required: where to write: a file for gguf and html, else a new or empty folder
dtype = ''  # of the weights: f32, f16 or q8_0 in gguf, f32, f16 or bf16 in hf and safetensors; '': f32
overwrite = False  # replace a model at path that is not an earlier export

_RECORD = 'export.json'  # in the folder of an export: what wrote it, and the hash of each of its files
_GREEDY_TOKENS = 64  # length of the story whose tokens are compared
_PROBABILITIES = 2**20  # number of probabilities that are compared: llama.cpp takes seven seconds for them
_LOSS_TOKENS = 2**15  # validation tokens for the loss that the page shows
_ODD_TEXT = '  "Two  spaces," said Tom.\n\n\tIt\'s 3 o\'clock: \u00e9, \u4f60, \U0001f600!'


# checks -----------------------------------------------------------------------

def check_settings(formats):
    """Check the settings. Raises SettingError."""
    one_of(formats, format=format)
    one_of(FILES, ckpt=ckpt)
    chosen = formats[format]
    if dtype and dtype not in chosen.dtypes:
        raise SettingError(f"dtype is {dtype!r}, but --format {format} writes {' or '.join(chosen.dtypes)}")
    if not path:
        kind = 'a new folder' if chosen.files else 'a file'
        raise SettingError(f'path is empty: type --path and {kind} to write')


def resolve_path():
    """Return the absolute path to write to; a link to it is followed, and stays."""
    target = Path(path).absolute()
    if target.is_symlink() and not target.exists():
        raise SettingError(f'path {path} is a link to {os.readlink(path)}, which does not exist: '
                           'name another --path')
    if target.exists() or target.name == '..':
        return target.resolve()
    return target


def check_target(chosen, target):
    """Raise SettingError unless `target` is new, or an export in the same format, or may be overwritten."""
    if not target.exists():
        return
    if chosen.files:
        check_folder(chosen.files, target)
    elif target.is_dir():
        raise SettingError(f'path {path} is a folder, but --format {format} writes a file')
    elif not target.is_file():
        raise SettingError(f'path {path} is not a regular file: name another --path')
    problem = why_foreign(chosen, target)
    if problem and not overwrite:
        raise SettingError(f'{problem}: name another --path, or replace it (--overwrite)')


def check_folder(files, target):
    """Raise SettingError if `target` is not a folder, or holds anything but files of these names."""
    if not target.is_dir():
        raise SettingError(f'path {path} is a file, but --format {format} writes a folder')
    for name in names_in(target):
        if name not in (*files, _RECORD) or not (target / name).is_file():
            # another program could take it for a part of the model
            raise SettingError(f'path {path} holds other files ({name} ...): name a new folder')


def names_in(folder):
    """Return the sorted names in a folder without that of an unfinished export."""
    return sorted(set(os.listdir(folder)) - {unfinished_name(folder)})


def why_foreign(chosen, target):
    """Return in words why `target` is not what an export in this format wrote, '' if it is."""
    unmarked = (f'path {path} does not carry the mark of export.py --format {format} (exports made before '
                'December 2026 do not either)')
    if not chosen.files:
        return '' if chosen.recognizes(target) else unmarked
    names = names_in(target)
    if not names:
        return ''
    hashes = read_record(target)
    if hashes is None:
        return unmarked
    for name in names:
        if name != _RECORD and hashes.get(name) != file_hash(target / name):
            return f'path {path} holds a {name} that is not the one that export.py wrote'
    return ''


def check_model(formats, config, tokenizer):
    """Raise SettingError if the chosen format cannot hold this model."""
    found = formats[format].incompatibilities(config, tokenizer)
    if not found:
        return
    reasons = '; '.join(reason for reason, _ in found)
    ways_out = ', '.join(way_out for _, way_out in found)
    others = [name for name, other in formats.items() if not other.incompatibilities(config, tokenizer)]
    raise SettingError(f'--format {format} cannot hold this model ({reasons}): {ways_out}, or export this '
                       f"one with --format {' or '.join(others)}")


# writing ----------------------------------------------------------------------

@contextlib.contextmanager
def staging(target):
    """Yield a path to write to, on the same disk as `target`: in the folder that is there, else next to it.

    What is left there is removed, now or by the next export.
    """
    place = target if target.is_dir() else target.parent
    stage = place / unfinished_name(target)
    if stage.is_symlink():
        raise UserError(f'{stage} is a link to another folder: remove it')
    with report_write_errors(target, '--path'):
        stage.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(stage, f'it, too, exports to {target}')
    try:
        with lock:
            remove_all_but_the_lock(stage)  # a process that was killed may have left something
            try:
                yield stage / 'export'
            finally:
                remove_all_but_the_lock(stage)
    finally:
        with contextlib.suppress(OSError):  # another export to the same place may have begun
            (stage / '.lock').unlink(missing_ok=True)  # only now, as Windows removes no open file
            stage.rmdir()


def remove_all_but_the_lock(folder):
    for path in folder.glob('[!.]*'):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_export(chosen, staged, checkpoint, tokenizer):
    """Write the model to `staged` in the chosen format, into a folder also the record of its files."""
    if chosen.files:
        staged.mkdir()
    if isinstance(chosen, HTML):
        loss = loss_in_8_bits(checkpoint)
        print(f'validation loss: {loss}')
        chosen.write(staged, checkpoint, tokenizer, validation_loss=loss)
    else:
        chosen.write(staged, checkpoint, tokenizer)
    if chosen.files:
        write_record(staged)


def write_record(folder):
    """Write _RECORD, by which the next export knows that the files in a folder are ours, and unchanged."""
    hashes = {file.name: file_hash(file) for file in sorted(folder.iterdir())}
    record = {'written_by': f'export.py --format {format}', 'sha256': hashes}
    (folder / _RECORD).write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


def read_record(folder):
    """Return {name: hash} of the files that an export in this format wrote; None if no record says so."""
    try:
        record = read_json_object(folder / _RECORD)
    except UserError:  # it is missing, or damaged
        return None
    hashes = record.get('sha256')
    if record.get('written_by') != f'export.py --format {format}' or not isinstance(hashes, dict):
        return None
    return hashes


def file_hash(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def loss_in_8_bits(checkpoint):
    """Return in words the validation loss of a model, before and after its weights are rounded to 8 bits."""
    folder = prepared_folder(checkpoint['settings'].get('dataset', 'none'))
    if not (folder / 'meta.json').is_file():
        return "not measured, as the model's data is not here"
    val_split = Split(folder, 'val')
    if fingerprint(val_split.meta) != checkpoint.get('fingerprint'):
        return f'not measured, as {folder.name} is not the data that the model was trained on'
    model = load_model(checkpoint)
    exact = validation_loss(model, val_split)
    rounded = validation_loss(round_weights(model), val_split)
    return f'{exact:.4f} nats per token, in 8 bits {rounded:.4f} ({rounded - exact:+.4f})'


def validation_loss(model, val_split):
    """Return the mean loss in nats per token over the first _LOSS_TOKENS tokens."""
    block_size = model.config.block_size
    evaluator = Evaluator(partial(count_loss, model), block_size, batch_size=8)
    return evaluate(evaluator, val_split, max_rows=math.ceil(_LOSS_TOKENS / block_size))['val_loss']


def put_in_place(staged, target):
    """Move the export to `target`. A folder that is there stays: it may be a mount point, or in use.

    A process that is killed here leaves only files that the record there lists: the next export replaces
    them.
    """
    if not target.is_dir():
        os.replace(staged, target)
        return
    for name in names_in(target):
        if name != _RECORD:
            (target / name).unlink()
    os.replace(staged / _RECORD, target / _RECORD)
    for name in os.listdir(staged):
        os.replace(staged / name, target / name)


# comparing --------------------------------------------------------------------

def check_export(chosen, staged, model, tokenizer):
    """Read an export back and compare it with our model. Raises UserError if it differs.

    If the program that reads it is not installed, print that instead.
    """
    try:
        chosen.read(staged)
    except ModuleNotFoundError as error:
        print(f'not checked: reading back by {chosen.reader} needs pip install {error.name}')
        return
    try:
        compare(model, tokenizer, chosen)
    finally:
        chosen.close()


@torch.inference_mode()
def compare(model, tokenizer, program):
    """Compare a program that has read an export with our model. Raises UserError if they differ.

    program: a Format after `read`.
    """
    story = write_greedily(model, tokenizer)
    compare_predictions(model, program, story)
    compare_tokens(tokenizer, program, _ODD_TEXT)
    compare_tokens(tokenizer, program, tokenizer.decode(story))


def write_greedily(model, tokenizer):
    """Return the ids of a story that our model writes without sampling; the first is the delimiter."""
    n_tokens = min(_GREEDY_TOKENS, max(model.config.block_size - 1, 1))
    prompt = torch.tensor([[tokenizer.delimiter]])
    tokens = list(generate(model, prompt, n_tokens, temperature=0))
    return [tokenizer.delimiter, *torch.cat(tokens).tolist()]


def compare_predictions(model, program, story):
    """Print how far a program's predictions are from our model's. Raises UserError if they are too far.

    The measure is the largest Kullback-Leibler divergence sum(p log(p / q)) of its next-token distribution q
    from our p. The largest, not the mean, as one wrong row of the embedding shows only after its own token.

    The limit of a format is at least three times what rounding cost the models of config/quickstart.py: 2e-11
    nats in float32, 2e-5 in float16, 0.015 in 8 bits. Two swapped layers cost them 5 nats, two swapped rows
    of the embedding 20. tests/scripts/test_export.py makes smaller mistakes, all ten times the largest limit.
    """
    prompt, greedy = story[:-1], torch.tensor(story[1:])
    kl, choices = kl_divergences(model, program, prompt, range(len(prompt)))
    divergences = [kl]
    for ids, positions in random_contexts(model.config):
        kl, _ = kl_divergences(model, program, ids, positions)
        divergences.append(kl)
    largest = torch.cat(divergences).max().clamp(min=0).item()
    # as long as all before are the same, the program's choice after our tokens is its own greedy token
    n_same = int((choices == greedy).long().cumprod(0).sum())
    print(f'read back by {program.reader}: KL divergence {largest:.1e} nats per token (at most '
          f'{program.max_kl:g}); {n_same} of {len(greedy)} greedy tokens are the same')
    if math.isnan(largest) or largest > program.max_kl:
        raise UserError(f'a KL divergence of {largest:.2g} nats, more than {program.max_kl:g}: '
                        'nothing was kept')


def kl_divergences(model, program, ids, positions):
    """Compare the predictions after ids[:position + 1] for each of the positions.

    Returns the KL divergences in nats and the program's most likely tokens, each of shape (len(positions),).
    """
    positions = list(positions)
    log_p = model(torch.tensor([ids]))[0, positions].double().log_softmax(-1)
    log_q = program.logits(ids, positions).double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1), log_q.argmax(-1)


def random_contexts(config):
    """Return full contexts that together have every id, or as many as is affordable: [(ids, positions)].

    positions are those whose predictions are to be compared, at most _PROBABILITIES numbers in all.
    """
    length = max(config.block_size - 1, 1)  # the longest prompt that llama.cpp takes
    affordable = max(_PROBABILITIES // config.vocab_size, 1)  # positions
    for_every_id = math.ceil(config.vocab_size / length)
    n_contexts = min(for_every_id, max(affordable // length, 1))
    shuffled_ids = np.random.default_rng(0).permutation(config.vocab_size)
    contexts = np.resize(shuffled_ids, (n_contexts, length)).tolist()
    stride = math.ceil(length / affordable)
    positions = range((length - 1) % stride, length, stride)  # up to the last one
    return [(ids, positions) for ids in contexts]


def compare_tokens(tokenizer, program, text):
    """Raise UserError if the program encodes or decodes a text in another way than we do."""
    text = tokenizer.decode(tokenizer.encode(text))  # without what a lossy tokenizer cannot spell
    ids = [tokenizer.delimiter, *tokenizer.encode(text)]
    if program.encode(text) != ids or program.decode(ids) != text:
        raise UserError(f'{program.reader} reads {text!r} as other tokens than we do: nothing was kept')


def main():
    formats = {
        'llama2c': Llama2c(),
        'llama2c-int8': Llama2c(int8=True),
        'hf': HuggingFace(),
        'gguf': GGUF(),
        'html': HTML(),
        'safetensors': Safetensors(),
    }
    check_settings(formats)
    chosen = formats[format]
    if dtype:
        chosen.dtype = dtype
    target = resolve_path()
    with report_write_errors(target, '--path'):
        check_target(chosen, target)

    # load the model
    checkpoint, tokenizer = load_with_tokenizer(Path(out_dir, FILES[ckpt]))
    model = load_model(checkpoint)
    check_model(formats, model.config, tokenizer)

    with staging(target) as staged:
        with report_write_errors(target, '--path'):
            write_export(chosen, staged, checkpoint, tokenizer)

        check_export(chosen, staged, model, tokenizer)
        with report_write_errors(target, '--path'):
            check_target(chosen, target)  # once more: it may have changed since
            put_in_place(staged, target)
    print(f'wrote {path}')


if __name__ == '__main__':
    configure(globals())
    run(main)
