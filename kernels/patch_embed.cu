// Rows of a table by id, side by side: the embeddings of the bytes of a patch.
//
// inputs   ids[count] of any integer type; table[vocab, width] T
// output   out[count, width] T
// template T; VALUES that a thread copies, in one load where they are 16 bytes (the width is then a multiple of VALUES)
// grid     one thread for each VALUES values of the output

  const int width = table_shape[1], per_row = width / VALUES;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(ids_shape[0]) * per_row) return;
  const int64_t from = int64_t(ids[i / per_row]) * width + i % per_row * VALUES;
  if constexpr (VALUES * sizeof(T) == 16) {
    if (marlin::aligned_to_16_bytes(table)) {
      reinterpret_cast<uint4*>(out)[i] = *reinterpret_cast<const uint4*>(table + from);
      return;
    }
  }
#pragma unroll
  for (int value = 0; value < VALUES; value++) out[i * VALUES + value] = table[from + value];
