"""The thirteen GGML tensor types that mxgpt serves, with the size of their blocks.

The numbers are those of ggml.h's `enum ggml_type`; a block is the smallest unit that decodes alone.
"""

from __future__ import annotations

import enum


class GGMLType(enum.IntEnum):
    """A tensor's type, by its number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    BF16 = 30
    MXFP4 = 39

    @property
    def block_size(self) -> int:
        """Values in a block."""
        return BLOCKS[self][0]

    @property
    def type_size(self) -> int:
        """Bytes of a block."""
        return BLOCKS[self][1]

    def row_bytes(self, num_columns: int) -> int:
        """Bytes of a row of `num_columns` values, a multiple of the block size."""
        assert num_columns % self.block_size == 0, f"{num_columns} columns do not fill {self.name} blocks"
        return num_columns // self.block_size * self.type_size


# Of each type: values in a block, bytes of a block.
BLOCKS = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.MXFP4: (32, 17),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
}

# Types of ggml that are not served, so that a refusal can name them.
UNSERVED_NAMES = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
}
