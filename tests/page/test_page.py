"""The page that writes stories, as people use it: a real browser, keys, a mouse and a finger.

In the model's place stands a worker that takes its words from `about.config`.
"""

import json
import re

import pytest

from formats.page.page import assembled
from tools import browser as browsers

pytestmark = pytest.mark.skipif(not browsers.PROGRAM, reason='no Chromium here')
HELPERS = '''const text = id => document.getElementById(id).textContent.trim();
             const shown = id => document.getElementById(id).checkVisibility({visibilityProperty: true});'''
EVIL = '</script><script>window.evil = 1</script><img src=x onerror="window.evil = 1">'
PROMPT = 'Once upon a time'
STORY = [[',', 0.99, [[' there', 0.01], ['.', 0.0004]]], [' Tim', 0.5, [[' Mia', 0.3]]],
         ['\n', 0.05, [['\n\n', 0.9]]], ['saw', 0.7, []], ['', 0.6, []], [' a', 1, []], [' dog.', 0.2, []]]
WHOLE = 'Once upon a time, Tim\nsaw a dog.'
NUMBERS = {'temperature': '0.8', 'topP': '0.95', 'seed': '1337', 'length': '400'}
# The worker hears of nothing until release().
HELD = '''const post = Worker.prototype.postMessage;
          Worker.prototype.postMessage = function (message) {
            Worker.prototype.postMessage = post;
            window.release = () => this.postMessage(message);
          };'''
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


def assemble(path, config, worker=WORKER, whole=1, **about):
    """A page with another worker."""
    about = {'title': 'Small stories', 'facts': [['parameters', '3,200,000'], ['validation loss', '1.23']],
             'infill': False, 'prompt': PROMPT, 'blockSize': 256, 'seed': 1337,
             'config': {'story': STORY} | config} | about
    page = assembled(about, worker, 'AAECAw==')
    path.write_text(page[:int(whole * len(page))])
    return path


@pytest.fixture(scope='module')
def window():
    browser = browsers.Browser()
    yield browser
    browser.close()


@pytest.fixture
def page(window, tmp_path):
    """page(setting of the worker=..., about=..., before=...) is the window, with a page ready to write.
    In the end it has asked for nothing from outside, nor has it complained."""
    def opened(before='', ready=True, worker=WORKER, whole=1, about=None, **config):
        path = assemble(tmp_path / 'page.html', config, worker, whole, **about or {})
        window.open(path, HELPERS + before)
        if ready:
            window.wait("text('status') === 'Ready to write.'")
        return window

    window.look()
    yield opened
    assert not [url for url in window.requests if not re.match('(file|blob|data):', url)]
    assert window.complaints == []


def over(window, status='The story is over.'):
    """The story's text, once it has ended so."""
    window.wait(f"text('status') === {json.dumps(status)}")
    return window.js("text('story')")


def asked(window):
    """What the page asked of a worker that writes just this."""
    window.wait("story.querySelector('.piece') && story.ariaBusy === 'false'")
    return json.loads(window.js("story.querySelector('.piece').textContent"))


def fill(window, **texts):
    for field, text in texts.items():
        window.click(f'#{field}')
        window.type(text)


def between(page, first, last, **config):
    """A page that was asked for the middle between two sentences."""
    window = page(about={'infill': True}, **config)
    window.click('#middle')
    fill(window, first=first, last=last)
    window.press('Enter')
    return window


def tip(window):
    return window.js("$('tip').textContent")


# Before a story

def test_what_stands_in_the_page_is_shown_while_the_model_is_read(page):
    window = page(HELD, ready=False)
    assert window.js("text('status')").startswith('Loading the model')
    assert window.js("[text('title'), document.title, form.prompt.value]") == ['Small stories'] * 2 + [PROMPT]
    assert {name: window.js(f'form.{name}.value') for name in NUMBERS} == NUMBERS
    assert window.js("$('facts').innerText").split('\n') == [
        'parameters', '3,200,000', 'validation loss', '1.23']
    assert not window.js("shown('ways') || shown('slow') || shown('legend')")
    assert window.js("$('stop').ariaDisabled") == 'true'
    window.js('release()')
    window.wait("text('status') === 'Ready to write.'")


def test_what_is_needed_no_more_is_let_go(page):
    window = page('URL.revokeObjectURL = url => { window.gone = url; };')
    assert window.js("text('weights')") == ''
    assert window.js('gone') == window.requests[-1] and window.js('gone').startswith('blob:')


def test_what_is_asked_while_the_model_is_read_is_written_then(page):
    window = page(HELD, ready=False)
    window.click('#again')
    assert window.js("text('status')").endswith('The story begins as soon as it is there.')
    window.js('release()')
    assert over(window) == WHOLE and window.js('form.seed.value') == '1338'


def test_what_is_asked_while_the_model_is_read_can_be_taken_back(page):
    window = page(HELD, ready=False)
    window.click('#write')
    window.press('Escape')
    window.js('release()')
    assert over(window, 'Ready to write.') == ''


@pytest.mark.parametrize('whole', [0.6, 0.999])
def test_a_file_that_is_cut_says_so_and_has_no_form(page, whole):
    window = page(ready=False, whole=whole, worker=WORKER + '//' + 'x' * 20_000)
    assert window.wait("text('status')").startswith('This file is not whole: ')
    assert window.js("$('status').className === 'wrong' && !shown('form') && !shown('written')")


@pytest.mark.parametrize('config, line', [
    ({'damaged': 'The weights are damaged.'}, 'The weights are damaged.'),
    ({'before': 'delete window.Worker;'}, 'This browser lets no page from a file start a worker'),
    ({'before': "window.Worker = class { postMessage() { setTimeout(() => this.onerror({})) } };"},
     "The model's program failed: it did not start")])
def test_a_model_that_cannot_start_says_why_and_has_no_form(page, config, line):
    window = page(ready=False, **config)
    assert window.wait("$('status').className === 'wrong' && text('status')").startswith(line)
    assert not window.js("shown('form') || shown('written')")


def test_a_worker_that_fails_says_why(page):
    window = page(ready=False, crash='no memory')
    window.wait("text('status').endsWith('failed: Uncaught Error: no memory')")
    assert not window.js("shown('form')")
    for _ in range(500):  # what the console has may come later
        if not window.complaints:
            window.js('new Promise(done => setTimeout(done, 10))')
    assert window.complaints
    window.complaints = []


def test_a_browser_without_simd_is_told_of(page):
    assert page(simd=False).js("shown('slow')")


# Stories

@pytest.mark.parametrize('held', [browsers.CTRL, browsers.META])
def test_ctrl_enter_in_the_prompt_writes(page, held):
    window = page()
    fill(window, prompt='Mia')
    window.press('Enter', held)
    assert over(window) == WHOLE.replace(PROMPT, 'Mia')
    assert window.js("[...story.querySelectorAll('b')].map(b => b.textContent)") == ['Mia']
    assert window.js('form.prompt.value') == 'Mia'  # and no new line


def test_ctrl_enter_on_a_button_writes_once(page):
    window = page(echo=True)
    window.js("$('again').focus()")
    window.press('Enter', browsers.CTRL)
    assert asked(window)['seed'] == 1337 == window.js('form.seed.valueAsNumber')


def test_the_prompt_is_bold_and_what_the_model_wrote_is_not(page):
    window = page()
    window.click('#write')
    assert over(window) == WHOLE
    weights = window.js('[...story.children].map(node => getComputedStyle(node).fontWeight)')
    assert weights == 4 * ['700'] + 7 * ['400']
    assert window.js("[...story.querySelectorAll('b')].map(node => node.textContent).join('')") == PROMPT
    assert window.js("text('speed')") == '7 tokens, 99 a second'


def test_words_appear_as_they_are_written_and_those_before_them_stay(page):
    window = page(pace=5, perSecond=7.77)
    window.js("""[window.lengths, window.firsts, window.seen, window.told] = [[], new Set(), new Set(), []];
        new MutationObserver(() => {
          lengths.push(story.children.length);
          firsts.add(story.firstChild);
          seen.add([text('status'), story.ariaBusy, getComputedStyle(story, '::after').content].join());
        }).observe(story, {childList: true});
        new MutationObserver(() => told.push(text('status'))).observe($('status'), {childList: true});""")
    window.click('#write')
    over(window)
    assert window.js('[...seen]') == ['Writing …,true,"▍" / ""']
    assert window.js('[lengths, firsts.size]') == [[*range(4, 12)], 1]
    assert window.js('told') == ['Writing …', 'The story is over.']  # which a screen reader reads
    assert window.js("[text('speed'), story.ariaBusy]") == ['7 tokens, 7.8 a second', 'false']
    assert window.js("getComputedStyle(story, '::after').content") == 'none'


def test_the_settings_reach_the_worker(page):
    window = page(echo=True)
    typed = {'prompt': ' A\tcat. ', 'temperature': 0.3, 'topP': 1, 'seed': 0, 'length': 1000}
    for field, value in typed.items():
        fill(window, **{field: str(value)})
    window.press('Enter')
    assert asked(window) == {'type': 'write', 'first': '', 'last': ''} | typed


@pytest.mark.parametrize('seed, further', [(1337, 1338), (999999999, 0)])
def test_again_takes_the_next_seed_and_else_the_same(page, seed, further):
    window = page(echo=True, about={'seed': seed})
    window.click('#write')
    before = asked(window)
    window.js('story.replaceChildren()')
    window.click('#again')
    assert asked(window) == before | {'seed': further} and before['seed'] == seed
    assert window.js('form.seed.value') == str(further)


@pytest.mark.parametrize('how', ['mouse', 'keys'])
def test_a_story_can_be_stopped(page, how):
    window = page(pace=20, repeat=100)
    window.click('#write')
    window.wait("!!story.querySelector('.piece')")
    assert window.js("$('stop').ariaDisabled") == 'false'
    if how == 'mouse':
        window.click('#stop')
    else:
        window.press('Escape')
    assert over(window, 'Stopped.').startswith('Once upon a time,')
    assert window.js("[$('stop').ariaDisabled, story.ariaBusy]") == ['true', 'false']
    length = window.js('story.childNodes.length')
    window.click('#stop')
    assert window.js("text('status')") == 'Stopped.' and window.js('story.childNodes.length') == length


def test_a_story_asked_for_while_one_is_written_takes_its_place_at_once(page):
    window = page(pace=10, repeat=1000)
    window.click('#write')
    window.wait("!!(window.first = story.querySelector('.piece'))")
    window.click('#again')
    window.wait("!first.isConnected && !!story.querySelector('.piece')")
    assert window.js("text('story')").startswith(PROMPT) and window.js('form.seed.value') == '1338'
    window.press('Escape')
    over(window, 'Stopped.')


@pytest.mark.parametrize('reason, line', [
    ('length', 'Cut at the length of 7 tokens.'),
    ('context', 'Cut: the model sees 256 tokens at once, and these are full.')])
def test_a_story_that_was_cut_says_by_what(page, reason, line):
    window = page(last={'type': 'done', 'reason': reason})
    fill(window, length='7')
    window.press('Enter')
    assert over(window, line) == WHOLE


def test_what_the_worker_refuses_is_said_and_the_next_story_is_written(page):
    window = page()
    window.click('#write')
    over(window)
    fill(window, prompt='Too long')
    window.click('#write')
    assert over(window, 'Shorten it.') == '' and window.js("text('speed')") == ''
    assert window.js("[$('status').className, story.ariaBusy]") == ['wrong', 'false']
    fill(window, prompt='Mia')
    window.click('#write')
    assert over(window).startswith('Mia,') and window.js("$('status').className") == ''


def test_a_middle_that_the_worker_refuses_leaves_no_story(page):
    assert over(between(page, 'Too long', 'Tim ran.'), 'Shorten it.') == ''


def test_what_was_written_before_the_model_broke_stays(page):
    window = page(last={'type': 'error', 'message': 'No memory.'})
    window.click('#write')
    assert over(window, 'No memory.') == WHOLE


def test_a_window_without_room_shows_the_story_and_its_buttons(page):
    window = page(about={'facts': 30 * [['one', 'fact']]})
    window.look(height=600)
    window.click('#write')
    over(window)
    assert window.js("Math.round($('buttons').getBoundingClientRect().top)") == 16
    window.look()
    window.js('scrollTo(0, 0)')
    window.click('#write')
    assert window.js('scrollY') == 0


def test_copied_is_the_plain_story(page):
    window = page()
    window.click('#write')
    over(window)
    window.click('#colours')
    window.move('.piece')
    window.js('getSelection().selectAllChildren(story)')
    window.press('c', browsers.CTRL)
    fill(window, prompt='')
    window.press('v', browsers.CTRL)
    assert window.wait('form.prompt.value') == WHOLE


# Mistakes

@pytest.mark.parametrize('field, typed, line', [
    ('temperature', 'abc', 'A number from 0 to 2.'), ('temperature', '2.1', 'A number from 0 to 2.'),
    ('topP', '', 'A number from 0.01 to 1.'), ('topP', '0', 'A number from 0.01 to 1.'),
    ('seed', '1.5', 'A whole number from 0 to 999999999.'),
    ('seed', '-1', 'A whole number from 0 to 999999999.'),
    ('length', '1001', 'A whole number from 1 to 1000.')])
def test_a_wrong_number_is_told_of_beside_its_field_and_nothing_is_written(page, field, typed, line):
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
    window.type(NUMBERS[field])
    assert window.js(f"text('{field}-wrong') + form.{field}.ariaInvalid") == 'false'
    window.press('Enter')
    assert over(window) == WHOLE


@pytest.mark.parametrize('missing', ['first', 'last'])
def test_a_middle_needs_both_sentences(page, missing):
    window = between(page, **{'first': 'Tim ran.', 'last': 'Tim ran.'} | {missing: ' '})
    assert window.js(f"text('{missing}-wrong')") == 'A middle needs both sentences.'
    assert window.js("document.querySelectorAll('[aria-invalid=true]').length") == 1
    assert window.js("[document.activeElement.id, text('story')]") == [missing, '']


# A middle between two sentences

def test_a_middle_is_written_between_two_sentences_by_keys_alone(page):
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
    assert over(window) == 'Tim ran., Tim\nsaw a dog. Tim slept.'
    bold = window.js("[...story.querySelectorAll('b')].map(b => b.textContent).join('|')")
    assert bold == 'Tim| ran.|Tim slept.'


def test_the_sentences_reach_the_worker_and_only_if_they_are_asked_for(page):
    window = between(page, ' Tim ran. ', ' Tim slept. ', echo=True)
    message = asked(window)
    assert [message[key] for key in ('prompt', 'first', 'last')] == ['', 'Tim ran.', 'Tim slept.']
    window.js('story.replaceChildren()')
    window.click('#ways label')
    window.click('#write')
    message = asked(window)
    assert [message[key] for key in ('prompt', 'first', 'last')] == [PROMPT, '', '']


def test_a_middle_has_one_space_before_the_last_sentence(page):
    window = between(page, 'Tim ran.', 'Tim ran.', story=[[' He fell.\n\n', 0.5, []]])
    assert over(window) == 'Tim ran. He fell.\n\nTim ran.'


# Colours and the tip

def test_the_switch_colours_what_is_written_and_what_will_be(page):
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
    over(window, 'Stopped.')
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


def coloured(page, **config):
    window = page(**config)
    window.click('#colours')
    window.click('#write')
    over(window)
    return window


def test_the_tip_follows_the_mouse(page):
    window = coloured(page)
    window.move('.piece')
    assert tip(window) == ',: 99 %\nor ␣there: 1.0 %\nor .: 0.0 %'
    token, box = (window.js(f'{node}.getBoundingClientRect().toJSON()')
                  for node in ("document.querySelector('.piece')", "$('tip')"))
    assert box['left'] == token['left'] and box['top'] == token['bottom'] + 4
    window.move('.piece', 2)
    assert tip(window) == '↵: 5.0 %\nor ↵↵: 90 %'
    window.move('.piece', 4)
    assert tip(window) == '(part of a character): 60 %'
    window.move('#story b')
    assert tip(window) == '' and not window.js("shown('tip')")
    window.move('.piece')
    window.press('Escape')
    assert tip(window) == ''


def test_the_tip_goes_with_the_switch_and_with_the_next_story(page):
    window = coloured(page, pace=20)
    for end in 'form.requestSubmit()', 'colours.click()':
        window.move('.piece')
        assert tip(window)
        window.js(end)
        assert not tip(window)
        window.move('#title')
        window.wait("story.querySelector('.piece') && story.ariaBusy === 'false'")
    window.move('.piece')
    assert not tip(window)


def test_arrow_keys_go_from_token_to_token_and_tab_comes_back_to_where_one_was(page):
    window = coloured(page)
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


def test_a_finger_brings_the_tip_and_takes_it_away(page):
    window = coloured(page)
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


def test_the_tip_stays_in_the_window(page):
    long = [[' a', 0.5, [['x' * 60, 0.1]] * 4]]
    window = coloured(page, story=long, repeat=500, atOnce=50)
    window.look(390, 600)
    for nth in (0, 200, 203, 206, 480):
        window.move('.piece', nth)
        assert window.js("""(() => { const {left, right, top, bottom} = $('tip').getBoundingClientRect();
            return left >= 8 && right <= 382 && top >= 0 && bottom <= 600 && bottom - top > 50; })()""")
        assert window.js('document.documentElement.scrollWidth') == 390


# Whoever looks

def test_markup_is_text(page):
    pieces = [[EVIL, 0.5, [[EVIL, 0.4]]], ['<b>', 0.5, []]]
    about = {'title': EVIL, 'facts': [[EVIL, EVIL]], 'prompt': EVIL, 'infill': True}
    window = page(story=pieces, about=about)
    window.click('#colours')
    window.click('#write')
    assert over(window) == EVIL + EVIL + '<b>'
    window.move('.piece')
    assert EVIL.replace(' ', '␣') in window.js("text('tip')")
    window.click('#middle')
    fill(window, first=EVIL, last=EVIL)
    window.press('Enter')
    assert over(window).endswith(' ' + EVIL)
    assert window.js("[text('title'), document.title, text('facts')]") == [EVIL, EVIL, EVIL * 2]
    assert not window.js("window.evil || document.querySelector('img')")


def test_no_request_can_leave(page):
    window = page()
    assert window.js("fetch('https://example.com').catch(() => 'refused')") == 'refused'
    assert 'Content Security Policy' in str(window.complaints)  # and a test would see it
    window.complaints, window.requests = [], []


def test_every_field_has_a_name_for_a_screen_reader(page):
    window = page(about={'infill': True})
    roles = {'textbox', 'spinbutton', 'radio', 'switch', 'button', 'region'}
    fields = {'on from a beginning', 'between two sentences', 'How the story begins', 'Temperature', 'Top-p',
              'Seed', 'Length', 'Write', 'Stop', 'Again', 'Story', 'Colour each token by how likely it was'}
    assert {name for role, name, _ in window.heard() if role in roles} == fields
    window.click('#middle')
    fields = fields - {'How the story begins'} | {'First sentence', 'Last sentence'}
    assert {name for role, name, _ in window.heard() if role in roles} == fields
    assert ('button', 'Again', 'Again takes the next seed.') in window.heard()
    live = "[...document.querySelectorAll('[aria-live], [role=status]')].map(node => node.id)"
    assert window.js(live) == ['status', 'tip']  # and not the story


def test_tab_goes_through_all_fields_and_the_focus_is_seen(page):
    window = page()
    order = []
    for _ in range(9):
        window.press('Tab')
        order.append(window.js('document.activeElement.id'))
        assert window.js('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    assert order == ['prompt', *NUMBERS, 'write', 'stop', 'again', 'colours']


@pytest.mark.parametrize('width', [320, 390, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    window = page(story=[['x' * 3000, 0.5, []]], about={
        'infill': True, 'title': 'T' * 300, 'facts': [['trained on', 'y' * 300]]})
    window.look(width)
    window.click('#write')
    over(window)
    window.click('#middle')
    assert window.js('document.documentElement.scrollWidth <= innerWidth')


def test_it_is_dark_where_all_is_dark(page):
    window, paper = page(), []
    for dark in False, True:
        window.look(dark=dark)
        paper.append(window.js('getComputedStyle(document.body).backgroundColor'))
    assert paper == ['rgb(250, 248, 243)', 'rgb(22, 24, 29)']


def test_nothing_blinks_for_those_who_want_no_motion(page):
    window = page(pace=20, repeat=100)
    window.click('#write')
    for still, name in (False, 'blink'), (True, 'none'):
        window.look(still=still)
        assert window.js("getComputedStyle(story, '::after').animationName") == name
    window.press('Escape')
    over(window, 'Stopped.')


def test_a_thousand_tokens_are_shown_as_fast_as_they_come(page):
    window = page(story=[[' wonderful', 0.3, [[' a', 0.2]] * 4]], repeat=1000, atOnce=10, pace=4)
    window.click('#colours')
    window.js('window.start = performance.now()')
    window.click('#write')
    over(window)
    assert window.js('performance.now() - start') < 4000
    assert window.js('story.children.length') == 1004
