// Enough of CUDA to compile kernels that use neither shared memory nor warps for the host: one thread after another.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __global__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static Index blockIdx, blockDim, threadIdx;

static inline int min(int a, int b) { return a < b ? a : b; }
static inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline float __fmul_rn(float a, float b) { return a * b; }  // compiled without contraction
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline _Float16 __ushort_as_half(unsigned short bits) { _Float16 value; memcpy(&value, &bits, 2); return value; }
static inline float __half2float(_Float16 value) { return static_cast<float>(value); }
static inline unsigned __funnelshift_r(unsigned low, unsigned high, int n) {
    return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> n);
}
static inline unsigned __byte_perm(unsigned x, unsigned, unsigned selector) {
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (x >> (8 * (selector >> (4 * i) & 3)) & 0xFF) << (8 * i);
    return result;
}
static inline void atomicMin(unsigned long long* address, unsigned long long value) {
    if (value < *address) *address = value;
}
static inline void atomicMax(unsigned long long* address, unsigned long long value) {
    if (value > *address) *address = value;
}

// Runs a kernel whose arguments are all integers or pointers; each takes a place of eight bytes when it is passed.
extern "C" void run(void* kernel, unsigned long long num_threads, unsigned block_size, const unsigned long long* a) {
    using Word = unsigned long long;
    const auto call = reinterpret_cast<void (*)(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word)>(kernel);
    blockDim.x = block_size;
    for (Word thread = 0; thread < (num_threads + block_size - 1) / block_size * block_size; thread++) {
        blockIdx.x = static_cast<unsigned>(thread / block_size), threadIdx.x = static_cast<unsigned>(thread % block_size);
        call(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12]);
    }
}
