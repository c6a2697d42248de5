"""Take a trained model to another program, its tokenizer included, and prove that it arrived.

    python export.py --out_dir out-quickstart --format llama2c --path for-llama2c
    python export.py --out_dir out-quickstart --format gguf --dtype q8_0 --path stories.gguf
    python export.py --out_dir out-quickstart --format html --path story.html     a page that writes stories

What was written is read back, by an independent program where there is one, before it is put in its place.
"""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from configurator import SettingError, UserError, configure, one_of, run
from core.checkpoint import FILES, load_model
from core.generate import generate
from data.files import lock_folder, report_write_errors
from formats.gguf import GGUF
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.page.page import HTML
from formats.plain import Safetensors
from formats.pretrained import load_with_tokenizer

out_dir = 'out-tiny-stories'  # folder of the checkpoint
ckpt = 'best'  # best (lowest validation loss) or last
format = ''  # llama2c, llama2c-int8, hf, gguf, html or safetensors
path = ''  # where to: a new folder; for gguf and html a file
dtype = 'f32'  # of gguf's matrices: f32, f16 or q8_0

_GREEDY = 64  # tokens of the story that is compared
_NUMBERS = 2**20  # probabilities that are compared besides: seven seconds of llama.cpp
_PROBE = '  "Two  spaces," said Tom.\n\n\tIt\'s 3 o\'clock: \u00e9, \u4f60, \U0001f600!'


def check_settings(formats):
    """Refuse what no export can mean. Raises SettingError."""
    one_of(formats, format=format)
    one_of(FILES, ckpt=ckpt)
    one_of(('f32', 'f16', 'q8_0'), dtype=dtype)
    files, there = formats[format].files, os.path.isdir(path)
    kind = 'folder' if files else 'file'
    if not path:
        raise SettingError(f'path is empty: type --path and a {kind} to write')
    if os.path.exists(path) and there != bool(files):
        raise SettingError(f'path {path} is no {kind}, and --format {format} writes a {kind}')
    if os.path.isfile(path) and not formats[format].is_one(path):
        raise SettingError(f'path {path} is another file than an export: name a new one')
    if there and (others := set(os.listdir(path)) - set(files)):  # could be taken for parts of the model
        raise SettingError(f'path {path} holds other files ({min(others)} ...): name a new folder')


@contextlib.contextmanager
def staging(target):
    """Yield the path to write what is to become `target`. It is removed afterwards, or by the next export."""
    stage = target.with_name(f'.{target.name}.unfinished')
    if stage.is_symlink():
        raise UserError(f'{stage} is a link to another folder: remove it')
    stage.mkdir(parents=True, exist_ok=True)
    with lock_folder(stage, f'it exports to {target}, too'):
        try:
            for left in stage.glob('[!.]*'):  # by a process that was killed
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            yield stage / 'export'
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def random_contexts(config):
    """Full contexts that between them have every id, or as many as is affordable: [(ids, positions)]."""
    length = max(config.block_size - 1, 1)  # the longest prompt that llama.cpp takes
    affordable = max(_NUMBERS // config.vocab_size, 1)  # positions
    count = min(-(-config.vocab_size // length), max(affordable // length, 1))
    ids = np.resize(np.random.default_rng(0).permutation(config.vocab_size), (count, length))
    step = -(-length // affordable)
    return [(row, list(range((length - 1) % step, length, step))) for row in ids.tolist()]


@torch.inference_mode()
def compare(model, tokenizer, program):
    """Print how far a program's predictions and greedy tokens are from ours. Raises UserError if too far.

    The measure is the Kullback-Leibler divergence sum(p log(p / q)) of its next-token distribution q from our
    p where it is largest, as one wrong row of the embedding shows after its own token alone. A format's bound
    is three times and more what its rounding cost the models of config/quickstart.py: 2e-11 nats in float32,
    2e-5 in float16, 0.015 in 8 bits. Two layers that change places cost them 5 nats, two rows of the
    embedding 20; tests/test_export.py has smaller mistakes, each at ten times the bound.
    """
    n = min(_GREEDY, max(model.config.block_size - 1, 1))
    prompt = torch.tensor([[tokenizer.delimiter]])
    greedy = torch.cat(list(generate(model, prompt, n, temperature=0)))
    story = [tokenizer.delimiter, *greedy.tolist()]
    worst, choices = [], []
    for ids, positions in (story[:-1], list(range(n))), *random_contexts(model.config):
        ours, theirs = model(torch.tensor([ids]))[0, positions], program.logits(ids, positions)
        log_p, log_q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
        worst.append((log_p.exp() * (log_p - log_q)).sum(-1).max())
        choices.append(log_q.argmax(-1))
    kl = torch.stack(worst).max().clamp(min=0).item()
    # while all before are the same, the choice after our tokens is the program's own greedy token
    same = int((greedy == choices[0]).long().cumprod(0).sum())
    print(f'read back by {program.reader}: KL divergence {kl:.1e} nats a token (at most {program.bound:g}); '
          f'{same} of {n} greedy tokens the same')
    if not kl <= program.bound:  # also if it is not a number
        raise UserError(f'a KL divergence of {kl:.2g} nats, more than {program.bound:g}: nothing was kept')
    for text in _PROBE, tokenizer.decode(story):
        text = tokenizer.decode(tokenizer.encode(text))  # of a lossy one, what it can say
        ids = [tokenizer.delimiter, *tokenizer.encode(text)]
        if program.encode(text) != ids or program.decode(ids) != text:
            raise UserError(f'{program.reader} reads {text!r} as other tokens than we do: nothing was kept')


def main():
    formats = {'llama2c': Llama2c(), 'llama2c-int8': Llama2c(int8=True), 'hf': HuggingFace(),
               'gguf': GGUF(dtype), 'html': HTML(), 'safetensors': Safetensors()}
    check_settings(formats)
    chosen, target = formats[format], Path(path)
    checkpoint, tokenizer = load_with_tokenizer(Path(out_dir, FILES[ckpt]))
    model = load_model(checkpoint)
    if mismatches := chosen.mismatches(model.config, tokenizer):
        reasons, ways_out = zip(*mismatches, strict=True)
        others = [name for name, other in formats.items() if not other.mismatches(model.config, tokenizer)]
        raise SettingError(f"{format} cannot hold this model ({'; '.join(reasons)}): {', '.join(ways_out)}, "
                           f"or take this one to --format {' or '.join(others)}")
    with staging(target) as staged:
        with report_write_errors(target, '--path'):
            if chosen.files:
                staged.mkdir()
            chosen.write(staged, checkpoint, tokenizer)
        try:
            chosen.read(staged)
        except ModuleNotFoundError as error:
            print(f'not checked: reading back by {chosen.reader} needs pip install {error.name}')
        else:
            compare(model, tokenizer, chosen)
        if target.is_dir():  # an earlier export
            shutil.rmtree(target)
        os.replace(staged, target)
    print(f'wrote {target}')


if __name__ == '__main__':
    configure(globals())
    run(main)
