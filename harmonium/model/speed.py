"""What decoding can reach here, from what a token reads and what the machine gave when it was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from harmonium.checkpoint.checkpoint import Checkpoint
from harmonium.checkpoint.expert_pieces import expert_pieces
from harmonium.config import EngineConfig
from harmonium.kernels.matmul import measure_read_bandwidth
from harmonium.model.costs import step_cost
from harmonium.model.disk_rate import measure_disk_rate
from harmonium.model.memory import MemoryPlan, expert_bytes

MEASURED_BYTES = 256 << 20
"""Beyond any cache."""

_DISK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class StreamedSpeed:
    """What the disk adds for streamed experts, where a token may choose any expert: text that prefers some
    finds more of them in memory.

    in_memory: share of experts. disk_bytes_per_token: of one answer alone. chunk_tokens: of a prompt, which
    read at most disk_bytes_per_chunk. disk_bytes_per_second: measured just now.
    """

    in_memory: float
    disk_bytes_per_token: float
    disk_bytes_per_second: float
    chunk_tokens: int
    disk_bytes_per_chunk: float


@dataclass(frozen=True, slots=True)
class SpeedLimit:
    """What one answer's decoding cannot exceed: each token reads its weights once, from memory.

    bytes_per_token: at a context of 1,024 tokens. read_bytes_per_second: of all threads, measured just now.
    streamed: None where no experts are.
    """

    bytes_per_token: float
    read_bytes_per_second: float
    streamed: StreamedSpeed | None = None

    @property
    def decode_tokens_per_second_at_most(self) -> float:
        """As memory alone allows; with streamed experts what is expected, the disk's time added."""
        seconds = self.bytes_per_token / self.read_bytes_per_second
        streamed = self.streamed
        if streamed is not None:
            seconds += streamed.disk_bytes_per_token / streamed.disk_bytes_per_second
        return 1 / seconds

    def to_json(self) -> dict[str, object]:
        return {
            **asdict(self),
            "decode_tokens_per_second_at_most": self.decode_tokens_per_second_at_most,
        }

    def text(self) -> str:
        """For people, some lines."""
        tokens, memory = self.decode_tokens_per_second_at_most, self.read_bytes_per_second / 1e9
        if self.streamed is None:
            return (
                f"speed      at most {tokens:.3g} tokens a second for one "
                f"answer: a token reads {self.bytes_per_token / 1e9:.3g} GB,\n"
                f"           and memory gave {memory:.3g} GB/s just now; "
                "harmonium bench MODEL measures the model\n"
            )
        streamed = self.streamed
        disk = streamed.disk_bytes_per_second
        return (
            f"speed      about {tokens:.3g} tokens a second for one answer, if every expert is as likely:\n"
            f"           {streamed.in_memory:.0%} of them are in memory, so a token reads "
            f"{streamed.disk_bytes_per_token / 1e9:.3g} GB from the disk, which gave {disk / 1e9:.3g} GB/s\n"
            f"           just now, and {self.bytes_per_token / 1e9:.3g} GB from memory ({memory:.3g} GB/s); "
            f"a prompt reads {streamed.disk_bytes_per_chunk / 1e9:.3g} GB\n"
            f"           ({streamed.disk_bytes_per_chunk / disk:.3g} s) for each {streamed.chunk_tokens:,} "
            "tokens or part of it\n"
        )


def measure_speed_limit(checkpoint: Checkpoint, config: EngineConfig, memory: MemoryPlan) -> SpeedLimit:
    """Measure the memory for some tenths of a second, and the disk where it is used. The process's threads
    must be configured, the checkpoint open. Takes MEASURED_BYTES. Raises CheckpointError.
    """
    model = checkpoint.config
    cost = step_cost(
        model,
        config.weights,
        num_tokens=1,
        num_sequences=1,
        num_logit_rows=1,
        context=1024,
        experts=checkpoint.expert_format,
        kv_cache=config.kv_cache,
    )
    streamed = _streamed_speed(checkpoint, memory) if memory.streams_experts else None
    rate = measure_read_bandwidth(np.ones(MEASURED_BYTES, np.uint8), repeats=3)
    return SpeedLimit(cost.bytes, rate, streamed)


def _streamed_speed(checkpoint: Checkpoint, memory: MemoryPlan) -> StreamedSpeed:
    model = checkpoint.config
    layers = [expert_pieces(checkpoint, layer) for layer in range(model.num_layers)]
    rate = measure_disk_rate(layers, model.num_experts, _DISK_SECONDS)
    whole = expert_bytes(model, "mxfp4")
    present = memory.num_expert_slots / (model.num_layers * model.num_experts)
    active = model.num_active_experts / model.num_experts
    return StreamedSpeed(
        in_memory=present,
        disk_bytes_per_token=(1 - present) * active * whole,
        disk_bytes_per_second=rate,
        chunk_tokens=memory.max_batch_tokens,
        disk_bytes_per_chunk=(1 - present) * whole,
    )
