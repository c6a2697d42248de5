"""Every setting of prepare.py, sample.py, export.py and report.py changes what its comment says.

A setting without a case here makes a test fail: add a function with @case that starts the script with another
value and says what must change, and what must stay.
"""

import ast
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.scripts import ROOT, Script, script
from tests.reference import naive_prepare, naive_report, naive_sample, prepare_cases, report_cases

DELIMITER = prepare_cases.DELIMITER
PREPARE, SAMPLE = 'data/tiny_stories/prepare.py', 'sample.py'
EXPORT, REPORT = 'export.py', 'tools/report.py'
BENCH, GPU_CHECK = 'tools/bench.py', 'tools/gpu_check.py'
CASES = {}
no_gpu = not torch.cuda.is_available()


def case(path, name):
    """Register a function of (world, folder) as what proves that a setting has its effect."""
    def register(function):
        CASES[path, name] = function
        return function
    return register


def names_of(path):
    """Return the settings that --help lists."""
    return set(re.findall(r'^  --(\w+)', script(path, '--help').out, re.M))


class World:
    """Data, checkpoints and a run, made once; what a script gives with the same flags is made once, too."""

    def __init__(self, folder):
        self.kept = {}
        self.folder, self.stories = folder, prepare_cases.corpus(200)
        self.source = prepare_cases.write(folder / 's.jsonl', self.stories)
        self.report = report_cases.World(folder)
        self.run = folder / 'writes'
        self.run.mkdir()
        torch.save(naive_sample.make_checkpoint(3, 4.0), self.run / 'best.pt')
        torch.save(naive_sample.make_checkpoint(5, 4.0), self.run / 'ckpt.pt')
        (self.run / 'starts.txt').write_text('a\nno\n')

    def prepared(self, *words):
        """Return (printed lines, files, meta) of prepare.py with these flags."""
        key = PREPARE, words
        if key not in self.kept:
            folder = self.folder / f'prepared-{len(self.kept)}'
            self.kept[key] = prepare_cases.run(folder, self.source, '--val_percentage=20', *words)
        return self.kept[key]

    def written(self, *words):
        """Return the stories that sample.py writes with these flags, and its stderr."""
        key = SAMPLE, words
        if key not in self.kept:
            few = ['--num_samples=40', '--max_new_tokens=20', '--start=a']
            done = script(SAMPLE, *once([f'--out_dir={self.run}', '--device=cpu', *few, *words]))
            self.kept[key] = done.out[:-1].split('\n---\n'), done.err
        return self.kept[key]

    def reported(self, *words):
        """Return the page's data of report.py with these flags."""
        key = REPORT, words
        if key not in self.kept:
            flags = [f'--out_dir={self.report.run}', '--num_samples=3', '--max_new_tokens=20', *words]
            self.kept[key] = report_cases.report(self.folder / 'settings.html', *once(flags))[1]
        return self.kept[key]


def once(words):
    """Return the flags without those that a later one replaces, or leaves no place for."""
    kept = {}
    for word in words:
        key = word.split('=')[0]
        kept[key] = word
    if '--init_from' in kept:
        kept.pop('--out_dir', None)
    if '--first_sentence' in kept:
        kept.pop('--start', None)
    return list(kept.values())


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp('world'))


@pytest.mark.parametrize('path', [PREPARE, SAMPLE, EXPORT, REPORT])
def test_every_setting_has_a_case(path):
    assert names_of(path) == {name for script, name in CASES if script == path}


def refused(path, *words, status=2):
    """Return what a script says on stderr as it refuses these flags, one line."""
    done = script(path, *words, status=status)
    assert done.out == '' and done.err.count('\n') == 1
    return done.err


# prepare.py -------------------------------------------------------------------

def texts(meta, files):
    """Return the stories of both splits of plain characters, in their order."""
    tokenizer = naive_prepare.Char(json.loads(files['tokenizer.json']))
    return {split: prepare_cases.texts_of(tokenizer, files[f'{split}_00000.bin']) for split in meta['splits']}


@case(PREPARE, 'source')
def source_is_what_is_prepared(world, folder):
    other = prepare_cases.write(folder / 'other.txt', ['on', 'no', 'onno'])
    _, files, meta = prepare_cases.run(folder / 'out', other)
    assert meta['source'] == str(other)
    found = texts(meta, files)
    assert sorted(found['train'] + found['val']) == ['no', 'on', 'onno']


@case(PREPARE, 'text_column')
def text_column_is_where_stories_stand(world, folder):
    rows = [{'text': f'a {i}', 'tale': f'b {i}'} for i in range(9)]
    (folder / 's.json').write_text(json.dumps(rows))
    for flags, letter in ([], 'a'), (['--text_column=tale'], 'b'):
        _, files, meta = prepare_cases.run(folder / 'out', folder / 's.json', *flags)
        assert all(text[0] == letter for side in texts(meta, files).values() for text in side)


@case(PREPARE, 'text_encoding')
def text_encoding_is_that_of_the_files(world, folder):
    written = ['a \u00e9\u201c', 'a\u201c \u00e9', '\u201c\u00e9 a']
    text = DELIMITER.join(written)
    for name, encoding in ('a.txt', 'cp1252'), ('b.txt', 'utf-16'), ('c.txt', 'utf-8'):
        (folder / name).write_bytes(text.encode(encoding))
        _, files, meta = prepare_cases.run(folder / 'out', folder / name, f'--text_encoding={encoding}')
        found = texts(meta, files)
        assert sorted(found['train'] + found['val']) == sorted(written)
    message = refused(PREPARE, f'--source={folder}/a.txt', f'--out_dir={folder}/x', status=1)
    assert 'a.txt, line 1: byte 0xe9' in message and '--text_encoding' in message


@case(PREPARE, 'separator')
def separator_is_between_stories(world, folder):
    source = folder / 's.txt'
    source.write_text('a</s>b\n\nb</s>a\n\nab</s>\n')
    for separator, stories in (
            (r'\n\n', ['a</s>b', 'b</s>a', 'ab</s>']), ('</s>', ['a', 'b\n\nb', 'a\n\nab']),
            ('a', ['</s>b\n\nb</s>', 'b</s>'])):
        _, _, meta = prepare_cases.run(folder / 'out', source, f'--separator={separator}')
        splits = meta['splits'].values()
        assert sum(split['stories'] for split in splits) == len(stories)
        assert sum(split['bytes'] for split in splits) == len(''.join(stories))
    printed, _, _ = prepare_cases.run(folder / 'out', source)
    assert any("it has </s> (3): type --separator '</s>'" in line for line in printed)


@case(PREPARE, 'encoding_type')
def encoding_type_decides_on_the_tokenizer(world, folder):
    assert world.prepared()[2]['encoding'] == 'char'  # auto
    _, files, meta = world.prepared('--encoding_type=bpe', '--vocab_size=350')
    assert meta['encoding'] == 'bpe' and 'tokenizer.model' in files and 'tokenizer.json' not in files
    message = refused(PREPARE, f'--source={world.source}', '--encoding_type=words', f'--out_dir={folder}/x')
    assert 'char, bpe, gpt2' in message
    assert not (folder / 'x').exists()


@case(PREPARE, 'vocab_size')
def vocab_size_counts_all_ids(world, folder):
    for size in 350, 330:
        _, files, meta = world.prepared('--encoding_type=bpe', f'--vocab_size={size}')
        assert meta['vocab_size'] == size
        assert naive_prepare.SentencePiece(files['tokenizer.model']).vocab_size == size
    message = refused(PREPARE, f'--source={world.source}', '--vocab_size=350', f'--out_dir={folder}/x')
    assert 'vocab_size is for a new bpe tokenizer' in message


@case(PREPARE, 'tokenizer')
def tokenizer_is_taken_as_it_is(world, folder):
    path = folder / 'tokenizer.json'
    path.write_text(json.dumps(['z', ' ', 'a']))
    _, files, meta = world.prepared(f'--tokenizer={path}')
    assert files['tokenizer.json'] == path.read_bytes() and meta['vocab_size'] == 264
    assert meta['splits']['train']['bytes'] == world.prepared()[2]['splits']['train']['bytes']


@case(PREPARE, 'data_percentage')
def data_percentage_takes_a_part(world, folder):
    whole, part = (texts(meta, files) for _, files, meta in (
        world.prepared(), world.prepared('--data_percentage=40')))
    assert 50 < len(part['train'] + part['val']) < 110 and len(whole['train'] + whole['val']) == 200
    for split in 'train', 'val':
        assert part[split] == [text for text in whole[split] if text in part[split]]


@case(PREPARE, 'val_percentage')
def val_percentage_holds_stories_out(world, folder):
    small = world.prepared()[2]
    large = prepare_cases.run(folder / 'out', world.source, '--val_percentage=60')[2]
    counts = [meta['splits']['val']['stories'] for meta in (small, large)]
    assert 25 < counts[0] < 60 and 95 < counts[1] < 145
    assert large['splits']['train']['stories'] == 200 - counts[1]


@case(PREPARE, 'infill_rate')
def infill_rate_turns_stories_around(world, folder):
    plain, turned = world.prepared()[2], world.prepared('--infill_rate=0.5')[2]
    assert (plain['infill_rate'], turned['infill_rate']) == (0.0, 0.5)
    for split in 'train', 'val':
        a, b = plain['splits'][split], turned['splits'][split]
        assert (a['stories'], a['bytes'], a['infilled']) == (b['stories'], b['bytes'], 0)
        assert 0.3 < (b['infilled'] + b['too_short']) / b['stories'] < 0.7


@case(PREPARE, 'out_dir')
def out_dir_is_where_the_data_goes(world, folder):
    _, files, _ = prepare_cases.run(folder / 'deep' / 'er', world.source, '--val_percentage=20')
    assert files == world.prepared()[1]
    assert [path.name for path in folder.iterdir()] == ['deep']


@case(PREPARE, 'num_proc')
def num_proc_is_the_number_of_workers(world, folder):
    """One process does all the work itself; two workers are processes of their own, with the same shards."""
    source = prepare_cases.write(folder / 's.txt', [f'{i} ' + 'The cat sat. ' * 400 for i in range(4000)])
    most = {}
    for n in 1, 2:
        words = f'--source={source}', f'--out_dir={folder}/{n}', f'--num_proc={n}', '--offline'
        running = Script(PREPARE, *words)
        children = Path(f'/proc/{running.process.pid}/task/{running.process.pid}/children')
        most[n] = 0
        while running.process.is_alive():
            with contextlib.suppress(OSError):  # it has ended
                most[n] = max(most[n], len(children.read_text().split()))
            time.sleep(0.005)
        running.finish()
    assert most[1] == 0 and most[2] >= 2
    assert (folder / '1/train_00000.bin').read_bytes() == (folder / '2/train_00000.bin').read_bytes()


@case(PREPARE, 'seed')
def seed_leaves_files_alone(world, folder):
    """What it does to the built-in corpus is in test_prepare.py: test_built_in_corpus."""
    assert world.prepared('--seed=7')[1] == world.prepared()[1]
    assert 'seed is -1' in refused(PREPARE, f'--source={world.source}', '--seed=-1', f'--out_dir={folder}/x')


class Proxy:
    """Counts the connections that are opened to it, and closes them."""

    def __init__(self):
        self.socket, self.n = socket.create_server(('127.0.0.1', 0)), 0
        self.address = f'http://127.0.0.1:{self.socket.getsockname()[1]}'
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            self.socket.accept()[0].close()
            self.n += 1


@case(PREPARE, 'offline')
def offline_opens_no_connection(world, folder):
    """And takes GPT-2's vocabulary where tiktoken keeps what it has downloaded."""
    words, proxy = ['--encoding_type=gpt2', f'--source={world.source}', f'--out_dir={folder}/out'], Proxy()
    nowhere = {'TIKTOKEN_CACHE_DIR': str(folder), 'HF_HOME': str(folder / 'none'), 'HF_HUB_OFFLINE': '0',
               'https_proxy': proxy.address}
    tried = script(PREPARE, *words, status=1, **nowhere).err
    assert "GPT-2's vocabulary is not in" in tried and 'cannot be downloaded' in tried and proxy.n > 0
    proxy.n = 0
    not_tried = script(PREPARE, *words, '--offline', status=1, **nowhere).err
    assert "GPT-2's vocabulary is not in" in not_tried and 'cannot be downloaded' not in not_tried
    if prepare_cases.GPT2_VOCABULARY:
        url = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json'
        shutil.copy(prepare_cases.GPT2_VOCABULARY, folder / hashlib.sha1(url.encode()).hexdigest())
        script(PREPARE, *words, '--offline', **nowhere)
        assert (folder / 'out' / 'tokenizer.tiktoken').exists()
    assert proxy.n == 0


# sample.py --------------------------------------------------------------------

@case(SAMPLE, 'out_dir')
def out_dir_holds_the_checkpoint(world, folder):
    shutil.copy(world.run / 'ckpt.pt', folder / 'best.pt')
    assert world.written(f'--out_dir={folder}') == world.written('--ckpt=last') != world.written()


@case(SAMPLE, 'ckpt')
def ckpt_is_best_unless_told(world, folder):
    assert world.written('--ckpt=best') == world.written() != world.written('--ckpt=last')
    assert 'ckpt is' in refused(SAMPLE, f'--out_dir={world.run}', '--ckpt=first')


@case(SAMPLE, 'init_from')
def init_from_replaces_out_dir(world, folder):
    assert world.written(f'--init_from={world.run}/ckpt.pt') == world.written('--ckpt=last')


@case(SAMPLE, 'start')
def start_begins_every_story(world, folder):
    for start in 'no', 'b caf', 'NEW \u00e9':
        stories, _ = world.written(f'--start={start}')
        assert len(stories) == 40 and all(story.startswith(start) for story in stories)


@case(SAMPLE, 'one_per_line')
def one_per_line_makes_each_line_a_start(world, folder):
    start = f'--start=FILE:{world.run}/starts.txt'
    stories, _ = world.written(start)
    assert len(stories) == 40 and all(story.startswith('a\nno\n') for story in stories)
    stories, _ = world.written(start, '--one_per_line')
    assert len(stories) == 80
    assert all(story.startswith('a') for story in stories[:40])
    assert all(story.startswith('no') for story in stories[40:])


ENDS = '--first_sentence=a b.', '--last_sentence=no.'


@case(SAMPLE, 'first_sentence')
def first_sentence_begins_the_story(world, folder):
    one, other = world.written(*ENDS)[0], world.written('--first_sentence=i.', ENDS[1])[0]
    assert all(story.startswith('a b.') for story in one) and all(story.startswith('i.') for story in other)
    middles = [[story[len(start):] for story in stories] for start, stories in (('a b.', one), ('i.', other))]
    assert middles[0] != middles[1]  # it was read
    assert 'needs both ends' in refused(SAMPLE, f'--out_dir={world.run}', ENDS[0])


@case(SAMPLE, 'last_sentence')
def last_sentence_ends_the_story(world, folder):
    one, other = world.written(*ENDS)[0], world.written(ENDS[0], '--last_sentence=p.')[0]
    assert all(story.endswith(' no.') for story in one) and all(story.endswith(' p.') for story in other)
    assert [story[:-3] for story in one] != [story[:-2] for story in other]
    assert 'needs both ends' in refused(SAMPLE, f'--out_dir={world.run}', ENDS[1])


@case(SAMPLE, 'num_samples')
def num_samples_is_the_number_of_stories(world, folder):
    assert [len(world.written(f'--num_samples={n}')[0]) for n in (1, 7)] == [1, 7]


@case(SAMPLE, 'max_new_tokens')
def max_new_tokens_cuts_stories(world, folder):
    longest = [max(map(len, world.written(f'--max_new_tokens={n}')[0])) for n in (5, 20)]
    assert longest == [6, 21]
    assert 'cut at --max_new_tokens 5' in world.written('--max_new_tokens=5')[1]


@case(SAMPLE, 'min_new_tokens')
def min_new_tokens_appends_stories(world, folder):
    stories, _ = world.written('--num_samples=1', '--max_new_tokens=300', '--min_new_tokens=200')
    assert len(stories) > 1 and 180 < sum(map(len, stories)) < 300
    assert all(story.startswith('a') for story in stories[:1])


@case(SAMPLE, 'temperature')
def temperature_makes_likelier_words(world, folder):
    assert world.written('--temperature=0.8') == world.written()
    kinds = [len(set(world.written(f'--temperature={t}', '--top_p=1')[0])) for t in (0, 0.1, 3)]
    assert kinds[0] == 1 and kinds[1] < 30 < kinds[2]


@case(SAMPLE, 'top_k')
def top_k_leaves_few_tokens(world, folder):
    hot = ['--temperature=30', '--top_p=1', '--max_new_tokens=1', '--num_samples=120']
    kinds = [len(set(world.written(*hot, f'--top_k={k}')[0])) for k in (1, 2, 5, 0)]
    assert kinds[:3] == [1, 2, 5] and kinds[3] > 12


@case(SAMPLE, 'top_p')
def top_p_leaves_likely_tokens(world, folder):
    assert world.written('--top_p=0.95') == world.written()
    hot = ['--temperature=3', '--max_new_tokens=1', '--num_samples=120']
    kinds = [len(set(world.written(*hot, f'--top_p={p}')[0])) for p in (1e-9, 0.5, 1)]
    assert kinds[0] == 1 < kinds[1] < kinds[2]


@case(SAMPLE, 'seed')
def seed_draws_other_stories(world, folder):
    assert world.written('--seed=1337') == world.written() != world.written('--seed=3')


@case(SAMPLE, 'device')
def device_is_where_to_compute(world, folder):
    if no_gpu:
        assert world.written('--device=auto') == world.written()
        assert 'this machine has 0 CUDA devices' in refused(SAMPLE, f'--out_dir={world.run}', '--device=cuda')
    assert "'tpu'" in refused(SAMPLE, f'--out_dir={world.run}', '--device=tpu')


@case(SAMPLE, 'dtype')
def dtype_rounds(world, folder):
    """Rounding changes some stories, and few of their first tokens."""
    torch.save(naive_sample.make_checkpoint(3, 4.0, mlp_width=64), folder / 'best.pt')
    hot = [f'--out_dir={folder}', '--num_samples=120', '--top_p=1', '--temperature=1.5']
    exact = world.written(*hot)[0]
    assert world.written(*hot, '--dtype=float32')[0] == exact
    found = [world.written(*hot, f'--dtype={dtype}')[0] for dtype in ('bfloat16', 'float16', 'int8')]
    for stories in found:
        assert stories != exact
        assert sum(a[:2] == b[:2] for a, b in zip(stories, exact, strict=True)) > 100
    assert found[0] != found[1] != found[2]


@case(SAMPLE, 'compile')
def compile_is_tried(world, folder):
    """With no compiler it fails, and says so."""
    words = [f'--out_dir={world.run}', '--device=cpu', '--max_new_tokens=3', '--compile']
    done = script(SAMPLE, *words, status=1, PATH=str(folder), TORCHINDUCTOR_CACHE_DIR=str(folder))
    assert 'torch.compile failed' in done.err and 'leave out --compile' in done.err


# export.py --------------------------------------------------------------------

def export(*words):
    """Return what export.py prints; its exports are compared with our predictions by itself."""
    return script(EXPORT, *words).out


def safetensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / 'model.safetensors')


def assert_is(weights, checkpoint):
    assert weights.keys() == checkpoint['model'].keys()
    for name, w in weights.items():
        assert torch.equal(w, checkpoint['model'][name]), name


@case(EXPORT, 'out_dir')
def out_dir_of_the_exported(world, folder):
    shutil.copy(world.run / 'ckpt.pt', folder / 'best.pt')
    export(f'--out_dir={folder}', '--format=safetensors', f'--path={folder}/to')
    assert_is(safetensors_of(folder / 'to'), torch.load(world.run / 'ckpt.pt'))


@case(EXPORT, 'ckpt')
def ckpt_of_the_exported(world, folder):
    for flags, name in ([], 'best.pt'), (['--ckpt=last'], 'ckpt.pt'):
        export(f'--out_dir={world.run}', '--format=safetensors', f'--path={folder}/to', *flags)
        assert_is(safetensors_of(folder / 'to'), torch.load(world.run / name))


def read_llama2c(path, config):
    """Return the weights of a model.bin of version 0 whose head is not tied, by our names."""
    data = path.read_bytes()
    width, mlp_width, layers = config['n_embd'], config['mlp_width'], config['n_layer']
    kv_width = width // config['n_head'] * config['n_kv_head']
    assert struct.unpack('<7i', data[:28]) == (
        width, mlp_width, layers, config['n_head'], config['n_kv_head'], -config['vocab_size'],
        config['block_size'])
    half = width // config['n_head'] // 2
    shapes = {'embedding': (config['vocab_size'], width), 'attn_norm': (layers, width),
              'attn.q': (layers, width, width), 'attn.k': (layers, kv_width, width),
              'attn.v': (layers, kv_width, width), 'attn.proj': (layers, width, width),
              'mlp_norm': (layers, width), 'mlp.gate': (layers, mlp_width, width),
              'mlp.proj': (layers, width, mlp_width), 'mlp.up': (layers, mlp_width, width), 'norm': (width,),
              'rotation': (2, config['block_size'], half), 'lm_head': (config['vocab_size'], width)}
    weights, offset = {}, 28
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        weights[name] = torch.tensor(struct.unpack(f'<{n}f', data[offset:offset + 4 * n])).view(shape)
        offset += 4 * n
    assert offset == len(data)
    return weights


def check_llama2c(folder, checkpoint):
    """Compare all weights; llama2.c rotates rows 2 i and 2 i + 1 of a head, we rotate i and i + half."""
    config = checkpoint['config']
    half = config['n_embd'] // config['n_head'] // 2
    theirs = read_llama2c(folder / 'model.bin', config)
    t, i = config['block_size'] - 1, 1
    angle = t * config['rope_theta'] ** (-i / half)
    assert theirs['rotation'][:, t, i].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)
    for name, ours in checkpoint['model'].items():
        parts = re.fullmatch(r'(?:blocks\.(\d+)\.)?(.*)\.weight', name)
        w = theirs[parts[2]]
        if parts[1] is not None:
            w = w[int(parts[1])]
        if parts[2] in ('attn.q', 'attn.k'):
            pairs = w.view(-1, half, 2, config['n_embd'])
            w = torch.cat((pairs[:, :, 0], pairs[:, :, 1]), 1).reshape(w.shape)
        assert torch.equal(w, ours), name


def check_hugging_face(folder, checkpoint):
    """Compare config.json and all weights, by their names there."""
    config, about = checkpoint['config'], json.loads((folder / 'config.json').read_text())
    expected = {
        'architectures': ['LlamaForCausalLM'], 'hidden_size': config['n_embd'], 'hidden_act': 'silu',
        'intermediate_size': config['mlp_width'], 'num_hidden_layers': config['n_layer'],
        'num_attention_heads': config['n_head'], 'num_key_value_heads': config['n_kv_head'],
        'max_position_embeddings': config['block_size'], 'vocab_size': config['vocab_size'],
        'rope_theta': config['rope_theta'], 'rms_norm_eps': config['norm_eps'], 'tie_word_embeddings': False,
        'attention_bias': False, 'mlp_bias': False, 'bos_token_id': 1, 'eos_token_id': 1}
    assert {name: about[name] for name in expected} == expected
    names = {'embedding': 'model.embed_tokens', 'norm': 'model.norm', 'blocks': 'model.layers',
             'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm',
             'attn.q': 'self_attn.q_proj', 'attn.k': 'self_attn.k_proj', 'attn.v': 'self_attn.v_proj',
             'attn.proj': 'self_attn.o_proj',
             'mlp.gate': 'mlp.gate_proj', 'mlp.up': 'mlp.up_proj', 'mlp.proj': 'mlp.down_proj',
             'lm_head': 'lm_head'}
    theirs = safetensors_of(folder)
    for name, ours in checkpoint['model'].items():
        block, stem = re.fullmatch(r'(blocks\.\d+\.)?(.*)\.weight', name).groups()
        prefix = block.replace('blocks', names['blocks']) if block else ''
        assert torch.equal(theirs.pop(f'{prefix}{names[stem]}.weight'), ours), name
    assert not theirs


def small_checkpoint(seed):
    """Return one of mild weights, whose logits rounding moves by little."""
    checkpoint = naive_sample.make_checkpoint(seed, 1.0)
    for name, w in checkpoint['model'].items():
        if w.dim() == 2:
            w *= 0.5
        if name == 'lm_head.weight':
            w[:, 0] = 0
    return checkpoint


@case(EXPORT, 'format')
def format_is_what_is_written(world, folder):
    checkpoint = small_checkpoint(0)
    torch.save(checkpoint, folder / 'best.pt')
    printed = {}
    for name in 'llama2c', 'llama2c-int8', 'hf', 'html':
        path = folder / name
        printed[name] = export(f'--out_dir={folder}', f'--format={name}', f'--path={path}')
        assert printed[name].endswith(f'wrote {path}\n')
        found = re.search(r'KL divergence (\S+) nats.*most (\S+)\); (\d+) of (\d+) greedy', printed[name])
        if found:  # a program to read it back may be missing
            assert float(found[1]) <= float(found[2]) and found[4] == '23'
            assert found[3] == '23' or name in ('llama2c-int8', 'html')
    check_llama2c(folder / 'llama2c', checkpoint)
    assert (folder / 'llama2c-int8' / 'model.bin').read_bytes()[:8] == struct.pack('<Ii', 0x616B3432, 2)
    check_hugging_face(folder / 'hf', checkpoint)
    assert (folder / 'html').read_text().startswith('<!DOCTYPE html>')
    assert 'format' in refused(EXPORT, f'--out_dir={folder}', '--format=onnx', f'--path={folder}/x')


@case(EXPORT, 'path')
def path_is_where_the_export_goes(world, folder):
    export(f'--out_dir={world.run}', '--format=safetensors', f'--path={folder}/a/b')
    names = ['config.json', 'export.json', 'model.safetensors', 'tokenizer.json']
    assert sorted(os.listdir(folder / 'a' / 'b')) == names
    assert os.listdir(folder) == ['a'] and os.listdir(folder / 'a') == ['b']
    assert 'path is empty' in refused(EXPORT, f'--out_dir={world.run}', '--format=safetensors')


@case(EXPORT, 'overwrite')
def overwrite_replaces_what_export_did_not_write(world, folder):
    (folder / 'to').mkdir()
    (folder / 'to' / 'config.json').write_text('{}')
    words = f'--out_dir={world.run}', '--format=safetensors', f'--path={folder}/to'
    assert '--overwrite' in refused(EXPORT, *words)
    assert os.listdir(folder / 'to') == ['config.json']
    export(*words, '--overwrite')
    assert (folder / 'to' / 'model.safetensors').exists()


@case(EXPORT, 'dtype')
def dtype_of_the_matrices(world, folder):
    gguf = pytest.importorskip('gguf')
    torch.save(small_checkpoint(0), folder / 'best.pt')
    for flags, kind in ([], 'F32'), (['--dtype=f16'], 'F16'), (['--dtype=q8_0'], 'Q8_0'):
        path = folder / f'{kind}.gguf'
        if kind == 'Q8_0':
            checkpoint = naive_sample.make_checkpoint(0, 1.0, mlp_width=64)
            checkpoint['model'] = {name: w * (0.2 if w.dim() == 2 else 1)
                                   for name, w in checkpoint['model'].items()}
            torch.save(checkpoint, folder / 'best.pt')
        export(f'--out_dir={folder}', '--format=gguf', f'--path={path}', *flags)
        tensors = gguf.GGUFReader(path).tensors
        kinds = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) == 2}
        assert kinds == {kind} and {t.tensor_type.name for t in tensors if len(t.shape) == 1} == {'F32'}


# report.py --------------------------------------------------------------------

def figures(page):
    return {label: cells for label, (cells, _) in report_cases.rows_of(page).items()}


def stories(page):
    return [story['text'] for story in page['runs'][0]['stories']]


def facts(page):
    return dict(page['runs'][0]['facts'])


PREDICTION = 'bits per byte', 'loss', 'perplexity', 'accuracy, %'


def same(label, one, other):
    return figures(one)[label] == figures(other)[label]


@case(REPORT, 'out_dir')
def out_dir_is_one_run_or_several(world, folder):
    shutil.copy(world.report.run / 'ckpt.pt', folder / 'best.pt')
    both = world.reported(f'--out_dir={world.report.run},{folder}')
    assert both['title'] == f'{world.report.run}, {folder}'
    cells = figures(both)['loss']
    assert cells == [*figures(world.reported())['loss'], *figures(world.reported('--ckpt=last'))['loss']]
    assert cells[0] != cells[1]


@case(REPORT, 'ckpt')
def ckpt_of_the_report(world, folder):
    assert all(same(label, world.reported('--ckpt=best'), world.reported()) for label in PREDICTION)
    assert not any(same(label, world.reported('--ckpt=last'), world.reported()) for label in PREDICTION)


@case(REPORT, 'init_from')
def init_from_of_the_report(world, folder):
    page = world.reported(f'--init_from={world.report.run}/ckpt.pt')
    assert figures(page) == figures(world.reported('--ckpt=last'))
    assert page['title'] == f'{world.report.run}/ckpt.pt'


@case(REPORT, 'dataset')
def dataset_is_what_to_evaluate_on(world, folder):
    data, _ = report_cases.prepare(folder / 'mine', report_cases.TRAIN[:9], report_cases.VAL[:4],
                                   f'--tokenizer={world.report.data}')
    page = world.reported(f'--dataset={data}')
    assert facts(page)['data'] == 'mine' and facts(world.reported())['data'] == 'data'
    assert facts(page)['to validate'].startswith('4 stories')
    assert not same('loss', page, world.reported()) and stories(page) != stories(world.reported())


@case(REPORT, 'path')
def path_is_where_the_page_goes(world, folder):
    done = script(REPORT, f'--out_dir={world.report.run}', '--num_samples=2', '--max_new_tokens=2')
    default = world.report.run / 'report.html'
    assert done.out.endswith(f'look at {default}\n') and default.exists()
    default.unlink()
    world.reported()
    assert (world.folder / 'settings.html').exists() and not default.exists()


@case(REPORT, 'overwrite')
def overwrite_replaces_what_is_not_a_report(world, folder):
    (folder / 'thesis.html').write_text('<!DOCTYPE html><html lang="en">')
    words = f'--out_dir={world.report.run}', f'--path={folder}/thesis.html', '--num_samples=2'
    assert '--overwrite' in refused(REPORT, *words)
    for flags in ['--overwrite'], []:  # a report is replaced without asking
        script(REPORT, *words, *flags, '--max_new_tokens=2')


@case(REPORT, 'num_samples')
def num_samples_of_the_report(world, folder):
    for n in 3, 5:
        page = world.reported(f'--num_samples={n}')
        assert facts(page)['stories for the figures'] == f'{n} written, {n} real' and len(stories(page)) == n


@case(REPORT, 'max_new_tokens')
def max_new_tokens_of_the_report(world, folder):
    lengths = []
    for n in 5, 20:
        page = world.reported(f'--max_new_tokens={n}')
        lengths.append(max(len(story['text']) - story['prompt'] for story in page['runs'][0]['stories']))
        assert len(page['runs'][0]['tokens']) == n
    assert lengths[0] <= 5 < lengths[1] <= 20
    assert not same('words', world.reported('--max_new_tokens=5'), world.reported())


@case(REPORT, 'temperature')
def temperature_of_the_report(world, folder):
    assert stories(world.reported('--temperature=0.8')) == stories(world.reported())
    hot = world.reported('--temperature=9')
    assert figures(hot) != figures(world.reported()) and stories(hot) != stories(world.reported())
    assert all(same(label, hot, world.reported()) for label in PREDICTION)


@case(REPORT, 'top_p')
def top_p_of_the_report(world, folder):
    assert stories(world.reported('--top_p=0.95')) == stories(world.reported())
    assert stories(world.reported('--top_p=1e-9')) == stories(world.reported('--temperature=0'))
    assert stories(world.reported('--top_p=1e-9')) != stories(world.reported())


@case(REPORT, 'eval_iters')
def eval_iters_of_the_report(world, folder):
    """Of a split of one batch, which is all; test_report.py has a longer one."""
    page = world.reported('--eval_iters=1')
    assert figures(page) == figures(world.reported())
    notes = [page['table'][0]['rows'][0]['note'], world.reported()['table'][0]['rows'][0]['note']]
    assert '1 batches of the validation' in notes[0] and 'the whole validation' in notes[1]


@case(REPORT, 'seed')
def seed_of_the_report(world, folder):
    assert stories(world.reported('--seed=1337')) == stories(world.reported())
    other = world.reported('--seed=2')
    assert stories(other) != stories(world.reported()) and same('loss', other, world.reported())


@case(REPORT, 'device')
def device_of_the_report(world, folder):
    if no_gpu:
        words = [f'--out_dir={world.report.run}', '--device=cuda']
        assert 'this machine has 0 CUDA devices' in refused(REPORT, *words)
    assert "'tpu'" in refused(REPORT, f'--out_dir={world.report.run}', '--device=tpu')


@case(REPORT, 'dtype')
def dtype_of_the_report(world, folder):
    exact, rounded = (figures(page)['perplexity'][0] for page in (
        world.reported('--dtype=float32'), world.reported('--dtype=bfloat16')))
    assert exact == figures(world.reported())['perplexity'][0]
    assert exact != rounded and float(rounded) == pytest.approx(float(exact), rel=0.1)


@pytest.mark.parametrize('path, name', CASES)
def test_setting(world, tmp_path, path, name):
    CASES[path, name](world, tmp_path)


# scripts that measure ---------------------------------------------------------

@pytest.mark.parametrize('path', [BENCH, GPU_CHECK])
def test_scripts_that_measure_use_every_setting(path):
    names = names_of(path)
    assert {'what', 'peer'} <= names
    read = [node.id for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Load)]
    assert names <= set(read)


def test_naive_names_of_words_agree():
    """The words of a text by hand."""
    assert naive_report.words('"Don\'t!" said TIM\'s 2nd dog\u2014\u5c0f\u72d7.') == [
        "don't", 'said', "tim's", '2nd', 'dog', '\u5c0f', '\u72d7']
