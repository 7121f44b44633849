// Products of up to 16 rows of x with weights of any format on the matrix units, shared out over all warps of a grid.
//
// x is the left operand, 16 rows of which cost what one costs; 8 rows of W, a tile, are the right one. The order of the depth
// within a product is free as long as both operands agree: so a lane takes 16 consecutive bytes of a row of W, as one load
// brings them, four lanes beside each other, and x stands in shared memory in the order in which codes are decoded.
// Loads of weights need no x: a warp has its first ones on their way before it waits for the x of another block.
// All sizes are constants, which go before this text (`marlin_cli.ops.cuda_stages`): what could be worked out is worked out.

namespace marlin {

constexpr int TILE_ROWS = 8, MOST_ROWS = 16, PIECE_VALUES = 8, THREADS = WARPS * 32;
constexpr bool HALF_EMPTY = STREAMS <= 8;  // of the left operand, see `multiply_unit`

enum Kind { DENSE, NVFP4, MXFP4, MXFP8, INT4, INT8 };
enum NormKind { RMS, LAYER, VARIANCE };
enum Activation { GELU, GELU_TANH, RELU, SILU };
enum Part { FIRST, QKV, OUT, UP, DOWN, LAST, MEMORY_QUERY, MEMORY_OUT };

// Whether GPUs have a part each of a phase's product.
template <int PART>
constexpr bool SUMMED = RANKS > 1 && (PART == OUT || PART == DOWN);

// A linear layer, as `marlin_cli.ops.cuda_stages` lays it out.
struct Linear {
  const uint32_t* weight;  // [rows, depth * bits / 32]; bfloat16 where dense
  const void* scales;      // [rows, depth / group] uint8; T for int4 and int8
  const T* zeros;          // [rows, depth / group], int4 and int8 alone
  const T* bias;           // [rows] or null
  float factor;            // multiplies the product before the bias
  int32_t unused;
};

// What a phase multiplies: the rows of several layers one after another, or a pair of layers row by row. And how the warps of the
// grid share it: teams of warps of one block, each team a tile, each of its warps some of the depth. Tiles go to blocks in turn;
// teams are as large as leaves one for every tile.
template <int PART>
struct Job {
  static constexpr int KIND = KINDS[PART], GROUP = GROUPS[PART], WIDTH = WIDTHS[PART], HEIGHT = ROWS[PART];
  static constexpr bool PAIRED = PART == UP && GATED;
  static constexpr int LAYERS_BESIDE = PAIRED ? 2 : 1;
  // Dense float32 weights are three bfloat16 side by side, which read x once each.
  static constexpr int SIDES = KIND == DENSE ? X_PARTS : 1, DEPTH = WIDTH * SIDES;
  static constexpr int LOG_VALUES = KIND == DENSE ? 3 : KIND == MXFP8 || KIND == INT8 ? 4 : 5, LOG_PIECES = LOG_VALUES - 3;
  static constexpr int STEPS = (DEPTH + (4 << LOG_VALUES) - 1) >> (2 + LOG_VALUES), WHOLE = STEPS << (2 + LOG_VALUES);
  static __device__ constexpr int tiles_of(int rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
  static constexpr int SECOND = tiles_of(HEIGHT), THIRD = SECOND + tiles_of(KV_HEADS * HEAD_DIM);  // first tiles of k and v
  static constexpr int TILES = PART == QKV ? THIRD + THIRD - SECOND : SECOND;
  static __device__ constexpr int row_stride() {
    const int stride = WHOLE / PIECE_VALUES;
    return stride % 8 == 4 ? stride : stride + 4;
  }
  static constexpr int STRIDE = row_stride();  // of x in shared memory, in pieces

  static __device__ constexpr int own_log_size() {
    int log = 0;
    while (2 << log <= WARPS && (1 << log) < STEPS && BLOCKS * (WARPS >> (log + 1)) >= TILES) log++;
    return log;
  }
  static __device__ constexpr int log_size();
  static __device__ constexpr int tiles_at_once() { return BLOCKS * (WARPS >> log_size()); }
  static __device__ constexpr int rounds() { return (TILES + tiles_at_once() - 1) / tiles_at_once(); }
  static __device__ constexpr int units() { return ((STEPS + (1 << log_size()) - 1) >> log_size()) * LAYERS_BESIDE; }
  // Outputs of a tile, and how many of them a thread of the team has.
  static constexpr int OUTPUTS = STREAMS * TILE_ROWS;
  static __device__ constexpr int own_outputs() { return (OUTPUTS + (32 << log_size()) - 1) / (32 << log_size()); }
};

// Phases that write rows of x are shared out alike, so that the same thread always has the same places of it.
template <int PART>
__device__ constexpr int Job<PART>::log_size() {
  if (PART != OUT && PART != DOWN && PART != FIRST && PART != MEMORY_OUT) return own_log_size();
  const int out = Job<OUT>::own_log_size(), down = Job<DOWN>::own_log_size();
  const int other = IS_GLOBAL ? Job<FIRST>::own_log_size() : ANSWERS ? Job<MEMORY_OUT>::own_log_size() : out;
  const int both = out < down ? out : down;
  return other < both ? other : both;
}

// Where a warp stands in the sharing of a job.
template <int PART>
struct Team {
  using Own = Job<PART>;
  static constexpr int LOG_SIZE = Own::log_size(), SIZE = 1 << LOG_SIZE;

  static __device__ __forceinline__ int slot() { return int(threadIdx.x) / 32 >> LOG_SIZE; }
  static __device__ __forceinline__ int member() { return int(threadIdx.x) / 32 & (SIZE - 1); }
  static __device__ __forceinline__ int thread() { return int(threadIdx.x) & ((SIZE << 5) - 1); }
  static __device__ __forceinline__ int tile(int round) { return round * Own::tiles_at_once() + slot() * BLOCKS + int(blockIdx.x); }
  // Whether this block has any tile.
  static __device__ __forceinline__ bool in_work() { return int(blockIdx.x) < Own::TILES; }
  static __device__ __forceinline__ void synchronize() {
    if constexpr (SIZE == WARPS) {
      __syncthreads();
    } else if constexpr (SIZE == 1) {
      __syncwarp();
    } else {
      synchronize_team(1 + slot(), SIZE * 32);
    }
  }
};

// A tile's layer of those of its phase, and its first row there.
template <int PART>
__device__ __forceinline__ int layer_of_tile(int& tile) {
  if (PART != QKV || tile < Job<PART>::SECOND) return 0;
  const int layer = tile < Job<PART>::THIRD ? 1 : 2;
  tile -= layer == 1 ? Job<PART>::SECOND : Job<PART>::THIRD;
  return layer;
}

template <int PART>
__device__ __forceinline__ constexpr int rows_of(int layer) {
  return PART == QKV && layer > 0 ? KV_HEADS * HEAD_DIM : Job<PART>::HEIGHT;
}

// Rows of x in shared memory: [X_PARTS][STREAMS][STRIDE] pieces of 8 bfloat16. X_PARTS 3: float32 as a sum of three.
// Within a step the pieces that the four lanes read together stand beside each other, and rows are 64 bytes apart, modulo the
// banks of shared memory: so no two lanes of a load meet in a bank.
template <int PART>
struct Operand {
  using Own = Job<PART>;
  static constexpr int LOG_PIECES = Own::LOG_PIECES, STRIDE = Own::STRIDE;
  uint4* pieces;

  // Where a value of rows [STREAMS, WIDTH] stands that are copied piece by piece.
  static __device__ __forceinline__ int copied_place(int row, int column) {
    const int within = column % PIECE_VALUES;
    int half = within;
    if (LOG_PIECES == 1) half = 2 * (within / 4 * 2 + within % 2) + within % 4 / 2;
    if (LOG_PIECES == 2) half = 2 * (within % 4) + within / 4;
    return row * Own::WIDTH + column - within + half;
  }

  static __device__ __forceinline__ int place(int row, int piece) {
    const int within = piece & ((4 << LOG_PIECES) - 1);
    return row * STRIDE + piece - within + ((within & ((1 << LOG_PIECES) - 1)) << 2) + (within >> LOG_PIECES);
  }

  // Which of the 16-bit halves of a piece value k stands in: a word of codes is decoded to pairs of codes half a word apart.
  static __device__ __forceinline__ constexpr int half_of(int k) {
    if (LOG_PIECES == 0) return k;
    if (LOG_PIECES == 1) return 2 * (k / 4 * 2 + k % 2) + k % 4 / 2;
    return 2 * (k % 4) + k / 4;
  }

  // COUNT values of a row from `column` on, which share a piece.
  template <int COUNT>
  __device__ __forceinline__ void put(int row, int column, float (&values)[COUNT]) const {
    static_assert(COUNT == 8 || COUNT == 4 || COUNT == 2);
    uint4* to = pieces + place(row, column / PIECE_VALUES);
#pragma unroll
    for (int part = 0; part < X_PARTS; part++) {
      if constexpr (COUNT == 8) {
        uint32_t pairs[4];
#pragma unroll
        for (int k = 0; k < 8; k++) {
          const int half = half_of(k);
          if (half % 2 == 0) pairs[half / 2] = pair_of<false>(values[k], values[value_of(half + 1)]);
        }
        to[part * STREAMS * STRIDE] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
      } else {
        uint16_t* halves = reinterpret_cast<uint16_t*>(to + part * STREAMS * STRIDE);
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
          const uint32_t pair = pair_of<false>(values[i], values[i + 1]);
          const int k = column % PIECE_VALUES + i;
          if constexpr (LOG_PIECES == 0) {
            *reinterpret_cast<uint32_t*>(halves + k) = pair;
          } else {
            halves[half_of(k)] = uint16_t(pair), halves[half_of(k + 1)] = uint16_t(pair >> 16);
          }
        }
      }
      if constexpr (X_PARTS > 1) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) values[i] -= to_float(from_float<__nv_bfloat16>(values[i]));
      }
    }
  }

 private:
  static __device__ __forceinline__ constexpr int value_of(int half) {
    for (int k = 0; k < 8; k++) {
      if (half_of(k) == half) return k;
    }
    return 0;
  }
};

// LOADS loads of a lane's weights, on their way or used and loaded anew. Units are steps of the depth; those of a pair of layers
// take turns.
struct Weights {
  static constexpr bool AFFINE = (ALL_KINDS & (1 << INT4 | 1 << INT8)) != 0, CODES = (ALL_KINDS & ~(1 << DENSE)) != 0;
  uint32_t words[LOADS][4];
  uint32_t scales[CODES ? LOADS : 1];
  float affine[AFFINE ? LOADS : 1][2];  // scale and zero
  float bias[2];                        // of the first output of this thread; of a pair, each one's own
  const T* norm;                        // of the phase that reads what this one gives, where it writes rows of x; or null
  T norm_weight;                        // of the outputs of this thread
};
static_assert(LOADS % 2 == 0);

// Where a lane's weights of a tile begin, by layer of a pair.
template <int PART>
struct Lane {
  using Own = Job<PART>;
  const uint32_t* words[Own::LAYERS_BESIDE];
  const uint8_t* scales[Own::LAYERS_BESIDE];
  const T* zeros[Own::LAYERS_BESIDE];

  __device__ __forceinline__ Lane(const Linear* linears, int tile) {
    const int layer = layer_of_tile<PART>(tile), lane = threadIdx.x % 32;
    const uint32_t row = min(tile * TILE_ROWS + lane / 4, rows_of<PART>(layer) - 1);
    const uint32_t first = Team<PART>::member() * 4 + lane % 4;  // of 16 bytes, in its row
#pragma unroll
    for (int i = 0; i < Own::LAYERS_BESIDE; i++) {
      const Linear& linear = linears[layer + i];
      words[i] = linear.weight + (size_t(row) * (Own::DEPTH >> Own::LOG_VALUES) + first) * 4;
      if constexpr (Own::KIND != DENSE) {
        const size_t group = size_t(row) * (Own::DEPTH / Own::GROUP) + (first << Own::LOG_VALUES) / Own::GROUP;
        constexpr bool AFFINE = Own::KIND == INT4 || Own::KIND == INT8;
        scales[i] = static_cast<const uint8_t*>(linear.scales) + group * (AFFINE ? sizeof(T) : 1);
        if constexpr (AFFINE) zeros[i] = linear.zeros + group;
      }
    }
  }

  // The unit's weights to a slot. What lies beyond the depth is zero.
  __device__ __forceinline__ void load(Weights& weights, int slot, int unit) const {
    constexpr int PAIR = Own::LAYERS_BESIDE, SIZE = Team<PART>::SIZE;
    const int step = unit / PAIR * SIZE, side = unit % PAIR;  // steps from the member's first one
    const int column = ((Team<PART>::member() + step) * 4 + int(threadIdx.x % 4)) << Own::LOG_VALUES;
    if (Own::DEPTH % (SIZE * 4 << Own::LOG_VALUES) != 0 && column >= Own::DEPTH) {
#pragma unroll
      for (int i = 0; i < 4; i++) weights.words[slot][i] = 0;
      if constexpr (Weights::CODES) weights.scales[slot] = 0;
      if constexpr (Weights::AFFINE) weights.affine[slot][0] = weights.affine[slot][1] = 0.0f;
      return;
    }
    load_once<true>(words[side] + step * 16, weights.words[slot]);
    if constexpr (Own::KIND == INT4 || Own::KIND == INT8) {
      const int group = column / Own::GROUP - ((Team<PART>::member() * 4 + int(threadIdx.x % 4)) << Own::LOG_VALUES) / Own::GROUP;
      weights.affine[slot][0] = to_float(reinterpret_cast<const T*>(scales[side])[group]);
      weights.affine[slot][1] = to_float(zeros[side][group]);
    } else if constexpr (Own::KIND != DENSE) {
      const int group = column / Own::GROUP - ((Team<PART>::member() * 4 + int(threadIdx.x % 4)) << Own::LOG_VALUES) / Own::GROUP;
      const uint8_t* codes = scales[side] + group;
      weights.scales[slot] = Own::KIND == NVFP4 ? *reinterpret_cast<const uint16_t*>(codes) : *codes;
    }
  }
};

// Weights are multiplied as w * 2^CODES_EXPONENT where they are codes under a scale, which keeps them among normal numbers.
constexpr int CODES_EXPONENT = -26;

template <int KIND>
__device__ __forceinline__ float factor_of_kind() {
  return NVFP4 <= KIND && KIND <= MXFP8 ? power_of_two<-CODES_EXPONENT>() : 1.0f;
}

// The weights of one piece as pairs of bfloat16, in SPLIT parts where they are no bfloat16.
template <int KIND, int SPLIT>
__device__ __forceinline__ void weight_pairs(
    const uint32_t (&words)[4], uint32_t scales, const float* affine, int piece, uint32_t (&pairs)[SPLIT][4]) {
  if constexpr (KIND == DENSE) {
#pragma unroll
    for (int p = 0; p < 4; p++) pairs[0][p] = words[p];
  } else if constexpr (KIND == INT4 || KIND == INT8) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const uint32_t word = KIND == INT4 ? words[piece] : words[2 * piece + p / 2];
      const int shift = KIND == INT4 ? 4 * p : p % 2 * 8;
      constexpr uint32_t FIELD = KIND == INT4 ? 15 : 255;
      float first = float(word >> shift & FIELD) * affine[0] + affine[1];
      float second = float(word >> (shift + 16) & FIELD) * affine[0] + affine[1];
#pragma unroll
      for (int part = 0; part < SPLIT; part++) {
        pairs[part][p] = pair_of<false>(first, second);
        first -= __uint_as_float(pairs[part][p] << 16);
        second -= __uint_as_float(pairs[part][p] & 0xffff0000u);
      }
    }
  } else {
    constexpr int BITS = KIND == MXFP8 ? 8 : 4;
    using Own = Codes<false, BITS>;
    constexpr int SCALES = KIND == NVFP4 ? 2 : 1;
    uint32_t factors[SCALES];
    scale_pairs<false, CODES_EXPONENT + Own::CODE_EXPONENT>(scales, factors);
    const uint32_t factor = SCALES == 2 && piece >= 2 ? factors[SCALES - 1] : factors[0];
#pragma unroll
    for (int word = 0; word < 4 / Own::PAIRS; word++) {
      uint32_t decoded[Own::PAIRS];
      Own::decode(words[BITS == 4 ? piece : 2 * piece + word], decoded);
#pragma unroll
      for (int p = 0; p < Own::PAIRS; p++) pairs[0][word * Own::PAIRS + p] = product_of_pairs<false>(decoded[p], factor);
    }
  }
}

// sums += x @ w^T for one load of weights: two sums, which take turns, as each product waits for the one before it. `x` is where
// this lane's piece of the first row of x stands, which counts up from there.
// Up to eight rows of x leave the lower half of the left operand free: there stand the same rows' other values, so that a piece is
// an operand as it is loaded, without a move. The lower half of the second sum, and the upper one of the first, are the product;
// what the other halves are is nobody's business, nor what rows give that there are not (the first one stands in for them).
template <int PART>
__device__ __forceinline__ void multiply_unit(
    float (&sums)[2][4], const uint32_t (&words)[4], uint32_t scales, const float* affine, const uint4* x) {
  using Own = Job<PART>;
  constexpr int SPLIT = X_PARTS > 1 && (Own::KIND == INT4 || Own::KIND == INT8) ? 2 : 1;
  const int row = threadIdx.x % 32 / 4;
#pragma unroll
  for (int piece = 0; piece < 1 << Own::LOG_PIECES; piece++) {
    uint32_t w[SPLIT][4];
    weight_pairs<Own::KIND, SPLIT>(words, scales, affine, piece, w);
#pragma unroll
    for (int part = 0; part < X_PARTS; part++) {
      const uint4 low = x[part * STREAMS * Own::STRIDE + piece * 4];
      uint4 high = {0, 0, 0, 0};
      if (!HALF_EMPTY && row + 8 < STREAMS) high = x[part * STREAMS * Own::STRIDE + piece * 4 + 8 * Own::STRIDE];
#pragma unroll
      for (int split = 0; split < SPLIT; split++) {
        const uint32_t(&one)[4] = w[split];
        if constexpr (HALF_EMPTY) {
          multiply_tiles<false>(sums[0], low.x, low.y, low.z, low.w, one[0], one[2]);
          multiply_tiles<false>(sums[1], low.x, low.y, low.z, low.w, one[1], one[3]);
        } else {
          multiply_tiles<false>(sums[0], low.x, high.x, low.y, high.y, one[0], one[1]);
          multiply_tiles<false>(sums[1], low.z, high.z, low.w, high.w, one[2], one[3]);
        }
      }
    }
  }
}

// All units of a warp's tile.
template <int PART>
__device__ __forceinline__ void multiply_tile(float (&sums)[2][2][4], const Lane<PART>& own, Weights& weights, const Operand<PART>& x) {
  using Each = Job<PART>;
  constexpr int PAIR = Each::LAYERS_BESIDE, SIZE = Team<PART>::SIZE, UNITS = Each::units();
  const int row = threadIdx.x % 32 / 4, member = Team<PART>::member();
  const uint4* from = x.pieces + (row < STREAMS ? row * Each::STRIDE : 0) + (member << (2 + Each::LOG_PIECES)) + threadIdx.x % 4;
#pragma unroll 1
  for (int unit = 0; unit < UNITS; unit += LOADS) {
#pragma unroll
    for (int slot = 0; slot < LOADS; slot++) {
      if (UNITS % LOADS != 0 && unit + slot >= UNITS) break;  // the same for all
      const int step = (unit + slot) / PAIR * SIZE;
      if (Each::STEPS % SIZE != 0 && member + step >= Each::STEPS) break;  // the same for all lanes
      // A pair's two sums take turns with the slots; of a single layer two are as good as one.
      multiply_unit<PART>(
          sums[slot % 2], weights.words[slot], weights.scales[Weights::CODES ? slot : 0], weights.affine[Weights::AFFINE ? slot : 0],
          from + (step << (2 + Each::LOG_PIECES)));
      if (UNITS > LOADS && unit + slot + LOADS < UNITS) own.load(weights, slot, unit + slot + LOADS);
    }
  }
}

// The first loads of a warp's tile of a phase, whose linear layers these are, and the bias of what this thread will have; `norm`
// is that of the phase that will read it.
template <int PART>
__device__ __forceinline__ void send_for(Weights& weights, const Linear* linears, const T* norm = nullptr, int round = 0) {
  using Own = Job<PART>;
  int tile = Team<PART>::tile(round);
  if (tile >= Own::TILES) return;
  if constexpr (COPIED && (PART == FIRST || PART == OUT || PART == MEMORY_OUT || PART == DOWN)) {
    weights.norm = norm;
    weights.norm_weight = norm[min(tile * TILE_ROWS + Team<PART>::thread() % TILE_ROWS, Own::HEIGHT - 1)];
  }
  const Lane<PART> lane(linears, tile);
#pragma unroll
  for (int slot = 0; slot < LOADS; slot++) {
    if (slot < Own::units()) lane.load(weights, slot, slot);
  }
  if constexpr (HAS_BIAS[PART]) {
    const int layer = layer_of_tile<PART>(tile), output = Team<PART>::thread();
    const int column = min(tile * TILE_ROWS + output % TILE_ROWS, rows_of<PART>(layer) - 1);
#pragma unroll
    for (int i = 0; i < Own::LAYERS_BESIDE; i++) {
      const T* bias = linears[layer + i].bias;
      weights.bias[i] = bias == nullptr ? 0.0f : to_float(bias[column]);
    }
  }
}

// The tiles of a phase into the second-level cache; of many the beginnings of their rows, AHEAD_BYTES in all: what else is asked
// of memory meanwhile waits behind them, and the cache must still have them when they are wanted.
template <int PART>
__device__ __forceinline__ void send_tiles_to_cache(const Linear* linears) {
  using Own = Job<PART>;
  constexpr uint32_t ROW = (Own::DEPTH >> Own::LOG_VALUES) * 16;
  constexpr uint64_t ALL = uint64_t(Own::TILES) * Own::LAYERS_BESIDE * TILE_ROWS * ROW;
  constexpr bool ENTIRE = ALL <= AHEAD_BYTES;
  constexpr int PIECES = ENTIRE ? 1 : TILE_ROWS;  // of a tile
  constexpr uint32_t BYTES = ENTIRE ? TILE_ROWS * ROW : ROW * uint64_t(AHEAD_BYTES) / ALL / 256 * 256;
  if (BYTES == 0 || Team<PART>::thread() >= Own::LAYERS_BESIDE * PIECES) return;
#pragma unroll
  for (int round = 0; round < Own::rounds(); round++) {
    int tile = Team<PART>::tile(round);
    if (tile >= Own::TILES) return;
    const int layer = layer_of_tile<PART>(tile) + Team<PART>::thread() / PIECES, piece = Team<PART>::thread() % PIECES;
    if ((tile + 1) * TILE_ROWS > rows_of<PART>(layer)) continue;
    send_to_cache(linears[layer].weight + (size_t(tile) * TILE_ROWS + piece) * (ROW / 4), BYTES);
  }
}

// A job by all blocks; `weights` has begun with the team's first tile, and x stands there for all threads of the block.
// finish(round, n, layer, x row, row of W, product, product with the second of a pair, bias, there) is called by whole warps, for
// the n-th output of each thread; where `there` is false, it is of no row. `partial` is shared memory: see PARTIAL_FLOATS. Of a
// product that is summed send(..), with the same arguments, is called for all outputs of a tile first.
constexpr int PARTIAL_FLOATS = WARPS * 2 * STREAMS * TILE_ROWS * 2;

template <int PART, typename Send, typename Finish>
__device__ __forceinline__ void multiply(
    Weights& weights, const Linear* linears, const Operand<PART>& x, float* partial, const Send& send, const Finish& finish) {
  using Own = Job<PART>;
  using Crew = Team<PART>;
  constexpr int SIZE = Crew::SIZE, APART = SIZE >= 4 ? SIZE + 4 : SIZE, PAIR = Own::LAYERS_BESIDE;
  const int lane = threadIdx.x % 32, member = Crew::member();
  float* of_team = partial + Crew::slot() * (PAIR * Own::OUTPUTS * APART);
#pragma unroll
  for (int round = 0; round < Own::rounds(); round++) {
    int tile = Crew::tile(round);
    if (tile >= Own::TILES) return;  // the same for the team, and nothing follows for it
    const Lane<PART> own(linears, tile);
    if (round > 0) {
      send_for<PART>(weights, linears, weights.norm, round);
      Crew::synchronize();  // the sums of the tile before have been read
    }
    float sums[2][2][4] = {};
    multiply_tile<PART>(sums, own, weights, x);
#pragma unroll
    for (int i = 0; i < (HALF_EMPTY ? 2 : 4); i++) {
      const int row = lane / 4 + i / 2 * 8, output = row * TILE_ROWS + lane % 4 * 2 + i % 2, second = HALF_EMPTY ? i + 2 : i;
      if (row >= STREAMS) continue;
      const float one = sums[0][0][i] + sums[0][1][second], other = sums[1][0][i] + sums[1][1][second];
      of_team[output * APART + member] = PAIR == 2 ? one : one + other;
      if constexpr (PAIR == 2) of_team[(Own::OUTPUTS + output) * APART + member] = other;
    }
    Crew::synchronize();
    const int layer = layer_of_tile<PART>(tile);
    auto outputs = [&](const auto& take) {
#pragma unroll
      for (int n = 0; n < Own::own_outputs(); n++) {
        const int output = Crew::thread() + n * SIZE * 32;
        if (output - lane >= Own::OUTPUTS) break;  // whole warps
        const bool inside = output < Own::OUTPUTS;
        float totals[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
          const float* from = of_team + (i * Own::OUTPUTS + (inside ? output : 0)) * APART;
          if constexpr (SIZE >= 4) {
#pragma unroll
            for (int each = 0; each < SIZE; each += 4) {
              const float4 four = *reinterpret_cast<const float4*>(from + each);
              totals[i] += (four.x + four.y) + (four.z + four.w);
            }
          } else {
#pragma unroll
            for (int each = 0; each < SIZE; each++) totals[i] += from[each];
          }
          totals[i] *= factor_of_kind<Own::KIND>() * linears[layer + i].factor;
        }
        const int row = tile * TILE_ROWS + output % TILE_ROWS, rows = rows_of<PART>(layer);
        const bool there = inside && row < rows;
        float bias[2] = {0.0f, 0.0f};
        if constexpr (HAS_BIAS[PART]) {
#pragma unroll
          for (int i = 0; i < PAIR; i++) {
            const T* known = linears[layer + i].bias;
            bias[i] = n == 0 ? weights.bias[i] : known == nullptr ? 0.0f : to_float(known[min(row, rows - 1)]);
          }
        }
        take(round, n, layer, output / TILE_ROWS, row, totals[0], totals[1], bias[0], bias[1], there);
      }
    };
    if constexpr (SUMMED<PART>) outputs(send);
    outputs(finish);
  }
}

}  // namespace marlin
