// From logits to token ids on the GPU; services/executor/sampling.py is the specification, to the order of effects.
//
// resolve_tokens puts the last token of a seat where a step's ids name the seat. take_best gives every row its best id
// and says which rows can be drawn from at all: that is all that a greedy row needs, and part of a decoding graph.
// Rows that need more run adjust_rows, weigh_rows, where there is a top_p nucleus.cu, and draw_rows, in which
//   - values and sums are float64; no product is contracted into a sum, so that adjusted values equal numpy's;
//   - every sum has an order that the vocabulary and the kept ids alone decide: the same step gives the same bits;
//   - weights of ids that are cut are 0, and an id of weight 0 is never drawn.
// Moves, for each row: take_best its logits once, from the cache where the head has just written them; adjust_rows and
// weigh_rows 8 bytes a value written and read; draw_rows a chunk's sums, and the chunks that can hold what is kept.
#include "sampling.cuh"

#define BEST_CHUNK 2048     // values of a block of take_best
#define NUM_ROUNDS 10       // of Philox
#define SEEN 0x80000000u    // in counts: the id is in prompt or output; the other bits count it in the output

// Larger for larger values; NaN above all; -0 as 0.
__device__ __forceinline__ unsigned int float_key(float value) {
    const unsigned int bits = __float_as_uint(value + 0.0f);
    if (value != value) return 0xffffffffu;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void resolve_tokens(int* token_ids,         // (count,), -1 - seat becomes that seat's last token
                                          const int* last_tokens,  // (seats,)
                                          int count) {
    await_inputs();
    start_dependents();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && token_ids[i] < 0) token_ids[i] = last_tokens[-1 - token_ids[i]];
}

// Launch: grid (ceil(vocab_size / BEST_CHUNK), rows), 256 threads. The last block of a row to finish tells its best.
extern "C" __global__ void __launch_bounds__(256)
    take_best(const float* logits,    // (rows, vocab_size)
              const int* seats,       // (rows,), of the sequence that the row draws for; -1: it does not draw
              int* token_ids,         // (rows,) out: the smallest id of the largest value; -1 if that is not finite
              int* last_tokens,       // (seats,) out
              uint64* best,           // (rows,) zero between launches
              unsigned int* counters, // (rows,) zero between launches
              int vocab_size) {
    __shared__ uint64 warp_best[8];
    await_inputs();
    start_dependents();
    const int row = blockIdx.y;
    if (seats[row] < 0) {
        if (blockIdx.x == 0 && threadIdx.x == 0) token_ids[row] = -1;
        return;
    }
    const float* values = logits + static_cast<size_t>(row) * vocab_size;
    const int end = min(vocab_size, static_cast<int>(blockIdx.x + 1) * BEST_CHUNK);
    uint64 largest = 0;
#pragma unroll
    for (int step = 0; step < BEST_CHUNK / 256; step++) {
        const int i = blockIdx.x * BEST_CHUNK + step * 256 + threadIdx.x;
        if (i < end) {
            const uint64 key = static_cast<uint64>(float_key(values[i])) << 32 | (0xffffffffu - i);
            largest = key > largest ? key : largest;
        }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const uint64 other = __shfl_xor_sync(0xffffffffu, largest, distance);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % 32 == 0) warp_best[threadIdx.x / 32] = largest;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < 8; warp++) largest = warp_best[warp] > largest ? warp_best[warp] : largest;
    atomicMax(best + row, largest);
    __threadfence();
    if (atomicAdd(counters + row, 1u) != gridDim.x - 1) return;
    largest = atomicExch(best + row, 0ull);
    counters[row] = 0;
    const int id = static_cast<int>(0xffffffffu - static_cast<unsigned int>(largest));
    const bool is_finite = isfinite(values[id]);
    token_ids[row] = is_finite ? id : -1;
    last_tokens[seats[row]] = is_finite ? id : 0;
}

// Counts of a seat whose sequence takes it: zero before. Launch: grid (ceil(count / 256)), 256 threads.
extern "C" __global__ void set_counts(const int* ids,               // (count,) distinct
                                      const unsigned int* values,   // (count,)
                                      unsigned int* counts,         // (vocab_size,)
                                      int count) {
    await_inputs();
    start_dependents();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) counts[ids[i]] = SEEN | values[i];
}

// Logits after bias and penalties, and of each chunk the largest of them and the largest that min_tokens leaves.
// Launch: grid (num_chunks, rows), 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    adjust_rows(const RowSampling* rows,     // (gridDim.y,)
                const float* logits,         // (rows of logits, vocab_size)
                const unsigned int* counts,  // (seats, vocab_size)
                const int* bias_ids,         // (seats, list_length)
                const double* biases,        // (seats, list_length)
                const int* stop_ids,         // (seats, list_length)
                double* values,              // (gridDim.y, vocab_size) out
                double* largest,             // (gridDim.y, 2, num_chunks) out: of all, of those not masked
                int vocab_size, int list_length) {
    __shared__ double chunk[CHUNK];
    __shared__ double scratch[32];
    await_inputs();
    start_dependents();
    const RowSampling& sampling = rows[blockIdx.y];
    const int first = blockIdx.x * CHUNK, size = min(CHUNK, vocab_size - first);
    const float* source = logits + static_cast<size_t>(sampling.row) * vocab_size + first;
    const size_t list = static_cast<size_t>(sampling.seat) * list_length;
    for (int i = threadIdx.x; i < size; i += 256) chunk[i] = source[i];
    __syncthreads();
    for (int i = threadIdx.x; i < sampling.num_biases; i += 256) {
        const int place = bias_ids[list + i] - first;
        if (0 <= place && place < size) chunk[place] = __dadd_rn(chunk[place], biases[list + i]);
    }
    __syncthreads();
    if (sampling.has_penalties) {
        const unsigned int* seen = counts + static_cast<size_t>(sampling.seat) * vocab_size + first;
#pragma unroll 1
        for (int i = threadIdx.x; i < size; i += 256) {
            if (!(seen[i] & SEEN)) continue;
            const double count = seen[i] & ~SEEN;
            double value = chunk[i];
            if (sampling.repetition_penalty != 1.0)
                value = value > 0.0 ? __ddiv_rn(value, sampling.repetition_penalty)
                                    : __dmul_rn(value, sampling.repetition_penalty);
            if (count > 0.0) value = __dsub_rn(value, sampling.presence_penalty);
            chunk[i] = __dsub_rn(value, __dmul_rn(sampling.frequency_penalty, count));
        }
        __syncthreads();
    }
    double* out = values + static_cast<size_t>(blockIdx.y) * vocab_size + first;
    double best = -INFINITY;
    for (int i = threadIdx.x; i < size; i += 256) {
        best = fmax(best, chunk[i]);
        out[i] = chunk[i];
    }
    best = block_max(best, scratch);
    double* told = largest + static_cast<size_t>(blockIdx.y) * 2 * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) told[0] = best;
    if (sampling.masks_stops) {
        for (int i = threadIdx.x; i < sampling.num_stops; i += 256) {
            const int place = stop_ids[list + i] - first;
            if (0 <= place && place < size) chunk[place] = -INFINITY;
        }
        __syncthreads();
        best = -INFINITY;
        for (int i = threadIdx.x; i < size; i += 256) best = fmax(best, chunk[i]);
        best = block_max(best, scratch);
    }
    if (threadIdx.x == 0) told[gridDim.x] = best;
}

// The mask of min_tokens, then weights exp((value - best) / temperature) and their sums, where no top_k comes first.
// Launch: grid (num_chunks, rows), 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    weigh_rows(const RowSampling* rows,  // (gridDim.y,)
               const int* stop_ids,      // (seats, list_length)
               const double* largest,    // (gridDim.y, 2, num_chunks)
               double* values,           // (gridDim.y, vocab_size) in: values; out: values or weights
               double* chunk_best,       // (gridDim.y, num_chunks) out: the largest of each chunk, of values or weights
               double* chunk_sums,       // (gridDim.y, num_chunks) out: sums of weights
               double* row_best,         // (gridDim.y,) out: the best value
               int vocab_size, int list_length) {
    __shared__ double scratch[32];
    await_inputs();
    start_dependents();
    const RowSampling& sampling = rows[blockIdx.y];
    const int first = blockIdx.x * CHUNK, size = min(CHUNK, vocab_size - first);
    const double* maxima = largest + static_cast<size_t>(blockIdx.y) * 2 * gridDim.x;
    double best = -INFINITY, unmasked = -INFINITY;
    for (int i = threadIdx.x; i < gridDim.x; i += 256) {
        unmasked = fmax(unmasked, maxima[i]);
        best = fmax(best, maxima[gridDim.x + i]);
    }
    best = block_max(best, scratch);
    const bool is_masked = sampling.masks_stops && best > -INFINITY;  // nothing else left to draw: the mask yields
    if (!is_masked) best = block_max(unmasked, scratch);
    double* chunk = values + static_cast<size_t>(blockIdx.y) * vocab_size + first;
    if (is_masked) {
        const size_t list = static_cast<size_t>(sampling.seat) * list_length;
        for (int i = threadIdx.x; i < sampling.num_stops; i += 256) {
            const int place = stop_ids[list + i] - first;
            if (0 <= place && place < size) chunk[place] = -INFINITY;
        }
        __syncthreads();
    }
    const bool keeps = keeps_values(sampling, vocab_size);
    const double least = sampling.top_p < 1.0 ? 0.0 : sampling.min_p;  // min_p comes after top_p
    double highest = -INFINITY, sum = 0.0;
    for (int i = threadIdx.x; i < size; i += 256) {
        double value = chunk[i];
        if (!keeps) {
            value = exp(__ddiv_rn(__dsub_rn(value, best), sampling.temperature));
            if (value < least) value = 0.0;
            chunk[i] = value;
            sum += value;
        }
        highest = fmax(highest, value);
    }
    highest = block_max(highest, scratch);
    sum = block_sum(sum, scratch);
    if (threadIdx.x != 0) return;
    const size_t place = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    chunk_best[place] = highest;
    chunk_sums[place] = sum;
    if (blockIdx.x == 0) row_best[blockIdx.y] = best;
}

// Source: services/executor/philox.py.
__device__ double uniform(const RowSampling& sampling) {
    unsigned int c0 = sampling.token_index, c1 = 0, c2 = sampling.output_index, c3 = 0;
    unsigned int k0 = sampling.seed_low, k1 = sampling.seed_high;
    for (int round = 0; round < NUM_ROUNDS; round++) {
        const unsigned int high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const unsigned int high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (static_cast<double>(c0 >> 5) * 67108864.0 + static_cast<double>(c1 >> 6)) * 0x1p-53;
}

// The first place whose running sum (added to `base`) lies above `target`, among those of positive weight; the last of
// positive weight if rounding leaves none. On return `base` is the sum before it.
__device__ int find_place(const double* weights, int count, double target, double& base, Scratch& scratch) {
    double last_base = base;
    int last = 0;
    for (int start = 0; start < count; start += ROW_THREADS) {
        const int i = start + threadIdx.x;
        const double weight = i < count ? weights[i] : 0.0;
        double total;
        const double sum = block_scan(weight, total, scratch);
        __syncthreads();
        if (threadIdx.x == 0) scratch.found = 0x7fffffff;
        __syncthreads();
        if (weight > 0.0 && base + sum > target) atomicMin(&scratch.found, i);
        __syncthreads();
        const int found = scratch.found;
        if (found != 0x7fffffff) {
            __syncthreads();
            if (i == found) scratch.sums[0] = base + (sum - weight);
            __syncthreads();
            base = scratch.sums[0];
            return found;
        }
        __syncthreads();
        if (threadIdx.x == 0) scratch.found = -1;
        __syncthreads();
        if (weight > 0.0) atomicMax(&scratch.found, i);
        __syncthreads();
        if (scratch.found >= 0) last = scratch.found, last_base = base + total - weights[scratch.found];
        base += total;
    }
    base = last_base;
    return last;
}

// Ids whose value is at least `least`, ascending, and their values, both from the start of the row's memory; returns
// how many. Chunks that hold none are passed over. The values that are read lie at or after where they are written.
__device__ int gather(double* values, int* ids, const double* chunk_best, int num_chunks, int vocab_size, double least,
                      Scratch& scratch) {
    int count = 0;
    for (int chunk = 0; chunk < num_chunks; chunk++) {
        if (!(chunk_best[chunk] >= least)) continue;
        const int id = chunk * CHUNK + threadIdx.x;
        const double value = id < vocab_size ? values[id] : -INFINITY;
        const bool is_kept = id < vocab_size && value >= least;
        int total;
        const int place = count + block_rank(is_kept, total, scratch);
        if (is_kept) values[place] = value, ids[place] = id;
        count += total;
        __syncthreads();
    }
    return count;
}

// Keeps of a list (ascending by id) those of a key above `threshold` and, of those equal to it, the first num_equal.
__device__ int keep(double* values, int* ids, int count, uint64 threshold, int num_equal, Scratch& scratch) {
    int num_kept = 0, num_ties = 0;
    for (int start = 0; start < count; start += ROW_THREADS) {
        const int i = start + threadIdx.x;
        const double value = i < count ? values[i] : 0.0;
        const int id = i < count ? ids[i] : 0;
        const uint64 key = double_key(value);
        int total_ties, total;
        const int tie = num_ties + block_rank(i < count && key == threshold, total_ties, scratch);
        const bool is_kept = i < count && (key > threshold || (key == threshold && tie < num_equal));
        const int place = num_kept + block_rank(is_kept, total, scratch);
        if (is_kept) values[place] = value, ids[place] = id;
        num_ties += total_ties;
        num_kept += total;
        __syncthreads();
    }
    return num_kept;
}

// The sum over a list of the weights (or, for is_count, the number) of those whose key is above `threshold`.
__device__ double sum_above(const double* values, int count, uint64 threshold, bool is_count, Scratch& scratch) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += ROW_THREADS)
        if (double_key(values[i]) > threshold) sum += is_count ? 1.0 : values[i];
    return block_sum(sum, scratch.sums);
}

// Cuts a list to the smallest set of its largest values whose number or sum of weights reaches `target`; equals are
// taken in ascending order of id. The list holds that set.
__device__ int keep_best(double* values, int* ids, int count, double target, bool is_count, Scratch& scratch) {
    double best = -INFINITY, worst = INFINITY;
    for (int i = threadIdx.x; i < count; i += ROW_THREADS) {
        best = fmax(best, values[i]);
        worst = fmin(worst, values[i]);
    }
    uint64 high = double_key(block_max(best, scratch.sums));     // what lies above it falls short of the target
    uint64 low = double_key(-block_max(-worst, scratch.sums));
    while (low < high) {  // the smallest threshold above which the values fall short
        const uint64 middle = low + (high - low) / 2;
        if (sum_above(values, count, middle, is_count, scratch) < target) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    const double above = sum_above(values, count, high, is_count, scratch);
    const double each = is_count ? 1.0 : __longlong_as_double(static_cast<long long>(high & ~(1ull << 63)));
    double missing = each > 0.0 ? ceil((target - above) / each) : 0.0;
    if (missing > 1.0 && above + (missing - 1.0) * each >= target) missing -= 1.0;  // the quotient was rounded up
    const int num_equal = static_cast<int>(fmin(fmax(missing, 1.0), static_cast<double>(count)));
    return keep(values, ids, count, high, num_equal, scratch);
}

// The k-th largest of the chunks' best values: at least k values lie at or above it. All, where k is past the chunks.
__device__ double least_of_top(const double* chunk_best, int num_chunks, int k, Scratch& scratch) {
    if (k > num_chunks) return -INFINITY;
    __syncthreads();
    for (int i = threadIdx.x; i < num_chunks; i += ROW_THREADS) {
        int rank = 0;
        for (int j = 0; j < num_chunks; j++)
            rank += chunk_best[j] > chunk_best[i] || (chunk_best[j] == chunk_best[i] && j < i);
        if (rank == k - 1) scratch.sums[0] = chunk_best[i];
    }
    __syncthreads();
    return scratch.sums[0];
}

// Sum of a list's weights.
__device__ double sum_list(const double* weights, int count, Scratch& scratch) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += ROW_THREADS) sum += weights[i];
    return block_sum(sum, scratch.sums);
}

// The token drawn from a row's top_k values, of which top_p and min_p take their part.
__device__ int draw_of_top(const RowSampling& sampling, double* values, int* ids, const double* chunk_best, double best,
                           int vocab_size, int num_chunks, Scratch& scratch) {
    const double least = least_of_top(chunk_best, num_chunks, sampling.top_k, scratch);
    int count = gather(values, ids, chunk_best, num_chunks, vocab_size, least, scratch);
    count = keep_best(values, ids, count, sampling.top_k, true, scratch);
    for (int i = threadIdx.x; i < count; i += ROW_THREADS)
        values[i] = exp(__ddiv_rn(__dsub_rn(values[i], best), sampling.temperature));
    __syncthreads();
    if (sampling.top_p < 1.0) {
        const double total = sum_list(values, count, scratch);
        count = keep_best(values, ids, count, sampling.top_p * total, false, scratch);
    }
    for (int i = threadIdx.x; i < count; i += ROW_THREADS)
        if (values[i] < sampling.min_p) values[i] = 0.0;
    __syncthreads();
    double base = 0.0;
    const double target = uniform(sampling) * sum_list(values, count, scratch);
    return ids[find_place(values, count, target, base, scratch)];
}

// Give the weights at a nucleus's cut to the chunks, in order, as many as it keeps.
__device__ void share_ties(const Cut& cut, double* chunk_sums, int* chunk_ties, int num_chunks, Scratch& scratch) {
    const int chunk = threadIdx.x;
    const int num_ties = chunk < num_chunks ? chunk_ties[chunk] : 0;
    double total;
    const int before = static_cast<int>(block_scan(num_ties, total, scratch)) - num_ties;
    const int num_kept = max(0, min(num_ties, cut.num_equal - before));
    if (chunk < num_chunks) {
        chunk_ties[chunk] = num_kept;
        chunk_sums[chunk] += num_kept * cut.each;
    }
    __syncthreads();
}

// Weights of a chunk that are no part of the nucleus, or below min_p, become 0.
__device__ void cut_chunk(const RowSampling& sampling, const Cut& cut, double* weights, int size, int num_ties,
                          Scratch& scratch) {
    const double weight = threadIdx.x < size ? weights[threadIdx.x] : 0.0;
    const uint64 bits = static_cast<uint64>(__double_as_longlong(weight));
    int total;
    const int tie = block_rank(threadIdx.x < size && bits == cut.threshold, total, scratch);
    const bool is_kept = bits > cut.threshold || (bits == cut.threshold && tie < num_ties);
    if (threadIdx.x < size && !(is_kept && weight >= sampling.min_p)) weights[threadIdx.x] = 0.0;
    __syncthreads();
}

// The token of a row. Launch: grid (rows), ROW_THREADS threads; num_chunks is at most as many.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    draw_rows(const RowSampling* rows,   // (gridDim.x,)
              double* values,            // (gridDim.x, vocab_size) values or weights; overwritten
              int* ids,                  // (gridDim.x, vocab_size) scratch
              const double* chunk_best,  // (gridDim.x, num_chunks)
              double* chunk_sums,        // (gridDim.x, num_chunks) of a nucleus: without ties; overwritten
              const double* row_best,    // (gridDim.x,)
              const Cut* cuts,           // (gridDim.x,) of a nucleus
              int* chunk_ties,           // (gridDim.x, num_chunks) of a nucleus: weights at the cut; overwritten
              int* token_ids,            // (rows of logits,) in: -1 if the row can't be drawn from; out
              int* last_tokens,          // (seats,) out
              unsigned int* counts,      // (seats, vocab_size) counts the token
              int vocab_size, int num_chunks) {
    __shared__ Scratch scratch;
    await_inputs();
    start_dependents();
    const RowSampling& sampling = rows[blockIdx.x];
    if (token_ids[sampling.row] < 0) return;
    values += static_cast<size_t>(blockIdx.x) * vocab_size;
    ids += static_cast<size_t>(blockIdx.x) * vocab_size;
    chunk_best += static_cast<size_t>(blockIdx.x) * num_chunks;
    chunk_sums += static_cast<size_t>(blockIdx.x) * num_chunks;
    chunk_ties += static_cast<size_t>(blockIdx.x) * num_chunks;
    int id;
    if (sampling.temperature == 0.0) {
        gather(values, ids, chunk_best, num_chunks, vocab_size, row_best[blockIdx.x], scratch);
        id = ids[0];
    } else if (keeps_values(sampling, vocab_size)) {
        id = draw_of_top(sampling, values, ids, chunk_best, row_best[blockIdx.x], vocab_size, num_chunks, scratch);
    } else {
        const bool is_cut = has_nucleus(sampling, vocab_size);
        if (is_cut) share_ties(cuts[blockIdx.x], chunk_sums, chunk_ties, num_chunks, scratch);
        double base = 0.0;
        const double target = uniform(sampling) * sum_list(chunk_sums, num_chunks, scratch);
        const int chunk = find_place(chunk_sums, num_chunks, target, base, scratch);
        double* weights = values + chunk * CHUNK;
        const int size = min(CHUNK, vocab_size - chunk * CHUNK);
        if (is_cut) cut_chunk(sampling, cuts[blockIdx.x], weights, size, chunk_ties[chunk], scratch);
        id = chunk * CHUNK + find_place(weights, size, target, base, scratch);
    }
    if (threadIdx.x != 0) return;
    token_ids[sampling.row] = id;
    last_tokens[sampling.seat] = id;
    if (sampling.has_penalties) {
        unsigned int* count = counts + static_cast<size_t>(sampling.seat) * vocab_size + id;
        *count = (*count | SEEN) + 1;
    }
}
