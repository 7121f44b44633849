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
  // Values that a lane takes of a row in one load.
  __device__ __forceinline__ int lane_values() const {
    return kind == DENSE ? 8 : kind == MXFP8 || kind == INT8 ? 16 : 32;
  }
  __device__ __forceinline__ int steps() const { return (depth + 4 * lane_values() - 1) / (4 * lane_values()); }
  __device__ __forceinline__ int tiles() const { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
};

// Rows of x in shared memory: [PARTS][rows][stride] pieces of 8 bfloat16. PARTS 3: float32 as a sum of three.
// Within a step the pieces that the four lanes read together stand beside each other, and rows are 64 bytes apart, modulo the
// banks of shared memory: so no two lanes of a load meet in a bank.
template <int PARTS>
struct Operand {
  uint4* pieces;
  int rows, stride, lane_pieces;  // pieces of a load of weights: 1, 2 or 4

  template <typename T>
  __device__ __forceinline__ Operand(uint4* memory, int count, const Linear<T>& linear)
      : pieces(memory), rows(count), lane_pieces(linear.lane_values() / PIECE_VALUES) {
    stride = 4 * lane_pieces * linear.steps();
    if (stride % 8 != 4) stride += 4;
  }

  __device__ __forceinline__ int place(int row, int piece) const {
    const int within = piece % (4 * lane_pieces);
    return row * stride + piece - within + within % lane_pieces * 4 + within / lane_pieces;
  }

  // Values 8 * piece and on of a row.
  __device__ __forceinline__ void put(int row, int piece, float (&values)[PIECE_VALUES]) const {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      uint32_t pairs[4];
#pragma unroll
      for (int p = 0; p < 4; p++) {
        // A word of codes is decoded to pairs of the codes half a word apart.
        const int dense = 2 * p, eight = p / 2 * 4 + p % 2;
        const float first = lane_pieces == 1 ? values[dense] : lane_pieces == 2 ? values[eight] : values[p];
        const float second = lane_pieces == 1 ? values[dense + 1] : lane_pieces == 2 ? values[eight + 2] : values[p + 4];
        pairs[p] = pair_of<false>(first, second);
      }
      if constexpr (PARTS > 1) {
#pragma unroll
        for (int i = 0; i < PIECE_VALUES; i++) values[i] -= to_float(from_float<__nv_bfloat16>(values[i]));
      }
      pieces[part * rows * stride + place(row, piece)] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
};

// What a phase multiplies: the rows of several layers one after another, or a pair of layers row by row.
template <typename T>
struct Job {
  const Linear<T>* linears;
  int count;
  bool paired;

  __device__ __forceinline__ int tiles() const {
    int sum = 0;
    for (int i = 0; i < (paired ? 1 : count); i++) sum += linears[i].tiles();
    return sum;
  }
  // The layer of a tile, which becomes the tile within it.
  __device__ __forceinline__ int layer_of(int& tile) const {
    int i = 0;
    while (!paired && i + 1 < count && tile >= linears[i].tiles()) tile -= linears[i++].tiles();
    return i;
  }
};

// How the warps of the grid share a job: teams of warps of one block, each team a tile, each of its warps some of the depth.
// Tiles go to blocks in turn. Teams are as large as leaves one for every tile.
struct Share {
  int size, team, member, teams;

  template <typename T, int WARPS>
  static __device__ __forceinline__ Share of(const Job<T>& job) {
    const int tiles = job.tiles(), steps = job.linears[0].steps(), warp = threadIdx.x / 32;
    int size = WARPS;
    while (size > 1 && (size >= 2 * steps || gridDim.x * (WARPS / size) < tiles)) size /= 2;
    return {size, int(warp / size * gridDim.x + blockIdx.x), warp % size, int(gridDim.x) * (WARPS / size)};
  }
};

// DEPTH loads of a lane's weights, on their way or used and loaded anew. KINDS has a bit for each kind that there is.
template <typename T, int KINDS, int DEPTH>
struct Weights {
  static constexpr bool AFFINE = (KINDS & (1 << INT4 | 1 << INT8)) != 0;
  uint32_t words[DEPTH][4];
  uint32_t scales[DEPTH];
  float affine[AFFINE ? DEPTH : 1][2];  // scale and zero
  const Linear<T>* pair[2];
  int tile, units;

  // Begins with a team's tile: loads what comes first. Units are steps of the depth; of a pair, by turns.
  __device__ __forceinline__ void begin(const Job<T>& job, const Share& share, int wanted) {
    tile = wanted;
    units = 0;
    if (wanted >= job.tiles()) return;
    pair[0] = job.linears + job.layer_of(tile);
    pair[1] = job.linears + (job.paired ? 1 : 0);
    const int steps = pair[0]->steps();
    units = share.member < steps ? (steps - share.member + share.size - 1) / share.size : 0;
    if (job.paired) units *= 2;
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot++) load(job.paired, share, slot, slot);
  }

  static __device__ __forceinline__ int step_of(bool paired, const Share& share, int unit) {
    return share.member + (paired ? unit / 2 : unit) * share.size;
  }

  __device__ __forceinline__ void load(bool paired, const Share& share, int slot, int unit) {
    if (unit >= units) return;  // the same for all lanes
    const Linear<T>& linear = paired && slot % 2 ? *pair[1] : *pair[0];
    const int lane = threadIdx.x % 32, values = linear.lane_values();
    const int chunk = step_of(paired, share, unit) * 4 + lane % 4;
    const int64_t row = min(tile * TILE_ROWS + lane / 4, linear.rows - 1);
    if (chunk * values >= linear.depth) {
#pragma unroll
      for (int i = 0; i < 4; i++) words[slot][i] = 0;
      scales[slot] = 0;
      if constexpr (AFFINE) affine[slot][0] = affine[slot][1] = 0.0f;
      return;
    }
    load_once<true>(linear.weight + (row * (linear.depth / values) + chunk) * 4, words[slot]);
    if (linear.kind == DENSE) return;
    if constexpr (AFFINE) {
      if (linear.kind >= INT4) {
        const int64_t group = (row * linear.depth + chunk * values) / linear.group;
        affine[slot][0] = to_float(static_cast<const T*>(linear.scales)[group]);
        affine[slot][1] = to_float(linear.zeros[group]);
        return;
      }
    }
    const uint8_t* codes = static_cast<const uint8_t*>(linear.scales) + (row * linear.depth + chunk * values) / linear.group;
    scales[slot] = linear.kind == NVFP4 ? *reinterpret_cast<const uint16_t*>(codes) : *codes;
  }
};

// Weights are multiplied as w * 2^OPERAND_EXPONENT where they are codes under a scale, which keeps them among normal numbers.
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

// sums += x @ w^T for one load of weights: two sums, of which each product takes the one that was not just used.
template <int KIND, int PARTS>
__device__ __forceinline__ void multiply_unit(
    float (&sums)[2][4], const uint32_t (&words)[4], uint32_t scales, const float* affine, const Operand<PARTS>& x, int step) {
  constexpr int SPLIT = PARTS > 1 && (KIND == INT4 || KIND == INT8) ? 2 : 1;
  constexpr int LANE_PIECES = KIND == DENSE ? 1 : KIND == MXFP8 || KIND == INT8 ? 2 : 4;
  const int lane = threadIdx.x % 32, row = lane / 4;
#pragma unroll
  for (int piece = 0; piece < LANE_PIECES; piece++) {
    uint32_t w[SPLIT][4];
    weight_pairs<KIND, SPLIT>(words, scales, affine, piece, w);
    const uint4* from = x.pieces + (step * LANE_PIECES + piece) * 4 + lane % 4;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
      if (row < x.rows) low = from[(part * x.rows + row) * x.stride];
      if (row + 8 < x.rows) high = from[(part * x.rows + row + 8) * x.stride];
#pragma unroll
      for (int split = 0; split < SPLIT; split++) {
        multiply_tiles<false>(sums[0], low.x, high.x, low.y, high.y, w[split][0], w[split][1]);
        multiply_tiles<false>(sums[1], low.z, high.z, low.w, high.w, w[split][2], w[split][3]);
      }
    }
  }
}

template <int KINDS, int PARTS>
__device__ __forceinline__ void multiply_any(
    int kind, float (&sums)[2][4], const uint32_t (&words)[4], uint32_t scales, const float* affine, const Operand<PARTS>& x,
    int step) {
  if constexpr ((KINDS & 1 << DENSE) != 0) if (kind == DENSE) multiply_unit<DENSE>(sums, words, scales, affine, x, step);
  if constexpr ((KINDS & 1 << NVFP4) != 0) if (kind == NVFP4) multiply_unit<NVFP4>(sums, words, scales, affine, x, step);
  if constexpr ((KINDS & 1 << MXFP4) != 0) if (kind == MXFP4) multiply_unit<MXFP4>(sums, words, scales, affine, x, step);
  if constexpr ((KINDS & 1 << MXFP8) != 0) if (kind == MXFP8) multiply_unit<MXFP8>(sums, words, scales, affine, x, step);
  if constexpr ((KINDS & 1 << INT4) != 0) if (kind == INT4) multiply_unit<INT4>(sums, words, scales, affine, x, step);
  if constexpr ((KINDS & 1 << INT8) != 0) if (kind == INT8) multiply_unit<INT8>(sums, words, scales, affine, x, step);
}

// A job by all blocks; `weights` has begun with the team's first tile, and x stands there for all threads of the block.
// finish(layer, x row, row of W, product, product with the second of a pair) is called once for each, by some thread.
// `factors` multiply the products of each row of x, and are read late: after the sums have met.
// `partial` is shared memory for WARPS * 2 * rows * 8 floats.
template <int WARPS, typename T, int KINDS, int DEPTH, int PARTS, typename Finish>
__device__ __forceinline__ void multiply(
    const Job<T>& job, const Share& share, Weights<T, KINDS, DEPTH>& weights, const Operand<PARTS>& x,
    const float* factors, float* partial, const Finish& finish) {
  static_assert(DEPTH % 2 == 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = job.tiles(), outputs = x.rows * TILE_ROWS;
  for (int first = 0; first < tiles; first += share.teams) {  // the same for all blocks
    const int wanted = first + share.team;
    if (first > 0) {
      weights.begin(job, share, wanted);
      __syncthreads();  // the sums of the tile before have been read
    }
    if (wanted < tiles) {
      float sums[2][2][4] = {};
      const int kind = weights.pair[0]->kind;
      for (int unit = 0; unit < weights.units; unit += DEPTH) {
#pragma unroll
        for (int slot = 0; slot < DEPTH; slot++) {
          if (unit + slot < weights.units) {
            const int step = weights.step_of(job.paired, share, unit + slot);
            const float* affine = weights.affine[weights.AFFINE ? slot : 0];
            // A pair's two take turns with the slots; of a single layer two sums are as good as one.
            multiply_any<KINDS>(kind, sums[slot % 2], weights.words[slot], weights.scales[slot], affine, x, step);
            weights.load(job.paired, share, slot, unit + slot + DEPTH);
          }
        }
      }
#pragma unroll
      for (int which = 0; which < 2; which++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = lane / 4 + i / 2 * 8;
          const float sum = sums[which][0][i] + sums[which][1][i];
          if (row < x.rows) partial[(warp * 2 + which) * outputs + row * TILE_ROWS + lane % 4 * 2 + i % 2] = sum;
        }
      }
    }
    __syncthreads();
    if (wanted >= tiles) continue;
    const int leader = warp - share.member;
    for (int i = share.member * 32 + lane; i < outputs; i += share.size * 32) {
      const int row = weights.tile * TILE_ROWS + i % TILE_ROWS;
      const Linear<T>&first_of = *weights.pair[0], &second_of = *weights.pair[1];
      if (row >= first_of.rows) continue;
      float one = 0.0f, other = 0.0f;
      for (int member = 0; member < share.size; member++) {
        one += partial[(leader + member) * 2 * outputs + i];
        other += partial[((leader + member) * 2 + 1) * outputs + i];
      }
      if (!job.paired) one += other;
      one = one * (factors[i / TILE_ROWS] * first_of.factor * factor_of_kind(first_of.kind)) + (first_of.bias ? to_float(first_of.bias[row]) : 0.0f);
      other = other * (factors[i / TILE_ROWS] * second_of.factor * factor_of_kind(second_of.kind)) + (second_of.bias ? to_float(second_of.bias[row]) : 0.0f);
      finish(int(weights.pair[0] - job.linears), i / TILE_ROWS, row, one, other);
    }
  }
}

}  // namespace marlin
