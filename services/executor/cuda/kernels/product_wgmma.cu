// Products of many rows on Hopper: out = epilogue(x @ matrix + bias), in tiles of up to 128 rows by 256 outputs.
//
// The matrix is the tensor cores' operand in registers: a lane's share of a tile of cuda.v1 is its share of wgmma's a,
// decoded and scaled there, while the products of the tile before run. x is the operand in shared memory: four warps
// copy it, a stage of 64 columns at a time, and put a lane's eight columns of 32 where the permuted inner index wants
// them: of 16 words of a row, word 4 t + i goes to place 4 i + t. Two groups of four warps multiply, each its half of
// the outputs, STRIPS strips of 16 to a warp; they read the same stages but do not wait for each other, so that one
// multiplies while the other stores. Blocks stay and take one tile after another; the copies run ahead across tiles.
//
// Scales are multiplied into the weights, in half. MXFP4's are powers of two, taken relative to the largest of the
// row: exact within 2^24 of it, and what is smaller than 2^-27 of it is zero. Others round, by 2^-11 at most.
// Sums are in float, over the columns in order; a row's do not depend on other rows.
// Grouped (experts): as in product.cu, groups of at most 128 rows.
// Launch: grid (min(multiprocessors, tiles)), 384 threads, dynamic shared memory for NUM_STAGES (a -D); sm_90a.
// Moves: the matrix once for each row tile or group, x once for each 128 STRIPS outputs.
#include "epilogue.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

#ifndef FENCE
#define FENCE 1
#endif
#ifndef COPY_BYTES
#define COPY_BYTES 4
#endif
constexpr int NUM_COPIERS = FENCE == 1 ? 96 : 128, NUM_MULTIPLIERS = 256;  // threads

struct Product {
    Planes planes;
    Output out;
    const __half* x;     // (rows, x_pitch)
    const int* row_ids;  // of x, for each row of out; null: the same row
    const int4* groups;  // (num_row_tiles,) or null
    int x_pitch, num_rows, column_tiles, num_strips, tile_rows, num_row_tiles;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int MAX_ROWS = 128;
constexpr int ROW_BYTES = 128;  // of a stage: 64 columns
constexpr int STAGE_BYTES = MAX_ROWS * ROW_BYTES;
constexpr int BAND = 16;  // row tiles that pass all outputs before the next ones come: their x stays in the second cache
constexpr int TILE_SCALES = FAMILY == 0 ? 32 : FAMILY == 1 ? 64 : FAMILY == 2 ? 128 : 256;  // bytes

// Where the stages and their barriers lie in shared memory.
struct Ring {
    uint32_t stages, landed, full, empty;
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == NUM_STAGES) stage = 0, phase ^= 1;
    }
    __device__ __forceinline__ uint32_t memory() const { return stages + stage * STAGE_BYTES; }
};

struct Work {
    int expert, start, count, first_strip;
};

template <int STRIPS>
__device__ __forceinline__ Work find_work(const Product& product, int tile) {
    constexpr int TILE_STRIPS = 8 * STRIPS;
    const int across = (product.num_strips + TILE_STRIPS - 1) / TILE_STRIPS;
    if (product.groups != nullptr) {
        const int4 group = product.groups[tile / across];
        return {group.x, group.y, group.z, tile % across * TILE_STRIPS};
    }
    const int band = tile / (BAND * across), rest = tile % (BAND * across);
    const int tall = min(BAND, product.num_row_tiles - band * BAND);
    const int start = (band * BAND + rest % tall) * product.tile_rows;
    return {0, start, min(product.tile_rows, product.num_rows - start), rest / tall * TILE_STRIPS};
}

template <int STRIPS>
__device__ __forceinline__ void copy_rows(const Product& product, const Work& work, Ring& ring) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#if COPY_BYTES == 16
    constexpr int STEP = 4 * NUM_COPIERS / 32, NUM_STEPS = (MAX_ROWS + STEP - 1) / STEP;
    const int sub = warp * 4 + lane / 8;
    uint32_t offsets[NUM_STEPS];
#pragma unroll
    for (int i = 0; i < NUM_STEPS; i++) {
        const int own = work.start + min(STEP * i + sub, work.count - 1);
        offsets[i] = (product.row_ids == nullptr ? own : product.row_ids[own]) * product.x_pitch;
    }
#else
    constexpr int STEP = NUM_COPIERS / 32, NUM_STEPS = (MAX_ROWS + STEP - 1) / STEP;
    uint32_t offsets[(NUM_STEPS + 31) / 32];
#pragma unroll
    for (int i = 0; i < (NUM_STEPS + 31) / 32; i++) {
        const int own = work.start + min(STEP * (32 * i + lane) + warp, work.count - 1);
        offsets[i] = (product.row_ids == nullptr ? own : product.row_ids[own]) * product.x_pitch;
    }
    const int chunk = lane / 16 * 4 + lane % 4, word = lane % 16 / 4 * 4;
#endif
    const size_t first_tile = static_cast<size_t>(work.expert) * product.num_strips + work.first_strip;
    const int strips = min(8 * STRIPS, product.num_strips - work.first_strip);
    for (int column_tile = 0; column_tile < product.column_tiles; column_tile++) {
        // The weights that these columns will meet come into the second cache.
        for (int i = threadIdx.x; i < strips * NUM_LOADS * 4; i += NUM_COPIERS) {
            const size_t tile = (first_tile + i / (NUM_LOADS * 4)) * product.column_tiles + column_tile;
            prefetch(product.planes.quants + tile * (NUM_LOADS * 512) + i % (NUM_LOADS * 4) * 128);
            if (FAMILY <= 3 && i % (NUM_LOADS * 4) == 0) prefetch(product.planes.scales + tile * TILE_SCALES);
        }
        await_barrier(ring.empty + ring.stage * 8, ring.phase ^ 1);
        const uint32_t stage = ring.memory();
#if COPY_BYTES == 16
        const __half* source = product.x + column_tile * 64 + lane % 8 * 8;
#pragma unroll
        for (int i = 0; i < NUM_STEPS; i++) {
            const int row = STEP * i + sub;
            if (row < work.count) copy_piece(stage + row * ROW_BYTES + (lane % 8 ^ row % 8) * 16, source + offsets[i]);
        }
#else
        const __half* source = product.x + column_tile * 64 + lane * 2;
#pragma unroll 4
        for (int i = 0; i < NUM_STEPS; i++) {
            const uint32_t offset = __shfl_sync(0xffffffffu, NUM_STEPS > 32 && i >= 32 ? offsets[NUM_STEPS / 33] : offsets[0], i % 32);
            const int row = STEP * i + warp;
            if (row < work.count) copy_word(stage + row * ROW_BYTES + (chunk ^ row % 8) * 16 + word, source + offset);
        }
#endif
        arrive_with_copies(ring.landed + ring.stage * 8);
        ring.advance();
    }
}

#if FENCE == 1
__device__ __forceinline__ void relay_stages(const Product& product, Ring& ring) {
    for (int column_tile = 0; column_tile < product.column_tiles; column_tile++) {
        await_barrier(ring.landed + ring.stage * 8, ring.phase);
        show_to_products();
        if (threadIdx.x % 32 == 0) arrive(ring.full + ring.stage * 8);
        ring.advance();
    }
}
#endif

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

__device__ __forceinline__ void store_strip(const Product& product, const Work& work, int strip, const int (&largest)[2],
                                            float (&sums)[MAX_ROWS / 2]) {
    if (strip >= product.num_strips) return;
    const Output& out = product.out;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float low_factor = factor_of(largest[0]), high_factor = factor_of(largest[1]);
    const size_t first_row = work.start + 2 * t, first_bias = static_cast<size_t>(work.expert) * out.num_outputs;
    // Column 8 j + 2 t + i of the sums is row `first_row` + 8 j + i.
    if (out.epilogue == SWIGLU) {
        const int output = strip * 8 + g;
        if (output >= out.num_outputs) return;
        const float bias = out.bias[first_bias + output], up_bias = out.up_bias[first_bias + output];
        __half* values = static_cast<__half*>(out.values) + first_row * out.pitch + output;
#pragma unroll
        for (int j = 0; j < MAX_ROWS / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float gate = sums[4 * j + i] * low_factor + bias, up = sums[4 * j + i + 2] * high_factor + up_bias;
                const __half value = to_half(swiglu(gate, up));
                if (8 * j + 2 * t + i < work.count) values[static_cast<size_t>(8 * j + i) * out.pitch] = value;
            }
        return;
    }
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const int output = strip * 16 + 8 * upper + g;
        if (output >= out.num_outputs) return;
        const float factor = upper ? high_factor : low_factor;
        const float bias = out.bias == nullptr ? 0.0f : out.bias[first_bias + output];
        const size_t first = first_row * out.pitch + output;
        if (out.epilogue == GELU) {
            __half* values = static_cast<__half*>(out.values) + first;
#pragma unroll
            for (int j = 0; j < MAX_ROWS / 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (8 * j + 2 * t + i < work.count)
                        values[static_cast<size_t>(8 * j + i) * out.pitch] =
                            to_half(gelu(sums[4 * j + 2 * upper + i] * factor + bias));
            continue;
        }
        float* values = static_cast<float*>(out.values) + first;
#pragma unroll
        for (int j = 0; j < MAX_ROWS / 8; j += 4) {
            // All that are added to are read before the first is written, else each would wait for the last.
            float before[8] = {};
            if (out.epilogue == RESIDUAL)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (8 * (j + i / 2) + 2 * t + i % 2 < work.count)
                        before[i] = values[static_cast<size_t>(8 * (j + i / 2) + i % 2) * out.pitch];
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (8 * (j + i / 2) + 2 * t + i % 2 < work.count)
                    values[static_cast<size_t>(8 * (j + i / 2) + i % 2) * out.pitch] =
                        sums[4 * (j + i / 2) + 2 * upper + i % 2] * factor + bias + before[i];
        }
    }
}

// The products of a block of 32 columns, for ROWS rows.
template <int STRIPS, int ROWS>
__device__ __forceinline__ void start_products(float (&sums)[STRIPS][MAX_ROWS / 2], const uint32_t (&a)[STRIPS][2][4],
                                               uint64_t b, int is_added) {
    before_products();
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
        for (int s = 0; s < STRIPS; s++) start_product<ROWS>(sums[s], a[s][step], b + step * 2, is_added + step);
    commit_products();
}

template <int STRIPS>
__device__ __forceinline__ void multiply(const Product& product, const Work& work, Ring& ring) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int group = warp / 4 - 1, column_tiles = product.column_tiles;
    int strips[STRIPS], largest[STRIPS][2] = {};
    size_t first_tiles[STRIPS];
    Tile next[STRIPS];
    float sums[STRIPS][MAX_ROWS / 2];
#pragma unroll
    for (int s = 0; s < STRIPS; s++) {
        strips[s] = work.first_strip + (group * STRIPS + s) * 4 + warp % 4;
        const int strip = min(strips[s], product.num_strips - 1);
        first_tiles[s] = (static_cast<size_t>(work.expert) * product.num_strips + strip) * column_tiles;
        load_tile(next[s], product.planes, first_tiles[s], lane);
        if (FAMILY == 0) find_largest(product.planes, first_tiles[s], column_tiles, lane, largest[s]);
    }
    Tile tiles[STRIPS];
    uint32_t a[2][STRIPS][2][4];
#pragma unroll
    for (int s = 0; s < STRIPS; s++) {
        tiles[s] = next[s];
        decode_scaled(tiles[s], 0, largest[s], a[0][s]);
    }
    int last_stage = -1;
    for (int column_tile = 0; column_tile < column_tiles; column_tile++) {
        await_barrier(ring.full + ring.stage * 8, ring.phase);
#if FENCE == 0
        show_to_products();
#endif
        const bool is_last = column_tile + 1 == column_tiles;
#pragma unroll
        for (int s = 0; s < STRIPS; s++)
            if (!is_last) load_tile(next[s], product.planes, first_tiles[s] + column_tile + 1, lane);
        const uint64_t b = operand(ring.memory());
#pragma unroll
        for (int block = 0; block < 2; block++) {
            if (work.count > 96)
                start_products<STRIPS, 128>(sums, a[block], b + block * 4, column_tile + block);
            else if (work.count > 64)
                start_products<STRIPS, 96>(sums, a[block], b + block * 4, column_tile + block);
            else if (work.count > 32)
                start_products<STRIPS, 64>(sums, a[block], b + block * 4, column_tile + block);
            else
                start_products<STRIPS, 32>(sums, a[block], b + block * 4, column_tile + block);
            // The products before these are done; while these run, the next ones' weights are decoded.
            await_products<1>();
            if (block == 0 && last_stage >= 0 && lane == 0) arrive(ring.empty + last_stage * 8);
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
                if (block == 1) tiles[s] = next[s];
                decode_scaled(tiles[s], 1 - block, largest[s], a[1 - block][s]);
            }
        }
        last_stage = ring.stage;
        ring.advance();
    }
    await_products<0>();
    if (lane == 0) arrive(ring.empty + last_stage * 8);
#pragma unroll
    for (int s = 0; s < STRIPS; s++) store_strip(product, work, strips[s], largest[s], sums[s]);
}

template <int STRIPS>
__device__ __forceinline__ void run(const Product& product) {
    extern __shared__ char memory[];
    start_dependents();
    Ring ring;
    ring.stages = (shared_address(memory) + 1023) & ~1023u;
    asm volatile("" : "+r"(ring.stages));
    ring.landed = ring.stages + NUM_STAGES * STAGE_BYTES;
    ring.empty = ring.landed + NUM_STAGES * 8;
    ring.full = FENCE == 1 ? ring.empty + NUM_STAGES * 8 : ring.landed;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < NUM_STAGES; stage++) {
            make_barrier(ring.landed + stage * 8, NUM_COPIERS);
            if (FENCE == 1) make_barrier(ring.full + stage * 8, 1);
            make_barrier(ring.empty + stage * 8, NUM_MULTIPLIERS / 32);
        }
    }
    __syncthreads();
    await_inputs();
    const int num_tiles = product.num_row_tiles * ((product.num_strips + 8 * STRIPS - 1) / (8 * STRIPS));
    if (threadIdx.x < 128) {
        leave_registers<56>();
        for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
            const Work work = find_work<STRIPS>(product, tile);
            if (work.count == 0) continue;
            if (threadIdx.x < NUM_COPIERS) copy_rows<STRIPS>(product, work, ring);
#if FENCE == 1
            else relay_stages(product, ring);
#endif
        }
        return;
    }
    take_registers<224>();
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const Work work = find_work<STRIPS>(product, tile);
        if (work.count > 0) multiply<STRIPS>(product, work, ring);
    }
}

#else

template <int STRIPS>
__device__ __forceinline__ void run(const Product& product) {
    __trap();  // other architectures take product_tiled.cu
}

#endif

#define PRODUCT(STRIPS)                                                                                               \
    extern "C" __global__ void __launch_bounds__(384, 1) product_wgmma_##STRIPS(            \
        const char* quants, const char* scales, const char* minima, const float* bias, const float* up_bias,          \
        const __half* x, void* values, const int* row_ids, const int4* groups, int x_pitch, int pitch, int num_rows,  \
        int num_outputs, int column_tiles, int epilogue, int num_strips, int tile_rows, int num_row_tiles) {          \
        run<STRIPS>({{quants, scales, minima}, {values, bias, up_bias, pitch, num_outputs, epilogue}, x, row_ids,     \
                     groups, x_pitch, num_rows, column_tiles, num_strips, tile_rows, num_row_tiles});                 \
    }

PRODUCT(1)
#if FAMILY <= 1  // of wider weights the registers do not hold two strips
PRODUCT(2)
#endif
