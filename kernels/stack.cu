// One patch of each of up to 16 streams through the global stage: its bytes embedded and projected, all layers, and the
// condition of the local stage, in one launch; all blocks are resident at once and wait for each other (grid.cuh).
//
// model: Stage and Layers; ids[streams, patch]; padding[streams]: filler rows of each stream's cache, or null; seen: rows in the
// caches; out[streams, rows of the last layer]; first_phase: more than the number of any phase of the launches before. Where GPUs
// share the stage (exchange.cuh): exchange, and the turn of the last sum before; else null and 0. A wait that is given up is told
// to the host at once.

extern "C" __global__ void __launch_bounds__(marlin::THREADS, 1) stack(
    const uint8_t* model, const int32_t* ids, const int32_t* padding, marlin::T* out, int seen, unsigned first_phase,
    const marlin::Exchange* exchange, unsigned turn) {
  using namespace marlin;
  Machine machine(model, first_phase);
  const Stage& stage = *machine.stage;
  machine.heed(exchange, turn);
  if (machine.grid.failed()) return;  // the host knows already
  send_for<FIRST>(machine.sent, &stage.first, machine.layers[0].attention_norm);
  machine.rotate_at(seen, padding);
  machine.padding = padding;
  if (threadIdx.x == 0) machine.stage->states = seen;  // read after the first phase has its x
  machine.add_product<FIRST, QKV>(&stage.first, false, [&] {
    machine.bring<FIRST, 8>(nullptr, [&](const auto& mine, auto& values) {
#pragma unroll
      for (int n = 0; n < marlin::Plain<decltype(mine)>::AT_ONCE; n++) {
        if (!mine.there[n]) continue;
        const int byte = mine.column[n] / BYTE_WIDTH, id = max(ids[mine.row[n] * PATCH + byte], 0);
        load_values(stage.table + int64_t(id) * BYTE_WIDTH + mine.column[n] % BYTE_WIDTH, values[n]);
      }
    });
  });
  machine.go_on([&] { send_for<QKV>(machine.sent, machine.layers[0].qkv); });
  machine.spend<FIRST>();
  machine.run(
      seen, padding, true, [&](const T* norm) { machine.bring_normed<QKV>(norm); },
      [&](int row, int column, float value) { out[row * Job<LAST>::HEIGHT + column] = from_float<T>(value); }, [] {});
  machine.tell_times();
}
