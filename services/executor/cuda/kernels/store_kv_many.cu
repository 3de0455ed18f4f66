// What store_kv does (rope.cu), for many rows: queries and keys turned, all rounded to half and put where attention reads.
//
// A block takes 32 rows of one head. Values lie in the cache with positions innermost: they pass through shared memory,
// so that a warp writes one dimension of 32 rows, which in a prompt are neighbours.
// Launch: grid (H + 2 K, ceil(rows / 32)), 256 threads. -D HEAD_SIZE, HEAD_SIZE_PADDED.
// Moves: qkv once, half of it in half back.
#include "device.cuh"

constexpr int ROWS = 32;
constexpr int HALF_HEAD = HEAD_SIZE / 2;

extern "C" __global__ void __launch_bounds__(256) store_kv_many(
    const float* qkv,      // (rows, (H + 2 K) HEAD_SIZE)
    const float2* angles,  // (rows, HEAD_SIZE / 2) or null: not turned
    const int* places,     // (rows,) block * block_size + position in the block; below zero: not stored
    __half* queries,       // (rows, H, HEAD_SIZE_PADDED)
    __half* keys, __half* values, int num_heads, int num_kv_heads, int block_size, float scale, int num_rows) {
    __shared__ __half turned[HEAD_SIZE][ROWS + 2];
    await_inputs();
    start_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = blockIdx.x, first_row = blockIdx.y * ROWS, num_all = num_heads + 2 * num_kv_heads;
    const bool is_query = head < num_heads, is_value = head >= num_heads + num_kv_heads;
    const int kv_head = (head - num_heads) % num_kv_heads;
    for (int index = warp; index < ROWS && first_row + index < num_rows; index += 8) {
        const int row = first_row + index, place = places[row];
        if (!is_query && place < 0) continue;
        const float* source = qkv + (static_cast<size_t>(row) * num_all + head) * HEAD_SIZE;
        if (is_value) {
            for (int i = lane; i < HEAD_SIZE; i += 32) turned[i][index] = to_half(source[i]);
            continue;
        }
        const size_t block = static_cast<size_t>(place / block_size) * num_kv_heads + kv_head;
        __half* target = is_query ? queries + (static_cast<size_t>(row) * num_heads + head) * HEAD_SIZE_PADDED
                                  : keys + (block * block_size + place % block_size) * HEAD_SIZE_PADDED;
        const float factor = is_query ? scale : 1.0f;
        if (angles == nullptr) {
            for (int i = lane; i < HEAD_SIZE; i += 32) target[i] = to_half(source[i] * factor);
            continue;
        }
        for (int i = lane; i < HALF_HEAD; i += 32) {
            const float2 angle = angles[row * HALF_HEAD + i];
            const float first = source[i], second = source[i + HALF_HEAD];
            target[i] = to_half((first * angle.x - second * angle.y) * factor);
            target[i + HALF_HEAD] = to_half((second * angle.x + first * angle.y) * factor);
        }
    }
    if (!is_value) return;
    __syncthreads();
    const int row = first_row + lane, place = row < num_rows ? places[row] : -1;
    if (place < 0) return;
    const size_t block = static_cast<size_t>(place / block_size) * num_kv_heads + kv_head;
    __half* target = values + block * HEAD_SIZE_PADDED * block_size + place % block_size;
    for (int i = warp; i < HEAD_SIZE; i += 8) target[static_cast<size_t>(i) * block_size] = turned[i][lane];
}
