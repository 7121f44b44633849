// Sums over the GPUs that share a stage, one of each rank: each has a part of every product that takes heads or channels back to
// rows of x. It writes its part into the memory of all others, over the links between them, and looks at its own memory until
// theirs are there. A part is a cell (grid.cuh): whoever finds the number of the turn has the value, and nothing is fenced.
// All add the parts up in the order of the ranks: so the sum has the same bits on each.
//
// Memory is written over at the turn after the next one. A rank that has come there has had every part of the turn between, each
// of which was made of all of x, and that of every sum of this turn: so nobody still looks for one of these.

namespace marlin {

// As `marlin_cli.ops.cuda_exchange` lays it out.
struct Exchange {
  unsigned long long* host;  // [2] words of the host, see Grid::heed; the first is not 0 when the job is over
  unsigned long long own;    // rank
  Cell* memory[RANKS];       // of each rank: [2][RANKS][PLACES], a part of each for every place of x
};

class PartSums {
 public:
  // turn: of the last sum before.
  __device__ __forceinline__ void begin(const Exchange* exchange, unsigned turn) {
    exchange_ = exchange, own_ = int(exchange->own), turn_ = turn;
  }

  __device__ __forceinline__ unsigned long long* host() const { return exchange_->host; }

  __device__ __forceinline__ int own() const { return own_; }

  __device__ __forceinline__ void next() { turn_++; }

  __device__ __forceinline__ void send(int place, float part) const {
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) {
      if (rank != own_) store_for_peer(exchange_->memory[rank] + before(own_) + place, cell_of(__float_as_uint(part), turn_));
    }
  }

  __device__ __forceinline__ float sum(Grid& grid, int place, float part) const {
    float sum = 0.0f;
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) {
      float theirs = part;
      if (rank != own_) {
        const Cell* from = exchange_->memory[own_] + before(rank) + place;
        Cell cell = load_of_peer(from);
        while (unsigned(cell >> 32) != turn_ && !grid.gave_up()) cell = load_of_peer(from);
        theirs = __uint_as_float(uint32_t(cell));
      }
      sum = rank == 0 ? theirs : sum + theirs;
    }
    grid.content();
    return sum;
  }

 private:
  // Of the parts of a rank in this turn.
  __device__ __forceinline__ int64_t before(int rank) const { return int64_t(int(turn_ % 2) * RANKS + rank) * PLACES; }

  const Exchange* exchange_;  // where it lies: an array in here would put all that stands beside it in the machine's local memory
  int own_;
  unsigned turn_;
};

}  // namespace marlin
