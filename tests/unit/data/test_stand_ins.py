"""Files that stand in for others: pointers of git, pages of failed downloads."""

import pytest

from configurator import UserError
from data.files import refuse_stand_in

LFS_POINTER = (b'version https://git-lfs.github.com/spec/v1\n'
               b'oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n')


@pytest.mark.parametrize('content, what', [
    (LFS_POINTER, 'a Git LFS pointer.*git lfs pull'),
    (b'/annex/objects/SHA256E-s8--aa.parquet\n', 'a git-annex pointer.*git annex get'),
    (b'<!DOCTYPE html>\n<html><body>404</body></html>', 'an HTML page.*download it again'),
    (b'\xef\xbb\xbf\n <HTML lang="en">', 'an HTML page'),
    (b'<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML">', 'an HTML page'),
    (b'<!-- saved from a site -->\n<html>', 'an HTML page'),
    (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>', "service's error"),
    (b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>NoSuchKey</Code></Error>", "service's error"),
    (b'404: Not Found', 'the answer of a server'),
    (b'Entry not found\n', 'the answer of a server'),
    (b'Invalid username or password.', 'the answer of a server'),
    (b'{"error":"Repository not found"}', 'the answer of a server'),
])
def test_refuse_stand_in_names_what_the_file_is(tmp_path, content, what):
    path = tmp_path / 'stories.parquet'
    path.write_bytes(content)
    with pytest.raises(UserError, match=what):
        refuse_stand_in(path)


@pytest.mark.parametrize('content', [
    b'', b'Entry not found. Tom looked again.', b'404: Not Found is a story of a page.',
    b'Once upon a time', b'{"text": "<html>"}', b'PAR1', b'\x00\x01', b'version https://example.com'])
def test_refuse_stand_in_lets_other_files_pass(tmp_path, content):
    path = tmp_path / 'stories.txt'
    path.write_bytes(content)
    refuse_stand_in(path)
