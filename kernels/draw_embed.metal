// One id of each stream from its logits, and the row that it is embedded as. A threadgroup has a stream.
//
// Filters apply in order: temperature, top_k, top_p, min_p. An id stays with top_k if fewer than k are likelier, and with top_p if
// those likelier have less than top_p together: what sorting gives, without a sort. Gumbel noise decides among those that stay.
//
// inputs   logits[streams, VOCAB] float32; noise[steps, VOCAB] float32, not read where the likeliest id is taken
//          filters[4] float32: temperature, top_p, logarithm of min_p (above 0: none), top_k (0: none)
//          ids_before[streams, steps] int32; table[VOCAB, width] T; positions[steps, width] T, of which the first is the leading
//          row's, so that each id has the one after its step's
//          sizes[3] int32: steps, this step, width
// outputs  ids[streams, steps] int32: as before, and this step's; rows[streams, width] T
// template T; VOCAB; THREADS; SAMPLING; HAS_POSITIONS
// grid     (THREADS, streams) threads

  const int thread_of_group = simdgroup_index_in_threadgroup * 32 + thread_index_in_simdgroup;
  const int stream = threadgroup_position_in_grid.y, steps = sizes[0], step = sizes[1], width = sizes[2];
  threadgroup float scores[VOCAB], other[VOCAB];
  threadgroup int drawn[1];

  for (int i = thread_of_group; i < VOCAB; i += THREADS) {
    const float logit = logits[stream * VOCAB + i];
    scores[i] = SAMPLING ? logit / filters[0] : logit;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (SAMPLING) {
    const int top_k = int(filters[3]);
    for (int i = thread_of_group; i < VOCAB; i += THREADS) {
      int likelier = 0;
      for (int j = 0; j < VOCAB; j++) likelier += scores[j] > scores[i];
      other[i] = top_k > 0 && likelier >= top_k ? -INFINITY : scores[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float peak = -INFINITY;
    for (int j = 0; j < VOCAB; j++) peak = metal::max(peak, other[j]);
    // What is left of each id's probability, not divided by their sum.
    for (int i = thread_of_group; i < VOCAB; i += THREADS) scores[i] = metal::exp(other[i] - peak);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float kept[(VOCAB + THREADS - 1) / THREADS];
    for (int i = thread_of_group, n = 0; i < VOCAB; i += THREADS, n++) {
      float all = 0.0f, before = 0.0f;
      for (int j = 0; j < VOCAB; j++) {
        all += scores[j];
        before += other[j] > other[i] ? scores[j] : 0.0f;
      }
      const bool inside = filters[1] >= 1.0f || before / all < filters[1];
      const bool enough = filters[2] > 0.0f || other[i] >= peak + filters[2];
      kept[n] = inside && enough ? other[i] + noise[step * VOCAB + i] : -INFINITY;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_of_group, n = 0; i < VOCAB; i += THREADS, n++) scores[i] = kept[n];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  if (simdgroup_index_in_threadgroup == 0) {
    float best = -INFINITY;
    int place = VOCAB;
    for (int i = thread_of_group; i < VOCAB; i += 32) {
      if (scores[i] > best) {
        best = scores[i];
        place = i;
      }
    }
    const float highest = metal::simd_max(best);
    place = metal::simd_min(best == highest ? place : VOCAB);
    if (thread_of_group == 0) drawn[0] = place < VOCAB ? place : 0;  // nothing but NaN: the caller looks for it
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int id = drawn[0], next = step + 1 < steps ? step + 1 : 0;  // the last one is read by nobody
  for (int i = thread_of_group; i < steps; i += THREADS) {
    ids[stream * steps + i] = i == step ? id : ids_before[stream * steps + i];
  }
  for (int i = thread_of_group; i < width; i += THREADS) {
    const float value = float(table[int64_t(id) * width + i]);
    rows[int64_t(stream) * width + i] = T(HAS_POSITIONS ? value + float(positions[next * width + i]) : value);
  }
