"""A bounded cursor over the header of a GGUF file.

Bytes are read (pread), never mapped: a mapped file that shrinks kills its reader. Nothing is read, allocated or
skipped before it is known to fit into the bytes that remain, so memory stays near the header's size whatever the
file claims; every refusal names the file and the byte.
"""

from __future__ import annotations

import os
import struct
from array import array
from pathlib import Path
from typing import NoReturn

from shared.errors import Reason, ServiceError

READ_BYTES = 1 << 20
MAX_HEADER_BYTES = 256 << 20  # gpt-oss-20b's takes 13 MB
MAX_NUM_STRINGS = 1 << 21  # in all arrays; gpt-oss-20b has 647,277. This many take about 0.3 s.


class HeaderReader:
    """Reads the header from its first byte on; `position` is the next byte, `buffer` what has been read.

    Args:
        descriptor: an open regular file.
        path: its name, for messages.
        size: its size in bytes, when it was opened.
    """

    def __init__(self, descriptor: int, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self.buffer = bytearray()
        self._descriptor = descriptor
        self._num_strings = 0

    @property
    def num_bytes_left(self) -> int:
        return min(self.size, MAX_HEADER_BYTES) - self.position

    def read_u32(self, what: str) -> int:
        return self._read_integer("<I", 4, what)

    def read_u64(self, what: str) -> int:
        return self._read_integer("<Q", 8, what)

    def read_string(self, what: str, *, max_bytes: int) -> bytes:
        start = self.position
        length = self.read_u64(what)
        if length > max_bytes:
            self.refuse(start, f"{what} is {length} bytes long, and may have {max_bytes}")
        self.skip(length, what)
        return bytes(self.buffer[start + 8 : self.position])

    def skip(self, num_bytes: int, what: str) -> None:
        """Move past `num_bytes`, which are then in `buffer`."""
        if num_bytes > self.num_bytes_left:
            self._refuse_past_end(self.position, num_bytes, what)
        self._load(self.position + num_bytes)
        self.position += num_bytes

    def skip_strings(self, count: int, what: str) -> array[int]:
        """Move past `count` strings; where each begins (its length, 8 bytes, comes first), and where the last one ends.

        This loop is most of the time that a header takes: 0.1 s for 650,000 strings, where calls for each string
        took 0.6 s.
        """
        if count > self.num_bytes_left // 8:
            self.refuse(
                self.position, f"{what} claims {count} strings, more than the {self.num_bytes_left} bytes left hold"
            )
        self._num_strings += count
        if self._num_strings > MAX_NUM_STRINGS:
            self.refuse(self.position, f"{what} brings the strings to {self._num_strings}; {MAX_NUM_STRINGS} are read")
        records = array("I", [self.position])
        unpack_length = struct.Struct("<Q").unpack_from
        append, buffer, end, loaded = records.append, self.buffer, self.position, len(self.buffer)
        limit = min(self.size, MAX_HEADER_BYTES)
        for _ in range(count):
            start = end
            if start + 8 > loaded:
                if start + 8 > limit:
                    self._refuse_past_end(start, 8, what)
                loaded = self._load(start + 8)
            end = start + 8 + unpack_length(buffer, start)[0]
            if end > limit:
                self._refuse_past_end(start + 8, end - start - 8, what)
            append(end)
        self._load(end)
        self.position = end
        return records

    def finish(self) -> bytearray:
        """The header's bytes, without those read past its end."""
        del self.buffer[self.position :]
        return self.buffer

    def refuse(self, offset: int, why: str, reason: Reason = Reason.MODEL_INVALID) -> NoReturn:
        """Raise the error that names the file, the byte and the reason."""
        facts = {"file": str(self.path), "offset": str(offset)}
        raise ServiceError(reason, f"{self.path}: byte {offset}: {why}.", metadata=facts)

    def _read_integer(self, layout: str, num_bytes: int, what: str) -> int:
        start = self.position
        self.skip(num_bytes, what)
        value: int = struct.unpack_from(layout, self.buffer, start)[0]
        return value

    def _load(self, end: int) -> int:
        """Read on until `buffer` holds the bytes before `end`, which lies in the file; the number it holds then."""
        while len(self.buffer) < end:
            offset = len(self.buffer)
            try:
                piece = os.pread(self._descriptor, min(READ_BYTES, self.size - offset), offset)
            except OSError as error:
                self.refuse(offset, f"reading failed: {error.strerror}")
            if not piece:
                self.refuse(offset, f"the file ends here, and had {self.size} bytes when opened", Reason.MODEL_CHANGED)
            self.buffer += piece
        return len(self.buffer)

    def _refuse_past_end(self, offset: int, num_bytes: int, what: str) -> NoReturn:
        if self.size > MAX_HEADER_BYTES:
            self.refuse(offset, f"{what} takes {num_bytes} bytes, past the {MAX_HEADER_BYTES} that a header may have")
        self.refuse(offset, f"{what} takes {num_bytes} bytes, but the file ends at byte {self.size}")
