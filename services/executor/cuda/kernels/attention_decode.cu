// Attention of rows that are their sequences' next token: rotary positions, keys and values into their blocks, and
// out = softmax(q k) v with sinks and windows, over paged keys and values (their layout: rope.cu).
//
// A block takes one row, one key head and one split of the positions, 32 positions at a time (a chunk) for each of its
// 4 warps. Rows of the tensor cores' operand are the G query heads that share the key head, 16 of them at most. A
// warp's keys and values come through shared memory of its own, those of the first chunks before the kernel before this
// one ends: all but the last position was written by earlier steps. The last position's key and value are put over what
// was copied of them, and into their block.
// Splits leave (maximum, sum, values) behind; the last one to finish merges them in order, so the result does not
// depend on which it is. The sink joins once, at the end. Exponentials are of base 2: queries are scaled by
// log2(e)/sqrt(D), sinks are scaled here.
// Launch: grid (K, rows, at most 64 splits), 128 threads, G <= 16; shared memory for `Memory`, as `decode_shared` in
// ops.py reckons; -D HEAD_SIZE, HEAD_SIZE_PADDED (a multiple of 32), GROUP (G).
// Moves: of each row the keys and values that it sees, 4 HEAD_SIZE_PADDED bytes a position and key head.
#include "device.cuh"
#include "spread.cuh"

constexpr int NUM_WARPS = 4, NUM_THREADS = 32 * NUM_WARPS;
constexpr int CHUNK = 32;                        // positions
constexpr int K_BLOCKS = HEAD_SIZE_PADDED / 32;  // of 32 dimensions
constexpr int V_TILES = HEAD_SIZE_PADDED / 8;    // of 8 dimensions
constexpr int HALF_HEAD = HEAD_SIZE / 2;
constexpr int HALVES = GROUP > 8 ? 2 : 1;        // of the operand's 16 rows: the second one may be empty
static_assert(GROUP <= 16, "the tensor cores' operand has 16 rows");
static_assert(HEAD_SIZE_PADDED <= 128, "copy_chunk deals out rows of at most 256 bytes");
constexpr int STAGES = HEAD_SIZE_PADDED <= 64 ? 2 : 1;  // chunks of a warp in flight
constexpr int SHARES = (GROUP + 2 + NUM_WARPS - 1) / NUM_WARPS;  // a warp's, of queries, new key and new value
constexpr int HEADS = (GROUP + NUM_WARPS - 1) / NUM_WARPS;       // a warp's, of queries, where splits are merged
constexpr int NUM_VALUES = GROUP * HEAD_SIZE_PADDED;
constexpr int MAX_SPLITS = 64;
constexpr int BATCH_SPLITS = 8;  // of which a thread reads values at once, for so many of its own:
constexpr int ROUNDS = NUM_VALUES < 4 * NUM_THREADS ? (NUM_VALUES + NUM_THREADS - 1) / NUM_THREADS : 4;
constexpr float NOTHING = -1e30f;                // a maximum over no position: finite, so that differences are
constexpr float LOG2_E = 1.4426950408889634f;

struct Chunk {
    uint4 keys[4][K_BLOCKS][32];  // [tile][block of dimensions][lane]: 8 dimensions of a position
    uint4 values[V_TILES][32];    // [tile of dimensions][lane]: 8 positions of a dimension
};

struct Merged {
    float values[NUM_WARPS][GROUP][HEAD_SIZE_PADDED + 1];
    float maxima[NUM_WARPS][GROUP];
    float sums[NUM_WARPS][GROUP];
    float factors[NUM_WARPS][GROUP];
};

union Memory {
    Chunk chunks[NUM_WARPS][STAGES];
    Merged merged;
};

// Column 2t + i of tile n is position 8t + 2n + i of the chunk: a lane's 8 scores are of 8 neighbours.
__device__ __forceinline__ int key_position(int tile, int g) { return g / 2 * 8 + 2 * tile + g % 2; }

// A warp's copies of a chunk; its lanes read each other's, so it meets before it reads and before it copies again.
__device__ __forceinline__ void copy_chunk(Chunk& chunk, const __half* keys, const __half* values, int block_size, int lane) {
    const int g = lane / 4, t = lane % 4;
    if constexpr (8 % K_BLOCKS == 0) {
        // 512 bytes at once, one after another: `ROWS` positions, of which this lane has a piece of its one.
        constexpr int ROWS = 8 / K_BLOCKS;
        const int row = lane / (4 * K_BLOCKS), piece = lane % (4 * K_BLOCKS);
        uint4* target = &chunk.keys[row / 2][piece / 4][4 * (row % 2) + piece % 4];
#pragma unroll
        for (int i = 0; i < 4 * K_BLOCKS; i++)
            copy_async<16>(target + (ROWS * i % 8 / 2 * K_BLOCKS) * 32 + ROWS * i / 8 * 8, keys + i * 256 + lane * 8);
    } else {
#pragma unroll
        for (int tile = 0; tile < 4; tile++)
#pragma unroll
            for (int k = 0; k < K_BLOCKS; k++)
                copy_async<16>(&chunk.keys[tile][k][lane], keys + key_position(tile, g) * HEAD_SIZE_PADDED + k * 32 + t * 8);
    }
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
    __shared__ __align__(16) __half queries[8 * HALVES][HEAD_SIZE_PADDED + 8];
    __shared__ __align__(16) __half new_key[HEAD_SIZE_PADDED], new_value[HEAD_SIZE_PADDED];
    __shared__ float own_sinks[GROUP];
    __shared__ bool is_last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int kv_head = blockIdx.x, row = blockIdx.y;
    // What the host wrote for the step may be read before the wait.
    const int4 item = items[row];
    const int position = item.z, place = places[row];
    const int* table = tables + static_cast<size_t>(item.w) * table_pitch;
    const int first = window > 0 ? max(0, position - window + 1) : 0, last_chunk = position / CHUNK;
    const int first_chunk = first / CHUNK, num_chunks = place < 0 ? 0 : last_chunk + 1 - first_chunk;
    const bool is_split = gridDim.z > 1;
    const int per_split = is_split ? max(1, static_cast<int>((num_chunks + gridDim.z - 1) / gridDim.z)) : num_chunks;
    const int num_splits = is_split ? max(1, (num_chunks + per_split - 1) / per_split) : 1;  // that have anything to see
    const int begin = first_chunk + blockIdx.z * per_split, end = min(begin + per_split, first_chunk + num_chunks);
    const size_t head_size = static_cast<size_t>(block_size) * HEAD_SIZE_PADDED;

    auto block_of = [&](int at) { return block_size == CHUNK ? at / CHUNK : at / block_size; };  // division is slow
    auto copy = [&](int chunk, int stage) {
        const int at = chunk * CHUNK, block = block_of(at), offset = at - block * block_size;
        const size_t head = (static_cast<size_t>(table[block]) * num_kv_heads + kv_head) * head_size;
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
    for (int i = GROUP * HEAD_SIZE_PADDED + threadIdx.x; i < 8 * HALVES * HEAD_SIZE_PADDED; i += NUM_THREADS)
        queries[i / HEAD_SIZE_PADDED][i % HEAD_SIZE_PADDED] = __half();
    if (sinks != nullptr && threadIdx.x < GROUP) own_sinks[threadIdx.x] = sinks[kv_head * GROUP + threadIdx.x] * LOG2_E;
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
    const int num_sources = has_last ? GROUP + 2 : GROUP;
    const float* source = qkv + static_cast<size_t>(row) * (num_heads + 2 * num_kv_heads) * HEAD_SIZE;
    float own[SHARES][K_BLOCKS], other[SHARES][K_BLOCKS];
#pragma unroll
    for (int share = 0; share < SHARES; share++) {
        const int head = share * NUM_WARPS + warp;
        const int index = head < GROUP ? kv_head * GROUP + head : num_heads + (head - GROUP) * num_kv_heads + kv_head;
#pragma unroll
        for (int k = 0; k < K_BLOCKS; k++) {
            const int d = k * 32 + lane;
            const bool is_there = head < num_sources && d < HEAD_SIZE;
            own[share][k] = is_there ? source[index * HEAD_SIZE + d] : 0.0f;
            if (is_there && angles != nullptr && head <= GROUP)
                other[share][k] = d < HALF_HEAD ? -source[index * HEAD_SIZE + d + HALF_HEAD]
                                                : source[index * HEAD_SIZE + d - HALF_HEAD];
            else
                other[share][k] = 0.0f;
        }
    }
    const int block = block_of(place), offset = place - block * block_size;
    const size_t head_place = (static_cast<size_t>(block) * num_kv_heads + kv_head) * head_size;
#pragma unroll
    for (int share = 0; share < SHARES; share++) {
        const int head = share * NUM_WARPS + warp;
        if (head >= num_sources) break;
#pragma unroll
        for (int k = 0; k < K_BLOCKS; k++) {
            const int d = k * 32 + lane;
            float value = own[share][k];
            if (head <= GROUP) value = value * turns[k].x + other[share][k] * turns[k].y;
            if (head < GROUP) {
                queries[head][d] = to_half(value * scale);
                continue;
            }
            const bool is_value = head > GROUP;
            (is_value ? new_value : new_key)[d] = to_half(value);
            if (d < HEAD_SIZE && is_value) values[head_place + d * block_size + offset] = to_half(value);
            if (d < HEAD_SIZE && !is_value) keys[head_place + offset * HEAD_SIZE_PADDED + d] = to_half(value);
        }
    }
    __syncthreads();
    uint32_t a[K_BLOCKS][8] = {};
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int k = 0; k < K_BLOCKS; k++) {
            const uint4 query = *reinterpret_cast<const uint4*>(&queries[g + 8 * half][k * 32 + t * 8]);
            a[k][4 * half] = query.x, a[k][4 * half + 1] = query.y;
            a[k][4 * half + 2] = query.z, a[k][4 * half + 3] = query.w;
        }

    float maximum[HALVES], sum[HALVES] = {}, sums[V_TILES][4] = {};
#pragma unroll
    for (int half = 0; half < HALVES; half++) maximum[half] = NOTHING;
    int stage = 0;
    for (int chunk = begin + warp; chunk < end; chunk += NUM_WARPS) {
        await_copies<STAGES - 1>();
        __syncwarp();  // every lane's copies are done
        Chunk& own = memory.chunks[warp][stage];
        if (chunk == last_chunk) patch(own, new_key, new_value, position % CHUNK, lane);
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
                for (int i = 0; i < 2 * HALVES; i++) {
                    const int seen = start + 8 * t + 2 * tile + i % 2;
                    if (seen > position || seen < first) scores[tile][i] = -INFINITY;
                }
        }
        uint32_t weights[4][2] = {};
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
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
        __syncwarp();  // every lane has read
        if (next < end) copy(next, stage);
        end_copies();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // What the warps have, side by side, then merged in their order.
    await_copies<0>();
    __syncthreads();
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const int own_row = g + 8 * half;
        float total = sum[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (own_row >= GROUP) continue;
        if (t == 0) memory.merged.maxima[warp][own_row] = maximum[half], memory.merged.sums[warp][own_row] = total;
#pragma unroll
        for (int v = 0; v < V_TILES; v++)
#pragma unroll
            for (int i = 0; i < 2; i++) memory.merged.values[warp][own_row][v * 8 + 2 * t + i] = sums[v][2 * half + i];
    }
    __syncthreads();
    // What a head's values are multiplied by at last: over the sum of all weights, the sink's among them.
    auto final_factor = [&](int head, float highest, float total) {
        if (sinks == nullptr) return 1.0f / total;
        const float sink = own_sinks[head], both = fmaxf(highest, sink), factor = exp2f(highest - both);
        return factor / (total * factor + exp2f(sink - both));
    };
    auto write = [&](int head, int d, float value) {
        if (d >= HEAD_SIZE) return;
        const int column = (kv_head * GROUP + head) * HEAD_SIZE + d;
        out[static_cast<size_t>(row) * out_pitch + (is_spread ? spread(column) : column)] =
            to_half(place < 0 ? 0.0f : value);
    };
    constexpr int WIDTH = HEAD_SIZE_PADDED + 2;
    const size_t index = static_cast<size_t>(row) * num_kv_heads + kv_head;
    float* parts = partials + index * gridDim.z * GROUP * WIDTH;
    Merged& merged = memory.merged;
    if (warp * 32 < GROUP * NUM_WARPS) {  // four lanes a head, one for each warp's share
        const int head = threadIdx.x / NUM_WARPS, share = threadIdx.x % NUM_WARPS;
        const bool is_there = head < GROUP;
        const float own_maximum = is_there ? merged.maxima[share][head] : NOTHING;
        float highest = own_maximum, total = is_there ? merged.sums[share][head] : 0.0f;
#pragma unroll
        for (int distance = 1; distance < NUM_WARPS; distance *= 2)
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, distance));
        float factor = exp2f(own_maximum - highest);
        total *= factor;
#pragma unroll
        for (int distance = 1; distance < NUM_WARPS; distance *= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
        if (is_there && num_splits == 1) factor *= final_factor(head, highest, total);
        if (is_there) merged.factors[share][head] = factor;
        if (is_there && num_splits > 1 && share == 0) {
            float* ends = parts + (blockIdx.z * GROUP + head) * WIDTH + HEAD_SIZE_PADDED;
            ends[0] = highest, ends[1] = total;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < NUM_VALUES; i += NUM_THREADS) {
        const int head = i / HEAD_SIZE_PADDED, d = i % HEAD_SIZE_PADDED;
        float value = 0.0f;
#pragma unroll
        for (int share = 0; share < NUM_WARPS; share++)
            value += merged.values[share][head][d] * merged.factors[share][head];
        if (num_splits == 1)
            write(head, d, value);
        else
            parts[(blockIdx.z * GROUP + head) * WIDTH + d] = value;
    }
    if (num_splits == 1) return;

    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // what the block wrote is seen before its count
        is_last = atomicAdd(&counters[index], 1u) == static_cast<unsigned>(num_splits) - 1;
        if (is_last) counters[index] = 0;
        __threadfence();  // and what the others wrote is seen from here on
    }
    __syncthreads();
    if (!is_last) return;
    // Values of the first splits are asked for together with what makes their factors: one trip to the second cache.
    float batch[ROUNDS][BATCH_SPLITS];
    auto load = [&](int first_value, int first_split) {
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const int i = first_value + round * NUM_THREADS + threadIdx.x;
            const float* own = parts + (first_split * GROUP + i / HEAD_SIZE_PADDED) * WIDTH + i % HEAD_SIZE_PADDED;
#pragma unroll
            for (int j = 0; j < BATCH_SPLITS; j++)
                batch[round][j] = i < NUM_VALUES && first_split + j < num_splits ? __ldcg(&own[j * GROUP * WIDTH]) : 0.0f;
        }
    };
    float2 ends[HEADS][MAX_SPLITS / 32];  // maximum and sum of the lane's splits
#pragma unroll
    for (int j = 0; j < HEADS; j++)
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) {
            const int split = i * 32 + lane, head = j * NUM_WARPS + warp;
            const float* own = &parts[(split * GROUP + head) * WIDTH + HEAD_SIZE_PADDED];
            const bool is_there = split < num_splits && head < GROUP;
            ends[j][i] = is_there ? __ldcg(reinterpret_cast<const float2*>(own)) : make_float2(NOTHING, 0.0f);
        }
    load(0, 0);
    // Each split's factor under the maximum of all, in the memory that merging no longer needs.
    float* factors = reinterpret_cast<float*>(&memory);  // (G, splits)
#pragma unroll
    for (int j = 0; j < HEADS; j++) {
        const int head = j * NUM_WARPS + warp;
        float highest = NOTHING, total = 0.0f;
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) highest = fmaxf(highest, ends[j][i].x);
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, distance));
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) {
            ends[j][i].x = exp2f(ends[j][i].x - highest);
            total += ends[j][i].y * ends[j][i].x;
        }
        total = warp_sum(total);
        if (head >= GROUP) break;
        const float factor = final_factor(head, highest, total);
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / 32; i++) factors[head * MAX_SPLITS + i * 32 + lane] = ends[j][i].x * factor;
    }
    __syncthreads();
#pragma unroll 1
    for (int first_value = 0; first_value < NUM_VALUES; first_value += ROUNDS * NUM_THREADS) {
        float merged_values[ROUNDS] = {};
#pragma unroll 1
        for (int first_split = 0; first_split < num_splits; first_split += BATCH_SPLITS) {
            if (first_value + first_split > 0) load(first_value, first_split);
#pragma unroll
            for (int round = 0; round < ROUNDS; round++) {
                const int i = first_value + round * NUM_THREADS + threadIdx.x, head = min(i / HEAD_SIZE_PADDED, GROUP - 1);
#pragma unroll
                for (int j = 0; j < BATCH_SPLITS; j++)
                    merged_values[round] += batch[round][j] * factors[head * MAX_SPLITS + first_split + j];
            }
        }
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const int i = first_value + round * NUM_THREADS + threadIdx.x;
            if (i < NUM_VALUES) write(i / HEAD_SIZE_PADDED, i % HEAD_SIZE_PADDED, merged_values[round]);
        }
    }
}
