"""What a request must satisfy before the engine takes it; each refusal is that request's alone."""

from __future__ import annotations

import numpy as np

from services.executor.blocks import BlockManager
from services.executor.engine_config import EngineConfig
from services.executor.request import Request
from shared.errors import Reason, ServiceError, invalid_field


def check_request(request: Request, config: EngineConfig, blocks: BlockManager, vocab_size: int) -> None:
    """Check that a request could run on an idle engine.

    Raises:
        ServiceError: PROMPT_EMPTY, TOKEN_ID_INVALID, FIELD_INVALID, CONTEXT_LENGTH_EXCEEDED or KV_EXHAUSTED.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    if num_prompt_tokens == 0:
        raise ServiceError(Reason.PROMPT_EMPTY, "the prompt holds no token; send at least one")
    _check_ids(request, vocab_size)
    if num_prompt_tokens >= config.max_context:
        raise ServiceError(
            Reason.CONTEXT_LENGTH_EXCEEDED,
            f"the prompt has {num_prompt_tokens} tokens; at most {config.max_context - 1} leave room for one more",
        )
    num_positions = num_prompt_tokens + max_tokens(request, config) - 1  # an output's last token is never run
    short = blocks.shortage(num_positions, config.max_batch_tokens)
    if short is not None:
        raise ServiceError(
            Reason.KV_EXHAUSTED,
            f"{num_positions} tokens of prompt and output need more KV than the {short.num_blocks} blocks of "
            f"{short.block_size} tokens in group {short.group}; ask for fewer",
        )


def check_queue(request: Request, config: EngineConfig, num_taken: int) -> None:
    """Check that `num_taken` sequences leave room for the request's outputs.

    The bound counts sequences, for each takes a place in the batch: a request with n outputs takes n.

    Raises:
        ServiceError: QUEUE_FULL, or FIELD_INVALID for more outputs than there are places.
    """
    num_places = config.max_running + config.max_waiting
    num_outputs = request.sampling.num_outputs
    if num_outputs > num_places:
        raise invalid_field("sampling.n", f"this executor holds at most {num_places} outputs, got {num_outputs}")
    if num_taken + num_outputs > num_places:
        raise ServiceError(
            Reason.QUEUE_FULL,
            f"{num_taken} sequences run or wait here, {num_places} at most; try again later",
            retry_after=config.retry_after,
        )


def max_tokens(request: Request, config: EngineConfig) -> int:
    """Most tokens of an output: what was asked for, cut to what the context holds."""
    return min(request.stopping.max_tokens, config.max_context - len(request.prompt_token_ids))


def _check_ids(request: Request, vocab_size: int) -> None:
    resumed = [token_id for output in request.resumed.values() for token_id in output.token_ids]
    ids = np.array([*request.prompt_token_ids, *resumed, *request.sampling.logit_bias], np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ServiceError(Reason.TOKEN_ID_INVALID, f"token ids lie from 0 to {vocab_size - 1}")
    for index in request.resumed:
        if not 0 <= index < request.sampling.num_outputs:
            raise invalid_field("resume.outputs.index", f"below n = {request.sampling.num_outputs}, got {index}")
