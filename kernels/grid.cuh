// A barrier across the blocks of one launch, and what a warp does together. All blocks must be resident at once; where one does
// not come, waiting ends in a fault, which the host finds, and never in a hang.

namespace marlin {

constexpr unsigned long long PATIENCE_NS = 2000000000ull;

// Two words of memory, zero at first, that all launches over them share: arrivals so far, and whether a barrier did not open.
// Arrivals only ever rise, and every launch leaves a multiple of its blocks: so the next one goes on from there.
class Grid {
 public:
  __device__ __forceinline__ explicit Grid(unsigned long long* words) : words_(words), target_(0) {
    if (threadIdx.x == 0) target_ = load_acquire(words) / gridDim.x * gridDim.x;
  }

  // What this block has written is there for all blocks that pass `wait`. What stands between the two is not ordered.
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) add_release(words_, 1);
  }

  // False where a block did not come, now or in an earlier launch. `open` is shared memory.
  __device__ __forceinline__ bool wait(int* open) {
    if (threadIdx.x == 0) {
      target_ += gridDim.x;
      int polls = 0;
      unsigned long long since = 0;
      bool came = load_acquire(words_) >= target_;
      while (!came) {
        came = load_acquire(words_) >= target_;
        if (++polls % 1024) continue;  // the clock is slow to read
        if (since == 0) since = nanoseconds();
        if (nanoseconds() - since > PATIENCE_NS) break;
      }
      if (!came) words_[1] = 1;
      *open = came;
    }
    __syncthreads();
    return *open;
  }

  // Whether an earlier launch failed; for thread 0 and others alike.
  __device__ __forceinline__ bool failed() const { return load_acquire(words_ + 1) != 0; }

 private:
  unsigned long long* words_;
  unsigned long long target_;  // of thread 0
};

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
  return value;
}

__device__ __forceinline__ float largest_of_warp(float value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, offset));
  return value;
}

// The largest value's index, the first of equals.
__device__ __forceinline__ void best_of_warp(float& value, int& index) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float other = __shfl_xor_sync(0xffffffff, value, offset);
    const int other_index = __shfl_xor_sync(0xffffffff, index, offset);
    if (other > value || (other == value && other_index < index)) value = other, index = other_index;
  }
}

}  // namespace marlin
