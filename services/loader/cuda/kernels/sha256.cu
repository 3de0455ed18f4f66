// SHA-256 (FIPS 180-4) of every piece of a range of memory: one thread a piece.
//
// Launch: threads of 128 that cover the pieces; memory 16-byte aligned, num_bytes and piece_bytes multiples of 64.
// Bytes moved: num_bytes, and 32 for each piece. Bound by integer instructions, about 3,000 for 64 bytes.

typedef unsigned int Word;
typedef unsigned long long Word64;

__constant__ const Word ROUNDS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

__device__ __forceinline__ Word rotate(Word x, int n) { return __funnelshift_r(x, x, n); }
__device__ __forceinline__ Word swap_bytes(Word x) { return __byte_perm(x, 0, 0x0123); }

// One block of 16 words, which become the schedule.
__device__ __forceinline__ void compress(Word (&state)[8], Word (&w)[16]) {
    Word a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
#pragma unroll
    for (int i = 0; i < 64; i++) {
        if (i >= 16) {
            const Word x = w[(i + 1) % 16], y = w[(i + 14) % 16];
            w[i % 16] += (rotate(x, 7) ^ rotate(x, 18) ^ x >> 3) + w[(i + 9) % 16] + (rotate(y, 17) ^ rotate(y, 19) ^ y >> 10);
        }
        const Word t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + ROUNDS[i] + w[i % 16];
        const Word t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

extern "C" __global__ void __launch_bounds__(128) sha256(const uint4* memory,  // (num_bytes / 16,)
                                                         uint4* digests,       // (pieces, 2)
                                                         Word64 num_bytes, int piece_bytes) {
    const Word64 piece = static_cast<Word64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (piece * piece_bytes >= num_bytes) return;
    const Word64 left = num_bytes - piece * piece_bytes;
    const Word64 size = left < piece_bytes ? left : piece_bytes;
    const uint4* const own = memory + piece * (piece_bytes / 16);
    Word state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    Word w[16];
    for (Word64 block = 0; block < size / 64; block++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 four = own[block * 4 + i];
            w[4 * i] = swap_bytes(four.x), w[4 * i + 1] = swap_bytes(four.y);
            w[4 * i + 2] = swap_bytes(four.z), w[4 * i + 3] = swap_bytes(four.w);
        }
        compress(state, w);
    }
    w[0] = 0x80000000u;
#pragma unroll
    for (int i = 1; i < 15; i++) w[i] = 0;
    w[14] = static_cast<Word>(size >> 29), w[15] = static_cast<Word>(size << 3);
    compress(state, w);
    digests[2 * piece] = make_uint4(swap_bytes(state[0]), swap_bytes(state[1]), swap_bytes(state[2]), swap_bytes(state[3]));
    digests[2 * piece + 1] = make_uint4(swap_bytes(state[4]), swap_bytes(state[5]), swap_bytes(state[6]), swap_bytes(state[7]));
}
