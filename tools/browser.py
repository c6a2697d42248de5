"""A headless Chromium that tests and bench.py use as a person would: with keys, a mouse and a finger.

It is driven by the DevTools protocol over two pipes, its file descriptors 3 and 4. Each message is a JSON
object, and a NUL byte ends it.
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

PROGRAM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
KEY_CODES = {
    'Backspace': 8, 'Tab': 9, 'Enter': 13, 'Escape': 27, ' ': 32, 'ArrowLeft': 37, 'ArrowRight': 39}
TEXTS = {'Enter': '\r', ' ': ' '}  # that a key enters
COMMANDS = {'a': 'selectAll', 'c': 'copy', 'v': 'paste'}  # CTRL and a letter
CTRL, META, SHIFT = 2, 4, 8
MOUSE_FLAG = ('--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,'
              'availablePointerTypes=4')


class Browser:
    """One window of Chromium.

    requests: the addresses that the open file and its workers have asked for, a list.
    complaints: errors and whatever else appeared in the console, a list.
    """

    def __init__(self):
        if not PROGRAM:
            raise UserError('Chromium is not installed: install chromium, or Google Chrome')
        self.profile = tempfile.mkdtemp()
        self.buffer = b''  # the part of a message that we have read so far
        self.number = 0  # the id of our last message
        self.session = None
        self.answers = {}  # by id
        self.requests = []
        self.complaints = []
        self.start()

        pages = []
        while not pages:
            time.sleep(0.01)
            pages = self.targets()
        attached = self.send('Target.attachToTarget', targetId=pages[0]['targetId'], flatten=True)
        self.session = attached['sessionId']
        self.send('Page.enable')
        self.listen(self.session)

    def start(self):
        """Start Chromium with a pipe to it, `to`, and one from it, `from_`."""
        its_input, self.to = os.pipe()
        self.from_, its_output = os.pipe()
        words = [PROGRAM, '--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe',
                 f'--user-data-dir={self.profile}', MOUSE_FLAG, 'about:blank']
        file_actions = [
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),  # no stderr
            (os.POSIX_SPAWN_DUP2, its_input, 3),
            (os.POSIX_SPAWN_DUP2, its_output, 4),
        ]
        self.process = os.posix_spawn(PROGRAM, words, os.environ, file_actions=file_actions)
        os.close(its_input)
        os.close(its_output)

    def close(self):
        """Quit Chromium and remove its files."""
        self.session = None
        self.send('Browser.close')
        os.waitpid(self.process, 0)
        os.close(self.to)
        os.close(self.from_)
        shutil.rmtree(self.profile, ignore_errors=True)

    def targets(self):
        """Return the open pages."""
        targets = self.send('Target.getTargets')['targetInfos']
        return [target for target in targets if target['type'] == 'page']

    def listen(self, session):
        """Ask for the events of a page or worker, and of the workers that it starts."""
        for domain in 'Runtime', 'Log', 'Network':
            self.send(f'{domain}.enable', session=session)
        self.send('Target.setAutoAttach', session=session, autoAttach=True, waitForDebuggerOnStart=True,
                  flatten=True)

    # messages -------------------------------------------------------------------

    def send(self, method, session=None, **params):
        """Send a message and return its answer. Raises RuntimeError if the answer is an error."""
        self.number += 1
        number = self.number
        message = {'id': number, 'method': method, 'params': params}
        session = session or self.session
        if session:
            message['sessionId'] = session
        os.write(self.to, json.dumps(message).encode() + b'\0')
        while number not in self.answers:
            received = self.read()
            if 'id' in received:
                self.answers[received['id']] = received
            else:
                self.handle_event(**received)  # this may send messages, too
        answer = self.answers.pop(number)
        if 'error' in answer:
            raise RuntimeError(f'{method}: {answer["error"]}')
        return answer['result']

    def read(self):
        """Return the next message from Chromium."""
        while b'\0' not in self.buffer:
            ready, _, _ = select.select([self.from_], [], [], 30)
            if not ready:
                raise TimeoutError('Chromium does not answer')
            data = os.read(self.from_, 2**20)
            if not data:
                raise RuntimeError('Chromium has ended')
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b'\0')
        return json.loads(message)

    def handle_event(self, method, params, **_):
        if method == 'Network.requestWillBeSent':
            self.requests.append(params['request']['url'])
        elif method == 'Log.entryAdded':
            self.complaints.append(params['entry']['text'])
        elif method == 'Runtime.exceptionThrown':
            self.complaints.append(params['exceptionDetails'])
        elif method == 'Runtime.consoleAPICalled':
            self.complaints.append(params['args'])
        elif method == 'Target.attachedToTarget' and params['waitingForDebugger']:
            with suppress(RuntimeError):  # the worker may have ended meanwhile
                self.listen(params['sessionId'])
                self.send('Runtime.runIfWaitingForDebugger', session=params['sessionId'])

    # looking at a page ----------------------------------------------------------

    def open(self, path, before=''):
        """Open a file and wait until it is loaded. `before`: a script to run in it first."""
        self.requests = []
        self.complaints = []
        script = self.send('Page.addScriptToEvaluateOnNewDocument', source=before)
        url = path.as_uri()
        self.send('Page.navigate', url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")
        self.send('Page.removeScriptToEvaluateOnNewDocument', identifier=script['identifier'])

    def js(self, expression):
        """Return the value of a JavaScript expression, or of what it promises."""
        answer = self.send('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in answer:
            raise RuntimeError(answer['exceptionDetails'])
        return answer['result'].get('value')

    def wait(self, expression, seconds=10):
        """Wait until a JavaScript expression is true, and return its value."""
        end = time.monotonic() + seconds
        while True:
            value = self.js(expression)
            if value:
                return value
            if time.monotonic() > end:
                raise AssertionError(f'never true: {expression}')
            time.sleep(0.005)

    def look(self, width=1280, height=900, dark=False, still=False):
        """Give the window a size, that of a phone if it is narrow; prefer dark colours, or no motion."""
        is_phone = width < 600
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                  mobile=is_phone)
        self.send('Emulation.setTouchEmulationEnabled', enabled=is_phone)
        self.send('Emulation.setEmulatedMedia', features=[
            {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'},
            {'name': 'prefers-reduced-motion', 'value': 'reduce' if still else ''},
        ])

    def picture(self, path):
        """Save a screenshot as PNG."""
        path.write_bytes(base64.b64decode(self.send('Page.captureScreenshot')['data']))

    def heard(self):
        """Return what a screen reader finds: (role, name, description) of each node."""
        found = []
        for node in self.send('Accessibility.getFullAXTree')['nodes']:
            values = [node.get(key, {}).get('value', '') for key in ('role', 'name', 'description')]
            found.append(tuple(values))
        return found

    # what a person does ---------------------------------------------------------

    def press(self, key, held=0, times=1):
        """Press a key: one of KEY_CODES, or with CTRL held a letter of COMMANDS."""
        code = KEY_CODES.get(key) or ord(key.upper())
        event = {'key': key, 'windowsVirtualKeyCode': code, 'modifiers': held}
        if key in COMMANDS:
            event['commands'] = [COMMANDS[key]]
        else:
            event['text'] = TEXTS.get(key, '')
        for _ in range(times):
            self.send('Input.dispatchKeyEvent', type='keyDown', **event)
            self.send('Input.dispatchKeyEvent', type='keyUp', **event)

    def type(self, text):
        """Replace the content of the focused field by a text."""
        self.press('a', CTRL)
        self.press('Backspace')
        for letter in text:
            self.send('Input.dispatchKeyEvent', type='char', text=letter)

    def place(self, selector, nth=0):
        """Scroll an element into view and return the middle of its first line, {'x', 'y'}."""
        return self.js(f"""(() => {{
            const element = document.querySelectorAll({json.dumps(selector)})[{nth}];
            element.scrollIntoView({{block: 'nearest'}});
            const box = element.getClientRects()[0];
            return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
        }})()""")

    def move(self, selector, nth=0):
        """Move the mouse to an element."""
        self.send('Input.dispatchMouseEvent', type='mouseMoved', **self.place(selector, nth))

    def click(self, selector, nth=0):
        """Click an element."""
        self.move(selector, nth)
        place = self.place(selector, nth)
        for event in 'mousePressed', 'mouseReleased':
            self.send('Input.dispatchMouseEvent', type=event, button='left', clickCount=1, **place)

    def touch(self, selector, nth=0):
        """Put a finger on an element."""
        self.send('Input.dispatchTouchEvent', type='touchStart', touchPoints=[self.place(selector, nth)])

    def lift(self):
        """Lift the finger."""
        self.send('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])

    def tap(self, selector, nth=0):
        """Touch an element and lift the finger."""
        self.touch(selector, nth)
        self.lift()
