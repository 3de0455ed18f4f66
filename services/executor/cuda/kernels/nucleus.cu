// The nucleus of top_p: a row's largest weights that reach top_p of all, equals in ascending order of id.
//
// Nothing is sorted. sum_buckets adds the weights up in buckets by size, then those of the bucket in which the sum of
// the larger ones reaches the target in finer ones; list_border lists the few of the fine one that does; find_cut finds
// the weight among them; sum_kept tells draw_rows what each chunk keeps. Sums are of weights in fixed point, 2^-44 of the largest in their bucket,
// so that atomics add them in any order to the same bits, and as finely as float64 holds the sum of a row.
// Launch: sum_buckets (level 1, then 2), list_border and sum_kept: grid (num_chunks, rows), 256 threads; find_cut: grid
// (rows), ROW_THREADS. Moves: 8 bytes a value in each but find_cut.
#include "sampling.cuh"

#define FRACTION_BITS 44      // of a weight in fixed point
#define BUCKET_SHIFT 48       // 16 buckets for each power of two
#define FINE_SHIFT 39         // NUM_BUCKETS finer ones in each
#define LAST_FINE_SHIFT 53    // in the last bucket, which all smaller weights share
#define ONE_BITS 0x3ff0000000000000ull

__device__ __forceinline__ uint64 bits_of(double weight) {
    return static_cast<uint64>(__double_as_longlong(weight));
}

// 0 for weights of 1 and just below, more for smaller ones.
__device__ __forceinline__ int bucket_of(double weight) {
    return static_cast<int>(min((ONE_BITS - bits_of(weight)) >> BUCKET_SHIFT, NUM_BUCKETS - 1ull));
}

__device__ __forceinline__ int fine_bucket_of(double weight, int bucket) {
    const uint64 offset = ONE_BITS - bits_of(weight) - (static_cast<uint64>(bucket) << BUCKET_SHIFT);
    return static_cast<int>(offset >> (bucket == NUM_BUCKETS - 1 ? LAST_FINE_SHIFT : FINE_SHIFT));
}

// A weight of a bucket in the bucket's fixed point, and a sum back.
__device__ __forceinline__ uint64 to_fixed(double weight, int bucket) {
    return static_cast<uint64>(ldexp(weight, FRACTION_BITS + (bucket >> 4)));
}

__device__ __forceinline__ double from_fixed(uint64 sum, int bucket) {
    return ldexp(static_cast<double>(sum), -FRACTION_BITS - (bucket >> 4));
}

// Where the sum of larger weights reaches the target: a bucket, and what lies above it.
struct Border {
    int bucket;
    double above;
};

// The bucket in which `above` and the sums up to it reach `target`, the last that is not empty if none does. One warp
// calls, so that every kernel adds in the same order. `parent` is the bucket that fine ones lie in, or -1.
__device__ Border find_border(const uint64* sums, int parent, double above, double target) {
    const int lane = threadIdx.x % 32, first = lane * (NUM_BUCKETS / 32);
    double own = 0.0;
    int last = -1;
    for (int i = first; i < first + NUM_BUCKETS / 32; i++) {
        own += from_fixed(sums[i], parent < 0 ? i : parent);
        if (sums[i] > 0) last = i;
    }
    double before = own;
    for (int distance = 1; distance < 32; distance *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, before, distance);
        if (lane >= distance) before += other;
    }
    const unsigned int filled = __ballot_sync(0xffffffffu, last >= 0);
    const unsigned int reached = __ballot_sync(0xffffffffu, last >= 0 && above + before >= target);
    before = above + __shfl_up_sync(0xffffffffu, before, 1);
    if (lane == 0) before = above;
    const int chosen = reached ? __ffs(reached) - 1 : 31 - __clz(filled);
    Border border = {last, before};
    if (lane == chosen) {
        for (int i = first; i <= last; i++) {
            const double sum = from_fixed(sums[i], parent < 0 ? i : parent);
            border.bucket = i;
            if (i == last || (sums[i] > 0 && border.above + sum >= target)) break;
            border.above += sum;
        }
    }
    border.bucket = __shfl_sync(0xffffffffu, border.bucket, chosen);
    border.above = __shfl_sync(0xffffffffu, border.above, chosen);
    return border;
}

// top_p of a row's sum of weights. One warp calls.
__device__ double find_target(const RowSampling& sampling, const double* chunk_sums, int num_chunks) {
    double total = 0.0;
    for (int i = threadIdx.x % 32; i < num_chunks; i += 32) total += chunk_sums[i];
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
    return sampling.top_p * total;
}

extern "C" __global__ void __launch_bounds__(256)
    sum_buckets(const RowSampling* rows,   // (gridDim.y,)
                const double* weights,     // (gridDim.y, vocab_size)
                const double* chunk_sums,  // (gridDim.y, gridDim.x)
                uint64* buckets,           // (gridDim.y, 2, NUM_BUCKETS) zero before; of each level
                int vocab_size, int level) {
    __shared__ uint64 sums[NUM_BUCKETS];
    __shared__ int parent;
    await_inputs();
    start_dependents();
    const RowSampling& sampling = rows[blockIdx.y];
    if (!has_nucleus(sampling, vocab_size)) return;
    buckets += static_cast<size_t>(blockIdx.y) * 2 * NUM_BUCKETS;
    for (int i = threadIdx.x; i < NUM_BUCKETS; i += 256) sums[i] = 0;
    if (level == 1) {
        if (threadIdx.x == 0) parent = -1;
    } else if (threadIdx.x < 32) {
        const size_t row = static_cast<size_t>(blockIdx.y) * gridDim.x;
        const double target = find_target(sampling, chunk_sums + row, gridDim.x);
        const Border border = find_border(buckets, -1, 0.0, target);
        if (threadIdx.x == 0) parent = border.bucket;
    }
    __syncthreads();
    const int first = blockIdx.x * CHUNK, size = min(CHUNK, vocab_size - first);
    const double* chunk = weights + static_cast<size_t>(blockIdx.y) * vocab_size + first;
    for (int i = threadIdx.x; i < size; i += 256) {
        const double weight = chunk[i];
        if (!(weight > 0.0)) continue;
        const int bucket = bucket_of(weight);
        if (level == 1) {
            atomicAdd(sums + bucket, to_fixed(weight, bucket));
        } else if (bucket == parent) {
            atomicAdd(sums + fine_bucket_of(weight, bucket), to_fixed(weight, bucket));
        }
    }
    __syncthreads();
    uint64* out = buckets + (level - 1) * NUM_BUCKETS;
    for (int i = threadIdx.x; i < NUM_BUCKETS; i += 256)
        if (sums[i] > 0) atomicAdd(out + i, sums[i]);
}

// The ids of the weights in the fine bucket where the target is reached, in any order.
extern "C" __global__ void __launch_bounds__(256)
    list_border(const RowSampling* rows,   // (gridDim.y,)
                const double* weights,     // (gridDim.y, vocab_size)
                const double* chunk_sums,  // (gridDim.y, gridDim.x)
                const uint64* buckets,     // (gridDim.y, 2, NUM_BUCKETS)
                int* ids,                  // (gridDim.y, vocab_size) out
                int* num_listed,           // (gridDim.y,) zero before
                int vocab_size) {
    __shared__ Border coarse, fine;
    await_inputs();
    start_dependents();
    const RowSampling& sampling = rows[blockIdx.y];
    if (!has_nucleus(sampling, vocab_size)) return;
    if (threadIdx.x < 32) {
        const size_t row = static_cast<size_t>(blockIdx.y) * gridDim.x;
        buckets += static_cast<size_t>(blockIdx.y) * 2 * NUM_BUCKETS;
        const double target = find_target(sampling, chunk_sums + row, gridDim.x);
        const Border first = find_border(buckets, -1, 0.0, target);
        const Border second = find_border(buckets + NUM_BUCKETS, first.bucket, first.above, target);
        if (threadIdx.x == 0) coarse = first, fine = second;
    }
    __syncthreads();
    const int first = blockIdx.x * CHUNK;
    const double* own = weights + static_cast<size_t>(blockIdx.y) * vocab_size;
    int* out = ids + static_cast<size_t>(blockIdx.y) * vocab_size;
    for (int id = first + threadIdx.x; id < first + CHUNK; id += 256) {
        const double weight = id < vocab_size ? own[id] : 0.0;
        const bool is_listed = weight > 0.0 && bucket_of(weight) == coarse.bucket &&
                               fine_bucket_of(weight, coarse.bucket) == fine.bucket;
        const unsigned int ballot = __ballot_sync(0xffffffffu, is_listed);
        if (!ballot) continue;
        int place = 0;
        if (threadIdx.x % 32 == 0) place = atomicAdd(num_listed + blockIdx.y, __popc(ballot));
        place = __shfl_sync(0xffffffffu, place, 0) + __popc(ballot & ((1u << (threadIdx.x % 32)) - 1));
        if (is_listed) out[place] = id;
    }
}

// Sum of a block's integers in every thread. `scratch` has 32.
__device__ uint64 block_sum(uint64 value, uint64* scratch) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0;
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// Sum of the listed weights above a threshold, in the fixed point of their bucket.
__device__ uint64 sum_listed(const double* weights, const int* ids, int count, int bucket, uint64 threshold,
                             uint64* scratch) {
    uint64 sum = 0;
    for (int i = threadIdx.x; i < count; i += ROW_THREADS) {
        const double weight = weights[ids[i]];
        if (bits_of(weight) > threshold) sum += to_fixed(weight, bucket);
    }
    return block_sum(sum, scratch);
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    find_cut(const RowSampling* rows,   // (gridDim.x,)
             const double* weights,     // (gridDim.x, vocab_size)
             const int* ids,            // (gridDim.x, vocab_size) as list_border leaves them
             int* num_listed,           // (gridDim.x,) zero afterwards
             const double* chunk_sums,  // (gridDim.x, num_chunks)
             uint64* buckets,           // (gridDim.x, 2, NUM_BUCKETS) zero afterwards
             Cut* cuts,                 // (gridDim.x,) out
             int vocab_size, int num_chunks) {
    __shared__ uint64 scratch[32];
    __shared__ Border coarse, fine;
    __shared__ double target;
    __shared__ uint64 lowest, highest;
    await_inputs();
    start_dependents();
    const RowSampling& sampling = rows[blockIdx.x];
    if (!has_nucleus(sampling, vocab_size)) return;
    weights += static_cast<size_t>(blockIdx.x) * vocab_size;
    ids += static_cast<size_t>(blockIdx.x) * vocab_size;
    buckets += static_cast<size_t>(blockIdx.x) * 2 * NUM_BUCKETS;
    if (threadIdx.x < 32) {
        const double reach =
            find_target(sampling, chunk_sums + static_cast<size_t>(blockIdx.x) * num_chunks, num_chunks);
        const Border first = find_border(buckets, -1, 0.0, reach);
        const Border second = find_border(buckets + NUM_BUCKETS, first.bucket, first.above, reach);
        if (threadIdx.x == 0) {
            target = reach, coarse = first, fine = second;
            lowest = ~0ull, highest = 0;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * NUM_BUCKETS; i += ROW_THREADS) buckets[i] = 0;
    const int bucket = coarse.bucket;
    const int count = num_listed[blockIdx.x];
    for (int i = threadIdx.x; i < count; i += ROW_THREADS) {
        atomicMin(&lowest, bits_of(weights[ids[i]]));
        atomicMax(&highest, bits_of(weights[ids[i]]));
    }
    __syncthreads();
    uint64 low = lowest, high = highest;
    while (low < high) {  // the smallest threshold above which the weights fall short
        const uint64 middle = low + (high - low) / 2;
        const uint64 sum = sum_listed(weights, ids, count, bucket, middle, scratch);
        if (fine.above + from_fixed(sum, bucket) < target) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    const double above = fine.above + from_fixed(sum_listed(weights, ids, count, bucket, high, scratch), bucket);
    const double each = __longlong_as_double(static_cast<long long>(high));
    double missing = ceil((target - above) / each);
    if (missing > 1.0 && above + (missing - 1.0) * each >= target) missing -= 1.0;  // the quotient was rounded up
    const int num_equal = static_cast<int>(fmin(fmax(missing, 1.0), static_cast<double>(vocab_size)));
    if (threadIdx.x != 0) return;
    num_listed[blockIdx.x] = 0;
    cuts[blockIdx.x] = {high, each, each < sampling.min_p ? 0 : num_equal, 0};
}

extern "C" __global__ void __launch_bounds__(256)
    sum_kept(const RowSampling* rows,  // (gridDim.y,)
             const double* weights,    // (gridDim.y, vocab_size)
             const Cut* cuts,          // (gridDim.y,)
             double* chunk_sums,       // (gridDim.y, gridDim.x) out: of weights above the cut and not below min_p
             int* chunk_ties,          // (gridDim.y, gridDim.x) out: weights at the cut
             int vocab_size) {
    __shared__ double scratch[32];
    await_inputs();
    start_dependents();
    const RowSampling& sampling = rows[blockIdx.y];
    if (!has_nucleus(sampling, vocab_size)) return;
    const int first = blockIdx.x * CHUNK, size = min(CHUNK, vocab_size - first);
    const double* chunk = weights + static_cast<size_t>(blockIdx.y) * vocab_size + first;
    const uint64 threshold = cuts[blockIdx.y].threshold;
    double sum = 0.0, num_ties = 0.0;
    for (int i = threadIdx.x; i < size; i += 256) {
        const double weight = chunk[i];
        if (bits_of(weight) > threshold && weight >= sampling.min_p) sum += weight;
        if (bits_of(weight) == threshold) num_ties += 1.0;
    }
    sum = block_sum(sum, scratch);
    num_ties = block_sum(num_ties, scratch);
    if (threadIdx.x != 0) return;
    const size_t place = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    chunk_sums[place] = sum;
    chunk_ties[place] = static_cast<int>(num_ties);
}
