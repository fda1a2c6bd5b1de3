"""What an engine tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from harmonium.engine.protocol import FinishReason
from harmonium.model.expert_cache import ExpertCounts


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """What an engine holds now and did so far; consistent, taken between two steps.

    waiting counts the preempted too. num_prefill_tokens counts computed prompt tokens (again after a
    preemption), num_answer_tokens sampled ones, num_forced_tokens those that constraints put behind them.
    constraint_seconds: time that the engine waited for masks. num_cached_tokens: tokens not computed because
    their blocks were cached, in num_prefix_hits resumptions. num_restored_blocks: full-attention blocks read
    from the cache folder. num_draft_tokens: tokens guessed, in num_drafts
    guesses; num_accepted_draft_tokens: those that came true. finished: how many requests ended for each
    reason. experts: what streaming experts from the disk came to; None where they are not streamed.
    """

    running: int = 0
    waiting: int = 0
    full_blocks_free: int = 0
    full_blocks_cached: int = 0
    full_blocks_used: int = 0
    window_blocks_free: int = 0
    window_blocks_cached: int = 0
    window_blocks_used: int = 0
    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_answer_tokens: int = 0
    num_forced_tokens: int = 0
    constraint_seconds: float = 0.0
    num_cached_tokens: int = 0
    num_prefix_hits: int = 0
    num_preemptions: int = 0
    num_restored_blocks: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    experts: ExpertCounts | None = None
    finished: dict[FinishReason, int] = field(default_factory=dict)
