// Products of some and many rows on Hopper: out = epilogue(x @ matrix + bias), in tiles of three sizes, as -D's say.
//
// High ones, up to 256 rows by 128 outputs, decode a weight once for the most rows; wide ones, up to 128 rows by 256, read x
// less often; low ones, up to 64 rows by 256 outputs, have the most warps that decode, for experts with few rows each.
// One thread copies x and the matrix to shared memory, NUM_GROUPS groups of four warps multiply (wgmma_tiles.cuh), two of
// them in turns. What is written in half for the next product is spread as x is. Blocks stay and take one tile after
// another; the copies run ahead across tiles.
//
// Weights round as wgmma_tiles.cuh says. Sums are in float, over the columns in order; a row's do not depend on other rows.
// Grouped (experts): as in product.cu, groups of at most TILE_ROWS rows, which lie in x in the order of the groups.
// Launch: grid (min(multiprocessors, tiles)), 128 (1 + NUM_GROUPS) threads, dynamic shared memory for NUM_STAGES; sm_90a.
// Low tiles store or activate their sums; the others add or apply GELU as well.
// Moves: the matrix once for each row tile or group, x once for each tile's outputs.
#include "epilogue.cuh"
#include "spread.cuh"
#include "tensor_map.cuh"
#include "weights.cuh"

constexpr int NUM_THREADS = 128 + 128 * NUM_GROUPS;

struct Product {
    const Output& out;
    const int4* groups;  // (num_row_tiles,) or null
    int num_rows, column_tiles, num_strips;
    int tile_strips, tile_rows;            // of a tile, at most
    int num_row_tiles, across, num_tiles;  // across: tiles of all outputs
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int STRIPS = WARP_STRIPS, MAX_STRIPS = STRIPS, MAX_ROWS = TILE_ROWS;
constexpr bool IS_LOW = NUM_GROUPS == 4, TAKES_TURNS = !IS_LOW;
constexpr int COPIER_REGISTERS = IS_LOW ? 32 : 40, REGISTERS = IS_LOW ? 112 : 232;
#include "wgmma_tiles.cuh"

// Row tiles that pass all outputs before the next ones come: their x stays in the second cache.
constexpr int BAND = 2048 / MAX_ROWS;

struct Work {
    int expert, start, count, first_strip;
};

__device__ __forceinline__ Work find_work(const Product& product, int tile) {
    const int across = product.across;
    if (product.groups != nullptr) {
        const int4 group = product.groups[tile / across];
        const int first_strip = tile % across * product.tile_strips;
        return {shared_by_lanes(group.x), shared_by_lanes(group.y), shared_by_lanes(group.z), first_strip};
    }
    const int band = tile / (BAND * across), rest = tile % (BAND * across);
    const int tall = min(BAND, product.num_row_tiles - band * BAND);
    const int start = (band * BAND + rest % tall) * product.tile_rows;
    return {0, start, min(product.tile_rows, product.num_rows - start), rest / tall * product.tile_strips};
}

__device__ __forceinline__ void copy_stages(const Product& product, const Maps& maps, const Work& work, Ring& ring) {
    const int strip = work.expert * product.num_strips + work.first_strip;
    for (int column_tile = 0; column_tile < product.column_tiles; column_tile += STAGE_TILES) {
        const uint32_t full = ring.full + ring.stage * 8;
        await_barrier(ring.empty + ring.stage * 8, ring.phase ^ 1);
        copy_weights(maps, ring.weights + ring.stage * STAGE_BYTES, column_tile, strip, product.tile_strips,
                     column_tile == 0, full);
        copy_rows(maps, ring.x + ring.stage * X_BYTES, column_tile, work.start, work.count, full);
        ring.advance();
    }
}

// The compiler does not reckon with where the pointer will be: registers do not hold the places of all rows.
template <typename T>
__device__ __forceinline__ void advance(T*& pointer, size_t count) {
    pointer += count;
    asm volatile("" : "+l"(pointer));
}

// What is added to the sums of the lane's outputs g and g + 8 of a strip, with SWIGLU gate g and up g.
__device__ __forceinline__ float2 load_biases(const Product& product, const Work& work, int strip) {
    const Output& out = product.out;
    const int g = threadIdx.x % 32 / 4, first = work.expert * out.num_outputs;
    const bool is_paired = out.epilogue == SWIGLU;
    const int low = strip * (is_paired ? 8 : 16) + g, high = is_paired ? low : low + 8;
    const float* high_bias = is_paired ? out.up_bias : out.bias;
    if (out.bias == nullptr) return {0.0f, 0.0f};
    return {low < out.num_outputs ? out.bias[first + low] : 0.0f, high < out.num_outputs ? high_bias[first + high] : 0.0f};
}

template <int SIZE>
__device__ __forceinline__ void store_strip(const Product& product, const Work& work, int strip, const Largest& largest,
                                            const float2& biases, float (&sums)[SIZE]) {
    constexpr int ROWS = 2 * SIZE;
    if (strip >= min(product.num_strips, work.first_strip + product.tile_strips)) return;
    const Output& out = product.out;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float low_factor = largest.factor(0), high_factor = largest.factor(1);
    const size_t first_row = work.start + 2 * t;
    // Column 8 j + 2 t + i of the sums is row `first_row` + 8 j + i.
    if (out.epilogue == SWIGLU) {
        // Lanes of neighbouring outputs exchange rows, so that each writes two outputs of one row.
        const int pair = strip * 8 + g - g % 2;
        __half* values = static_cast<__half*>(out.values) + (first_row + g % 2) * out.pitch + spread(pair);
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
            if (8 * j >= work.count) break;
            float activated[2];  // of an output that is none: zero, since its weights are
#pragma unroll
            for (int i = 0; i < 2; i++)
                activated[i] = swiglu(sums[4 * j + i] * low_factor + biases.x, sums[4 * j + i + 2] * high_factor + biases.y);
            const bool is_odd = g % 2 == 1;
            const float own = is_odd ? activated[1] : activated[0];
            const float other = __shfl_xor_sync(0xffffffffu, is_odd ? activated[0] : activated[1], 4);
            const __half2 both = __halves2half2(to_half(is_odd ? other : own), to_half(is_odd ? own : other));
            if (pair < out.num_outputs && 8 * j + 2 * t + g % 2 < work.count) *reinterpret_cast<__half2*>(values) = both;
            advance(values, 8 * static_cast<size_t>(out.pitch));
        }
        return;
    }
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const int output = strip * 16 + 8 * upper + g;
        if (output >= out.num_outputs) return;
        const float factor = upper ? high_factor : low_factor;
        const float bias = upper ? biases.y : biases.x;
        const size_t first = first_row * out.pitch + output;
        if (!IS_LOW && out.epilogue == GELU) {
            __half* values = static_cast<__half*>(out.values) + first_row * out.pitch + spread(output);
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++) {
                if (8 * j >= work.count) break;
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (8 * j + 2 * t + i < work.count)
                        values[i * static_cast<size_t>(out.pitch)] =
                            to_half(gelu(sums[4 * j + 2 * upper + i] * factor + bias));
                advance(values, 8 * static_cast<size_t>(out.pitch));
            }
            continue;
        }
        float* values = static_cast<float*>(out.values) + first;
#pragma unroll
        for (int j = 0; j < ROWS / 8; j += 2) {
            if (8 * j >= work.count) break;
            // All four that are added to are read before the first is written, else each would wait for the last.
            float* const rows[4] = {values, values + out.pitch, values + 8 * static_cast<size_t>(out.pitch),
                                    values + 9 * static_cast<size_t>(out.pitch)};
            float before[4] = {};
            if (!IS_LOW && out.epilogue == RESIDUAL)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (8 * (j + i / 2) + 2 * t + i % 2 < work.count) before[i] = *rows[i];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (8 * (j + i / 2) + 2 * t + i % 2 < work.count)
                    *rows[i] = sums[4 * (j + i / 2) + 2 * upper + i % 2] * factor + bias + before[i];
            advance(values, 16 * static_cast<size_t>(out.pitch));
        }
    }
}

// Low tiles have a loop of their own for up to 32 rows.
template <int ROWS = MAX_ROWS>
__device__ __forceinline__ void multiply(const Product& product, const Work& work, Ring& ring) {
    if constexpr (IS_LOW && ROWS > 32)
        if (work.count <= 32) return multiply<32>(product, work, ring);
    const int warp = warp_index(), column_tiles = product.column_tiles;
    const int first = (warp / 4 - NUM_COPIERS / 128) * 4 * STRIPS + warp % 4;  // of the tile's strips; the next is 4 on
    Largest largest[STRIPS];
    float2 biases[STRIPS];  // on their way while products run
#pragma unroll
    for (int s = 0; s < STRIPS; s++) biases[s] = load_biases(product, work, work.first_strip + first + 4 * s);
    float sums[STRIPS][ROWS / 2];
    if constexpr (IS_LOW)
        multiply_in_line(ring, first, (column_tiles + STAGE_TILES - 1) / STAGE_TILES, work.count, largest, sums);
    else
        multiply_stages<32>(ring, first, column_tiles, work.count, largest, sums);
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
        store_strip(product, work, work.first_strip + first + 4 * s, largest[s], biases[s], sums[s]);
}

__device__ __forceinline__ void run(const Product& product, const Maps& maps) {
    extern __shared__ char memory[];
    Ring ring((shared_address(memory) + 1023) & ~1023u);
    if (threadIdx.x == 0) ring.make_barriers();
    show_to_products();
    __syncthreads();
    await_inputs();
    start_dependents();
    const int num_tiles = product.num_tiles, warp = warp_index();
    if (warp < NUM_COPIERS / 32) {
        leave_registers<COPIER_REGISTERS>();
        if (threadIdx.x > 0) return;
        for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
            const Work work = find_work(product, tile);
            if (work.count > 0) copy_stages(product, maps, work, ring);
        }
        return;
    }
    take_registers<REGISTERS>();
    if (TAKES_TURNS && warp >= NUM_COPIERS / 32 + 4) pass_turn(0);
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const Work work = find_work(product, tile);
        if (work.count > 0) multiply(product, work, ring);
    }
}

#else

__device__ __forceinline__ void run(const Product& product, const Maps& maps) {
    __trap();  // other architectures take product_tiled.cu
}

#endif

// What comes before the maps has 48 bytes, since parameters begin 16 past a multiple of the 64 that they want.
extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) product_wgmma(
    const float* bias, const float* up_bias, void* values, const int4* groups, int pitch, int num_rows, int num_outputs,
    int column_tiles, const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap codes,
    const __grid_constant__ TensorMap scales, const __grid_constant__ TensorMap minima, int epilogue, int num_strips,
    int tile_strips, int tile_rows, int num_row_tiles, int across, int num_tiles) {
    const Output out = {values, bias, up_bias, pitch, num_outputs, epilogue};
    run({out, groups, num_rows, column_tiles, num_strips, tile_strips, tile_rows, num_row_tiles, across, num_tiles},
        {&rows, &codes, &scales, &minima});
}
