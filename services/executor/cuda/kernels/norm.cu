// Norms of rows, in float, rounded to half: what products read. One block of 256 threads for each row.
//
// rms_norm: x / sqrt(mean(x^2) + epsilon) * weight; layer_norm: (x - mean) / sqrt(variance + epsilon) * weight + bias.
// The padding of a row of out (up to out_pitch) is zero from the start and is not written.
// Launch: grid (rows), 256 threads. Moves: a row twice or three times (its second reading hits the cache), 2 bytes a
// value written.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(256) rms_norm(const float* x,       // (rows, size)
                                                           const float* weight,  // (size,)
                                                           __half* out,          // (rows, out_pitch)
                                                           int size, int out_pitch, float epsilon) {
    __shared__ float scratch[32];
    await_inputs();
    start_dependents();
    const float* row = x + static_cast<size_t>(blockIdx.x) * size;
    __half* target = out + static_cast<size_t>(blockIdx.x) * out_pitch;
    constexpr int HELD = 12, NUM_THREADS = 256;  // values of a row that a thread holds
    float held[HELD], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int column = threadIdx.x + i * NUM_THREADS;
        held[i] = column < size ? row[column] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) squares += held[i] * held[i];
    for (int i = threadIdx.x + HELD * NUM_THREADS; i < size; i += NUM_THREADS) squares += row[i] * row[i];
    const float factor = 1.0f / sqrtf(block_sum(squares, scratch) / size + epsilon);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int column = threadIdx.x + i * NUM_THREADS;
        if (column < size) target[column] = to_half(held[i] * factor * weight[column]);
    }
    for (int i = threadIdx.x + HELD * NUM_THREADS; i < size; i += NUM_THREADS) target[i] = to_half(row[i] * factor * weight[i]);
}

extern "C" __global__ void __launch_bounds__(256) layer_norm(const float* x,       // (rows, size)
                                                             const float* weight,  // (size,)
                                                             const float* bias,    // (size,)
                                                             __half* out,          // (rows, out_pitch)
                                                             int size, int out_pitch, float epsilon) {
    __shared__ float scratch[32];
    await_inputs();
    start_dependents();
    const float* row = x + static_cast<size_t>(blockIdx.x) * size;
    __half* target = out + static_cast<size_t>(blockIdx.x) * out_pitch;
    float sum = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x; i < size; i += blockDim.x) sum += row[i];
    const float mean = block_sum(sum, scratch) / size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) squares += (row[i] - mean) * (row[i] - mean);
    const float factor = 1.0f / sqrtf(block_sum(squares, scratch) / size + epsilon);
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        target[i] = to_half((row[i] - mean) * factor * weight[i] + bias[i]);
}
