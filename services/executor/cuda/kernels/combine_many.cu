// combine (route.cu) of many rows: x[row] += the sum over the row's experts, best first, of weight times output.
//
// Launch: grid (ceil(size / 1024), rows), 256 threads of four values each; size is a multiple of 4.
// Moves: pairs' outputs once, x twice.
#include "device.cuh"

constexpr int AT_ONCE = 4;  // outputs that are on their way together

extern "C" __global__ void __launch_bounds__(256) combine_many(const float* outputs,  // (pairs, size), by expert
                                                               const int* places,     // (rows, num_used)
                                                               const float* weights,  // (rows, num_used)
                                                               float* x,              // (rows, size)
                                                               int size, int num_used) {
    await_inputs();
    start_dependents();
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= size) return;
    const int first_pair = blockIdx.y * num_used;
    float4* target = reinterpret_cast<float4*>(x + static_cast<size_t>(blockIdx.y) * size + i);
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f}, before = *target;
    for (int first = 0; first < num_used; first += AT_ONCE) {
        float4 values[AT_ONCE];
        float factors[AT_ONCE];
#pragma unroll
        for (int rank = 0; rank < AT_ONCE; rank++) {
            const int pair = first_pair + min(first + rank, num_used - 1);
            factors[rank] = first + rank < num_used ? weights[pair] : 0.0f;
            values[rank] = *reinterpret_cast<const float4*>(outputs + static_cast<size_t>(places[pair]) * size + i);
        }
#pragma unroll
        for (int rank = 0; rank < AT_ONCE; rank++) {
            sum.x += factors[rank] * values[rank].x, sum.y += factors[rank] * values[rank].y;
            sum.z += factors[rank] * values[rank].z, sum.w += factors[rank] * values[rank].w;
        }
    }
    *target = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
}
