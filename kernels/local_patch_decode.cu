// Steps of the last stage and the draw of an id in each, for up to 16 streams, in one launch: all blocks are resident at once
// and wait for each other (grid.cuh).
//
// model: Stage and Layers; lead[streams, dim]: the row that leads; added[steps in all, dim]: what is added to lead and to the
// embedding of the id before each later row; given[streams, known]: ids that stand there already, fed and not drawn, or null;
// noise[steps, vocab], or null for the likeliest ids; temperature, top_p, min_p, top_k: filters; ids[streams, PATCH]: the known
// ones and those drawn; number: of the launch, which the host finds with the drawn ids [streams, steps] in its mailbox, -2 where
// logits are no numbers, all -1 where a wait was given up; first_phase: more than the number of any phase of the launches before.

extern "C" __global__ void __launch_bounds__(marlin::THREADS, 1) local_patch_decode(
    const uint8_t* model, const marlin::T* lead, const marlin::T* added, const int32_t* given, const float* noise, int32_t* ids,
    float temperature, float top_p, float min_p, int top_k, int known, int steps, int number, unsigned first_phase) {
  using namespace marlin;
  constexpr int VOCAB = Job<LAST>::HEIGHT, MAIL_SLOTS = 4, MAIL_WORDS = 2048, GAVE_UP = -1, NOT_FINITE = -2;
  constexpr int SCORES = (VOCAB + 63) / 64;
  Machine machine(model, first_phase);
  const Stage& stage = *machine.stage;
  int32_t* mail = stage.mailbox + number % MAIL_SLOTS * MAIL_WORDS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // The id of each stream from its logits, by a warp, to `chosen`; every block draws for itself.
  auto draw = [&](int step) {
    for (int stream = warp; stream < STREAMS; stream += WARPS) {
      float scores[SCORES][2];  // of ids 2 * lane + 64 * n and the next one
      const float nothing = -cuda::std::numeric_limits<float>::infinity();
      if constexpr (TAGGED) {
        const Cell* cells[SCORES];
        bool there[SCORES];
        uint32_t bits[SCORES][2];
#pragma unroll
        for (int n = 0; n < SCORES; n++) {
          there[n] = 64 * n + 2 * lane < VOCAB, cells[n] = static_cast<const Cell*>(stage.logits) + stream * VOCAB + 64 * n + 2 * lane;
        }
        read_cells(machine.grid, cells, there, machine.phase, bits);
#pragma unroll
        for (int n = 0; n < SCORES; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) scores[n][i] = there[n] ? __uint_as_float(bits[n][i]) : nothing;
        }
      } else {
        const float* logits = static_cast<const float*>(stage.logits) + stream * VOCAB;
#pragma unroll
        for (int n = 0; n < SCORES; n++) {  // loaded together, as each takes long
#pragma unroll
          for (int i = 0; i < 2; i++) scores[n][i] = 64 * n + 2 * lane + i < VOCAB ? __ldcg(logits + 64 * n + 2 * lane + i) : nothing;
        }
      }
      float highest = nothing;
      int id = VOCAB;
      bool finite = true, any = false;  // all below infinity, and some above minus that
#pragma unroll
      for (int n = 0; n < SCORES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) finite = finite && scores[n][i] < -nothing, any = any || scores[n][i] > nothing;
      }
      finite = __all_sync(0xffffffff, finite) && __any_sync(0xffffffff, any);
      if (noise != nullptr) {
        float* scaled = reinterpret_cast<float*>(machine.memory) + stream * VOCAB;
#pragma unroll
        for (int n = 0; n < SCORES; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            if (64 * n + 2 * lane + i < VOCAB) scaled[64 * n + 2 * lane + i] = scores[n][i] / temperature;
          }
        }
        __syncwarp();
        for (int i = lane; i < VOCAB; i += 32) highest = fmaxf(highest, scaled[i]);
        highest = largest_of_warp(highest);
        // What an order would tell, without one: how many are likelier than each, and how likely they are together.
        float total = 0.0f, lowest = nothing;
        if (0 < top_k && top_k < VOCAB) {
          lowest = -lowest;
          for (int i = lane; i < VOCAB; i += 32) {
            int likelier = 0;
            for (int j = 0; j < VOCAB; j++) likelier += scaled[j] > scaled[i];
            if (likelier < top_k) lowest = fminf(lowest, scaled[i]);
          }
          lowest = -largest_of_warp(-lowest);
        }
        if (top_p < 1.0f) {
          for (int i = lane; i < VOCAB; i += 32) total += scaled[i] < lowest ? 0.0f : expf(scaled[i] - highest);
          total = sum_of_warp(total);
          float inside = -nothing;
          for (int i = lane; i < VOCAB; i += 32) {
            if (scaled[i] < lowest) continue;
            float before = 0.0f;
            for (int j = 0; j < VOCAB; j++) before += scaled[j] > scaled[i] ? expf(scaled[j] - highest) : 0.0f;
            if (before / total < top_p) inside = fminf(inside, scaled[i]);
          }
          lowest = -largest_of_warp(-inside);
        }
        if (min_p > 0.0f) lowest = fmaxf(lowest, highest + logf(min_p));
        highest = nothing;
        for (int i = lane; i < VOCAB; i += 32) {
          const float score = scaled[i] < lowest ? nothing : scaled[i] + noise[(step - known) * VOCAB + i];
          if (id == VOCAB || score > highest) highest = score, id = i;
        }
      } else {
#pragma unroll
        for (int n = 0; n < SCORES; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int other = 64 * n + 2 * lane + i;
            if (other < VOCAB && (id == VOCAB || scores[n][i] > highest)) highest = scores[n][i], id = other;
          }
        }
      }
      best_of_warp(highest, id);
      if (lane == 0) {
        machine.chosen[stream] = finite ? id : 0;
        if (blockIdx.x == 0) ids[stream * PATCH + step] = id, mail[1 + stream * steps + step - known] = finite ? id : NOT_FINITE;
      }
    }
  };
  // Everything in the mailbox is there for the host that finds the number. For thread 0 of block 0, after the others.
  auto post = [&] {
    if (machine.grid.failed()) {
      for (int i = 0; i < STREAMS * steps; i++) mail[1 + i] = GAVE_UP;
    }
    __threadfence_system();
    *static_cast<volatile int32_t*>(mail) = number;
  };
  // Values of the row that a step begins with.
  auto fresh = [&](int step, int row, int column, auto& values) {
    constexpr int COUNT = sizeof(values) / sizeof(float);
    float more[COUNT];
    load_values<false>(step == 0 ? lead + row * DIM + column : stage.table + int64_t(machine.chosen[row]) * DIM + column, values);
    load_values<false>(added + step * DIM + column, more);
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] += more[i];
  };

  if (machine.grid.failed()) {
    if (blockIdx.x == 0 && threadIdx.x == 0) post();
    return;
  }
  send_for<QKV>(machine.sent, machine.layers[0].qkv);
#pragma unroll 1
  for (int step = 0; step < known + steps; step++) {
    __syncthreads();  // the step before is over, for all warps
    machine.rotate_at(step, nullptr);
    if (step > known) {
      draw(step - 1);
    } else if (step > 0 && threadIdx.x < STREAMS) {
      const int id = given[threadIdx.x * known + step - 1];
      machine.chosen[threadIdx.x] = id;
      if (blockIdx.x == 0) ids[threadIdx.x * PATCH + step - 1] = id;
    }
    __syncthreads();
    // What the first o_proj is added to.
    using Crew = Team<OUT>;
#pragma unroll
    for (int round = 0; round < Machine::X_ROUNDS; round++) {
#pragma unroll
      for (int n = 0; n < Machine::X_OUTPUTS; n++) {
        const int output = Crew::thread() + n * Crew::SIZE * 32, column = Crew::tile(round) * TILE_ROWS + output % TILE_ROWS;
        float pair[2] = {0.0f, 0.0f};
        if (output < Job<OUT>::OUTPUTS && column < DIM) fresh(step, output / TILE_ROWS, column & ~1, pair);
        machine.residual[round][n] = column % 2 ? pair[1] : pair[0];
      }
    }
    machine.run(
        step, nullptr, step >= known,
        [&](const T* norm) {
          machine.bring<QKV, NORMED_VALUES>(norm, [&](const auto& mine, auto& values) {
#pragma unroll
            for (int n = 0; n < cuda::std::remove_cvref_t<decltype(mine)>::AT_ONCE; n++) {
              if (mine.there[n]) fresh(step, mine.row[n], mine.column[n], values[n]);
            }
          });
        },
        [&](int row, int column, float value) { put_float(stage.logits, row * VOCAB + column, value, machine.phase + 1); },
        [&] { machine.go_on([&] { send_for<QKV>(machine.sent, machine.layers[0].qkv); }); });
  }
  __syncthreads();
  if (blockIdx.x > 0) return;
  draw(known + steps - 1);
  __syncthreads();
  if (threadIdx.x == 0) post();
}
