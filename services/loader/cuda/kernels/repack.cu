// The file's blocks to the planes of layout "cuda.v1" (shared/cuda_layout.py), for one type, a -D.
//
// repack     tiles of the type's own family
// expand     tiles of float32, where experts' gate and up are of different families
// values     float32 in C order: vectors and the router
// A thread of the first two takes eight neighbouring columns of one row, which a lane's share of a tile holds; of the
// third one value. Bytes moved: the blocks once (through the first cache), the planes once.
// Every block is checked on its way: found[0] becomes the lowest index of one that is not finite, found[1] the largest
// magnitude, as a float's bits, of those past half's range in families that are rounded to half later.
// Launch: blocks of 256 threads that cover the items, fewer than 2^32; num_upper is 1 or 2. Blocks may lie at any byte.
#include "blocks.cuh"

constexpr float MAX_HALF = 65504.0f;
constexpr int FAMILY_MXFP4 = 0, FAMILY_INT8 = 1, FAMILY_AFFINE32 = 2, FAMILY_AFFINE16 = 3, FAMILY_F32 = 4, FAMILY_F16 = 5,
              FAMILY_BF16 = 6;

constexpr int OWN_FAMILY = TYPE == F32     ? FAMILY_F32
                           : TYPE == F16   ? FAMILY_F16
                           : TYPE == BF16  ? FAMILY_BF16
                           : TYPE == MXFP4 ? FAMILY_MXFP4
                           : TYPE == Q6_K  ? FAMILY_AFFINE16
                           : HAS_MINIMUM   ? FAMILY_AFFINE32
                                           : FAMILY_INT8;

// What a family's plane of bytes holds for a code: the code itself where the scale has a minimum beside it or is signed.
__device__ __forceinline__ unsigned plane_code(int code) { return static_cast<unsigned>(code + 128) & 0xFF; }

__device__ __forceinline__ void report(Word64* found, bool finite, Word64 block) {
    if (!finite) atomicMin(&found[0], block);
}

__device__ __forceinline__ void report_large(Word64* found, float value) {
    const float magnitude = fabsf(value);
    if (magnitude > MAX_HALF) atomicMax(&found[1], static_cast<Word64>(__float_as_uint(magnitude)));
}

// Two codes of each pair side by side in the halves of a word, as `_twiddle` places them.
__device__ __forceinline__ unsigned twiddle(const int (&codes)[8]) {
    constexpr int SIGNS[4] = {15, 12, 14, 13}, MAGNITUDES[4] = {9, 6, 3, 0};
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const unsigned code = codes[i];
        word |= (code >> 3) << (SIGNS[i / 2] + i % 2 * 16) | (code & 7) << (MAGNITUDES[i / 2] + i % 2 * 16);
    }
    return word;
}

__device__ __forceinline__ uint2 pack_bytes(const unsigned (&bytes)[8]) {
    return make_uint2(bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24,
                      bytes[4] | bytes[5] << 8 | bytes[6] << 16 | bytes[7] << 24);
}

template <int FAMILY>
__device__ __forceinline__ void repack_octet(const Byte* window, Word64 mask, Word64 start, char* quants, char* scales,
                                             char* minima, Word64* found, Word64 first_strip, int num_strips, int rows,
                                             int columns, int strips_per_matrix, int num_upper) {
    const unsigned num_tiles = (columns + 63) / 64;
    const unsigned item = blockIdx.x * blockDim.x + threadIdx.x, octet = item >> (num_upper - 1);
    const unsigned u = item & (num_upper - 1), b = octet & 1, t = octet >> 1 & 3, g = octet >> 3 & 7;
    const unsigned tile_here = octet >> 6;  // counted from first_strip's first; in 32 bits, as divisions by 64 are slow
    if (tile_here >= num_tiles * num_strips) return;
    const unsigned strip_here = tile_here / num_tiles, column_tile = tile_here - strip_here * num_tiles;
    const unsigned strip = static_cast<unsigned>(first_strip) + strip_here, matrix = strip / strips_per_matrix;
    const Word64 tile = static_cast<Word64>(strip) * num_tiles + column_tile;
    const int matrix_row = static_cast<int>((strip - matrix * strips_per_matrix) * 8 * num_upper + 8 * u + g);
    const int column = static_cast<int>(column_tile * 64 + 32 * b + 8 * t);
    const bool is_inside = matrix_row < rows && column < columns;
    const int num_inside = is_inside ? min(8, columns - column) : 0;

    const Word64 row = static_cast<Word64>(matrix) * rows + matrix_row;
    const Word64 blocks_per_row = columns / BLOCK_SIZE;
    const Word64 first_block = row * blocks_per_row + column / BLOCK_SIZE;
    Block block{window, mask, start + first_block * BLOCK_BYTES};
    const int first = column % BLOCK_SIZE;

    int codes[8] = {};
    float values[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i >= num_inside) continue;
        const Block own{window, mask, block.start + (IS_PLAIN ? i * BLOCK_BYTES : 0)};
        report(found, is_finite(own, first + i), first_block + (IS_PLAIN ? i : 0));
        if constexpr (FAMILY == FAMILY_F32 || FAMILY == FAMILY_BF16) {
            values[i] = value_of(own, first + i);
            report_large(found, values[i]);
        } else if constexpr (FAMILY == FAMILY_F16) {
            codes[i] = own.half_bits(0);
        } else {
            codes[i] = code_of(own, first + i);
        }
    }

    // Both halves of a strip have their places in a tile, whether this tensor fills one of them or both.
    if constexpr (FAMILY == FAMILY_MXFP4) {
        const Word64 place = (((tile * 8 + g) * 4 + t) * 2 + b) * 2 + u;
        reinterpret_cast<unsigned*>(quants)[place] = twiddle(codes);
        if (t == 0) scales[((tile * 8 + g) * 2 + b) * 2 + u] = is_inside ? block[0] : 0;
    } else if constexpr (FAMILY == FAMILY_F32) {
        float4* const out = reinterpret_cast<float4*>(quants);
        const Word64 place = (tile * 2 + b) * 2 + u;
        out[((place * 2 + 0) * 8 + g) * 4 + t] = make_float4(values[0], values[1], values[2], values[3]);
        out[((place * 2 + 1) * 8 + g) * 4 + t] = make_float4(values[4], values[5], values[6], values[7]);
    } else if constexpr (FAMILY == FAMILY_F16 || FAMILY == FAMILY_BF16) {
        unsigned pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (FAMILY == FAMILY_F16) {
                pairs[i] = codes[2 * i] | codes[2 * i + 1] << 16;
            } else {
                pairs[i] = __float_as_uint(values[2 * i]) >> 16 | (__float_as_uint(values[2 * i + 1]) & 0xFFFF0000u);
            }
        }
        reinterpret_cast<uint4*>(quants)[(((tile * 2 + b) * 2 + u) * 8 + g) * 4 + t] =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
        unsigned bytes[8];
#pragma unroll
        for (int i = 0; i < 8; i++) bytes[i] = plane_code(codes[i]);
        reinterpret_cast<uint2*>(quants)[(((tile * 2 + b) * 8 + g) * 4 + t) * 2 + u] = pack_bytes(bytes);
        const Word64 place = ((tile * 8 + g) * 2 + b) * 2 + u;
        if constexpr (FAMILY == FAMILY_INT8) {
            if (t == 0) {
                reinterpret_cast<unsigned short*>(scales)[place] = is_inside ? block.half_bits(0) : 0;
            }
        } else if constexpr (FAMILY == FAMILY_AFFINE32) {
            if (t == 0) {
                reinterpret_cast<float*>(scales)[place] = is_inside ? scale_of(block, first) : 0.0f;
                reinterpret_cast<float*>(minima)[place] = is_inside ? minimum_of(block, first) : 0.0f;
            }
        } else if (t % 2 == 0) {  // AFFINE16: half a block has a scale
            const Word64 half = (((tile * 2 + t / 2) * 8 + g) * 2 + b) * 2 + u;
            reinterpret_cast<float*>(scales)[half] = is_inside ? scale_of(block, first) : 0.0f;
        }
    }
}

#define PARAMETERS                                                                                                     \
    const Byte *window, /* (mask + 1,) of the files' bytes */                                                          \
        Word64 mask, Word64 start, /* of the tensor in the stream */                                                   \
        char *quants, char *scales, char *minima, /* its planes */                                                     \
        Word64 *found, /* (2,) */                                                                                      \
        Word64 first_strip, int num_strips, /* counted through all matrices */                                         \
        int rows, int columns, int strips_per_matrix, int num_upper /* halves of a strip that it fills */

extern "C" __global__ void __launch_bounds__(256, 4) repack(PARAMETERS) {
    repack_octet<OWN_FAMILY>(window, mask, start, quants, scales, minima, found, first_strip, num_strips, rows, columns,
                                  strips_per_matrix, num_upper);
}

extern "C" __global__ void __launch_bounds__(256, 4) expand(PARAMETERS) {
    repack_octet<FAMILY_F32>(window, mask, start, quants, scales, minima, found, first_strip, num_strips, rows, columns,
                             strips_per_matrix, num_upper);
}

extern "C" __global__ void __launch_bounds__(256) values(const Byte* window,  // (mask + 1,)
                                                         Word64 mask,
                                                         Word64 start,   // of the tensor in the stream
                                                         float* out,     // (blocks of the tensor, values of a block)
                                                         Word64* found,  // (2,)
                                                         Word64 first_block, Word64 num_blocks) {
    const Word64 item = static_cast<Word64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= num_blocks * BLOCK_SIZE) return;
    const Word64 index = first_block + item / BLOCK_SIZE;
    const int j = item % BLOCK_SIZE;
    const Block block{window, mask, start + index * BLOCK_BYTES};
    report(found, is_finite(block, j), index);
    out[index * BLOCK_SIZE + j] = value_of(block, j);
}
