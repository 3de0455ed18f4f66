// Stages of x and of a matrix in shared memory, and the products of warpgroups over them (sm_90a).
//
// One thread fills stages of STAGE_TILES times 64 columns, in boxes of tensor maps. The warps past the first four, in groups
// of four, each multiply their part of its outputs, STRIPS strips of 16 to a warp. The matrix is the operand in registers: a
// lane's share of a tile of cuda.v1 is its share of wgmma's a, decoded and scaled. x is the operand in shared memory,
// spread (spread.cuh).
//
// Scales are multiplied into the weights, in half. MXFP4's are powers of two, taken relative to the largest of the
// row: exact within 2^24 of it, and what is smaller than 2^-27 of it is zero. Others round, by 2^-11 at most.
//
// What includes this says before: NUM_THREADS of a block, MAX_ROWS and STAGE_TILES of a stage, MAX_STRIPS, the most of a
// warp, and whether the groups, two of them, take turns; NUM_STAGES is a -D.
#pragma once

#include "weights.cuh"
#include "wgmma.cuh"

constexpr int NUM_COPIERS = 128;  // threads, whose registers the others get: one copies, the others multiply
constexpr int STAGE_STRIPS = (NUM_THREADS - NUM_COPIERS) / 32 * MAX_STRIPS;
constexpr int ROW_BYTES = 128;  // of 64 columns of x
constexpr int BOX_ROWS = 32;    // that are copied at once, as the tensor map says
constexpr int PANEL_BYTES = MAX_ROWS * ROW_BYTES, X_BYTES = STAGE_TILES * PANEL_BYTES;
constexpr int TILE_CODES = NUM_LOADS * 512;           // of a strip's tile
constexpr int TILE_SCALES = FAMILY == 0 ? 32 : FAMILY == 1 ? 64 : FAMILY == 2 ? 128 : FAMILY == 3 ? 256 : 0;
constexpr int TILE_MINIMA = FAMILY == 2 ? 128 : 0;
constexpr int SCALES_AT = STAGE_STRIPS * STAGE_TILES * TILE_CODES;
constexpr int MINIMA_AT = SCALES_AT + STAGE_STRIPS * STAGE_TILES * TILE_SCALES;
constexpr int TILE_LARGEST = FAMILY == 0 ? 16 : 0;  // exponents of a strip's rows: g, g + 8, g + 1, ...
constexpr int LARGEST_AT = MINIMA_AT + STAGE_STRIPS * STAGE_TILES * TILE_MINIMA;
constexpr int STAGE_BYTES = LARGEST_AT + STAGE_STRIPS * TILE_LARGEST;  // of weights
static_assert((SCALES_AT | MINIMA_AT | LARGEST_AT | STAGE_BYTES) % 128 == 0, "boxes go to multiples of 128");

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
            make_barrier(full + stage * 8, 2);  // weights, and x
            make_barrier(empty + stage * 8, NUM_THREADS - NUM_COPIERS);  // all that read: racecheck counts on it
        }
    }

    __device__ __forceinline__ void advance() {
        if (++stage == NUM_STAGES) stage = 0, phase ^= 1;
    }
};

// A stage's weights, `count` strips from `strip` on, as many as the maps' boxes have; the first stage of a tile also takes
// the largest exponents of their rows. One thread calls, whose arrival at the barrier this is.
__device__ __forceinline__ void copy_weights(const Maps& maps, uint32_t weights, int column_tile, int strip, int count,
                                             bool is_first, uint32_t barrier) {
    constexpr int STRIP_BYTES = STAGE_TILES * (TILE_CODES + TILE_SCALES + TILE_MINIMA);
    const bool has_largest = TILE_LARGEST > 0 && is_first;
    arrive_with_bytes(barrier, count * (STRIP_BYTES + (has_largest ? TILE_LARGEST : 0)));
    copy_tiles(weights, maps.codes, column_tile, strip, barrier);
    if (TILE_SCALES > 0) copy_tiles(weights + SCALES_AT, maps.scales, column_tile, strip, barrier);
    if (TILE_MINIMA > 0) copy_tiles(weights + MINIMA_AT, maps.minima, column_tile, strip, barrier);
    if (has_largest) copy_tiles(weights + LARGEST_AT, maps.minima, 0, strip, barrier);
}

// A stage's x: `count` rows from `row` on, in whole boxes. One thread calls, whose arrival at the barrier this is.
__device__ __forceinline__ void copy_rows(const Maps& maps, uint32_t x, int column_tile, int row, int count,
                                          uint32_t barrier) {
    const int num_boxes = (count + BOX_ROWS - 1) / BOX_ROWS;
    arrive_with_bytes(barrier, num_boxes * STAGE_TILES * BOX_ROWS * ROW_BYTES);
#pragma unroll 1
    for (int box = 0; box < num_boxes; box++)
#pragma unroll
        for (int tile = 0; tile < STAGE_TILES; tile++)
            copy_box(x + tile * PANEL_BYTES + box * BOX_ROWS * ROW_BYTES, maps.rows, (column_tile + tile) * 64,
                     row + box * BOX_ROWS, barrier);
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

// load_tile, from strip `strip` of the weights of a stage, tile `index` of its STAGE_TILES.
__device__ __forceinline__ void take_tile(Tile& tile, uint32_t weights, int strip, int index, int lane) {
    strip = strip * STAGE_TILES + index;
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

// The largest exponents of rows g and g + 8 of a strip, which the first stage of its tile brings.
struct Largest {
    uint32_t offsets[2] = {};  // 30 less them, in both halves

    __device__ __forceinline__ void take(uint32_t weights, int strip, int lane) {
#if FAMILY == 0
        uint32_t both;
        asm volatile("ld.shared.u16 %0, [%1];" : "=r"(both) : "r"(weights + LARGEST_AT + strip * TILE_LARGEST + lane / 4 * 2));
#pragma unroll
        for (int upper = 0; upper < 2; upper++)
            offsets[upper] = (30 - (both >> 8 * upper & 0xFF) & 0xFFFF) * 0x10001u;
#endif
    }

    // What the sums of row g or g + 8 are multiplied with.
    __device__ __forceinline__ float factor(int upper) const {
#if FAMILY == 0
        const int largest = 30 - static_cast<int16_t>(offsets[upper]);
        return __uint_as_float(largest < 2 ? 0x00200000u << largest : (largest - 1u) << 23);
#else
        return 1.0f;
#endif
    }
};

// What weights of rows g and g + 8 are multiplied with, in half, those of block 0 and of block 1 in one word.
struct Scales {
    uint32_t pairs[2];

    __device__ __forceinline__ void take(const Tile& tile, const Largest& largest) {
#if FAMILY == 0
        // Decoded codes are 2^-14 of their values: the largest block's become twice their values.
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const uint32_t exponents = __byte_perm(tile.scales, 0, upper ? 0x4341 : 0x4240);
            pairs[upper] = __viaddmax_s16x2(exponents, largest.offsets[upper], 0) << 10;
        }
#endif
    }
};

// The lane's values of block `block` as two of wgmma's a, scales multiplied in.
__device__ __forceinline__ void decode_scaled(const Tile& tile, int block, const Scales& scales, uint32_t (&a)[2][4]) {
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        uint32_t pairs[4];
        decode(tile, block, upper, pairs);
        if (IS_SCALED) {
#if FAMILY == 0
            const uint32_t scale = __byte_perm(scales.pairs[upper], 0, block ? 0x3232 : 0x1010);
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

// How many blocks of 32 columns have their products started together: with two strips the registers do not hold a whole
// stage's operands beside those that products are still reading.
template <int STRIPS>
constexpr int NUM_BLOCKS = STRIPS == 1 ? 2 : 1;

// A warp's weights of so many blocks as wgmma's a, 16 columns at a time.
template <int STRIPS>
using Operands = uint32_t[STRIPS][NUM_BLOCKS<STRIPS>][2][4];

// The products of such blocks of TILES tiles, for ROWS rows, added to the sums.
template <int ROWS, int TILES, int STRIPS, int SIZE>
__device__ __forceinline__ void start_products(float (&sums)[STRIPS][SIZE], const Operands<STRIPS> (&a)[TILES], uint32_t b) {
    before_products();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int step = 0; step < 2 * NUM_BLOCKS<STRIPS>; step++)
#pragma unroll
            for (int s = 0; s < STRIPS; s++)
                start_product<ROWS>(sums[s], a[tile][s][step / 2][step % 2], b + tile * (PANEL_BYTES / 16) + step * 2, 1);
    commit_products();
}

// The same for as few rows, LEAST and then in steps of STEP, as hold `count`.
template <int STEP, int LEAST, int ROWS, int TILES, int STRIPS, int SIZE>
__device__ __forceinline__ void start_rows(float (&sums)[STRIPS][SIZE], const Operands<STRIPS> (&a)[TILES], uint32_t b,
                                           int count) {
    if constexpr (ROWS > LEAST)
        if (count <= ROWS - STEP) return start_rows<STEP, LEAST, ROWS - STEP>(sums, a, b, count);
    start_products<ROWS>(sums, a, b);
}

// Before the first stage's weights.
template <int STRIPS>
__device__ __forceinline__ void take_largest(const Ring& ring, int first, Largest (&largest)[STRIPS]) {
    if (FAMILY != 0) return;
    await_barrier(ring.full + ring.stage * 8, ring.phase);
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
        largest[s].take(ring.weights + ring.stage * STAGE_BYTES, first + 4 * s, threadIdx.x % 32);
}

// A warp's weights of a stage.
template <int STRIPS>
struct StageWeights {
    Tile tiles[STRIPS];
    Scales scales[STRIPS];

    // Tile `index` of each strip.
    __device__ __forceinline__ void take(const Ring& ring, int first, int index, const Largest (&largest)[STRIPS]) {
        const int lane = threadIdx.x % 32;
        const uint32_t weights = ring.weights + ring.stage * STAGE_BYTES;
        if (index == 0) await_barrier(ring.full + ring.stage * 8, ring.phase);
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            take_tile(tiles[s], weights, first + 4 * s, index, lane);
            scales[s].take(tiles[s], largest[s]);
        }
    }

    // The blocks from `block` on.
    __device__ __forceinline__ void decode(int block, Operands<STRIPS>& target) const {
#pragma unroll
        for (int s = 0; s < STRIPS; s++)
#pragma unroll
            for (int i = 0; i < NUM_BLOCKS<STRIPS>; i++) decode_scaled(tiles[s], block + i, scales[s], target[s][i]);
    }
};

// The products of the next `num_stages` stages: of `count` rows and STRIPS strips, every fourth from `first` on of a stage.
// There are sums for 2 SIZE rows; products take as few, LEAST and then in steps of 32, as hold `count`. Weights are decoded
// while the products before run; where groups take turns at those the second one passes the first.
template <int LEAST, int STRIPS, int SIZE>
__device__ __forceinline__ void multiply_stages(Ring& ring, int first, int num_stages, int count, Largest (&largest)[STRIPS],
                                                float (&sums)[STRIPS][SIZE]) {
    static_assert(STAGE_TILES == 1, "a stage is 64 columns");
    static_assert(NUM_STAGES > 1, "a stage is freed after the next one has begun");
    constexpr int NUM_PARTS = 2 / NUM_BLOCKS<STRIPS>;  // of a stage
    const int num_parts = num_stages * NUM_PARTS, group = warp_index() / 4 - NUM_COPIERS / 128;
    StageWeights<STRIPS> weights;
    Operands<STRIPS> a[2][1];
#pragma unroll
    for (int i = 0; i < STRIPS * SIZE; i++) sums[i / SIZE][i % SIZE] = 0.0f;
    take_largest(ring, first, largest);
    weights.take(ring, first, 0, largest);
    weights.decode(0, a[0][0]);
    int last_stage = -1;
    for (int pair = 0; pair < num_parts; pair += 2)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int done = pair + odd, part = odd % NUM_PARTS;
            if (NUM_PARTS == 1 && done == num_parts) break;
            if (TAKES_TURNS) await_turn(group);
            start_rows<32, LEAST, 2 * SIZE>(sums, a[odd], operand(ring.x + ring.stage * X_BYTES) + part * 4, count);
            if (TAKES_TURNS) pass_turn(1 - group);
            // The products before these are done; while these run, the next ones' weights are decoded.
            await_products<1>();
            if (part == 0) {
                if (last_stage >= 0) arrive(ring.empty + last_stage * 8);
                last_stage = ring.stage;
            }
            if (part + 1 == NUM_PARTS) ring.advance();
            if (done + 1 < num_parts) {
                if (part + 1 == NUM_PARTS) weights.take(ring, first, 0, largest);
                weights.decode((part + 1) % NUM_PARTS, a[1 - odd][0]);
            }
        }
    await_products<0>();
    arrive(ring.empty + last_stage * 8);
}

// The same with four warps to a scheduler, which decode while others' products run: a warp waits for its own before it
// decodes, which takes half the registers and fewer instructions. Products take as few rows, in steps of 16, as hold `count`,
// which is more than half of 2 SIZE or at most 32.
template <int SIZE>
__device__ __forceinline__ void multiply_in_line(Ring& ring, int first, int num_stages, int count, Largest (&largest)[1],
                                                 float (&sums)[1][SIZE]) {
    StageWeights<1> weights;
    constexpr int AT_ONCE = 2 * SIZE <= 32 && NUM_LOADS <= 1 ? STAGE_TILES : 1;  // tiles whose operands the registers hold
    Operands<1> a[AT_ONCE];
#pragma unroll
    for (int i = 0; i < SIZE; i++) sums[0][i] = 0.0f;
    take_largest(ring, first, largest);
    uint32_t empty = 0;
    for (int stage = 0; stage < num_stages; stage++) {
#pragma unroll
        for (int first_tile = 0; first_tile < STAGE_TILES; first_tile += AT_ONCE) {
            await_products<0>();
            if (first_tile == 0 && stage > 0) arrive(empty);
#pragma unroll
            for (int tile = 0; tile < AT_ONCE; tile++) {
                weights.take(ring, first, first_tile + tile, largest);
                weights.decode(0, a[tile]);
            }
            start_rows<16, 2 * SIZE <= 32 ? 16 : 2 * SIZE - 16, 2 * SIZE>(
                sums, a, operand(ring.x + ring.stage * X_BYTES + first_tile * PANEL_BYTES), count);
        }
        empty = ring.empty + ring.stage * 8;
        ring.advance();
    }
    await_products<0>();
    arrive(empty);
}
