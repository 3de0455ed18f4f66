// Rows of a matrix: out[i] = matrix[ids[i]], in float; embeddings and learned positions.
//
// An id below zero (a row that only fills up a graph's batch) reads row 0.
// Launch: grid (rows, ceil(columns / 1024)), 128 threads. Moves: of each row its tiles' eight-column words, and 4 bytes
// a value written.
#include "weights.cuh"

extern "C" __global__ void embed(const char* quants, const char* scales, const char* minima,
                                 const int* ids,  // (rows,)
                                 float* out,      // (rows, num_columns)
                                 int num_columns, int column_tiles) {
    await_inputs();
    start_dependents();
    const Planes planes = {quants, scales, minima};
    const int row = max(ids[blockIdx.x], 0);
    const int strip = row / 16, upper = row % 16 / 8, g = row % 8;
    const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x), block = column % 64 / 32, t = column % 32 / 8;
    if (column >= num_columns) return;
    Tile tile;
    load_tile(tile, planes, static_cast<size_t>(strip) * column_tiles + column / 64, 4 * g + t);
    uint32_t pairs[4];
    float scale = 1.0f;
    // Indices into a tile's registers are to be constants.
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i == 2 * block + upper) {
            decode(tile, i / 2, i % 2, pairs);
            scale = scale_of(tile, i / 2, i % 2) * SUM_FACTOR;
        }
    float* target = out + static_cast<size_t>(blockIdx.x) * num_columns + column;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const __half2 pair = *reinterpret_cast<const __half2*>(&pairs[i / 2]);
        if (column + i < num_columns) target[i] = (i % 2 == 0 ? __low2float(pair) : __high2float(pair)) * scale;
    }
}
