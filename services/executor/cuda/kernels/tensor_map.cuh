// Where a tensor lies and in which boxes it is copied: CUtensorMap, a kernel's __grid_constant__ parameter.
#pragma once

struct alignas(64) TensorMap {
    char bytes[128];
};
