"""SHA-256 on the GPU: of pieces of `PIECE_BYTES`, each by a thread of its own; the host hashes what they give."""

from __future__ import annotations

from services.loader.cuda.kernels import HASH, Kernels
from services.loader.cuda.stream import Stream
from shared.digest import PIECE_BYTES

SHA256_BYTES = 32
BLOCK_THREADS = 128


def num_digest_bytes(num_bytes: int) -> int:
    """Of the SHA-256s of the pieces of so many bytes."""
    return SHA256_BYTES * -(-num_bytes // PIECE_BYTES)


def hash_on_gpu(kernels: Kernels, stream: Stream, address: int, num_bytes: int, digests: int) -> None:
    """Put on a stream: the SHA-256 of every piece of memory, a multiple of 64 bytes, to (pieces, 32) bytes."""
    num_pieces = num_digest_bytes(num_bytes) // SHA256_BYTES
    kernels.launch(stream, HASH, "sha256", num_pieces, (address, digests, num_bytes, PIECE_BYTES), BLOCK_THREADS)
