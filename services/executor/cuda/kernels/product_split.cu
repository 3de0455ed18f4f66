// Products of up to 64 rows on Hopper with a matrix too small for a block to each of its tiles: out = x @ matrix + bias,
// stored or added.
//
// A cluster of blocks takes a tile of 128 outputs, each block a share of the columns. In a block one thread copies x and
// the matrix to shared memory and two groups of four warps multiply (wgmma_tiles.cuh); the first stages' weights are on
// their way before the kernel before this one ends. The blocks then add up their sums over the cluster's shared memory, each
// for a share of the rows, in the blocks' order.
// Weights round as wgmma_tiles.cuh says. Sums are in float; a row's do not depend on other rows or their number.
// Launch: grid (tiles * blocks of a cluster), at least a column tile for each block; 384 threads, dynamic shared memory
// for NUM_STAGES (a -D) and the sums; sm_90a. x is spread.
// Moves: the matrix once, x once for each 128 outputs.
#include "epilogue.cuh"
#include "tensor_map.cuh"
#include "weights.cuh"

constexpr int NUM_THREADS = 384;

struct Product {
    const Output& out;
    int num_rows, column_tiles, num_strips;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int MAX_ROWS = 64;
constexpr int MAX_STRIPS = 1;  // of a warp
constexpr int STAGE_TILES = 1;
constexpr bool TAKES_TURNS = false;
#include "wgmma_tiles.cuh"

constexpr int SUMS_BYTES = MAX_ROWS / 8 * (NUM_THREADS - NUM_COPIERS) * 16;

// The columns of a block's share of a tile, in tiles of 64, and the strips.
struct Work {
    int first, last, first_strip;
};

__device__ __forceinline__ void copy_share(const Product& product, const Maps& maps, const Work& work, Ring& ring) {
    const int num_stages = work.last - work.first;
    const auto copy = [&](int stage, int done) {
        copy_weights(maps, ring.weights + stage * STAGE_BYTES, work.first + done, work.first_strip, STAGE_STRIPS,
                     done == 0, ring.full + stage * 8);
    };
    for (int stage = 0; stage < min(NUM_STAGES, num_stages); stage++) copy(stage, stage);
    await_inputs();
    start_dependents();
    for (int done = 0; done < num_stages; done++) {
        if (done >= NUM_STAGES) {
            await_barrier(ring.empty + ring.stage * 8, ring.phase ^ 1);
            copy(ring.stage, done);
        }
        copy_rows(maps, ring.x + ring.stage * X_BYTES, work.first + done, 0, product.num_rows, ring.full + ring.stage * 8);
        ring.advance();
    }
}

// The share's sums, which go to `sums` in shared memory: (MAX_ROWS / 8, threads that multiply, 4) floats.
template <int ROWS = MAX_ROWS>
__device__ __forceinline__ void multiply_share(const Product& product, const Work& work, Ring& ring, uint32_t sums) {
    if constexpr (ROWS > 16)
        if (product.num_rows <= ROWS - 16) return multiply_share<ROWS - 16>(product, work, ring, sums);
    const int thread = threadIdx.x - NUM_COPIERS, strip = warp_index() - NUM_COPIERS / 32;
    await_inputs();
    start_dependents();
    Largest largest[1];
    float own[1][ROWS / 2];
    multiply_stages<ROWS>(ring, strip, work.last - work.first, product.num_rows, largest, own);
    const float low = largest[0].factor(0), high = largest[0].factor(1);
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++)
        if (8 * j < product.num_rows)
            write_shared(sums + (j * (NUM_THREADS - NUM_COPIERS) + thread) * 16,
                         make_float4(own[0][4 * j] * low, own[0][4 * j + 1] * low, own[0][4 * j + 2] * high,
                                     own[0][4 * j + 3] * high));
}

// The cluster's sums of this block's share of the rows: (first, last), in eights.
template <int BLOCKS>
__device__ __forceinline__ void store_share(const Product& product, const Work& work, uint32_t sums) {
    constexpr int MOST = (MAX_ROWS / 8 + BLOCKS - 1) / BLOCKS;  // eights of a share
    const Output& out = product.out;
    const int rank = cluster_rank(), eights = (product.num_rows + 7) / 8;
    const int first = eights * rank / BLOCKS, count = eights * (rank + 1) / BLOCKS - first;
    const int thread = threadIdx.x - NUM_COPIERS, g = thread % 32 / 4, t = thread % 4;
    const int output = (work.first_strip + thread / 32) * 16 + g;
    // All that is added to is read before the sums are there.
    float before[MOST][4];  // rows 2 t and 2 t + 1 of output g, the same of output g + 8
#pragma unroll
    for (int j = 0; j < MOST; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = 8 * (first + j) + 2 * t + i % 2, own = output + i / 2 * 8;
            if (j >= count || row >= product.num_rows || own >= out.num_outputs) continue;
            before[j][i] = out.bias == nullptr ? 0.0f : out.bias[own];
            if (out.epilogue == RESIDUAL)
                before[j][i] += static_cast<const float*>(out.values)[static_cast<size_t>(row) * out.pitch + own];
        }
    await_cluster();
#pragma unroll
    for (int j = 0; j < MOST; j++) {
        if (j >= count) break;
        float sum[4] = {};
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
            const uint32_t place = sums + ((first + j) * (NUM_THREADS - NUM_COPIERS) + thread) * 16;
            const float4 share = read_cluster(place, block);
            sum[0] += share.x, sum[1] += share.y, sum[2] += share.z, sum[3] += share.w;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = 8 * (first + j) + 2 * t + i % 2, own = output + i / 2 * 8;
            if (row < product.num_rows && own < out.num_outputs)
                static_cast<float*>(out.values)[static_cast<size_t>(row) * out.pitch + own] = sum[i] + before[j][i];
        }
    }
}

template <int BLOCKS>
__device__ __forceinline__ void run(const Product& product, const Maps& maps) {
    extern __shared__ char memory[];
    const uint32_t sums = (shared_address(memory) + 1023) & ~1023u;
    Ring ring(sums + SUMS_BYTES);
    if (threadIdx.x == 0) ring.make_barriers();
    show_to_products();
    __syncthreads();
    const int rank = cluster_rank();
    const Work work = {product.column_tiles * rank / BLOCKS, product.column_tiles * (rank + 1) / BLOCKS,
                       static_cast<int>(blockIdx.x) / BLOCKS * STAGE_STRIPS};
    if (warp_index() < NUM_COPIERS / 32) {
        if (threadIdx.x == 0) copy_share(product, maps, work, ring);
        await_cluster();
    } else {
        multiply_share(product, work, ring, sums);
        store_share<BLOCKS>(product, work, sums);
    }
    await_cluster();  // no block leaves while another reads its sums
}

#else

template <int BLOCKS>
__device__ __forceinline__ void run(const Product& product, const Maps& maps) {
    __trap();  // other architectures take product_rows.cu
}

#endif

// What comes before the maps has 48 bytes, since parameters begin 16 past a multiple of the 64 that they want.
#define PRODUCT(BLOCKS)                                                                                               \
    extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) CLUSTER(BLOCKS) product_split_##BLOCKS(              \
        const float* bias, void* values, const void* padding, int pitch, int num_rows, int num_outputs,               \
        int column_tiles, int epilogue, int num_strips, const __grid_constant__ TensorMap rows,                       \
        const __grid_constant__ TensorMap codes, const __grid_constant__ TensorMap scales,                            \
        const __grid_constant__ TensorMap minima) {                                                                   \
        const Output out = {values, bias, nullptr, pitch, num_outputs, epilogue};                                     \
        run<BLOCKS>({out, num_rows, column_tiles, num_strips}, {&rows, &codes, &scales, &minima});                    \
    }

#if __CUDA_ARCH__ >= 900
#define CLUSTER(BLOCKS) __cluster_dims__(BLOCKS, 1, 1)
#else
#define CLUSTER(BLOCKS)  // there are none
#endif

PRODUCT(2)
PRODUCT(4)
PRODUCT(8)
