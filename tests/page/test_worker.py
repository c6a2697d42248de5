"""The page's worker under Node: the messages it sends. Its model is replaced, and so is the clock."""

import base64
import re
import zlib

import pytest

from data.infill import prompt as infill_prompt
from data.tokenizer import CharTokenizer
from formats.page.page import worker_script
from formats.page.vocabulary import page_vocabulary
from tests.helpers.node import needs_node, run_js

pytestmark = needs_node
TOKENIZER = CharTokenizer.train(['Tim ran.'])
BLOCK_SIZE = 24
CONFIG = {'n_embd': 8, 'n_head': 2, 'n_kv_head': 2, 'n_layer': 0, 'block_size': BLOCK_SIZE, 'norm': 'rms',
          'norm_eps': 1e-5, 'position': 'rope', 'rope_theta': 10000, 'mlp': 'swiglu'}
ROWS = TOKENIZER.vocab_size
WEIGHTS = bytes(ROWS * 8 + ROWS * 2 + 8 * 4)  # an embedding and the last norm, all zeros
ABOUT = {'tokenizer': page_vocabulary(TOKENIZER), 'config': CONFIG, 'blockSize': BLOCK_SIZE,
         'tensors': [['embedding.weight', [ROWS, 8]], ['norm.weight', [8]]]}
WRITE = {'type': 'write', 'prompt': 'Tim', 'first': '', 'last': '', 'temperature': 0.7, 'topP': 0.9,
         'seed': 5, 'length': 3}

# Sends data.messages to the worker, each when the one before is done. Returns [its messages, the arguments of
# model.write]. The model yields data.drawn, or throws an entry that is an error. When the worker sends a
# message of the type data.stopAt, it is told to stop. Each look at the clock takes data.tick milliseconds.
SESSION = """
(async () => {
  const sent = [], asked = [];
  let now = 0;
  Object.defineProperty(globalThis, 'performance', {value: {now: () => now += data.tick}});
  globalThis.postMessage = message => {
    sent.push(message);
    if (message.type === data.stopAt) onmessage({data: {type: 'stop'}});
  };
  for (const message of data.messages) {
    await onmessage({data: message});
    if (message.type === 'load' && model && data.drawn) model = {
      *write(ids, settings) {
        asked.push([ids, settings]);
        for (const drawn of data.drawn) {
          if (drawn?.error) throw Error(drawn.error);
          yield drawn;
        }
      },
    };
  }
  return [sent, asked];
})()
"""


def load_message(weights=WEIGHTS):
    return {'type': 'load', 'about': ABOUT, 'weights': base64.b64encode(zlib.compress(weights)).decode()}


def session(*messages, drawn=None, stop_at='', tick=0):
    """Return (messages of the worker after it has loaded, what the model was asked)."""
    data = {'messages': [load_message(), *messages], 'drawn': drawn, 'stopAt': stop_at, 'tick': tick}
    sent, asked = run_js(f'{worker_script()}\n{SESSION}', data)
    assert sent[0] == {'type': 'ready', 'simd': True}
    return sent[1:], asked


def token(text, p=0.5, others=()):
    """Return what the model yields for the token of a character."""
    return {'id': id_of(text), 'p': p, 'others': [[id_of(other), q] for other, q in others]}


def id_of(character):
    return TOKENIZER.encode(character)[-1]


def pieces_of(sent):
    """Return all pieces in some messages of the worker."""
    return [piece for message in sent if message['type'] == 'pieces' for piece in message['pieces']]


def given(*texts):
    """Return the pieces that are not the model's own."""
    return [[text, None, []] for text in texts]


END = {'id': TOKENIZER.delimiter, 'p': 0.9, 'others': []}
DRAWN = [None, token('r', 0.25, [('a', 0.5)]), None, token('a'), None, token('n')]


def test_load_answers_that_it_is_ready():
    assert session() == ([], [])


def test_load_says_that_there_is_no_simd():
    script = re.sub("const KERNEL = '.*';", "const KERNEL = '';", worker_script(), count=1)
    [sent, _] = run_js(f'{script}\n{SESSION}', {'messages': [load_message()], 'tick': 0})
    assert sent == [{'type': 'ready', 'simd': False}]


@pytest.mark.parametrize('weights', [
    '', 'no base64!', base64.b64encode(zlib.compress(WEIGHTS)[:-1] + b'\0').decode()])
def test_load_reports_a_damaged_file(weights):
    data = {'messages': [load_message() | {'weights': weights}], 'tick': 0}
    [[answer], _] = run_js(f'{worker_script()}\n{SESSION}', data)
    assert answer['type'] == 'error' and answer['message'].startswith('This file is damaged')


def test_load_reports_weights_of_another_size():
    data = {'messages': [load_message(WEIGHTS + bytes(4))], 'tick': 0}
    [[answer], _] = run_js(f'{worker_script()}\n{SESSION}', data)
    assert answer['type'] == 'error' and answer['message'].startswith('The model has ')


def test_write_asks_the_model_to_continue_the_prompt():
    _, [[ids, settings]] = session(WRITE, drawn=DRAWN)
    assert ids == [TOKENIZER.delimiter, *TOKENIZER.encode('Tim')]
    assert settings == {'suppress': [TOKENIZER.blank, TOKENIZER.middle], 'temperature': 0.7, 'topP': 0.9,
                        'seed': 5, 'length': 3}


def test_write_sends_the_prompt_and_then_each_token_with_its_alternatives():
    sent, _ = session(WRITE, drawn=DRAWN)
    assert pieces_of(sent) == [
        *given('', '', 'T', 'i', 'm'),  # the delimiter, and the space that begins a story
        ['r', 0.25, [['a', 0.5]]], ['a', 0.5, []], ['n', 0.5, []]]
    assert sent[-1] == {'type': 'done', 'reason': 'length'}


def test_write_without_a_prompt_begins_with_the_delimiter():
    sent, [[ids, _]] = session(WRITE | {'prompt': ''}, drawn=DRAWN)
    assert ids == [TOKENIZER.delimiter]
    assert pieces_of(sent)[:2] == [*given(''), ['r', 0.25, [['a', 0.5]]]]


def test_write_ends_at_the_delimiter_and_does_not_show_it():
    sent, _ = session(WRITE, drawn=[token('r'), END, token('a')])
    assert pieces_of(sent)[-1] == ['r', 0.5, []]
    assert sent[-1] == {'type': 'done', 'reason': 'end'}


@pytest.mark.parametrize('stop_at, reason', [('pieces', 'stopped'), ('', 'length')])
def test_stop_ends_writing_within_a_turn(stop_at, reason):
    sent, _ = session(WRITE, drawn=DRAWN, stop_at=stop_at, tick=31)
    assert sent[-1] == {'type': 'done', 'reason': reason}
    assert (pieces_of(sent)[-1][0] == 'n') == (reason == 'length')


def test_stop_does_not_touch_the_next_story():
    sent, _ = session(WRITE, {'type': 'stop'}, WRITE, drawn=DRAWN, tick=31)
    assert [message['reason'] for message in sent if message['type'] == 'done'] == ['length', 'length']


@pytest.mark.parametrize('tick, n_messages', [(0.01, 1), (10, 2), (31, 7)])
def test_write_sends_pieces_every_30_milliseconds(tick, n_messages):
    """Six steps, each of which looks at the clock, and a last message."""
    sent, _ = session(WRITE, drawn=DRAWN, tick=tick)
    assert [message['type'] for message in sent] == ['pieces'] * n_messages + ['done']
    assert [text for text, _, _ in pieces_of(sent)] == ['', '', 'T', 'i', 'm', 'r', 'a', 'n']


def test_write_reports_tokens_per_second_without_the_prompt():
    """Three tokens, six steps that each look at the clock, and one look at the end: 7 * 2 ms."""
    [message, _], _ = session(WRITE, drawn=DRAWN, tick=2)
    assert message['perSecond'] == pytest.approx(3 / 0.014)


@pytest.mark.parametrize('n_tokens, fits', [(BLOCK_SIZE, True), (BLOCK_SIZE + 1, False)])
def test_write_refuses_a_prompt_that_is_longer_than_the_context(n_tokens, fits):
    prompt = 'a' * (n_tokens - 2)  # the delimiter and a space are tokens, too
    sent, _ = session(WRITE | {'prompt': prompt}, drawn=DRAWN)
    if fits:
        assert sent[-1]['type'] == 'done'
    else:
        assert sent == [{'type': 'error', 'message':
                         'That is 25 tokens, but the model reads at most 24. Shorten it.'}]


@pytest.mark.parametrize('length, asked_for, reason', [
    (2, 2, 'length'), (10, 10, 'length'), (11, 10, 'context')])
def test_middle_has_room_for_as_many_tokens_as_the_context(length, asked_for, reason):
    """A middle must see both sentences, so it cannot go on when the context is full."""
    middle = WRITE | {'first': 'Tim.', 'last': 'a ran.', 'length': length}
    sent, [[ids, settings]] = session(middle, drawn=DRAWN)
    assert ids == infill_prompt(TOKENIZER, 'Tim.', 'a ran.')
    assert len(ids) == 15  # so 10 tokens can be written: the last one need not be read
    assert settings['length'] == asked_for
    assert sent[-1] == {'type': 'done', 'reason': reason}
    assert pieces_of(sent)[:7] == [*given('', '', 'T', 'i', 'm', '.'), ['r', 0.25, [['a', 0.5]]]]


def test_a_story_may_be_longer_than_the_context():
    sent, [[_, settings]] = session(WRITE | {'length': 400}, drawn=DRAWN)
    assert settings['length'] == 400
    assert sent[-1] == {'type': 'done', 'reason': 'length'}


def test_a_prompt_with_one_sentence_left_over_is_no_middle():
    _, [[ids, _]] = session(WRITE | {'first': 'Tim.'}, drawn=DRAWN)
    assert ids == [TOKENIZER.delimiter, *TOKENIZER.encode('Tim')]


def byte(value):
    return {'id': 3 + value, 'p': 0.5, 'others': []}


def test_a_character_of_several_tokens_is_shown_with_the_last():
    sent, _ = session(WRITE, drawn=[byte(value) for value in '\u00e9'.encode()])
    assert [text for text, _, _ in pieces_of(sent)[5:]] == ['', '\u00e9']


def test_a_character_that_is_not_completed_becomes_one_replacement_character():
    sent, _ = session(WRITE, drawn=[byte(0xC3)])
    assert pieces_of(sent)[5:] == [['', 0.5, []], ['\ufffd', None, []]]


def test_an_error_of_the_model_is_reported():
    sent, _ = session(WRITE, drawn=[token('r'), {'error': 'No memory.'}])
    assert sent[-1] == {'type': 'error', 'message': 'No memory.'}
