// rms_norm (norm.cu) of many rows: each is read once, four values at a time, and stays in registers.
//
// Launch: grid (rows), 256 threads; size is a multiple of 4 and at most MAX_SIZE.
// Moves: a row once, 2 bytes a value written.
#include "device.cuh"
#include "spread.cuh"

constexpr int MAX_SIZE = 8192;
constexpr int STEPS = MAX_SIZE / 1024;  // of four values, of a thread

extern "C" __global__ void __launch_bounds__(256) rms_norm_many(const float* x,       // (rows, size)
                                                                const float* weight,  // (size,)
                                                                __half* out,          // (rows, out_pitch)
                                                                int size, int out_pitch, float epsilon,
                                                                int is_spread) {  // out, as spread.cuh says
    __shared__ float scratch[32];
    await_inputs();
    start_dependents();
    const float4* row = reinterpret_cast<const float4*>(x + static_cast<size_t>(blockIdx.x) * size);
    const float4* weights = reinterpret_cast<const float4*>(weight);
    __half* target = out + static_cast<size_t>(blockIdx.x) * out_pitch;
    float4 values[STEPS];
    float squares = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int i = threadIdx.x + step * 256;
        if (i * 4 < size) values[step] = row[i];
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const float4& four = values[step];
        if ((threadIdx.x + step * 256) * 4 < size)
            squares += four.x * four.x + four.y * four.y + four.z * four.z + four.w * four.w;
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, scratch) / size + epsilon);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int i = threadIdx.x + step * 256;
        if (i * 4 >= size) break;
        const float4 &four = values[step], own = weights[i];
        const __half2 low = __halves2half2(to_half(four.x * factor * own.x), to_half(four.y * factor * own.y));
        const __half2 high = __halves2half2(to_half(four.z * factor * own.z), to_half(four.w * factor * own.w));
        *reinterpret_cast<__half2*>(target + (is_spread ? spread(4 * i) : 4 * i)) = low;
        *reinterpret_cast<__half2*>(target + (is_spread ? spread(4 * i + 2) : 4 * i + 2)) = high;
    }
}
