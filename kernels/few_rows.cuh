// Products of up to 16 rows of x with weights of any format on the matrix units, shared out over all warps of a grid.
//
// x is the left operand, 16 rows of which cost what one costs; 8 rows of W, a tile, are the right one. The order of the depth
// within a product is free as long as both operands agree: so a lane takes 16 consecutive bytes of a row of W, as one load
// brings them, four lanes beside each other, and x stands in shared memory in the order in which codes are decoded.
// Loads of weights need no x: a warp has its first ones on their way before it waits for the x of another block.

namespace marlin {

constexpr int TILE_ROWS = 8, MOST_ROWS = 16, PIECE_VALUES = 8;

enum Kind { DENSE, NVFP4, MXFP4, MXFP8, INT4, INT8 };

// A linear layer, as `marlin_cli.ops.cuda_stages` lays it out.
template <typename T>
struct Linear {
  const uint32_t* weight;  // [rows, depth * bits / 32]; bfloat16 where dense
  const void* scales;      // [rows, depth / group] uint8; T for int4 and int8
  const T* zeros;          // [rows, depth / group], int4 and int8 alone
  const T* bias;           // [rows] or null
  int32_t rows, depth;
  float factor;            // multiplies the product before the bias
  int16_t kind, group;     // of dense weights: the parts side by side whose sum they are, 3 for float32

  // Values of a row of x, which repeat for each part of the weight.
  __device__ __forceinline__ int width() const { return kind == DENSE ? depth / group : depth; }
  // Of the values that a lane takes of a row in one load: the logarithm.
  __device__ __forceinline__ int log_values() const { return kind == DENSE ? 3 : kind == MXFP8 || kind == INT8 ? 4 : 5; }
  __device__ __forceinline__ int steps() const { return (depth + (4 << log_values()) - 1) >> (2 + log_values()); }
  __device__ __forceinline__ int tiles() const { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
};

// Rows of x in shared memory: [PARTS][rows][stride] pieces of 8 bfloat16. PARTS 3: float32 as a sum of three.
// Within a step the pieces that the four lanes read together stand beside each other, and rows are 64 bytes apart, modulo the
// banks of shared memory: so no two lanes of a load meet in a bank.
template <int PARTS>
struct Operand {
  uint4* pieces;
  int rows, stride, log_pieces;  // of a load of weights: 1, 2 or 4 pieces

  __device__ __forceinline__ int place(int row, int piece) const {
    const int within = piece & ((4 << log_pieces) - 1);
    return row * stride + piece - within + ((within & ((1 << log_pieces) - 1)) << 2) + (within >> log_pieces);
  }

  // Values 8 * piece and on of a row.
  __device__ __forceinline__ void put(int row, int piece, float (&values)[PIECE_VALUES]) const {
    uint4* to = pieces + place(row, piece);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      uint32_t pairs[4];
#pragma unroll
      for (int p = 0; p < 4; p++) {
        // A word of codes is decoded to pairs of the codes half a word apart.
        const int dense = 2 * p, eight = p / 2 * 4 + p % 2;
        const float first = log_pieces == 0 ? values[dense] : log_pieces == 1 ? values[eight] : values[p];
        const float second = log_pieces == 0 ? values[dense + 1] : log_pieces == 1 ? values[eight + 2] : values[p + 4];
        pairs[p] = pair_of<false>(first, second);
      }
      if constexpr (PARTS > 1) {
#pragma unroll
        for (int i = 0; i < PIECE_VALUES; i++) values[i] -= to_float(from_float<__nv_bfloat16>(values[i]));
      }
      to[part * rows * stride] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
};

// What a phase multiplies: the rows of several layers one after another, or a pair of layers row by row. And how the warps of the
// grid share it: teams of warps of one block, each team a tile, each of its warps some of the depth. Tiles go to blocks in turn;
// teams are as large as leaves one for every tile. It is the same in every layer, so it is worked out once.
struct Job {
  int16_t count, paired, kind, log_values, log_group, log_size;
  int32_t tiles, teams, steps, depth, width, stride, whole, segments, log_segments;  // x: see Operand and `bring`
  int32_t first_tile[3];                                                           // of each layer
  float inverse_width;

  template <typename T>
  __device__ __forceinline__ void plan(const Linear<T>* linears, int number, bool pair, int warps) {
    const Linear<T>& any = linears[0];
    count = number, paired = pair, kind = any.kind, log_values = any.log_values(), log_group = 0, log_size = 0;
    while (1 << (log_group + 1) <= any.group) log_group++;
    inverse_width = 1.0f / any.width();
    tiles = 0, steps = any.steps(), depth = any.depth, width = any.width(), whole = steps * (4 << log_values);
    for (int i = 0; i < number; i++) {
      first_tile[i] = pair ? 0 : tiles;
      tiles = pair && i > 0 ? tiles : tiles + linears[i].tiles();
    }
    while (2 << log_size <= warps && (1 << log_size) < steps && gridDim.x * (warps >> (log_size + 1)) >= tiles) log_size++;
    teams = gridDim.x * (warps >> log_size);
    stride = whole / PIECE_VALUES;
    if (stride % 8 != 4) stride += 4;
    segments = (whole + 255) / 256, log_segments = 0;
    while (1 << log_segments < segments) log_segments++;
  }

  __device__ __forceinline__ int team() const { return (threadIdx.x / 32 >> log_size) * gridDim.x + blockIdx.x; }
  __device__ __forceinline__ int member() const { return threadIdx.x / 32 & ((1 << log_size) - 1); }
};

// Where a lane's weights of one tile begin.
struct Lane {
  uint32_t words;   // of 16 bytes, before the first of the lane
  uint32_t groups;  // before the first of its row
  int16_t tile;     // within its layer; below 0: none
  uint16_t layer : 2, units : 14;

  template <typename T>
  __device__ __forceinline__ void plan(const Job& job, const Linear<T>* linears, int wanted) {
    tile = -1, units = 0, layer = 0, words = groups = 0;
    if (wanted >= job.tiles) return;
    while (!job.paired && layer + 1 < job.count && wanted >= job.first_tile[layer + 1]) layer++;
    tile = wanted - job.first_tile[layer];
    const int lane = threadIdx.x % 32, member = job.member();
    units = member < job.steps ? (((job.steps - member - 1) >> job.log_size) + 1) << job.paired : 0;
    const uint32_t row = min(tile * TILE_ROWS + lane / 4, linears[layer].rows - 1);
    words = row * (job.depth >> job.log_values) + member * 4 + lane % 4;
    groups = job.kind == DENSE ? 0 : row * (job.depth >> job.log_group);
  }
};

// What a product is added to, and what multiplies it; of a pair, each one's own.
struct Known {
  float added[2], factor[2];
};

// DEPTH loads of a lane's weights, on their way or used and loaded anew. KINDS has a bit for each kind that there is.
// Units are steps of the depth; those of a pair of layers take turns.
template <typename T, int KINDS, int DEPTH>
struct Weights {
  static constexpr bool AFFINE = (KINDS & (1 << INT4 | 1 << INT8)) != 0, CODES = (KINDS & ~(1 << DENSE)) != 0;
  uint32_t words[DEPTH][4];
  uint32_t scales[CODES ? DEPTH : 1];
  float affine[AFFINE ? DEPTH : 1][2];  // scale and zero
  Known known;                          // of the first output of this thread

  __device__ __forceinline__ void begin(const Job& job, const Linear<T>* linears, const Lane& lane) {
    const Linear<T>&one = linears[job.paired ? 0 : lane.layer], &other = linears[job.paired ? 1 : lane.layer];
    const int units = lane.units;
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot++) {
      if (slot >= units) break;  // the same for all lanes
      load(job, slot % 2 ? other : one, lane, slot, slot);
    }
  }

  __device__ __forceinline__ void load(const Job& job, const Linear<T>& linear, const Lane& lane, int slot, int unit) {
    const int step = (unit >> job.paired) << job.log_size;
    const int column = ((job.member() + step) * 4 + int(threadIdx.x % 4)) << job.log_values;
    if (column >= job.depth) {
#pragma unroll
      for (int i = 0; i < 4; i++) words[slot][i] = 0;
      if constexpr (CODES) scales[slot] = 0;
      if constexpr (AFFINE) affine[slot][0] = affine[slot][1] = 0.0f;
      return;
    }
    load_once<true>(linear.weight + (size_t(lane.words) + step * 4) * 4, words[slot]);
    if constexpr (CODES) {
      if (job.kind == DENSE) return;
      const uint32_t group = lane.groups + (column >> job.log_group);
      if constexpr (AFFINE) {
        if (job.kind >= INT4) {
          affine[slot][0] = to_float(static_cast<const T*>(linear.scales)[group]);
          affine[slot][1] = to_float(linear.zeros[group]);
          return;
        }
      }
      const uint8_t* codes = static_cast<const uint8_t*>(linear.scales) + group;
      scales[slot] = job.kind == NVFP4 ? *reinterpret_cast<const uint16_t*>(codes) : *codes;
    }
  }
};

// Weights are multiplied as w * 2^CODES_EXPONENT where they are codes under a scale, which keeps them among normal numbers.
constexpr int CODES_EXPONENT = -26;

__device__ __forceinline__ float factor_of_kind(int kind) {
  return NVFP4 <= kind && kind <= MXFP8 ? power_of_two<-CODES_EXPONENT>() : 1.0f;
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
    constexpr int GROUPS = KIND == NVFP4 ? 2 : 1;
    uint32_t factors[GROUPS];
    scale_pairs<false, CODES_EXPONENT + Own::CODE_EXPONENT>(scales, factors);
    const uint32_t factor = GROUPS == 2 && piece >= 2 ? factors[GROUPS - 1] : factors[0];
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
template <int KIND, int PARTS>
__device__ __forceinline__ void multiply_unit(
    float (&sums)[2][4], const uint32_t (&words)[4], uint32_t scales, const float* affine, const uint4* x, int part_stride,
    int high_stride, bool low_there, bool high_there) {
  constexpr int SPLIT = PARTS > 1 && (KIND == INT4 || KIND == INT8) ? 2 : 1;
  constexpr int LANE_PIECES = KIND == DENSE ? 1 : KIND == MXFP8 || KIND == INT8 ? 2 : 4;
#pragma unroll
  for (int piece = 0; piece < LANE_PIECES; piece++) {
    uint32_t w[SPLIT][4];
    weight_pairs<KIND, SPLIT>(words, scales, affine, piece, w);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
      if (low_there) low = x[part * part_stride + piece * 4];
      if (high_there) high = x[part * part_stride + piece * 4 + high_stride];
#pragma unroll
      for (int split = 0; split < SPLIT; split++) {
        multiply_tiles<false>(sums[0], low.x, high.x, low.y, high.y, w[split][0], w[split][1]);
        multiply_tiles<false>(sums[1], low.z, high.z, low.w, high.w, w[split][2], w[split][3]);
      }
    }
  }
}

// All units of a warp's tile, of one kind.
template <int KIND, int PARTS, typename T, int KINDS, int DEPTH>
__device__ __forceinline__ void multiply_tile(
    float (&sums)[2][2][4], const Job& job, const Linear<T>* linears, const Lane& own, Weights<T, KINDS, DEPTH>& weights,
    const Operand<PARTS>& x) {
  static_assert(DEPTH % 2 == 0);
  constexpr int LOG_PIECES = KIND == DENSE ? 0 : KIND == MXFP8 || KIND == INT8 ? 1 : 2;
  const int row = threadIdx.x % 32 / 4, part_stride = x.rows * x.stride, high_stride = 8 * x.stride;
  const bool low_there = row < x.rows, high_there = row + 8 < x.rows;
  const uint4* from = x.pieces + (low_there ? row * x.stride : 0) + (job.member() << (2 + LOG_PIECES)) + threadIdx.x % 4;
  const Linear<T>&one = linears[job.paired ? 0 : own.layer], &other = linears[job.paired ? 1 : own.layer];
  const int units = own.units;
  for (int unit = 0; unit < units; unit += DEPTH) {
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot++) {
      if (unit + slot >= units) break;  // the same for all lanes
      const int step = ((unit + slot) >> job.paired) << job.log_size;
      // A pair's two sums take turns with the slots; of a single layer two are as good as one.
      multiply_unit<KIND, PARTS>(
          sums[slot % 2], weights.words[slot], weights.scales[weights.CODES ? slot : 0],
          weights.affine[weights.AFFINE ? slot : 0], from + (step << (2 + LOG_PIECES)), part_stride, high_stride, low_there,
          high_there);
      if (unit + slot + DEPTH < units) weights.load(job, slot % 2 ? other : one, own, slot, unit + slot + DEPTH);
    }
  }
}

// The first output of a thread among those of its team, [x rows][TILE_ROWS]. With few outputs a warp sums some of the members in
// each quarter of its lanes.
__device__ __forceinline__ int first_output(const Job& job, int x_rows) {
  const int lane = threadIdx.x % 32;
  return x_rows == 1 ? job.member() * TILE_ROWS + lane % TILE_ROWS : job.member() * 32 + lane;
}

// A job by all blocks; `weights` has begun with the team's first tile, and x stands there for all threads of the block.
// finish(layer, x row, row of W, product, product with the second of a pair, known) is called once for each, by some thread;
// know(layer, x row, row of W) gives what is known of a place. `partial` is shared memory for WARPS * 2 * rows * 8 floats.
template <int WARPS, typename T, int KINDS, int DEPTH, int PARTS, typename Know, typename Finish>
__device__ __forceinline__ void multiply(
    const Job& job, const Linear<T>* linears, Lane own, Weights<T, KINDS, DEPTH>& weights, const Operand<PARTS>& x,
    float* partial, const Know& know, const Finish& finish) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, outputs = x.rows * TILE_ROWS;
  const int size = 1 << job.log_size, member = job.member(), begin = first_output(job, x.rows);
  const bool few = x.rows == 1;
  for (int first = 0; first < job.tiles; first += job.teams) {  // the same for all blocks
    if (first > 0) {
      own.plan(job, linears, first + job.team());
      weights.begin(job, linears, own);
      __syncthreads();  // the sums of the tile before have been read
    }
    if (own.tile >= 0) {
      float sums[2][2][4] = {};
      if constexpr ((KINDS & 1 << DENSE) != 0) if (job.kind == DENSE) multiply_tile<DENSE>(sums, job, linears, own, weights, x);
      if constexpr ((KINDS & 1 << NVFP4) != 0) if (job.kind == NVFP4) multiply_tile<NVFP4>(sums, job, linears, own, weights, x);
      if constexpr ((KINDS & 1 << MXFP4) != 0) if (job.kind == MXFP4) multiply_tile<MXFP4>(sums, job, linears, own, weights, x);
      if constexpr ((KINDS & 1 << MXFP8) != 0) if (job.kind == MXFP8) multiply_tile<MXFP8>(sums, job, linears, own, weights, x);
      if constexpr ((KINDS & 1 << INT4) != 0) if (job.kind == INT4) multiply_tile<INT4>(sums, job, linears, own, weights, x);
      if constexpr ((KINDS & 1 << INT8) != 0) if (job.kind == INT8) multiply_tile<INT8>(sums, job, linears, own, weights, x);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, place = warp * 2 * outputs + row * TILE_ROWS + lane % 4 * 2 + i % 2;
        if (row < x.rows) partial[place] = sums[0][0][i] + sums[0][1][i], partial[place + outputs] = sums[1][0][i] + sums[1][1][i];
      }
    }
    __syncthreads();
    if (own.tile < 0 || (few && member > 0)) continue;
    const float* of_team = partial + (warp - member) * 2 * outputs;
    const float factor = factor_of_kind(job.kind);
    for (int i = begin; i < outputs; i += size * 32) {
      float one = 0.0f, other = 0.0f;
#pragma unroll 4
      for (int each = few ? lane / TILE_ROWS : 0; each < size; each += few ? 4 : 1) {
        one += of_team[each * 2 * outputs + i], other += of_team[(each * 2 + 1) * outputs + i];
      }
      if (few) {
        one += __shfl_xor_sync(0xffffffff, one, 8), other += __shfl_xor_sync(0xffffffff, other, 8);
        one += __shfl_xor_sync(0xffffffff, one, 16), other += __shfl_xor_sync(0xffffffff, other, 16);
      }
      const int row = own.tile * TILE_ROWS + i % TILE_ROWS;
      if (row >= linears[own.layer].rows || (few && lane >= TILE_ROWS)) continue;
      if (!job.paired) one += other;
      const bool first_of_all = first == 0 && i == begin;
      const Known known = first_of_all ? weights.known : know(own.layer, i / TILE_ROWS, row);
      finish(own.layer, i / TILE_ROWS, row, one * factor, other * factor, known);
    }
  }
}

}  // namespace marlin
