// One patch of each of up to 16 streams through the global stage: its bytes embedded and projected, all layers, and the
// condition of the local stage, in one launch; all blocks are resident at once and wait for each other (grid.cuh).
//
// inputs   model[..] uint8: Stage and Layers; ids[streams, patch] int32; padding[streams] int32: filler rows of each stream's
//          cache; span: shape (rows in the caches + 1)
// output   out[streams, rows of the last layer] T
// template T; KINDS bits of the kinds of weights; PARTS 1, or 3 for float32; WARPS a block; HEAD_DIM; HAS_PADDING
// grid     blocks * WARPS * 32

  using Engine = marlin::Machine<T, KINDS, PARTS, WARPS, HEAD_DIM, true>;
  using At = typename Engine::At;
  Engine engine(model, false);
  marlin::Stage<T>& stage = *engine.stage;
  marlin::Grid grid(stage.grid);
  const int seen = span_shape[0] - 1, patch = ids_shape[1], columns = stage.last.rows;
  const int32_t* filler = HAS_PADDING ? padding : nullptr;

  if (grid.failed()) return;  // the ids say so already
  At at = {marlin::FIRST, 0};
  typename Engine::Sent sent;
  engine.send_for(at, sent);
  engine.rotate_at(seen, filler);
  while (true) {
    engine.run(
        at, sent, seen, filler, false, [](int, int, float(&)[8]) {},
        [&](int row, int piece, float(&values)[8]) {
          const int byte = piece * 8 / stage.width, id = max(ids[row * patch + byte], 0);
          marlin::load_piece(stage.table + int64_t(id) * stage.width + piece * 8 % stage.width, values);
        },
        [&](int row, int column, float value) { out[row * columns + column] = marlin::from_float<T>(value); });
    const At next = engine.after(at);
    if (next.part == marlin::END) return;
    grid.arrive();
    engine.send_for(next, sent);
    if (!grid.wait(engine.flag)) return;
    at = next;
  }
