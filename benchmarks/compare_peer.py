"""llama.cpp and ik_llama.cpp in a round of compare.py: their programs, and what they print."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compare_process import PeerError, peak_bytes_of, run_program
from compare_rows import Group, Measured, Row, Wish, shortened
from compare_server import Completions, started_server

_WARM_UP = 64
"""A first prompt whose figure is dropped; llama-bench's own warm-up would compute each prompt twice."""


@dataclass
class LlamaPrograms:
    """One of the two, by the paths of its programs; a group whose program is missing gives no rows.

    name: "llama.cpp" or "ik_llama.cpp", which says what it understands and prints.
    arguments: for llama-bench; server_arguments: for llama-server and llama-batched-bench. longest: longer
    prompts and depths are left out.
    """

    name: str
    gguf: Path
    threads: int
    timeout: float
    bench: Path | None
    batched: Path | None
    server: Path | None
    arguments: list[str]
    server_arguments: list[str]
    longest: int

    def measure(self, group: Group, wish: Wish) -> Measured:
        wish = shortened(wish, self.longest)
        if group not in wish.groups():
            return Measured()
        if group in ("prefill", "depth"):
            return self._bench(group, wish) if self.bench else Measured()
        if group == "batch":
            measured = self._batched(wish) if self.batched and self._is_batched_wanted(wish) else Measured()
            if self.server:
                measured.add(self._streams(wish))
            return measured
        if self.server is None:
            return Measured()
        return self._first_token(wish) if group == "first token" else self._start(wish)

    def _is_batched_wanted(self, wish: Wish) -> bool:
        return wish.same if self.name == "ik_llama.cpp" else self.server is None

    def _bench(self, group: Group, wish: Wish) -> Measured:
        base = [str(self.bench), "-m", str(self.gguf), "-r", "1", "-t", str(self.threads), "-o", "json"]
        is_ik = self.name == "ik_llama.cpp"
        base += [*self.arguments, *(("-w", "0") if is_ik else ("--no-warmup",))]
        if group == "prefill":
            rows = ["-p", joined([_WARM_UP, *wish.prefill]), "-n", "0"]
        elif is_ik:  # the depth is that of a prompt before, and 0 is none
            rows = ["-p", str(_WARM_UP), "-n", "0"]
            rows += [word for depth in wish.depth for word in ("-gp", f"{depth},{wish.decode}")]
        else:  # tokens at each depth; the one at 0 first, which also wakes what later ones need
            rows = ["-p", "0", "-n", str(wish.decode), "-d", joined(wish.depth)]
        output, _, peak = run_program([*base, *rows], f"llama-bench of {self.name}", self.timeout)
        found = dict(read_bench(json_rows(output)))
        wanted = [Row("prefill", n) for n in wish.prefill]
        if group == "depth":
            wanted = [Row("decode", wish.decode, depth) for depth in wish.depth]
        missing = [row.name for row in wanted if row not in found]
        if missing:
            raise PeerError(f"llama-bench of {self.name} gave no figure for {', '.join(missing)}")
        about = {name: json_rows(output)[0].get(name) for name in ("build_commit", "build_number")}
        about["arguments"] = self.arguments
        return Measured({row: found[row] for row in wanted}, peak_bytes=peak, about=about)

    def _batched(self, wish: Wish) -> Measured:
        """ik_llama.cpp gives every sequence the same token there; llama.cpp gives each its own."""
        context = max(wish.batch) * (wish.batch_depth + wish.decode)
        command = [str(self.batched), "-m", str(self.gguf), "-t", str(self.threads), "-c", str(context)]
        command += ["-npp", str(wish.batch_depth), "-ntg", str(wish.decode), "-npl", joined(wish.batch)]
        name = f"llama-batched-bench of {self.name}"
        output, log, peak = run_program([*command, *_program_arguments(self)], name, self.timeout)
        kind: Literal["same", "decode"] = "same" if self.name == "ik_llama.cpp" else "decode"
        values = {}
        for batch, speed in read_batched(output + log):
            values[Row(kind, wish.decode, wish.batch_depth, batch)] = speed
        if len(values) != len(set(wish.batch)):
            raise PeerError(f"{name} printed no table that can be read: {(output + log)[-300:]!r}")
        return Measured(values, peak_bytes=peak)

    def _streams(self, wish: Wish) -> Measured:
        slots = max(wish.batch)
        values = {}
        with self._served(slots, slots * (wish.batch_depth + wish.decode + 64)) as (server, process):
            for batch in wish.batch:
                speed = server.decode_speed(batch, wish.batch_depth, wish.decode)
                values[Row("decode", wish.decode, wish.batch_depth, batch)] = speed
            peak = peak_bytes_of(process.pid)
        return Measured(values, peak_bytes=peak, about={"server_arguments": self.server_arguments})

    def _first_token(self, wish: Wish) -> Measured:
        with self._served(1, wish.first_token + 64) as (server, process):
            values = server.first_tokens(wish.first_token)
            peak = peak_bytes_of(process.pid)
        return Measured(values, peak_bytes=peak, about={"server_arguments": self.server_arguments})

    def _start(self, wish: Wish) -> Measured:
        values = {}
        for row in (Row("ready"), Row("ready again")):
            with self._served(1, 4096) as (server, _):
                values[row] = server.ready_seconds
        return Measured(values)

    def _served(self, slots: int, context: int) -> Any:
        command = [str(self.server), "-m", str(self.gguf), "-t", str(self.threads)]
        command += ["-np", str(slots), "-c", str(max(context, 512)), *self.server_arguments]
        return started_server(command, self.name, self.timeout)


def _program_arguments(programs: LlamaPrograms) -> Iterator[str]:
    """Those of the server that llama-batched-bench knows too."""
    words = iter(programs.server_arguments)
    for word in words:
        if word in ("-cram", "--cache-ram"):
            next(words, None)
        else:
            yield word


@dataclass
class AtAddress:
    """A server that runs already, with OpenAI's completions over token ids, such as vLLM's."""

    name: str
    server: Completions
    longest: int

    def measure(self, group: Group, wish: Wish) -> Measured:
        wish = shortened(wish, self.longest)
        if group not in wish.groups() or group == "start":
            return Measured()
        if group == "first token":
            return Measured(self.server.first_tokens(wish.first_token))
        if group == "prefill":
            return Measured({Row("prefill", n): self.server.prefill_speed(n) for n in wish.prefill})
        pairs = [(1, depth) for depth in wish.depth]
        if group == "batch":
            pairs = [(batch, wish.batch_depth) for batch in wish.batch]
        speeds = {}
        for batch, depth in pairs:
            speed = self.server.decode_speed(batch, max(depth, 1), wish.decode)
            speeds[Row("decode", wish.decode, depth, batch)] = speed
        return Measured(speeds)


def joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def json_rows(output: str) -> list[dict[str, Any]]:
    """The rows that llama-bench printed. Raises PeerError when it printed something else."""
    try:
        rows = json.loads(output[output.index("[") :])
        for row in rows:
            row["n_prompt"], row["n_gen"], row["avg_ts"]
    except (ValueError, TypeError, KeyError):
        raise PeerError(f"llama-bench printed no rows that can be read: {output[:200]!r}") from None
    return list(rows)


def read_bench(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Row, float]]:
    """llama.cpp says the depth in n_depth, ik_llama.cpp in n_prompt of a row with n_gen."""
    for row in rows:
        speed = float(row["avg_ts"])
        if row["n_gen"] > 0:
            yield Row("decode", row["n_gen"], row.get("n_depth", row["n_prompt"])), speed
        else:
            yield Row("prefill", row["n_prompt"]), speed


def read_batched(text: str) -> Iterator[tuple[int, float]]:
    """(batch, tokens a second of all) of each line `| PP | TG | B | N_KV | T_PP | S_PP | T_TG | S_TG |`."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.lstrip().startswith("|") and len(cells) >= 8 and cells[0].isdigit():
            yield int(cells[2]), float(cells[7])
