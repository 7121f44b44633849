// How the blocks of one launch wait for each other, and what a warp does together. All blocks must be resident at once; where one
// does not come, waiting ends and the host is told, and nothing hangs.

namespace marlin {

// Another GPU may be kept waiting by its host.
constexpr unsigned long long PATIENCE_NS = (RANKS > 1 ? 10 : 1) * 2000000000ull;

// Two words of memory, zero at first, that all launches over them share: arrivals so far, and whether some wait was given up.
// Arrivals only ever rise, and every launch leaves a multiple of its blocks: so the next one goes on from there.
class Grid {
 public:
  __device__ __forceinline__ explicit Grid(unsigned long long* words) : words_(words), target_(0), polls_(0), since_(0), host_(nullptr) {
    if (threadIdx.x == 0) target_ = load_acquire(words) / gridDim.x * gridDim.x;
  }

  // What this block has written is there for all blocks that pass `wait`. What stands between the two is not ordered.
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) add_release(words_, 1);
  }

  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0) {
      target_ += gridDim.x;
      while (load_acquire(words_) < target_ && !gave_up()) {
      }
      content();
    }
    __syncthreads();
  }

  // Two words of the host: where GPUs share a stage waits are given up, too, when the first is not 0; the second is not 0 from
  // when some wait here is given up.
  __device__ __forceinline__ void heed(unsigned long long* words) { host_ = words; }

  // After a look that did not find what it was for: whether to look no more, as some block has waited too long. All go on with
  // whatever is there then, to the end; the host is told, here or where `failed` says so.
  __device__ __forceinline__ bool gave_up() {
    look_away();
    if (++polls_ % 1024) return false;  // the clock is slow to read
    if (failed()) return true;
    const unsigned long long now = nanoseconds();
    if (polls_ == 1024) since_ = now;
    if (now - since_ < PATIENCE_NS && (RANKS == 1 || load_of_peer(host_) == 0)) return false;
    add_release(words_ + 1, 1);
    if (host_ != nullptr) store_for_peer(host_ + 1, 1), __threadfence_system();
    return true;
  }

  // What was waited for came.
  __device__ __forceinline__ void content() { polls_ = 0; }

  // Whether a wait has been given up, in this launch or an earlier one.
  __device__ __forceinline__ bool failed() const { return load_acquire(words_ + 1) != 0; }

 private:
  unsigned long long* words_;
  unsigned long long target_;  // of thread 0
  unsigned polls_;
  unsigned long long since_;
  unsigned long long* host_;  // null where the host is told with the ids of a launch
};

// A value that other blocks wait for: 32 bits, and above them the number of the phase that wrote it. Both are written and read
// at once, so whoever finds the number has the value, and no barrier is needed.
using Cell = unsigned long long;

__device__ __forceinline__ Cell cell_of(uint32_t bits, unsigned phase) { return Cell(phase) << 32 | bits; }

// PAIRS times two cells side by side, all looked at together until all of them are of `phase`.
template <int PAIRS>
__device__ __forceinline__ void read_cells(
    Grid& grid, const Cell* const (&from)[PAIRS], const bool (&there)[PAIRS], unsigned phase, uint32_t (&values)[PAIRS][2]) {
  while (true) {
    Cell cells[PAIRS][2];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      if (there[i]) load_two(from[i], cells[i][0], cells[i][1]);
    }
    bool came = true;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      if (!there[i]) continue;
      came = came && unsigned(cells[i][0] >> 32) == phase && unsigned(cells[i][1] >> 32) == phase;
      values[i][0] = uint32_t(cells[i][0]), values[i][1] = uint32_t(cells[i][1]);
    }
    if (came || grid.gave_up()) break;
  }
  grid.content();
}

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
