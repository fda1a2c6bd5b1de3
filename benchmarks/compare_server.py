"""A peer's HTTP server in a round of compare.py: started, asked for completions of token ids, timed."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from compare_process import PeerError, tail
from compare_rows import Row

_FIRST_SPECIAL_TOKEN = 199_998
"""Of gpt-oss's vocabulary. Prompts are ordinary tokens, below it."""


@dataclass
class Completions:
    """A server that continues prompts of token ids.

    dialect: "llama" posts to /completion, "openai" to /v1/completions. vocabulary: prompts are random ids
    below it. ready_seconds: how long its start took, where we started it.
    """

    address: str
    dialect: Literal["llama", "openai"]
    timeout: float
    vocabulary: int = _FIRST_SPECIAL_TOKEN
    model: str = ""
    ready_seconds: float = 0.0

    def complete(self, prompt: Sequence[int], num_tokens: int) -> float:
        """Seconds until num_tokens more are there. Raises PeerError when there are not as many."""
        body: dict[str, Any] = {"prompt": list(prompt), "temperature": 0, "ignore_eos": True}
        if self.dialect == "llama":
            # Streamed, for ik_llama.cpp's whole answers fail with 500 where random tokens are no UTF-8.
            path = "/completion"
            body = {**body, "n_predict": num_tokens, "cache_prompt": True, "stream": True}
        else:
            path, body = "/v1/completions", {**body, "max_tokens": num_tokens, "model": self.model}
        start = time.perf_counter()
        answer = self.post(path, body)
        seconds = time.perf_counter() - start
        given = answer.get("tokens_predicted") or answer.get("usage", {}).get("completion_tokens")
        if given != num_tokens:
            raise PeerError(f"{self.address} gave {given} tokens where {num_tokens} were asked for")
        return seconds

    def post(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """body None: a GET. Of a stream, its last event. Raises PeerError for an answer that is not JSON with
        status 200.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read().decode(errors="replace").strip()
            parsed = json.loads(text.rpartition("data: ")[2])
        except urllib.error.HTTPError as error:
            raise PeerError(f"{self.address}{path} answered {error.code}: {error.read()[:200]!r}") from None
        except (OSError, ValueError) as error:
            raise PeerError(f"{self.address}{path} gave no answer: {error}") from None
        if not isinstance(parsed, dict):
            raise PeerError(f"{self.address}{path} answered with {str(parsed)[:100]}; expected an object")
        return parsed

    def prompt(self, num_tokens: int) -> list[int]:
        rng = random.Random()
        return [rng.randrange(min(self.vocabulary, _FIRST_SPECIAL_TOKEN)) for _ in range(num_tokens)]

    def prefill_speed(self, num_tokens: int) -> float:
        return num_tokens / self.complete(self.prompt(num_tokens), 1)

    def decode_speed(self, batch: int, depth: int, num_tokens: int) -> float:
        """Tokens a second of `batch` sequences together, each after a prompt of its own of `depth` tokens.

        The prompts are computed by a first request each; the second finds them in the server's cache, so that
        nothing but decoding (and one token of prompt) is timed.
        """
        prompts = [self.prompt(depth) for _ in range(batch)]
        with ThreadPoolExecutor(batch) as threads:
            list(threads.map(lambda prompt: self.complete(prompt, 1), prompts))
            start = time.perf_counter()
            list(threads.map(lambda prompt: self.complete(prompt, num_tokens), prompts))
            seconds = time.perf_counter() - start
        return batch * num_tokens / seconds

    def first_tokens(self, num_tokens: int) -> dict[Row, float]:
        prompt = self.prompt(num_tokens)
        self.complete(self.prompt(min(num_tokens, 64)), 1)  # wakes what a first prompt would wait for
        return {
            Row("first token", num_tokens): self.complete(prompt, 1),
            Row("first token again", num_tokens): self.complete(prompt, 1),
        }


def at_address(url: str, timeout: float) -> Completions:
    """An OpenAI server that runs already; its first model. Raises PeerError when it cannot be asked."""
    address = url.rstrip("/").removesuffix("/v1")
    server = Completions(address, "openai", timeout)
    models = server.post("/v1/models", None).get("data") or [{}]
    server.model = str(models[0].get("id", ""))
    return server


@contextmanager
def started_server(
    command: Sequence[str], name: str, timeout: float
) -> Iterator[tuple[Completions, subprocess.Popen[bytes]]]:
    """A llama-server on a free port, from the answer to a first token on. Killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    server = Completions(f"http://127.0.0.1:{port}", "llama", timeout)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
        except OSError as error:
            raise PeerError(f"llama-server of {name} cannot be started: {error}") from None
        try:
            while not first_token_came(server.address):
                if process.poll() is not None:
                    raise PeerError(f"llama-server of {name} ended with {process.returncode}: {tail(log)}")
                if time.perf_counter() - start > timeout:
                    raise PeerError(f"llama-server of {name} was not ready after {timeout:g} s")
                time.sleep(0.02)
            server.ready_seconds = time.perf_counter() - start
            yield server, process
        finally:
            process.kill()
            process.wait()


def first_token_came(address: str) -> bool:
    """Ask the server for one token; False while it does not listen or is still loading (503)."""
    body = json.dumps({"prompt": [1000], "n_predict": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise PeerError(f"llama-server answered {error.code}: {error.read()[:200]!r}") from None
        return False
    except (OSError, urllib.error.URLError):
        return False
    return True
