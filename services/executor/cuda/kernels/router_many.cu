// Router logits of many rows: logits = x @ weight^T + bias, as exact as in float, on tensor cores.
//
// A weight is taken as the sum of two halves, the second 2^11 times what the first leaves over: together 22 bits. Rows
// of x are the first operand, experts the second, and columns are permuted as in product.cu, so that a lane's share of
// each is eight neighbours of 32, or if x is spread (spread.cuh) every fourth pair of them. A block takes 32 rows; its 8 warps share the columns and add up in order.
// Launch: grid (ceil(rows / 32), ceil(experts / 32)), 256 threads. x has whole tiles of columns, what pads them is zero.
// Moves: x once for each 32 experts; the weights once for each 32 rows, from the second cache.
#include "device.cuh"

constexpr int NUM_WARPS = 8;
constexpr int ROWS = 32;
constexpr int EXPERTS = 32;
constexpr float LOW_FACTOR = 2048.0f;

// Eight weights as four pairs of halves, and of what these leave over.
__device__ __forceinline__ void split(const float (&weights)[8], uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        high[i] = pack_half2(weights[2 * i], weights[2 * i + 1]);
        const float2 taken = __half22float2(*reinterpret_cast<const __half2*>(&high[i]));
        low[i] = pack_half2((weights[2 * i] - taken.x) * LOW_FACTOR, (weights[2 * i + 1] - taken.y) * LOW_FACTOR);
    }
}

// Of a row of `size` weights the lane's share of 32 columns, zero past its end.
__device__ __forceinline__ void load(const float* row, int column, int t, int size, bool is_spread, float (&weights)[8]) {
    if (is_spread) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int own = column + i / 2 * 8 + 2 * t + i % 2;
            weights[i] = own < size ? row[own] : 0.0f;
        }
        return;
    }
    const int first = column + 8 * t;
    if (size % 4 == 0 && first + 8 <= size) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 four = *reinterpret_cast<const float4*>(row + first + 4 * i);
            weights[4 * i] = four.x, weights[4 * i + 1] = four.y;
            weights[4 * i + 2] = four.z, weights[4 * i + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) weights[i] = first + i < size ? row[first + i] : 0.0f;
}

extern "C" __global__ void __launch_bounds__(256) router_many(const __half* x,      // (rows, x_pitch)
                                                              const float* weight,  // (E, size)
                                                              const float* bias,    // (E,)
                                                              float* logits,        // (rows, E)
                                                              int num_rows, int num_experts, int size, int x_pitch,
                                                              int is_spread) {
    __shared__ float partial[NUM_WARPS][ROWS][EXPERTS + 1];
    await_inputs();
    start_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_row = blockIdx.x * ROWS, first_expert = blockIdx.y * EXPERTS;
    const __half* rows[4];  // g, g + 8, g + 16, g + 24
    const float* experts[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        rows[i] = x + static_cast<size_t>(min(first_row + g + 8 * i, num_rows - 1)) * x_pitch + 8 * t;
        experts[i] = weight + static_cast<size_t>(min(first_expert + g + 8 * i, num_experts - 1)) * size;
    }
    float high_sums[2][4][4] = {}, low_sums[2][4][4] = {};
    for (int column = warp * 32; column < size; column += NUM_WARPS * 32) {
        uint4 a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = *reinterpret_cast<const uint4*>(rows[i] + column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float weights[8];
            load(experts[i], column, t, size, is_spread != 0, weights);
            uint32_t high[4], low[4];
            split(weights, high, low);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const uint4 &upper = a[2 * m], &lower = a[2 * m + 1];
                multiply_add(high_sums[m][i], upper.x, lower.x, upper.y, lower.y, high[0], high[1]);
                multiply_add(high_sums[m][i], upper.z, lower.z, upper.w, lower.w, high[2], high[3]);
                multiply_add(low_sums[m][i], upper.x, lower.x, upper.y, lower.y, low[0], low[1]);
                multiply_add(low_sums[m][i], upper.z, lower.z, upper.w, lower.w, low[2], low[3]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                partial[warp][m * 16 + j / 2 * 8 + g][i * 8 + 2 * t + j % 2] =
                    high_sums[m][i][j] + low_sums[m][i][j] * (1.0f / LOW_FACTOR);
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * EXPERTS; i += blockDim.x) {
        const int row = i / EXPERTS, expert = i % EXPERTS;
        if (first_row + row >= num_rows || first_expert + expert >= num_experts) continue;
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < NUM_WARPS; other++) sum += partial[other][row][expert];
        logits[static_cast<size_t>(first_row + row) * num_experts + first_expert + expert] =
            sum + bias[first_expert + expert];
    }
}
