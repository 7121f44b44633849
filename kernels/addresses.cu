// Where arrays stand in the device's memory, for kernels that read more of them than they have parameters. One thread. The host
// finds them in memory of its own, whose address comes in two halves; `done` is what MLX waits for.

extern "C" __global__ void addresses(
    const void* array_0, const void* array_1, const void* array_2, const void* array_3, const void* array_4, const void*
    array_5, const void* array_6, const void* array_7, const void* array_8, const void* array_9, const void* array_10, const
    void* array_11, const void* array_12, const void* array_13, const void* array_14, const void* array_15, const void*
    array_16, const void* array_17, const void* array_18, const void* array_19, const void* array_20, const void* array_21,
    const void* array_22, const void* array_23, const void* array_24, const void* array_25, const void* array_26, const
    void* array_27, const void* array_28, const void* array_29, const void* array_30, const void* array_31,
    int32_t* done, int low, int high) {
  const void* all[] = {
      array_0, array_1, array_2, array_3, array_4, array_5, array_6, array_7, array_8, array_9, array_10, array_11,
      array_12, array_13, array_14, array_15, array_16, array_17, array_18, array_19, array_20, array_21, array_22,
      array_23, array_24, array_25, array_26, array_27, array_28, array_29, array_30, array_31};
  int64_t* to = reinterpret_cast<int64_t*>(int64_t(high) << 32 | uint32_t(low));
  for (int i = 0; i < 32; i++) to[i] = int64_t(all[i]);
  *done = 1;
}
