// Where a tensor lies and in which boxes it is copied: CUtensorMap, a kernel's __grid_constant__ parameter.
#pragma once

struct alignas(64) TensorMap {
    char bytes[128];
};

// Of a product's x (rows of half, swizzled) and of the planes of its matrix; where it has no such plane, unused.
struct Maps {
    const TensorMap *rows, *codes, *scales, *minima;  // of MXFP4 the last is of the largest exponents of its rows
};
