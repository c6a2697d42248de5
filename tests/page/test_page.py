"""The page as people use it, in a real browser: with keys, a mouse and a finger.

The model is replaced by a worker that takes its words from `about.config`.
"""

import json

import pytest

from formats.page.page import assemble_page
from tests.helpers.pages import EVIL, needs_browser
from tools import browser as browsers

pytestmark = needs_browser
# in every page: the text of an element, and whether it is visible
HELPERS = '''const text = id => document.getElementById(id).textContent.trim();
             const shown = id => document.getElementById(id).checkVisibility({visibilityProperty: true});'''
PROMPT = 'Once upon a time'
STORY = [
    [',', 0.99, [[' there', 0.01], ['.', 0.0004]]],
    [' Tim', 0.5, [[' Mia', 0.3]]],
    ['\n', 0.05, [['\n\n', 0.9]]],
    ['saw', 0.7, []],
    ['', 0.6, []],
    [' a', 1, []],
    [' dog.', 0.2, []],
]
WHOLE = 'Once upon a time, Tim\nsaw a dog.'
DEFAULTS = {'temperature': '0.8', 'topP': '0.95', 'seed': '1337', 'length': '400'}

# A script for `before`: the worker gets no message until release().
HELD = '''const post = Worker.prototype.postMessage;
          Worker.prototype.postMessage = function (message) {
            Worker.prototype.postMessage = post;
            window.release = () => this.postMessage(message);
          };'''

# Its settings are in about.config: story, repeat (how often), echo (the story is the message itself), pace
# (ms between messages), atOnce (pieces per message), perSecond, simd, last (the last message), damaged and
# crash (errors on loading).
WORKER = r"""
'use strict';
let config, timer;
function load({about, weights}) {
  config = {pace: 1, atOnce: 1, repeat: 1, perSecond: 98.76, simd: true, last: {type: 'done', reason: 'end'},
    ...about.config};
  if (config.crash) throw Error(config.crash);
  const error = weights === 'AAECAw==' ? config.damaged : 'other weights';
  postMessage(error ? {type: 'error', message: error} : {type: 'ready', simd: config.simd});
}
function write(asked) {
  if (asked.prompt + asked.first === 'Too long') return postMessage({type: 'error', message: 'Shorten it.'});
  const given = (asked.first || asked.prompt).split(/(?= )/).map(word => [word, null, []]);
  const story = config.echo ? [[JSON.stringify(asked), 1, []]] : config.story;
  const rest = Array(config.repeat).fill(story).flat();
  postMessage({type: 'pieces', pieces: given, perSecond: 0});
  timer = setInterval(() => {
    if (!rest.length) return end(config.last);
    postMessage({type: 'pieces', pieces: rest.splice(0, config.atOnce), perSecond: config.perSecond});
  }, config.pace);
}
function end(message) {
  if (timer) postMessage(message);
  timer = clearInterval(timer);
}
const stop = () => end({type: 'done', reason: 'stopped'});
onmessage = ({data}) => ({load, write, stop})[data.type](data);
"""


def write_page(path, config, worker=WORKER, whole=1, **about):
    """Write a page with another worker. whole: the share of the file that is written."""
    defaults = {'title': 'Small stories', 'facts': [['parameters', '3,200,000'], ['validation loss', '1.23']],
                'infill': False, 'prompt': PROMPT, 'blockSize': 256, 'seed': 1337,
                'config': {'story': STORY} | config}
    page = assemble_page(defaults | about, worker, 'AAECAw==')
    path.write_text(page[:int(whole * len(page))])
    return path


@pytest.fixture
def page(window, tmp_path):
    """page(before=script, about={...}, **settings of the worker) opens a page and returns the window.

    It waits until the page is ready, unless ready=False.
    """
    def open_page(before='', ready=True, worker=WORKER, whole=1, about=None, **config):
        path = write_page(tmp_path / 'page.html', config, worker, whole, **about or {})
        window.open(path, HELPERS + before)
        if ready:
            window.wait("text('status') === 'Ready to write.'")
        return window

    return open_page


def finished(window, status='The story is finished.'):
    """Wait until the story has ended with this status; return its text."""
    window.wait(f"text('status') === {json.dumps(status)}")
    return window.js("text('story')")


def echoed(window):
    """Return the message that the page sent to a worker with echo=True."""
    window.wait("story.querySelector('.piece') && story.ariaBusy === 'false'")
    return json.loads(window.js("story.querySelector('.piece').textContent"))


def fill(window, **texts):
    """Type into fields, as `temperature='0.3'`."""
    for field, text in texts.items():
        window.click(f'#{field}')
        window.type(text)


def write_middle(page, first, last, **config):
    """Ask a page for the middle between two sentences; return the window."""
    window = page(about={'infill': True}, **config)
    window.click('#middle')
    fill(window, first=first, last=last)
    window.press('Enter')
    return window


def tip(window):
    """Return the text of the tip."""
    return window.js("$('tip').textContent")


# loading ----------------------------------------------------------------------

def test_page_shows_title_settings_and_facts_while_the_model_loads(page):
    window = page(HELD, ready=False)
    assert window.js("text('status')").startswith('Loading the model')
    assert window.js("[text('title'), document.title, form.prompt.value]") == ['Small stories'] * 2 + [PROMPT]
    assert {name: window.js(f'form.{name}.value') for name in DEFAULTS} == DEFAULTS
    assert window.js("$('facts').innerText").split('\n') == [
        'parameters', '3,200,000', 'validation loss', '1.23']
    assert not window.js("shown('ways') || shown('slow') || shown('legend')")
    assert window.js("$('stop').ariaDisabled") == 'true'
    window.js('release()')
    window.wait("text('status') === 'Ready to write.'")


def test_page_frees_the_weights_and_the_url_of_the_worker(page):
    window = page('URL.revokeObjectURL = url => { window.gone = url; };')
    assert window.js("text('weights')") == ''
    assert window.js('gone') == window.requests[-1] and window.js('gone').startswith('blob:')


def test_write_before_the_model_is_ready_starts_when_it_is(page):
    window = page(HELD, ready=False)
    window.click('#again')
    assert window.js("text('status')").endswith('The story will begin as soon as it is ready.')
    window.js('release()')
    assert finished(window) == WHOLE and window.js('form.seed.value') == '1338'


def test_escape_before_the_model_is_ready_cancels(page):
    window = page(HELD, ready=False)
    window.click('#write')
    window.press('Escape')
    window.js('release()')
    assert finished(window, 'Ready to write.') == ''


@pytest.mark.parametrize('whole', [0.6, 0.999])
def test_incomplete_file_says_so_and_hides_the_form(page, whole):
    window = page(ready=False, whole=whole, worker=WORKER + '//' + 'x' * 20_000)
    assert window.wait("text('status')").startswith('This file is incomplete.')
    assert window.js("$('status').className === 'wrong' && !shown('form') && !shown('written')")


@pytest.mark.parametrize('config, line', [
    ({'damaged': 'The weights are damaged.'}, 'The weights are damaged.'),
    ({'before': 'delete window.Worker;'}, 'This browser does not let a page from a file start a worker'),
    ({'before': "window.Worker = class { postMessage() { setTimeout(() => this.onerror({})) } };"},
     "The model stopped with an error: it did not start")])
def test_model_that_cannot_start_says_why_and_hides_the_form(page, config, line):
    window = page(ready=False, **config)
    assert window.wait("$('status').className === 'wrong' && text('status')").startswith(line)
    assert not window.js("shown('form') || shown('written')")


def test_worker_that_crashes_says_why_and_hides_the_form(page):
    window = page(ready=False, crash='no memory')
    window.wait("text('status').endsWith('with an error: Uncaught Error: no memory')")
    assert not window.js("shown('form')")
    for _ in range(500):  # what the console has may come later
        if not window.complaints:
            window.js('new Promise(done => setTimeout(done, 10))')
    assert window.complaints
    window.complaints = []


def test_page_warns_of_a_browser_without_simd(page):
    assert page(simd=False).js("shown('slow')")


# stories ----------------------------------------------------------------------

@pytest.mark.parametrize('held', [browsers.CTRL, browsers.META])
def test_ctrl_enter_in_the_prompt_writes(page, held):
    window = page()
    fill(window, prompt='Mia')
    window.press('Enter', held)
    assert finished(window) == WHOLE.replace(PROMPT, 'Mia')
    assert window.js("[...story.querySelectorAll('b')].map(b => b.textContent)") == ['Mia']
    assert window.js('form.prompt.value') == 'Mia'  # and no new line


def test_ctrl_enter_on_a_button_writes_once(page):
    window = page(echo=True)
    window.js("$('again').focus()")
    window.press('Enter', browsers.CTRL)
    assert echoed(window)['seed'] == 1337 == window.js('form.seed.valueAsNumber')


def test_prompt_is_bold_and_the_rest_is_not(page):
    window = page()
    window.click('#write')
    assert finished(window) == WHOLE
    weights = window.js('[...story.children].map(node => getComputedStyle(node).fontWeight)')
    assert weights == 4 * ['700'] + 7 * ['400']
    assert window.js("[...story.querySelectorAll('b')].map(node => node.textContent).join('')") == PROMPT
    assert window.js("text('speed')") == '7 tokens, 99 per second'


def test_words_appear_one_by_one_and_earlier_nodes_stay(page):
    window = page(pace=5, perSecond=7.77)
    window.js("""[window.lengths, window.firsts, window.seen, window.told] = [[], new Set(), new Set(), []];
        new MutationObserver(() => {
          lengths.push(story.children.length);
          firsts.add(story.firstChild);
          seen.add([text('status'), story.ariaBusy, getComputedStyle(story, '::after').content].join());
        }).observe(story, {childList: true});
        new MutationObserver(() => told.push(text('status'))).observe($('status'), {childList: true});""")
    window.click('#write')
    finished(window)
    assert window.js('[...seen]') == ['Writing …,true,"▍" / ""']
    assert window.js('[lengths, firsts.size]') == [[*range(4, 12)], 1]
    assert window.js('told') == ['Writing …', 'The story is finished.']  # which a screen reader reads
    assert window.js("[text('speed'), story.ariaBusy]") == ['7 tokens, 7.8 per second', 'false']
    assert window.js("getComputedStyle(story, '::after').content") == 'none'


def test_settings_reach_the_worker(page):
    window = page(echo=True)
    typed = {'prompt': ' A\tcat. ', 'temperature': 0.3, 'topP': 1, 'seed': 0, 'length': 1000}
    for field, value in typed.items():
        fill(window, **{field: str(value)})
    window.press('Enter')
    assert echoed(window) == {'type': 'write', 'first': '', 'last': ''} | typed


@pytest.mark.parametrize('seed, further', [(1337, 1338), (999999999, 0)])
def test_again_sends_the_same_with_the_next_seed(page, seed, further):
    window = page(echo=True, about={'seed': seed})
    window.click('#write')
    before = echoed(window)
    window.js('story.replaceChildren()')
    window.click('#again')
    assert echoed(window) == before | {'seed': further} and before['seed'] == seed
    assert window.js('form.seed.value') == str(further)


@pytest.mark.parametrize('how', ['mouse', 'keys'])
def test_stop_ends_the_story(page, how):
    window = page(pace=20, repeat=100)
    window.click('#write')
    window.wait("!!story.querySelector('.piece')")
    assert window.js("$('stop').ariaDisabled") == 'false'
    if how == 'mouse':
        window.click('#stop')
    else:
        window.press('Escape')
    assert finished(window, 'Stopped.').startswith('Once upon a time,')
    assert window.js("[$('stop').ariaDisabled, story.ariaBusy]") == ['true', 'false']
    length = window.js('story.childNodes.length')
    window.click('#stop')
    assert window.js("text('status')") == 'Stopped.' and window.js('story.childNodes.length') == length


def test_again_while_writing_replaces_the_story(page):
    window = page(pace=10, repeat=1000)
    window.click('#write')
    window.wait("!!(window.first = story.querySelector('.piece'))")
    window.click('#again')
    window.wait("!first.isConnected && !!story.querySelector('.piece')")
    assert window.js("text('story')").startswith(PROMPT) and window.js('form.seed.value') == '1338'
    window.press('Escape')
    finished(window, 'Stopped.')


@pytest.mark.parametrize('reason, line', [
    ('length', 'Stopped at the length of 7 tokens.'),
    ('context', 'Stopped: the model can see only 256 tokens at once.')])
def test_status_says_why_a_story_was_cut(page, reason, line):
    window = page(last={'type': 'done', 'reason': reason})
    fill(window, length='7')
    window.press('Enter')
    assert finished(window, line) == WHOLE


def test_error_of_the_worker_is_shown_and_the_next_story_is_written(page):
    window = page()
    window.click('#write')
    finished(window)
    fill(window, prompt='Too long')
    window.click('#write')
    assert finished(window, 'Shorten it.') == '' and window.js("text('speed')") == ''
    assert window.js("[$('status').className, story.ariaBusy]") == ['wrong', 'false']
    fill(window, prompt='Mia')
    window.click('#write')
    assert finished(window).startswith('Mia,') and window.js("$('status').className") == ''


def test_error_before_a_middle_leaves_no_story(page):
    assert finished(write_middle(page, 'Too long', 'Tim ran.'), 'Shorten it.') == ''


def test_error_while_writing_keeps_the_story_so_far(page):
    window = page(last={'type': 'error', 'message': 'No memory.'})
    window.click('#write')
    assert finished(window, 'No memory.') == WHOLE


def test_small_window_scrolls_to_the_buttons_and_the_story(page):
    window = page(about={'facts': 30 * [['one', 'fact']]})
    window.look(height=600)
    window.click('#write')
    finished(window)
    assert window.js("Math.round($('buttons').getBoundingClientRect().top)") == 16
    window.look()
    window.js('scrollTo(0, 0)')
    window.click('#write')
    assert window.js('scrollY') == 0


def test_copying_gives_the_plain_story(page):
    window = page()
    window.click('#write')
    finished(window)
    window.click('#colours')
    window.move('.piece')
    window.js('getSelection().selectAllChildren(story)')
    window.press('c', browsers.CTRL)
    fill(window, prompt='')
    window.press('v', browsers.CTRL)
    assert window.wait('form.prompt.value') == WHOLE


# wrong input ------------------------------------------------------------------

@pytest.mark.parametrize('field, typed, line', [
    ('temperature', 'abc', 'A number from 0 to 2.'), ('temperature', '2.1', 'A number from 0 to 2.'),
    ('topP', '', 'A number from 0.01 to 1.'), ('topP', '0', 'A number from 0.01 to 1.'),
    ('seed', '1.5', 'A whole number from 0 to 999999999.'),
    ('seed', '-1', 'A whole number from 0 to 999999999.'),
    ('length', '1001', 'A whole number from 1 to 1000.')])
def test_wrong_number_is_explained_next_to_its_field(page, field, typed, line):
    window = page()
    fill(window, **{field: typed})
    window.click('#again')
    lines = window.js("[...document.querySelectorAll('.wrong')].map(node => node.textContent)")
    assert ''.join(lines) == line
    assert window.js(f"shown('{field}-wrong') && !shown('{field}-hint')")
    assert window.js('[document.activeElement.id, form.seed.value]') == [
        field, typed if field == 'seed' else '1337']
    label = window.js(f"document.querySelector('[for={field}]').textContent")
    assert next(said for _, name, said in window.heard() if name == label).startswith(line)
    assert window.js(f'form.{field}.ariaInvalid') == 'true'
    assert window.js("[text('status'), text('story')]") == ['Ready to write.', '']
    window.type(DEFAULTS[field])
    assert window.js(f"text('{field}-wrong') + form.{field}.ariaInvalid") == 'false'
    window.press('Enter')
    assert finished(window) == WHOLE


@pytest.mark.parametrize('missing', ['first', 'last'])
def test_middle_needs_both_sentences(page, missing):
    window = write_middle(page, **{'first': 'Tim ran.', 'last': 'Tim ran.'} | {missing: ' '})
    assert window.js(f"text('{missing}-wrong')") == 'Both sentences are needed.'
    assert window.js("document.querySelectorAll('[aria-invalid=true]').length") == 1
    assert window.js("[document.activeElement.id, text('story')]") == [missing, '']


# a middle between two sentences -----------------------------------------------

def test_middle_can_be_asked_for_by_keys_alone(page):
    window = page(about={'infill': True}, pace=60)
    window.press('Tab')
    assert window.js("shown('prompt') && !shown('first')")
    window.press('ArrowRight')
    assert window.js("!shown('prompt') && shown('first') && shown('last')")
    for sentence in ' Tim ran. ', ' Tim slept. ':
        window.press('Tab')
        window.type(sentence)
    window.press('Enter')
    assert window.wait("""story.querySelector('.piece') && [  // both ends stand there from the beginning
        story.firstChild, story.lastChild].map(node => node.textContent)""") == ['Tim', 'Tim slept.']
    assert window.js("getComputedStyle(story.lastChild, '::before').content") == '"▍" / ""'
    assert finished(window) == 'Tim ran., Tim\nsaw a dog. Tim slept.'
    bold = window.js("[...story.querySelectorAll('b')].map(b => b.textContent).join('|')")
    assert bold == 'Tim| ran.|Tim slept.'


def test_worker_gets_the_sentences_or_the_prompt(page):
    window = write_middle(page, ' Tim ran. ', ' Tim slept. ', echo=True)
    message = echoed(window)
    assert [message[key] for key in ('prompt', 'first', 'last')] == ['', 'Tim ran.', 'Tim slept.']
    window.js('story.replaceChildren()')
    window.click('#ways label')
    window.click('#write')
    message = echoed(window)
    assert [message[key] for key in ('prompt', 'first', 'last')] == [PROMPT, '', '']


def test_middle_that_ends_in_white_space_gets_no_other_space(page):
    window = write_middle(page, 'Tim ran.', 'Tim ran.', story=[[' He fell.\n\n', 0.5, []]])
    assert finished(window) == 'Tim ran. He fell.\n\nTim ran.'


# colours and the tip ----------------------------------------------------------

def test_switch_colours_tokens_before_and_after_it(page):
    plain = {('rgba(0, 0, 0, 0)', '0px', 'none', 'null', -1)}
    drawn = """[...story.querySelectorAll('.piece')].map(node => [getComputedStyle(node).backgroundColor,
        getComputedStyle(node).borderBottomWidth, getComputedStyle(node, '::before').content,
        String(node.role), node.tabIndex])"""
    window = page(pace=15, repeat=100)
    window.click('#write')
    window.wait("story.querySelectorAll('.piece').length >= 3")
    assert {*map(tuple, window.js(drawn))} == plain and not window.js("shown('legend')")
    window.js("colours.focus(); window.before = story.querySelectorAll('.piece').length")
    window.press(' ')
    window.wait("shown('legend') && story.querySelectorAll('.piece').length > before + 7")
    window.press('Escape')
    finished(window, 'Stopped.')
    heats = window.js("""[0.99, 0.5, 0.05, 0.7, 0.6, 1, 0.2].map(p => {
        const node = document.querySelector('.swatch').cloneNode();
        node.style.setProperty('--heat', `${90 * (1 - p)}%`);
        document.body.append(node);
        return getComputedStyle(node).backgroundColor;
    })""")
    signs = {2: '"↵" / ""', 4: '"◌" / ""'}
    expected = [[heat, '2px' if i == 2 else '0px', signs.get(i, 'none'), 'button', -1]
                for i, heat in enumerate(heats)]
    pieces = window.js(drawn)
    assert pieces[0] == [*expected[0][:-1], 0] and pieces[1:] == (100 * expected)[1:len(pieces)]
    legend = window.js(
        "[...legend.querySelectorAll('.swatch')].map(node => getComputedStyle(node).backgroundColor)")
    assert legend[:2] == [heats[5], heats[1]] and len({*heats, *legend}) == 8
    window.press(' ')
    assert {*map(tuple, window.js(drawn))} == plain and not window.js("shown('legend')")


def coloured_story(page, **config):
    """Return a window with a finished story in colours."""
    window = page(**config)
    window.click('#colours')
    window.click('#write')
    finished(window)
    return window


def test_tip_follows_the_mouse(page):
    window = coloured_story(page)
    window.move('.piece')
    assert tip(window) == ',: 99%\nor ␣there: 1.0%\nor .: 0.0%'
    token, box = (window.js(f'{node}.getBoundingClientRect().toJSON()')
                  for node in ("document.querySelector('.piece')", "$('tip')"))
    assert box['left'] == token['left'] and box['top'] == token['bottom'] + 4
    window.move('.piece', 2)
    assert tip(window) == '↵: 5.0%\nor ↵↵: 90%'
    window.move('.piece', 4)
    assert tip(window) == '(part of a character): 60%'
    window.move('#story b')
    assert tip(window) == '' and not window.js("shown('tip')")
    window.move('.piece')
    window.press('Escape')
    assert tip(window) == ''


def test_second_click_on_a_token_shows_the_tip_again(page):
    window = coloured_story(page)
    for _ in range(2):  # the second one neither enters the token nor gives it the focus
        window.click('.piece')
        assert tip(window).startswith(',: 99%')


def test_tip_disappears_with_the_colours_and_with_the_next_story(page):
    window = coloured_story(page, pace=20)
    for end in 'form.requestSubmit()', 'colours.click()':
        window.move('.piece')
        assert tip(window)
        window.js(end)
        assert not tip(window)
        window.move('#title')
        window.wait("story.querySelector('.piece') && story.ariaBusy === 'false'")
    window.move('.piece')
    assert not tip(window)


def test_arrow_keys_move_between_tokens_and_tab_comes_back(page):
    window = coloured_story(page)
    focused = "[document.activeElement.textContent, $('tip').textContent.split(':')[0]]"
    window.js("$('colours').focus()")
    window.press('Tab')
    assert window.js(focused) == [',', ',']
    window.press('ArrowRight')
    assert window.js(focused) == [' Tim', '␣Tim']
    window.press('ArrowRight', times=9)
    assert window.js(focused) == [' dog.', '␣dog.']
    window.press('ArrowLeft')
    assert window.js(focused) == [' a', '␣a']
    window.press('Tab', browsers.SHIFT)
    assert window.js('document.activeElement === colours') and not tip(window)
    window.press('Tab')
    assert window.js(focused) == [' a', '␣a']
    window.press('ArrowLeft', times=9)
    assert window.js(focused) == [',', ',']
    assert window.js("story.querySelectorAll('[tabindex=\"0\"]').length") == 1


def test_finger_shows_and_hides_the_tip(page):
    window = coloured_story(page)
    window.look(390, 844)
    for nth, name in (1, '␣Tim'), (0, ','):
        window.tap('.piece', nth)
        window.wait(f"$('tip').textContent.startsWith({name + ':'!r})")
    window.tap('#heading')
    window.wait("$('tip').textContent === ''")
    window.js("addEventListener('pointerdown', () => { window.down = true; })")
    window.touch('.piece')  # it may be about to scroll
    window.wait('window.down')
    assert tip(window) == ''
    window.lift()


@pytest.mark.parametrize('p, shown', [
    (0, '0.0%'), (0.0944, '9.4%'), (0.0956, '10%'), (0.994, '99%'), (0.996, '99.6%'), (1, '100.0%')])
def test_tip_shows_a_decimal_near_0_and_1(page, p, shown):
    window = coloured_story(page, story=[['a', p, []]])
    window.move('.piece')
    assert tip(window) == f'a: {shown}'


def test_tip_stays_in_the_window(page):
    long = [[' a', 0.5, [['x' * 60, 0.1]] * 4]]
    window = coloured_story(page, story=long, repeat=500, atOnce=50)
    window.look(390, 600)
    for nth in (0, 200, 203, 206, 480):
        window.move('.piece', nth)
        assert window.js("""(() => { const {left, right, top, bottom} = $('tip').getBoundingClientRect();
            return left >= 8 && right <= 382 && top >= 0 && bottom <= 600 && bottom - top > 50; })()""")
        assert window.js('document.documentElement.scrollWidth') == 390


def test_tip_keeps_its_left_edge_in_a_window_that_is_too_narrow(page):
    window = coloured_story(page, story=[[' a', 0.5, [['x' * 60, 0.1]]]])
    window.look(280, 600)
    window.move('.piece')
    assert window.js("$('tip').getBoundingClientRect().left") == 8


# safety, accessibility, speed -------------------------------------------------

def test_markup_is_shown_as_text(page):
    pieces = [[EVIL, 0.5, [[EVIL, 0.4]]], ['<b>', 0.5, []]]
    about = {'title': EVIL, 'facts': [[EVIL, EVIL]], 'prompt': EVIL, 'infill': True}
    window = page(story=pieces, about=about)
    window.click('#colours')
    window.click('#write')
    assert finished(window) == EVIL + EVIL + '<b>'
    window.move('.piece')
    assert EVIL.replace(' ', '␣') in window.js("text('tip')")
    window.click('#middle')
    fill(window, first=EVIL, last=EVIL)
    window.press('Enter')
    assert finished(window).endswith(' ' + EVIL)
    assert window.js("[text('title'), document.title, text('facts')]") == [EVIL, EVIL, EVIL * 2]
    assert not window.js("window.evil || document.querySelector('img')")


def test_policy_refuses_connections(page):
    window = page()
    assert window.js("fetch('https://example.com').catch(() => 'refused')") == 'refused'
    assert 'Content Security Policy' in str(window.complaints)  # and a test would see it
    window.complaints, window.requests = [], []


def test_every_field_has_a_name_for_screen_readers(page):
    window = page(about={'infill': True})
    roles = {'textbox', 'spinbutton', 'radio', 'switch', 'button', 'region'}
    fields = {'The rest of a story', 'The middle between two sentences', 'Beginning of the story',
              'Temperature', 'Top-p', 'Seed', 'Length', 'Write', 'Stop', 'Again', 'Story',
              'Colour each token by how likely it was'}
    assert {name for role, name, _ in window.heard() if role in roles} == fields
    window.click('#middle')
    fields = fields - {'Beginning of the story'} | {'First sentence', 'Last sentence'}
    assert {name for role, name, _ in window.heard() if role in roles} == fields
    assert ('button', 'Again', 'Again uses the next seed.') in window.heard()
    live = "[...document.querySelectorAll('[aria-live], [role=status]')].map(node => node.id)"
    assert window.js(live) == ['status', 'tip']  # and not the story


def test_tab_visits_all_fields_and_focus_is_visible(page):
    window = page()
    order = []
    for _ in range(9):
        window.press('Tab')
        order.append(window.js('document.activeElement.id'))
        assert window.js('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    assert order == ['prompt', *DEFAULTS, 'write', 'stop', 'again', 'colours']


@pytest.mark.parametrize('width', [320, 390, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    window = page(story=[['x' * 3000, 0.5, []]], about={
        'infill': True, 'title': 'T' * 300, 'facts': [['trained on', 'y' * 300]]})
    window.look(width)
    window.click('#write')
    finished(window)
    window.click('#middle')
    assert window.js('document.documentElement.scrollWidth <= innerWidth')


def test_colours_follow_the_dark_mode(page):
    window, paper = page(), []
    for dark in False, True:
        window.look(dark=dark)
        paper.append(window.js('getComputedStyle(document.body).backgroundColor'))
    assert paper == ['rgb(250, 248, 243)', 'rgb(22, 24, 29)']


def test_nothing_blinks_with_reduced_motion(page):
    window = page(pace=20, repeat=100)
    window.click('#write')
    for still, name in (False, 'blink'), (True, 'none'):
        window.look(still=still)
        assert window.js("getComputedStyle(story, '::after').animationName") == name
    window.press('Escape')
    finished(window, 'Stopped.')


def test_a_thousand_tokens_are_shown_as_fast_as_they_come(page):
    window = page(story=[[' wonderful', 0.3, [[' a', 0.2]] * 4]], repeat=1000, atOnce=10, pace=4)
    window.click('#colours')
    window.js('window.start = performance.now()')
    window.click('#write')
    finished(window)
    assert window.js('performance.now() - start') < 4000
    assert window.js('story.children.length') == 1004
