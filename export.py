"""Export a trained model and its tokenizer to another program, and verify the result.

    python export.py --out_dir out-quickstart --format llama2c --path for-llama2c
    python export.py --out_dir out-quickstart --format gguf --dtype q8_0 --path stories.gguf
    python export.py --out_dir out-quickstart --format html --path story.html     a page that writes stories

The export is written to a temporary place and read back, by an independent program if there is one. It is
moved to --path if that program predicts the same as our model, or, with a message, if it is not installed.
"""

import contextlib
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
from data.files import lock_folder, report_write_errors
from data.shards import Split, fingerprint, prepared_folder
from formats.gguf import GGUF
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.page.page import HTML, round_weights
from formats.plain import Safetensors
from formats.pretrained import load_with_tokenizer

out_dir = 'out-tiny-stories'  # folder of the run
ckpt = 'best'  # best (lowest validation loss) or last
format = ''  # required: llama2c, llama2c-int8, hf, gguf, html or safetensors
path = ''  # required: where to write: a file for gguf and html, else a new folder
dtype = ''  # of the weights: f32, f16 or q8_0 in gguf, f32, f16 or bf16 in hf and safetensors; '': f32
overwrite = False  # replace a model at path that is not an earlier export

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
    check_target(chosen)


def check_target(chosen):
    """Raise SettingError unless `path` is new, or an export in the same format, or may be overwritten."""
    target = Path(path)
    if target.is_symlink() and not target.exists():
        raise SettingError(f'path {path} is a link to {os.readlink(path)}, which does not exist: '
                           'name another --path')
    if not target.exists():
        return
    if chosen.files:
        check_folder(chosen.files)
    elif target.is_dir():
        raise SettingError(f'path {path} is a folder, but --format {format} writes a file')
    is_empty = target.is_dir() and not os.listdir(target)
    if not is_empty and not overwrite and not chosen.recognizes(target):
        raise SettingError(f'path {path} holds something that export.py --format {format} did not write: '
                           'name another --path, or replace it (--overwrite)')


def check_folder(files):
    """Raise SettingError if `path` is not a folder, or holds other files than these."""
    if not os.path.isdir(path):
        raise SettingError(f'path {path} is a file, but --format {format} writes a folder')
    others = sorted(set(os.listdir(path)) - set(files))
    if others:  # another program could take them for parts of the model
        raise SettingError(f'path {path} holds other files ({others[0]} ...): name a new folder')


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
    """Yield a path next to `target` to write to. What is left there is removed, now or by the next export."""
    stage = target.with_name(f'.{target.name}.unfinished')
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
    """Write the model to `staged` in the chosen format."""
    if chosen.files:
        staged.mkdir()
    if isinstance(chosen, HTML):
        loss = loss_in_8_bits(checkpoint)
        print(f'validation loss: {loss}')
        chosen.write(staged, checkpoint, tokenizer, validation_loss=loss)
    else:
        chosen.write(staged, checkpoint, tokenizer)


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
    """Move the export to `target`, which may hold an earlier one."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(staged, target)


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

    # load the model
    checkpoint, tokenizer = load_with_tokenizer(Path(out_dir, FILES[ckpt]))
    model = load_model(checkpoint)
    check_model(formats, model.config, tokenizer)

    target = Path(path).absolute()
    if target.is_symlink():
        target = target.resolve()  # the link stays
    with staging(target) as staged:
        with report_write_errors(target, '--path'):
            write_export(chosen, staged, checkpoint, tokenizer)

        check_export(chosen, staged, model, tokenizer)
        check_target(chosen)  # once more: it may have changed since
        with report_write_errors(target, '--path'):
            put_in_place(staged, target)
    print(f'wrote {path}')


if __name__ == '__main__':
    configure(globals())
    run(main)
