"""A headless Chromium that tests and bench.py look into and use as a person would: keys, a mouse, a finger.

It is driven by the DevTools protocol over two pipes, its file descriptors 3 and 4: JSON, a NUL behind each
message.
https://chromedevtools.github.io/devtools-protocol
"""

import base64
import json
import os
import select
import shutil
import tempfile
import time
from contextlib import suppress

from configurator import UserError

PROGRAM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
CODES = {'Backspace': 8, 'Tab': 9, 'Enter': 13, 'Escape': 27, ' ': 32, 'ArrowLeft': 37, 'ArrowRight': 39}
TEXTS = {'Enter': '\r', ' ': ' '}
COMMANDS = {'a': 'selectAll', 'c': 'copy', 'v': 'paste'}
CTRL, META, SHIFT = 2, 4, 8


class Browser:
    """One window. `requests` are the addresses which the open file and its workers have asked for,
    `complaints` what would stand in the console."""

    def __init__(self):
        if not PROGRAM:
            raise UserError('there is no Chromium here: install chromium, or Google Chrome')
        self.profile = tempfile.mkdtemp()
        theirs, self.to = os.pipe()
        self.from_, ours = os.pipe()
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe',
                 f'--user-data-dir={self.profile}',  # and it has a mouse
                 '--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,'
                 'availablePointerTypes=4']
        null = os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0
        self.process = os.posix_spawn(PROGRAM, [PROGRAM, *flags, 'about:blank'], os.environ, file_actions=[
            null, (os.POSIX_SPAWN_DUP2, theirs, 3), (os.POSIX_SPAWN_DUP2, ours, 4)])
        os.close(theirs)
        os.close(ours)
        self.buffer, self.number, self.session, self.answers = b'', 0, None, {}
        self.requests, self.complaints = [], []
        while not (pages := self.targets()):
            time.sleep(0.01)
        attached = self.send('Target.attachToTarget', targetId=pages[0]['targetId'], flatten=True)
        self.session = attached['sessionId']
        self.send('Page.enable')
        self.listen(self.session)

    def close(self):
        self.session = None
        self.send('Browser.close')
        os.waitpid(self.process, 0)
        os.close(self.to)
        os.close(self.from_)
        shutil.rmtree(self.profile, ignore_errors=True)

    def targets(self):
        return [one for one in self.send('Target.getTargets')['targetInfos'] if one['type'] == 'page']

    def listen(self, session):
        for domain in 'Runtime', 'Log', 'Network':
            self.send(f'{domain}.enable', session=session)
        self.send('Target.setAutoAttach', session=session, autoAttach=True, waitForDebuggerOnStart=True,
                  flatten=True)

    # Messages

    def send(self, method, session=None, **params):
        """The answer to a message. Raises RuntimeError if it is an error."""
        self.number += 1
        number, session = self.number, session or self.session
        message = {'id': number, 'method': method, 'params': params}
        message |= {'sessionId': session} if session else {}
        os.write(self.to, json.dumps(message).encode() + b'\0')
        while number not in self.answers:
            answer = self.read()
            if 'id' in answer:
                self.answers[answer['id']] = answer
            else:
                self.event(**answer)  # which may itself send
        answer = self.answers.pop(number)
        if 'error' in answer:
            raise RuntimeError(f'{method}: {answer["error"]}')
        return answer['result']

    def read(self):
        while b'\0' not in self.buffer:
            if not select.select([self.from_], [], [], 30)[0]:
                raise TimeoutError('Chromium is silent')
            if not (more := os.read(self.from_, 2**20)):
                raise RuntimeError('Chromium has ended')
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b'\0')
        return json.loads(message)

    def event(self, method, params, **_):
        if method == 'Network.requestWillBeSent':
            self.requests.append(params['request']['url'])
        elif method == 'Log.entryAdded':
            self.complaints.append(params['entry']['text'])
        elif method == 'Runtime.exceptionThrown':
            self.complaints.append(params['exceptionDetails'])
        elif method == 'Runtime.consoleAPICalled':
            self.complaints.append(params['args'])
        elif method == 'Target.attachedToTarget' and params['waitingForDebugger']:
            with suppress(RuntimeError):  # one that has ended meanwhile
                self.listen(params['sessionId'])
                self.send('Runtime.runIfWaitingForDebugger', session=params['sessionId'])

    # What there is to see

    def open(self, path, before=''):
        """A file, wherein the script `before` runs first, until all of it is read."""
        self.requests, self.complaints = [], []
        first = self.send('Page.addScriptToEvaluateOnNewDocument', source=before)['identifier']
        self.send('Page.navigate', url=path.as_uri())
        self.wait(f"location.href === {json.dumps(path.as_uri())} && document.readyState === 'complete'")
        self.send('Page.removeScriptToEvaluateOnNewDocument', identifier=first)

    def js(self, expression):
        answer = self.send('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in answer:
            raise RuntimeError(answer['exceptionDetails'])
        return answer['result'].get('value')

    def wait(self, expression, seconds=10):
        """Until the expression is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f'never true: {expression}'
            time.sleep(0.005)
        return value

    def look(self, width=1280, height=900, dark=False, still=False):
        """As a window of this size has it, dark or light, with motion or without. A small one: a phone's."""
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.send('Emulation.setTouchEmulationEnabled', enabled=width < 600)
        wishes = {'color-scheme': 'dark' if dark else 'light', 'reduced-motion': 'reduce' if still else ''}
        self.send('Emulation.setEmulatedMedia',
                  features=[{'name': f'prefers-{name}', 'value': wish} for name, wish in wishes.items()])

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.send('Page.captureScreenshot')['data']))

    def heard(self):
        """What a screen reader finds: (role, name, description) of everything."""
        nodes = self.send('Accessibility.getFullAXTree')['nodes']
        return [tuple(node.get(key, {}).get('value', '') for key in ('role', 'name', 'description'))
                for node in nodes]

    # What a person does

    def press(self, key, held=0, times=1):
        """A key by its name, as in CODES, or a letter with CTRL, as in COMMANDS."""
        press = {'key': key, 'windowsVirtualKeyCode': CODES.get(key) or ord(key.upper()), 'modifiers': held}
        what = {'commands': [COMMANDS[key]]} if key in COMMANDS else {'text': TEXTS.get(key, '')}
        for _ in range(times):
            self.send('Input.dispatchKeyEvent', type='keyDown', **press, **what)
            self.send('Input.dispatchKeyEvent', type='keyUp', **press)

    def type(self, text):
        """Text, in place of what the field has."""
        self.press('a', CTRL)
        self.press('Backspace')
        for letter in text:
            self.send('Input.dispatchKeyEvent', type='char', text=letter)

    def place(self, selector, nth=0):
        """The middle of an element's first line, scrolled into sight."""
        return self.js(f"""(() => {{
            const element = document.querySelectorAll({json.dumps(selector)})[{nth}];
            element.scrollIntoView({{block: 'nearest'}});
            const box = element.getClientRects()[0];
            return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
        }})()""")

    def move(self, selector, nth=0):
        self.send('Input.dispatchMouseEvent', type='mouseMoved', **self.place(selector, nth))

    def click(self, selector, nth=0):
        self.move(selector, nth)
        at = {**self.place(selector, nth), 'button': 'left', 'clickCount': 1}
        for what in 'mousePressed', 'mouseReleased':
            self.send('Input.dispatchMouseEvent', type=what, **at)

    def touch(self, selector, nth=0):
        """Put a finger there."""
        self.send('Input.dispatchTouchEvent', type='touchStart', touchPoints=[self.place(selector, nth)])

    def tap(self, selector, nth=0):
        self.touch(selector, nth)
        self.lift()

    def lift(self):
        self.send('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])
