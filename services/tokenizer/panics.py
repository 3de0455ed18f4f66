"""Panics of the tokenizers library, which is Rust, as exceptions that handlers of errors see.

They come as a `PanicException`, which is no `Exception` and can't be imported: one would pass every handler up to the
event loop, and the caller would wait for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class PanicError(Exception):
    """The library has panicked: a defect of it, or of what was given to it. It can be used on."""


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic inside the context into a PanicError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise PanicError(f"the tokenizers library panicked: {error}") from None
