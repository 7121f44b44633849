// Steps of a decoder that answers inputs, and the draw of an id in each, for up to 16 answers, in one launch: all blocks are
// resident at once and wait for each other (grid.cuh).
//
// model: Stage and Layers; given[streams, known]: ids that are fed first, and not drawn; noise[steps, vocab], or null for the
// likeliest ids; barred: bits of ids that are not drawn, or null; temperature, top_p, min_p, top_k: filters; last[streams]: the
// ids drawn last, which are not fed yet (it may be `given` of the next launch); logits[streams, vocab]: what they were drawn
// from, or null; seen: rows in the caches; number: of the launch, which the host finds in its mailbox with the ids
// [streams, steps] and their costs; first_phase: more than the number of any phase of the launches before.

extern "C" __global__ void __launch_bounds__(marlin::THREADS, 1) answer_decode(
    const uint8_t* model, const int32_t* given, const float* noise, const uint32_t* barred, int32_t* last, float* logits,
    float temperature, float top_p, float min_p, int top_k, int known, int steps, int seen, int number, unsigned first_phase) {
  using namespace marlin;
  constexpr int VOCAB = Job<LAST>::HEIGHT;
  Machine machine(model, first_phase);
  const Stage& stage = *machine.stage;
  int32_t* mail = mail_of(stage, number);

  // Every block draws for itself; the first one tells.
  auto draw = [&](int step) {
    const float* here = noise == nullptr ? nullptr : noise + step * VOCAB;
    draw_ids<true>(machine, {here, barred, temperature, top_p, min_p, top_k}, [&](int stream, int id, bool finite, float cost) {
      machine.chosen[stream] = finite ? id : 0;
      if (blockIdx.x > 0) return;
      if (step + 1 == steps) last[stream] = finite ? id : 0;
      mail[1 + stream * steps + step] = finite ? id : NOT_FINITE;
      mail[1 + (STREAMS + stream) * steps + step] = int32_t(__float_as_uint(cost));
    });
  };
  // Values of the row that a step begins with.
  auto fresh = [&](int row, int column, auto& values) {
    load_values<false>(stage.table + int64_t(machine.chosen[row]) * DIM + column, values);
  };

  if (machine.grid.failed()) {
    if (blockIdx.x == 0 && threadIdx.x == 0) post(machine, mail, number, STREAMS * steps);
    return;
  }
  send_for<QKV>(machine.sent, machine.layers[0].qkv);
  const int fed = known + steps - 1;
#pragma unroll 1
  for (int step = 0; step < fed; step++) {
    __syncthreads();  // the step before is over, for all warps
    if (step >= known) {
      draw(step - known);
    } else if (threadIdx.x < STREAMS) {
      machine.chosen[threadIdx.x] = given[threadIdx.x * known + step];
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
        if (output < Job<OUT>::OUTPUTS && column < DIM) fresh(output / TILE_ROWS, column & ~1, pair);
        machine.residual[round][n] = column % 2 ? pair[1] : pair[0];
      }
    }
    const bool told = logits != nullptr && step + 1 == fed;
    machine.run(
        seen + step, nullptr, step + 1 >= known,
        [&](const T* norm) {
          machine.bring<QKV, NORMED_VALUES>(norm, [&](const auto& mine, auto& values) {
#pragma unroll
            for (int n = 0; n < marlin::Plain<decltype(mine)>::AT_ONCE; n++) {
              if (mine.there[n]) fresh(mine.row[n], mine.column[n], values[n]);
            }
          });
        },
        [&](int row, int column, float value) {
          put_float(stage.logits, row * VOCAB + column, value, machine.phase + 1);
          if (told) logits[row * VOCAB + column] = value;
        },
        [&] { machine.go_on([&] { send_for<QKV>(machine.sent, machine.layers[0].qkv); }); });
  }
  __syncthreads();
  if (blockIdx.x > 0) return;
  draw(steps - 1);
  __syncthreads();
  machine.spend<DRAWING>();
  machine.tell_times();
  if (threadIdx.x == 0) post(machine, mail, number, STREAMS * steps);
}
