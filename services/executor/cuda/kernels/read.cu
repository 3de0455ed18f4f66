// Reads memory and does nothing else: the bandwidth that other kernels are measured against.
//
// Launch: 8 blocks for each multiprocessor, 512 threads. Moves: num_bytes.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(512) read(const uint4* memory,  // (num_bytes / 16,)
                                                       uint32_t* out,        // (1,)
                                                       long long num_bytes) {
    const long long count = num_bytes / 16, stride = static_cast<long long>(gridDim.x) * blockDim.x * 4;
    uint32_t mixed = 0;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x * 4 + threadIdx.x; i + 3 * blockDim.x < count; i += stride) {
        uint4 values[4];
#pragma unroll
        for (int j = 0; j < 4; j++) values[j] = load_weight(memory + i + j * blockDim.x);
#pragma unroll
        for (int j = 0; j < 4; j++) mixed ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
    if (mixed == 0x9E3779B9u) *out = mixed;  // never, as good as: keeps the loads
}
