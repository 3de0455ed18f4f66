// Products of some rows: out = epilogue(x @ matrix + bias), for up to 8 NUM_TILES rows at once, NUM_TILES 2, 4 or 8.
//
// A warp takes a strip of 16 outputs, or with `num_shares` warps to a strip a share of its tiles, and streams the tiles
// through a ring in shared memory whose slots are private to each lane. The warps of a block walk along the columns
// together, more or less, so what they read of x comes from the first cache. Shares are added up in order: a row's sum
// depends on neither the other rows nor their number, within one NUM_TILES and num_shares. Sums are in float.
// Grouped (experts): as in product.cu, groups of at most 8 NUM_TILES rows.
// Launch: grid (ceil(strips * num_shares / 8), groups or 1), 256 threads, num_shares 1, 2, 4 or 8; x has whole tiles of
// columns, what pads them is zero. Groups may be read before the wait if `are_groups_early`.
// Moves: the matrix once for each group; each block all of its rows of x, from the second cache.
#include "epilogue.cuh"
#include "weights.cuh"

constexpr int NUM_WARPS = 8;
constexpr int DEPTH = 32768 / NUM_WARPS / SLOT_BYTES > 1 ? 32768 / NUM_WARPS / SLOT_BYTES : 2;  // slots of a ring

// Whether the next tile's x is on its way while this one's is multiplied; for more rows the registers do not hold it.
template <int NUM_TILES>
constexpr bool IS_AHEAD = NUM_TILES <= 2;

// What a lane needs of x: for each 8 rows its 8 columns of both blocks of a tile, next where they lie.
template <int NUM_TILES>
struct Rows {
    const __half* next[NUM_TILES];
    uint4 b[2][NUM_TILES];

    __device__ __forceinline__ void load(int block, int n) {
        b[block][n] = *reinterpret_cast<const uint4*>(next[n] + block * 32);
    }
};

template <int NUM_TILES>
__device__ __forceinline__ void multiply_tile(const Tile& tile, Rows<NUM_TILES>& x, int count, bool is_last,
                                              float (&sums)[NUM_TILES][4]) {
    if (IS_AHEAD<NUM_TILES>)
#pragma unroll
        for (int n = 0; n < NUM_TILES; n++) x.next[n] += 64;
#pragma unroll
    for (int block = 0; block < 2; block++) {
        uint32_t low[4], high[4];
        decode(tile, block, 0, low);
        decode(tile, block, 1, high);
        const float low_scale = scale_of(tile, block, 0), high_scale = scale_of(tile, block, 1);
#pragma unroll
        for (int n = 0; n < NUM_TILES; n++) {
            if (n > 0 && n * 8 >= count) break;
            if (!IS_AHEAD<NUM_TILES>) x.load(block, n);
            const uint4& b = x.b[block][n];
            if (IS_SCALED) {
                float c[4];
                multiply(c, low[0], high[0], low[1], high[1], b.x, b.y);
                multiply_add(c, low[2], high[2], low[3], high[3], b.z, b.w);
                sums[n][0] += c[0] * low_scale;
                sums[n][1] += c[1] * low_scale;
                sums[n][2] += c[2] * high_scale;
                sums[n][3] += c[3] * high_scale;
            } else {
                multiply_add(sums[n], low[0], high[0], low[1], high[1], b.x, b.y);
                multiply_add(sums[n], low[2], high[2], low[3], high[3], b.z, b.w);
            }
            if (IS_AHEAD<NUM_TILES> && !is_last) x.load(block, n);
        }
    }
    if (!IS_AHEAD<NUM_TILES>)
#pragma unroll
        for (int n = 0; n < NUM_TILES; n++) x.next[n] += 64;
}

template <int NUM_TILES>
__device__ __forceinline__ void product(const Planes& planes, const Output& out,
                                        const __half* x,      // (rows, x_pitch)
                                        const int* row_ids,   // of x, for each row of out; null: the same row
                                        const int4* groups,   // (gridDim.y,) or null
                                        int x_pitch, int num_rows, int column_tiles, int num_strips, int num_shares,
                                        bool are_groups_early) {
    extern __shared__ uint4 memory[];  // the rings, and after them, shared out, (warps, 16, 8 NUM_TILES + 1) floats
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const bool is_early = groups == nullptr || are_groups_early;
    if (!is_early) await_inputs();
    int expert = 0, start = 0, count = min(8 * NUM_TILES, num_rows);
    if (groups != nullptr) {
        const int4 group = groups[blockIdx.y];
        expert = group.x, start = group.y, count = group.z;
    }
    const int strip = (blockIdx.x * NUM_WARPS + warp) / num_shares, share = warp % num_shares;
    const bool is_busy = strip < num_strips && count > 0;
    const int first = column_tiles * share / num_shares, last = is_busy ? column_tiles * (share + 1) / num_shares : first;
    const size_t first_tile = (static_cast<size_t>(expert) * num_strips + strip) * column_tiles;
    char* const ring = reinterpret_cast<char*>(memory) + warp * DEPTH * SLOT_BYTES;
    TileStream stream(planes, first_tile + first, lane);
    int to_copy = last - first;
    for (int slot = 0; slot < DEPTH; slot++) {
        if (to_copy-- > 0) stream.copy(ring + slot * SLOT_BYTES, lane);
        end_copies();
    }
    if (is_early) await_inputs();
    start_dependents();
    if (count == 0) return;

    float sums[NUM_TILES][4] = {};
    Rows<NUM_TILES> rows;
#pragma unroll
    for (int n = 0; n < NUM_TILES; n++) {
        const int row = start + (n * 8 + g < count ? n * 8 + g : 0);
        rows.next[n] = x + static_cast<size_t>(row_ids == nullptr ? row : row_ids[row]) * x_pitch + first * 64 + t * 8;
        if (IS_AHEAD<NUM_TILES> && first < last && (n == 0 || n * 8 < count)) rows.load(0, n), rows.load(1, n);
    }
    char* slot = ring;
    for (int column_tile = first; column_tile < last; column_tile++) {
        await_copies<DEPTH - 1>();
        Tile tile;
        read_tile(tile, slot, lane);
        multiply_tile(tile, rows, count, column_tile + 1 == last, sums);
        if (to_copy-- > 0) stream.copy(slot, lane);
        end_copies();
        slot = slot + SLOT_BYTES == ring + DEPTH * SLOT_BYTES ? ring : slot + SLOT_BYTES;
    }

    if (num_shares == 1) {
        if (!is_busy) return;
#pragma unroll
        for (int n = 0; n < NUM_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int column = n * 8 + 2 * t + i;
                if (column < count)
                    finish(out, expert, strip, g, start + column, sums[n][i] * SUM_FACTOR, sums[n][2 + i] * SUM_FACTOR);
            }
        return;
    }
    constexpr int WIDTH = 8 * NUM_TILES + 1;
    float* partial = reinterpret_cast<float*>(reinterpret_cast<char*>(memory) + NUM_WARPS * DEPTH * SLOT_BYTES);
#pragma unroll
    for (int n = 0; n < NUM_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) partial[(warp * 16 + g + i / 2 * 8) * WIDTH + n * 8 + 2 * t + i % 2] = sums[n][i];
    __syncthreads();
    const int strips = NUM_WARPS / num_shares;
    for (int i = threadIdx.x; i < strips * count * 8; i += blockDim.x) {
        const int output = i % 8, column = i / 8 % count, local = i / 8 / count;
        const int whole = blockIdx.x * strips + local;
        if (whole >= num_strips) break;
        float low = 0.0f, high = 0.0f;
        for (int other = 0; other < num_shares; other++) {
            const float* row = partial + ((local * num_shares + other) * 16 + output) * WIDTH + column;
            low += row[0];
            high += row[8 * WIDTH];
        }
        finish(out, expert, whole, output, start + column, low * SUM_FACTOR, high * SUM_FACTOR);
    }
}

#define PRODUCT(NUM_TILES)                                                                                             \
    extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, NUM_TILES <= 4 && NUM_LOADS <= 2 ? 3 : 2)             \
        product_rows_##NUM_TILES(const char* quants, const char* scales, const char* minima, const float* bias,        \
                                 const float* up_bias, const __half* x, void* values, const int* row_ids,              \
                                 const int4* groups, int x_pitch, int pitch, int num_rows, int num_outputs,            \
                                 int column_tiles, int epilogue, int num_strips, int num_shares,                       \
                                 int are_groups_early) {                                                               \
        product<NUM_TILES>({quants, scales, minima}, {values, bias, up_bias, pitch, num_outputs, epilogue}, x,         \
                           row_ids, groups, x_pitch, num_rows, column_tiles, num_strips, num_shares,                   \
                           are_groups_early != 0);                                                                     \
    }

PRODUCT(2)
PRODUCT(4)
PRODUCT(8)
