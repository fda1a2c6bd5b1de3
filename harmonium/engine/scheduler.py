"""Which tokens the next step computes.

Continuous batching: every step takes one token of each sequence that decodes, then fills what is left of
max_batch_tokens (of the pace, while anybody decodes) with prefill, first of the sequences that run already,
then of those that wait, in order of arrival. When blocks run out, the sequence that arrived last goes back to
the head of the queue with its tokens kept; it never takes a block from one that arrived before it, so the
oldest always gets on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from harmonium.engine.blocks import PagedCache
from harmonium.engine.drafts import MAX_DRAFT_TOKENS, Drafter
from harmonium.engine.pace import PrefillPace
from harmonium.engine.protocol import FinishReason
from harmonium.engine.sequence import Advance, Sequence
from harmonium.model.batch import Batch, RowSampling, StepResult


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next num_tokens tokens of a sequence, as one step computes them, and behind them a draft's."""

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether nothing is left to compute after it, so that its last row gives the next token."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def size(self) -> int:
        """Rows of the step that it takes."""
        return self.num_tokens + len(self.draft)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did for one sequence that got tokens or ended."""

    sequence: Sequence
    advance: Advance

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.advance.finish_reason


class Scheduler:
    """Sequences that wait and run. It changes the books of its cache; it never computes."""

    def __init__(
        self,
        cache: PagedCache,
        max_sequences: int,
        max_batch_tokens: int,
        drafter: Drafter | None = None,
        cost: Callable[[int], float] = float,
        pace: PrefillPace | None = None,
    ) -> None:
        """drafter: who guesses tokens, None: nobody. cost: of a step, by its number of tokens. pace: limits
        prefill while sequences decode; None: max_batch_tokens alone does.
        """
        self.pace = pace
        self.cache = cache
        self._drafter = drafter
        self._cost = cost
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_hits = 0
        self.num_cached_tokens = 0
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_draft_tokens = 0
        # Each running sequence that decodes needs a token of every step.
        self._max_running = min(max_sequences, max_batch_tokens)
        self._max_batch_tokens = max_batch_tokens

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence, wherever it is, and give its blocks back."""
        if sequence.lease is not None:
            self.running.remove(sequence)
            self._close(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """Choose the next step and take the blocks that it writes to. Empty only when there is no work."""
        chunks: list[Chunk] = []
        num_left = self._max_batch_tokens
        is_short = False
        for is_prefill in (False, True):
            if is_prefill and chunks and self.pace is not None:
                num_left = min(num_left, self.pace.limit)
            for sequence in [s for s in self.running if (s.num_pending > 1) is is_prefill]:
                if sequence.lease is None:
                    continue  # preempted a moment ago
                wanted = min(sequence.num_pending, sequence.chunk_limit, num_left)
                num_tokens = self._extend(sequence, wanted, chunks)
                is_short = is_short or num_tokens < wanted
                if num_tokens:
                    chunks.append(Chunk(sequence, num_tokens))
                    num_left -= num_tokens
        while not is_short and self.waiting and num_left and len(self.running) < self._max_running:
            chunk, is_short = self._admit(num_left, is_alone=not chunks)
            if chunk is not None:
                chunks.append(chunk)
                num_left -= chunk.num_tokens
        assert chunks or not self.has_work, "there is work but no step"
        return self._with_drafts(chunks, num_left) if self._drafter is not None else chunks

    def _with_drafts(self, chunks: list[Chunk], num_left: int) -> list[Chunk]:
        """The chunks; those that decode with guesses where they pay and rows and blocks are left."""
        drafted: list[Chunk] = []
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        for chunk in chunks:
            draft = self._draft(chunk, num_tokens, num_left) if chunk.sequence.num_pending == 1 else ()
            num_tokens += len(draft)
            num_left -= len(draft)
            drafted.append(replace(chunk, draft=draft) if draft else chunk)
        return drafted

    def _draft(self, chunk: Chunk, num_tokens: int, num_left: int) -> tuple[int, ...]:
        sequence, lease = chunk.sequence, chunk.sequence.lease
        assert lease is not None and self._drafter is not None
        if sequence.returned_logits is not None:
            return ()
        allowed = min(
            sequence.drafts.allowance(num_tokens, self._cost),
            sequence.max_total - sequence.num_tokens - 1,  # the last one is drawn, never guessed
            num_left,
            MAX_DRAFT_TOKENS,
        )
        if allowed < 1:
            return ()
        proposed = self._drafter.propose(sequence.token_ids, allowed)
        if not len(proposed):
            return ()
        wanted = 1 + len(proposed)
        # A guess takes blocks that nobody is about to need, and never what another sequence computed.
        has_spare = min(self.cache.full.num_free, self.cache.windowed.num_free) > len(self.running)
        room = self.cache.extend(lease, wanted) if has_spare else self.cache.room(lease)
        return tuple(proposed[: max(0, min(wanted, room) - 1)].tolist())

    def _extend(self, sequence: Sequence, wanted: int, chunks: list[Chunk]) -> int:
        """Take blocks for the next tokens, preempting later arrivals while there is room for none of them."""
        assert sequence.lease is not None
        num_tokens = self.cache.extend(sequence.lease, wanted)
        while not num_tokens and wanted:
            last = self.running[-1]
            if last is sequence or any(chunk.sequence is last for chunk in chunks):
                return 0
            self._preempt(last)
            num_tokens = self.cache.extend(sequence.lease, wanted)
        return num_tokens

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._close(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _close(self, sequence: Sequence) -> None:
        assert sequence.lease is not None
        self.cache.close(sequence.lease)
        sequence.lease = None

    def _admit(self, num_left: int, is_alone: bool) -> tuple[Chunk | None, bool]:
        """Start the first that waits. (its chunk or None, whether blocks were too few for all it asked).

        is_alone: nobody else computes in this step, so all of its stored prefix may be read at once.
        """
        sequence = self.waiting[0]
        if sequence.blocked_at == self.cache.full.num_released:
            return None, True  # nothing was given back since it last found no room
        if sequence.returned_logits is None and self._restore(sequence, is_alone):
            return None, True
        lease = self.cache.open(
            sequence.token_ids,
            sequence.cache_key,
            sequence.num_prompt,
            reserve=len(self.running),  # a block for each that runs: or the newcomer would soon be preempted
            reuses=sequence.returned_logits is None,
        )
        if lease is None:
            sequence.blocked_at = self.cache.full.num_released
            return None, True
        wanted = min(sequence.num_tokens - lease.num_computed, sequence.chunk_limit, num_left)
        num_tokens = self.cache.extend(lease, wanted)
        if not num_tokens:
            self.cache.close(lease)
            return None, True
        sequence.lease = lease
        self.num_prefix_hits += lease.num_computed > 0
        self.num_cached_tokens += lease.num_computed
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(lease.num_computed, sequence.num_prompt)
            sequence.began = time.monotonic()
        self.running.append(self.waiting.popleft())
        return Chunk(sequence, num_tokens), num_tokens < wanted

    def _restore(self, sequence: Sequence, is_alone: bool) -> bool:
        """Read what is stored of its prefix; True while more is to come, in later steps."""
        while self.cache.restore(sequence.token_ids, sequence.cache_key):
            if not is_alone:
                return True
        return False

    def commit(self, chunks: list[Chunk], result: StepResult) -> list[Progress]:
        """Take a step's result: append tokens, give back what left the window, remove what ended."""
        progress: list[Progress] = []
        row = 0
        num_undrafted = sum(chunk.num_tokens for chunk in chunks)
        for chunk in chunks:
            sequence, is_last, first_row = chunk.sequence, chunk.is_last, row
            row += _num_rows(chunk)
            assert sequence.lease is not None
            num_computed = chunk.num_tokens
            if is_last and sequence.returned_logits is None:
                advance = sequence.take_drafted(result.tokens[first_row:row], chunk.draft)
                progress.append(Progress(sequence, advance))
                num_computed += self._settle(chunk, advance, num_undrafted)
            self.cache.commit(sequence.lease, sequence.token_ids, num_computed)
            if sequence.returned_logits is not None:
                assert result.logits_RV is not None
                sequence.returned_logits.append(result.logits_RV[first_row:row].copy())
                if is_last:
                    progress.append(Progress(sequence, Advance((), "length")))
        for done in progress:
            if done.finish_reason is not None:
                self.remove(done.sequence)
        return progress

    def _settle(self, chunk: Chunk, advance: Advance, num_undrafted: int) -> int:
        """Book a chunk's guess; how many of its tokens came true, so that their keys and values stay."""
        # The token after the true ones was drawn, not guessed; those that a constraint forced came behind it.
        num_true = min(len(chunk.draft), len(advance.tokens) - advance.num_forced - 1)
        if self._drafter is not None and chunk.num_tokens == 1:
            chunk.sequence.drafts.settle(len(chunk.draft), num_true, num_undrafted, self._cost)
        if chunk.draft:
            self.num_drafts += 1
            self.num_draft_tokens += len(chunk.draft)
            self.num_accepted_draft_tokens += num_true
        return num_true


def _num_rows(chunk: Chunk) -> int:
    """Rows of logits that a chunk needs."""
    if chunk.sequence.returned_logits is not None:
        return chunk.num_tokens
    return 1 + len(chunk.draft) if chunk.is_last else 0


def build_batch(chunks: list[Chunk], cache: PagedCache) -> Batch:
    """The arrays of a step. Costs the same at every context length but for the copy of the table rows."""
    num_tokens = np.array([chunk.size for chunk in chunks], np.int32)
    start = np.array([chunk.sequence.num_computed for chunk in chunks], np.int32)
    query_start = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(num_tokens, out=query_start[1:])
    token_id = np.empty(query_start[-1], np.int32)
    logit_row: list[int] = []
    sampling: list[RowSampling | None] = []
    rows: list[int] = []
    for i, chunk in enumerate(chunks):
        sequence = chunk.sequence
        assert sequence.lease is not None
        rows.append(sequence.lease.row)
        first, end = int(query_start[i]), int(query_start[i + 1])
        computed, undrafted = sequence.lease.num_computed, first + chunk.num_tokens
        token_id[first:undrafted] = sequence.token_ids[computed : computed + chunk.num_tokens]
        token_id[undrafted:end] = chunk.draft
        if sequence.returned_logits is not None:
            logit_row.extend(range(first, end))
            sampling.extend([None] * chunk.num_tokens)
        elif chunk.is_last:
            logit_row.extend(range(undrafted - 1, end))
            sampling.extend(sequence.row_sampling(chunk.draft[:i]) for i in range(len(chunk.draft) + 1))
    width = -(-int((start + num_tokens).max()) // cache.block_tokens)
    adapter = np.array([chunk.sequence.adapter_index for chunk in chunks], np.int32)
    return Batch(
        token_id_T=token_id,
        position_T=np.arange(len(token_id), dtype=np.int32) + np.repeat(start - query_start[:-1], num_tokens),
        query_start_S1=query_start,
        context_length_S=start + num_tokens,
        full_block_SB=cache.full_block_SB[rows, :width],
        window_block_SB=cache.window_block_SB[rows, :width],
        logit_row_R=np.array(logit_row, np.int32),
        sampling=tuple(sampling),
        wants_logits=any(chunk.sequence.returned_logits is not None for chunk in chunks),
        adapter_S=adapter if adapter.max() >= 0 else None,
    )
