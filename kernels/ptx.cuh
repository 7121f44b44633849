// What only the machine's own instructions say: products on the matrix units, loads past the first cache, and order among blocks.

namespace marlin {

// sums[16, 8] += a[16, 16] @ b[16, 8] on the matrix units, with a warp's lanes holding the operands as `mma` wants them.
template <bool HALF>
__device__ __forceinline__ void multiply_tiles(
    float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (HALF) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Sixteen bytes that no other block will want: they need no place in the first cache.
template <bool WIDE>
__device__ __forceinline__ void load_once(const uint32_t* from, uint32_t (&words)[4]) {
  if constexpr (WIDE) {
    asm volatile(
        "ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(from));
  } else {
    load_words<false>(from, words);
  }
}

// Order among blocks: what a block wrote before an addition is there for those that load what it added.
__device__ __forceinline__ void add_release(unsigned long long* to, unsigned long long value) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* from) {
  unsigned long long value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

// Two words of 64 bits beside each other, at 16 bytes: each as it was written at once, and in no order with anything else.
__device__ __forceinline__ void load_two(const unsigned long long* from, unsigned long long& one, unsigned long long& other) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(one), "=l"(other) : "l"(from) : "memory");
}

__device__ __forceinline__ void store_one(unsigned long long* to, unsigned long long value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

// The same between GPUs, and between one and the host: a word is there at once and whole, in no order with anything else.
__device__ __forceinline__ void store_for_peer(unsigned long long* to, unsigned long long value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

__device__ __forceinline__ unsigned long long load_of_peer(const unsigned long long* from) {
  unsigned long long value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

// What a thread does between two looks at what another one is to write.
__device__ __forceinline__ void look_away() {}

// A barrier of some warps of a block, `threads` in all, each of which names the same number from 1 to 15.
__device__ __forceinline__ void synchronize_team(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Bytes (a multiple of 16) that will be wanted soon, into the second-level cache.
__device__ __forceinline__ void send_to_cache(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// Sixteen bytes from memory to shared memory, past the first cache, that are there after `wait_for_copies`, for this thread.
__device__ __forceinline__ void copy_piece(uint4* to, const uint4* from) {
  const uint32_t place = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}

__device__ __forceinline__ unsigned long long cycles() {
  unsigned long long value;
  asm volatile("mov.u64 %0, %clock64;" : "=l"(value));
  return value;
}

// The shared memory that the launch asks for.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ uint4 marlin_dynamic_shared[];
  return marlin_dynamic_shared;
}

}  // namespace marlin
