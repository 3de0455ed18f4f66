// Pairs of rows and experts in the order of their experts, where there are many; what a pair is route.cu says.
//
// One block. Each warp takes a run of the pairs and counts those of each expert; the counts, summed up, tell every warp
// where its own of each expert go. So an expert's pairs keep their order, whatever the warps' pace.
// An expert's rows are cut into as few groups of at most `group_rows` as hold them, of about as many rows each, in
// units of 32: products take rows by so many at once.
// Launch: grid (1), 1024 threads, after choose_experts. Moves: the pairs' experts twice, 8 bytes a pair written.
#include "device.cuh"

constexpr int MAX_EXPERTS = 1024;
constexpr int NUM_COUNTS = 8192;  // of all warps
constexpr int UNIT = 32;
constexpr int AT_ONCE = 4;  // pairs of a lane whose experts are on their way together

extern "C" __global__ void __launch_bounds__(1024) sort_pairs(const int* ids,  // (rows, num_used)
                                                              int* row_ids,    // (pairs,) row of each sorted pair
                                                              int* places,     // (pairs,) where each pair went
                                                              int4* groups,    // (max_groups,): expert, start, rows
                                                              int num_rows, int num_experts, int num_used,
                                                              int group_rows, int max_groups) {
    __shared__ int counts[NUM_COUNTS];  // (warps, num_experts), then where a warp's next pair of an expert goes
    __shared__ int totals[MAX_EXPERTS], starts[MAX_EXPERTS], first_groups[MAX_EXPERTS];
    __shared__ int num_groups;
    await_inputs();
    start_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_pairs = num_rows * num_used;
    const int num_warps = min(32, NUM_COUNTS / num_experts);
    const int share = (num_pairs + 32 * num_warps - 1) / (32 * num_warps) * 32;
    const int first = warp * share, end = warp < num_warps ? min(first + share, num_pairs) : 0;
    int* own = counts + warp * num_experts;
    for (int i = threadIdx.x; i < num_warps * num_experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    for (int base = first + lane; base - lane < end; base += 32 * AT_ONCE) {
        int own_ids[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) own_ids[i] = base + 32 * i < end ? ids[base + 32 * i] : -1;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int id = own_ids[i];
            const unsigned alike = __match_any_sync(0xffffffffu, id);
            if (id >= 0 && lane == __ffs(alike) - 1) own[id] += __popc(alike);
            __syncwarp();
        }
    }
    __syncthreads();

    const int unit = min(UNIT, group_rows);
    for (int expert = threadIdx.x; expert < num_experts; expert += blockDim.x) {
        int total = 0;
        for (int other = 0; other < num_warps; other++) {
            const int count = counts[other * num_experts + expert];
            counts[other * num_experts + expert] = total;
            total += count;
        }
        totals[expert] = total;
    }
    __syncthreads();
    if (warp == 0) {
        int start = 0, group = 0;
        for (int base = 0; base < num_experts; base += 32) {
            const int expert = base + lane, total = expert < num_experts ? totals[expert] : 0;
            const int pieces = (total + group_rows - 1) / group_rows;
            int pairs_before = total, groups_before = pieces;
            for (int distance = 1; distance < 32; distance *= 2) {
                const int pairs = __shfl_up_sync(0xffffffffu, pairs_before, distance);
                const int others = __shfl_up_sync(0xffffffffu, groups_before, distance);
                if (lane >= distance) pairs_before += pairs, groups_before += others;
            }
            if (expert < num_experts) {
                starts[expert] = start + pairs_before - total;
                first_groups[expert] = group + groups_before - pieces;
            }
            start += __shfl_sync(0xffffffffu, pairs_before, 31);
            group += __shfl_sync(0xffffffffu, groups_before, 31);
        }
        if (lane == 0) num_groups = group;
    }
    __syncthreads();

    for (int base = first + lane; base - lane < end; base += 32 * AT_ONCE) {
        int own_ids[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) own_ids[i] = base + 32 * i < end ? ids[base + 32 * i] : -1;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int id = own_ids[i], pair = base + 32 * i;
            const unsigned alike = __match_any_sync(0xffffffffu, id);
            const int next = id >= 0 ? own[id] : 0;
            __syncwarp();
            if (id >= 0) {
                const int place = starts[id] + next + __popc(alike & ((1u << lane) - 1u));
                row_ids[place] = pair / num_used;
                places[pair] = place;
                if (lane == __ffs(alike) - 1) own[id] = next + __popc(alike);
            }
            __syncwarp();
        }
    }
    for (int expert = warp; expert < num_experts; expert += 32) {
        const int total = totals[expert], units = (total + unit - 1) / unit;
        const int pieces = (total + group_rows - 1) / group_rows;
        for (int piece = lane; piece < pieces; piece += 32) {
            const int least = units / pieces, more = units % pieces;
            const int begin = unit * (piece * least + min(piece, more));
            const int rows = min(unit * (least + (piece < more ? 1 : 0)), total - begin);
            groups[first_groups[expert] + piece] = make_int4(expert, starts[expert] + begin, rows, 0);
        }
    }
    for (int group = num_groups + threadIdx.x; group < max_groups; group += blockDim.x)
        groups[group] = make_int4(0, 0, 0, 0);
}
