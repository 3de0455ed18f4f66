// Products of few rows: out = epilogue(x @ matrix + bias), for up to 8 NUM_TILES rows at once.
//
// One block of 8 warps takes one strip of 16 outputs; its warps share the columns, tile by tile, and add up in order:
// a row's sum depends on neither the other rows nor their number, within one NUM_TILES. Sums are in float.
// Grouped (experts): `groups` lists (expert, first row, rows); the rows of a group are those of one expert.
// Launch: grid (strips, row tiles or groups), 256 threads. x has whole tiles of columns, what pads them is zero.
// Moves: the matrix once for each row tile or group; each block all of its rows of x, from the second cache.
#include "epilogue.cuh"
#include "weights.cuh"

constexpr int NUM_WARPS = 8;
constexpr int DEPTH = NUM_LOADS == 8 ? 2 : NUM_LOADS == 4 ? 3 : 6;  // tiles of a warp in flight

template <int NUM_TILES>
__device__ __forceinline__ void multiply_tile(const Tile& tile, const __half* x, const int (&offsets)[NUM_TILES],
                                              int column, int count, float (&sums)[NUM_TILES][4]) {
#pragma unroll
    for (int block = 0; block < 2; block++) {
        uint32_t low[4], high[4];
        decode(tile, block, 0, low);
        decode(tile, block, 1, high);
        const float low_scale = scale_of(tile, block, 0), high_scale = scale_of(tile, block, 1);
#pragma unroll
        for (int n = 0; n < NUM_TILES; n++) {
            if (NUM_TILES > 1 && n * 8 >= count) break;
            const uint4 b = *reinterpret_cast<const uint4*>(x + offsets[n] + column + block * 32);
            if (IS_SCALED) {
                float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                multiply_add(c, low[0], high[0], low[1], high[1], b.x, b.y);
                multiply_add(c, low[2], high[2], low[3], high[3], b.z, b.w);
                sums[n][0] += c[0] * low_scale;
                sums[n][1] += c[1] * low_scale;
                sums[n][2] += c[2] * high_scale;
                sums[n][3] += c[3] * high_scale;
            } else {
                multiply_add(sums[n], low[0], high[0], low[1], high[1], b.x, b.y);
                multiply_add(sums[n], low[2], high[2], low[3], high[3], b.z, b.w);
            }
        }
    }
}

template <int NUM_TILES>
__device__ __forceinline__ void product(const Planes& planes, const Output& out,
                                        const __half* x,      // (rows, x_pitch)
                                        const int* row_ids,   // of x, for each row of out; null: the same row
                                        const int4* groups,   // (gridDim.y,) or null
                                        int x_pitch, int num_rows, int column_tiles) {
    __shared__ float partial[NUM_WARPS][16][8 * NUM_TILES + 1];
    start_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int strip = blockIdx.x, num_strips = gridDim.x;
    int expert = 0, start = blockIdx.y * 8 * NUM_TILES, count = min(8 * NUM_TILES, num_rows - start);
    if (groups != nullptr) {
        await_inputs();
        const int4 group = groups[blockIdx.y];
        expert = group.x, start = group.y, count = group.z;
        if (count == 0) return;
    }
    const size_t first_tile = (static_cast<size_t>(expert) * num_strips + strip) * column_tiles;

    float sums[NUM_TILES][4] = {};
    int offsets[NUM_TILES];
    for (int first = warp; first == warp || first < column_tiles; first += NUM_WARPS * DEPTH) {
        Tile tiles[DEPTH];
#pragma unroll
        for (int i = 0; i < DEPTH; i++)
            if (first + i * NUM_WARPS < column_tiles) load_tile(tiles[i], planes, first_tile + first + i * NUM_WARPS, lane);
        if (first == warp) {
            await_inputs();
#pragma unroll
            for (int n = 0; n < NUM_TILES; n++) {
                const int row = start + (n * 8 + g < count ? n * 8 + g : 0);
                offsets[n] = (row_ids == nullptr ? row : row_ids[row]) * x_pitch + t * 8;
            }
        }
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            const int column_tile = first + i * NUM_WARPS;
            if (column_tile < column_tiles) multiply_tile(tiles[i], x, offsets, column_tile * 64, count, sums);
        }
    }

#pragma unroll
    for (int n = 0; n < NUM_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) partial[warp][g + i / 2 * 8][n * 8 + 2 * t + i % 2] = sums[n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 64 * NUM_TILES; i += blockDim.x) {
        const int column = i / 8, output = i % 8;
        if (column >= count) break;
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int other = 0; other < NUM_WARPS; other++) {
            low += partial[other][output][column];
            high += partial[other][output + 8][column];
        }
        finish(out, expert, strip, output, start + column, low * SUM_FACTOR, high * SUM_FACTOR);
    }
}

#define PRODUCT(NUM_TILES)                                                                                           \
    extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, 1) product_##NUM_TILES(                             \
        const char* quants, const char* scales, const char* minima, const float* bias, const float* up_bias,         \
        const __half* x, void* values, const int* row_ids, const int4* groups, int x_pitch, int pitch, int num_rows, \
        int num_outputs, int column_tiles, int epilogue) {                                                           \
        product<NUM_TILES>({quants, scales, minima}, {values, bias, up_bias, pitch, num_outputs, epilogue}, x,       \
                           row_ids, groups, x_pitch, num_rows, column_tiles);                                        \
    }

PRODUCT(1)
PRODUCT(2)
PRODUCT(4)
PRODUCT(8)
