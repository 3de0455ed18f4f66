// Products of many rows on Hopper: out = epilogue(x @ matrix + bias), in tiles of up to 128 rows by 256 outputs.
//
// Four warps copy x and the matrix to shared memory, a stage of 64 columns at a time. Two groups of four warps multiply,
// each its half of the outputs, STRIPS strips of 16 to a warp. The matrix is the operand in registers: a lane's share of
// a tile of cuda.v1 is its share of wgmma's a, decoded and scaled while the products before run. x is the operand in
// shared memory, spread (spread.cuh), and what is written in half for the next product is spread too. Both groups read
// the same stages but do not wait for each other, so that one multiplies while the other stores. Blocks stay and take
// one tile after another; the copies run ahead across tiles.
//
// Scales are multiplied into the weights, in half. MXFP4's are powers of two, taken relative to the largest of the
// row: exact within 2^24 of it, and what is smaller than 2^-27 of it is zero. Others round, by 2^-11 at most.
// Sums are in float, over the columns in order; a row's do not depend on other rows.
// Grouped (experts): as in product.cu, groups of at most 128 rows.
// Launch: grid (min(multiprocessors, tiles)), 384 threads, dynamic shared memory for NUM_STAGES (a -D); sm_90a.
// Moves: the matrix once for each row tile or group, x once for each 128 STRIPS outputs.
#include "epilogue.cuh"
#include "spread.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

constexpr int NUM_THREADS = 384;

struct Product {
    Planes planes;
    Output out;
    const __half* x;     // (rows, x_pitch)
    const int* row_ids;  // of x, for each row of out; null: the same row
    const int4* groups;  // (num_row_tiles,) or null
    int x_pitch, num_rows, column_tiles, num_strips, tile_rows, num_row_tiles;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int NUM_COPIERS = 128;  // threads; the others multiply
constexpr int MAX_ROWS = 128;
constexpr int ROW_BYTES = 128;  // of a stage: 64 columns
constexpr int X_BYTES = MAX_ROWS * ROW_BYTES;
constexpr int MAX_STRIPS = FAMILY <= 1 ? 2 : 1;       // of a warp, for which it has registers
constexpr int TILE_CODES = NUM_LOADS * 512;           // of a strip's tile
constexpr int TILE_SCALES = FAMILY == 0 ? 32 : FAMILY == 1 ? 64 : FAMILY == 2 ? 128 : FAMILY == 3 ? 256 : 0;
constexpr int TILE_MINIMA = FAMILY == 2 ? 128 : 0;
constexpr int SCALES_AT = 8 * MAX_STRIPS * TILE_CODES, MINIMA_AT = SCALES_AT + 8 * MAX_STRIPS * TILE_SCALES;
constexpr int STAGE_BYTES = MINIMA_AT + 8 * MAX_STRIPS * TILE_MINIMA;  // of weights
constexpr int BAND = 16;  // row tiles that pass all outputs before the next ones come: their x stays in the second cache
constexpr int LAG = 3;    // stages that one group keeps behind the other

// Where the stages and their barriers lie in shared memory.
struct Ring {
    uint32_t x, weights, full, empty;
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == NUM_STAGES) stage = 0, phase ^= 1;
    }
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

template <int STRIPS>
__device__ __forceinline__ void copy_tiles(const Product& product, const Work& work, Ring& ring) {
    // The thread copies 16 bytes of every STEP-th row.
    constexpr int STEP = NUM_COPIERS / 8, NUM_STEPS = MAX_ROWS / STEP;
    const int piece = threadIdx.x % 8, first = threadIdx.x / 8, column_tiles = product.column_tiles;
    uint32_t offsets[NUM_STEPS];
#pragma unroll
    for (int i = 0; i < NUM_STEPS; i++) {
        const int row = work.start + min(STEP * i + first, work.count - 1);
        offsets[i] = (product.row_ids == nullptr ? row : product.row_ids[row]) * product.x_pitch + piece * 8;
    }
    const uint32_t place = first * ROW_BYTES + (piece ^ first % 8) * 16;  // STEP is a multiple of eight
    const int num_strips = product.num_strips - work.first_strip;
    const size_t tile = (static_cast<size_t>(work.expert) * product.num_strips + work.first_strip) * column_tiles;
    for (int column_tile = 0; column_tile < column_tiles; column_tile++) {
        await_barrier(ring.empty + ring.stage * 8, ring.phase ^ 1);
        const uint32_t weights = ring.weights + ring.stage * STAGE_BYTES;
        const Planes& planes = product.planes;
        const size_t index = tile + column_tile;
        copy_plane<STRIPS, TILE_CODES>(weights, planes.quants + index * TILE_CODES, num_strips,
                                       column_tiles * TILE_CODES);
#if FAMILY <= 3
        copy_plane<STRIPS, TILE_SCALES>(weights + SCALES_AT, planes.scales + index * TILE_SCALES, num_strips,
                                        column_tiles * TILE_SCALES);
#endif
#if FAMILY == 2
        copy_plane<STRIPS, TILE_MINIMA>(weights + MINIMA_AT, planes.minima + index * TILE_MINIMA, num_strips,
                                        column_tiles * TILE_MINIMA);
#endif
        const __half* source = product.x + column_tile * 64;
        const uint32_t stage = ring.x + ring.stage * X_BYTES + place;
#pragma unroll
        for (int i = 0; i < NUM_STEPS; i++)
            if (STEP * i + first < work.count) copy_async<16>(stage + i * STEP * ROW_BYTES, source + offsets[i]);
        arrive_with_copies(ring.full + ring.stage * 8);
        ring.advance();
    }
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

__device__ __forceinline__ void store_strip(const Product& product, const Work& work, int strip, const int (&largest)[2],
                                            float (&sums)[MAX_ROWS / 2]) {
    if (strip >= product.num_strips) return;
    const Output& out = product.out;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float low_factor = factor_of(largest[0]), high_factor = factor_of(largest[1]);
    const size_t first_row = work.start + 2 * t, first_bias = static_cast<size_t>(work.expert) * out.num_outputs;
    // Column 8 j + 2 t + i of the sums is row `first_row` + 8 j + i.
    if (out.epilogue == SWIGLU) {
        // Lanes of neighbouring outputs exchange rows, so that each writes two outputs of one row.
        const int output = strip * 8 + g, pair = strip * 8 + g - g % 2;
        const bool is_output = output < out.num_outputs;
        const float bias = is_output ? out.bias[first_bias + output] : 0.0f;
        const float up_bias = is_output ? out.up_bias[first_bias + output] : 0.0f;
        __half* values = static_cast<__half*>(out.values) + (first_row + g % 2) * out.pitch + spread(pair);
#pragma unroll
        for (int j = 0; j < MAX_ROWS / 8; j++) {
            float activated[2];  // of an output that is none: zero, since its weights are
#pragma unroll
            for (int i = 0; i < 2; i++)
                activated[i] = swiglu(sums[4 * j + i] * low_factor + bias, sums[4 * j + i + 2] * high_factor + up_bias);
            const bool is_odd = g % 2 == 1;
            const float own = is_odd ? activated[1] : activated[0];
            const float other = __shfl_xor_sync(0xffffffffu, is_odd ? activated[0] : activated[1], 4);
            const __half2 both = __halves2half2(to_half(is_odd ? other : own), to_half(is_odd ? own : other));
            if (pair < out.num_outputs && 8 * j + 2 * t + g % 2 < work.count)
                *reinterpret_cast<__half2*>(values + static_cast<size_t>(8 * j) * out.pitch) = both;
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
            __half* values = static_cast<__half*>(out.values) + first_row * out.pitch + spread(output);
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
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column_tiles = product.column_tiles;
    const int first = (warp / 4 - NUM_COPIERS / 128) * 4 * STRIPS + warp % 4;  // of the tile's strips; the next is 4 on
    int largest[STRIPS][2] = {};
    if (FAMILY == 0)
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            const int strip = min(work.first_strip + first + 4 * s, product.num_strips - 1);
            const size_t tile = (static_cast<size_t>(work.expert) * product.num_strips + strip) * column_tiles;
            find_largest(product.planes, tile, column_tiles, lane, largest[s]);
        }
    Tile tiles[STRIPS];
    uint32_t a[2][STRIPS][2][4];
    float sums[STRIPS][MAX_ROWS / 2];
    const auto begin_stage = [&] {
        await_barrier(ring.full + ring.stage * 8, ring.phase);
        show_to_products();
        const uint32_t weights = ring.weights + ring.stage * STAGE_BYTES;
#pragma unroll
        for (int s = 0; s < STRIPS; s++) take_tile(tiles[s], weights, first + 4 * s, lane);
#pragma unroll
        for (int s = 0; s < STRIPS; s++) decode_scaled(tiles[s], 0, largest[s], a[0][s]);
    };
    begin_stage();
    int last_stage = -1;
    for (int column_tile = 0; column_tile < column_tiles; column_tile++) {
        const uint64_t b = operand(ring.x + ring.stage * X_BYTES);
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
            if (block == 0) {
                if (last_stage >= 0 && lane == 0) arrive(ring.empty + last_stage * 8);
#pragma unroll
                for (int s = 0; s < STRIPS; s++) decode_scaled(tiles[s], 1, largest[s], a[1][s]);
                last_stage = ring.stage;
                ring.advance();
            } else if (column_tile + 1 < column_tiles) {
                begin_stage();
            }
        }
    }
    await_products<0>();
    if (lane == 0) arrive(ring.empty + last_stage * 8);
#pragma unroll
    for (int s = 0; s < STRIPS; s++) store_strip(product, work, work.first_strip + first + 4 * s, largest[s], sums[s]);
}

template <int STRIPS>
__device__ __forceinline__ void run(const Product& product) {
    extern __shared__ char memory[];
    Ring ring;
    ring.x = (shared_address(memory) + 1023) & ~1023u;
    asm volatile("" : "+r"(ring.x));  // kept, not reckoned again
    ring.weights = ring.x + NUM_STAGES * X_BYTES;
    ring.full = ring.weights + NUM_STAGES * STAGE_BYTES;
    ring.empty = ring.full + NUM_STAGES * 8;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < NUM_STAGES; stage++) {
            make_barrier(ring.full + stage * 8, NUM_COPIERS);
            make_barrier(ring.empty + stage * 8, (NUM_THREADS - NUM_COPIERS) / 32);
        }
    }
    show_to_products();
    __syncthreads();
    await_inputs();
    start_dependents();
    const int num_tiles = product.num_row_tiles * ((product.num_strips + 8 * STRIPS - 1) / (8 * STRIPS));
    if (threadIdx.x < NUM_COPIERS) {
        leave_registers<40>();
        for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
            const Work work = find_work<STRIPS>(product, tile);
            if (work.count > 0) copy_tiles<STRIPS>(product, work, ring);
        }
        return;
    }
    take_registers<232>();
    // One group keeps behind the other, and multiplies alone while that one stores its sums.
    bool is_ahead = threadIdx.x >= NUM_COPIERS + 128 && product.column_tiles > LAG;
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const Work work = find_work<STRIPS>(product, tile);
        if (work.count == 0) continue;
        // A block may have no work at all, and then no stage ever comes.
        if (is_ahead) await_barrier(ring.full + LAG * 8, 0);
        is_ahead = false;
        multiply<STRIPS>(product, work, ring);
    }
}

#else

template <int STRIPS>
__device__ __forceinline__ void run(const Product& product) {
    __trap();  // other architectures take product_tiled.cu
}

#endif

#define PRODUCT(STRIPS)                                                                                               \
    extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) product_wgmma_##STRIPS(            \
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
