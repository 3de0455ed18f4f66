// Products of one row: out = epilogue(x @ matrix + bias), one stream's decoding, so bound by the matrix's bytes. For
// families whose exact codes are multiplied and whose sums are scaled (weights.cuh).
//
// A block takes some strips of 16 outputs and cuts the sequence of their tiles into one range for each of its warps.
// A warp streams its range, GROUP tiles at a time, through a ring in shared memory whose slots are private to each lane,
// so that nothing but the lane's own copies is waited for, and the first slots are on their way before the kernel before
// this one ends. A tensor core multiplies with 8 columns where one is wanted: column g is block g of the group, and of
// the product with block j column j is taken, so that a lane loads x once for a group, and lane t scales tile t's sums.
// Sums of strips go to shared memory; what several ranges have of one is added up in their order.
// x: a row of half; or, with `norm_weight`, a row of float that each block puts through RMSNorm on its way to shared
// memory. Experts: with the router's `logits` each block chooses `num_used` of `num_experts` by itself. A block of grid
// row y takes the y-th best one and row y of out; summed, a block takes all of them, the y-th with row y of x, and out +=
// sum over them of weight (x @ matrix + bias).
// Launch: grid (blocks, num_used or 1), at most a block for each strip and at least one for each 128; 32 WARPS threads;
// shared memory as `one_row_shared` in products.py reckons. Logits may be read before the wait if `are_logits_early`.
// -D FAMILY, WARPS of a block, DEPTH of a ring in groups.
// Moves: the matrix, or the parts of its groups, once; each block its row of x, from the second cache.
#include "choose.cuh"
#include "epilogue.cuh"
#include "weights.cuh"

#if FAMILY <= 1

constexpr int MAX_USED = 8;
constexpr int GROUP = FAMILY == 0 ? 4 : 2;  // tiles
constexpr int GROUP_BYTES = GROUP * (NUM_LOADS * 512) + 32 * SCALE_BYTES;
constexpr int NUM_WARPS = WARPS, NUM_THREADS = 32 * NUM_WARPS;
constexpr int HELD = 3072 / NUM_THREADS;      // values of x that a thread holds while they are normalised
constexpr int CHUNKS_HELD = 6;                // of 8 halves, that a thread holds on their way to shared memory
constexpr int MAX_STRIPS = 128;               // of a block
constexpr int HELD_STRIPS = 8;                // of a block and its experts, whose biases and residuals are held

// What a warp copies next: the lane's share of its codes, and of the scales of the group's tile t.
struct Ahead {
    const char* codes;
    const char* scales;
    int column, part, strip, left;
};

// Adds a group's products to the sums of rows g and g + 8; lane t has the scales of tile t, `scales` holds none for tiles
// that are not there. The loop is short so that it stays in the innermost instruction cache.
__device__ __forceinline__ void multiply_group(const char* codes, const float (&scales)[2][2], const uint4& x, int t,
                                               float (&sums)[2]) {
#pragma unroll 2
    for (int i = 0; i < GROUP; i++) {
        Tile tile;
#pragma unroll
        for (int load = 0; load < NUM_LOADS; load++) tile.codes[load] = *reinterpret_cast<const uint4*>(codes + load * 512);
        codes += NUM_LOADS * 512;
#pragma unroll
        for (int block = 0; block < 2; block++) {
            uint32_t low[4], high[4];
            decode(tile, block, 0, low);
            decode(tile, block, 1, high);
            float c[4];
            multiply(c, low[0], high[0], low[1], high[1], x.x, x.y);
            multiply_add(c, low[2], high[2], low[3], high[3], x.z, x.w);
            if (t == i) {
                sums[0] += c[block] * scales[block][0];
                sums[1] += c[2 + block] * scales[block][1];
            }
        }
    }
}

template <int EPILOGUE, bool IS_SUMMED>
__device__ __forceinline__ void stream(const Planes& planes, const Output& out,
                                       const void* x,             // (rows, x_pitch) half, or with norm_weight float
                                       const float* norm_weight,  // (x_width,) or null
                                       const float* logits,       // (num_experts,) or null
                                       int x_pitch, int x_width, int column_tiles, int num_strips, int num_experts,
                                       int num_used, bool are_logits_early, float epsilon) {
    extern __shared__ uint4 memory[];
    __shared__ int experts[MAX_USED];
    __shared__ float weights[MAX_USED];
    __shared__ float shares[MAX_STRIPS][16];  // strips' sums; of those that several ranges share, what the first had
    __shared__ float later[NUM_WARPS][16];    // what each warp adds to a strip that an earlier one began
    __shared__ int later_strips[NUM_WARPS];   // which that is, or -1
    __shared__ float biases[HELD_STRIPS * 16], residuals[HELD_STRIPS * 16];
    __shared__ float squares[NUM_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int x_stride = (column_tiles + GROUP) * 64;  // halves; a last group's missing tiles are zero
    const int num_parts = IS_SUMMED ? num_used : 1, chunks = column_tiles * 8, num_chunks = chunks * num_parts;

    // x before weights, where both are to be waited for: what is asked for later comes later.
    uint4 held[CHUNKS_HELD];
    auto load_x = [&](int first_chunk) {
#pragma unroll
        for (int j = 0; j < CHUNKS_HELD; j++) {
            const int index = first_chunk + j * NUM_THREADS, own = IS_SUMMED ? index / chunks : 0;
            if (index < num_chunks)
                held[j] = *reinterpret_cast<const uint4*>(static_cast<const __half*>(x) + static_cast<size_t>(own) * x_pitch +
                                                          (index - own * chunks) * 8);
        }
    };
    const bool is_early = logits == nullptr || are_logits_early;
    if (!is_early) {
        await_inputs();
        start_dependents();
        load_x(threadIdx.x);
    }
    if (logits != nullptr) {
        if (warp == 0) choose(logits, num_experts, num_used, experts, weights);
        __syncthreads();
    }
    const int expert = logits == nullptr ? 0 : experts[blockIdx.y];  // not summed
    const int begin = static_cast<unsigned>(blockIdx.x * num_strips) / gridDim.x;
    const int end = static_cast<unsigned>((blockIdx.x + 1) * num_strips) / gridDim.x;
    const int strip_tiles = num_parts * column_tiles, num_tiles = (end - begin) * strip_tiles;

    char* const ring = reinterpret_cast<char*>(memory) + warp * DEPTH * GROUP_BYTES;
    __half* x_shared = reinterpret_cast<__half*>(reinterpret_cast<char*>(memory) + NUM_WARPS * DEPTH * GROUP_BYTES);
    const int first = num_tiles * warp / NUM_WARPS, last = num_tiles * (warp + 1) / NUM_WARPS;
    int strip = first / column_tiles, part = 0, column = first - strip * column_tiles;
    if (IS_SUMMED) part = strip, strip /= num_parts, part -= strip * num_parts;
    // What is copied runs ahead of what is multiplied; where parts change it goes on at the next one.
    Ahead ahead = {nullptr, nullptr, column, part, strip, last - first};
    auto seek = [&]() {
        const size_t tile =
            (static_cast<size_t>(IS_SUMMED ? experts[ahead.part] : expert) * num_strips + begin + ahead.strip) * column_tiles +
            ahead.column;
        ahead.codes = planes.quants + tile * (NUM_LOADS * 512) + lane * 16;
        ahead.scales = planes.scales + (tile + t) * (8 * SCALE_BYTES) + g * SCALE_BYTES;
    };
    seek();
    const uint32_t codes_ring = static_cast<uint32_t>(__cvta_generic_to_shared(ring)) + lane * 16;
    const uint32_t scales_ring = codes_ring + GROUP * (NUM_LOADS * 512) + lane * (SCALE_BYTES - 16);
    auto copy_group = [&](int slot) {
        const int count = min(min(GROUP, column_tiles - ahead.column), ahead.left);
#pragma unroll
        for (int i = 0; i < GROUP; i++)
            if (i < count) {
#pragma unroll
                for (int load = i * NUM_LOADS; load < (i + 1) * NUM_LOADS; load++)
                    copy_async<16>(codes_ring + slot + load * 512, ahead.codes + load * 512);
            }
        if (t < count) copy_async<SCALE_BYTES>(scales_ring + slot, ahead.scales);
        end_copies();
        ahead.codes += count * (NUM_LOADS * 512);
        ahead.scales += count * (8 * SCALE_BYTES);
        ahead.column += count;
        ahead.left -= count;
        if (IS_SUMMED ? ahead.column == column_tiles : false) {
            ahead.column = 0;
            if (++ahead.part == num_parts) ahead.part = 0, ahead.strip++;
            if (ahead.left > 0) seek();
        } else if (ahead.column == column_tiles) {
            ahead.column = 0;
        }
    };
#pragma unroll 1
    for (int slot = 0; slot < DEPTH * GROUP_BYTES; slot += GROUP_BYTES) copy_group(slot);
    if (lane == 0) later_strips[warp] = -1;

    // What the last step of all adds is asked for after x, which would come behind it: to shared memory or, where it is
    // much, to the second cache.
    const bool are_held = (end - begin) * num_parts <= HELD_STRIPS;
    constexpr int STRIP_OUTPUTS = EPILOGUE == SWIGLU ? 8 : 16;  // of gate and of up each, where a strip has both
    auto bias_of = [&](int own_strip, int part, int output) {   // of a strip's 16
        const int own = IS_SUMMED ? experts[part] : expert;
        const float* bias = output >= STRIP_OUTPUTS ? out.up_bias - STRIP_OUTPUTS : out.bias;
        return bias + static_cast<size_t>(own) * out.num_outputs + (begin + own_strip) * STRIP_OUTPUTS + output;
    };
    auto is_output = [&](int own_strip, int output) {
        return (begin + own_strip) * STRIP_OUTPUTS + output % STRIP_OUTPUTS < out.num_outputs;
    };
    const int row = IS_SUMMED ? 0 : blockIdx.y;
    const float* residual = static_cast<const float*>(out.values) + static_cast<size_t>(row) * out.pitch + begin * 16;
    auto hold_added = [&]() {
        for (int i = threadIdx.x; out.bias != nullptr && i < (end - begin) * num_parts * 16; i += NUM_THREADS) {
            const int own_strip = i / 16 / num_parts, part = i / 16 % num_parts;
            if (!is_output(own_strip, i % 16)) continue;
            if (are_held)
                copy_async<4>(&biases[i], bias_of(own_strip, part, i % 16));
            else if (i % 8 == 0)
                prefetch(bias_of(own_strip, part, i % 16));
        }
        if constexpr (EPILOGUE == RESIDUAL)
            for (int i = threadIdx.x; are_held && i < (end - begin) * 16; i += NUM_THREADS)
                if (is_output(i / 16, i % 16)) copy_async<4>(&residuals[i], residual + i);
    };
    if (norm_weight != nullptr) {
        float values[HELD], factors[HELD], square = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int own = threadIdx.x + i * NUM_THREADS;
            factors[i] = own < x_width ? norm_weight[own] : 0.0f;
        }
        await_inputs();
        start_dependents();
        const float* source = static_cast<const float*>(x);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int own = threadIdx.x + i * NUM_THREADS;
            values[i] = own < x_width ? source[own] : 0.0f;
        }
        hold_added();
#pragma unroll
        for (int i = 0; i < HELD; i++) square += values[i] * values[i];
        for (int own = threadIdx.x + HELD * NUM_THREADS; own < x_width; own += NUM_THREADS) square += source[own] * source[own];
        square = warp_sum(square);
        if (lane == 0) squares[warp] = square;
        __syncthreads();
        square = 0.0f;
#pragma unroll
        for (int i = 0; i < NUM_WARPS; i++) square += squares[i];
        const float factor = 1.0f / sqrtf(square / x_width + epsilon);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int own = threadIdx.x + i * NUM_THREADS;
            if (own < column_tiles * 64) x_shared[own] = to_half(values[i] * factor * factors[i]);
        }
        for (int own = threadIdx.x + HELD * NUM_THREADS; own < column_tiles * 64; own += NUM_THREADS)
            x_shared[own] = own < x_width ? to_half(source[own] * factor * norm_weight[own]) : __half();
    } else {
        if (is_early) {
            await_inputs();
            start_dependents();
            load_x(threadIdx.x);
        }
        hold_added();
        for (int first_chunk = threadIdx.x; first_chunk < num_chunks; first_chunk += CHUNKS_HELD * NUM_THREADS) {
            if (first_chunk != threadIdx.x) load_x(first_chunk);
#pragma unroll
            for (int j = 0; j < CHUNKS_HELD; j++) {
                const int index = first_chunk + j * NUM_THREADS, own = IS_SUMMED ? index / chunks : 0;
                if (index < num_chunks)
                    *reinterpret_cast<uint4*>(x_shared + own * x_stride + (index - own * chunks) * 8) = held[j];
            }
        }
    }
    for (int i = threadIdx.x; i < num_parts * GROUP * 8; i += NUM_THREADS)
        *reinterpret_cast<uint4*>(x_shared + i / (GROUP * 8) * x_stride + column_tiles * 64 + i % (GROUP * 8) * 8) =
            make_uint4(0, 0, 0, 0);
    __syncthreads();

    float sums[2] = {}, totals[2] = {};
    bool is_first = column == 0 && part == 0;  // whether the strip began with this warp
    int slot = 0;
    const __half* own_x = x_shared + g % (2 * GROUP) * 32 + t * 8;
#pragma unroll 1
    for (int left = last - first; left > 0;) {
        const int count = min(min(GROUP, column_tiles - column), left);
        const uint4 group_x = *reinterpret_cast<const uint4*>(own_x + part * x_stride + column * 64);
        await_copies<DEPTH - 1>();
        Tile tile;
        const char* own_scales = ring + slot + GROUP * (NUM_LOADS * 512) + lane * SCALE_BYTES;
#if FAMILY == 0
        tile.scales = t < count ? *reinterpret_cast<const uint32_t*>(own_scales) : 0;
#else
        tile.scales = t < count ? *reinterpret_cast<const uint2*>(own_scales) : make_uint2(0, 0);
#endif
        const float scales[2][2] = {{scale_of(tile, 0, 0), scale_of(tile, 0, 1)}, {scale_of(tile, 1, 0), scale_of(tile, 1, 1)}};
        multiply_group(ring + slot + lane * 16, scales, group_x, t, sums);
        copy_group(slot);
        slot = slot + GROUP_BYTES == DEPTH * GROUP_BYTES ? 0 : slot + GROUP_BYTES;
        left -= count;
        column += count;
        if (column < column_tiles && left > 0) continue;

        const float weight = IS_SUMMED ? weights[part] : 1.0f;
        totals[0] += sums[0] * weight, totals[1] += sums[1] * weight;
        sums[0] = sums[1] = 0.0f;
        const int own_strip = strip;
        if (column == column_tiles) {
            column = 0;
            if (!IS_SUMMED || ++part == num_parts) part = 0, strip++;
        }
        if (strip == own_strip && left > 0) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            totals[i] += __shfl_xor_sync(0xffffffffu, totals[i], 1);
            totals[i] += __shfl_xor_sync(0xffffffffu, totals[i], 2);
        }
        float* own = is_first ? shares[own_strip] : later[warp];
        if (t == 0) own[g] = totals[0], own[g + 8] = totals[1];
        if (!is_first && lane == 0) later_strips[warp] = own_strip;
        is_first = true;
        totals[0] = totals[1] = 0.0f;
    }
    end_copies();  // those of a warp without tiles, too
    await_copies<0>();
    __syncthreads();

    // Output i % 8 of a strip and the one eight on; what later ranges have of it comes in their order.
    for (int i = threadIdx.x; i < (end - begin) * 8; i += NUM_THREADS) {
        const int output = i % 8, own_strip = i / 8;
        float low = shares[own_strip][output], high = shares[own_strip][output + 8];
#pragma unroll
        for (int other = 1; other < NUM_WARPS; other++)
            if (later_strips[other] == own_strip) low += later[other][output], high += later[other][output + 8];
        low *= SUM_FACTOR, high *= SUM_FACTOR;
        const bool is_low = is_output(own_strip, output), is_high = is_output(own_strip, output + 8);
        if (out.bias != nullptr) {
            for (int part = 0; part < num_parts; part++) {
                const float* held = biases + (own_strip * num_parts + part) * 16 + output;
                const float weight = IS_SUMMED ? weights[part] : 1.0f;
                if (is_low) low += weight * (are_held ? held[0] : *bias_of(own_strip, part, output));
                if (is_high) high += weight * (are_held ? held[8] : *bias_of(own_strip, part, output + 8));
            }
        }
        if (EPILOGUE == RESIDUAL && are_held) {
            const float* held_residuals = residuals + own_strip * 16 + output;
            finish_sums<STORE>(out, begin + own_strip, output, row, held_residuals[0] + low, held_residuals[8] + high);
        } else {
            finish_sums<EPILOGUE>(out, begin + own_strip, output, row, low, high);
        }
    }
}

#define PRODUCT(NAME, EPILOGUE, IS_SUMMED)                                                                             \
    extern "C" __global__ void __launch_bounds__(NUM_THREADS, 24 / NUM_WARPS) NAME(                                    \
        const char* quants, const char* scales, const char* minima, const float* bias, const float* up_bias,           \
        const void* x, const float* norm_weight, void* values, const float* logits, int x_pitch, int x_width,          \
        int pitch, int num_outputs, int column_tiles, int num_strips, int num_experts, int num_used,                   \
        int are_logits_early, float epsilon) {                                                                         \
        stream<EPILOGUE, IS_SUMMED>({quants, scales, minima}, {values, bias, up_bias, pitch, num_outputs, EPILOGUE}, x,\
                                    norm_weight, logits, x_pitch, x_width, column_tiles, num_strips, num_experts,      \
                                    num_used, are_logits_early != 0, epsilon);                                         \
    }

PRODUCT(product_one_store, STORE, false)
PRODUCT(product_one_residual, RESIDUAL, false)
PRODUCT(product_one_gelu, GELU, false)
PRODUCT(product_one_swiglu, SWIGLU, false)
PRODUCT(product_summed, RESIDUAL, true)

#endif
