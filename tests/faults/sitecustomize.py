"""Plants faults into engines, loaders or commands of a test: Python imports this where its folder is on PYTHONPATH.

MXGPT_FAULT says what befalls the numpy runner: "raise", an error in each step that a token with the id MXGPT_FAULT_ID
is part of; "break", the same, and in every step from then on; "memory", a MemoryError in each step with more than 64
tokens of one sequence; "slow", an engine that takes a while for each step, so that its streams last; "slow load",
a loader that takes a while for each tensor; "halt", a command that stops itself (SIGSTOP) once it has taken SIGINT over
from Python, until it is continued.
"""

import os
import signal
import sys
import time

ENGINE_FAULTS = ("raise", "break", "memory", "slow")
SLOW_SECONDS = 0.05  # of a step
SLOW_LOAD_SECONDS = 0.5  # of a tensor


def plant(fault: str, token_id: int) -> None:
    from services.executor.runner import NumpyRunner

    forward, is_broken = NumpyRunner.forward, False

    def faulty(self, batch):
        nonlocal is_broken
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        elif fault == "memory":
            if max(part.num_tokens for part in batch.sequences) > 64:
                raise MemoryError("planted by a test")
        elif is_broken or token_id in batch.token_ids:
            is_broken = fault == "break"
            raise RuntimeError("planted by a test")
        return forward(self, batch)

    NumpyRunner.forward = faulty


def plant_slow_load() -> None:
    from services.loader import cpu_memory

    fill = cpu_memory.fill

    def slow(planned, file, index, buffer, count):
        def count_late(num_bytes):
            time.sleep(SLOW_LOAD_SECONDS)
            count(num_bytes)

        fill(planned, file, index, buffer, count_late)

    cpu_memory.fill = slow


def plant_halt() -> None:
    take = signal.signal

    def halting(number, handler):
        before = take(number, handler)
        if number == signal.SIGINT and handler == signal.SIG_DFL:
            signal.signal = take
            os.kill(os.getpid(), signal.SIGSTOP)
        return before

    signal.signal = halting


FAULT = os.environ.get("MXGPT_FAULT")
if FAULT == "halt" and "mxgpt" in sys.orig_argv:
    plant_halt()
elif FAULT == "slow load" and "services.loader" in sys.orig_argv:
    plant_slow_load()
elif FAULT in ENGINE_FAULTS and "services.executor.engine_process" in sys.orig_argv:
    plant(FAULT, int(os.environ.get("MXGPT_FAULT_ID", "-1")))
