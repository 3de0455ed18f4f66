"""Which SHA-256 each model file must have: a list in the form that sha256sum writes and publishers offer.

A line is a hash in hexadecimal, a blank, a blank or an asterisk, and a path, relative to the list's directory. With a
list, a file that is not on it is not loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import Reason, ServiceError


@dataclass(frozen=True)
class Pins:
    """The list, and the SHA-256 that it has for each file, symbolic links followed."""

    path: Path
    by_file: Mapping[Path, str]

    @classmethod
    def read(cls, path: Path) -> Pins:
        """Read a list.

        Raises:
            ValueError: for a line that is none of a list's, or two that disagree.
            OSError: if it can't be read.
        """
        by_file: dict[Path, str] = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
            if found is None:
                raise ValueError(f"{path}: line {number} is no SHA-256 and a file, as sha256sum writes them")
            file = (path.parent / found[2]).resolve()
            if by_file.setdefault(file, found[1].lower()) != found[1].lower():
                raise ValueError(f"{path}: line {number} has another SHA-256 for {found[2]} than a line before it")
        return cls(path, by_file)

    def of(self, files: Sequence[Path]) -> tuple[str, ...]:
        """The SHA-256 that each file must have.

        Raises:
            ServiceError: MODEL_CHANGED for a file that is not on the list.
        """
        return tuple(self._of(file) for file in files)

    def check(self, file: Path, contents: bytes) -> None:
        """Refuse a small file, read in full, that is not on the list or has another SHA-256 (MODEL_CHANGED)."""
        found = hashlib.sha256(contents).hexdigest()
        if found != self._of(file):
            why = f"{file}: the file has SHA-256 {found}, not {self._of(file)} as pinned in {self.path}."
            raise ServiceError(Reason.MODEL_CHANGED, why, metadata={"file": str(file)})

    def _of(self, file: Path) -> str:
        pin = self.by_file.get(file.resolve())
        if pin is None:
            why = f"{file}: the file is not on the list of pins {self.path}, without which nothing is loaded."
            raise ServiceError(Reason.MODEL_CHANGED, why, metadata={"file": str(file)})
        return pin
