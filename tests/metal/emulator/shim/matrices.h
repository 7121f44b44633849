// simdgroup_matrix: 8 x 8 numbers spread over the 32 lanes, two to a lane. The map of lanes is the one that MLX's kernels
// rely on (BaseMMAFrag::get_coord in steel/gemm/mma.h); products are summed in float.
#pragma once
#include "simdgroups.h"

namespace metal {

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  vec<T, 2> elements;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T value) : elements(value) {}
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

// A lane holds columns `matrix_column` and the next of row `matrix_row`.
METAL_FUNC int matrix_row(uint lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
METAL_FUNC int matrix_column(uint lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }
METAL_FUNC uint matrix_lane(int row, int column) {
  return ((row & 4) << 2) | ((column & 4) << 1) | ((row & 3) << 1) | ((column >> 1) & 1);
}

template <class T, int Columns = 8, int Rows = 8>
METAL_FUNC simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, Columns, Rows>(value);
}

template <class Pointer>
METAL_FUNC Pointer element_of_matrix(Pointer matrix, ulong elements_per_row, vec<ulong, 2> origin, bool transposed, int i) {
  const int row = matrix_row(this_lane()), column = matrix_column(this_lane()) + i;
  return matrix + (origin.y + (transposed ? column : row)) * elements_per_row + origin.x + (transposed ? row : column);
}

template <class T, class Pointer>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, Pointer source, ulong elements_per_row = 8,
                               vec<ulong, 2> origin = vec<ulong, 2>(0ul), bool transposed = false) {
  static_assert(is_same_v<T, remove_cv_t<remove_reference_t<decltype(T(*source))>>>, "simdgroup_load: types differ");
  emulator::require_all_lanes(exchange(char(0)));
  for (int i = 0; i < 2; i++)
    matrix.elements.data[i] = *element_of_matrix(source, elements_per_row, origin, transposed, i);
}

template <class T, class Pointer>
METAL_FUNC void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, Pointer target, ulong elements_per_row = 8,
                                vec<ulong, 2> origin = vec<ulong, 2>(0ul), bool transposed = false) {
  emulator::require_all_lanes(exchange(char(0)));
  for (int i = 0; i < 2; i++)
    *element_of_matrix(target, elements_per_row, origin, transposed, i) = matrix.elements.data[i];
}

// result = left * right + addend
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& result, const simdgroup_matrix<A, 8, 8>& left,
                                              const simdgroup_matrix<B, 8, 8>& right,
                                              const simdgroup_matrix<C, 8, 8>& addend) {
  struct Operands {
    vec<A, 2> left;
    vec<B, 2> right;
  };
  const emulator::Exchange& exchanged = exchange(Operands{left.elements, right.elements});
  emulator::require_all_lanes(exchanged);
  const int row = matrix_row(this_lane()), column = matrix_column(this_lane());
  float sums[2] = {(float)addend.elements.data[0], (float)addend.elements.data[1]};
  for (int k = 0; k < 8; k++) {
    const float factor = exchanged.from<Operands>(matrix_lane(row, k)).left.data[k & 1];
    const vec<B, 2> pair = exchanged.from<Operands>(matrix_lane(k, column)).right;
    for (int i = 0; i < 2; i++) sums[i] = __builtin_fmaf(factor, (float)pair.data[i], sums[i]);
  }
  for (int i = 0; i < 2; i++) result.elements.data[i] = (D)sums[i];
}

template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& result, const simdgroup_matrix<A, 8, 8>& left,
                                   const simdgroup_matrix<B, 8, 8>& right) {
  simdgroup_multiply_accumulate(result, left, right, simdgroup_matrix<D, 8, 8>((D)0));
}

}  // namespace metal
