// The layers of one stage over one new row of each of up to 16 streams, by all blocks of a grid together.
//
// A layer is four or five phases with a barrier between: q/k/v; attention, where it is too much for each block to do all of it
// itself; o_proj and residual; gate/up and activation; down_proj and residual. Each phase brings its x into shared memory
// (normalised, combined, embedded) and multiplies; the weights of the next one are on their way before its barrier opens.
// Norms multiply x by their weight before the product and by the row's own factor after it, so that x is read once.

namespace marlin {

enum NormKind { RMS, LAYER, VARIANCE };
enum Activation { SWIGLU, GELU, GELU_TANH, RELU, SILU };
enum Part { FIRST, QKV, ATTEND, OUT, UP, DOWN, LAST, END };

// As `marlin_cli.ops.cuda_stages` lays them out.
template <typename T>
struct Layer {
  const T *attention_norm, *ffn_norm, *query_norm, *key_norm;  // the last two may be null
  T *keys, *values;                                           // [streams, kv_heads, capacity, head_dim]
  Linear<T> qkv[3], out, up[2], down;                         // up: gate and up, or up alone
};

template <typename T>
struct Stage {
  unsigned long long* grid;  // see Grid
  float *x, *q, *k, *v;      // [streams, dim], [streams, heads * head_dim], twice [streams, kv_heads * head_dim]
  float* parts;              // [streams * heads * splits, head_dim + 4]: what a split has seen
  void *attended, *hidden;   // [streams, heads * head_dim], [streams, ffn_dim] bfloat16, or float where PARTS is 3
  float* logits;             // [streams, vocab]
  const T *table, *norm;     // [vocab, width]; [dim] or null
  int32_t* mailbox;          // of the host, for the ids of some launches: each the launch's number, then [streams, steps]
  Linear<T> first, last;     // of bytes to rows; of rows to logits or to the next stage's condition
  int32_t streams, layers, dim, heads, kv_heads, ffn_dim, capacity, width;
  int32_t window, norm_kind, activation, interleaved;
  float log2_theta, scale, eps;  // log2_theta 0: no rotation
  int32_t splits;
};

template <typename T, int KINDS, int PARTS, int WARPS, int HEAD_DIM, bool SPLITS>
struct Machine {
  using Attending = Head<T, HEAD_DIM>;
  using Kept = cuda::std::conditional_t<PARTS == 1, __nv_bfloat16, float>;  // what waits for a product
  static constexpr int DEPTH = 4, THREADS = WARPS * 32, MOST_SEGMENTS = 64;
  static constexpr int WIDTH = HEAD_DIM + 4, MOST_SPLITS = 4;  // of what a split has seen: values, peak, weight

  struct At {
    int part, layer;
  };

  Stage<T>* stage;
  Layer<T>* layers;
  Job* jobs;                             // by part
  Lane* lanes;                           // by part, of this thread
  float *rotations, *squares, *partial;  // [streams][head_dim], [16][MOST_SEGMENTS], see `multiply`
  int *chosen, *flag;                    // [16], [1]
  uint4* memory;                         // the rest
  float* residual;                       // the stage's x; this and what follows in registers, as each phase reads it
  int streams, dim, query_heads;         // the last: that share a head of the cache
  float eps;
  bool attends_alone;                    // each block all heads, which saves a barrier

  // Shared memory is laid out here and measured in `cuda_stages`. All layers are alike but for where their weights stand.
  __device__ __forceinline__ Machine(const void* model, bool alone_if_few) {
    uint8_t* shared = static_cast<uint8_t*>(dynamic_shared());
    const Stage<T>* from = static_cast<const Stage<T>*>(model);
    const int words = (sizeof(Stage<T>) + from->layers * sizeof(Layer<T>)) / 8;
    const uint64_t* source = static_cast<const uint64_t*>(model);
    for (int i = threadIdx.x; i < words; i += THREADS) reinterpret_cast<uint64_t*>(shared)[i] = source[i];
    __syncthreads();
    stage = reinterpret_cast<Stage<T>*>(shared);
    layers = reinterpret_cast<Layer<T>*>(shared + sizeof(Stage<T>));
    jobs = reinterpret_cast<Job*>(shared + words * 8);
    lanes = reinterpret_cast<Lane*>(jobs + END) + threadIdx.x;
    float* floats = reinterpret_cast<float*>(reinterpret_cast<Lane*>(jobs + END) + END * THREADS);
    rotations = floats, floats += stage->streams * HEAD_DIM;
    squares = floats, floats += MOST_ROWS * MOST_SEGMENTS;
    chosen = reinterpret_cast<int*>(floats), floats += MOST_ROWS;
    flag = reinterpret_cast<int*>(floats), floats += 4;
    partial = floats, floats += WARPS * 2 * stage->streams * TILE_ROWS;
    memory = reinterpret_cast<uint4*>(shared + (reinterpret_cast<uint8_t*>(floats) - shared + 15) / 16 * 16);
    residual = stage->x, streams = stage->streams, dim = stage->dim, eps = stage->eps;
    query_heads = stage->heads / stage->kv_heads;
    attends_alone = alone_if_few && streams * stage->heads <= 2 * WARPS;
    if (threadIdx.x < END && threadIdx.x != ATTEND) {
      const At at = {int(threadIdx.x), 0};
      const bool pair = at.part == UP && stage->activation == SWIGLU;
      jobs[at.part].plan(linears_of(at), at.part == QKV ? 3 : pair ? 2 : 1, pair, WARPS);
    }
    __syncthreads();
    for (int part = 0; part < END; part++) {
      if (part != ATTEND) lanes[part * THREADS].plan(jobs[part], linears_of({part, 0}), jobs[part].team());
    }
  }

  __device__ __forceinline__ const Linear<T>* linears_of(const At& at) const {
    const Layer<T>& layer = layers[at.layer];
    switch (at.part) {
      case FIRST: return &stage->first;
      case QKV: return layer.qkv;
      case OUT: return &layer.out;
      case UP: return layer.up;
      case DOWN: return &layer.down;
      default: return &stage->last;
    }
  }

  // What follows within the layers; after the last one, LAST.
  __device__ __forceinline__ At after(const At& at) const {
    switch (at.part) {
      case FIRST: return {QKV, 0};
      case QKV: return {attends_alone ? OUT : ATTEND, at.layer};
      case ATTEND: return {OUT, at.layer};
      case OUT: return {UP, at.layer};
      case UP: return {DOWN, at.layer};
      case DOWN: return at.layer + 1 < stage->layers ? At{QKV, at.layer + 1} : At{LAST, at.layer};
      default: return {END, 0};
    }
  }

  // Sends for the weights that a phase begins with. They stand apart from the rest, so that they stay in registers.
  using Sent = Weights<T, KINDS, DEPTH>;
  __device__ __forceinline__ void send_for(const At& at, Sent& sent) const {
    if (at.part == ATTEND || at.part == END) return;
    const Job& job = jobs[at.part];
    const Lane& lane = lanes[at.part * THREADS];
    const Linear<T>* linears = linears_of(at);
    sent.begin(job, linears, lane);
    learn(at, sent);
  }

  __device__ __forceinline__ void learn(const At& at, Sent& sent) const {
    const Lane& lane = lanes[at.part * THREADS];
    const Linear<T>* linears = linears_of(at);
    const int output = first_output(jobs[at.part], streams);
    if (lane.tile >= 0 && output < streams * TILE_ROWS) {
      const int column = min(lane.tile * TILE_ROWS + output % TILE_ROWS, linears[lane.layer].rows - 1);
      sent.known = know(at, linears, lane.layer, output / TILE_ROWS, column);
    }
  }

  // What a product of this phase is added to: a bias, and the residual, which this phase alone changes.
  __device__ __forceinline__ Known know(const At& at, const Linear<T>* linears, int number, int row, int column) const {
    Known known = {{0.0f, 0.0f}, {linears[number].factor, 0.0f}};
    if (at.part == OUT || at.part == DOWN) known.added[0] = __ldcg(residual + row * dim + column);
    if (linears[number].bias != nullptr) known.added[0] += to_float(linears[number].bias[column]);
    if (jobs[at.part].paired) {
      known.factor[1] = linears[1].factor;
      if (linears[1].bias != nullptr) known.added[1] = to_float(linears[1].bias[column]);
    }
    return known;
  }

  // The rows' positions for rotation, `seen` rows of which came before.
  __device__ __forceinline__ void rotate_at(int seen, const int32_t* padding) {
    if (stage->log2_theta == 0.0f) return;
    for (int b = 0; b < streams; b++) {
      fill_rotation(rotations + b * HEAD_DIM, HEAD_DIM / 2, stage->log2_theta, seen - (padding ? padding[b] : 0), threadIdx.x, THREADS);
    }
  }

  __device__ __forceinline__ Operand<PARTS> operand(const Job& job) const {
    return {memory, streams, job.stride, job.log_values - 3};
  }

  // x of the phase into shared memory: load(row, piece, values) for each piece, by warps, 256 values each. With a norm,
  // `squares` learn each segment's.
  template <typename Load>
  __device__ __forceinline__ void bring(const Job& job, const T* norm, const Load& load) {
    const Operand<PARTS> x = operand(job);
    const int lane = threadIdx.x % 32;
    const bool centred = norm != nullptr && stage->norm_kind != RMS;
    for (int item = threadIdx.x / 32; item < streams << job.log_segments; item += WARPS) {
      const int row = item >> job.log_segments, segment = item & ((1 << job.log_segments) - 1), piece = segment * 32 + lane;
      if (segment >= job.segments) continue;
      float values[PIECE_VALUES] = {}, weights_of_norm[PIECE_VALUES], mean = 0.0f, sum = 0.0f;
      if (centred) {
        for (int other = lane; other < job.width / PIECE_VALUES; other += 32) {
          load(row, other, values);
#pragma unroll
          for (int i = 0; i < PIECE_VALUES; i++) mean += values[i];
        }
        mean = sum_of_warp(mean) / job.width;
#pragma unroll
        for (int i = 0; i < PIECE_VALUES; i++) values[i] = 0.0f;
      }
      if (piece * PIECE_VALUES < job.depth) {
        int own = piece;  // dense float32 weights read x once for each of their parts
        while (own * PIECE_VALUES >= job.width) own -= job.width / PIECE_VALUES;
        if (norm != nullptr) load_piece(norm + own * PIECE_VALUES, weights_of_norm);
        load(row, own, values);
        if (norm != nullptr) {
          const float centre = stage->norm_kind == LAYER ? mean : 0.0f;
#pragma unroll
          for (int i = 0; i < PIECE_VALUES; i++) {
            if (piece == own) sum += (values[i] - mean) * (values[i] - mean);
            values[i] = (values[i] - centre) * weights_of_norm[i];
          }
        }
      }
      if (piece * PIECE_VALUES < job.whole) x.put(row, piece, values);
      if (norm != nullptr) {
        sum = sum_of_warp(sum);
        if (lane == 0) squares[row * MOST_SEGMENTS + segment] = sum;
      }
    }
  }

  // Rows that a norm reads from x; where they are new, from `fresh`, and one block keeps them.
  template <typename Fresh>
  __device__ __forceinline__ void bring_normed(const Job& job, const T* norm, bool is_new, const Fresh& fresh) {
    bring(job, norm, [&](int row, int piece, float (&values)[8]) {
      float* place = residual + row * job.width + piece * PIECE_VALUES;
      if (!is_new) return load_piece<float>(place, values);
      fresh(row, piece, values);
      if (blockIdx.x > 0) return;
#pragma unroll
      for (int i = 0; i < 8; i++) place[i] = values[i];
    });
  }

  __device__ __forceinline__ void bring_kept(const Job& job, const void* from) {
    const Kept* rows = static_cast<const Kept*>(from);
    bring(job, nullptr, [&](int row, int piece, float (&values)[8]) { load_piece(rows + row * job.width + piece * PIECE_VALUES, values); });
  }

  // A head's query, and its new key and value as a cache would give them back.
  __device__ __forceinline__ void prepare(Attending& head, const Layer<T>& layer, int stream, int number) const {
    const int kv_head = number / query_heads, at = Attending::piece() * 8;
    load_piece<float>(stage->q + (stream * stage->heads + number) * HEAD_DIM + at, head.query);
    load_piece<float>(stage->k + (stream * stage->kv_heads + kv_head) * HEAD_DIM + at, head.key);
    load_piece<float>(stage->v + (stream * stage->kv_heads + kv_head) * HEAD_DIM + at, head.value);
    const float* rotation = stage->log2_theta == 0.0f ? nullptr : rotations + stream * HEAD_DIM;
    Attending::prepare(head.query, layer.query_norm, eps, rotation, stage->interleaved);
    Attending::prepare(head.key, layer.key_norm, eps, rotation, stage->interleaved);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      head.query[i] *= stage->scale * LOG2_E;
      head.key[i] = to_float(from_float<T>(head.key[i])), head.value[i] = to_float(from_float<T>(head.value[i]));
    }
  }

  __device__ __forceinline__ int64_t cache_of(int stream, int number) const {
    return int64_t(stream * stage->kv_heads + number / query_heads) * stage->capacity * HEAD_DIM;
  }

  // Puts the new key and value behind `seen` rows; by one warp for each of the cache's heads.
  __device__ __forceinline__ void remember(const Attending& head, const Layer<T>& layer, int stream, int number, int seen) const {
    if (number % query_heads || Attending::group() > 0) return;
    const int64_t place = cache_of(stream, number) + int64_t(seen) * HEAD_DIM + Attending::piece() * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) layer.keys[place + i] = from_float<T>(head.key[i]), layer.values[place + i] = from_float<T>(head.value[i]);
  }

  // All heads of all streams, a warp each, straight into the x of o_proj.
  __device__ __forceinline__ void attend_alone(const Layer<T>& layer, int seen) {
    const Job& job = jobs[OUT];
    const Operand<PARTS> x = operand(job);
    const int whole = job.whole / PIECE_VALUES, depth = job.depth / PIECE_VALUES;
    for (int i = threadIdx.x; i < streams * (whole - depth); i += THREADS) {
      float nothing[8] = {};
      x.put(i / (whole - depth), depth + i % (whole - depth), nothing);
    }
    for (int task = threadIdx.x / 32; task < streams * stage->heads; task += WARPS) {
      const int stream = task / stage->heads, number = task % stage->heads;
      const int64_t cache = cache_of(stream, number);
      typename Attending::Rows some;
      some.load(layer.keys + cache, layer.values + cache, 0, seen, 1);
      Attending head;
      prepare(head, layer, stream, number);
      head.see(some, layer.keys + cache, layer.values + cache, 0, seen, 0, 1, true);
      if (blockIdx.x == 0) remember(head, layer, stream, number, seen);
      const float share = 1.0f / head.weight;
#pragma unroll
      for (int i = 0; i < 8; i++) head.seen[i] *= share;
      for (int first = 0; first < job.depth && Attending::group() == 0; first += job.width) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = head.seen[i];
        x.put(stream, first / PIECE_VALUES + number * Attending::LANES + Attending::piece(), values);
      }
    }
  }

  // Heads of streams and splits of their rows, a block each.
  __device__ __forceinline__ void attend_together(const Layer<T>& layer, int seen, const int32_t* padding) {
    float* shared = reinterpret_cast<float*>(memory);
    const int warp = threadIdx.x / 32, splits = stage->splits;
    for (int task = blockIdx.x; task < streams * stage->heads * splits; task += gridDim.x) {
      const int split = task % splits, number = task / splits % stage->heads, stream = task / splits / stage->heads;
      int start = padding ? padding[stream] : 0;
      if (stage->window >= 0) start = max(start, seen - stage->window);
      const int count = seen - start, first = start + int(int64_t(count) * split / splits);
      const int end = start + int(int64_t(count) * (split + 1) / splits);
      const int64_t cache = cache_of(stream, number);
      const bool with_new = split == splits - 1 && warp == WARPS - 1;
      typename Attending::Rows some;
      some.load(layer.keys + cache, layer.values + cache, first + warp * Attending::GROUPS, end, WARPS);
      Attending head;
      prepare(head, layer, stream, number);
      head.see(some, layer.keys + cache, layer.values + cache, first, end, warp, WARPS, with_new);
      if (with_new) remember(head, layer, stream, number, seen);
      if (Attending::group() == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) shared[warp * WIDTH + Attending::piece() * 8 + i] = head.seen[i];
        shared[warp * WIDTH + HEAD_DIM] = head.peak, shared[warp * WIDTH + HEAD_DIM + 1] = head.weight;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
        float peak = NOTHING_SEEN, weight = 0.0f, seen_here = 0.0f;
        for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, shared[w * WIDTH + HEAD_DIM]);
        for (int w = 0; w < WARPS; w++) {
          const float share_of_warp = exp2f(shared[w * WIDTH + HEAD_DIM] - peak);
          weight += share_of_warp * shared[w * WIDTH + HEAD_DIM + 1], seen_here += share_of_warp * shared[w * WIDTH + i];
        }
        if (splits == 1) {
          static_cast<Kept*>(stage->attended)[(stream * stage->heads + number) * HEAD_DIM + i] = from_float<Kept>(seen_here / weight);
        } else {
          stage->parts[task * WIDTH + i] = seen_here;
          if (i == 0) stage->parts[task * WIDTH + HEAD_DIM] = peak, stage->parts[task * WIDTH + HEAD_DIM + 1] = weight;
        }
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void bring_attended(const Job& job) {
    const int splits = stage->splits;
    if (!SPLITS || splits == 1) return bring_kept(job, stage->attended);
    if constexpr (SPLITS) bring(job, nullptr, [&](int row, int piece, float (&values)[8]) {
      const float* part = stage->parts + (row * stage->heads + piece / Attending::LANES) * splits * WIDTH;
      float seen[MOST_SPLITS][8], peaks[MOST_SPLITS], weights[MOST_SPLITS], peak = NOTHING_SEEN, weight = 0.0f;
#pragma unroll
      for (int split = 0; split < MOST_SPLITS; split++) {  // loaded together, as each takes long
        if (split >= splits) break;
        peaks[split] = __ldcg(part + split * WIDTH + HEAD_DIM), weights[split] = __ldcg(part + split * WIDTH + HEAD_DIM + 1);
        load_piece(part + split * WIDTH + piece % Attending::LANES * 8, seen[split]);
      }
#pragma unroll
      for (int split = 0; split < MOST_SPLITS; split++) {
        if (split < splits) peak = fmaxf(peak, peaks[split]);
      }
#pragma unroll
      for (int split = 0; split < MOST_SPLITS; split++) {
        if (split >= splits) break;
        const float share = exp2f(peaks[split] - peak);
        weight += share * weights[split];
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] += share * seen[split][i];
      }
      weight = 1.0f / weight;
#pragma unroll
      for (int i = 0; i < 8; i++) values[i] *= weight;
    });
  }

  static __device__ __forceinline__ float silu(float x) {
    if constexpr (PARTS == 1) return __fdividef(x, 1.0f + __expf(-x));
    return x / (1.0f + expf(-x));
  }

  __device__ __forceinline__ float activated(float up, float gated) const {
    switch (stage->activation) {
      case SWIGLU: return silu(up) * gated;  // up is the gate here
      case GELU: return 0.5f * up * (1.0f + erff(up * 0.70710678f));
      case GELU_TANH: return up / (1.0f + expf(-1.59576912f * (up + 0.044715f * up * up * up)));
      case RELU: return fmaxf(up, 0.0f);
      default: return silu(up);
    }
  }

  // One phase. fresh(row, piece, values) gives the rows that the first layer takes where `is_new`; embed those of FIRST;
  // done(row, column, value) takes what LAST gives.
  template <typename Fresh, typename Embed, typename Done>
  __device__ __forceinline__ void run(
      const At& at, Sent& sent, int seen, const int32_t* padding, bool is_new, const Fresh& fresh, const Embed& embed, const Done& done) {
    const Layer<T>& layer = layers[at.layer];
    if (at.part == ATTEND) return attend_together(layer, seen, padding);
    const Job& job = jobs[at.part];
    // New rows have just come to x, after these weights were sent for.
    if (is_new && at.part == OUT && at.layer == 0) learn(at, sent);
    const T* norm = at.part == QKV ? layer.attention_norm : at.part == UP ? layer.ffn_norm : at.part == LAST ? stage->norm : nullptr;
    if (at.part == FIRST) {
      bring(job, nullptr, embed);
    } else if (at.part == DOWN) {
      bring_kept(job, stage->hidden);
    } else if (at.part != OUT) {
      bring_normed(job, norm, is_new && at.part == QKV && at.layer == 0, fresh);
    } else if (attends_alone) {
      attend_alone(layer, seen);
    } else {
      bring_attended(job);
    }
    __syncthreads();
    const Linear<T>* linears = linears_of(at);
    multiply<WARPS>(
        job, linears, lanes[at.part * THREADS], sent, operand(job), partial,
        [&](int number, int row, int column) { return know(at, linears, number, row, column); },
        [&](int number, int row, int column, float one, float other, const Known& known) {
          if (norm != nullptr) {
            float sum = 0.0f;
            for (int segment = 0; segment < job.segments; segment++) sum += squares[row * MOST_SEGMENTS + segment];
            const float factor = rsqrtf(sum * job.inverse_width + eps);
            one *= factor, other *= factor;
          }
          one = one * known.factor[0] + known.added[0], other = other * known.factor[1] + known.added[1];
          if (at.part == OUT || at.part == DOWN || at.part == FIRST) {
            residual[row * dim + column] = one;
          } else if (at.part == QKV) {
            (number == 0 ? stage->q : number == 1 ? stage->k : stage->v)[row * linears[number].rows + column] = one;
          } else if (at.part == UP) {
            static_cast<Kept*>(stage->hidden)[row * linears[0].rows + column] = from_float<Kept>(activated(one, other));
          } else {
            done(row, column, one);
          }
        });
  }
};

}  // namespace marlin
