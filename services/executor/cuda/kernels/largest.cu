// The largest exponents of rows of MXFP4, which products by warpgroups take a row's scales relative to.
//
// Launch, once for each matrix: grid (ceil(strips / 8)), 256 threads. Moves: the scales.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(256) largest(const char* scales,  // (strips, column tiles, 8, 2, 2) bytes
                                                          uchar2* out,         // (strips, 8): rows g and g + 8
                                                          int num_strips, int column_tiles) {
    const int strip = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (strip >= num_strips) return;
    uint32_t low = 0, high = 0;
    for (int tile = lane % 4; tile < column_tiles; tile += 4) {
        const size_t index = static_cast<size_t>(strip) * column_tiles + tile;
        const uint32_t both = load_weight4(scales + index * 32 + lane / 4 * 4);
        low = __vmaxu2(low, both & 0x00FF00FFu);
        high = __vmaxu2(high, both >> 8 & 0x00FF00FFu);
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        low = __vmaxu2(low, __shfl_xor_sync(0xffffffffu, low, distance));
        high = __vmaxu2(high, __shfl_xor_sync(0xffffffffu, high, distance));
    }
    if (lane % 4 == 0)
        out[strip * 8 + lane / 4] = make_uchar2(max(low & 0xFFFF, low >> 16), max(high & 0xFFFF, high >> 16));
}
