// Attention of many rows of one sequence on Hopper, for heads of up to 64: attention_prefill.cu's contract.
//
// A block takes one item and one key head. Each of its groups of four warps holds 64 rows of queries (row r: token
// r / G, head r % G of the G that share the key head) in registers; four more warps copy keys and values, 128 positions
// at a time, to shared memory. A tile's values are multiplied with the next one's keys, and one group multiplies while the
// other takes exponentials.
// Values have eight more dimensions that are all one: with them the sum of the weights is one of the products.
// Launch: grid (K, items), 128 (1 + NUM_GROUPS) threads, dynamic shared memory for NUM_STAGES; sm_90a.
// -D HEAD_SIZE, HEAD_SIZE_PADDED (64), NUM_GROUPS (items have at most 64 NUM_GROUPS / G rows), NUM_STAGES.
// Moves: each item the keys and values that it sees, 256 bytes a position and key head, from the second cache.
#include "device.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && HEAD_SIZE_PADDED == 64
#include "spread.cuh"
#include "wgmma.cuh"

constexpr int TILE = 128;   // positions
constexpr int CHUNK = 32;   // positions that a block of the cache has at least
constexpr int CHUNKS = TILE / CHUNK;
constexpr int COLUMNS = 72;  // dimensions of values, and the ones
constexpr int KEY_BYTES = TILE * 128, PANEL_BYTES = COLUMNS * 128, STAGE_BYTES = KEY_BYTES + TILE / 64 * PANEL_BYTES;
constexpr float NOTHING = -1e30f;  // a maximum over no position: finite, so that differences are

struct Ring {
    uint32_t stages, full, empty;
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == NUM_STAGES) stage = 0, phase ^= 1;
    }
    __device__ __forceinline__ uint32_t keys() const { return stages + stage * STAGE_BYTES; }
    __device__ __forceinline__ uint32_t values() const { return keys() + KEY_BYTES; }
};

struct Seen {
    int first_chunk, end_chunk;  // of the item's rows together

    __device__ __forceinline__ int num_tiles() const { return (end_chunk - first_chunk + CHUNKS - 1) / CHUNKS; }
};

// 16 bytes `piece` of row `row` of an operand, whose rows are 128 bytes.
__device__ __forceinline__ uint32_t place_of(int row, int piece) { return row * 128 + (piece ^ row % 8) * 16; }

// The blocks of the cache that hold a tile's chunks. Past the last chunk it comes again; no row sees it there.
__device__ __forceinline__ void find_blocks(const int* table, const Seen& seen, int tile, int chunks_per_block,
                                            int (&blocks)[CHUNKS]) {
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
        blocks[i] = table[min(seen.first_chunk + tile * CHUNKS + i, seen.end_chunk - 1) / chunks_per_block];
}

__device__ __forceinline__ void copy_tiles(const __half* keys, const __half* values, const int* table, const Seen& seen,
                                           int num_kv_heads, int kv_head, int block_size, Ring ring) {
    const int chunks_per_block = block_size / CHUNK;
    int blocks[CHUNKS], next[CHUNKS];
    find_blocks(table, seen, 0, chunks_per_block, blocks);
    for (int tile = 0; tile < seen.num_tiles(); tile++) {
        find_blocks(table, seen, tile + 1, chunks_per_block, next);
        await_barrier(ring.empty + ring.stage * 8, ring.phase ^ 1);
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int chunk = min(seen.first_chunk + tile * CHUNKS + i, seen.end_chunk - 1);
            const int offset = chunk % chunks_per_block * CHUNK;
            const size_t block = static_cast<size_t>(blocks[i]) * num_kv_heads + kv_head;
            const __half* own_keys = keys + (block * block_size + offset) * 64;
            const __half* own_values = values + block * block_size * 64 + offset;
#pragma unroll
            for (int j = threadIdx.x; j < 256; j += 128) {
                const int row = i * CHUNK + j / 8, dimension = j / 4, piece = i % 2 * 4 + j % 4;
                copy_async<16>(ring.keys() + place_of(row, j % 8), own_keys + j * 8);
                copy_async<16>(ring.values() + i / 2 * PANEL_BYTES + place_of(dimension, piece),
                               own_values + dimension * block_size + j % 4 * 8);
            }
        }
        arrive_with_copies(ring.full + ring.stage * 8);
        ring.advance();
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) blocks[i] = next[i];
    }
}

__device__ __forceinline__ float exp2_of(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ void start_scores(const uint32_t (&queries)[4][4], const Ring& ring, float (&scores)[64]) {
    const uint32_t keys = operand(ring.keys());
#pragma unroll
    for (int step = 0; step < 4; step++) start_product<TILE>(scores, queries[step], keys + step * 2, step);
    commit_products();
}

__device__ __forceinline__ void start_values(const uint32_t (&weights)[8][4], uint32_t values, int is_added,
                                             float (&sums)[36]) {
    const uint32_t operands = operand(values);
#pragma unroll
    for (int step = 0; step < 8; step++)
        start_product<COLUMNS>(sums, weights[step], operands + step / 4 * (PANEL_BYTES / 16) + step % 4 * 2,
                               is_added + step);
    commit_products();
}

// Scores to weights under the new maxima of the lane's rows g and g + 8; what sums under the old ones are multiplied with.
__device__ __forceinline__ void soften(const float (&scores)[64], float (&maximum)[2], float (&factor)[2],
                                       uint32_t (&weights)[8][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float highest = maximum[half];
#pragma unroll
        for (int j = 0; j < 16; j++)
            highest = fmaxf(highest, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        factor[half] = exp2_of(maximum[half] - highest);
        maximum[half] = highest;
#pragma unroll
        for (int j = 0; j < 16; j++)
            weights[j / 2][j % 2 * 2 + half] =
                pack_half2(exp2_of(scores[4 * j + 2 * half] - highest), exp2_of(scores[4 * j + 2 * half + 1] - highest));
    }
}

// What the lane's rows do not see becomes -inf: its weight is zero.
__device__ __forceinline__ void hide(float (&scores)[64], const int (&positions)[2], int first, int window, int t) {
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int distance = positions[i / 2] - (first + 8 * j + 2 * t + i % 2);
            if (distance < 0 || (window > 0 && distance >= window)) scores[4 * j + i] = -INFINITY;
        }
}

__device__ __forceinline__ void attend(const __half* queries, const float* sinks, __half* out, const int4& item,
                                       const Seen& seen, int num_heads, int kv_head, int shared, int window,
                                       int out_pitch, Ring ring) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, g = lane / 4, t = lane % 4;
    const int num_rows = item.y * shared, first_row = warp * 16;
    int positions[2];
    uint32_t fragments[4][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = min(first_row + 8 * half + g, num_rows - 1), token = row / shared;
        positions[half] = item.z + token;
        const __half* query = queries + (static_cast<size_t>(item.x + token) * num_heads + kv_head * shared +
                                         row % shared) * 64 + 2 * t;
#pragma unroll
        for (int i = 0; i < 8; i++)
            fragments[i / 2][i % 2 * 2 + half] = *reinterpret_cast<const uint32_t*>(query + 8 * i);
    }
    const int lowest = item.z + min(first_row, num_rows - 1) / shared;
    const int highest = item.z + min(first_row + 15, num_rows - 1) / shared;
    float scores[64], sums[36], maximum[2] = {NOTHING, NOTHING}, factor[2];
    uint32_t weights[8][4];
    uint32_t last_values = 0;
    int last_stage = 0;
    const int num_tiles = seen.num_tiles();
    for (int tile = 0; tile < num_tiles; tile++) {
        await_barrier(ring.full + ring.stage * 8, ring.phase);
        show_to_products();
        before_products();
        start_scores(fragments, ring, scores);
        if (tile > 0) start_values(weights, last_values, tile - 1, sums);
        await_products<0>();
        if (tile > 0 && lane == 0) arrive(ring.empty + last_stage * 8);
        const int first = (seen.first_chunk + tile * CHUNKS) * CHUNK;
        if (first + TILE - 1 > lowest || (window > 0 && first <= highest - window)) hide(scores, positions, first, window, t);
        soften(scores, maximum, factor, weights);
        // Past the first positions maxima seldom change.
        if (tile > 0 && __any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f))
#pragma unroll
            for (int i = 0; i < 36; i++) sums[i] *= factor[i / 2 % 2];
        last_values = ring.values(), last_stage = ring.stage;
        ring.advance();
    }
    before_products();
    start_values(weights, last_values, num_tiles - 1, sums);
    await_products<0>();

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 8 * half + g, head = kv_head * shared + row % shared;
        if (row >= num_rows) continue;
        float sum = sums[32 + 2 * half], scale = 1.0f;
        if (sinks != nullptr) {
            const float sink = sinks[head] * 1.4426950408889634f, larger = fmaxf(maximum[half], sink);
            scale = exp2_of(maximum[half] - larger);
            sum = sum * scale + exp2_of(sink - larger);
        }
        scale /= sum;
        __half* target = out + static_cast<size_t>(item.x + row / shared) * out_pitch;
#if HEAD_SIZE == 64
        // Of 32 columns, spread, the lane has four words beside each other.
#pragma unroll
        for (int block = 0; block < 2; block++) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* pair = sums + 16 * block + 4 * j + 2 * half;
                const __half2 both = __halves2half2(to_half(pair[0] * scale), to_half(pair[1] * scale));
                words[j] = *reinterpret_cast<const uint32_t*>(&both);
            }
            *reinterpret_cast<uint4*>(target + head * HEAD_SIZE + 32 * block + 8 * t) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
#else
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (8 * j + 2 * t + i < HEAD_SIZE)
                    target[spread(head * HEAD_SIZE + 8 * j + 2 * t + i)] = to_half(sums[4 * j + 2 * half + i] * scale);
#endif
    }
}
#endif

extern "C" __global__ void __launch_bounds__(128 * (1 + NUM_GROUPS), 1) attention_wgmma(
    const __half* queries,  // (rows, H, HEAD_SIZE_PADDED), scaled by log2(e) / sqrt(D)
    const __half* keys,     // (blocks, K, block_size, HEAD_SIZE_PADDED)
    const __half* values,   // (blocks, K, HEAD_SIZE_PADDED, block_size)
    const int4* items,      // (gridDim.y,): first row of the batch, rows, position of the first, sequence
    const int* tables,      // (sequences, table_pitch): physical block of each logical one
    const float* sinks,     // (H,) or null
    __half* out,            // (rows, out_pitch), spread
    int num_heads, int num_kv_heads, int block_size, int table_pitch, int window, int out_pitch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && HEAD_SIZE_PADDED == 64
    extern __shared__ char memory[];
    Ring ring;
    ring.stages = (shared_address(memory) + 1023) & ~1023u;
    ring.full = ring.stages + NUM_STAGES * STAGE_BYTES;
    ring.empty = ring.full + NUM_STAGES * 8;
    if (threadIdx.x == 0)
        for (int stage = 0; stage < NUM_STAGES; stage++) {
            make_barrier(ring.full + stage * 8, 128);
            make_barrier(ring.empty + stage * 8, 4 * NUM_GROUPS);
        }
    // Rows 64 to 71 of both panels of every stage's values are ones; order within them does not matter.
    for (int i = threadIdx.x; i < NUM_STAGES * TILE / 64 * 256; i += blockDim.x) {
        const int panel = i / 256, stage = panel / (TILE / 64);
        const uint32_t address = ring.stages + stage * STAGE_BYTES + KEY_BYTES + panel % (TILE / 64) * PANEL_BYTES +
                                 64 * 128 + i % 256 * 4;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(0x3C003C00u) : "memory");
    }
    show_to_products();
    __syncthreads();
    await_inputs();
    start_dependents();
    const int4 item = items[gridDim.y - 1 - blockIdx.y];
    if (item.y == 0) return;
    const int kv_head = blockIdx.x;
    const Seen seen = {window > 0 ? max(0, item.z - window + 1) / CHUNK : 0, (item.z + item.y - 1) / CHUNK + 1};
    if (threadIdx.x < 128) {
        leave_registers<40>();
        const int* table = tables + static_cast<size_t>(item.w) * table_pitch;
        copy_tiles(keys, values, table, seen, num_kv_heads, kv_head, block_size, ring);
    } else {
        take_registers<232>();
        attend(queries, sinks, out, item, seen, num_heads, kv_head, num_heads / num_kv_heads, window, out_pitch, ring);
    }
#else
    __trap();  // attention_prefill.cu takes those
#endif
}
