"""A stand-in for the Hugging Face hub on 127.0.0.1, with one dataset; set HF_ENDPOINT to its `endpoint`."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = 'a' * 40


class Hub(ThreadingHTTPServer):
    """A context in which the files ({path: bytes}) of the dataset `name` are served at `endpoint`."""

    def __init__(self, name, files):
        super().__init__(('127.0.0.1', 0), Handler)
        self.name, self.files, self.endpoint = name, files, f'http://127.0.0.1:{self.server_port}'
        self.downloaded = []  # (path of a file, first byte of the download)
        self.break_off = {}  # {path of a file: number of bytes after which its next download breaks off}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_close(self):
        self.shutdown()
        super().server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        name, files = self.server.name, self.server.files
        user, repo = name.split('/')  # a request may leave out the user
        about = re.fullmatch(f'/(?:api/)?datasets/(?:{user}/)?{repo}/?([a-z]*)/?[^/]*/?(.*)',
                             self.path.split('?')[0])
        kind, path = about.groups() if about else ('', '')
        if not about or (kind == 'resolve' and path not in files):
            self.answer(404, b'', {'X-Error-Code': 'EntryNotFound' if about else 'RepoNotFound'})
        elif kind == 'resolve':
            self.send_file(path, files[path])
        elif kind == 'tree':
            everything = 'recursive=true' in self.path.lower()
            self.answer(200, json.dumps(self.tree(path and path + '/', everything)).encode(), {})
        else:
            siblings = [{'rfilename': path} for path in files]
            self.answer(200, json.dumps({'id': name, 'sha': COMMIT, 'siblings': siblings}).encode(), {})

    do_HEAD = do_POST = do_GET

    def send_file(self, path, data):
        start = int(re.sub('bytes=|-.*', '', self.headers.get('Range', '')) or 0)
        headers = {'ETag': f'"{hashlib.sha256(data).hexdigest()}"', 'X-Repo-Commit': COMMIT}
        if start:
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        sent = None
        if self.command == 'GET':
            self.server.downloaded.append((path, start))
            sent = self.server.break_off.pop(path, None)
        self.answer(206 if start else 200, data[start:], headers, sent)

    def tree(self, folder, everything):
        files = self.server.files
        paths = {folder + path[len(folder):].split('/')[0] for path in files if path.startswith(folder)}
        if everything:
            paths |= set(files)
        return [{'type': 'file' if path in files else 'directory', 'path': path, 'oid': COMMIT,
                 'size': len(files.get(path, ''))} for path in sorted(paths)]

    def answer(self, status, body, headers, sent=None):
        """Answer a request; if `sent` is given, the connection breaks off after so many bytes of the body."""
        self.send_response(status)
        for name, value in (headers | {'Content-Length': len(body)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[:sent])
            self.close_connection = sent is not None

    def log_message(self, *_):
        pass
