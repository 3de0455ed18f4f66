// What the kernels that draw tokens share: sample.cu, nucleus.cu.
#pragma once

#include "device.cuh"

typedef unsigned long long uint64;

#define CHUNK 1024        // values of a block of the kernels over chunks, which have 256 threads
#define ROW_THREADS 1024  // of the kernels that have a block for each row
#define NUM_BUCKETS 512   // of nucleus.cu

static_assert(CHUNK == ROW_THREADS, "a row's block takes a chunk at a time");

// How one row is drawn from; 96 bytes, as sampling.py packs it.
struct RowSampling {
    double temperature;  // 0: the best value
    double top_p, min_p;
    double repetition_penalty, presence_penalty, frequency_penalty;
    unsigned int seed_low, seed_high, output_index, token_index;
    int row;   // of logits
    int seat;  // whose counts and lists are used
    int top_k;
    int num_biases, num_stops;
    int has_penalties, masks_stops, padding;
};

// What a row's nucleus is: weights of a key above `threshold`, and the first num_equal of those equal to it.
struct Cut {
    uint64 threshold;
    double each;  // the weight of that key
    int num_equal, padding;
};

// Larger for larger values; -0 as 0.
__device__ __forceinline__ uint64 double_key(double value) {
    const uint64 bits = static_cast<uint64>(__double_as_longlong(value + 0.0));
    return bits >> 63 ? ~bits : bits | (1ull << 63);
}

// Largest of a block's values in every thread. `scratch` has 32 doubles.
__device__ __forceinline__ double block_max(double value, double* scratch) {
    for (int distance = 16; distance > 0; distance /= 2)
        value = fmax(value, __shfl_xor_sync(0xffffffffu, value, distance));
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : -INFINITY;
    for (int distance = 16; distance > 0; distance /= 2)
        value = fmax(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}

// Sum of a block's values in every thread, in one order. `scratch` has 32 doubles.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.0;
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// Whether a row's weights are made at once: draw_rows needs the values themselves to find the top_k, or the best.
__device__ __forceinline__ bool keeps_values(const RowSampling& sampling, int vocab_size) {
    return sampling.temperature == 0.0 || (0 < sampling.top_k && sampling.top_k < vocab_size);
}

// Whether nucleus.cu cuts the row's weights: what top_k has left, draw_rows cuts itself.
__device__ __forceinline__ bool has_nucleus(const RowSampling& sampling, int vocab_size) {
    return !keeps_values(sampling, vocab_size) && sampling.top_p < 1.0;
}

// Shared memory of a block that scans.
struct Scratch {
    double sums[32];
    int counts[32];
    int found;
};

// The sum of the values up to each thread's own, and in `total` of all. Each thread's sum adds what the ones before it
// have in one order.
__device__ double block_scan(double value, double& total, Scratch& scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int distance = 1; distance < 32; distance *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, value, distance);
        if (lane >= distance) value += other;
    }
    __syncthreads();
    if (lane == 31) scratch.sums[warp] = value;
    __syncthreads();
    double before = lane < blockDim.x / 32 ? scratch.sums[lane] : 0.0;
    for (int distance = 1; distance < 32; distance *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, before, distance);
        if (lane >= distance) before += other;
    }
    total = __shfl_sync(0xffffffffu, before, 31);
    before = __shfl_sync(0xffffffffu, before, max(warp - 1, 0));
    return warp > 0 ? before + value : value;
}

// How many threads before this one have the flag set, and in `total` of all.
__device__ int block_rank(bool flag, int& total, Scratch& scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned int ballot = __ballot_sync(0xffffffffu, flag);
    __syncthreads();
    if (lane == 0) scratch.counts[warp] = __popc(ballot);
    __syncthreads();
    int before = lane < blockDim.x / 32 ? scratch.counts[lane] : 0;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, before, distance);
        if (lane >= distance) before += other;
    }
    total = __shfl_sync(0xffffffffu, before, 31);
    before = __shfl_sync(0xffffffffu, before, max(warp - 1, 0));
    return (warp > 0 ? before : 0) + __popc(ballot & ((1u << lane) - 1));
}
