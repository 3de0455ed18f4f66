// How the blocks of one of the file's types, TYPE (a -D, GGML's number), are read: codes, scales and values, as
// shared/codecs.py decodes them.
//
// Bytes are those of a window over the model's files: byte p of the stream lies at p & mask, so a block may begin at any
// byte and wrap around. Every float operation is rounded on its own, in the order of the specification in numpy, so that
// decoded values are equal bit for bit.
#pragma once

#include <cuda_fp16.h>

typedef unsigned char Byte;
typedef unsigned long long Word64;

enum Type { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, BF16 = 30, MXFP4 = 39 };

// Values in a block, and its bytes.
constexpr bool IS_PLAIN = TYPE == F32 || TYPE == F16 || TYPE == BF16;
constexpr int BLOCK_SIZE = IS_PLAIN ? 1 : TYPE == Q4_K || TYPE == Q5_K || TYPE == Q6_K ? 256 : 32;
constexpr int BLOCK_BYTES = TYPE == F32      ? 4
                            : IS_PLAIN       ? 2
                            : TYPE == Q4_0   ? 18
                            : TYPE == Q4_1   ? 20
                            : TYPE == Q5_0   ? 22
                            : TYPE == Q5_1   ? 24
                            : TYPE == Q8_0   ? 34
                            : TYPE == IQ4_NL ? 18
                            : TYPE == MXFP4  ? 17
                            : TYPE == Q4_K   ? 144
                            : TYPE == Q5_K   ? 176
                                             : 210;
constexpr bool HAS_MINIMUM = TYPE == Q4_1 || TYPE == Q5_1 || TYPE == Q4_K || TYPE == Q5_K;

struct Block {
    const Byte* window;  // (mask + 1,)
    Word64 mask;
    Word64 start;  // of the block in the stream

    __device__ __forceinline__ unsigned operator[](int i) const { return window[(start + i) & mask]; }
    __device__ __forceinline__ unsigned half_bits(int i) const { return (*this)[i] | (*this)[i + 1] << 8; }
    __device__ __forceinline__ float half_value(int i) const {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(half_bits(i))));
    }
    // Element j's four bits among 16 bytes from byte i on: the low nibbles are elements 0 to 15.
    __device__ __forceinline__ unsigned nibble(int i, int j) const { return (*this)[i + j % 16] >> (j / 16 * 4) & 15; }
};

__device__ __forceinline__ int iq4_nl_step(unsigned code) {
    // -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113, each with 128 added.
    const Word64 low = 0x766A5D4F3F2D1801ull, high = 0xF1D9C5B5A6998D81ull;
    return static_cast<int>((code < 8 ? low : high) >> (code % 8 * 8) & 0xFF) - 128;
}

// Element j's code as a signed number: what its scale multiplies. Of MXFP4 the four bits.
__device__ __forceinline__ int code_of(const Block& block, int j) {
    if constexpr (TYPE == Q4_0) return static_cast<int>(block.nibble(2, j)) - 8;
    if constexpr (TYPE == Q4_1) return block.nibble(4, j);
    if constexpr (TYPE == Q5_0) return static_cast<int>(block.nibble(6, j) | (block[2 + j / 8] >> j % 8 & 1) << 4) - 16;
    if constexpr (TYPE == Q5_1) return block.nibble(8, j) | (block[4 + j / 8] >> j % 8 & 1) << 4;
    if constexpr (TYPE == Q8_0) return static_cast<signed char>(block[2 + j]);
    if constexpr (TYPE == IQ4_NL) return iq4_nl_step(block.nibble(2, j));
    if constexpr (TYPE == MXFP4) return block.nibble(1, j);
    if constexpr (TYPE == Q4_K) return block[16 + j / 64 * 32 + j % 32] >> (j / 32 % 2 * 4) & 15;
    if constexpr (TYPE == Q5_K) {
        return (block[48 + j / 64 * 32 + j % 32] >> (j / 32 % 2 * 4) & 15) | (block[16 + j % 32] >> j / 32 & 1) << 4;
    }
    if constexpr (TYPE == Q6_K) {
        const unsigned low = block[j / 128 * 64 + j % 64] >> (j % 128 / 64 * 4) & 15;
        return static_cast<int>(low | (block[128 + j / 128 * 32 + j % 32] >> (j % 128 / 32 * 2) & 3) << 4) - 32;
    }
    return 0;
}

// The 6-bit scale and minimum of group i in Q4_K and Q5_K, among 12 bytes from byte 4 on.
__device__ __forceinline__ unsigned group_scale(const Block& block, int i) {
    return i < 4 ? block[4 + i] & 0x3F : (block[8 + i] & 15) | (block[i] >> 2 & 0x30);
}

__device__ __forceinline__ unsigned group_minimum(const Block& block, int i) {
    return i < 4 ? block[8 + i] & 0x3F : block[8 + i] >> 4 | (block[4 + i] >> 2 & 0x30);
}

// The factor of element j.
__device__ __forceinline__ float scale_of(const Block& block, int j) {
    if constexpr (TYPE == MXFP4) return __uint_as_float(block[0] == 0 ? 0x00400000u : block[0] << 23);
    if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
        return __fmul_rn(block.half_value(0), static_cast<float>(group_scale(block, j / 32)));
    }
    if constexpr (TYPE == Q6_K) {
        return __fmul_rn(block.half_value(208), static_cast<float>(static_cast<signed char>(block[192 + j / 16])));
    }
    return block.half_value(0);
}

// What is added to element j; 0 in types without.
__device__ __forceinline__ float minimum_of(const Block& block, int j) {
    if constexpr (TYPE == Q4_1 || TYPE == Q5_1) return block.half_value(2);
    if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
        return -__fmul_rn(block.half_value(2), static_cast<float>(group_minimum(block, j / 32)));
    }
    return 0.0f;
}

__device__ __forceinline__ float e2m1(unsigned code) {
    // Twice the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6, a nibble each.
    const float magnitude = 0.5f * static_cast<float>(0xC8643210u >> (code % 8 * 4) & 15);
    return code < 8 ? magnitude : -magnitude;
}

// Element j's value in float.
__device__ __forceinline__ float value_of(const Block& block, int j) {
    if constexpr (TYPE == F32) return __uint_as_float(block.half_bits(0) | block.half_bits(2) << 16);
    if constexpr (TYPE == F16) return block.half_value(0);
    if constexpr (TYPE == BF16) return __uint_as_float(block.half_bits(0) << 16);
    if constexpr (TYPE == MXFP4) return __fmul_rn(e2m1(code_of(block, j)), scale_of(block, j));
    const float product = __fmul_rn(static_cast<float>(code_of(block, j)), scale_of(block, j));
    return HAS_MINIMUM ? __fadd_rn(product, minimum_of(block, j)) : product;
}

__device__ __forceinline__ bool is_finite_half(unsigned bits) { return (bits & 0x7C00u) != 0x7C00u; }
__device__ __forceinline__ bool is_finite_float(float value) { return (__float_as_uint(value) & 0x7F800000u) != 0x7F800000u; }

// Whether the block's scales, and of MXFP4 and the types without scales element j, are finite.
__device__ __forceinline__ bool is_finite(const Block& block, int j) {
    if constexpr (TYPE == F32 || TYPE == BF16) return is_finite_float(value_of(block, 0));
    if constexpr (TYPE == MXFP4) return block[0] < 253 || is_finite_float(value_of(block, j));
    if constexpr (HAS_MINIMUM) {
        return is_finite_half(block.half_bits(0)) && is_finite_half(block.half_bits(2));
    }
    if constexpr (TYPE == Q6_K) return is_finite_half(block.half_bits(208));
    return is_finite_half(block.half_bits(0));
}
