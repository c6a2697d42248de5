"""llama.cpp's server in a process of its own: a model that llama.cpp cannot run ends the process."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

from configurator import ROOT, UserError


class Server:
    """A server for a GGUF file. It runs until `stop`, or until our process ends."""

    def __init__(self, path, n_threads, exact):
        """exact: it computes in float32 and without approximations.

        Raises ModuleNotFoundError if xllamacpp is not installed, UserError if it cannot read the file.
        """
        import xllamacpp  # noqa: F401 (only `serve` uses it, but an error of `serve` is not ours)

        code = 'from formats.llamacpp import serve; serve()'
        kind = 'exact' if exact else 'fast'
        words = [sys.executable, '-c', code, str(path.resolve()), str(n_threads), kind]
        environment = os.environ | {'GGML_NO_BACKTRACE': '1'}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (it closes with this object)
        self.process = subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors)
        self.address = self.process.stdout.readline().strip()
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
        if not self.address.startswith('http'):
            raise self.failure()

    def ask(self, endpoint, question):
        """Post a question and return the answer, both JSON objects.

        Raises UserError if the server has ended.
        """
        request = urllib.request.Request(self.address + endpoint, json.dumps(question).encode(),
                                         {'Content-Type': 'application/json'})
        try:
            with self.opener.open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:  # it has answered
            raise
        except OSError as error:
            raise self.failure() from error

    def failure(self):
        """Return the error that says with what words the server has ended."""
        self.stop()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors='replace').split('\n')
        last = [line.strip() for line in lines if line.strip()][-1:]
        reason = last[0] if last else 'without a word'
        return UserError(f'llama.cpp failed to run the model ({reason}): nothing was kept')

    def stop(self):
        """End the server, so that the file is not mapped any more."""
        self.process.kill()
        self.process.wait()


def serve():
    """Start a server, print its address, and run until stdin closes. sys.argv has what `Server` was given."""
    import xllamacpp

    path, n_threads, kind = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_gpu_layers = 0
    params.n_ctx = 0  # the context length of the model
    params.n_parallel = 1
    params.verbosity = -1
    params.warmup = False
    params.ui = False
    params.cpuparams.n_threads = int(n_threads)
    params.cpuparams_batch.n_threads = int(n_threads)
    flash_attention = xllamacpp.llama_flash_attn_type
    if kind == 'exact':
        params.flash_attn_type = flash_attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    else:
        params.flash_attn_type = flash_attention.LLAMA_FLASH_ATTN_TYPE_ENABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
