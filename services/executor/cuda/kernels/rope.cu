// Rotary positions, and keys and values into their blocks.
//
// A layer's keys: (blocks, K, block_size, HEAD_SIZE_PADDED) half; its values, for attention to read 8 positions at once:
// (blocks, K, HEAD_SIZE_PADDED, block_size) half. What pads a head is zero from the start and is not written.
// -D HEAD_SIZE, HEAD_SIZE_PADDED.
#include "device.cuh"

constexpr int HALF_HEAD = HEAD_SIZE / 2;

// cos and sin of position times frequency, times factor. Launch: grid (rows), HEAD_SIZE / 2 threads, once a step.
extern "C" __global__ void rotation(const int* positions,      // (rows,)
                                    const float* frequencies,  // (HEAD_SIZE / 2,)
                                    float2* angles,            // (rows, HEAD_SIZE / 2)
                                    float factor) {
    await_inputs();
    start_dependents();
    float sine, cosine;
    sincosf(static_cast<float>(positions[blockIdx.x]) * frequencies[threadIdx.x], &sine, &cosine);
    angles[blockIdx.x * HALF_HEAD + threadIdx.x] = make_float2(cosine * factor, sine * factor);
}

// Queries and keys turned, queries scaled, all rounded to half and put where attention reads them.
// Launch: grid (H + 2 K, rows), 32 threads. Moves: qkv once, half of it in half back.
extern "C" __global__ void __launch_bounds__(32) store_kv(
    const float* qkv,      // (rows, (H + 2 K) HEAD_SIZE)
    const float2* angles,  // (rows, HEAD_SIZE / 2) or null: not turned
    const int* places,     // (rows,) block * block_size + position in the block; below zero: not stored
    __half* queries,       // (rows, H, HEAD_SIZE_PADDED)
    __half* keys, __half* values, int num_heads, int num_kv_heads, int block_size, float scale) {
    await_inputs();
    start_dependents();
    const int head = blockIdx.x, row = blockIdx.y, num_all = num_heads + 2 * num_kv_heads;
    const float* source = qkv + (static_cast<size_t>(row) * num_all + head) * HEAD_SIZE;
    const bool is_query = head < num_heads, is_value = head >= num_heads + num_kv_heads;
    const int place = places[row];
    if (!is_query && place < 0) return;
    const size_t kv_head = static_cast<size_t>(place / block_size) * num_kv_heads + (head - num_heads) % num_kv_heads;
    const int offset = place % block_size;

    for (int i = threadIdx.x; i < HEAD_SIZE; i += 32) {
        float value = source[i];
        if (angles != nullptr && !is_value) {
            const bool is_first = i < HALF_HEAD;
            const int pair = is_first ? i : i - HALF_HEAD;
            const float2 angle = angles[row * HALF_HEAD + pair];
            const float other = source[is_first ? i + HALF_HEAD : pair];
            value = value * angle.x + (is_first ? -other : other) * angle.y;
        }
        if (is_query)
            queries[(static_cast<size_t>(row) * num_heads + head) * HEAD_SIZE_PADDED + i] = to_half(value * scale);
        else if (is_value)
            values[(kv_head * HEAD_SIZE_PADDED + i) * block_size + offset] = to_half(value);
        else
            keys[(kv_head * block_size + offset) * HEAD_SIZE_PADDED + i] = to_half(value);
    }
}
