// Hopper's own: products of a warpgroup with an operand in shared memory, barriers that copies arrive at.
//
// Only in code for sm_90a.
#pragma once

#include "device.cuh"
#include "tensor_map.cuh"

// d += a b, or d = a b where `is_added` is zero; it runs on while the warps do, until await_products. The compiler does not
// know that, and takes a for read and d for written at once: tests/test_cuda_compile.py looks where it puts what.
// a: (64, 16) in half: warp w of the four holds rows 16 w to 16 w + 15 as multiply_add's a. b: (16, COLUMNS) in half, in
// shared memory as `operand` says. d: (64, COLUMNS) in float: d[4 j] to d[4 j + 3] are multiply_add's c of columns 8 j
// on; what lies past the last column is left alone.
template <int COLUMNS, int SIZE>
__device__ __forceinline__ void start_product(float (&d)[SIZE], const uint32_t (&a)[4], uint32_t b, int is_added);

#define WGMMA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_D16(i) WGMMA_D4(i), WGMMA_D4(i + 4), WGMMA_D4(i + 8), WGMMA_D4(i + 12)
#define WGMMA_N8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_N16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_N32 WGMMA_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_N24 WGMMA_N16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_N36 WGMMA_N32 ", %32, %33, %34, %35"
#define WGMMA_N48 WGMMA_N32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_N64 WGMMA_N48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_N80 WGMMA_N64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_N96 WGMMA_N80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_N112 WGMMA_N96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_N128 \
    WGMMA_N112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_D64 WGMMA_D16(0), WGMMA_D16(16), WGMMA_D16(32), WGMMA_D16(48)
#define WGMMA_D128 WGMMA_D64, WGMMA_D16(64), WGMMA_D16(80), WGMMA_D16(96), WGMMA_D16(112)
#define WGMMA(COLUMNS, SIZE, NUMBERS, A, B, IS_ADDED, ...)                                                         \
    template <>                                                                                                    \
    __device__ __forceinline__ void start_product<COLUMNS, SIZE>(float(&d)[SIZE], const uint32_t(&a)[4],           \
                                                                 uint32_t b, int is_added) {                       \
        asm volatile("{\n.reg .pred p;\n.reg .b64 matrix;\nsetp.ne.b32 p, " IS_ADDED ", 0;\n"                      \
                     "mov.b64 matrix, {" B ", 0x40000040};\n"                                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.f16.f16 {" NUMBERS "}, {" A "}, matrix" \
                     ", p, 1, 1, 0;\n}"                                                                            \
                     : __VA_ARGS__                                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(is_added));                         \
    }

WGMMA(16, 8, WGMMA_N8, "%8, %9, %10, %11", "%12", "%13", WGMMA_D4(0), WGMMA_D4(4))
WGMMA(16, 16, WGMMA_N8, "%16, %17, %18, %19", "%20", "%21", WGMMA_D16(0))
WGMMA(32, 16, WGMMA_N16, "%16, %17, %18, %19", "%20", "%21", WGMMA_D16(0))
WGMMA(48, 24, WGMMA_N24, "%24, %25, %26, %27", "%28", "%29", WGMMA_D16(0), WGMMA_D4(16), WGMMA_D4(20))
WGMMA(48, 32, WGMMA_N24, "%32, %33, %34, %35", "%36", "%37", WGMMA_D16(0), WGMMA_D16(16))
WGMMA(64, 32, WGMMA_N32, "%32, %33, %34, %35", "%36", "%37", WGMMA_D16(0), WGMMA_D16(16))
WGMMA(32, 64, WGMMA_N16, "%16, %17, %18, %19", "%20", "%21", WGMMA_D16(0))
WGMMA(64, 64, WGMMA_N32, "%32, %33, %34, %35", "%36", "%37", WGMMA_D16(0), WGMMA_D16(16))
WGMMA(72, 36, WGMMA_N36, "%36, %37, %38, %39", "%40", "%41", WGMMA_D16(0), WGMMA_D16(16), WGMMA_D4(32))
WGMMA(96, 64, WGMMA_N48, "%48, %49, %50, %51", "%52", "%53", WGMMA_D16(0), WGMMA_D16(16), WGMMA_D16(32))
WGMMA(128, 64, WGMMA_N64, "%64, %65, %66, %67", "%68", "%69", WGMMA_D64)
WGMMA(32, 128, WGMMA_N16, "%16, %17, %18, %19", "%20", "%21", WGMMA_D16(0))
WGMMA(64, 128, WGMMA_N32, "%32, %33, %34, %35", "%36", "%37", WGMMA_D16(0), WGMMA_D16(16))
WGMMA(96, 128, WGMMA_N48, "%48, %49, %50, %51", "%52", "%53", WGMMA_D16(0), WGMMA_D16(16), WGMMA_D16(32))
WGMMA(128, 128, WGMMA_N64, "%64, %65, %66, %67", "%68", "%69", WGMMA_D64)
WGMMA(160, 128, WGMMA_N80, "%80, %81, %82, %83", "%84", "%85", WGMMA_D64, WGMMA_D16(64))
WGMMA(192, 128, WGMMA_N96, "%96, %97, %98, %99", "%100", "%101", WGMMA_D64, WGMMA_D16(64), WGMMA_D16(80))
WGMMA(224, 128, WGMMA_N112, "%112, %113, %114, %115", "%116", "%117", WGMMA_D64, WGMMA_D16(64), WGMMA_D16(80), WGMMA_D16(96))
WGMMA(256, 128, WGMMA_N128, "%128, %129, %130, %131", "%132", "%133", WGMMA_D128)

// b in shared memory at `address`, a multiple of 1024, swizzled by 128 bytes as tensor maps call it: each column's 64
// inner indices are 128 bytes, and within eight columns 16 bytes c of column n lie where c ^ n % 8 would. Inner indices
// 16 i on are 2 i more. This is the lower word of a descriptor; the upper one, the same for all, says how it is swizzled
// (bit 62) and how far eight columns lie apart (1024 / 16).
__device__ __forceinline__ uint32_t operand(uint32_t address) { return 1u << 16 | address / 16; }

// Registers that products read or add to were written.
__device__ __forceinline__ void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the last NUM_LEFT groups of products are done.
template <int NUM_LEFT>
__device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NUM_LEFT) : "memory");
}

// What was written to shared memory is seen by products from here on.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What all lanes of a warp hold, in a way that tells the compiler so: what depends on it then takes registers and
// instructions of the warp's own, beside those of its lanes.
__device__ __forceinline__ int shared_by_lanes(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Which of the block's warps this is.
__device__ __forceinline__ int warp_index() { return shared_by_lanes(threadIdx.x / 32); }

// A barrier of 8 bytes in shared memory: each time `count` have arrived its phase, 0 at first, turns.
__device__ __forceinline__ void make_barrier(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive once this thread's copy_async's are done.
__device__ __forceinline__ void arrive_with_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and have the phase wait for so many bytes of boxes as well.
__device__ __forceinline__ void arrive_with_bytes(uint32_t barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}

// A box of a tensor of two dimensions to shared memory, as the map says; its bytes arrive at the barrier.
__device__ __forceinline__ void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            target),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// The same of four dimensions, whole in the first two.
__device__ __forceinline__ void copy_tiles(uint32_t target, const TensorMap* map, int column_tile, int strip,
                                           uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2, %3, %4}], "
        "[%5];" ::"r"(target),
        "l"(map), "r"(0), "r"(column_tile), "r"(strip), "r"(barrier)
        : "memory");
}

// The phase of this parity is over.
__device__ __forceinline__ void await_barrier(uint32_t barrier, uint32_t parity) {
    uint32_t is_over;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(is_over)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!is_over);
}

// Two groups of four warps take turns: wait for this group's, which the other one passes on.
__device__ __forceinline__ void await_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
__device__ __forceinline__ void pass_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(1 + group) : "memory"); }

// Which of its cluster's blocks this is.
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of the cluster have come here, and what they wrote to shared memory is seen.
__device__ __forceinline__ void await_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What lies at `address` of another block's shared memory.
__device__ __forceinline__ float4 read_cluster(uint32_t address, int block) {
    float4 value;
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
        : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
        : "r"(address), "r"(block)
        : "memory");
    return value;
}

__device__ __forceinline__ void write_shared(uint32_t address, float4 value) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y), "f"(value.z),
                 "f"(value.w)
                 : "memory");
}

// Registers of each thread of the warpgroup, from here on.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
