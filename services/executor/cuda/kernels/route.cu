// The experts of each row: router logits, the best of them, and rows in the order of their experts.
//
// A pair is (row, one of its experts), number row * num_used + rank. Pairs are sorted by expert, within an expert by
// number, and cut into groups of at most `group_rows` of one expert. All sums and orders are fixed.
#include "choose.cuh"
#include "spread.cuh"

constexpr int ROUTER_ROWS = 8;  // of a block
constexpr int FUSED_ROWS = 8;   // most rows of normed_route
constexpr int MAX_SORTED = 1024;  // pairs

// logits = x @ weight^T + bias in float. Launch: grid (E, ceil(rows / 8)), 256 threads.
// Moves: a block one row of weights and 8 of x, both from the second cache after the first.
extern "C" __global__ void __launch_bounds__(256) router(const __half* x,      // (rows, x_pitch), padding zero
                                                         const float* weight,  // (E, size)
                                                         const float* bias,    // (E,)
                                                         float* logits,        // (rows, E)
                                                         int num_rows, int size, int x_pitch,
                                                         int is_spread) {  // x is, as spread.cuh says
    constexpr int AT_ONCE = 3, NUM_THREADS = 256;
    __shared__ float partial[NUM_THREADS / 32][ROUTER_ROWS];
    const int expert = blockIdx.x, first = blockIdx.y * ROUTER_ROWS, count = min(ROUTER_ROWS, num_rows - first);
    const float* factors = weight + static_cast<size_t>(expert) * size;
    float sums[ROUTER_ROWS] = {};
    await_inputs();
    start_dependents();
    for (int start = 2 * threadIdx.x; start < size; start += 2 * NUM_THREADS * AT_ONCE) {
        float2 factor[AT_ONCE];
        __half2 values[AT_ONCE][ROUTER_ROWS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int column = start + 2 * NUM_THREADS * i, place = is_spread ? spread(column) : column;
            factor[i].x = column < size ? factors[column] : 0.0f;
            factor[i].y = column + 1 < size ? factors[column + 1] : 0.0f;
#pragma unroll
            for (int row = 0; row < ROUTER_ROWS; row++)
                values[i][row] =
                    column < size && row < count
                        ? *reinterpret_cast<const __half2*>(x + static_cast<size_t>(first + row) * x_pitch + place)
                        : __half2();
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int row = 0; row < ROUTER_ROWS; row++) {
                const float2 pair = __half22float2(values[i][row]);
                sums[row] += factor[i].x * pair.x + factor[i].y * pair.y;
            }
    }
#pragma unroll
    for (int row = 0; row < ROUTER_ROWS; row++) {
        const float sum = warp_sum(sums[row]);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][row] = sum;
    }
    __syncthreads();
    if (threadIdx.x < count) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < NUM_THREADS / 32; warp++) sum += partial[warp][threadIdx.x];
        logits[static_cast<size_t>(first + threadIdx.x) * gridDim.x + expert] = sum + bias[expert];
    }
}

// Launch: grid (ceil(rows / 4)), 128 threads.
extern "C" __global__ void __launch_bounds__(128) choose_experts(const float* logits,  // (rows, num_experts)
                                                                 int* ids,             // (rows, num_used)
                                                                 float* weights,       // (rows, num_used)
                                                                 int num_rows, int num_experts, int num_used) {
    await_inputs();
    start_dependents();
    const int row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row < num_rows)
        choose(logits + static_cast<size_t>(row) * num_experts, num_experts, num_used, ids + row * num_used,
               weights + row * num_used);
}

// All threads of a block: at most MAX_SORTED pairs by expert, each finds its place by itself; and groups.
__device__ __forceinline__ void sort_few(const int* ids, int num_pairs, int num_experts, int num_used, int group_rows,
                                         int max_groups, int* row_ids, int* places, int4* groups) {
    __shared__ int experts[MAX_SORTED], counts[MAX_EXPERTS], starts[MAX_EXPERTS], first_groups[MAX_EXPERTS];
    __shared__ int num_groups;
    for (int pair = threadIdx.x; pair < num_pairs; pair += blockDim.x) experts[pair] = __ldcg(&ids[pair]);
    for (int expert = threadIdx.x; expert < num_experts; expert += blockDim.x) counts[expert] = 0;
    __syncthreads();
    for (int pair = threadIdx.x; pair < num_pairs; pair += blockDim.x) atomicAdd(&counts[experts[pair]], 1);
    __syncthreads();
    if (threadIdx.x < 32) {  // sums over the experts before, 32 experts at a time
        int start = 0, group = 0;
        for (int first = 0; first < num_experts; first += 32) {
            const int expert = first + threadIdx.x, count = expert < num_experts ? counts[expert] : 0;
            const int own_groups = (count + group_rows - 1) / group_rows;
            int pairs_before = count, groups_before = own_groups;
            for (int distance = 1; distance < 32; distance *= 2) {
                const int pairs = __shfl_up_sync(0xffffffffu, pairs_before, distance);
                const int others = __shfl_up_sync(0xffffffffu, groups_before, distance);
                if (static_cast<int>(threadIdx.x) >= distance) pairs_before += pairs, groups_before += others;
            }
            if (expert < num_experts) {
                starts[expert] = start + pairs_before - count;
                first_groups[expert] = group + groups_before - own_groups;
            }
            start += __shfl_sync(0xffffffffu, pairs_before, 31);
            group += __shfl_sync(0xffffffffu, groups_before, 31);
        }
        if (threadIdx.x == 0) num_groups = group;
    }
    __syncthreads();
    for (int pair = threadIdx.x; pair < num_pairs; pair += blockDim.x) {
        const int expert = experts[pair];
        int rank = 0;
#pragma unroll 8
        for (int other = 0; other < pair; other++) rank += experts[other] == expert;
        row_ids[starts[expert] + rank] = pair / num_used;
        places[pair] = starts[expert] + rank;
    }
    for (int expert = threadIdx.x; expert < num_experts; expert += blockDim.x)
        for (int i = 0; i * group_rows < counts[expert]; i++)
            groups[first_groups[expert] + i] =
                make_int4(expert, starts[expert] + i * group_rows, min(group_rows, counts[expert] - i * group_rows), 0);
    for (int group = num_groups + threadIdx.x; group < max_groups; group += blockDim.x) groups[group] = make_int4(0, 0, 0, 0);
}

// Choice and order at once, for at most MAX_SORTED pairs; of more, or where that is faster, sort.cu finds the order. Launch: grid (1), 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) route(const float* logits, int* ids, float* weights, int* row_ids,
                                                         int* places, int4* groups, int num_rows, int num_experts,
                                                         int num_used, int group_rows, int max_groups) {
    await_inputs();
    start_dependents();
    for (int row = threadIdx.x / 32; row < num_rows; row += 32)
        choose(logits + static_cast<size_t>(row) * num_experts, num_experts, num_used, ids + row * num_used,
               weights + row * num_used);
    __syncthreads();
    sort_few(ids, num_rows * num_used, num_experts, num_used, group_rows, max_groups, row_ids, places, groups);
}

// Everything at once for a few rows: RMSNorm of x, router logits in float, the experts of each row and their order. Each
// block takes one expert and a share of the columns of `normed`; the last one to finish chooses and sorts. One row is
// left to product_one.cu to choose for: its blocks would wait for the order as long as finding it takes.
// Launch: grid (E), 256 threads, at most 8 rows. Moves: a block all rows of x and one row of weights.
extern "C" __global__ void __launch_bounds__(256) normed_route(const float* x,            // (rows, size)
                                                               const float* norm_weight,  // (size,)
                                                               const float* weight,       // (E, size)
                                                               const float* bias,         // (E,)
                                                               __half* normed,            // (rows, pitch)
                                                               float* logits,             // (rows, E)
                                                               unsigned* counter,         // zero
                                                               int* ids, float* weights, int* row_ids, int* places,
                                                               int4* groups, int num_rows, int size, int pitch,
                                                               int num_used, int group_rows, int max_groups,
                                                               int is_spread,  // `normed` is, as spread.cuh says
                                                               float epsilon) {
    __shared__ float squares[FUSED_ROWS][8], products[FUSED_ROWS][8];
    __shared__ bool is_last;
    const int expert = blockIdx.x, num_experts = gridDim.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int HELD = 16;  // products of weights that a thread holds from before the wait
    float held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int column = threadIdx.x + i * 256;
        held[i] = column < size ? norm_weight[column] * weight[static_cast<size_t>(expert) * size + column] : 0.0f;
    }
    await_inputs();
    start_dependents();
    for (int row = 0; row < num_rows; row++) {
        float square = 0.0f, product = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int column = threadIdx.x + i * 256;
            const float value = column < size ? x[static_cast<size_t>(row) * size + column] : 0.0f;
            square += value * value;
            product += value * held[i];
        }
        for (int column = threadIdx.x + HELD * 256; column < size; column += 256) {
            const float value = x[static_cast<size_t>(row) * size + column];
            square += value * value;
            product += value * (norm_weight[column] * weight[static_cast<size_t>(expert) * size + column]);
        }
        square = warp_sum(square), product = warp_sum(product);
        if (lane == 0) squares[row][warp] = square, products[row][warp] = product;
    }
    __syncthreads();
    const int begin = expert * size / num_experts, end = (expert + 1) * size / num_experts;
    for (int row = 0; row < num_rows; row++) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) square += squares[row][i];
        const float factor = 1.0f / sqrtf(square / size + epsilon);
        for (int column = begin + threadIdx.x; column < end; column += blockDim.x)
            normed[static_cast<size_t>(row) * pitch + (is_spread ? spread(column) : column)] =
                to_half(x[static_cast<size_t>(row) * size + column] * factor * norm_weight[column]);
        if (threadIdx.x == 0) {
            float product = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) product += products[row][i];
            logits[row * num_experts + expert] = product * factor + bias[expert];
        }
    }
    if (num_rows == 1) return;
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int row = warp; row < num_rows; row += 8)
        choose(logits + row * num_experts, num_experts, num_used, ids + row * num_used, weights + row * num_used);
    __syncthreads();
    sort_few(ids, num_rows * num_used, num_experts, num_used, group_rows, max_groups, row_ids, places, groups);
}

// x[row] += the sum over the row's experts, best first, of weight times output.
// Launch: grid (ceil(size / 256), rows), 256 threads. Moves: pairs' outputs once, x twice.
extern "C" __global__ void __launch_bounds__(256) combine(const float* outputs,  // (pairs, size), by expert
                                                          const int* places,     // (rows, num_used)
                                                          const float* weights,  // (rows, num_used)
                                                          float* x,              // (rows, size)
                                                          int size, int num_used) {
    await_inputs();
    start_dependents();
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (i >= size) return;
    float sum = 0.0f;
    for (int rank = 0; rank < num_used; rank++) {
        const int pair = row * num_used + rank;
        sum += weights[pair] * outputs[static_cast<size_t>(places[pair]) * size + i];
    }
    x[static_cast<size_t>(row) * size + i] += sum;
}
