// Attention of many rows of one sequence over paged keys and values: prompts, whose rows see almost the same positions.
//
// An item is some consecutive rows of one sequence, as in attention.cu, here at most 64 M_TILES rows of queries with the
// heads that share a key head (row r: token r / G, head r % G). A block takes one item and one key head; each of its 4
// warps holds 16 M_TILES rows from the first position to the last. Keys and values come through shared memory, 64
// positions at a time, the next while these are used; lanes read 16 bytes that are their share of tensor core operands
// as they do in attention.cu. Sums are in float, in the order of positions; what exponentials and sinks are is said there.
// Blocks start with the last items, which see most.
// Launch: grid (K, items), 128 threads. -D HEAD_SIZE, HEAD_SIZE_PADDED (a multiple of 32).
// Moves: each item the keys and values that it sees, 4 HEAD_SIZE_PADDED bytes a position and key head, from the second
// cache.
#include "device.cuh"
#include "spread.cuh"

constexpr int NUM_WARPS = 4;
constexpr int M_TILES = HEAD_SIZE_PADDED <= 64 ? 2 : 1;  // of 16 rows, that a warp's registers hold
constexpr int CHUNK = 32;                                 // positions that a block of the cache has at least
constexpr int CHUNKS = HEAD_SIZE_PADDED <= 64 ? 2 : 1;    // of a stage
constexpr int K_BLOCKS = HEAD_SIZE_PADDED / 32;           // of 32 dimensions
constexpr int V_TILES = HEAD_SIZE_PADDED / 8;             // of 8 dimensions
constexpr int ROW_PIECES = HEAD_SIZE_PADDED / 8;          // of 16 bytes, of a position's keys
constexpr int CHUNK_PIECES = CHUNK * ROW_PIECES;
constexpr float NOTHING = -1e30f;  // a maximum over no position: finite, so that differences are

struct Stage {
    uint4 keys[CHUNKS][CHUNK_PIECES];    // (positions, dimensions)
    uint4 values[CHUNKS][CHUNK_PIECES];  // (dimensions, positions)
};

// Where piece `piece` of a position's keys lies, so that the eight lanes that read two positions meet no bank twice.
__device__ __forceinline__ int key_place(int position, int piece) {
    return position * ROW_PIECES + (K_BLOCKS % 2 == 0 ? piece ^ (position % 2 * 4) : piece);
}

__device__ __forceinline__ float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ void copy_async(const uint4* target, const void* source) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
}

// One chunk's keys and values, by the whole block.
__device__ __forceinline__ void copy_chunk(Stage& stage, int index, const __half* keys, const __half* values,
                                           int block_size) {
#pragma unroll
    for (int i = threadIdx.x; i < CHUNK_PIECES; i += NUM_WARPS * 32) {
        copy_async(&stage.keys[index][key_place(i / ROW_PIECES, i % ROW_PIECES)], keys + i * 8);
        copy_async(&stage.values[index][i], values + static_cast<size_t>(i / 4) * block_size + i % 4 * 8);
    }
}

// What a warp knows of its rows: lane 4g + t holds rows g and g + 8 of each 16.
struct Rows {
    float maximum[M_TILES][2];
    float sum[M_TILES][2];  // the lane's own share; added up over t at the end
    float values[M_TILES][V_TILES][4];
};

__device__ __forceinline__ void score(const uint4* keys, const uint32_t (&queries)[M_TILES][K_BLOCKS][8], int lane,
                                      float (&scores)[M_TILES][4][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {
        // Columns 2t and 2t + 1 of tile i are positions 8t + 2i and the next: a lane's 8 scores are of 8 neighbours.
        const int position = g / 2 * 8 + 2 * tile + g % 2;
#pragma unroll
        for (int k = 0; k < K_BLOCKS; k++) {
            const uint4 b = keys[key_place(position, k * 4 + t)];
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                const uint32_t(&a)[8] = queries[m][k];
                multiply_add(scores[m][tile], a[0], a[4], a[1], a[5], b.x, b.y);
                multiply_add(scores[m][tile], a[2], a[6], a[3], a[7], b.z, b.w);
            }
        }
    }
}

// Scores to weights, in half, under a new maximum; what was summed under an old one is scaled.
__device__ __forceinline__ void soften(float (&scores)[M_TILES][4][4], Rows& rows, uint32_t (&weights)[M_TILES][4][2]) {
    float factors[M_TILES][2];
    bool is_new = false;
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float maximum = rows.maximum[m][half];
#pragma unroll
            for (int tile = 0; tile < 4; tile++)
                maximum = fmaxf(maximum, fmaxf(scores[m][tile][2 * half], scores[m][tile][2 * half + 1]));
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
            is_new |= maximum != rows.maximum[m][half];
            factors[m][half] = exp2_of(rows.maximum[m][half] - maximum);
            rows.maximum[m][half] = maximum;
        }
    // Past the first positions maxima seldom change.
    if (__any_sync(0xffffffffu, is_new))
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                rows.sum[m][half] *= factors[m][half];
#pragma unroll
                for (int v = 0; v < V_TILES; v++) {
                    rows.values[m][v][2 * half] *= factors[m][half];
                    rows.values[m][v][2 * half + 1] *= factors[m][half];
                }
            }
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                // A hidden score is -inf: its weight is zero, also where all that was seen is nothing.
                const float first = exp2_of(scores[m][tile][2 * half] - rows.maximum[m][half]);
                const float second = exp2_of(scores[m][tile][2 * half + 1] - rows.maximum[m][half]);
                rows.sum[m][half] += first + second;
                weights[m][tile][half] = pack_half2(first, second);
            }
}

__device__ __forceinline__ void weigh(const uint4* values, const uint32_t (&weights)[M_TILES][4][2], int lane, Rows& rows) {
#pragma unroll
    for (int v = 0; v < V_TILES; v++) {
        const uint4 b = values[v * 32 + lane];
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
            const uint32_t(&a)[4][2] = weights[m];
            multiply_add(rows.values[m][v], a[0][0], a[0][1], a[1][0], a[1][1], b.x, b.y);
            multiply_add(rows.values[m][v], a[2][0], a[2][1], a[3][0], a[3][1], b.z, b.w);
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, 2) attention_prefill(
    const __half* queries,  // (rows, H, HEAD_SIZE_PADDED), scaled by log2(e) / sqrt(D)
    const __half* keys,     // (blocks, K, block_size, HEAD_SIZE_PADDED)
    const __half* values,   // (blocks, K, HEAD_SIZE_PADDED, block_size)
    const int4* items,      // (gridDim.y,): first row of the batch, rows, position of the first, sequence
    const int* tables,      // (sequences, table_pitch): physical block of each logical one
    const float* sinks,     // (H,) or null
    __half* out,            // (rows, out_pitch)
    int num_heads, int num_kv_heads, int block_size, int table_pitch, int window, int out_pitch,
    int is_spread) {  // out, as spread.cuh says
    __shared__ Stage stages[2];
    await_inputs();
    start_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int4 item = items[gridDim.y - 1 - blockIdx.y];
    if (item.y == 0) return;
    const int kv_head = blockIdx.x, shared = num_heads / num_kv_heads, num_rows = item.y * shared;
    const int* table = tables + static_cast<size_t>(item.w) * table_pitch;
    const int first_row = warp * 16 * M_TILES;

    uint32_t fragments[M_TILES][K_BLOCKS][8];
    int positions[M_TILES][2];
    Rows rows;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = min(first_row + m * 16 + half * 8 + g, num_rows - 1), token = row / shared;
            positions[m][half] = item.z + token;
            rows.maximum[m][half] = NOTHING;
            rows.sum[m][half] = 0.0f;
            const __half* query = queries + (static_cast<size_t>(item.x + token) * num_heads + kv_head * shared +
                                             row % shared) * HEAD_SIZE_PADDED;
#pragma unroll
            for (int k = 0; k < K_BLOCKS; k++) {
                const uint4 a = *reinterpret_cast<const uint4*>(query + k * 32 + t * 8);
                fragments[m][k][4 * half] = a.x, fragments[m][k][4 * half + 1] = a.y;
                fragments[m][k][4 * half + 2] = a.z, fragments[m][k][4 * half + 3] = a.w;
            }
        }
#pragma unroll
        for (int v = 0; v < V_TILES; v++)
#pragma unroll
            for (int i = 0; i < 4; i++) rows.values[m][v][i] = 0.0f;
    }

    // What the warp's rows see at most; a warp past the item's rows has none, but copies for the others.
    const int highest = item.z + min(first_row + 16 * M_TILES - 1, num_rows - 1) / shared;
    const int lowest = item.z + min(first_row, num_rows - 1) / shared;
    const bool has_rows = first_row < num_rows;
    const int first_chunk = window > 0 ? max(0, item.z - window + 1) / CHUNK : 0;
    const int end_chunk = (item.z + item.y - 1) / CHUNK + 1;
    auto copy_stage = [&](int chunk, int stage) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            if (chunk + i < end_chunk) {
                const int position = (chunk + i) * CHUNK, offset = position % block_size;
                const size_t block = static_cast<size_t>(table[position / block_size]) * num_kv_heads + kv_head;
                copy_chunk(stages[stage], i, keys + (block * block_size + offset) * HEAD_SIZE_PADDED,
                           values + block * block_size * HEAD_SIZE_PADDED + offset, block_size);
            }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    copy_stage(first_chunk, 0);
    for (int chunk = first_chunk, stage = 0; chunk < end_chunk; chunk += CHUNKS, stage ^= 1) {
        copy_stage(chunk + CHUNKS, stage ^ 1);
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int position = (chunk + i) * CHUNK;
            const bool is_past = window > 0 && position + CHUNK <= lowest - window + 1;
            if (!has_rows || position > highest || is_past) continue;
            float scores[M_TILES][4][4] = {};
            score(stages[stage].keys[i], fragments, lane, scores);
            // Of the lane's scores position + 8t + 2 tile + i belongs to rows g (0, 1) and g + 8 (2, 3).
            if (position + CHUNK - 1 > lowest || (window > 0 && position <= highest - window))
#pragma unroll
                for (int m = 0; m < M_TILES; m++)
#pragma unroll
                    for (int tile = 0; tile < 4; tile++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const int distance = positions[m][j / 2] - (position + 8 * t + 2 * tile + j % 2);
                            if (distance < 0 || (window > 0 && distance >= window)) scores[m][tile][j] = -INFINITY;
                        }
            uint32_t weights[M_TILES][4][2];
            soften(scores, rows, weights);
            weigh(stages[stage].values[i], weights, lane, rows);
        }
        __syncthreads();
    }

#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = rows.sum[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const int row = first_row + m * 16 + half * 8 + g, head = kv_head * shared + row % shared;
            if (row >= num_rows) continue;
            float factor = 1.0f;
            if (sinks != nullptr) {
                const float sink = sinks[head] * 1.4426950408889634f, highest_of_all = fmaxf(rows.maximum[m][half], sink);
                factor = exp2_of(rows.maximum[m][half] - highest_of_all);
                sum = sum * factor + exp2_of(sink - highest_of_all);
            }
            factor /= sum;
            __half* target = out + static_cast<size_t>(item.x + row / shared) * out_pitch;
#pragma unroll
            for (int v = 0; v < V_TILES; v++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int d = v * 8 + 2 * t + i;
                    const int column = head * HEAD_SIZE + d;
                    if (d < HEAD_SIZE)
                        target[is_spread ? spread(column) : column] = to_half(rows.values[m][v][2 * half + i] * factor);
                }
        }
}
