"""Turn stories into token shards, meta.json and a tokenizer: all that train.py needs.

    python data/tiny_stories/prepare.py                    # TinyStories, one token per character
    python data/tiny_stories/prepare.py --source stories.txt --encoding_type bpe --out_dir data/mine
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for the imports below

import shlex
import time
from hashlib import blake2b

import numpy as np

from configurator import SettingError, UserError, configure, in_range, one_of, run, script_path
from core.memory import limit_memory
from data import infill
from data.shards import ShardWriter, write_dataset_atomically, write_meta
from data.splits import split_document
from data.stories import load_stories, map_stories
from data.story_files import story_format
from data.tokenizer import BPETokenizer, CharTokenizer, VocabSizeError, unique_characters
from data.tokenizer_files import load_gpt2, open_tokenizer

source = 'roneneldan/TinyStories'  # a name on the Hugging Face hub, a file, a folder, or sample (built in)
text_column = ''  # the column of a table that holds the stories; '' means text or story
text_encoding = 'utf-8'  # of .txt, .jsonl, .json, .csv and .tsv files, such as utf-16 or cp1252
separator = '<|endoftext|>'  # between two stories of a .txt; \n is a line break, \n\n a blank line
encoding_type = 'auto'  # char, bpe or gpt2; auto is bpe for the built-in corpus and char for all others
vocab_size = 0  # size of a new bpe vocabulary, with the 2 infilling tokens; 0: 4096 (built-in corpus: 1536)
tokenizer = ''  # reuse the tokenizer of a run, folder, pretrained model or file (.txt: its characters)
data_percentage = 100.0  # percentage of the stories to use; smaller samples are subsets of larger ones
val_percentage = 0.0  # percentage to hold out for validation; 0: the source's own split, or 1 (document: 10)
infill_rate = 0.0  # fraction of the stories, 0 to 1, from which the model learns to write a missing middle
out_dir = ''  # where to write; '': data/tiny_stories
num_proc = 0  # worker processes; 0: one per CPU core
seed = 1337  # of the built-in corpus, and of the sample that bpe learns from
offline = False  # never use the network: read hub datasets and GPT-2's vocabulary from their caches

# -----------------------------------------------------------------------------

def main():
    start_time = time.perf_counter()
    check_settings()
    limit_memory()
    how = story_format(text_column, text_encoding, separator)
    folder = Path(out_dir or Path(__file__).resolve().parent)

    # temporary folders: at the end, the files in `new` replace the old ones; `cache` has intermediate files
    with write_dataset_atomically(folder) as (new, cache):
        enc, split_meta, lines = write_dataset(new, cache, how)

    print('\n'.join(lines))
    print_totals(split_meta, enc, time.perf_counter() - start_time)
    print_next_command()


def write_dataset(folder, cache, how):
    """Write all files of the dataset into `folder`. how: a Format, what the settings say about story files.

    Returns (tokenizer, {split: entry of meta.json}, lines that say where the stories went).
    The stories are mapped files in `cache`, which Windows cannot remove before this function has returned.
    """
    # a given tokenizer is opened first, so that a wrong path shows before a long download
    enc = load_given_tokenizer()
    # a DatasetDict with 'train' and perhaps 'validation', or with one 'document'
    stories, lines = load_stories(source, cache, how, seed, offline)
    is_document = 'document' in stories
    if is_document and infill_rate > 0:
        raise UserError(f'{source} is one document, without stories to infill: leave out --infill_rate, or '
                        'name what is between its stories with --separator')
    if is_document:
        stories, line = split_document(stories['document'][0]['text'], data_percentage, val_percentage)
        lines.insert(0, line)
    elif 'validation' in stories and val_percentage > 0:
        raise SettingError(f'val_percentage {val_percentage:g} has no effect, as {source} has a split for '
                           f'validation ({lines[0]}): leave it out')

    splits, n_blank = split_stories(stories, cache)
    if enc is None:
        enc = train_tokenizer(splits['train'], cache)
    split_meta = {}
    for split in splits:
        encoded = encode_stories(splits[split], split, enc, infill_rate, cache)
        split_meta[split] = write_shards(encoded, split, folder)
    if infill_rate > 0 and split_meta['train']['infilled'] == 0:
        raise UserError(f'no story of {source} can be infilled: leave out --infill_rate')
    enc.save(folder)
    write_meta(folder, enc, source, infill_rate, split_meta)

    n_train, n_val = split_meta['train']['stories'], split_meta['val']['stories']
    stories_line = f'stories: {n_train:,} for training, {n_val:,} for validation, {n_blank:,} blank'
    return enc, split_meta, [*lines, stories_line]


def check_settings():
    """Check the settings. Raises SettingError."""
    if not source:
        raise SettingError('source is empty: name a dataset, a file or a folder with stories, or sample')
    one_of(('auto', 'char', 'bpe', 'gpt2'), encoding_type=encoding_type)
    if vocab_size and (wanted_encoding() != 'bpe' or tokenizer):
        raise SettingError('vocab_size is for a new bpe tokenizer: type --encoding_type bpe, no --tokenizer')
    in_range(at_least=0, at_most=2**16, vocab_size=vocab_size)  # tokens are stored in 16 bits
    in_range(above=0, at_most=100, data_percentage=data_percentage)
    in_range(at_least=0, below=100, val_percentage=val_percentage)
    in_range(at_least=0, at_most=1, infill_rate=infill_rate)
    in_range(at_least=0, at_most=1024, num_proc=num_proc)
    in_range(at_least=0, seed=seed)


def wanted_encoding():
    """Return char, bpe or gpt2: what `encoding_type` means."""
    if encoding_type != 'auto':
        return encoding_type
    # with bpe, the small quickstart model can keep track of who the story is about
    return 'bpe' if source == 'sample' else 'char'


# split -----------------------------------------------------------------------

def split_stories(stories, cache):
    """Return ({'train': Dataset, 'val': Dataset}, number of blank stories, which are left out).

    The Datasets have the columns `text` and `bytes`. The sample is chosen by hash: a 10% sample is a subset
    of a 20% sample. So is the validation split, if the source has none: duplicates land in the same split.
    Raises UserError if there are not enough stories for both splits.
    """
    from datasets import concatenate_datasets

    n_train = stories.num_rows['train']
    has_validation = 'validation' in stories
    stories = concatenate_datasets(list(stories.values()))
    if len(stories) == 0:
        raise UserError(f'{source} holds no stories')
    hashes = map_stories(stories, hash_stories, 'hash stories', HASH_COLUMNS, cache, num_proc)
    split_hash = to_numpy(hashes, 'split_hash')
    sample_hash = to_numpy(hashes, 'sample_hash')
    is_blank = to_numpy(hashes, 'bytes') == 0
    if is_blank.all():
        raise UserError(f'{source} holds no stories, and {len(stories):,} blank ones')

    if has_validation:
        is_val = np.arange(len(stories)) >= n_train
    else:
        is_val = choose_validation(split_hash, is_blank)

    splits = {}
    stories = concatenate_datasets([stories, hashes.select_columns('bytes')], axis=1)
    for split, in_split in ('train', ~is_val & ~is_blank), ('val', is_val & ~is_blank):
        if not in_split.any():
            way_out = 'fill it'
            if split == 'val':
                way_out += ', or remove it, so that a part of the others is for validation'
            raise UserError(f'the {split} split of {source} holds no stories, or only blank ones: {way_out}')
        is_sampled = sample_hash <= data_percentage / 100 * 2.0**64
        is_sampled |= sample_hash == sample_hash[in_split].min()  # at least one story
        splits[split] = stories.select(np.flatnonzero(in_split & is_sampled))
    return splits, int(is_blank.sum())


HASH_COLUMNS = {'split_hash': 'uint64', 'sample_hash': 'uint64', 'bytes': 'int64'}


def hash_stories(batch):
    """Return two 64-bit hashes of each story and its size in bytes of UTF-8 (0 if it is blank).

    One hash decides the split and the other one the sample. With a single hash the stories with the lowest
    hashes would all be for validation, and a small sample of the training stories would be empty.
    """
    texts = ['' if text is None or text.isspace() else text for text in batch['text']]
    stories = [text.encode() for text in texts]
    digests = b''.join(blake2b(story, digest_size=16).digest() for story in stories)
    hashes = np.frombuffer(digests, '<u8').reshape(len(stories), 2)
    sizes = [len(story) for story in stories]
    return {'split_hash': hashes[:, 0], 'sample_hash': hashes[:, 1], 'bytes': sizes}


def to_numpy(dataset, name):
    """Return a column of numbers as a numpy array."""
    return dataset.with_format('arrow')[name][:].to_numpy()


def choose_validation(split_hash, is_blank):
    """Return a mask of the validation stories: the `val_percentage` percent with the lowest hashes."""
    percentage = val_percentage or 1.0
    lowest = split_hash[~is_blank].min()
    highest = split_hash[~is_blank].max()
    if lowest == highest:
        raise UserError(f'{source} holds only one story, and training and validation need one each')
    bound = np.uint64(percentage / 100 * 2**64)
    bound = max(bound, lowest)  # at least one story for validation
    bound = min(bound, highest - np.uint64(1))  # and one for training
    return split_hash <= bound


# tokenizer -------------------------------------------------------------------

def load_given_tokenizer():
    """Load the tokenizer that the settings ask for. Return None if one must be trained."""
    if tokenizer:
        enc = open_tokenizer(tokenizer)
        if encoding_type not in ('auto', enc.encoding):
            raise SettingError(f'{tokenizer} is {enc.encoding}: leave out --encoding_type {encoding_type}')
        return enc
    if wanted_encoding() == 'gpt2':
        return load_gpt2(offline)
    return None


def train_tokenizer(stories, cache):
    """Train a char or bpe tokenizer on the training stories."""
    if wanted_encoding() == 'char':
        found = map_stories(stories, collect_characters, 'collect characters', {'characters': 'string'},
                            cache, num_proc)
        return CharTokenizer.train(found['characters'])

    # bpe learns from a random sample of at most 100 MB
    order = np.random.default_rng(seed).permutation(len(stories))
    fits = to_numpy(stories, 'bytes')[order].cumsum() <= 100_000_000
    fits[0] = True  # at least one story
    sample = stories.select(np.sort(order[fits]))
    if vocab_size:
        return BPETokenizer.train(sample['text'], vocab_size)
    # Not 30,000: in a model 288 wide, the embeddings alone would be 8.6M parameters, more than all layers of
    # a 15M model.
    size = 1536 if source == 'sample' else 4096
    try:
        return BPETokenizer.train(sample['text'], size)
    except VocabSizeError as error:
        print(f'vocab_size: {error.nearest}, because {size} does not suit this text')
        return BPETokenizer.train(sample['text'], error.nearest)


def collect_characters(batch):
    """Return one row: a string with every character of the stories."""
    return {'characters': [unique_characters(batch['text'])]}


# encode and write ------------------------------------------------------------

# infilled: stories for infilling. too_short: chosen, but under three sentences. lost: characters that the
# tokenizer cannot write.
COUNTS = 'stories', 'tokens', 'bytes', 'infilled', 'too_short', 'lost'


def encode_stories(stories, split, enc, rate, cache):
    """Return a Dataset with one row per batch of stories: their tokens, and the COUNTS."""
    # uint16 tokens travel as bytes: Arrow takes several times as long for lists of integers
    columns = {'tokens_uint16': 'large_binary'} | dict.fromkeys(COUNTS, 'int64')
    return map_stories(stories, encode_batch, f'encode {split}', columns, cache, num_proc, enc=enc, rate=rate)


def encode_batch(batch, enc, rate):
    """Encode a batch of stories: for each the delimiter, then its tokens.

    In the fraction `rate` of the stories the middle comes last, for infilling (see data/infill.py).
    """
    ids, kinds = infill.encode(enc, batch['text'], rate)
    return {
        'tokens_uint16': [ids.astype('<u2').tobytes()],
        'stories': [len(kinds)],
        'tokens': [len(ids)],
        'bytes': [sum(batch['bytes'])],
        'infilled': [kinds.count(infill.INFILLED)],
        'too_short': [kinds.count(infill.TOO_SHORT)],
        'lost': [enc.n_lost(batch['text'], ids)],  # characters that the tokenizer cannot write
    }


def write_shards(encoded, split, folder):
    """Write the tokens of a split as shards into `folder`. Return the split's entry of meta.json."""
    writer = ShardWriter(folder, split)
    counts = dict.fromkeys(COUNTS, 0)
    for row in encoded:
        writer.write(np.frombuffer(row['tokens_uint16'], '<u2'))
        for name in COUNTS:
            counts[name] += row[name]
    return counts | {'shards': writer.close()}


# report ----------------------------------------------------------------------

def print_totals(split_meta, enc, seconds):
    """Print the number of tokens, the speed, and how many stories are for infilling."""
    total = {name: split_meta['train'][name] + split_meta['val'][name] for name in COUNTS}
    if infill_rate > 0:
        print(f"for infilling: {total['infilled']:,}; {total['too_short']:,} chosen but plain, as shorter "
              'than three sentences')
    if total['lost']:
        print(f"lost: {total['lost']:,} characters, for which {tokenizer} has no piece and no bytes")
    bytes_per_token = total['bytes'] / total['tokens']
    megabytes = total['bytes'] / 1e6
    print(f"tokens: {total['tokens']:,} of {bytes_per_token:.2f} bytes each "
          f'({enc.encoding}, {enc.vocab_size:,} ids)')
    print(f'text: {megabytes:.1f} MB in {seconds:.1f} s, {megabytes / seconds:.1f} MB/s')


def print_next_command():
    """Print the command that trains on this data."""
    words = ['python', script_path('train.py')]
    if source == 'sample' and infill_rate > 0:
        words.append(script_path('config/quickstart_infill.py'))
    elif source == 'sample':
        words.append(script_path('config/quickstart.py'))
    elif infill_rate > 0:
        words.append(script_path('config/infill.py'))
    if out_dir:
        words += ['--dataset', shlex.quote(out_dir)]
    print('next:', ' '.join(words))


def suggest_less_memory():
    """Return the advice for the message when memory runs out."""
    if num_proc != 1:
        return 'type --num_proc 1, for one process at a time'
    return 'name smaller files with --source, or what is between the stories of a long text with --separator'


if __name__ == '__main__':
    configure(globals())
    run(main, suggest_less_memory)
