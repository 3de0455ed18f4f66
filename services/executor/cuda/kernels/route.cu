// The experts of each row: router logits, the best of them, and rows in the order of their experts.
//
// A pair is (row, one of its experts), number row * num_used + rank. Pairs are sorted by expert, within an expert by
// number, and cut into groups of at most `group_rows` of one expert. All sums and orders are fixed.
#include "device.cuh"

constexpr int ROUTER_ROWS = 8;  // of a block
constexpr int MAX_EXPERTS = 1024;

// logits = x @ weight^T + bias in float. Launch: grid (E, ceil(rows / 8)), 128 threads.
// Moves: a block one row of weights and 8 of x, both from the second cache after the first.
extern "C" __global__ void __launch_bounds__(128) router(const __half* x,      // (rows, x_pitch)
                                                         const float* weight,  // (E, size)
                                                         const float* bias,    // (E,)
                                                         float* logits,        // (rows, E)
                                                         int num_rows, int size, int x_pitch) {
    __shared__ float partial[4][ROUTER_ROWS];
    start_dependents();
    await_inputs();
    const int expert = blockIdx.x, first = blockIdx.y * ROUTER_ROWS, count = min(ROUTER_ROWS, num_rows - first);
    float sums[ROUTER_ROWS] = {};
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const float factor = weight[static_cast<size_t>(expert) * size + i];
#pragma unroll
        for (int row = 0; row < ROUTER_ROWS; row++)
            if (row < count) sums[row] += factor * __half2float(x[static_cast<size_t>(first + row) * x_pitch + i]);
    }
#pragma unroll
    for (int row = 0; row < ROUTER_ROWS; row++) {
        const float sum = warp_sum(sums[row]);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][row] = sum;
    }
    __syncthreads();
    if (threadIdx.x < count) {
        const int row = threadIdx.x;
        const float sum = partial[0][row] + partial[1][row] + partial[2][row] + partial[3][row];
        logits[static_cast<size_t>(first + row) * gridDim.x + expert] = sum + bias[expert];
    }
}

// One warp: the num_used largest logits of a row, of equals the first, and their softmax.
__device__ __forceinline__ void choose(const float* logits, int num_experts, int num_used, int* ids, float* weights) {
    const int lane = threadIdx.x % 32;
    float last = INFINITY, best = 0.0f, total = 0.0f;
    int last_id = -1;
    for (int rank = 0; rank < num_used; rank++) {
        float value = -INFINITY;
        int id = MAX_EXPERTS;
        for (int expert = lane; expert < num_experts; expert += 32) {
            const float logit = logits[expert];
            // What comes after the last choice in the order: smaller, or equal and later.
            const bool is_left = logit < last || (logit == last && expert > last_id);
            if (is_left && (logit > value || id == MAX_EXPERTS)) value = logit, id = expert;
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, value, distance);
            const int other_id = __shfl_xor_sync(0xffffffffu, id, distance);
            if (other > value || (other == value && other_id < id)) value = other, id = other_id;
        }
        last = value, last_id = id;
        if (rank == 0) best = value;
        const float weight = __expf(value - best);
        total += weight;
        if (lane == 0) ids[rank] = id, weights[rank] = weight;
    }
    __syncwarp();
    for (int rank = lane; rank < num_used; rank += 32) weights[rank] /= total;
}

// Launch: grid (ceil(rows / 4)), 128 threads.
extern "C" __global__ void __launch_bounds__(128) choose_experts(const float* logits,  // (rows, num_experts)
                                                                 int* ids,             // (rows, num_used)
                                                                 float* weights,       // (rows, num_used)
                                                                 int num_rows, int num_experts, int num_used) {
    start_dependents();
    await_inputs();
    const int row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row < num_rows)
        choose(logits + static_cast<size_t>(row) * num_experts, num_experts, num_used, ids + row * num_used,
               weights + row * num_used);
}

// All of a block of 1024 threads: pairs by expert, and groups. An expert is one warp's at a time.
__device__ __forceinline__ void sort(const int* ids, int num_pairs, int num_experts, int num_used, int group_rows,
                                     int max_groups, int* row_ids, int* places, int4* groups) {
    __shared__ int counts[MAX_EXPERTS], starts[MAX_EXPERTS], first_groups[MAX_EXPERTS];
    __shared__ int num_groups;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int expert = warp; expert < num_experts; expert += 32) {
        int count = 0;
        for (int pair = lane; pair < num_pairs; pair += 32) count += ids[pair] == expert;
        count = __reduce_add_sync(0xffffffffu, count);
        if (lane == 0) counts[expert] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int start = 0, group = 0;
        for (int expert = 0; expert < num_experts; expert++) {
            starts[expert] = start;
            first_groups[expert] = group;
            start += counts[expert];
            group += (counts[expert] + group_rows - 1) / group_rows;
        }
        num_groups = group;
    }
    __syncthreads();
    for (int expert = warp; expert < num_experts; expert += 32) {
        int place = starts[expert];
        for (int first = 0; counts[expert] > 0 && first < num_pairs; first += 32) {
            const int pair = first + lane;
            const bool is_ours = pair < num_pairs && ids[pair] == expert;
            const unsigned ours = __ballot_sync(0xffffffffu, is_ours);
            if (is_ours) {
                const int own = place + __popc(ours & ((1u << lane) - 1u));
                row_ids[own] = pair / num_used;
                places[pair] = own;
            }
            place += __popc(ours);
        }
        for (int i = lane; i * group_rows < counts[expert]; i += 32)
            groups[first_groups[expert] + i] =
                make_int4(expert, starts[expert] + i * group_rows, min(group_rows, counts[expert] - i * group_rows), 0);
    }
    for (int group = num_groups + threadIdx.x; group < max_groups; group += blockDim.x) groups[group] = make_int4(0, 0, 0, 0);
}

// Choice and order at once, for few rows; of many sort.cu finds the order. Launch: grid (1), 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) route(const float* logits, int* ids, float* weights, int* row_ids,
                                                         int* places, int4* groups, int num_rows, int num_experts,
                                                         int num_used, int group_rows, int max_groups) {
    start_dependents();
    await_inputs();
    for (int row = threadIdx.x / 32; row < num_rows; row += 32)
        choose(logits + static_cast<size_t>(row) * num_experts, num_experts, num_used, ids + row * num_used,
               weights + row * num_used);
    __syncthreads();
    sort(ids, num_rows * num_used, num_experts, num_used, group_rows, max_groups, row_ids, places, groups);
}

// x[row] += the sum over the row's experts, best first, of weight times output.
// Launch: grid (ceil(size / 256), rows), 256 threads. Moves: pairs' outputs once, x twice.
extern "C" __global__ void __launch_bounds__(256) combine(const float* outputs,  // (pairs, size), by expert
                                                          const int* places,     // (rows, num_used)
                                                          const float* weights,  // (rows, num_used)
                                                          float* x,              // (rows, size)
                                                          int size, int num_used) {
    start_dependents();
    await_inputs();
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (i >= size) return;
    float sum = 0.0f;
    for (int rank = 0; rank < num_used; rank++) {
        const int pair = row * num_used + rank;
        sum += weights[pair] * outputs[static_cast<size_t>(places[pair]) * size + i];
    }
    x[static_cast<size_t>(row) * size + i] += sum;
}
