"""LoRA adapters that come and go while an engine serves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError

from harmonium.checkpoint.lora import LoraAdapter, open_lora
from harmonium.config import LoraSource
from harmonium.engine.adapters import AdapterTable, ServedAdapter
from harmonium.engine.scheduler import Scheduler
from harmonium.engine.worker import Worker
from harmonium.errors import EngineClosed, EngineError, MemoryPlanError
from harmonium.model.adapter_memory import SizedAdapter, adapter_bytes
from harmonium.model.runner import AdapterRunner, Runner


class AdapterUpdates:
    """Loads adapters into a runner and takes them out, between two of its steps.

    limit_bytes: what all adapters may take, with what a step needs for them; None: any amount.
    """

    def __init__(
        self, table: AdapterTable, worker: Worker, runner: Runner, limit_bytes: int | None = None
    ) -> None:
        self._table = table
        self._worker = worker
        self._runner = runner
        self._limit_bytes = limit_bytes
        self._turn = threading.Lock()

    async def load(self, source: LoraSource) -> None:
        """Read an adapter and serve it. Steps go on meanwhile.

        Raises ConfigError (no such folder, a name that is taken), CheckpointError for what is wrong with its
        files, MemoryPlanError, EngineClosed, EngineError: this engine takes none.
        """
        await asyncio.to_thread(self._load, source, self._adapter_runner())

    def _load(self, source: LoraSource, runner: AdapterRunner) -> None:
        with self._turn:  # one after the other, so that each sees what those before it take
            index = self._table.free_index(source.name)
            adapter = self._read(source)

            def put(_: Scheduler) -> bool:
                runner.set_adapter(index, adapter)
                return True

            try:
                self._worker.between_steps(put).result()
            except CancelledError:
                raise EngineClosed("the engine was closed before the adapter was there") from None
            sizes = adapter.nbytes, adapter.max_rank
            self._table.add(ServedAdapter(source.name, index, adapter.digest, *sizes))

    async def unload(self, name: str) -> None:
        """Serve no new request with it; its memory is given back when those that use it are over.

        Raises RequestError when there is none of that name, EngineClosed, EngineError.
        """
        runner = self._adapter_runner()
        adapter = self._table.retire(name)

        def drop(scheduler: Scheduler) -> bool:
            if self._table.is_awaited(adapter) or _is_used(adapter, scheduler):
                return False
            runner.set_adapter(adapter.index, None)
            self._table.forget(adapter)
            return True

        # Nobody waits for the last of its requests.
        self._worker.between_steps(drop)

    def _read(self, source: LoraSource) -> LoraAdapter:
        with open_lora(source.path, self._runner.config) as files:
            held: Iterable[SizedAdapter] = self._table.held
            needed = adapter_bytes(self._runner.config, [*held, files], self._runner.max_batch_tokens)
            if self._limit_bytes is not None and needed > self._limit_bytes:
                raise MemoryPlanError(
                    f"with this one the adapters need {needed:,} bytes; there are {self._limit_bytes:,} "
                    "for them"
                )
            return files.load()

    def _adapter_runner(self) -> AdapterRunner:
        if not isinstance(self._runner, AdapterRunner):
            raise EngineError("this engine takes no adapters while it serves")
        return self._runner


def _is_used(adapter: ServedAdapter, scheduler: Scheduler) -> bool:
    sequences = (*scheduler.running, *scheduler.waiting)
    return any(sequence.adapter_index == adapter.index for sequence in sequences)
