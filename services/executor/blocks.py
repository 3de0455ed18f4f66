"""KV blocks: which sequence holds which, and which contents can be found again.

A `BlockPool` numbers the blocks of one group. A block is used (by one sequence or, where they share a prefix, by
several), or unused but cached (its contents can be found by their hash; the longest unused goes first when a
block is needed), or free. The `BlockManager` keeps every sequence's tables over all groups.

Prefix cache: a full block's hash is taken over its parent's hash and its own token ids, so it names the whole
prefix up to its end. Only blocks whose positions have all been computed are registered.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from services.executor.engine_status import BlockUsage
from services.executor.sequence import BlockTable, Sequence
from services.executor.step import KVGroup


class BlockPool:
    """The blocks of one group: free list, number of users, contents by hash."""

    def __init__(self, group: KVGroup, block_size: int, num_blocks: int) -> None:
        self.name = group.name
        self.window = group.window
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # the last one is taken first
        self._num_users = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached blocks without users, longest unused first

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._unused)

    def first_needed(self, position: int) -> int:
        """The first logical block that a query at `position` sees."""
        return max(0, position - self.window + 1) // self.block_size if self.window else 0

    def max_needed(self, num_positions: int, max_chunk: int) -> int:
        """Most blocks that a sequence of `num_positions` holds at once when steps run at most `max_chunk` of them."""
        needed = -(-num_positions // self.block_size)
        if not self.window:
            return needed
        # The window before a chunk and the chunk itself, wherever blocks begin.
        return min(needed, (self.window - 1 + max_chunk + self.block_size - 2) // self.block_size + 1)

    def allocate(self) -> int:
        """Take a free block, forgetting the longest unused contents if there is no other."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            self._unregister(block)
        self._num_users[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a user to a block found by its hash."""
        if self._num_users[block] == 0:
            del self._unused[block]
        self._num_users[block] += 1

    def release(self, block: int) -> None:
        """Take a user away; the last one leaves the block free, or cached if it is registered."""
        self._num_users[block] -= 1
        if self._num_users[block] == 0:
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._unused[block] = None

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a used block's contents known, unless another block has the same."""
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._hashes[block] = block_hash

    def forget(self, block_hash: bytes) -> None:
        """Make sure that nobody finds these contents any more."""
        block = self._by_hash.get(block_hash)
        if block is None:
            return
        self._unregister(block)
        if self._num_users[block] == 0:
            del self._unused[block]
            self._free.append(block)

    def find(self, block_hash: bytes) -> int | None:
        """The block with these contents."""
        return self._by_hash.get(block_hash)

    def spare(self) -> int | None:
        """A block that nobody holds and that caches nothing; it stays free."""
        return self._free[-1] if self._free else None

    def is_used(self, block: int) -> bool:
        return self._num_users[block] > 0

    def usage(self) -> BlockUsage:
        return BlockUsage(self.name, self.block_size, self.num_blocks, self.num_free, len(self._unused))

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Assert that free, cached and used blocks are all the blocks, each counted as often as tables name it."""
        users: Counter[int] = Counter()
        for table in tables:
            held = table.ids[table.begin : table.end].tolist()
            assert min(held, default=0) >= 0, "a table lacks a block within its range"
            assert len(set(held)) == len(held), "a table names a block twice"
            assert (table.ids[: table.begin] == -1).all(), "a block stays after its window has passed"
            assert (table.ids[table.end :] == -1).all(), "a block stays past the table's end"
            users.update(held)
        used = [block for block in range(self.num_blocks) if self._num_users[block]]
        assert {block: self._num_users[block] for block in used} == dict(users), "users are miscounted"
        assert sorted([*self._free, *self._unused, *used]) == list(range(self.num_blocks)), "a block is lost or doubled"
        registered = {block_hash: block for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        assert registered == self._by_hash, "hashes and blocks disagree"
        assert all(self._hashes[block] is None for block in self._free), "a free block is registered"
        assert all(self._hashes[block] is not None for block in self._unused), "an unused block is kept for nothing"

    def hash_of(self, block: int) -> bytes | None:
        return self._hashes[block]

    def _unregister(self, block: int) -> None:
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hashes[block] = None


class BlockManager:
    """Gives sequences the blocks that their positions need, in every group at once.

    Args:
        groups: of the model.
        block_size: tokens that a block holds, the same in all groups.
        num_blocks: blocks of each group, by its name.
        depth: most steps that run at once; what the window has passed is freed when a step is over.
    """

    def __init__(self, groups: Items[KVGroup], block_size: int, num_blocks: Mapping[str, int], depth: int = 1) -> None:
        self.block_size = block_size
        self._depth = depth
        self.group_names = tuple(group.name for group in groups)
        self._pools = tuple(BlockPool(group, block_size, num_blocks[group.name]) for group in groups)
        self._windowed_pools = [(number, pool) for number, pool in enumerate(self._pools) if pool.window]

    def shortage(self, num_positions: int, max_chunk: int) -> BlockUsage | None:
        """A group that could not hold `num_positions` of one sequence even if it were alone."""
        for pool in self._pools:
            if pool.max_needed(num_positions, self._depth * max_chunk) > pool.num_blocks:
                return pool.usage()
        return None

    def attach_prefix(self, sequence: Sequence, max_positions: int, max_chunk: int, num_spare: int) -> bool:
        """Admit a sequence: share the longest cached prefix of at most `max_positions`, and set num_computed to it.

        Returns:
            False, with nothing changed, unless all its known tokens fit beside `num_spare` free blocks.
        """
        assert sequence.num_allocated == 0
        num_hits = self._longest_prefix(sequence, max_positions // self.block_size)
        hits: list[list[int]] = []
        for pool in self._pools:
            begin = pool.first_needed(num_hits * self.block_size)
            blocks = [pool.find(block_hash) for block_hash in sequence.block_hashes[begin:num_hits]]
            hits.append([block for block in blocks if block is not None])
            num_shared = sum(pool.is_used(block) for block in hits[-1])
            num_needed = pool.max_needed(sequence.num_tokens, self._depth * max_chunk)
            if num_needed - num_shared > pool.num_free - num_spare:
                return False
        for pool, table, blocks_found in zip(self._pools, sequence.tables, hits, strict=True):
            for block in blocks_found:
                pool.share(block)
            table.begin, table.end = num_hits - len(blocks_found), num_hits
            table.ids[table.begin : table.end] = blocks_found
        sequence.num_computed = sequence.num_launched = sequence.num_allocated = num_hits * self.block_size
        sequence.num_registered = num_hits
        return True

    def allocate(self, sequence: Sequence, num_positions: int) -> bool:
        """Give a sequence blocks for its first `num_positions`; False, with nothing changed, where they lack."""
        if num_positions <= sequence.num_allocated:
            return True
        end = -(-num_positions // self.block_size)
        begin = sequence.num_allocated // self.block_size
        if any(pool.num_free < end - begin for pool in self._pools):
            return False
        for pool, table in zip(self._pools, sequence.tables, strict=True):
            for logical in range(begin, end):
                table.ids[logical] = pool.allocate()
            table.end = end
        sequence.num_allocated = end * self.block_size
        return True

    def advance(self, sequence: Sequence) -> None:
        """After num_computed has grown: register the blocks now full, free those that the window has passed."""
        num_full = sequence.num_computed // self.block_size
        if num_full > sequence.num_registered:
            self._extend_hashes(sequence, num_full)
            for pool, table in zip(self._pools, sequence.tables, strict=True):
                for logical in range(max(sequence.num_registered, table.begin), num_full):
                    pool.register(int(table.ids[logical]), sequence.block_hashes[logical])
            sequence.num_registered = num_full
        for number, pool in self._windowed_pools:
            table = sequence.tables[number]
            for logical in range(table.begin, pool.first_needed(sequence.num_computed)):
                pool.release(int(table.ids[logical]))
                table.ids[logical] = -1
                table.begin = logical + 1

    def free(self, sequence: Sequence, is_sound: bool = True) -> None:
        """Take all its blocks back and start it over; contents that are not sound leave the prefix cache."""
        for pool, table in zip(self._pools, sequence.tables, strict=True):
            if not is_sound:
                for block_hash in sequence.block_hashes[: sequence.num_registered]:
                    pool.forget(block_hash)
            # Last first: the end of a prefix is the first to go when blocks are needed.
            for block in reversed(table.ids[table.begin : table.end].tolist()):
                pool.release(block)
            table.ids[table.begin : table.end] = -1
            table.begin = table.end = 0
        sequence.num_computed = sequence.num_launched = sequence.num_allocated = sequence.num_registered = 0

    def tables_of(self, sequence: Sequence) -> dict[str, NDArray[np.int32]]:
        """The tables by group, as they are now and as they will be."""
        return {name: table.ids for name, table in zip(self.group_names, sequence.tables, strict=True)}

    def spare_tables(self) -> dict[str, NDArray[np.int32]] | None:
        """Tables (1,) of a block in each group that nobody holds and that caches nothing; None where there is none."""
        spare = {pool.name: pool.spare() for pool in self._pools}
        if None in spare.values():
            return None
        return {name: np.array([block], np.int32) for name, block in spare.items()}

    def usage(self) -> tuple[BlockUsage, ...]:
        return tuple(pool.usage() for pool in self._pools)

    def check_integrity(self, sequences: Items[Sequence]) -> None:
        """Assert every invariant of pools and tables; `sequences` are all that the engine holds."""
        for number, pool in enumerate(self._pools):
            pool.check_integrity(sequence.tables[number] for sequence in sequences)
            for sequence in sequences:
                table = sequence.tables[number]
                assert table.end * self.block_size == sequence.num_allocated >= sequence.num_computed
                assert table.begin == min(table.end, pool.first_needed(sequence.num_computed)), "begin is off"
        for sequence in sequences:
            self._check_hashes(sequence)

    def _check_hashes(self, sequence: Sequence) -> None:
        assert sequence.num_registered == sequence.num_computed // self.block_size
        for logical in range(sequence.num_registered):
            parent = sequence.block_hashes[logical - 1] if logical else b""
            assert sequence.block_hashes[logical] == self._hash_block(sequence, logical, parent)
        for pool, table in zip(self._pools, sequence.tables, strict=True):
            for logical in range(table.begin, table.end):
                known = sequence.block_hashes[logical] if logical < sequence.num_registered else None
                assert pool.hash_of(int(table.ids[logical])) in (known, None), "a block is found under a wrong hash"

    def _longest_prefix(self, sequence: Sequence, max_blocks: int) -> int:
        """Leading blocks that every group can share: each needs those that the next query sees."""
        self._extend_hashes(sequence, max_blocks)
        run_lengths = [0] * len(self._pools)  # cached blocks in a row up to this one
        longest = 0
        for logical in range(max_blocks):
            reaches_back = True
            for number, pool in enumerate(self._pools):
                is_cached = pool.find(sequence.block_hashes[logical]) is not None
                if not is_cached and not pool.window:
                    return longest  # every longer prefix needs this block
                run_lengths[number] = run_lengths[number] + 1 if is_cached else 0
                needed = logical + 1 - pool.first_needed((logical + 1) * self.block_size)
                reaches_back = reaches_back and run_lengths[number] >= needed
            if reaches_back:
                longest = logical + 1
        return longest

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        hashes = sequence.block_hashes
        while len(hashes) < num_blocks:
            hashes.append(self._hash_block(sequence, len(hashes), hashes[-1] if hashes else b""))

    def _hash_block(self, sequence: Sequence, logical: int, parent: bytes) -> bytes:
        token_ids = sequence.token_ids[logical * self.block_size : (logical + 1) * self.block_size]
        return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=32).digest()
