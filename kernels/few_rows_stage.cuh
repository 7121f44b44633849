// The layers of one stage over one new row of each of up to 16 streams, by all blocks of a grid together.
//
// A layer is four or five phases: q/k/v; attention, where it is too much for each block to do all of it itself; o_proj and
// residual; gate/up and activation; down_proj and residual. Each phase brings its x into shared memory (normalised, combined,
// embedded) and multiplies; the weights of the next one are on their way before its x is there.
// With few streams (TAGGED) what a phase gives lies in cells that carry its number, and whoever needs them looks until they are
// there; a block without a tile reads nothing. Nothing is overwritten too early: a phase that writes a place again comes after
// one that needed all that every reader of the place gave. With more streams a barrier stands between phases: all blocks look at
// the same cells, and each look that comes too early is another load.
// Where TIMED, block 0 keeps account of where its time goes: a phase lasts until what it waits for has come.
// Norms multiply x by their weight before the product and by the row's own factor after it, so that x is read once.
// Rows of x are in the registers of the threads that write them too: nobody reads them to add to them.

namespace marlin {

// As `marlin_cli.ops.cuda_stages` lays them out.
struct Layer {
  const T *attention_norm, *ffn_norm, *query_norm, *key_norm;  // the last two may be null
  T *keys, *values;  // [streams, kv_heads, capacity, head_dim]; of a local stage see `own_rows`; where PAGED, keys are its Pages
  Linear qkv[3], out, up[2], down;  // up: gate and up, or up alone
  // Of a decoder that reads a memory: [inputs, heads, states, head_dim], or words and scales of that.
  const T* memory_norm;
  const void *memory_keys, *key_scales, *memory_values, *value_scales;
  Linear memory_query, memory_out;
};

struct Stage {
  unsigned long long* grid;  // see Grid
  // Cells where TAGGED, else floats: [streams, dim], [streams, q, k and v], [streams * heads * SPLITS, SEEN], ..
  void *x, *qkv, *parts;
  void *attended, *hidden;  // [streams, heads * head_dim], [streams, ffn_dim]; as Kept, two in a cell where it has 16 bits
  void* logits;             // [streams, vocab]
  const T *table, *norm;    // [vocab, width]; [dim]
  // Of the host: for the ids of some launches, each the launch's number, then [streams, steps]; of a stage that draws none two
  // words of 64 bits, see Grid::heed.
  int32_t* mailbox;
  const T* bias;            // [heads, 2 * REACH + 1]: what is added to scores by distance
  const int32_t* lengths;   // [inputs] states that are no filler; null: all
  Linear first, last;       // of bytes to rows; of rows to logits or to the next stage's condition
  int32_t capacity, states;  // states: of a memory; rows in a global stage's cache, which the launch puts there
  float log2_theta, scale, eps;
  int32_t inputs;  // of a decoder; else streams that are no filler
  const T* positions;  // where PLACED: [patches, dim], added to what FIRST gives
};

using Kept = marlin::Either<X_PARTS == 1, __nv_bfloat16, float>;  // what waits for a product

constexpr int SEEN = HEAD_DIM + 4, QUERIES = HEADS * HEAD_DIM, KEYS = KV_HEADS * HEAD_DIM, QKV_ROW = QUERIES + 2 * KEYS;
constexpr int QUERY_HEADS = HEADS / KV_HEADS;  // that share a head of the cache
// In a local stage a warp attends alone to a head, of all heads in each block or of one; it has its cache for itself, in memory
// that nobody else reads. Elsewhere all warps of a block share a head's rows.
constexpr bool ALONE = !BY_BLOCKS && STREAMS * HEADS <= 2 * WARPS;
constexpr bool PAGED = KEY_BITS < 16 || VALUE_BITS < 16;  // the cache is packed
constexpr int NEAR_SPLITS = SPLITS < 4 ? SPLITS : 4;      // of a head's rows, while these are few
constexpr int FAR_ROWS = NEAR_SPLITS * WARPS * (256 / HEAD_DIM) * DEEP_BY_BLOCKS;  // more than one look of each warp
constexpr int CELLS_A_KEPT_PAIR = X_PARTS == 1 ? 1 : 2;
// Whether a norm stands before a phase's product.
template <int PART>
constexpr bool HAS_NORM = PART == QKV || PART == UP || (PART == LAST && LAST_NORMED) || PART == MEMORY_QUERY;
// Of x in a phase with a norm: values that a lane takes at once, and that a warp does.
constexpr int NORMED_VALUES = TAGGED ? 2 : 8, SEGMENT = 32 * NORMED_VALUES, SEGMENTS = (DIM + SEGMENT - 1) / SEGMENT;
constexpr int X_BUFFERS = TAGGED ? 2 : 1;  // without barriers a warp may still read one phase's x while another brings the next

__device__ __forceinline__ void put_float(void* to, int place, float value, unsigned phase) {
  if constexpr (TAGGED) {
    store_one(static_cast<Cell*>(to) + place, cell_of(__float_as_uint(value), phase));
  } else {
    static_cast<float*>(to)[place] = value;
  }
}

// A value of a row that waits for the product of phase READER. By whole warps, lanes of odd places beside those of the even ones
// before.
template <int READER>
__device__ __forceinline__ void put_kept(void* to, int row, int column, float value, bool there, unsigned phase) {
  const int place = COPIED ? Operand<READER>::copied_place(row, column) : row * WIDTHS[READER] + column;
  if constexpr (!TAGGED) {
    if (there) static_cast<Kept*>(to)[place] = from_float<Kept>(value);
  } else if constexpr (X_PARTS > 1) {
    if (there) put_float(to, place, value, phase);
  } else {
    const float other = __shfl_xor_sync(0xffffffff, value, 1);
    if (there && place % 2 == 0) store_one(static_cast<Cell*>(to) + place / 2, cell_of(pair_of<false>(value, other), phase));
  }
}

// Which values of rows of x a thread brings: OWN times COUNT side by side, by warps, a segment of a row each.
template <int PART, int COUNT>
struct Share {
  static constexpr bool KEPT = X_PARTS == 1 && (PART == DOWN || PART == OUT || PART == MEMORY_OUT);  // 16 bits each
  static constexpr int WIDTH = WIDTHS[PART], SEGMENT = 32 * COUNT, SEGMENTS = (WIDTH + SEGMENT - 1) / SEGMENT;
  static constexpr bool ONE_COLUMN = WARPS % SEGMENTS == 0;  // a thread's items are of one column
  static constexpr int ITEMS = STREAMS * SEGMENTS, OWN = (ITEMS + WARPS - 1) / WARPS;
  // Loads take long, so many are under way; with a barrier before them they need not all be looked at together.
  static constexpr int MOST = KEPT ? 8 : 4, AT_ONCE = TAGGED || OWN < MOST ? OWN : MOST;
  int row[AT_ONCE], column[AT_ONCE], segment[AT_ONCE];
  bool there[AT_ONCE];

  __device__ __forceinline__ explicit Share(int begin) {
#pragma unroll
    for (int n = 0; n < AT_ONCE; n++) {
      const int item = int(threadIdx.x) / 32 + (begin + n) * WARPS;
      row[n] = item / SEGMENTS, segment[n] = item % SEGMENTS, column[n] = segment[n] * SEGMENT + int(threadIdx.x) % 32 * COUNT;
      there[n] = begin + n < OWN && item < ITEMS && column[n] < WIDTH;
    }
  }
};

__device__ __forceinline__ float no_bias(int) { return 0.0f; }

// What the time of a launch goes to beside the products of each `Part`; and how many kinds there are.
enum Other { ATTENTION = MEMORY_OUT + 1, MEMORY_ATTENTION, DRAWING, KINDS_OF_TIME };

struct Machine {
  Stage* stage;
  Layer* layers;
  float *rotations, *squares, *means, *partial, *joining;  // [streams][head_dim], [2][streams][SEGMENTS], .., see `multiply`, [WARPS][SEEN]
  float* staged;                                           // [streams][QKV_ROW] where each block attends to all heads
  int* chosen;                                             // [16]
  uint4* memory;                                           // of x, X_BUFFERS times BUFFER pieces; of scores of ids
  Grid grid;
  unsigned phase;  // of which the cells come that are read now
  unsigned long long *spent, since, begun;  // where TIMED, of thread 0 of block 0: cycles by kind; when the last one ended; begin
  PartSums parts;  // where GPUs share the stage
  Weights sent;
  const int32_t* padding;  // where PLACED: filler rows of each stream's cache, or null
  static constexpr int X_ROUNDS = Job<OUT>::rounds(), X_OUTPUTS = Job<OUT>::own_outputs();
  float residual[X_ROUNDS][X_OUTPUTS];

  // Shared memory is laid out here and measured in `cuda_stages`.
  __device__ __forceinline__ Machine(const uint8_t* model, unsigned first_phase)
      : grid(reinterpret_cast<const Stage*>(model)->grid), phase(first_phase) {
    constexpr int WORDS = (sizeof(Stage) + LAYERS * sizeof(Layer)) / 8;
    uint8_t* shared = static_cast<uint8_t*>(dynamic_shared());
    for (int i = threadIdx.x; i < WORDS; i += THREADS) {
      reinterpret_cast<uint64_t*>(shared)[i] = reinterpret_cast<const uint64_t*>(model)[i];
    }
    stage = reinterpret_cast<Stage*>(shared);
    layers = reinterpret_cast<Layer*>(shared + sizeof(Stage));
    float* floats = reinterpret_cast<float*>(shared + (WORDS * 8 + 15) / 16 * 16);
    memory = reinterpret_cast<uint4*>(floats), floats += MEMORY_BYTES / 4;
    spent = reinterpret_cast<unsigned long long*>(floats), floats += 2 * MOST_KINDS_OF_TIME;
    if constexpr (TIMED) {
      if (threadIdx.x < KINDS_OF_TIME) spent[threadIdx.x] = 0;
      since = cycles(), begun = nanoseconds();
    }
    partial = floats, floats += PARTIAL_FLOATS;
    staged = floats, floats += ALONE ? STREAMS * QKV_ROW : 0;
    rotations = floats, floats += STREAMS * HEAD_DIM;
    joining = floats, floats += WARPS * SEEN;
    chosen = reinterpret_cast<int*>(floats), floats += MOST_ROWS;
    squares = floats, floats += 2 * STREAMS * SEGMENTS;
    means = floats;
    __syncthreads();
  }

  template <int PART>
  __device__ __forceinline__ Operand<PART> operand() const {
    constexpr int BUFFER = PART == OUT || PART == DOWN || PART == FIRST || PART == MEMORY_OUT ? X_BUFFERS - 1 : 0;
    return {memory + BUFFER * (MEMORY_BYTES / 16 / X_BUFFERS)};
  }

  // The words by which the host is told; where GPUs share the stage `turn` is that of the last sum before.
  __device__ __forceinline__ void heed(const Exchange* exchange, unsigned turn) {
    if constexpr (RANKS > 1) {
      parts.begin(exchange, turn), grid.heed(parts.host());
    } else {
      grid.heed(reinterpret_cast<unsigned long long*>(stage->mailbox));
    }
  }

  // The rows' positions for rotation, `seen` rows of which came before.
  __device__ __forceinline__ void rotate_at(int seen, const int32_t* padding) {
    if constexpr (ROTATES) {
      for (int b = 0; b < STREAMS; b++) {
        fill_rotation(rotations + b * HEAD_DIM, stage->log2_theta, seen - (padding == nullptr ? 0 : padding[b]), threadIdx.x, THREADS);
      }
    }
  }

  // What has passed since the last time went to KIND.
  template <int KIND>
  __device__ __forceinline__ void spend() {
    if constexpr (TIMED) {
      if (blockIdx.x > 0 || threadIdx.x > 0) return;
      const unsigned long long now = cycles();
      spent[KIND] += now - since, since = now;
    }
  }

  // Adds what was spent to what launches before have left behind the words of the grid: cycles by kind, and nanoseconds in all.
  __device__ __forceinline__ void tell_times() const {
    if constexpr (TIMED) {
      if (blockIdx.x > 0 || threadIdx.x > 0) return;
      for (int i = 0; i < KINDS_OF_TIME; i++) stage->grid[FIRST_TIME + i] += spent[i];
      stage->grid[FIRST_TIME + KINDS_OF_TIME] += nanoseconds() - begun;
    }
  }

  // A phase is over for this block; `send` sends for what the next one begins with.
  template <typename Send>
  __device__ __forceinline__ void go_on(const Send& send) {
    if constexpr (!TAGGED) grid.arrive();
    send();
    if constexpr (!TAGGED) grid.wait();
    phase++;
  }

  // Nothing is in x beyond its depth.
  template <int PART>
  __device__ __forceinline__ void clear_rest() const {
    using Own = Job<PART>;
    if constexpr (Own::WHOLE > Own::DEPTH) {
      constexpr int REST = (Own::WHOLE - Own::DEPTH) / PIECE_VALUES;
      for (int i = threadIdx.x; i < STREAMS * REST; i += THREADS) {
        float nothing[8] = {};
        operand<PART>().put(i / REST, Own::DEPTH + i % REST * PIECE_VALUES, nothing);
      }
    }
  }

  // x of the phase into shared memory: load(share, values) gives the values of a share. With a norm, `squares` learn each
  // segment's, and x is multiplied by its weight.
  template <int PART, int COUNT, typename Load>
  __device__ __forceinline__ void bring(const T* norm, const Load& load) {
    using Own = Job<PART>;
    using Mine = Share<PART, COUNT>;
    constexpr bool NORMED = HAS_NORM<PART>, CENTRED = NORMED && NORM_KIND != RMS;
    const Operand<PART> x = operand<PART>();
    const int lane = threadIdx.x % 32;
    clear_rest<PART>();
    if constexpr (CENTRED) {
      for (int begin = 0; begin < Mine::OWN; begin += Mine::AT_ONCE) {
        const Mine mine(begin);
        float values[Mine::AT_ONCE][COUNT] = {};
        load(mine, values);
#pragma unroll
        for (int n = 0; n < Mine::AT_ONCE; n++) {
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < COUNT; i++) sum += values[n][i];
          sum = sum_of_warp(sum);
          if (lane == 0 && mine.row[n] < STREAMS) means[mine.row[n] * SEGMENTS + mine.segment[n]] = sum / DIM;
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int begin = 0; begin < Mine::OWN; begin += Mine::AT_ONCE) {
      const Mine mine(begin);
      constexpr int COLUMNS = NORMED && !Mine::ONE_COLUMN ? Mine::AT_ONCE : 1;
      float values[Mine::AT_ONCE][COUNT] = {};
      Loaded<T, COUNT> weights[COLUMNS];
      if constexpr (NORMED) {
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
          if (mine.there[n]) weights[n].template load<false>(norm + mine.column[n]);
        }
      }
      load(mine, values);
#pragma unroll
      for (int n = 0; n < Mine::AT_ONCE; n++) {
        if constexpr (NORMED) {
          float mean = 0.0f, sum = 0.0f;
          if constexpr (CENTRED) {
            for (int i = 0; i < SEGMENTS && mine.there[n]; i++) mean += means[mine.row[n] * SEGMENTS + i];
          }
#pragma unroll
          for (int i = 0; i < COUNT; i++) {
            if (mine.there[n]) sum += (values[n][i] - mean) * (values[n][i] - mean);
            values[n][i] = (values[n][i] - (NORM_KIND == LAYER ? mean : 0.0f)) * weights[Mine::ONE_COLUMN ? 0 : n][i];
          }
          sum = sum_of_warp(sum);
          if (lane == 0 && mine.there[n]) squares_of<PART>()[mine.row[n] * SEGMENTS + mine.segment[n]] = sum;
        }
        if (!mine.there[n]) continue;
#pragma unroll
        for (int side = 0; side < Own::SIDES; side++) {
          float same[COUNT];
#pragma unroll
          for (int i = 0; i < COUNT; i++) same[i] = values[n][i];
          x.put(mine.row[n], side * Own::WIDTH + mine.column[n], same);
        }
      }
    }
  }

  template <int PART>
  __device__ __forceinline__ float* squares_of() const {
    return squares + (PART == UP ? STREAMS * SEGMENTS : 0);
  }

  // Of the root of the mean square of a row, which its product is multiplied by.
  template <int PART>
  __device__ __forceinline__ float factor_of_row(int row) const {
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < SEGMENTS; i++) sum += squares_of<PART>()[row * SEGMENTS + i];
    return rsqrtf(sum * (1.0f / DIM) + stage->eps);
  }

  // Rows of floats that the phase before wrote: [streams, WIDTH].
  template <typename Mine, int COUNT>
  __device__ __forceinline__ void load_floats(const void* from, const Mine& mine, float (&values)[Mine::AT_ONCE][COUNT]) {
    if constexpr (TAGGED) {
      static_assert(COUNT == 2);
      const Cell* cells[Mine::AT_ONCE];
      uint32_t bits[Mine::AT_ONCE][2];
#pragma unroll
      for (int n = 0; n < Mine::AT_ONCE; n++) cells[n] = static_cast<const Cell*>(from) + mine.row[n] * Mine::WIDTH + mine.column[n];
      read_cells(grid, cells, mine.there, phase, bits);
#pragma unroll
      for (int n = 0; n < Mine::AT_ONCE; n++) {
        if (mine.there[n]) values[n][0] = __uint_as_float(bits[n][0]), values[n][1] = __uint_as_float(bits[n][1]);
      }
    } else {
      Loaded<float, COUNT> loaded[Mine::AT_ONCE];
#pragma unroll
      for (int n = 0; n < Mine::AT_ONCE; n++) {
        if (mine.there[n]) loaded[n].template load<true>(static_cast<const float*>(from) + mine.row[n] * Mine::WIDTH + mine.column[n]);
      }
#pragma unroll
      for (int n = 0; n < Mine::AT_ONCE; n++) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) values[n][i] = mine.there[n] ? loaded[n][i] : 0.0f;
      }
    }
  }

  // Rows of x that stand in memory piece by piece as they do in shared memory, which lanes fill from bank to bank.
  template <int PART>
  __device__ __forceinline__ void copy_rows(const void* from) {
    using Own = Job<PART>;
    constexpr int PIECES = Own::WIDTH / PIECE_VALUES, PLACES = Own::WHOLE / PIECE_VALUES, LOG = Own::LOG_PIECES;
    uint4* to = operand<PART>().pieces;
#pragma unroll 4
    for (int i = threadIdx.x; i < STREAMS * PLACES; i += THREADS) {
      const int row = i / PLACES, place = i % PLACES, within = place & ((4 << LOG) - 1);
      const int piece = place - within + ((within & 3) << LOG) + (within >> 2);  // see Operand::place
      if (PIECES == PLACES || piece < PIECES) {
        copy_piece(to + row * Own::STRIDE + place, static_cast<const uint4*>(from) + row * PIECES + piece);
      } else {
        to[row * Own::STRIDE + place] = uint4{0, 0, 0, 0};
      }
    }
  }

  // Where rows of x are copied: of each tile of columns [streams], the sums of squares of x before it was multiplied by a norm.
  __device__ __forceinline__ float* squares_of_tiles() const { return static_cast<float*>(stage->x) + STREAMS * DIM; }

  // Rows of x with the squares of each, by a warp, to where `factor_of_row` looks.
  template <int PART>
  __device__ __forceinline__ void copy_normed() {
    constexpr int TILES = Job<OUT>::SECOND, EACH = (TILES + 31) / 32, OWN = (STREAMS + WARPS - 1) / WARPS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float squares[OWN][EACH];
#pragma unroll
    for (int n = 0; n < OWN; n++) {
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const int tile = lane + 32 * i, row = warp + n * WARPS;
        squares[n][i] = tile < TILES && row < STREAMS ? __ldcg(squares_of_tiles() + tile * STREAMS + row) : 0.0f;
      }
    }
    copy_rows<PART>(stage->x);
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < EACH; i++) sum += squares[n][i];
      sum = sum_of_warp(sum);
      const int row = warp + n * WARPS;
      for (int i = lane; row < STREAMS && i < SEGMENTS; i += 32) squares_of<PART>()[row * SEGMENTS + i] = i == 0 ? sum : 0.0f;
    }
    wait_for_copies();
  }

  // The same of what was kept for a product.
  template <int PART>
  __device__ __forceinline__ void bring_kept(const void* from) {
    if constexpr (COPIED) {
      copy_rows<PART>(from);
      wait_for_copies();
    } else if constexpr (TAGGED && X_PARTS == 1) {
      bring<PART, 4>(nullptr, [&](const auto& mine, auto& values) {
        using Mine = marlin::Plain<decltype(mine)>;
        const Cell* cells[Mine::AT_ONCE];
        uint32_t bits[Mine::AT_ONCE][2];
#pragma unroll
        for (int n = 0; n < Mine::AT_ONCE; n++) {
          cells[n] = static_cast<const Cell*>(from) + (mine.row[n] * Mine::WIDTH + mine.column[n]) / 2;
        }
        read_cells(grid, cells, mine.there, phase, bits);
#pragma unroll
        for (int n = 0; n < Mine::AT_ONCE; n++) {
          if (!mine.there[n]) continue;
#pragma unroll
          for (int i = 0; i < 2; i++) {
            values[n][2 * i] = __uint_as_float(bits[n][i] << 16), values[n][2 * i + 1] = __uint_as_float(bits[n][i] & 0xffff0000u);
          }
        }
      });
    } else if constexpr (TAGGED) {
      bring<PART, 2>(nullptr, [&](const auto& mine, auto& values) { load_floats(from, mine, values); });
    } else {
      bring<PART, 8>(nullptr, [&](const auto& mine, auto& values) {
        using Mine = marlin::Plain<decltype(mine)>;
        Loaded<Kept, 8> loaded[Mine::AT_ONCE];
#pragma unroll
        for (int n = 0; n < Mine::AT_ONCE; n++) {
          if (mine.there[n]) loaded[n].template load<true>(static_cast<const Kept*>(from) + mine.row[n] * Mine::WIDTH + mine.column[n]);
        }
#pragma unroll
        for (int n = 0; n < Mine::AT_ONCE; n++) {
#pragma unroll
          for (int i = 0; i < 8; i++) values[n][i] = mine.there[n] ? loaded[n][i] : 0.0f;
        }
      });
    }
  }

  // Eight values of q, k or v of a stream, `column` among them.
  __device__ __forceinline__ void load_three(int stream, const int (&columns)[3], float (&query)[8], float (&key)[8], float (&value)[8]) {
    if constexpr (TAGGED) {
      const Cell* cells[12];
      bool there[12];
      uint32_t bits[12][2];
#pragma unroll
      for (int i = 0; i < 12; i++) {
        cells[i] = static_cast<const Cell*>(stage->qkv) + stream * QKV_ROW + columns[i / 4] + i % 4 * 2, there[i] = true;
      }
      read_cells(grid, cells, there, phase, bits);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        query[i] = __uint_as_float(bits[i / 2][i % 2]), key[i] = __uint_as_float(bits[4 + i / 2][i % 2]);
        value[i] = __uint_as_float(bits[8 + i / 2][i % 2]);
      }
    } else {
      const float* row = static_cast<const float*>(stage->qkv) + stream * QKV_ROW;
      load_values(row + columns[0], query), load_values(row + columns[1], key), load_values(row + columns[2], value);
    }
  }

  // All q, k and v to `staged`, by all threads.
  __device__ __forceinline__ void stage_qkv() {
    constexpr int PAIRS = STREAMS * QKV_ROW / 2, OWN = (PAIRS + THREADS - 1) / THREADS;
    float2* to = reinterpret_cast<float2*>(staged);
    if constexpr (TAGGED) {
      const Cell* cells[OWN];
      bool there[OWN];
      uint32_t bits[OWN][2];
#pragma unroll
      for (int n = 0; n < OWN; n++) {
        const int pair = int(threadIdx.x) + n * THREADS;
        cells[n] = static_cast<const Cell*>(stage->qkv) + 2 * pair, there[n] = pair < PAIRS;
      }
      read_cells(grid, cells, there, phase, bits);
#pragma unroll
      for (int n = 0; n < OWN; n++) {
        if (there[n]) to[threadIdx.x + n * THREADS] = float2{__uint_as_float(bits[n][0]), __uint_as_float(bits[n][1])};
      }
    } else {
      Loaded<float, 2> loaded[OWN];
#pragma unroll
      for (int n = 0; n < OWN; n++) {
        const int pair = int(threadIdx.x) + n * THREADS;
        if (pair < PAIRS) loaded[n].template load<true>(static_cast<const float*>(stage->qkv) + 2 * pair);
      }
#pragma unroll
      for (int n = 0; n < OWN; n++) {
        if (int(threadIdx.x) + n * THREADS < PAIRS) to[threadIdx.x + n * THREADS] = float2{loaded[n][0], loaded[n][1]};
      }
    }
  }

  // A head's query, and its new key and value as a cache would give them back.
  __device__ __forceinline__ void prepare(Head& head, const Layer& layer, int stream, int number) {
    const int at = Head::piece() * 8, kv_head = number / QUERY_HEADS;
    const int columns[3] = {number * HEAD_DIM + at, QUERIES + kv_head * HEAD_DIM + at, QUERIES + KEYS + kv_head * HEAD_DIM + at};
    if constexpr (ALONE) {
      const float* row = staged + stream * QKV_ROW;
      load_values<false>(row + columns[0], head.query), load_values<false>(row + columns[1], head.key);
      load_values<false>(row + columns[2], head.value);
    } else {
      load_three(stream, columns, head.query, head.key, head.value);
    }
    const float* rotation = rotations + stream * HEAD_DIM;
    Head::prepare(head.query, layer.query_norm, stage->eps, rotation);
    Head::prepare(head.key, layer.key_norm, stage->eps, rotation);
    if constexpr (PAGED) Head::spread(head.query);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      head.query[i] *= stage->scale * LOG2_E;
      head.key[i] = to_float(from_float<T>(head.key[i])), head.value[i] = to_float(from_float<T>(head.value[i]));
    }
  }

  // A head's query of a memory.
  __device__ __forceinline__ void prepare_for_memory(Head& head, int stream, int number) {
    const int place = stream * QKV_ROW + number * HEAD_DIM + Head::piece() * 8;
    if constexpr (TAGGED) {
      const Cell* cells[4];
      bool there[4];
      uint32_t bits[4][2];
#pragma unroll
      for (int i = 0; i < 4; i++) cells[i] = static_cast<const Cell*>(stage->qkv) + place + 2 * i, there[i] = true;
      read_cells(grid, cells, there, phase, bits);
#pragma unroll
      for (int i = 0; i < 8; i++) head.query[i] = __uint_as_float(bits[i / 2][i % 2]);
    } else {
      load_values(static_cast<const float*>(stage->qkv) + place, head.query);
    }
    if constexpr (MEMORY_BITS < 16) Head::spread(head.query);
#pragma unroll
    for (int i = 0; i < 8; i++) head.query[i] *= stage->scale * LOG2_E;
  }

  // Puts the new key and value into a page, turned and packed, and leaves them as the page would give them back. By a whole warp;
  // `there` is not where the stream is filler, or where another head writes.
  static __device__ __forceinline__ void remember_packed(Head& head, const Page& page, int64_t row, bool there) {
    Head::spread(head.key);
#pragma unroll
    for (int i = 0; i < 8; i++) head.key[i] = to_float(from_float<T>(head.key[i]));
    const auto key = StoredRow<KEY_BITS>::of(head.key);
    const auto value = StoredRow<VALUE_BITS>::of(head.value);
    if (there && Head::group() == 0) {
      key.store(page.keys, page.key_scales, row, Head::piece()), value.store(page.values, page.value_scales, row, Head::piece());
    }
    key.numbers(head.key), value.numbers(head.value);
#pragma unroll
    for (int i = 0; i < 8; i++) head.key[i] *= key.factor(), head.value[i] *= value.factor();
  }

  // Puts the new key and value behind `seen` rows.
  static __device__ __forceinline__ void remember(const Head& head, T* keys, T* values, int seen) {
    if (Head::group() > 0) return;
    const int64_t place = int64_t(seen) * ROW_STRIDE + Head::piece() * 8;
    store_values(keys + place, head.key), store_values(values + place, head.value);
  }

  // Where a warp of a local stage keeps the rows of a head of a stream.
  __device__ __forceinline__ int64_t own_rows(int task) const {
    return int64_t((ALONE ? int(blockIdx.x) * STREAMS * HEADS : 0) + task) * stage->capacity * HEAD_DIM;
  }

  // A head of a stream in a local stage, by a warp; `some` rows are on their way.
  __device__ __forceinline__ void attend_by_warp(Head& head, Head::Rows& some, const Layer& layer, int task, int seen) {
    T *keys = layer.keys + own_rows(task), *values = layer.values + own_rows(task);
    prepare(head, layer, task / HEADS, task % HEADS);
    head.see(some, Head::Rows::From{keys, values}, 0, seen, 0, 1, true, no_bias);
    remember(head, keys, values, seen);
    const float share = X_PARTS == 1 ? __fdividef(1.0f, head.weight) : 1.0f / head.weight;
#pragma unroll
    for (int i = 0; i < 8; i++) head.seen[i] *= share;
  }

  // All heads of all streams, a warp each, straight into the x of o_proj.
  __device__ __forceinline__ void attend_alone(const Layer& layer, int seen) {
    using Own = Job<OUT>;
    const Operand<OUT> x = operand<OUT>();
    const int first = threadIdx.x / 32;
    Head::Rows some;
    if (first < STREAMS * HEADS) some.load({layer.keys + own_rows(first), layer.values + own_rows(first)}, 0, seen, 1);
    clear_rest<OUT>();
    stage_qkv();
    __syncthreads();
    for (int task = first; task < STREAMS * HEADS; task += WARPS) {
      if (task > first) some.load({layer.keys + own_rows(task), layer.values + own_rows(task)}, 0, seen, 1);
      Head head;
      attend_by_warp(head, some, layer, task, seen);
      if (Head::group() > 0) continue;
#pragma unroll
      for (int side = 0; side < Own::SIDES; side++) {
        float same[8];
#pragma unroll
        for (int i = 0; i < 8; i++) same[i] = head.seen[i];
        x.put(task / HEADS, side * Own::WIDTH + task % HEADS * HEAD_DIM + Head::piece() * 8, same);
      }
    }
  }

  // The same with a warp of the whole grid for each.
  __device__ __forceinline__ void attend_by_warps(const Layer& layer, int seen) {
    for (int task = threadIdx.x / 32 * BLOCKS + blockIdx.x; task < STREAMS * HEADS; task += WARPS * BLOCKS) {
      Head::Rows some;
      some.load({layer.keys + own_rows(task), layer.values + own_rows(task)}, 0, seen, 1);
      Head head;
      attend_by_warp(head, some, layer, task, seen);
      if (Head::group() > 0) continue;
      const int place = task / HEADS * QUERIES + task % HEADS * HEAD_DIM + Head::piece() * 8;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        if constexpr (COPIED) {
          const int row = task / HEADS, column = task % HEADS * HEAD_DIM + Head::piece() * 8 + i;
          put_kept<OUT>(stage->attended, row, column, head.seen[i], true, phase + 1);
          put_kept<OUT>(stage->attended, row, column + 1, head.seen[i + 1], true, phase + 1);
        } else if constexpr (TAGGED && X_PARTS == 1) {
          const uint32_t pair = pair_of<false>(head.seen[i], head.seen[i + 1]);
          store_one(static_cast<Cell*>(stage->attended) + (place + i) / 2, cell_of(pair, phase + 1));
        } else if constexpr (TAGGED) {
          put_float(stage->attended, place + i, head.seen[i], phase + 1);
          put_float(stage->attended, place + i + 1, head.seen[i + 1], phase + 1);
        } else {
          Kept* to = static_cast<Kept*>(stage->attended) + place + i;
          to[0] = from_float<Kept>(head.seen[i]), to[1] = from_float<Kept>(head.seen[i + 1]);
        }
      }
    }
  }

  // Heads of streams, and COUNT splits of their rows, a crew of warps of a block each: as many as leave a crew for each, or two
  // warps. see(head, stream, number, split, warp, size) has a warp of a crew look at its share.
  template <int READER, int COUNT, typename See>
  __device__ __forceinline__ void attend_by_crews(const See& see) {
    constexpr int TASKS = STREAMS * HEADS * COUNT;
    constexpr int SIZE = TASKS <= BLOCKS || WARPS < 4 ? WARPS : TASKS <= 2 * BLOCKS || WARPS < 8 ? WARPS / 2 : WARPS / 4;
    constexpr int CREWS = WARPS / SIZE;
    const int crew = threadIdx.x / 32 / SIZE, warp = threadIdx.x / 32 % SIZE;
    float* joining = this->joining + crew * SIZE * SEEN;
    auto synchronize = [&] {
      if constexpr (CREWS == 1) {
        __syncthreads();
      } else {
        synchronize_team(1 + crew, SIZE * 32);
      }
    };
    for (int task = crew * BLOCKS + blockIdx.x; task < TASKS; task += CREWS * BLOCKS) {
      const int split = task % COUNT, number = task / COUNT % HEADS, stream = task / COUNT / HEADS;
      if (READER == OUT && split >= splits()) continue;
      Head head;
      see(head, stream, number, split, warp, SIZE);
      if (Head::group() == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) joining[warp * SEEN + Head::piece() * 8 + i] = head.seen[i];
        joining[warp * SEEN + HEAD_DIM] = head.peak, joining[warp * SEEN + HEAD_DIM + 1] = head.weight;
      }
      synchronize();
      constexpr int WHOLE_WARPS = (HEAD_DIM + 31) / 32 * 32;
      for (int i = threadIdx.x % (SIZE * 32); i < WHOLE_WARPS; i += SIZE * 32) {
        float peak = NOTHING_SEEN, weight = 0.0f, seen_here = 0.0f;
        const int place = min(i, HEAD_DIM - 1);
#pragma unroll
        for (int w = 0; w < SIZE; w++) peak = fmaxf(peak, joining[w * SEEN + HEAD_DIM]);
#pragma unroll
        for (int w = 0; w < SIZE; w++) {
          const float share_of_warp = exp2f(joining[w * SEEN + HEAD_DIM] - peak);
          weight += share_of_warp * joining[w * SEEN + HEAD_DIM + 1], seen_here += share_of_warp * joining[w * SEEN + place];
        }
        if constexpr (COUNT == 1) {
          put_kept<READER>(stage->attended, stream, number * HEAD_DIM + i, seen_here / weight, i < HEAD_DIM, phase + 1);
        } else {
          if (i < HEAD_DIM) put_float(stage->parts, task * SEEN + i, seen_here, phase + 1);
          if (i == 0) put_float(stage->parts, task * SEEN + HEAD_DIM, peak, phase + 1);
          if (i == 0) put_float(stage->parts, task * SEEN + HEAD_DIM + 1, weight, phase + 1);
        }
      }
      synchronize();
    }
  }

  // Into how many a head's rows are split: many rows into more, as each has to be joined.
  __device__ __forceinline__ int splits() const {
    if constexpr (SPLITS == NEAR_SPLITS || (WINDOW >= 0 && WINDOW < FAR_ROWS)) return NEAR_SPLITS;
    return stage->states < FAR_ROWS ? NEAR_SPLITS : SPLITS;
  }

  __device__ __forceinline__ void attend_by_blocks(const Layer& layer, int seen, const int32_t* padding) {
    attend_by_crews<OUT, SPLITS>([&](Head& head, int stream, int number, int split, int warp, int warps) {
      int start = padding == nullptr ? 0 : padding[stream];
      if constexpr (WINDOW >= 0) start = max(start, seen - WINDOW);
      const int count = seen - start, first = start + int(int64_t(count) * split / splits());
      const int end = start + int(int64_t(count) * (split + 1) / splits()), kv_head = number / QUERY_HEADS;
      const int known = ANSWERS ? stream : min(stream, stage->inputs - 1);  // filler reads what there is
      if constexpr (PAGED) {
        const bool with_new = split == splits() - 1 && warp == warps - 1;
        const bool writes = number % QUERY_HEADS == 0 && stream < stage->inputs;
        const Page* pages = reinterpret_cast<const Page*>(layer.keys);
        const int64_t rows = int64_t(known * KV_HEADS + kv_head) * ROWS_A_PAGE;
        const Head::PagedRows::From from{pages, rows};
        Head::PagedRows some;
        some.load(from, first + warp * Head::CROWD, end, warps);
        prepare(head, layer, stream, number);
        if (with_new) remember_packed(head, pages[seen / ROWS_A_PAGE], rows + seen % ROWS_A_PAGE, writes);
        head.see(some, from, first, end, warp, warps, with_new, no_bias);
        return;
      }
      const int64_t cache = int64_t(known * KV_HEADS + kv_head) * (ANSWERS ? 1 : stage->capacity) * HEAD_DIM;
      T *keys = layer.keys + cache, *values = layer.values + cache;
      const bool with_new = split == splits() - 1 && warp == warps - 1;
      const Head::Rows::From from{keys, values};
      Head::Rows some;
      some.load(from, first + warp * Head::CROWD, end, warps);
      prepare(head, layer, stream, number);
      if constexpr (ANSWERS) {
        const T* bias = stage->bias + number * (2 * REACH + 1) + REACH;
        head.see(some, from, first, end, warp, warps, with_new, [&](int row) { return LOG2_E * to_float(bias[max(row - seen, -REACH)]); });
      } else {
        head.see(some, from, first, end, warp, warps, with_new, no_bias);
      }
      if (with_new && number % QUERY_HEADS == 0 && (ANSWERS || stream < stage->inputs)) remember(head, keys, values, seen);
    });
  }

  // The heads of a decoder over the memory of their inputs; streams beyond the last input read that one's.
  __device__ __forceinline__ void attend_to_memory(const Layer& layer) {
    attend_by_crews<MEMORY_OUT, MEMORY_SPLITS>([&](Head& head, int stream, int number, int split, int warp, int warps) {
      const int input = min(stream, stage->inputs - 1), count = stage->lengths == nullptr ? stage->states : stage->lengths[input];
      const int first = int(int64_t(count) * split / MEMORY_SPLITS), end = int(int64_t(count) * (split + 1) / MEMORY_SPLITS);
      const Head::MemoryRows::From from{
          layer.memory_keys, layer.key_scales, layer.memory_values, layer.value_scales, int64_t(input * HEADS + number) * stage->states};
      Head::MemoryRows some;
      some.load(from, first + warp * Head::CROWD, end, warps);
      prepare_for_memory(head, stream, number);
      head.see(some, from, first, end, warp, warps, false, no_bias);
    });
  }

  // What splits have seen, `used` of SPLITS, joined: COUNT values of a head, `place` of them in a part. Some are loaded together,
  // as each takes long.
  template <int SPLITS, int COUNT>
  __device__ __forceinline__ void join(int used, int row, int column, float (&values)[COUNT]) {
    constexpr int SOME = SPLITS < 4 ? SPLITS : 4;
    const int first = (row * HEADS + column / HEAD_DIM) * SPLITS * SEEN, place = column % HEAD_DIM;
    float peak = NOTHING_SEEN, weight = 0.0f;
#pragma unroll
    for (int begin = 0; begin < SPLITS; begin += SOME) {
      if (begin >= used) break;
      float seen[SOME][COUNT], ends[SOME][2];
      bool there[SOME];
#pragma unroll
      for (int i = 0; i < SOME; i++) there[i] = SPLITS == SOME || begin + i < used;
      if constexpr (TAGGED) {
        static_assert(COUNT == 2);
        const Cell* cells[2 * SOME];
        bool looked_at[2 * SOME];
        uint32_t bits[2 * SOME][2];
#pragma unroll
        for (int i = 0; i < SOME; i++) {
          const Cell* part = static_cast<const Cell*>(stage->parts) + first + (begin + i) * SEEN;
          cells[2 * i] = part + place, cells[2 * i + 1] = part + HEAD_DIM, looked_at[2 * i] = looked_at[2 * i + 1] = there[i];
        }
        read_cells(grid, cells, looked_at, phase, bits);
#pragma unroll
        for (int i = 0; i < SOME; i++) {
#pragma unroll
          for (int n = 0; n < 2; n++) {
            seen[i][n] = __uint_as_float(bits[2 * i][n]), ends[i][n] = __uint_as_float(bits[2 * i + 1][n]);
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < SOME; i++) {
          if (!there[i]) continue;
          const float* part = static_cast<const float*>(stage->parts) + first + (begin + i) * SEEN;
          load_values(part + HEAD_DIM, ends[i]), load_values(part + place, seen[i]);
        }
      }
      float highest = peak;
#pragma unroll
      for (int i = 0; i < SOME; i++) highest = there[i] ? fmaxf(highest, ends[i][0]) : highest;
      if (begin > 0) {
        const float shrink = exp2f(peak - highest);
        weight *= shrink;
#pragma unroll
        for (int n = 0; n < COUNT; n++) values[n] *= shrink;
      }
      peak = highest;
#pragma unroll
      for (int i = 0; i < SOME; i++) {
        if (!there[i]) continue;
        const float share = exp2f(ends[i][0] - peak);
        weight += share * ends[i][1];
#pragma unroll
        for (int n = 0; n < COUNT; n++) values[n] += share * seen[i][n];
      }
    }
    weight = 1.0f / weight;
#pragma unroll
    for (int n = 0; n < COUNT; n++) values[n] *= weight;
  }

  template <int PART>
  __device__ __forceinline__ void bring_attended() {
    constexpr int COUNT = PART == MEMORY_OUT ? MEMORY_SPLITS : BY_BLOCKS ? SPLITS : 1;
    if constexpr (COUNT == 1) {
      bring_kept<PART>(stage->attended);
    } else {
      bring<PART, NORMED_VALUES>(nullptr, [&](const auto& mine, auto& values) {
#pragma unroll
        for (int n = 0; n < marlin::Plain<decltype(mine)>::AT_ONCE; n++) {
          if (mine.there[n]) join<COUNT>(PART == OUT ? splits() : COUNT, mine.row[n], mine.column[n], values[n]);
        }
      });
    }
  }

  static __device__ __forceinline__ float silu(float x) {
    if constexpr (X_PARTS == 1) return __fdividef(x, 1.0f + __expf(-x));
    return x / (1.0f + expf(-x));
  }

  static __device__ __forceinline__ float activated(float up) {
    if constexpr (ACTIVATION == GELU) return 0.5f * up * (1.0f + erff(up * 0.70710678f));
    if constexpr (ACTIVATION == GELU_TANH) return up / (1.0f + expf(-1.59576912f * (up + 0.044715f * up * up * up)));
    if constexpr (ACTIVATION == RELU) return fmaxf(up, 0.0f);
    return silu(up);
  }

  // One phase; come() brings its x, finish(layer, row, column, one, other, there) takes its outputs, by whole warps.
  template <int PART, typename Come, typename Finish>
  __device__ __forceinline__ void multiply_all(const Linear* linears, const Come& come, const Finish& finish) {
    if (Team<PART>::in_work()) come();
    __syncthreads();  // also in blocks without a tile: what a warp brings next, another may still read till here
    if (!Team<PART>::in_work()) return;
    multiply<PART>(
        sent, linears, operand<PART>(), partial,
        [&](int, int, int, int row, int column, float one, float, float, float, bool there) {
          if (there) parts.send(row * DIM + column, one);
        },
        [&](int round, int n, int layer, int row, int column, float one, float other, float bias, float other_bias, bool there) {
          if constexpr (SUMMED<PART>) {
            if (there) one = parts.sum(grid, row * DIM + column, one);
          }
          if constexpr (HAS_NORM<PART>) {
            const float factor = factor_of_row<PART>(row < STREAMS ? row : 0);
            one *= factor, other *= factor;
          }
          finish(round, n, layer, row, column, one + bias, other + other_bias, there);
        });
  }

  // What is added to rows of x, and the sum to all, for READER or, where `last`, for the last product.
  template <int PART, int READER, typename Come>
  __device__ __forceinline__ void add_product(const Linear* linear, bool last, const Come& come) {
    if constexpr (SUMMED<PART>) parts.next();
    multiply_all<PART>(linear, come, [&](int round, int n, int, int row, int column, float one, float, bool there) {
      if constexpr (PART != FIRST) one += residual[round][n];
      if constexpr (PART == FIRST && PLACED) {
        const int place = stage->states - (padding == nullptr || !there ? 0 : padding[row]);  // filler stands before the first
        if (there) one += to_float(stage->positions[int64_t(max(place, 0)) * DIM + column]);
      }
      residual[round][n] = one;
      if constexpr (COPIED) {
        float square = there ? one * one : 0.0f;
#pragma unroll
        for (int offset = 1; offset < TILE_ROWS; offset *= 2) square += __shfl_xor_sync(0xffffffff, square, offset);
        if (!there) return;
        const int place = last ? Operand<LAST>::copied_place(row, column) : Operand<READER>::copied_place(row, column);
        static_cast<Kept*>(stage->x)[place] = from_float<Kept>(one * to_float(sent.norm_weight));
        if (column % TILE_ROWS == 0) squares_of_tiles()[column / TILE_ROWS * STREAMS + row] = square;
      } else {
        if (there) put_float(stage->x, row * DIM + column, one, phase + 1);
      }
    });
  }

  // x of a phase with a norm, from what the phase before wrote.
  template <int PART>
  __device__ __forceinline__ void bring_normed(const T* norm) {
    if constexpr (COPIED) {
      copy_normed<PART>();
    } else {
      bring<PART, NORMED_VALUES>(norm, [&](const auto& mine, auto& values) { load_floats(stage->x, mine, values); });
    }
  }

  // All layers over rows of which `seen` came before, and `last`: done(row, column, value, there) takes what that gives. The first
  // layer's weights have been sent for; begin() brings its x. In the end next() goes on. Without `wanted` there is no `last`.
  template <typename Begin, typename Done, typename Next>
  __device__ __forceinline__ void run(
      int seen, const int32_t* padding, bool wanted, const Begin& begin, const Done& done, const Next& next) {
#pragma unroll 1
    for (int number = 0; number < LAYERS; number++) {
      const Layer& layer = layers[number];
      multiply_all<QKV>(
          layer.qkv,
          [&] {
            if (number == 0) {
              begin(layer.attention_norm);
            } else {
              bring_normed<QKV>(layer.attention_norm);
            }
          },
          [&](int, int, int which, int row, int column, float one, float, bool there) {
            const int before = which == 0 ? 0 : which == 1 ? QUERIES : QUERIES + KEYS;
            if (there) put_float(stage->qkv, row * QKV_ROW + before + column, one, phase + 1);
          });
      go_on([&] { send_for<OUT>(sent, &layer.out, ANSWERS ? layer.memory_norm : layer.ffn_norm), send_ahead<UP>(layer.up); });
      spend<QKV>();
      if constexpr (!ALONE) {
        if constexpr (BY_BLOCKS) {
          attend_by_blocks(layer, seen, padding);
        } else {
          attend_by_warps(layer, seen);
        }
        go_on([] {});
        spend<ATTENTION>();
      }
      add_product<OUT, ANSWERS ? MEMORY_QUERY : UP>(&layer.out, false, [&] {
        if constexpr (ALONE) {
          attend_alone(layer, seen);
          spend<ATTENTION>();
        } else {
          bring_attended<OUT>();
        }
      });
      if constexpr (ANSWERS) {
        go_on([&] { send_for<MEMORY_QUERY>(sent, &layer.memory_query), send_ahead<MEMORY_OUT>(&layer.memory_out); });
        spend<OUT>();
        multiply_all<MEMORY_QUERY>(
            &layer.memory_query, [&] { bring_normed<MEMORY_QUERY>(layer.memory_norm); },
            [&](int, int, int, int row, int column, float one, float, bool there) {
              if (there) put_float(stage->qkv, row * QKV_ROW + column, one, phase + 1);
            });
        go_on([&] { send_for<MEMORY_OUT>(sent, &layer.memory_out, layer.ffn_norm); });
        spend<MEMORY_QUERY>();
        attend_to_memory(layer);
        go_on([] {});
        spend<MEMORY_ATTENTION>();
        add_product<MEMORY_OUT, UP>(&layer.memory_out, false, [&] { bring_attended<MEMORY_OUT>(); });
      }
      go_on([&] { send_for<UP>(sent, layer.up), send_ahead<DOWN>(&layer.down); });
      spend<ANSWERS ? MEMORY_OUT : OUT>();
      multiply_all<UP>(
          layer.up, [&] { bring_normed<UP>(layer.ffn_norm); },
          [&](int, int, int, int row, int column, float one, float other, bool there) {
            const float value = activated(one) * (GATED ? other : 1.0f);  // one is the gate
            put_kept<DOWN>(stage->hidden, row, column, value, there, phase + 1);
          });
      const bool more = number + 1 < LAYERS;
      go_on([&] {
        send_for<DOWN>(sent, &layer.down, more ? layers[number + 1].attention_norm : stage->norm);
        if (more) send_ahead<QKV>(layers[number + 1].qkv);
      });
      spend<UP>();
      add_product<DOWN, QKV>(&layer.down, !more, [&] { bring_kept<DOWN>(stage->hidden); });
      go_on([&] {
        if (more) {
          send_for<QKV>(sent, layers[number + 1].qkv), send_ahead<OUT>(&layers[number + 1].out);
        } else {
          send_for<LAST>(sent, &stage->last);
        }
      });
      spend<DOWN>();
    }
    if (wanted) {
      multiply_all<LAST>(
          &stage->last, [&] { bring_normed<LAST>(stage->norm); },
          [&](int, int, int, int row, int column, float one, float, bool there) {
            if (there) done(row, column, one);
          });
    }
    next();
    spend<LAST>();
  }

  // The weights of a phase after the next one, where they do not stay in the second-level cache anyway.
  template <int PART>
  __device__ __forceinline__ void send_ahead(const Linear* linears) const {
    if constexpr (BY_BLOCKS) send_tiles_to_cache<PART>(linears);
  }
};

}  // namespace marlin
