// What every kernel uses: programmatic dependent launch, matrix products on tensor cores, sums over warps.
//
// Order between kernels: each calls await_inputs() before it first touches what an earlier kernel of the step wrote or
// reads, and start_dependents() right after. Weights never change, so they may be loaded before the wait; so may what
// the last kernel but one wrote: the last one has passed its own wait before this one is started.
// Activations are never `const __restrict__`: the compiler could then read them above the wait.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef __CUDACC_RTC__  // NVRTC has no C headers
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define INFINITY __int_as_float(0x7f800000)
#else
#include <stdint.h>
#endif

// The next kernel may be launched, once every block of ours has come here: its blocks fill the multiprocessors that ours
// leave free.
__device__ __forceinline__ void start_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Every earlier kernel is done and what it wrote can be read. Each block of a kernel must pass here.
__device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// c += a b (and below c = a b), with a (16, 16) and b (16, 8) in half, c (16, 8) in float. With g = lane / 4 and t = lane % 4 a lane holds
// of a: rows g, g + 8, g, g + 8 at inner indices 2t, 2t, 2t + 8, 2t + 8 and the next one; of b: column g at the
// same inner indices; of c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
}

// 16 bytes of a weight: read once, so kept out of the first cache.
__device__ __forceinline__ uint4 load_weight(const void* address) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

__device__ __forceinline__ uint2 load_weight8(const void* address) {
    uint2 value;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(address));
    return value;
}

__device__ __forceinline__ uint32_t load_weight4(const void* address) {
    uint32_t value;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(address));
    return value;
}

__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Copies to shared memory that run beside the thread; each thread waits for its own.
template <int NUM_BYTES>
__device__ __forceinline__ void copy_async(uint32_t address, const void* source) {
    if (NUM_BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(source), "n"(NUM_BYTES) : "memory");
}

template <int NUM_BYTES>
__device__ __forceinline__ void copy_async(void* target, const void* source) {
    copy_async<NUM_BYTES>(static_cast<uint32_t>(__cvta_generic_to_shared(target)), source);
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the last `NUM_PENDING` groups of copies are done.
template <int NUM_PENDING>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(NUM_PENDING) : "memory");
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Rounded to half, what lies past its range to its ends: an infinity would spread as NaN.
__device__ __forceinline__ __half to_half(float value) {
    return __float2half_rn(fminf(fmaxf(value, -65504.0f), 65504.0f));
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// The sum over a block, the same in every thread. `scratch` has 32 floats; all threads of the block call.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    value = warp_sum(value);
    __syncthreads();
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return warp_sum(lane < num_warps ? scratch[lane] : 0.0f);
}
