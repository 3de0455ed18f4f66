// How a lane reads and decodes its share of a tile of weights, in layout "cuda.v1" (shared/cuda_layout.py).
//
// A tile is 16 rows (outputs) by 64 columns (inputs): two blocks of 32 columns. Lane 4g + t holds rows g and g + 8 at
// columns 8t to 8t + 7 of each block, so that a block is two multiply_adds deep and the lane's 8 columns of an
// activation row are 16 consecutive bytes. FAMILY, a -D, says how the values are coded:
//   0 MXFP4     4-bit codes E2M1, bits permuted (see decode), a power of two for each block of a row
//   1 INT8      bytes code + 128, a scale in half for each block of a row         (Q8_0, Q5_0, Q4_0, IQ4_NL)
//   2 AFFINE32  bytes code + 128, scale and minimum in float for each block        (Q4_1, Q5_1, Q4_K, Q5_K)
//   3 AFFINE16  bytes code + 128, a scale in float for each half block             (Q6_K)
//   4 F32, 5 F16, 6 BF16: the values
// Families 0 and 1 multiply exact codes and scale the sums in float; the others round decoded values to half.
#pragma once

#include "device.cuh"

struct Planes {
    const char* quants;
    const char* scales;
    const char* minima;
};

#if FAMILY == 0
constexpr bool IS_SCALED = true;
constexpr int NUM_LOADS = 1;  // of 16 bytes, for a lane's share of a tile
#elif FAMILY == 1
constexpr bool IS_SCALED = true;
constexpr int NUM_LOADS = 2;
#elif FAMILY == 2 || FAMILY == 3
constexpr bool IS_SCALED = false;
constexpr int NUM_LOADS = 2;
#elif FAMILY == 4
constexpr bool IS_SCALED = false;
constexpr int NUM_LOADS = 8;
#else
constexpr bool IS_SCALED = false;
constexpr int NUM_LOADS = 4;
#endif
// E2M1 codes are decoded to 2^-14 of their values; the sums take the factor back at the end.
constexpr float SUM_FACTOR = FAMILY == 0 ? 16384.0f : 1.0f;

struct Tile {
    uint4 codes[NUM_LOADS];
#if FAMILY == 0
    uint32_t scales;  // bytes: row g and row g + 8 of block 0, of block 1
#elif FAMILY == 1
    uint2 scales;  // halves in the same order
#elif FAMILY == 2
    uint4 scales, minima;  // floats
#elif FAMILY == 3
    uint4 scales;  // floats, of the half blocks that hold the lane's columns
#endif
};

__device__ __forceinline__ void load_tile(Tile& tile, const Planes& planes, size_t index, int lane) {
    const char* codes = planes.quants + index * (NUM_LOADS * 512) + lane * 16;
#pragma unroll
    for (int i = 0; i < NUM_LOADS; i++) tile.codes[i] = load_weight(codes + i * 512);
#if FAMILY == 0
    tile.scales = load_weight4(planes.scales + index * 32 + lane / 4 * 4);
#elif FAMILY == 1
    tile.scales = load_weight8(planes.scales + index * 64 + lane / 4 * 8);
#elif FAMILY == 2
    tile.scales = load_weight(planes.scales + index * 128 + lane / 4 * 16);
    tile.minima = load_weight(planes.minima + index * 128 + lane / 4 * 16);
#elif FAMILY == 3
    tile.scales = load_weight(planes.scales + index * 256 + lane % 4 / 2 * 128 + lane / 4 * 16);
#endif
}

// A lane's share of a tile on its way through shared memory, which only that lane touches: pieces of 16 bytes of all
// lanes beside each other, then what belongs to them.
constexpr int SCALE_BYTES = FAMILY == 0 ? 4 : FAMILY == 1 ? 8 : FAMILY == 2 ? 32 : FAMILY == 3 ? 16 : 0;
constexpr int SLOT_BYTES = 32 * (16 * NUM_LOADS + SCALE_BYTES);

// Where a lane's shares of tiles one after another come from.
struct TileStream {
    const char* codes;
    const char* scales;  // and, as far behind as in the planes, minima
    size_t minima_offset;

    __device__ __forceinline__ TileStream(const Planes& planes, size_t index, int lane)
        : codes(planes.quants + index * (NUM_LOADS * 512) + lane * 16), minima_offset(0) {
#if FAMILY == 0
        scales = planes.scales + index * 32 + lane / 4 * 4;
#elif FAMILY == 1
        scales = planes.scales + index * 64 + lane / 4 * 8;
#elif FAMILY == 2
        scales = planes.scales + index * 128 + lane / 4 * 16;
        minima_offset = planes.minima - planes.scales;
#elif FAMILY == 3
        scales = planes.scales + index * 256 + lane % 4 / 2 * 128 + lane / 4 * 16;
#endif
    }

    // The next tile, to the lane's own place in a slot.
    __device__ __forceinline__ void copy(char* slot, int lane) {
#pragma unroll
        for (int i = 0; i < NUM_LOADS; i++) copy_async<16>(slot + i * 512 + lane * 16, codes + i * 512);
        codes += NUM_LOADS * 512;
        [[maybe_unused]] char* target = slot + NUM_LOADS * 512;
#if FAMILY == 0
        copy_async<4>(target + lane * 4, scales);
        scales += 32;
#elif FAMILY == 1
        copy_async<8>(target + lane * 8, scales);
        scales += 64;
#elif FAMILY == 2
        copy_async<16>(target + lane * 16, scales);
        copy_async<16>(target + 512 + lane * 16, scales + minima_offset);
        scales += 128;
#elif FAMILY == 3
        copy_async<16>(target + lane * 16, scales);
        scales += 256;
#endif
    }
};

__device__ __forceinline__ void read_tile(Tile& tile, const char* slot, int lane) {
#pragma unroll
    for (int i = 0; i < NUM_LOADS; i++) tile.codes[i] = *reinterpret_cast<const uint4*>(slot + i * 512 + lane * 16);
    [[maybe_unused]] const char* scales = slot + NUM_LOADS * 512;
#if FAMILY == 0
    tile.scales = *reinterpret_cast<const uint32_t*>(scales + lane * 4);
#elif FAMILY == 1
    tile.scales = *reinterpret_cast<const uint2*>(scales + lane * 8);
#elif FAMILY == 2
    tile.scales = *reinterpret_cast<const uint4*>(scales + lane * 16);
    tile.minima = *reinterpret_cast<const uint4*>(scales + 512 + lane * 16);
#elif FAMILY == 3
    tile.scales = *reinterpret_cast<const uint4*>(scales + lane * 16);
#endif
}

__device__ __forceinline__ uint32_t word(const uint4& four, int index) {
    return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

__device__ __forceinline__ float float_word(const uint4& four, int index) {
    return __uint_as_float(word(four, index));
}

// Four codes of a word of bytes, as two pairs of halves. 0x64xx is 1024 + xx; codes are stored with 128 added.
__device__ __forceinline__ void decode_bytes(uint32_t codes, __half2& first, __half2& second) {
    const uint32_t low = __byte_perm(codes, 0x64646464u, 0x4140), high = __byte_perm(codes, 0x64646464u, 0x4342);
    const __half2 offset = __half2half2(__ushort_as_half(0x6480));  // 1152
    first = __hsub2(*reinterpret_cast<const __half2*>(&low), offset);
    second = __hsub2(*reinterpret_cast<const __half2*>(&high), offset);
}

__device__ __forceinline__ uint32_t affine(__half2 codes, float scale, float minimum) {
    const float2 pair = __half22float2(codes);
    // Not fused: the value is rounded as the specification's two operations round it.
    return pack_half2(__fadd_rn(__fmul_rn(pair.x, scale), minimum), __fadd_rn(__fmul_rn(pair.y, scale), minimum));
}

// The lane's eight values of row g + 8 `upper` in block `block`, as four pairs of halves.
__device__ __forceinline__ void decode(const Tile& tile, int block, int upper, uint32_t (&pairs)[4]) {
#if FAMILY == 0
    // In half, E2M1's exponent and mantissa at bits 11 to 9 are 2^-14 of the value, subnormals included. The bits of
    // pair i lie, in each half of the word, sign and code: 15, 11..9; 12, 8..6; 14, 5..3; 13, 2..0.
    const uint32_t codes = word(tile.codes[0], 2 * block + upper);
    pairs[0] = codes & 0x8E008E00u;
    pairs[1] = (codes << 3) & 0x8E008E00u;
    pairs[2] = ((codes << 6) & 0x0E000E00u) | ((codes << 1) & 0x80008000u);
    pairs[3] = ((codes << 9) & 0x0E000E00u) | ((codes << 2) & 0x80008000u);
#elif FAMILY <= 3
    __half2 codes[4];
    decode_bytes(word(tile.codes[block], 2 * upper), codes[0], codes[1]);
    decode_bytes(word(tile.codes[block], 2 * upper + 1), codes[2], codes[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if FAMILY == 1
        pairs[i] = *reinterpret_cast<const uint32_t*>(&codes[i]);
#elif FAMILY == 2
        pairs[i] = affine(codes[i], float_word(tile.scales, 2 * block + upper),
                          float_word(tile.minima, 2 * block + upper));
#else
        pairs[i] = affine(codes[i], float_word(tile.scales, 2 * block + upper), 0.0f);
#endif
    }
#elif FAMILY == 4
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4& four = tile.codes[4 * block + 2 * upper + i / 2];
        pairs[i] = pack_half2(float_word(four, 2 * (i % 2)), float_word(four, 2 * (i % 2) + 1));
    }
#elif FAMILY == 5
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = word(tile.codes[2 * block + upper], i);
#else
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t two = word(tile.codes[2 * block + upper], i);
        pairs[i] = pack_half2(__uint_as_float(two << 16), __uint_as_float(two & 0xFFFF0000u));
    }
#endif
}

// What the sums of block `block` in row g + 8 `upper` are multiplied with; families 0 and 1.
__device__ __forceinline__ float scale_of(const Tile& tile, int block, int upper) {
#if FAMILY == 0
    // The byte to the top, one bit down: 2^(e - 127), but zero for e = 0, whose products are below float's range.
    return __uint_as_float(__byte_perm(tile.scales, 0, (2 * block + upper) << 12 | 0x0444) >> 1);
#elif FAMILY == 1
    const uint32_t two = block == 0 ? tile.scales.x : tile.scales.y;
    return __half2float(__ushort_as_half(static_cast<unsigned short>(upper == 0 ? two & 0xFFFFu : two >> 16)));
#else
    return 1.0f;
#endif
}
