"""Checks a model's tokenizer beside the loading of its weights, and finds the ids that end generation.

A large vocabulary takes some tenths of a second of Python, for which the threads that read weights would have to wait:
it is checked in a process of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile, read_gguf
from shared.tokenizer_data import tokenizer_data_from_gguf

log = logging.getLogger(__name__)

MIN_FILE_BYTES = 256 << 20  # of a file that is worth a process


class TokenizerChecks:
    """Begins the checks of one loader.

    Args:
        keeps_ready: a process waits for the next large file. To start one takes half as long as its work, which matters
            where weights are there in a second.
    """

    def __init__(self, keeps_ready: bool = False) -> None:
        self._keeps_ready = keeps_ready
        self._waiting: list[subprocess.Popen[bytes]] = []  # one at most

    def make_ready(self) -> None:
        """Start the process that is to wait, where one is wanted and none does."""
        if self._keeps_ready and not self._waiting:
            self._waiting.append(_start())

    @contextlib.contextmanager
    def begin(self, path: Path) -> Iterator[TokenizerCheck]:
        """The check of one file, begun now if the file is large."""
        if not _is_large(path):
            yield TokenizerCheck(None)
            return
        process = self._waiting.pop() if self._waiting else _start()
        if process.poll() is not None:  # ended by someone while it waited
            _end(process)
            process = _start()
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has failed, as its exit code will tell
                process.stdin.write(os.fsencode(path))
                process.stdin.close()
            try:
                self.make_ready()  # now, since the next load may begin as soon as this one ends
            except OSError as error:  # this load has its process
                log.warning("no process waits to check the next tokenizer: %s", error)
            yield TokenizerCheck(process)
        finally:
            _end(process)

    def close(self) -> None:
        """End the process that waits."""
        self._keeps_ready = False
        for process in self._waiting:
            _end(process)
        self._waiting.clear()


class TokenizerCheck:
    """The check of one file, in a process of its own or, for a small file, when it is asked for."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self._process = process

    def eog_token_ids(self, file: GGUFFile) -> tuple[int, ...]:
        """The ids that end generation, ascending; none where the file has no tokenizer. Waits for the check.

        Raises:
            ServiceError: as `tokenizer_data_from_gguf`.
        """
        if self._process is None:
            return _check(file)
        assert self._process.stdout is not None
        answer = self._process.stdout.read()
        if self._process.wait() != 0:
            raise ServiceError(Reason.INTERNAL, "the process that checks tokenizers has failed; the log says why")
        found = pickle.loads(answer)  # from our own process
        if isinstance(found, ServiceError):
            raise found
        return tuple(found)


def _check(file: GGUFFile) -> tuple[int, ...]:
    if "tokenizer.ggml.model" not in file.metadata:
        return ()
    return tokenizer_data_from_gguf(file, model="", digest="").eog_token_ids


def _is_large(path: Path) -> bool:
    try:
        status = path.stat()
    except (OSError, ValueError):  # whoever parses it says why
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size >= MIN_FILE_BYTES


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "services.loader.tokenizer_check"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _main() -> None:
    """Wait for a path, which ends with standard input; without one the loader has ended."""
    path = os.fsdecode(sys.stdin.buffer.read())
    if not path:
        return
    found: tuple[int, ...] | ServiceError
    try:
        found = _check(read_gguf(Path(path)))
    except ServiceError as error:
        found = error
    sys.stdout.buffer.write(pickle.dumps(found))


if __name__ == "__main__":
    _main()
