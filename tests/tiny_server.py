"""A server on this machine that speaks vLLM's and SGLang's protocol; what it says is what a small model says."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.generate import generate
from kdjax.models import Model
from kdjax.sampling import Sampling
from kdjax.shapes import View

LENGTH = 128


class Many(ThreadingHTTPServer):
    """A server to which many connect at once."""

    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Say nothing: a client has gone."""


@contextlib.contextmanager
def serving(answer):
    """Give the address of a server that answers (path, headers, body) with (status, body, headers)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply, headers = answer(self.path, dict(self.headers), body)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = Many(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()


class Spoken:
    """What a job's teacher says to requests of either protocol; `seen` has the paths, headers and bodies."""

    def __init__(self, job):
        self.model, self.params = Model(job.teacher.model.config), jax.device_get(job.frozen()["teacher"])
        self.tokenizer = job.tokenizer
        self.seen, self._lock = [], threading.Lock()
        self._log_probs = jax.jit(self._whole)

    def _whole(self, params, view):
        hidden_TD = self.model.apply(params, view).hidden_BTD[0]
        logits_TV = hidden_TD.astype(jnp.float32) @ self.model.head(params).w_DV.astype(jnp.float32)
        return jax.nn.log_softmax(logits_TV, -1)

    def log_probs(self, ids):
        """Of what follows each token, [T, V]."""
        at = np.arange(LENGTH, dtype=np.int32)[None]
        view = View(np.array([ids + [0] * (LENGTH - len(ids))], np.int32), (at < len(ids)).astype(np.int32), at)
        return np.asarray(self._log_probs(self.params, view))[: len(ids)]

    def __call__(self, path, headers, body):
        with self._lock:
            self.seen.append((path, headers, body))
            return 200, PATHS[path](self, body), {}


def _vllm(spoken, body):
    if "prompt_logprobs" not in body:
        return _written(spoken, body)
    picks = body["prompt_logprobs"]

    def told(token, log_probs_V):
        named = [*np.argsort(-log_probs_V, kind="stable")[:picks].tolist(), token]  # its own comes on top
        more = {"rank": 1, "decoded_token": "x"}
        return {str(entry): {"logprob": float(log_probs_V[entry]), **more} for entry in reversed(named)}

    found = [None, *map(told, body["prompt"][1:], spoken.log_probs(body["prompt"]))]
    return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": found}]}


def _written(spoken, body):
    """Return what the same prompt is answered here, drawn by seed 0 and its number."""
    how = {"sampling": Sampling(body["temperature"]), "first": body["seed"], "eos_ids": spoken.tokenizer.eos_ids}
    (said,) = generate(spoken.model, spoken.params, [body["prompt"]], max_new_tokens=body["max_tokens"], **how)
    return {"choices": [{"index": 0, "text": spoken.tokenizer.decode(said)}]}


def _sglang(spoken, body):
    def told(log_probs_V):
        best = np.argsort(-log_probs_V, kind="stable")[: body["top_logprobs_num"]].tolist()
        return [[float(log_probs_V[entry]), entry, None] for entry in best]

    found = [None, *map(told, spoken.log_probs(body["input_ids"])[:-1])]
    return {"text": "x", "meta_info": {"input_top_logprobs": found}}


PATHS = {"/v1/completions": _vllm, "/generate": _sglang}
