"""Checks a model's tokenizer beside the loading of its weights, and finds the ids that end generation.

A large vocabulary takes some tenths of a second of Python, for which the threads that read weights would have to wait:
it is checked in a process of its own.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from shared.errors import Reason, ServiceError
from shared.gguf import GGUFFile, read_gguf
from shared.tokenizer_data import tokenizer_data_from_gguf

MIN_FILE_BYTES = 256 << 20  # of a file that is worth a process


class TokenizerCheck:
    """The check of one file, begun now if the file is large; a context manager, which ends it."""

    def __init__(self, path: Path) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if path.is_file() and path.stat().st_size >= MIN_FILE_BYTES:
            command = [sys.executable, "-m", "services.loader.tokenizer_check", str(path)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def __enter__(self) -> TokenizerCheck:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def eog_token_ids(self, file: GGUFFile) -> tuple[int, ...]:
        """The ids that end generation, ascending; none where the file has no tokenizer. Waits for the check.

        Raises:
            ServiceError: as `tokenizer_data_from_gguf`.
        """
        if self._process is None:
            return _check(file)
        answer, _ = self._process.communicate()
        code, self._process = self._process.returncode, None
        if code != 0:
            raise ServiceError(Reason.INTERNAL, "the process that checks tokenizers has failed; the log says why")
        found = pickle.loads(answer)  # from our own process
        if isinstance(found, ServiceError):
            raise found
        return tuple(found)


def _check(file: GGUFFile) -> tuple[int, ...]:
    if "tokenizer.ggml.model" not in file.metadata:
        return ()
    return tokenizer_data_from_gguf(file, model="", digest="").eog_token_ids


def _main(path: Path) -> None:
    found: tuple[int, ...] | ServiceError
    try:
        found = _check(read_gguf(path))
    except ServiceError as error:
        found = error
    sys.stdout.buffer.write(pickle.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
