// The experts of one row: those of its largest router logits, weighed by their softmax.
#pragma once

#include "device.cuh"

constexpr int MAX_EXPERTS = 1024;

// One warp: the num_used largest logits of a row, of equals the first, and their softmax.
__device__ __forceinline__ void choose(const float* logits, int num_experts, int num_used, int* ids, float* weights) {
    const int lane = threadIdx.x % 32;
    constexpr int HELD = 4;  // logits of a lane that are read once, not once for each rank
    float held[HELD], last = INFINITY, best = 0.0f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) held[i] = lane + 32 * i < num_experts ? __ldcg(&logits[lane + 32 * i]) : -INFINITY;
    int last_id = -1;
    for (int rank = 0; rank < num_used; rank++) {
        float value = -INFINITY;
        int id = MAX_EXPERTS;
        auto consider = [&](int expert, float logit) {
            // What comes after the last choice in the order: smaller, or equal and later.
            const bool is_left = logit < last || (logit == last && expert > last_id);
            if (is_left && (logit > value || id == MAX_EXPERTS)) value = logit, id = expert;
        };
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (lane + 32 * i < num_experts) consider(lane + 32 * i, held[i]);
        for (int expert = lane + 32 * HELD; expert < num_experts; expert += 32) consider(expert, __ldcg(&logits[expert]));
        for (int distance = 16; distance > 0; distance /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, value, distance);
            const int other_id = __shfl_xor_sync(0xffffffffu, id, distance);
            if (other > value || (other == value && other_id < id)) value = other, id = other_id;
        }
        last = value, last_id = id;
        if (rank == 0) best = value;
        const float weight = __expf(value - best);
        total += weight;
        if (lane == 0) ids[rank] = id, weights[rank] = weight;
    }
    __syncwarp();
    for (int rank = lane; rank < num_used; rank += 32) weights[rank] /= total;
}
