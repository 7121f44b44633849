// Steps of the last stage and the draw of an id in each, for up to 16 streams, in one launch: all blocks are resident at once
// and wait for each other (grid.cuh).
//
// inputs   model[..] uint8: Stage and Layers; lead[streams, dim] T: the row that leads; added[streams or 1, steps in all, dim] T:
//          what is added to lead and to the embedding of the id before each later row; given[streams, n] int32: ids that stand
//          there already, fed and not drawn; noise[steps, vocab] float; filters[4] float: temperature, top_p, min_p, top_k;
//          span: shape (steps + 1, n + 1, number of the launch), of which `given` has no rows to read where n is 0
// output   ids[streams, steps] int32: drawn after n, n + 1, .. ids; -1 where a barrier did not open. The host finds them in its
//          mailbox too: memory of its own, as MLX takes half a millisecond to bring an array there
// template T; KINDS bits of the kinds of weights; PARTS 1, or 3 for float32; WARPS a block; HEAD_DIM; SAMPLING
// grid     blocks * WARPS * 32

  using Engine = marlin::Machine<T, KINDS, PARTS, WARPS, HEAD_DIM, false>;
  using At = typename Engine::At;
  Engine engine(model, true);
  marlin::Stage<T>& stage = *engine.stage;
  marlin::Grid grid(stage.grid);
  const int steps = span_shape[0] - 1, known = span_shape[1] - 1, streams = stage.streams, vocab = stage.last.rows;
  constexpr int MOST_VOCAB = 512, MAIL_SLOTS = 4, MAIL_WORDS = 2048;
  const int number = span_shape[2];
  int32_t* mail = stage.mailbox + number % MAIL_SLOTS * MAIL_WORDS;
  const int dim = stage.dim, warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // The id of each stream from its logits, by a warp, to `chosen`; every block draws for itself.
  auto draw = [&](int step) {
    for (int stream = warp; stream < streams; stream += WARPS) {
      const float* logits = stage.logits + stream * vocab;
      float highest = -cuda::std::numeric_limits<float>::infinity();
      int id = vocab;
      if constexpr (SAMPLING) {
        const float temperature = filters[0], top_p = filters[1], min_p = filters[2];
        const int top_k = int(filters[3]);
        float* scaled = reinterpret_cast<float*>(engine.memory) + stream * vocab;
        for (int i = lane; i < vocab; i += 32) scaled[i] = __ldcg(logits + i) / temperature, highest = fmaxf(highest, scaled[i]);
        highest = marlin::largest_of_warp(highest);
        // What an order would tell, without one: how many are likelier than each, and how likely they are together.
        float total = 0.0f, lowest = -cuda::std::numeric_limits<float>::infinity();
        if (0 < top_k && top_k < vocab) {
          lowest = -lowest;
          for (int i = lane; i < vocab; i += 32) {
            int likelier = 0;
            for (int j = 0; j < vocab; j++) likelier += scaled[j] > scaled[i];
            if (likelier < top_k) lowest = fminf(lowest, scaled[i]);
          }
          lowest = -marlin::largest_of_warp(-lowest);
        }
        if (top_p < 1.0f) {
          for (int i = lane; i < vocab; i += 32) total += scaled[i] < lowest ? 0.0f : expf(scaled[i] - highest);
          total = marlin::sum_of_warp(total);
          float inside = cuda::std::numeric_limits<float>::infinity();
          for (int i = lane; i < vocab; i += 32) {
            if (scaled[i] < lowest) continue;
            float before = 0.0f;
            for (int j = 0; j < vocab; j++) before += scaled[j] > scaled[i] ? expf(scaled[j] - highest) : 0.0f;
            if (before / total < top_p) inside = fminf(inside, scaled[i]);
          }
          lowest = -marlin::largest_of_warp(-inside);
        }
        if (min_p > 0.0f) lowest = fmaxf(lowest, highest + logf(min_p));
        highest = -cuda::std::numeric_limits<float>::infinity();
        for (int i = lane; i < vocab; i += 32) {
          const float score = scaled[i] < lowest ? -cuda::std::numeric_limits<float>::infinity() : scaled[i] + noise[(step - known) * vocab + i];
          if (id == vocab || score > highest) highest = score, id = i;
        }
      } else {
        float scores[MOST_VOCAB / 32];  // loaded together, as each takes long
#pragma unroll
        for (int n = 0; n < MOST_VOCAB / 32; n++) scores[n] = lane + 32 * n < vocab ? __ldcg(logits + lane + 32 * n) : highest;
#pragma unroll
        for (int n = 0; n < MOST_VOCAB / 32; n++) {
          if (lane + 32 * n < vocab && (n == 0 || scores[n] > highest)) highest = scores[n], id = lane + 32 * n;
        }
      }
      marlin::best_of_warp(highest, id);
      if (lane == 0) {
        engine.chosen[stream] = id;
        if (blockIdx.x == 0) ids[stream * steps + step - known] = mail[1 + stream * steps + step - known] = id;
      }
    }
  };
  // Everything in the mailbox is there for the host that finds the number.
  auto post = [&] {
    __syncthreads();
    if (threadIdx.x > 0) return;
    __threadfence_system();
    *static_cast<volatile int32_t*>(mail) = number;
  };
  auto fail = [&] {
    for (int i = threadIdx.x; i < streams * steps; i += WARPS * 32) ids[i] = mail[1 + i] = -1;
    post();
  };

  if (grid.failed()) return fail();
  int step = 0;  // rows of the stage so far
  At at = {marlin::QKV, 0};
  typename Engine::Sent sent;
  engine.send_for(at, sent);
  while (true) {
    if (at.part == marlin::END || (at.part == marlin::QKV && at.layer == 0)) {
      engine.rotate_at(step, nullptr);
      if (step > known) {
        draw(step - 1);
      } else if (step > 0 && threadIdx.x < streams) {
        engine.chosen[threadIdx.x] = given[threadIdx.x * known + step - 1];
      }
      __syncthreads();
    }
    if (at.part == marlin::END) {
      if (blockIdx.x == 0) post();
      return;
    }
    engine.run(
        at, sent, step, nullptr, true,
        [&](int row, int piece, float(&values)[8]) {
          float more[8];
          const int rows = added_shape[1];
          const T* addition = added + (int64_t(added_shape[0] == 1 ? 0 : row) * rows + step) * dim + piece * 8;
          marlin::load_piece(step == 0 ? lead + row * dim + piece * 8 : stage.table + int64_t(engine.chosen[row]) * dim + piece * 8, values);
          marlin::load_piece(addition, more);
#pragma unroll
          for (int i = 0; i < 8; i++) values[i] += more[i];
        },
        [](int, int, float(&)[8]) {}, [&](int row, int column, float value) { stage.logits[row * vocab + column] = value; });
    At next = engine.after(at);
    if (next.part == marlin::LAST && step < known) next = {marlin::END, 0};  // the id that follows is known
    if (next.part == marlin::END && ++step < known + steps) next = {marlin::QKV, 0};
    grid.arrive();
    engine.send_for(next, sent);
    if (!grid.wait(engine.flag)) return fail();
    at = next;
  }
