// Attention of rows that are their sequences' next token: rotary positions, keys and values into their blocks, and
// out = softmax(q k) v with sinks and windows, over paged keys and values (their layout: rope.cu).
//
// A block takes one row, one key head and one split of the positions, 32 positions at a time (a chunk) for each of its
// 4 warps. Rows of the tensor cores' operand are the G query heads that share the key head, 16 of them at most. A
// lane's shares of keys and of values come through shared memory in slots of its own, those of the first chunks before
// the kernel before this one ends: all but the last position was written by earlier steps. The last position's key and
// value are put over what was copied of them, and into their block.
// Splits leave (maximum, sum, values) behind; the last one to finish merges them in order, so the result does not depend
// on which it is. The sink joins once, at the end. Exponentials are of base 2: queries are scaled by log2(e)/sqrt(D),
// sinks are scaled here.
// Launch: grid (K, rows, splits), 128 threads, G <= 16; shared memory for `Memory`, as `decode_shared` in ops.py reckons;
// -D HEAD_SIZE, HEAD_SIZE_PADDED (a multiple of 32).
// Moves: of each row the keys and values that it sees, 4 HEAD_SIZE_PADDED bytes a position and key head.
#include "device.cuh"
#include "spread.cuh"

constexpr int NUM_WARPS = 4, NUM_THREADS = 32 * NUM_WARPS;
constexpr int CHUNK = 32;                        // positions
constexpr int K_BLOCKS = HEAD_SIZE_PADDED / 32;  // of 32 dimensions
constexpr int V_TILES = HEAD_SIZE_PADDED / 8;    // of 8 dimensions
constexpr int HALF_HEAD = HEAD_SIZE / 2;
constexpr int MAX_GROUP = 16;                    // query heads of a key head
constexpr int STAGES = HEAD_SIZE_PADDED <= 64 ? 2 : 1;  // chunks of a warp in flight
constexpr int MAX_SPLITS = 64;
constexpr int SHARES = (MAX_GROUP + 2 + NUM_WARPS - 1) / NUM_WARPS;  // a warp's, of queries, new key and new value
constexpr int EARLY_SPLITS = 8, EARLY_ROUNDS = 4;  // whose values are read before their factors are known
constexpr float NOTHING = -1e30f;                // a maximum over no position: finite, so that differences are
constexpr float LOG2_E = 1.4426950408889634f;

struct Chunk {
    uint4 keys[4][K_BLOCKS][32];  // [tile][block of dimensions][lane]: 8 dimensions of a position
    uint4 values[V_TILES][32];    // [tile of dimensions][lane]: 8 positions of a dimension
};

struct Merged {
    float values[NUM_WARPS][MAX_GROUP][HEAD_SIZE_PADDED + 1];
    float maxima[NUM_WARPS][MAX_GROUP];
    float sums[NUM_WARPS][MAX_GROUP];
};

union Memory {
    Chunk chunks[NUM_WARPS][STAGES];
    Merged merged;
};

// Column 2t + i of tile n is position 8t + 2n + i of the chunk: a lane's 8 scores are of 8 neighbours.
__device__ __forceinline__ int key_position(int tile, int g) { return g / 2 * 8 + 2 * tile + g % 2; }

__device__ __forceinline__ void copy_chunk(Chunk& chunk, const __half* keys, const __half* values, int block_size, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
#pragma unroll
        for (int k = 0; k < K_BLOCKS; k++)
            copy_async<16>(&chunk.keys[tile][k][lane], keys + key_position(tile, g) * HEAD_SIZE_PADDED + k * 32 + t * 8);
#pragma unroll
    for (int v = 0; v < V_TILES; v++) copy_async<16>(&chunk.values[v][lane], values + (v * 8 + g) * block_size + t * 8);
}

// The new position's key and value over what was copied of them.
__device__ __forceinline__ void patch(Chunk& chunk, const __half* key, const __half* value, int position, int lane) {
    const int own_lane = 4 * (position / 8 * 2 + position % 2), tile = position % 8 / 2;
    for (int i = lane; i < K_BLOCKS * 4; i += 32)
        chunk.keys[tile][i / 4][own_lane + i % 4] = *reinterpret_cast<const uint4*>(key + i * 8);
    for (int d = lane; d < HEAD_SIZE_PADDED; d += 32)
        reinterpret_cast<__half*>(&chunk.values[d / 8][4 * (d % 8) + position / 8])[position % 8] = value[d];
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, HEAD_SIZE_PADDED <= 64 ? 3 : 2) attention_decode(
    const float* qkv,      // (rows, (H + 2 K) HEAD_SIZE)
    const float2* angles,  // (rows, HEAD_SIZE / 2) or null: not turned
    const int* places,     // (rows,) block * block_size + position in the block; below zero: a row that fills a graph
    const int4* items,     // (rows,): the row itself, 1, position, sequence
    const int* tables,     // (sequences, table_pitch) physical blocks
    const float* sinks,    // (H,) or null
    __half* keys, __half* values,
    __half* out,           // (rows, out_pitch), if `is_spread` as spread.cuh says
    float* partials,       // (rows, K, splits, G, HEAD_SIZE_PADDED + 2)
    unsigned* counters,    // (rows, K), zero
    int num_heads, int num_kv_heads, int block_size, int table_pitch, int window, int out_pitch, int is_spread,
    float scale) {
    extern __shared__ uint4 dynamic[];
    Memory& memory = *reinterpret_cast<Memory*>(dynamic);
    __shared__ __half queries[MAX_GROUP][HEAD_SIZE_PADDED + 8];
    __shared__ __half new_key[HEAD_SIZE_PADDED], new_value[HEAD_SIZE_PADDED];
    __shared__ float own_sinks[MAX_GROUP];
    __shared__ bool is_last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int kv_head = blockIdx.x, row = blockIdx.y, group = num_heads / num_kv_heads;
    // What the host wrote for the step may be read before the wait.
    const int4 item = items[row];
    const int position = item.z, place = places[row];
    const int* table = tables + static_cast<size_t>(item.w) * table_pitch;
    const int first = window > 0 ? max(0, position - window + 1) : 0, last_chunk = position / CHUNK;
    const int first_chunk = first / CHUNK, num_chunks = place < 0 ? 0 : last_chunk + 1 - first_chunk;
    const int per_split = max(1, static_cast<int>((num_chunks + gridDim.z - 1) / gridDim.z));
    const int num_splits = max(1, (num_chunks + per_split - 1) / per_split);  // that have anything to see
    const int begin = first_chunk + blockIdx.z * per_split, end = min(begin + per_split, first_chunk + num_chunks);
    const size_t head_size = static_cast<size_t>(block_size) * HEAD_SIZE_PADDED;

    auto copy = [&](int chunk, int stage) {
        const int at = chunk * CHUNK;
        const size_t head = (static_cast<size_t>(table[at / block_size]) * num_kv_heads + kv_head) * head_size;
        const int offset = at % block_size;
        copy_chunk(memory.chunks[warp][stage], keys + head + static_cast<size_t>(offset) * HEAD_SIZE_PADDED,
                   values + head + offset, block_size, lane);
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
        const int chunk = begin + warp + stage * NUM_WARPS;
        if (chunk < end) copy(chunk, stage);
        end_copies();
    }
    // What no earlier kernel of the step writes, or only its first one.
    for (int i = group * HEAD_SIZE_PADDED + threadIdx.x; i < MAX_GROUP * HEAD_SIZE_PADDED; i += NUM_THREADS)
        queries[i / HEAD_SIZE_PADDED][i % HEAD_SIZE_PADDED] = __half();
    if (sinks != nullptr && threadIdx.x < group) own_sinks[threadIdx.x] = sinks[kv_head * group + threadIdx.x] * LOG2_E;
    float2 turns[K_BLOCKS];
#pragma unroll
    for (int k = 0; k < K_BLOCKS; k++) {
        const int d = k * 32 + lane;
        turns[k] = angles == nullptr || d >= HEAD_SIZE ? make_float2(1.0f, 0.0f)
                                                       : angles[row * HALF_HEAD + (d < HALF_HEAD ? d : d - HALF_HEAD)];
    }
    await_inputs();
    start_dependents();
    if (static_cast<int>(blockIdx.z) >= num_splits) return;

    // Queries, and the new key and value, turned and rounded to half. All are asked for before the first is used.
    const bool has_last = begin <= last_chunk && last_chunk < end;
    const int num_sources = has_last ? group + 2 : group;
    const float* source = qkv + static_cast<size_t>(row) * (num_heads + 2 * num_kv_heads) * HEAD_SIZE;
    float own[SHARES][K_BLOCKS], other[SHARES][K_BLOCKS];
#pragma unroll
    for (int share = 0; share < SHARES; share++) {
        const int head = share * NUM_WARPS + warp;
        const int index = head < group ? kv_head * group + head : num_heads + (head - group) * num_kv_heads + kv_head;
#pragma unroll
        for (int k = 0; k < K_BLOCKS; k++) {
            const int d = k * 32 + lane;
            const bool is_there = head < num_sources && d < HEAD_SIZE;
            own[share][k] = is_there ? source[index * HEAD_SIZE + d] : 0.0f;
            if (is_there && angles != nullptr && head <= group)
                other[share][k] = d < HALF_HEAD ? -source[index * HEAD_SIZE + d + HALF_HEAD] : source[index * HEAD_SIZE + d - HALF_HEAD];
            else
                other[share][k] = 0.0f;
        }
    }
#pragma unroll
    for (int share = 0; share < SHARES; share++) {
        const int head = share * NUM_WARPS + warp;
        if (head >= num_sources) break;
#pragma unroll
        for (int k = 0; k < K_BLOCKS; k++) {
            const int d = k * 32 + lane;
            float value = own[share][k];
            if (head <= group) value = value * turns[k].x + other[share][k] * turns[k].y;
            if (head < group) {
                queries[head][d] = to_half(value * scale);
                continue;
            }
            const bool is_value = head > group;
            (is_value ? new_value : new_key)[d] = to_half(value);
            const size_t head_place = (static_cast<size_t>(place / block_size) * num_kv_heads + kv_head) * head_size;
            const int offset = place % block_size;
            if (d < HEAD_SIZE && is_value) values[head_place + d * block_size + offset] = to_half(value);
            if (d < HEAD_SIZE && !is_value) keys[head_place + offset * HEAD_SIZE_PADDED + d] = to_half(value);
        }
    }
    __syncthreads();
    uint32_t a[K_BLOCKS][8];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int k = 0; k < K_BLOCKS; k++) {
            const uint4 query = *reinterpret_cast<const uint4*>(&queries[g + 8 * half][k * 32 + t * 8]);
            a[k][4 * half] = query.x, a[k][4 * half + 1] = query.y;
            a[k][4 * half + 2] = query.z, a[k][4 * half + 3] = query.w;
        }

    float maximum[2] = {NOTHING, NOTHING}, sum[2] = {0.0f, 0.0f}, sums[V_TILES][4] = {};
    int stage = 0;
    for (int chunk = begin + warp; chunk < end; chunk += NUM_WARPS) {
        await_copies<STAGES - 1>();
        Chunk& own = memory.chunks[warp][stage];
        if (chunk == last_chunk) {
            __syncwarp();  // every lane's copies are done: it is the last chunk of all
            patch(own, new_key, new_value, position % CHUNK, lane);
        }
        float scores[4][4] = {};
#pragma unroll
        for (int tile = 0; tile < 4; tile++)
#pragma unroll
            for (int k = 0; k < K_BLOCKS; k++) {
                const uint4 b = own.keys[tile][k][lane];
                multiply_add(scores[tile], a[k][0], a[k][4], a[k][1], a[k][5], b.x, b.y);
                multiply_add(scores[tile], a[k][2], a[k][6], a[k][3], a[k][7], b.z, b.w);
            }
        // Of the lane's scores position 8t + 2 tile + i belongs to rows g (0, 1) and g + 8 (2, 3).
        const int start = chunk * CHUNK;
        if (chunk == last_chunk || start < first) {
#pragma unroll
            for (int tile = 0; tile < 4; tile++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int seen = start + 8 * t + 2 * tile + i % 2;
                    if (seen > position || seen < first) scores[tile][i] = -INFINITY;
                }
        }
        uint32_t weights[4][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = maximum[half];
#pragma unroll
            for (int tile = 0; tile < 4; tile++)
                highest = fmaxf(highest, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            const float factor = exp2f(maximum[half] - highest);
            maximum[half] = highest;
            sum[half] *= factor;
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                const float one = exp2f(scores[tile][2 * half] - highest), two = exp2f(scores[tile][2 * half + 1] - highest);
                sum[half] += one + two;
                weights[tile][half] = pack_half2(one, two);
            }
#pragma unroll
            for (int v = 0; v < V_TILES; v++) sums[v][2 * half] *= factor, sums[v][2 * half + 1] *= factor;
        }
#pragma unroll
        for (int v = 0; v < V_TILES; v++) {
            const uint4 b = own.values[v][lane];
            multiply_add(sums[v], weights[0][0], weights[0][1], weights[1][0], weights[1][1], b.x, b.y);
            multiply_add(sums[v], weights[2][0], weights[2][1], weights[3][0], weights[3][1], b.z, b.w);
        }
        const int next = chunk + STAGES * NUM_WARPS;
        if (next < end) copy(next, stage);
        end_copies();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // What the warps have, side by side, then merged in their order.
    await_copies<0>();
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int own_row = g + 8 * half;
        float total = sum[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (own_row >= group) continue;
        if (t == 0) memory.merged.maxima[warp][own_row] = maximum[half], memory.merged.sums[warp][own_row] = total;
#pragma unroll
        for (int v = 0; v < V_TILES; v++)
#pragma unroll
            for (int i = 0; i < 2; i++) memory.merged.values[warp][own_row][v * 8 + 2 * t + i] = sums[v][2 * half + i];
    }
    __syncthreads();
    constexpr int WIDTH = HEAD_SIZE_PADDED + 2;
    const size_t index = static_cast<size_t>(row) * num_kv_heads + kv_head;
    float* parts = partials + index * gridDim.z * group * WIDTH;
    auto finish = [&](int head, int d, float value, float highest, float total) {
        float factor = 1.0f;
        if (sinks != nullptr) {
            const float sink = own_sinks[head], both = fmaxf(highest, sink);
            factor = exp2f(highest - both);
            total = total * factor + exp2f(sink - both);
        }
        if (d >= HEAD_SIZE) return;
        const int column = (kv_head * group + head) * HEAD_SIZE + d;
        out[static_cast<size_t>(row) * out_pitch + (is_spread ? spread(column) : column)] =
            to_half(place < 0 ? 0.0f : value * factor / total);
    };
    for (int i = threadIdx.x; i < group * HEAD_SIZE_PADDED; i += NUM_THREADS) {
        const int head = i / HEAD_SIZE_PADDED, d = i % HEAD_SIZE_PADDED;
        const Merged& merged = memory.merged;
        float highest = merged.maxima[0][head], total = 0.0f, value = 0.0f;
#pragma unroll
        for (int other = 1; other < NUM_WARPS; other++) highest = fmaxf(highest, merged.maxima[other][head]);
#pragma unroll
        for (int other = 0; other < NUM_WARPS; other++) {
            const float factor = exp2f(merged.maxima[other][head] - highest);
            total += merged.sums[other][head] * factor;
            value += merged.values[other][head][d] * factor;
        }
        if (num_splits == 1) {
            finish(head, d, value, highest, total);
        } else {
            float* own = parts + (blockIdx.z * group + head) * WIDTH;
            own[d] = value;
            if (d == 0) own[HEAD_SIZE_PADDED] = highest, own[HEAD_SIZE_PADDED + 1] = total;
        }
    }
    if (num_splits == 1) return;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&counters[index], 1u) == static_cast<unsigned>(num_splits) - 1;
        if (is_last) counters[index] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    // Each split's factor under the maximum of all, in the memory that merging no longer needs.
    // Values of the first splits are asked for together with what makes their factors: one trip to the second cache.
    auto load_first = [&](int i, float (&first)[EARLY_SPLITS]) {
        const float* own = parts + i / HEAD_SIZE_PADDED * WIDTH + i % HEAD_SIZE_PADDED;
#pragma unroll
        for (int split = 0; split < EARLY_SPLITS; split++)
            first[split] = i < group * HEAD_SIZE_PADDED && split < num_splits ? __ldcg(&own[split * group * WIDTH]) : 0.0f;
    };
    float early[EARLY_ROUNDS][EARLY_SPLITS];
#pragma unroll
    for (int round = 0; round < EARLY_ROUNDS; round++) load_first(round * NUM_THREADS + threadIdx.x, early[round]);
    // Each split's factor under the maximum of all, in the memory that merging no longer needs.
    float* factors = reinterpret_cast<float*>(&memory);  // (G, splits)
    float* totals = factors + MAX_GROUP * MAX_SPLITS;    // (G, 2): maximum, sum
    for (int head = warp; head < group; head += NUM_WARPS) {
        float2 own[MAX_SPLITS / 32];
        float highest = NOTHING, total = 0.0f;
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) {
            const int split = i * 32 + lane;
            const float2* ends = reinterpret_cast<const float2*>(&parts[(split * group + head) * WIDTH + HEAD_SIZE_PADDED]);
            own[i] = split < num_splits ? __ldcg(ends) : make_float2(NOTHING, 0.0f);
        }
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) highest = fmaxf(highest, own[i].x);
        for (int distance = 16; distance > 0; distance /= 2)
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, distance));
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) {
            const float factor = exp2f(own[i].x - highest);
            factors[head * MAX_SPLITS + i * 32 + lane] = factor;
            total += own[i].y * factor;
        }
        total = warp_sum(total);
        if (lane == 0) totals[2 * head] = highest, totals[2 * head + 1] = total;
    }
    __syncthreads();
    auto merge = [&](int i, const float (&first)[EARLY_SPLITS]) {
        if (i >= group * HEAD_SIZE_PADDED) return;
        const int head = i / HEAD_SIZE_PADDED, d = i % HEAD_SIZE_PADDED;
        float value = 0.0f;
#pragma unroll
        for (int split = 0; split < EARLY_SPLITS; split++)
            if (split < num_splits) value += first[split] * factors[head * MAX_SPLITS + split];
#pragma unroll 8
        for (int split = EARLY_SPLITS; split < num_splits; split++)
            value += __ldcg(&parts[(split * group + head) * WIDTH + d]) * factors[head * MAX_SPLITS + split];
        finish(head, d, value, totals[2 * head], totals[2 * head + 1]);
    };
#pragma unroll
    for (int round = 0; round < EARLY_ROUNDS; round++) merge(round * NUM_THREADS + threadIdx.x, early[round]);
    for (int i = EARLY_ROUNDS * NUM_THREADS + threadIdx.x; i < group * HEAD_SIZE_PADDED; i += NUM_THREADS) {
        load_first(i, early[0]);
        merge(i, early[0]);
    }
}
