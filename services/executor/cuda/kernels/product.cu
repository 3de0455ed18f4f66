// Products of at most 8 rows: out = epilogue(x @ matrix + bias). Decoding's, so bound by the matrix's bytes.
//
// A block takes some strips of 16 outputs and cuts the sequence of their tiles into one range for each of its 8 warps.
// A warp streams its range through a ring in shared memory whose slots are private to each lane, so that nothing but
// the lane's own copies is waited for, and the first slots are on their way before the kernel before this one ends.
// Strips that lie in one range are finished from registers; what ranges share of a strip is added up in their order.
// A row's sum depends on neither the other rows nor their number. Sums are in float.
// x: rows of half, perhaps chosen by `row_ids`; or, with `norm_weight`, rows of float that each block puts through
// RMSNorm on their way to shared memory.
// Grouped (experts): `groups` lists (expert, first row, rows, 0); the rows of a group are those of one expert.
// Launch: grid (blocks, groups or 1), at most a block for each strip; 256 threads; shared memory as `few_rows_shared`
// in products.py reckons. Groups may be read before the wait if `are_groups_early`.
// Moves: the matrix once for each group; each block its rows of x, from the second cache.
#include "epilogue.cuh"
#include "weights.cuh"

constexpr int NUM_WARPS = 8;
constexpr int MAX_ROWS = 8;
constexpr int DEPTH = 40960 / NUM_WARPS / SLOT_BYTES > 1 ? 40960 / NUM_WARPS / SLOT_BYTES : 2;  // slots of a ring

// x / sqrt(mean(x^2) + epsilon) * weight of `count` rows, to shared memory. Loads are issued HELD at a time.
constexpr int HELD = 12;

__device__ __forceinline__ void normalise(const float* x, const float* weight, __half* target, int count, int size,
                                          int x_pitch, int pitch, float epsilon) {
    __shared__ float squares[MAX_ROWS][NUM_WARPS];
    for (int row = 0; row < count; row++) {
        const float* own = x + static_cast<size_t>(row) * x_pitch;
        float sum = 0.0f;
        for (int first = threadIdx.x; first < size; first += HELD * NUM_WARPS * 32) {
            float held[HELD];
#pragma unroll
            for (int i = 0; i < HELD; i++) held[i] = first + i * NUM_WARPS * 32 < size ? own[first + i * NUM_WARPS * 32] : 0.0f;
#pragma unroll
            for (int i = 0; i < HELD; i++) sum += held[i] * held[i];
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) squares[row][threadIdx.x / 32] = sum;
    }
    __syncthreads();
    for (int row = 0; row < count; row++) {
        const float* own = x + static_cast<size_t>(row) * x_pitch;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < NUM_WARPS; warp++) sum += squares[row][warp];
        const float factor = 1.0f / sqrtf(sum / size + epsilon);
        for (int first = threadIdx.x; first < size; first += HELD * NUM_WARPS * 32) {
            float held[HELD];
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const int column = first + i * NUM_WARPS * 32;
                held[i] = column < size ? own[column] * factor * weight[column] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (first + i * NUM_WARPS * 32 < size) target[row * pitch + first + i * NUM_WARPS * 32] = to_half(held[i]);
        }
    }
}

__device__ __forceinline__ void multiply_tile(const Tile& tile, const __half* x, float (&sums)[4]) {
#pragma unroll
    for (int block = 0; block < 2; block++) {
        uint32_t low[4], high[4];
        decode(tile, block, 0, low);
        decode(tile, block, 1, high);
        const uint4 b = *reinterpret_cast<const uint4*>(x + block * 32);
        if (IS_SCALED) {
            const float low_scale = scale_of(tile, block, 0), high_scale = scale_of(tile, block, 1);
            float c[4];
            multiply(c, low[0], high[0], low[1], high[1], b.x, b.y);
            multiply_add(c, low[2], high[2], low[3], high[3], b.z, b.w);
            sums[0] += c[0] * low_scale;
            sums[1] += c[1] * low_scale;
            sums[2] += c[2] * high_scale;
            sums[3] += c[3] * high_scale;
        } else {
            multiply_add(sums, low[0], high[0], low[1], high[1], b.x, b.y);
            multiply_add(sums, low[2], high[2], low[3], high[3], b.z, b.w);
        }
    }
}

#if FAMILY == 1 && __CUDA_ARCH__ >= 1200  // where three blocks leave it too few registers
constexpr int MIN_BLOCKS = 2;
#else
constexpr int MIN_BLOCKS = NUM_LOADS > 2 ? 2 : 3;
#endif

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, MIN_BLOCKS) product(
    const char* quants, const char* scales, const char* minima,
    const float* bias,         // (experts, num_outputs) or null
    const float* up_bias,      // (experts, num_outputs), with SWIGLU
    const void* x,             // (rows, x_pitch) half, or with norm_weight float
    const float* norm_weight,  // (x_width,) or null
    void* values,              // (rows, pitch)
    const int* row_ids,        // of x, for each row of out; null: the same row
    const int4* groups,        // (gridDim.y,) or null
    int x_pitch, int x_width, int pitch,
    int num_rows,              // at most 8; of a group
    int num_outputs, int column_tiles, int epilogue, int num_strips, int are_groups_early, float epsilon) {
    extern __shared__ uint4 memory[];
    __shared__ int firsts[NUM_WARPS];  // strips that ranges start in, of the block's
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const Planes planes = {quants, scales, minima};
    const Output out = {values, bias, up_bias, pitch, num_outputs, epilogue};
    const bool is_early = groups == nullptr || are_groups_early;
    const int x_stride = column_tiles * 64 + 32;  // halves; 64 bytes more than whole tiles spread rows over the banks
    const int columns = num_rows, partial_stride = columns + 1;

    if (!is_early) await_inputs();
    int expert = 0, start = 0, count = num_rows;
    if (groups != nullptr) {
        const int4 group = groups[blockIdx.y];
        expert = group.x, start = group.y, count = group.z;
    }
    const int begin = static_cast<unsigned>(blockIdx.x * num_strips) / gridDim.x;
    const int end = static_cast<unsigned>((blockIdx.x + 1) * num_strips) / gridDim.x;
    const int num_tiles = count == 0 ? 0 : (end - begin) * column_tiles;

    char* const ring = reinterpret_cast<char*>(memory) + warp * DEPTH * SLOT_BYTES;
    __half* x_shared = reinterpret_cast<__half*>(reinterpret_cast<char*>(memory) + NUM_WARPS * DEPTH * SLOT_BYTES);
    const int first = num_tiles * warp / NUM_WARPS, last = num_tiles * (warp + 1) / NUM_WARPS;
    int strip = first / column_tiles, column = first - strip * column_tiles;
    const int first_of_range = strip;
    if (lane == 0) firsts[warp] = first_of_range;
    TileStream stream(planes, (static_cast<size_t>(expert) * num_strips + begin) * column_tiles + first, lane);
    int to_copy = last - first;
    auto copy_next = [&](char* slot) {
        if (to_copy-- > 0) stream.copy(slot, lane);
        end_copies();
    };
    for (int slot = 0; slot < DEPTH; slot++) copy_next(ring + slot * SLOT_BYTES);

    if (is_early) await_inputs();
    start_dependents();
    if (count == 0) return;

    for (int i = threadIdx.x; i < count * (x_stride - x_width); i += blockDim.x)
        x_shared[i / (x_stride - x_width) * x_stride + x_width + i % (x_stride - x_width)] = __half();
    if (norm_weight != nullptr) {
        normalise(static_cast<const float*>(x) + static_cast<size_t>(start) * x_pitch, norm_weight, x_shared, count, x_width,
                  x_pitch, x_stride, epsilon);
    } else {
        constexpr int AT_ONCE = 6;
        const int chunks = column_tiles * 8;  // of 8 halves; rows of x are padded to whole tiles
        for (int i = threadIdx.x; i < count * chunks; i += AT_ONCE * NUM_WARPS * 32) {
            uint4 held[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int row = (i + j * NUM_WARPS * 32) / chunks, chunk = (i + j * NUM_WARPS * 32) % chunks;
                if (row >= count) break;
                const int from = row_ids == nullptr ? start + row : row_ids[start + row];
                const __half* whole = static_cast<const __half*>(x) + static_cast<size_t>(from) * x_pitch;
                held[j] = reinterpret_cast<const uint4*>(whole)[chunk];
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int row = (i + j * NUM_WARPS * 32) / chunks, chunk = (i + j * NUM_WARPS * 32) % chunks;
                if (row < count) reinterpret_cast<uint4*>(x_shared + row * x_stride)[chunk] = held[j];
            }
        }
    }
    __syncthreads();

    // The sums of what two ranges share: of each warp its first strip and its last, outputs by columns.
    float* partial = reinterpret_cast<float*>(x_shared + columns * x_stride);
    bool is_whole = column == 0;
    char* slot = ring;
    const __half* own_row = x_shared + min(g, count - 1) * x_stride + t * 8;
    for (int left = last - first; left > 0;) {
        const int num_columns = min(left, column_tiles - column);
        const __half* own_x = own_row + column * 64;
        float sums[4] = {};
        for (int i = 0; i < num_columns; i++) {
            await_copies<DEPTH - 1>();
            Tile tile;
            read_tile(tile, slot, lane);
            multiply_tile(tile, own_x, sums);
            own_x += 64;
            copy_next(slot);
            slot = slot + SLOT_BYTES == ring + DEPTH * SLOT_BYTES ? ring : slot + SLOT_BYTES;
        }
        left -= num_columns;
        const bool is_end = column + num_columns == column_tiles;
        if (is_end && is_whole) {
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (2 * t + j < count)
                    finish(out, expert, begin + strip, g, start + 2 * t + j, sums[j] * SUM_FACTOR, sums[2 + j] * SUM_FACTOR);
        } else {
            float* own = partial + ((2 * warp + (strip != first_of_range)) * 16 + g) * partial_stride;
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (2 * t + j < columns) own[2 * t + j] = sums[j], own[8 * partial_stride + 2 * t + j] = sums[2 + j];
        }
        is_whole = true;
        column = 0, strip++;
    }
    __syncthreads();

    for (int i = threadIdx.x; i < (end - begin) * 8 * columns; i += blockDim.x) {
        const int output = i % 8, row = i / 8 % columns, own_strip = i / 8 / columns;
        if (row >= count) continue;
        float low = 0.0f, high = 0.0f;
        bool was_whole = false;
#pragma unroll
        for (int other = 0; other < NUM_WARPS; other++) {
            const int from = num_tiles * other / NUM_WARPS, to = num_tiles * (other + 1) / NUM_WARPS;
            if (from >= (own_strip + 1) * column_tiles || to <= own_strip * column_tiles || from == to) continue;
            if (from <= own_strip * column_tiles && to >= (own_strip + 1) * column_tiles) was_whole = true;
            const float* share = partial + ((2 * other + (firsts[other] != own_strip)) * 16 + output) * partial_stride;
            low += share[row];
            high += share[8 * partial_stride + row];
        }
        if (!was_whole) finish(out, expert, begin + own_strip, output, start + row, low * SUM_FACTOR, high * SUM_FACTOR);
    }
}
