"""Starts the engine's process: the first thing that an executor does.

The process imports numpy and sets up its device while its server imports gRPC and attaches to the loader, either of
which takes some tenths of a second. Hence this module, and whatever imports it before that, imports little.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from services.executor.blas import blas_environment

END_SECONDS = 5.0
DESCRIPTOR_SECONDS = 10.0  # from the first descriptor of the weights to the last


@dataclass(frozen=True)
class EngineProcess:
    """The engine's process, and our ends of the two sockets to it."""

    process: subprocess.Popen[bytes]
    messages: socket.socket  # see `services.executor.messages`
    descriptors: socket.socket  # carries those of the weights, once

    def end(self) -> None:
        """Make the process end, and wait for it: that its sockets close is enough, a kill follows if it is not."""
        self.messages.close()
        self.descriptors.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """For a process that is started within for good: Ctrl-C reaches the whole group, but the server decides its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def start_engine(device: str, num_threads: int, log_level: str, log_format: str) -> Iterator[EngineProcess]:
    """An engine's process, which `services.executor.engine_client` talks with; it ends with this context at the latest.

    Args:
        device: "cpu" or "cuda:N".
        num_threads: of BLAS.
        log_level: of the process's logs; `log_format` likewise.
    """
    messages, their_messages = socket.socketpair()
    descriptors, their_descriptors = socket.socketpair()
    with their_messages, their_descriptors, _interrupts_blocked():
        inherited = (their_messages.fileno(), their_descriptors.fileno())
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "services.executor.engine_process",
                *map(str, inherited),
                device,
                log_level,
                log_format,
            ],
            pass_fds=inherited,
            env={**os.environ, **blas_environment(num_threads, os.environ)},
        )
    engine = EngineProcess(process, messages, descriptors)
    try:
        yield engine
    finally:
        engine.end()
