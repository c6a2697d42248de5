"""Take a trained model to another program, its tokenizer included, and prove that it arrived.

    python export.py --out_dir out-quickstart --format llama2c --path for-llama2c
    python export.py --out_dir out-quickstart --format gguf --dtype q8_0 --path stories.gguf

After writing, an independent reader computes logits and 64 greedy tokens from what was written.
"""

import copy
import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from checkpoint import load_checkpoint, load_model
from configurator import SettingError, UserError, configure, run
from data.shards import Split, fingerprint
from data.tokenizer import tokenizer_from_state
from evaluate import evaluate
from formats.bare import Bare
from formats.gguf import GGUF
from formats.hf import HuggingFace
from formats.llama2c import Llama2c

out_dir = 'out-tiny-stories'  # folder of the checkpoint
ckpt = 'best'  # best (lowest validation loss) or last
format = ''  # llama2c, llama2c-int8, hf, gguf or torch
path = ''  # where to: a new folder; for gguf a file
dtype = 'f32'  # of gguf's matrices: f32, f16 or q8_0
group_size = 0  # of llama2c-int8: weights that share a scale; 0: the largest of 64, 32 ... that fits
eval_iters = 20  # batches of 32 for the change in validation loss of a lossy format; 0: the whole split

_TOLERANCE = 1e-4  # of a float32 format's logits
_GREEDY = 64  # tokens
_PROBE = '  "Two  spaces," said Tom.\n\n\tIt\'s 3 o\'clock: \u00e9, \u4f60, \U0001f600!'


def make_formats():
    """Every format by its name."""
    return {'llama2c': Llama2c(), 'llama2c-int8': Llama2c(int8=True, group_size=group_size),
            'hf': HuggingFace(), 'gguf': GGUF(dtype), 'torch': Bare()}


def check_settings(formats):
    """Refuse what no export can mean. Raises SettingError."""
    if format not in formats:
        raise SettingError(f"format is {format!r}; type --format and one of {', '.join(formats)}")
    if ckpt not in ('best', 'last'):
        raise SettingError(f'ckpt is {ckpt!r}, not best or last')
    if dtype not in ('f32', 'f16', 'q8_0'):
        raise SettingError(f'dtype is {dtype!r}, not f32, f16 or q8_0')
    for name in 'group_size', 'eval_iters':
        if globals()[name] < 0:
            raise SettingError(f'{name} is {globals()[name]}; it must be 0 or more')
    files, target = formats[format].files, Path(path)
    if not path:
        raise SettingError(f"path is empty: type --path and a {'folder' if files else 'file'} to write")
    if target.exists() and target.is_dir() != bool(files):
        raise SettingError(f"path {path} is a {'file' if files else 'folder'}; --format {format} writes a "
                           f"{'folder' if files else 'file'}")
    others = sorted(set(os.listdir(target)) - set(files)) if target.is_dir() else []
    if others:  # what else lies there could be taken for a part of the model
        raise SettingError(f'path {path} holds other files ({others[0]} ...): name a new folder')


def check_model(formats, config, tokenizer):
    """Refuse a model that the format cannot hold, with the reason and a way out. Raises SettingError."""
    obstacles = formats[format].obstacles(config, tokenizer)
    if obstacles:
        reasons, ways = zip(*obstacles, strict=True)
        others = [name for name, other in formats.items() if not other.obstacles(config, tokenizer)]
        raise SettingError(f"{format} cannot hold this model ({'; '.join(reasons)}): {', '.join(ways)}, or "
                           f"take this one to --format {' or '.join(others)}")


def missing(packages):
    """Those of `packages` that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def rounded(model, fmt):
    """A copy of `model` that computes as the lossy `fmt` does: matrices rounded, and what they multiply."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and name != 'position.weight':
                p.copy_(fmt.round_weight(p))
    for block in model.blocks if fmt.half_gelu and model.config.mlp == 'gelu' else ():
        block.mlp.up.register_forward_hook(lambda _, inputs, output: output.half().float())
        block.mlp.proj.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(),))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (fmt.round_input(inputs[0]),))
    return model


@torch.inference_mode()
def compare(model, tokenizer, fmt, reader):
    """Print how far the reader's logits and greedy tokens are from ours. Raises UserError if it is too far.

    They are compared along our greedy story and at eight places of a context full of random tokens. A float32
    format may be 1e-4 off. A lossy one is compared with our model rounded likewise. A sum added up in another
    order rounds some numbers the other way, so the two may differ, but the one is about as far from our exact
    logits as the other: at most twice that far is allowed, and 1e-4. A wrong tensor is far beyond.
    """
    length = max(model.config.block_size - 1, 1)  # the longest prompt that llama.cpp takes
    prompt = torch.tensor([[tokenizer.delimiter]])
    greedy = torch.cat(list(model.generate(prompt, min(_GREEDY, length), temperature=0))).tolist()
    random = np.random.default_rng(0).integers(0, model.config.vocab_size, length).tolist()
    runs = [([tokenizer.delimiter, *greedy[:-1]], list(range(len(greedy)))),
            (random, sorted(set(np.linspace(0, length - 1, 8).astype(int).tolist())))]
    likewise = rounded(model, fmt) if fmt.round_weight else model
    offs, moves, choices = [], [], []
    for ids, positions in runs:
        ours, expected = (m(torch.tensor([ids]))[0, positions] for m in (model, likewise))
        theirs = torch.from_numpy(reader.logits(ids, positions))
        if fmt.log_probs:
            ours, expected = ours.log_softmax(-1), expected.log_softmax(-1)
        if theirs.shape != ours.shape:
            raise UserError(f'{fmt.reader} has {theirs.size(1)} tokens, not {ours.size(1)}: nothing was kept')
        offs.append((theirs - expected).abs().max())
        moves.append((ours - expected).abs().max())
        choices.append(theirs.argmax(-1))
    off, moved = float(max(offs)), float(max(moves))
    # While all before are the same, the choice after our tokens is the reader's own greedy token.
    same = int((torch.tensor(greedy) == choices[0]).long().cumprod(0).sum())
    allowed = _TOLERANCE + 2 * moved
    likeness = f'ours rounded likewise, which are themselves {moved:.1e} off' if fmt.round_weight else 'ours'
    print(f'read back by {fmt.reader}: logits within {off:.1e} (at most {allowed:.1e}) of {likeness}; '
          f'{same} of {len(greedy)} greedy tokens the same')
    if not off <= allowed:  # also if it is not a number
        raise UserError(f'the logits are {off:.2g} off, more than {allowed:.2g}: nothing was kept')
    for text in _PROBE, tokenizer.decode(greedy):
        ids = [tokenizer.delimiter, *tokenizer.encode(text)]
        if reader.encode(text) != ids or reader.decode(ids) != text:
            raise UserError(f'{fmt.reader} reads {text!r} as other tokens than we do: nothing was kept')


def measure_loss(checkpoint, model, fmt):
    """Print what a lossy format costs in validation loss, where the data of the training lies as it did."""
    try:
        dataset = checkpoint['settings'].get('dataset', '')
        folder = Path(dataset) if Path(dataset).is_dir() else Path(__file__).parent / 'data' / dataset
        split = Split(folder, 'val')
        if fingerprint(split.meta) != checkpoint.get('fingerprint'):
            raise UserError(f'{folder} is not what the model was trained on')
        before, after = (evaluate(m, split, model.config.block_size, 32, eval_iters)['val_loss']
                         for m in (model, rounded(model, fmt)))
        print(f'validation loss {before:.4f} -> {after:.4f} ({after - before:+.4f})')
    except UserError as error:
        print(f'change in validation loss not measured: {error}')


def install(stage, target, files):
    """Put what was written in the folder `stage` to `target`, in place of an earlier export."""
    if not files:
        os.replace(stage / target.name, target)
        return
    target.mkdir(exist_ok=True)
    for name in files:
        if (stage / name).exists():
            os.replace(stage / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)


def main():
    formats = make_formats()
    check_settings(formats)
    fmt, target = formats[format], Path(path)
    checkpoint = load_checkpoint(Path(out_dir) / {'best': 'best.pt', 'last': 'ckpt.pt'}[ckpt])
    tokenizer = tokenizer_from_state(checkpoint['tokenizer'])
    model = load_model(checkpoint)
    check_model(formats, model.config, tokenizer)
    if missing(fmt.needs):
        raise UserError(f"--format {format} needs a package: pip install {' '.join(fmt.needs)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}-') as stage:
        place = Path(stage) if fmt.files else Path(stage, target.name)
        fmt.write(place, checkpoint, tokenizer)
        if missing(fmt.check_needs):
            print(f"not checked: reading back by {fmt.reader} needs pip install {' '.join(fmt.check_needs)}")
        else:
            compare(model, tokenizer, fmt, fmt.read(place))
        install(Path(stage), target, fmt.files)
    if fmt.round_weight:
        measure_loss(checkpoint, model, fmt)
    print(f'wrote {target}')


if __name__ == '__main__':
    configure(globals())
    run(main)
