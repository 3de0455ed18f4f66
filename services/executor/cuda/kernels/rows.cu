// Whole rows: sums, and chosen rows of floats and of halves.
//
// Launch: add: grid (ceil(count / 256)); gather and gather_halves: grid (rows); 256 threads.
// Moves: each value read and written once.
#include "device.cuh"

extern "C" __global__ void add(float* x,        // (count,), x += y
                               const float* y,  // (count,)
                               int count) {
    await_inputs();
    start_dependents();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] += y[i];
}

extern "C" __global__ void gather(const float* x,    // (rows, size)
                                  const int* rows,   // (gridDim.x,)
                                  float* out,        // (gridDim.x, size)
                                  int size) {
    await_inputs();
    start_dependents();
    const float* source = x + static_cast<size_t>(rows[blockIdx.x]) * size;
    float* target = out + static_cast<size_t>(blockIdx.x) * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) target[i] = source[i];
}

extern "C" __global__ void gather_halves(const uint4* x,   // (rows, pieces) of eight
                                         const int* rows,  // (gridDim.x,)
                                         uint4* out,       // (gridDim.x, pieces)
                                         int pieces) {
    await_inputs();
    start_dependents();
    const uint4* source = x + static_cast<size_t>(rows[blockIdx.x]) * pieces;
    uint4* target = out + static_cast<size_t>(blockIdx.x) * pieces;
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) target[i] = source[i];
}
