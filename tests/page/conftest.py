"""The window that the tests of the page share."""

import re

import pytest

from tools.browser import Browser


@pytest.fixture(scope='module')
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def window(browser):
    """A window of usual size. At the end, its pages must not have sent a request or printed an error."""
    browser.look()
    yield browser
    assert [url for url in browser.requests if not re.match('(file|blob|data):', url)] == []
    assert browser.complaints == []
