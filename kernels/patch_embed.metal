// Rows of a table by id, side by side: the embeddings of the bytes of a patch.
//
// inputs   ids[count] of any integer type; table[vocab, width] T
// output   out[count, width] T
// template VALUES that a thread copies; width is a multiple of it
// grid     (width / VALUES, count) threads

  const int width = table_shape[1], first = thread_position_in_grid.x * VALUES;
  const int64_t to = int64_t(thread_position_in_grid.y) * width + first;
  const int64_t from = int64_t(ids[thread_position_in_grid.y]) * width + first;
  for (int value = 0; value < VALUES; value++) out[to + value] = table[from + value];
