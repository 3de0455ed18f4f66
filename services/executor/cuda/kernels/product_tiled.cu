// Products of many rows: out = epilogue(x @ matrix + bias), in tiles of 128 rows by 128 outputs.
//
// A block of 8 warps; a warp takes 2 strips of 16 outputs and 64 rows. Weights go from memory to registers and are
// decoded there; x goes through shared memory, a tile of 64 columns at a time, two ahead. Sums are in float, over the
// columns in order. Grouped (experts): as in product.cu, groups of at most 128 rows.
// Launch: grid (ceil(strips / 8), row tiles or groups), 256 threads. x as in product.cu.
// Moves: the matrix once for each row tile or group, x once for each 128 outputs.
#include "epilogue.cuh"
#include "weights.cuh"

constexpr int TILE_ROWS = 128;
constexpr int NUM_STAGES = 3;
constexpr int STRIPS = 2;     // of a warp
constexpr int ROW_TILES = 8;  // of 8 rows, of a warp

// 16 bytes c (0 to 7) of row r lie where eight lanes that read two rows meet no bank twice.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * 8 + (chunk ^ (row % 2 * 4)); }

__device__ __forceinline__ void copy_async(uint4* target, const void* source) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
}

__device__ __forceinline__ void multiply_stage(const Tile (&tiles)[STRIPS], const uint4* stage, int first_row, int lane,
                                               float (&sums)[STRIPS][ROW_TILES][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int block = 0; block < 2; block++) {
        uint32_t low[STRIPS][4], high[STRIPS][4];
        float low_scale[STRIPS], high_scale[STRIPS];
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            decode(tiles[s], block, 0, low[s]);
            decode(tiles[s], block, 1, high[s]);
            low_scale[s] = scale_of(tiles[s], block, 0);
            high_scale[s] = scale_of(tiles[s], block, 1);
        }
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            const uint4 b = stage[swizzled(first_row + n * 8 + g, block * 4 + t)];
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
                float(&sum)[4] = sums[s][n];
                if (IS_SCALED) {
                    float c[4];
                    multiply(c, low[s][0], high[s][0], low[s][1], high[s][1], b.x, b.y);
                    multiply_add(c, low[s][2], high[s][2], low[s][3], high[s][3], b.z, b.w);
                    sum[0] += c[0] * low_scale[s];
                    sum[1] += c[1] * low_scale[s];
                    sum[2] += c[2] * high_scale[s];
                    sum[3] += c[3] * high_scale[s];
                } else {
                    multiply_add(sum, low[s][0], high[s][0], low[s][1], high[s][1], b.x, b.y);
                    multiply_add(sum, low[s][2], high[s][2], low[s][3], high[s][3], b.z, b.w);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) product_tiled(
    const char* quants, const char* scales, const char* minima, const float* bias, const float* up_bias,
    const __half* x,     // (rows, x_pitch)
    void* values,        // (rows, pitch)
    const int* row_ids,  // of x, for each row of out; null: the same row
    const int4* groups,  // (gridDim.y,) or null
    int x_pitch, int pitch, int num_rows, int num_outputs, int column_tiles, int epilogue, int num_strips) {
    __shared__ uint4 stages[NUM_STAGES][TILE_ROWS * 8];
    await_inputs();
    start_dependents();
    const Planes planes = {quants, scales, minima};
    const Output out = {values, bias, up_bias, pitch, num_outputs, epilogue};
    int expert = 0, start = blockIdx.y * TILE_ROWS, count = min(TILE_ROWS, num_rows - start);
    if (groups != nullptr) {
        const int4 group = groups[blockIdx.y];
        expert = group.x, start = group.y, count = group.z;
        if (count == 0) return;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_strip = blockIdx.x * 8 + warp % 4 * STRIPS, first_row = warp / 4 * 64;

    const __half* sources[4];  // the thread copies one chunk of four rows of every stage
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = start + min(static_cast<int>(threadIdx.x / 8 + i * 32), count - 1);
        sources[i] = x + static_cast<size_t>(row_ids == nullptr ? row : row_ids[row]) * x_pitch + threadIdx.x % 8 * 8;
    }
    auto copy_stage = [&](int column_tile) {
        if (column_tile < column_tiles) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = threadIdx.x / 8 + i * 32;
                copy_async(&stages[column_tile % NUM_STAGES][swizzled(row, threadIdx.x % 8)],
                           sources[i] + column_tile * 64);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    size_t first_tiles[STRIPS];
#pragma unroll
    for (int s = 0; s < STRIPS; s++) {
        const int strip = min(first_strip + s, num_strips - 1);
        first_tiles[s] = (static_cast<size_t>(expert) * num_strips + strip) * column_tiles;
    }

    float sums[STRIPS][ROW_TILES][4] = {};
    Tile tiles[STRIPS], next[STRIPS];
#pragma unroll
    for (int s = 0; s < STRIPS; s++) load_tile(next[s], planes, first_tiles[s], lane);
    copy_stage(0);
    copy_stage(1);
    for (int column_tile = 0; column_tile < column_tiles; column_tile++) {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
        copy_stage(column_tile + 2);
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            tiles[s] = next[s];
            if (column_tile + 1 < column_tiles) load_tile(next[s], planes, first_tiles[s] + column_tile + 1, lane);
        }
        // A warp whose rows are all past the group's has nothing to add, but copies for the others.
        if (first_row < count) multiply_stage(tiles, stages[column_tile % NUM_STAGES], first_row, lane, sums);
    }

#pragma unroll
    for (int s = 0; s < STRIPS; s++) {
        if (first_strip + s >= num_strips) break;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = first_row + n * 8 + 2 * t + i;
                if (row >= count) continue;
                finish(out, expert, first_strip + s, g, start + row, sums[s][n][i] * SUM_FACTOR,
                       sums[s][n][i + 2] * SUM_FACTOR);
            }
    }
}
