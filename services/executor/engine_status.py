"""What an engine tells about itself, in its own process and to its server's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockUsage:
    """KV blocks of one group, as mxgpt.v1.BlockUsage."""

    group: str
    block_size: int
    num_blocks: int
    num_free: int  # unused ones, cached or not
    num_cached: int  # of them, kept for the prefix cache


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing; counters are since its start."""

    num_running: int  # sequences in the batch
    num_waiting: int  # sequences that wait for admission
    blocks: tuple[BlockUsage, ...]  # one for each group
    num_steps: int
    num_prompt_tokens: int  # computed, those computed again after a preemption included
    num_cached_tokens: int  # of prompts, found in the prefix cache
    num_output_tokens: int  # drawn
    num_preemptions: int
