// Where arrays stand in the device's memory, for kernels that read more of them than they have parameters.
//
// inputs   array_0 .. array_31, of any type
// output   addresses[32] int64
// grid     32

  const void* all[] = {
      array_0,  array_1,  array_2,  array_3,  array_4,  array_5,  array_6,  array_7,  array_8,  array_9,  array_10,
      array_11, array_12, array_13, array_14, array_15, array_16, array_17, array_18, array_19, array_20, array_21,
      array_22, array_23, array_24, array_25, array_26, array_27, array_28, array_29, array_30, array_31};
  if (threadIdx.x == 0) {
    for (int i = 0; i < 32; i++) addresses[i] = int64_t(all[i]);
  }
