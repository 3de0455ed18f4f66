// The order of columns in which wgmma_tiles.cuh reads rows of x: "spread".
//
// Of each 32 columns, 16 words of two, word 4 t + i lies in place 4 i + t. A lane of tensor cores that holds columns 8 t
// to 8 t + 7 of a matrix then finds their partners where the inner index of its operands wants them.
#pragma once

// Where column `column` of a row lies, and which column lies there.
__device__ __forceinline__ int spread(int column) {
    return (column & ~31) | (column / 2 % 4 * 4 + column / 8 % 4) * 2 | (column & 1);
}
