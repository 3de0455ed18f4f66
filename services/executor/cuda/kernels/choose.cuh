// The experts of one row: those of its largest router logits, weighed by their softmax.
#pragma once

#include "device.cuh"

constexpr int MAX_EXPERTS = 1024;

// Numbers in the order of their logits; of what is no number, the least.
__device__ __forceinline__ uint32_t rank_key(float logit) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);  // one zero, not two
    return logit != logit ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// One warp: the num_used largest logits of a row, of equals the first, and their softmax.
__device__ __forceinline__ void choose(const float* logits, int num_experts, int num_used, int* ids, float* weights) {
    const int lane = threadIdx.x % 32;
    constexpr int HELD = 4;  // logits of a lane that are read once, not once for each rank
    uint32_t held[HELD], last = 0xffffffffu;
    float best = 0.0f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) held[i] = lane + 32 * i < num_experts ? rank_key(__ldcg(&logits[lane + 32 * i])) : 0;
    int last_id = -1;
#pragma unroll 1
    for (int rank = 0; rank < num_used; rank++) {
        uint32_t largest = 0;
        int id = MAX_EXPERTS;
        auto consider = [&](int expert, uint32_t key) {
            // What comes after the last choice in the order: smaller, or equal and later.
            const bool is_left = key < last || (key == last && expert > last_id);
            if (is_left && (key > largest || id == MAX_EXPERTS)) largest = key, id = expert;
        };
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (lane + 32 * i < num_experts) consider(lane + 32 * i, held[i]);
#pragma unroll 1
        for (int expert = lane + 32 * HELD; expert < num_experts; expert += 32) consider(expert, rank_key(__ldcg(&logits[expert])));
        last = __reduce_max_sync(0xffffffffu, largest);
        last_id = __reduce_min_sync(0xffffffffu, largest == last ? id : MAX_EXPERTS);
        const float value = logit_of(last);
        if (rank == 0) best = value;
        const float weight = __expf(value - best);
        total += weight;
        if (lane == 0) ids[rank] = last_id, weights[rank] = weight;
    }
    __syncwarp();
#pragma unroll 1
    for (int rank = lane; rank < num_used; rank += 32) weights[rank] /= total;
}
