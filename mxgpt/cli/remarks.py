"""What is said on stderr about a result: how it ended and how fast it came."""

from __future__ import annotations

import sys

from mxgpt.cli.terminal import is_terminal, note
from mxgpt.results import FinishReason, Output, Result


def note_lengths(result: Result, max_tokens: int | None, always: bool) -> None:
    """Say which limit cut an output off; unless `always`, to a person only."""
    if always or is_terminal(sys.stderr):
        cut = [output for output in result.outputs if output.finish_reason is FinishReason.LENGTH]
        for remark in sorted({_describe_length(output, max_tokens) for output in cut}):
            note(remark)


def describe_speed(result: Result) -> str:
    """Tokens and rates of a result, in a line."""
    num_tokens = sum(output.usage.num_output_tokens for output in result.outputs if output.usage)
    timings = result.timings
    assert timings is not None
    # The first token of an output falls to the prompt.
    rates = [
        (o.usage.num_output_tokens - 1) / o.timings.decode_seconds
        for o in result.outputs
        if o.usage and o.timings and o.timings.decode_seconds > 0
    ]
    return (
        f"{len(result.prompt_token_ids)} prompt tokens, first token after {timings.first_token_seconds:.3f} s, "
        f"{num_tokens} tokens at {sum(rates):.1f} tokens/s{_describe_resumes(result.num_resumes)}"
    )


def _describe_length(output: Output, max_tokens: int | None) -> str:
    assert output.usage is not None
    num_tokens = output.usage.num_output_tokens
    if num_tokens == max_tokens:
        return f"stopped at {num_tokens} tokens (--max-tokens)"
    return f"stopped: the context of {output.usage.num_prompt_tokens + num_tokens} tokens is full"


def _describe_resumes(num_resumes: int) -> str:
    if num_resumes < 2:
        return ", resumed once" if num_resumes else ""
    return f", resumed {num_resumes} times"
