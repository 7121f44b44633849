// Steps of the last stage and the draw of an id in each, for up to 16 streams, in one launch: all blocks are resident at once
// and wait for each other (grid.cuh).
//
// model: Stage and Layers; lead[streams, dim]: the row that leads, or, where SLOTTED, [streams, PATCH, dim]: what is added to the
// embedding of the id before each row, the first of which is before[streams, PATCH][0]; added[steps in all, dim]: what is added to lead and to the
// embedding of the id before each later row; given[streams, known]: ids that stand there already, fed and not drawn, or null;
// noise[steps, vocab], or null for the likeliest ids; temperature, top_p, min_p, top_k: filters; ids[streams, PATCH]: the known
// ones and those drawn; number: of the launch, which the host finds with the drawn ids [streams, steps] in its mailbox, -2 where
// logits are no numbers, all -1 where a wait was given up; first_phase: more than the number of any phase of the launches before.

extern "C" __global__ void __launch_bounds__(marlin::THREADS, 1) local_patch_decode(
    const uint8_t* model, const marlin::T* lead, const marlin::T* added, const int32_t* given, const float* noise, int32_t* ids,
    float temperature, float top_p, float min_p, int top_k, int known, int steps, int number, unsigned first_phase,
    const int32_t* before) {
  using namespace marlin;
  constexpr int VOCAB = Job<LAST>::HEIGHT;
  Machine machine(model, first_phase);
  const Stage& stage = *machine.stage;
  int32_t* mail = mail_of(stage, number);

  // Every block draws for itself; the first one tells.
  auto draw = [&](int step) {
    const float* here = noise == nullptr ? nullptr : noise + (step - known) * VOCAB;
    draw_ids<false>(machine, {here, nullptr, temperature, top_p, min_p, top_k}, [&](int stream, int id, bool finite, float) {
      machine.chosen[stream] = finite ? id : 0;
      if (blockIdx.x == 0) ids[stream * PATCH + step] = id, mail[1 + stream * steps + step - known] = finite ? id : NOT_FINITE;
    });
  };
  // Values of the row that a step begins with.
  auto fresh = [&](int step, int row, int column, auto& values) {
    constexpr int COUNT = sizeof(values) / sizeof(float);
    float more[COUNT];
    if constexpr (SLOTTED) {
      const int id = step == 0 ? before[row * PATCH] : machine.chosen[row];
      load_values<false>(stage.table + int64_t(id) * DIM + column, values);
      load_values<false>(lead + (row * PATCH + step) * DIM + column, more);
#pragma unroll
      for (int i = 0; i < COUNT; i++) values[i] += more[i];
    } else {
      load_values<false>(step == 0 ? lead + row * DIM + column : stage.table + int64_t(machine.chosen[row]) * DIM + column, values);
    }
    load_values<false>(added + step * DIM + column, more);
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] += more[i];
  };

  if (machine.grid.failed()) {
    if (blockIdx.x == 0 && threadIdx.x == 0) post(machine, mail, number, STREAMS * steps);
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
    machine.spend<DRAWING>();
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
            for (int n = 0; n < marlin::Plain<decltype(mine)>::AT_ONCE; n++) {
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
  machine.spend<DRAWING>();
  machine.tell_times();
  if (threadIdx.x == 0) post(machine, mail, number, STREAMS * steps);
}
