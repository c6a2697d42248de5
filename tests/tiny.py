"""What tests of whole runs share: a prepared folder, and settings for runs of a second."""

import json

from data.shards import ShardWriter
from data.tokenizer import CharTokenizer

STORIES = [f'Once there was a dog number {i}. It ran to the tree. The dog was happy.' for i in range(300)]
# An epoch of these is 37 steps of 8 sequences.
SETTINGS = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64', '--batch_size=4',
            '--gradient_accumulation_steps=2', '--log_interval=1', '--device=cpu', '--dtype=float32']


def prepare(folder):
    """What prepare.py writes of STORIES, without its processes; returns `folder`."""
    folder.mkdir()
    tokenizer = CharTokenizer.train(STORIES)
    tokenizer.save(folder)
    splits = {}
    for split, texts in ('train', STORIES[:270]), ('val', STORIES[270:]):
        writer = ShardWriter(folder, split)
        ids, _ = tokenizer.encode_pieces([(text, True) for text in texts])
        writer.write(ids)
        size = sum(len(text.encode()) for text in texts)
        splits[split] = {'stories': len(texts), 'tokens': len(ids), 'bytes': size, 'shards': writer.close()}
    meta = {'encoding': 'char', 'vocab_size': tokenizer.vocab_size, 'source': 'tests', 'splits': splits,
            'delimiter': tokenizer.delimiter, 'blank': tokenizer.blank, 'middle': tokenizer.middle}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


def metrics(folder):
    """The lines of a run's metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != 'tokens_per_s'} for line in lines]
