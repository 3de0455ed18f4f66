// Stages of x and of a matrix in shared memory, and the products of warpgroups over them (sm_90a).
//
// NUM_COPIERS threads fill a stage of 64 columns, one of them with x in boxes of its tensor map; the others, two groups
// of four warps, each multiply their half of its outputs, STRIPS strips of 16 to a warp. The matrix is the operand in
// registers: a lane's share of a tile of cuda.v1 is its share of wgmma's a, decoded and scaled while the products before
// run. x is the operand in shared memory, spread (spread.cuh).
//
// Scales are multiplied into the weights, in half. MXFP4's are powers of two, taken relative to the largest of the
// row: exact within 2^24 of it, and what is smaller than 2^-27 of it is zero. Others round, by 2^-11 at most.
//
// What includes this says before: NUM_THREADS of a block, MAX_ROWS of a stage, MAX_STRIPS, the most of a warp, and whether
// the two groups take turns; NUM_STAGES is a -D.
#pragma once

#include "weights.cuh"
#include "wgmma.cuh"

constexpr int NUM_COPIERS = 128;  // threads; the others multiply
constexpr int ROW_BYTES = 128;  // of a stage: 64 columns
constexpr int BOX_ROWS = 32;    // that are copied at once, as the tensor map says
constexpr int X_BYTES = MAX_ROWS * ROW_BYTES;
constexpr int TILE_CODES = NUM_LOADS * 512;           // of a strip's tile
constexpr int TILE_SCALES = FAMILY == 0 ? 32 : FAMILY == 1 ? 64 : FAMILY == 2 ? 128 : FAMILY == 3 ? 256 : 0;
constexpr int TILE_MINIMA = FAMILY == 2 ? 128 : 0;
constexpr int SCALES_AT = 8 * MAX_STRIPS * TILE_CODES, MINIMA_AT = SCALES_AT + 8 * MAX_STRIPS * TILE_SCALES;
constexpr int STAGE_BYTES = MINIMA_AT + 8 * MAX_STRIPS * TILE_MINIMA;  // of weights

// Where the stages and their barriers lie in shared memory.
struct Ring {
    uint32_t x, weights, full, empty;
    int stage = 0;
    uint32_t phase = 0;

    // From `memory` on, a multiple of 1024.
    __device__ __forceinline__ explicit Ring(uint32_t memory) : x(memory) {
        asm volatile("" : "+r"(x));  // kept, not reckoned again
        weights = x + NUM_STAGES * X_BYTES;
        full = weights + NUM_STAGES * STAGE_BYTES;
        empty = full + NUM_STAGES * 8;
    }

    // One thread of the block makes them.
    __device__ __forceinline__ void make_barriers() const {
        for (int stage = 0; stage < NUM_STAGES; stage++) {
            make_barrier(full + stage * 8, NUM_COPIERS + 1);  // the threads' weights, and x
            make_barrier(empty + stage * 8, NUM_THREADS - NUM_COPIERS);  // all that read: racecheck counts on it
        }
    }

    __device__ __forceinline__ void advance() {
        if (++stage == NUM_STAGES) stage = 0, phase ^= 1;
    }
};

// A stage's weights in one plane, SIZE bytes of each strip, whose bytes of all column tiles are `pitch`.
template <int STRIPS, int SIZE>
__device__ __forceinline__ void copy_plane(uint32_t target, const char* source, int num_strips, int pitch) {
    constexpr int TOTAL = 8 * STRIPS * SIZE, PASS = NUM_COPIERS * 16;  // bytes
    static_assert(PASS % SIZE == 0 || SIZE % PASS == 0, "a pass is some strips or a part of one");
    int strip = threadIdx.x * 16 / SIZE;
    const char* piece = source + strip * pitch + threadIdx.x * 16 % SIZE;
#pragma unroll
    for (int byte = 0; byte < TOTAL; byte += PASS) {
        if (byte + threadIdx.x * 16 < TOTAL && strip < num_strips) copy_async<16>(target + byte + threadIdx.x * 16, piece);
        if (SIZE > PASS && (byte + PASS) % SIZE != 0) {
            piece += PASS;
        } else {
            strip += SIZE > PASS ? 1 : PASS / SIZE;
            piece += SIZE > PASS ? pitch - (SIZE - PASS) : PASS / SIZE * pitch;
        }
    }
}

// A stage's weights, tile `index` of the planes the first strip's.
template <int STRIPS>
__device__ __forceinline__ void copy_weights(const Planes& planes, uint32_t weights, size_t index, int num_strips,
                                             int column_tiles) {
    copy_plane<STRIPS, TILE_CODES>(weights, planes.quants + index * TILE_CODES, num_strips, column_tiles * TILE_CODES);
#if FAMILY <= 3
    copy_plane<STRIPS, TILE_SCALES>(weights + SCALES_AT, planes.scales + index * TILE_SCALES, num_strips,
                                    column_tiles * TILE_SCALES);
#endif
#if FAMILY == 2
    copy_plane<STRIPS, TILE_MINIMA>(weights + MINIMA_AT, planes.minima + index * TILE_MINIMA, num_strips,
                                    column_tiles * TILE_MINIMA);
#endif
}

// A stage's x: `count` rows from `row` on, in whole boxes. One thread calls, whose arrival at the barrier this is.
__device__ __forceinline__ void copy_rows(const TensorMap* rows, uint32_t x, int column_tile, int row, int count,
                                          uint32_t barrier) {
    const int num_boxes = (count + BOX_ROWS - 1) / BOX_ROWS;
    arrive_with_bytes(barrier, num_boxes * BOX_ROWS * ROW_BYTES);
    for (int box = 0; box < num_boxes; box++)
        copy_box(x + box * BOX_ROWS * ROW_BYTES, rows, column_tile * 64, row + box * BOX_ROWS, barrier);
}

template <typename T>
__device__ __forceinline__ T read_shared(uint32_t address);
template <>
__device__ __forceinline__ uint32_t read_shared<uint32_t>(uint32_t address) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
}
template <>
__device__ __forceinline__ uint2 read_shared<uint2>(uint32_t address) {
    uint2 value;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address));
    return value;
}
template <>
__device__ __forceinline__ uint4 read_shared<uint4>(uint32_t address) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address));
    return value;
}

// load_tile, from strip `strip` of the weights of a stage.
__device__ __forceinline__ void take_tile(Tile& tile, uint32_t weights, int strip, int lane) {
#pragma unroll
    for (int i = 0; i < NUM_LOADS; i++)
        tile.codes[i] = read_shared<uint4>(weights + strip * TILE_CODES + i * 512 + lane * 16);
#if FAMILY <= 3
    const uint32_t scales = weights + SCALES_AT + strip * TILE_SCALES;
#endif
#if FAMILY == 0
    tile.scales = read_shared<uint32_t>(scales + lane / 4 * 4);
#elif FAMILY == 1
    tile.scales = read_shared<uint2>(scales + lane / 4 * 8);
#elif FAMILY == 2
    tile.scales = read_shared<uint4>(scales + lane / 4 * 16);
    tile.minima = read_shared<uint4>(weights + MINIMA_AT + strip * TILE_MINIMA + lane / 4 * 16);
#elif FAMILY == 3
    tile.scales = read_shared<uint4>(scales + lane % 4 / 2 * 128 + lane / 4 * 16);
#endif
}

// The largest exponents of rows g and g + 8 of a strip.
__device__ __forceinline__ void find_largest(const Planes& planes, size_t first_tile, int column_tiles, int lane,
                                             int (&largest)[2]) {
    uint32_t low = 0, high = 0;
#pragma unroll 8
    for (int tile = lane % 4; tile < column_tiles; tile += 4) {
        const uint32_t scales = load_weight4(planes.scales + (first_tile + tile) * 32 + lane / 4 * 4);
        low = __vmaxu2(low, scales & 0x00FF00FFu);
        high = __vmaxu2(high, scales >> 8 & 0x00FF00FFu);
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        low = __vmaxu2(low, __shfl_xor_sync(0xffffffffu, low, distance));
        high = __vmaxu2(high, __shfl_xor_sync(0xffffffffu, high, distance));
    }
    largest[0] = max(low & 0xFFFF, low >> 16);
    largest[1] = max(high & 0xFFFF, high >> 16);
}

// The lane's values of block `block` as two of wgmma's a, scales multiplied in.
__device__ __forceinline__ void decode_scaled(const Tile& tile, int block, const int (&largest)[2],
                                              uint32_t (&a)[2][4]) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        uint32_t pairs[4];
        decode(tile, block, upper, pairs);
        if (IS_SCALED) {
#if FAMILY == 0
            // Decoded codes are 2^-14 of their values: the largest block's become twice their values.
            const int exponent = tile.scales >> (8 * (2 * block + upper)) & 0xFF;
            const uint32_t scale = max(exponent - largest[upper] + 30, 0) * (0x10001u << 10);
#elif FAMILY == 1
            const uint32_t scale = __byte_perm(block == 0 ? tile.scales.x : tile.scales.y, 0, upper ? 0x3232 : 0x1010);
#else
            const uint32_t scale = 0;
#endif
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const __half2 value = __hmul2(*reinterpret_cast<const __half2*>(&pairs[i]),
                                              *reinterpret_cast<const __half2*>(&scale));
                pairs[i] = *reinterpret_cast<const uint32_t*>(&value);
            }
        }
        a[0][upper] = pairs[0], a[0][upper + 2] = pairs[1];
        a[1][upper] = pairs[2], a[1][upper + 2] = pairs[3];
    }
}

// What the sums of a row are multiplied with.
__device__ __forceinline__ float factor_of(int largest) {
#if FAMILY == 0
    return __uint_as_float(largest < 2 ? 0x00200000u << largest : (largest - 1u) << 23);
#else
    return 1.0f;
#endif
}

// How many blocks of 32 columns have their products started together: with two strips the registers do not hold a whole
// stage's operands beside those that products are still reading.
template <int STRIPS>
constexpr int NUM_BLOCKS = STRIPS == 1 ? 2 : 1;

// A warp's weights of so many blocks as wgmma's a, 16 columns at a time.
template <int STRIPS>
using Operands = uint32_t[STRIPS][NUM_BLOCKS<STRIPS>][2][4];

// The products of such blocks, for ROWS rows.
template <int STRIPS, int ROWS>
__device__ __forceinline__ void start_products(float (&sums)[STRIPS][MAX_ROWS / 2], const Operands<STRIPS>& a, uint64_t b,
                                               int is_added) {
    before_products();
#pragma unroll
    for (int step = 0; step < 2 * NUM_BLOCKS<STRIPS>; step++)
#pragma unroll
        for (int s = 0; s < STRIPS; s++)
            start_product<ROWS>(sums[s], a[s][step / 2][step % 2], b + step * 2, is_added + step);
    commit_products();
}

// The same for as few rows, in steps of 32, as hold `count`.
template <int STRIPS, int ROWS = MAX_ROWS>
__device__ __forceinline__ void start_rows(float (&sums)[STRIPS][MAX_ROWS / 2], const Operands<STRIPS>& a, uint64_t b,
                                           int is_added, int count) {
    if constexpr (ROWS > 32)
        if (count <= ROWS - 32) return start_rows<STRIPS, ROWS - 32>(sums, a, b, is_added, count);
    start_products<STRIPS, ROWS>(sums, a, b, is_added);
}

// The products of the next `num_stages` stages: of `count` rows and STRIPS strips, every fourth from `first` on of a stage.
// Where groups take turns the second one passes the first.
template <int STRIPS>
__device__ __forceinline__ void multiply_stages(Ring& ring, int first, int num_stages, int count,
                                                const int (&largest)[STRIPS][2], float (&sums)[STRIPS][MAX_ROWS / 2]) {
    constexpr int NUM_PARTS = 2 / NUM_BLOCKS<STRIPS>;  // of a stage
    const int lane = threadIdx.x % 32, num_parts = num_stages * NUM_PARTS, group = (threadIdx.x - NUM_COPIERS) / 128;
    Tile tiles[STRIPS];
    Operands<STRIPS> a[2];
    const auto decode_part = [&](int part, Operands<STRIPS>& target) {
        if (part == 0) {
            await_barrier(ring.full + ring.stage * 8, ring.phase);
            const uint32_t weights = ring.weights + ring.stage * STAGE_BYTES;
#pragma unroll
            for (int s = 0; s < STRIPS; s++) take_tile(tiles[s], weights, first + 4 * s, lane);
        }
#pragma unroll
        for (int s = 0; s < STRIPS; s++)
#pragma unroll
            for (int i = 0; i < NUM_BLOCKS<STRIPS>; i++) decode_scaled(tiles[s], part + i, largest[s], target[s][i]);
    };
    decode_part(0, a[0]);
    int last_stage = -1;
    for (int pair = 0; pair < num_parts; pair += 2)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int done = pair + odd, part = odd % NUM_PARTS;
            if (NUM_PARTS == 1 && done == num_parts) break;
            if (TAKES_TURNS) await_turn(group);
            start_rows<STRIPS>(sums, a[odd], operand(ring.x + ring.stage * X_BYTES) + part * 4, done, count);
            if (TAKES_TURNS) pass_turn(1 - group);
            // The products before these are done; while these run, the next ones' weights are decoded.
            await_products<1>();
            if (part == 0) {
                if (last_stage >= 0) arrive(ring.empty + last_stage * 8);
                last_stage = ring.stage;
            }
            if (part + 1 == NUM_PARTS) ring.advance();
            if (done + 1 < num_parts) decode_part((part + 1) % NUM_PARTS, a[1 - odd]);
        }
    await_products<0>();
    arrive(ring.empty + last_stage * 8);
}
