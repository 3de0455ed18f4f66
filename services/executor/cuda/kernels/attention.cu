// Attention over paged keys and values: out = softmax(q k) v with sinks and windows, for decode and prefill alike.
//
// An item is some consecutive rows of one sequence. A block takes one item, one key head and one split of the positions;
// each of its 4 warps holds all of the item's queries of that key head (row r: token r / G, head r % G of the G that
// share the key head), 16 M_TILES rows, and every fourth chunk of 32 positions. Nothing goes through shared memory
// until the warps' sums are merged: a lane loads 16 bytes of keys (8 dimensions of a position) and of values
// (8 positions of a dimension, which are stored transposed), which are exactly its share of tensor core operands when
// inner indices are permuted alike on both sides.
// Splits leave (maximum, sum, values) behind; the last one to finish merges them in order, so the result does not depend
// on which it is. The sink joins once, at the end. Exponentials are of base 2: queries come scaled by log2(e)/sqrt(D),
// sinks are scaled here.
// Launch: grid (K, items, splits), 128 threads. -D HEAD_SIZE, HEAD_SIZE_PADDED (a multiple of 32).
// Moves: each item the keys and values that it sees, 4 HEAD_SIZE_PADDED bytes a position and key head.
#include "device.cuh"
#include "spread.cuh"

constexpr int NUM_WARPS = 4;
constexpr int CHUNK = 32;                        // positions
constexpr int K_BLOCKS = HEAD_SIZE_PADDED / 32;  // of 32 dimensions
constexpr int V_TILES = HEAD_SIZE_PADDED / 8;    // of 8 dimensions
constexpr float NOTHING = -1e30f;                // a maximum over no position: finite, so that differences are

struct KV {
    const __half* keys;    // (blocks, K, block_size, HEAD_SIZE_PADDED)
    const __half* values;  // (blocks, K, HEAD_SIZE_PADDED, block_size)
    const int* table;      // physical block of each logical one, of the item's sequence
    int num_kv_heads, block_size, kv_head;
};

// What a warp knows of its rows: lane 4g + t holds rows g and g + 8 of each 16.
template <int M_TILES>
struct Rows {
    float maximum[M_TILES][2];
    float sum[M_TILES][2];  // the lane's own share; added up over t at the end
    float values[M_TILES][V_TILES][4];
};

template <int M_TILES>
__device__ __forceinline__ void score(const KV& kv, int block, int offset, const uint32_t (&queries)[M_TILES][K_BLOCKS][8],
                                      int lane, float (&scores)[M_TILES][4][4]) {
    const int g = lane / 4, t = lane % 4;
    const __half* keys = kv.keys + ((static_cast<size_t>(block) * kv.num_kv_heads + kv.kv_head) * kv.block_size + offset) *
                                       HEAD_SIZE_PADDED;
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {
        // Columns 2t and 2t + 1 of tile i are positions 8t + 2i and the next: a lane's 8 scores are of 8 neighbours.
        const __half* key = keys + (g / 2 * 8 + 2 * tile + g % 2) * HEAD_SIZE_PADDED + t * 8;
#pragma unroll
        for (int k = 0; k < K_BLOCKS; k++) {
            const uint4 b = *reinterpret_cast<const uint4*>(key + k * 32);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                const uint32_t(&a)[8] = queries[m][k];
                multiply_add(scores[m][tile], a[0], a[4], a[1], a[5], b.x, b.y);
                multiply_add(scores[m][tile], a[2], a[6], a[3], a[7], b.z, b.w);
            }
        }
    }
}

// Scores to weights, in half, under a new maximum; what was summed under the old one is scaled.
template <int M_TILES>
__device__ __forceinline__ void soften(float (&scores)[M_TILES][4][4], Rows<M_TILES>& rows, uint32_t (&weights)[M_TILES][4][2]) {
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
            const float factor = exp2f(rows.maximum[m][half] - maximum);
            rows.maximum[m][half] = maximum;
            rows.sum[m][half] *= factor;
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                // A hidden score is -inf: its weight is zero, also where all that was seen is nothing.
                const float first = exp2f(scores[m][tile][2 * half] - maximum);
                const float second = exp2f(scores[m][tile][2 * half + 1] - maximum);
                rows.sum[m][half] += first + second;
                weights[m][tile][half] = pack_half2(first, second);
            }
#pragma unroll
            for (int v = 0; v < V_TILES; v++) {
                rows.values[m][v][2 * half] *= factor;
                rows.values[m][v][2 * half + 1] *= factor;
            }
        }
}

template <int M_TILES>
__device__ __forceinline__ void weigh(const KV& kv, int block, int offset, const uint32_t (&weights)[M_TILES][4][2], int lane,
                                      Rows<M_TILES>& rows) {
    const int g = lane / 4, t = lane % 4;
    const __half* values = kv.values + (static_cast<size_t>(block) * kv.num_kv_heads + kv.kv_head) * HEAD_SIZE_PADDED *
                                           kv.block_size + offset + t * 8;
#pragma unroll
    for (int v = 0; v < V_TILES; v++) {
        const uint4 b = *reinterpret_cast<const uint4*>(values + (v * 8 + g) * kv.block_size);
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
            const uint32_t(&a)[4][2] = weights[m];
            multiply_add(rows.values[m][v], a[0][0], a[0][1], a[1][0], a[1][1], b.x, b.y);
            multiply_add(rows.values[m][v], a[2][0], a[2][1], a[3][0], a[3][1], b.z, b.w);
        }
    }
}

template <int M_TILES>
__device__ __forceinline__ void attend(const __half* queries,  // (rows, H, HEAD_SIZE_PADDED)
                                       KV kv, const int4* items, const int* tables, int table_pitch,
                                       const float* sinks,   // (H,) or null
                                       __half* out,          // (rows, out_pitch)
                                       float* partials,      // (items, K, splits, 16 M_TILES, HEAD_SIZE_PADDED + 2)
                                       unsigned* counters,   // (items, K), zero
                                       int num_heads, int window, int out_pitch,
                                       bool is_spread) {  // out, as spread.cuh says
    constexpr int ROWS = 16 * M_TILES, WIDTH = HEAD_SIZE_PADDED + 2;
    __shared__ float merged[ROWS][WIDTH];  // of each row: values, maximum, sum
    __shared__ bool is_last;
    await_inputs();
    start_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int4 item = items[blockIdx.y];  // first row of the batch, rows, position of the first, sequence
    if (item.y == 0) return;
    const int shared = num_heads / kv.num_kv_heads, num_rows = item.y * shared;
    kv.kv_head = blockIdx.x;
    kv.table = tables + static_cast<size_t>(item.w) * table_pitch;
    const __half* first_query = queries + (static_cast<size_t>(item.x) * num_heads + kv.kv_head * shared) * HEAD_SIZE_PADDED;

    uint32_t fragments[M_TILES][K_BLOCKS][8];
    int positions[M_TILES][2];
    Rows<M_TILES> rows;
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = min(m * 16 + half * 8 + g, num_rows - 1), token = row / shared;
            positions[m][half] = item.z + token;
            rows.maximum[m][half] = NOTHING;
            rows.sum[m][half] = 0.0f;
            const __half* query = first_query + (static_cast<size_t>(token) * num_heads + row % shared) * HEAD_SIZE_PADDED;
#pragma unroll
            for (int k = 0; k < K_BLOCKS; k++) {
                const uint4 a = *reinterpret_cast<const uint4*>(query + k * 32 + t * 8);
                fragments[m][k][4 * half] = a.x, fragments[m][k][4 * half + 1] = a.y;
                fragments[m][k][4 * half + 2] = a.z, fragments[m][k][4 * half + 3] = a.w;
            }
        }
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int v = 0; v < V_TILES; v++)
#pragma unroll
            for (int i = 0; i < 4; i++) rows.values[m][v][i] = 0.0f;

    const int last = item.z + item.y - 1, first = window > 0 ? max(0, item.z - window + 1) : 0;
    const int first_chunk = first / CHUNK, num_chunks = last / CHUNK + 1 - first_chunk;
    const int per_split = (num_chunks + gridDim.z - 1) / gridDim.z;
    const int begin = first_chunk + blockIdx.z * per_split, end = min(begin + per_split, first_chunk + num_chunks);
    for (int chunk = begin + warp; chunk < end; chunk += NUM_WARPS) {
        const int position = chunk * CHUNK, block = kv.table[position / kv.block_size], offset = position % kv.block_size;
        float scores[M_TILES][4][4] = {};
        score(kv, block, offset, fragments, lane, scores);
        // Of the lane's scores position + 8t + 2 tile + i belongs to rows g (0, 1) and g + 8 (2, 3).
        if (position + CHUNK - 1 > item.z || (window > 0 && position <= last - window)) {
#pragma unroll
            for (int m = 0; m < M_TILES; m++)
#pragma unroll
                for (int tile = 0; tile < 4; tile++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int distance = positions[m][i / 2] - (position + 8 * t + 2 * tile + i % 2);
                        if (distance < 0 || (window > 0 && distance >= window)) scores[m][tile][i] = -INFINITY;
                    }
        }
        uint32_t weights[M_TILES][4][2];
        soften(scores, rows, weights);
        weigh(kv, block, offset, weights, lane, rows);
    }

    // The warps add what they have to `merged`, one after the other.
    for (int turn = 0; turn < NUM_WARPS; turn++) {
        if (turn == warp)
#pragma unroll
            for (int m = 0; m < M_TILES; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float(&row)[WIDTH] = merged[m * 16 + half * 8 + g];
                    float sum = rows.sum[m][half];
                    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                    const float before = turn == 0 ? NOTHING : row[HEAD_SIZE_PADDED];
                    const float maximum = fmaxf(before, rows.maximum[m][half]);
                    const float old = turn == 0 ? 0.0f : exp2f(before - maximum);
                    const float own = exp2f(rows.maximum[m][half] - maximum);
#pragma unroll
                    for (int v = 0; v < V_TILES; v++)
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            float& value = row[v * 8 + 2 * t + i];
                            value = (turn == 0 ? 0.0f : value * old) + rows.values[m][v][2 * half + i] * own;
                        }
                    __syncwarp();
                    if (t == 0) {
                        row[HEAD_SIZE_PADDED + 1] = (turn == 0 ? 0.0f : row[HEAD_SIZE_PADDED + 1] * old) + sum * own;
                        row[HEAD_SIZE_PADDED] = maximum;
                    }
                }
        __syncthreads();
    }

    if (gridDim.z > 1) {
        const size_t index = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
        float* parts = partials + index * gridDim.z * ROWS * WIDTH;
        float* own = parts + static_cast<size_t>(blockIdx.z) * ROWS * WIDTH;
        for (int i = threadIdx.x; i < num_rows * WIDTH; i += blockDim.x) own[i] = merged[i / WIDTH][i % WIDTH];
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = atomicAdd(&counters[index], 1u) == gridDim.z - 1;
            if (is_last) counters[index] = 0;
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        for (int row = warp; row < num_rows; row += NUM_WARPS) {
            float maximum = NOTHING, sum = 0.0f;
            for (int split = lane; split < gridDim.z; split += 32)
                maximum = fmaxf(maximum, __ldcg(&parts[(static_cast<size_t>(split) * ROWS + row) * WIDTH + HEAD_SIZE_PADDED]));
            for (int distance = 16; distance > 0; distance /= 2)
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, distance));
            float values[K_BLOCKS] = {};
            for (int split = 0; split < gridDim.z; split++) {
                const float* part = parts + (static_cast<size_t>(split) * ROWS + row) * WIDTH;
                const float factor = exp2f(__ldcg(&part[HEAD_SIZE_PADDED]) - maximum);
                sum += __ldcg(&part[HEAD_SIZE_PADDED + 1]) * factor;
#pragma unroll
                for (int k = 0; k < K_BLOCKS; k++) values[k] += __ldcg(&part[k * 32 + lane]) * factor;
            }
#pragma unroll
            for (int k = 0; k < K_BLOCKS; k++) merged[row][k * 32 + lane] = values[k];
            if (lane == 0) merged[row][HEAD_SIZE_PADDED] = maximum, merged[row][HEAD_SIZE_PADDED + 1] = sum;
        }
        __syncthreads();
    }

    for (int i = threadIdx.x; i < num_rows * HEAD_SIZE; i += blockDim.x) {
        const int row = i / HEAD_SIZE, d = i % HEAD_SIZE, head = kv.kv_head * shared + row % shared;
        const float maximum = merged[row][HEAD_SIZE_PADDED];
        float sum = merged[row][HEAD_SIZE_PADDED + 1], factor = 1.0f;
        if (sinks != nullptr) {
            const float sink = sinks[head] * 1.4426950408889634f, highest = fmaxf(maximum, sink);
            factor = exp2f(maximum - highest);
            sum = sum * factor + exp2f(sink - highest);
        }
        const int column = head * HEAD_SIZE + d;
        out[static_cast<size_t>(item.x + row / shared) * out_pitch + (is_spread ? spread(column) : column)] =
            to_half(merged[row][d] * factor / sum);
    }
}

#define ATTENTION(M_TILES)                                                                                           \
    extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, 2) attention_##M_TILES(                                \
        const __half* queries, const __half* keys, const __half* values, const int4* items, const int* tables,       \
        const float* sinks, __half* out, float* partials, unsigned* counters, int num_heads, int num_kv_heads,       \
        int block_size, int table_pitch, int window, int out_pitch, int is_spread) {                                 \
        attend<M_TILES>(queries, {keys, values, nullptr, num_kv_heads, block_size, 0}, items, tables, table_pitch,   \
                        sinks, out, partials, counters, num_heads, window, out_pitch, is_spread != 0);               \
    }

ATTENTION(1)
#if HEAD_SIZE_PADDED <= 64  // else its registers spill
ATTENTION(2)
#endif
