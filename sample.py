"""Write stories with a trained model; stdout has the stories alone, a line `---` between two.

    python sample.py --out_dir out-quickstart
    python sample.py --start "One day, a dog" --num_samples 10 --temperature 0.8 > stories.txt
    python sample.py --start FILE:prompt.txt --temperature 0
    python sample.py --start FILE:prompts.txt --one_per_line --num_samples 1
    python sample.py --num_samples 1 --min_new_tokens 9000 --max_new_tokens 10000 > stories.txt
    python sample.py --out_dir out-infill --first_sentence "Tim lost his hat." --last_sentence "Tim was glad."
"""

import sys
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import FILES, load_checkpoint, load_model
from configurator import configure, in_range, one_of
from data import infill
from data.tokenizer import tokenizer_from_state
from device import DTYPES, choose_device, choose_dtype, keep_memory
from errors import SettingError, UserError, reading, run
from generate import continued
from quantize import to_int8

out_dir = 'out-tiny-stories'  # folder of the checkpoint
ckpt = 'best'  # best (lowest validation loss) or last
init_from = ''  # a pretrained model instead: a Hugging Face folder, or llama2.c's .bin beside its tokenizer
start = ''  # how every story begins: text, or FILE:path
one_per_line = False  # each line of the start's file begins stories of its own, num_samples of them
first_sentence = ''  # of a story whose middle the model writes, if it has learned infilling
last_sentence = ''  # of that story
num_samples = 3  # stories, written side by side as one batch
max_new_tokens = 1000  # longest continuation; most stories end before
min_new_tokens = 0  # a story that ends before is followed by another
temperature = 0.8  # below 1: likelier words; 0: always the likeliest
top_k = 0  # draw from the k likeliest tokens; 0: all
top_p = 0.95  # draw from the likeliest tokens that make up this probability; 1: all
seed = 1337  # same seed, same stories
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps
dtype = 'float32'  # float32, bfloat16, float16, auto, or int8: on a CPU the fastest
compile = False  # compile the step from token to token, half a minute: on a GPU, for many stories


def check_settings():
    """Refuse what no sample can mean. Raises SettingError."""
    one_of(FILES, ckpt=ckpt)
    one_of(('auto', *DTYPES, 'int8'), dtype=dtype)
    in_range(at_least=1, num_samples=num_samples, max_new_tokens=max_new_tokens)
    in_range(at_least=1e-30 if temperature > 0 else 0, at_most=1e30, temperature=temperature)
    in_range(at_least=0, below=2**63, seed=seed)
    in_range(above=0, at_most=1, top_p=top_p)
    in_range(at_least=0, top_k=top_k, min_new_tokens=min_new_tokens)
    if min_new_tokens > max_new_tokens:
        raise SettingError(f'min_new_tokens is {min_new_tokens}, more than max_new_tokens, {max_new_tokens}')
    if last_sentence and min_new_tokens:
        raise SettingError('min_new_tokens is for whole stories, not for a middle: leave it out')
    if one_per_line and not start.startswith('FILE:'):
        raise SettingError('one_per_line is for the lines of a file: type --start FILE:path')
    if bool(first_sentence.strip()) != bool(last_sentence.strip()):
        raise SettingError('a middle needs both ends: type --first_sentence "..." and --last_sentence "..."')
    if first_sentence and start:
        raise SettingError('start and first_sentence are both given: leave out one')


def read_starts():
    """The texts that stories begin with."""
    if not start.startswith('FILE:'):
        return [start]
    with reading(start[5:], 'cannot be read as UTF-8 text'):
        text = Path(start[5:]).read_text(encoding='utf-8-sig')
    lines = [line for line in text.split('\n') if line.strip()]
    if one_per_line and not lines:
        raise UserError(f'{start[5:]} has no line to begin a story with')
    return lines if one_per_line else [text]


def write_stories(model, tokenizer, begins, end, stream):
    """Yield the text of `num_samples` stories for each text of `begins`, each once it and those before it are
    whole; a lone one in growing parts, a line feed at its end, if `stream`. What was cut is told of on stderr
    after them. Stories end with the text `end`, if there is one: a middle is written in sight of both ends,
    so it stops where the context does; a plain story goes on without the sight of its beginning.
    """
    heads = [[tokenizer.delimiter, *tokenizer.encode(text)] for text in begins for _ in range(num_samples)]
    prompts = [infill.prompt(tokenizer, begins[0], end)] * num_samples if end else heads
    longest, context = max(map(len, prompts)), model.config.block_size
    if longest > context:
        what = 'the two sentences have' if end else f'{"a" if len(begins) > 1 else "the"} start has'
        raise UserError(f'{what} {longest} tokens, more than the context of {context}; shorten them')
    limit, limited_by = max_new_tokens, f'--max_new_tokens {max_new_tokens}'
    if end and (room := context - longest + 1) < limit:  # the last token written need not be read
        limit, limited_by = room, f'the end of the context of {context} tokens'
    steps = continued(model, prompts, tokenizer.delimiter, limit, min_new_tokens, temperature=temperature,
                      top_k=top_k, top_p=top_p, suppress=(tokenizer.blank, tokenizer.middle), seed=seed,
                      compile=compile)
    shown, total = 0, limit + longest - min(map(len, prompts))
    for rows, growing in tqdm(steps, 'writing', total, leave=False, disable=stream or None, unit=' tokens'):
        if stream:
            yield text_of(tokenizer, heads[0] + rows[0])
        while not stream and shown < len(rows) and shown not in growing:
            yield text_of(tokenizer, heads[shown] + rows[shown], end)
            shown += 1
    if stream:
        yield text_of(tokenizer, heads[0] + rows[0], end) + '\n'
    if cut := sum(len(row) == limit for row in rows):
        print(f'{cut} of {len(rows)} stories were cut at {limited_by}', file=sys.stderr)


def text_of(tokenizer, ids, end=''):
    """The text of ids that begin with a delimiter, a line `---` for each other one, and what it is to end
    with: a middle that was cut ends in a word."""
    starts = [i for i, token in enumerate(ids) if token == tokenizer.delimiter]
    text = '\n---\n'.join(tokenizer.decode(ids[i:j]) for i, j in pairwise([*starts, len(ids)]))
    return text + (' ' if end and not text[-1:].isspace() else '') + end


def print_growing(texts):
    """Print a text as it grows."""
    shown = ''
    for text in texts:
        text = text.rstrip('\N{REPLACEMENT CHARACTER}')  # a character whose last bytes are still to come
        print(text[len(shown):], end='', flush=True)
        shown = text


def main():
    check_settings()
    torch_device = choose_device(device)
    if dtype == 'int8' and torch_device.type != 'cpu':
        raise SettingError(f'dtype int8 is for a CPU, not for {torch_device}: use bfloat16, or --device cpu')
    keep_memory()
    if init_from:
        from formats import load_pretrained

        checkpoint = load_pretrained(init_from)
    else:
        checkpoint = load_checkpoint(Path(out_dir) / FILES[ckpt])
    if not checkpoint['tokenizer']:
        raise UserError(f'{init_from} has no tokenizer beside it: put the one there that it was trained with')
    tokenizer = tokenizer_from_state(checkpoint['tokenizer'])
    model = load_model(checkpoint, torch_device)
    try:
        model = to_int8(model) if dtype == 'int8' else model.to(choose_dtype(dtype, torch_device))
    except ValueError as error:
        raise SettingError(str(error)) from None
    end = last_sentence.strip()
    begins = [first_sentence.strip()] if end else read_starts()
    if any(tokenizer.decode(tokenizer.encode(text)) != text for text in (*begins, end)):
        print('the tokenizer has nothing for some of these characters: they are left out', file=sys.stderr)
    if end and not checkpoint.get('infill_rate'):
        raise UserError(f'{init_from or out_dir} has not learned to write middles: train on data of '
                        'data/tiny_stories/prepare.py --infill_rate 0.5, or continue a --start')
    stream = num_samples * len(begins) == 1 and sys.stdout.isatty()
    stories = write_stories(model, tokenizer, begins, end, stream)
    try:
        if stream:
            print_growing(stories)
        else:
            for i, text in enumerate(stories):
                tqdm.write(('---\n' if i else '') + text)  # above the bar
    except RuntimeError as error:
        if not (compile and isinstance(error, torch._dynamo.exc.TorchDynamoException)):
            raise
        raise UserError(f'torch.compile failed ({type(error).__name__}): leave out --compile') from None


if __name__ == '__main__':
    configure(globals())
    run(main, 'write fewer stories at once (--num_samples), or with --dtype bfloat16')
