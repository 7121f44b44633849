// The packed product, for the bindings: formats, and where the parts of a packed matrix lie.
#pragma once
#include <cstdint>
#include <optional>
#include <span>


namespace mlx::core {
class array;
}

namespace marlin {

enum class Kind { nvfp4, mxfp4, mxfp8, int4, int8 };

// One row of a packed matrix: weights and, by format, scale codes or float scales and biases.
struct Packed {
  const uint8_t* weight;
  const uint8_t* codes;
  const float* scales;
  const float* biases;
  int64_t group_size;
};

// A packed matrix [columns, depth], as MLX packs it.
struct Matrix {
  const uint8_t* weight;
  const uint8_t* codes;
  const float* scales;
  const float* biases;
  int64_t columns, depth, row_bytes, group_size;

  int64_t groups() const { return depth / group_size; }

  Packed row(int64_t n) const { return row(n, groups()); }
  // For loops over short rows, where a division for each would show.
  Packed row(int64_t n, int64_t groups) const {
    return {weight + n * row_bytes, codes ? codes + n * groups : nullptr, scales ? scales + n * groups : nullptr,
            biases ? biases + n * groups : nullptr, group_size};
  }

  // How far ahead of its place a loop over `together` rows at a time should prefetch: whole turns, a page at least. A
  // processor's own prefetching loses each of these streams where its row ends. Ask once, for it divides.
  int64_t bytes_ahead(int64_t together) const {
    const int64_t turn = together * row_bytes;
    return (4095 / turn + 1) * turn;
  }
};

// The matrix that arrays hold: weight uint32 [N, words], scales uint8, or float32 with biases for int4 and int8.
Matrix matrix_of(const mlx::core::array& weight, const mlx::core::array& scales, const mlx::core::array* biases, Kind kind,
                 int group_size);

// One of several products with the same x: out[rows, columns] = factor * x[rows, depth] @ W[columns, depth]^T + bias.
struct Target {
  Matrix w;
  float* out;
  float factor = 1.0f;
  const float* bias = nullptr;
};
using Targets = std::span<const Target>;

// All targets, whose matrices have one kind, depth and group size. With 8 activation bits x is rounded first, where the format's
// weights are whole numbers (all but mxfp8).
void multiply_packed(Kind kind, Targets targets, const float* x, int64_t rows, int activation_bits);

// Whether a product of so many rows runs in tiles of bfloat16. Then 8 activation bits are a bfloat16's, not blocks of whole numbers.
bool takes_tiles(Kind kind, int64_t rows, int activation_bits);

// Rows first .. last of W as floats, one after another.
void unpack(Kind kind, const Matrix& w, int64_t first, int64_t last, float* to);

// x [.., K] float32 @ packed W [N, K]^T -> [.., N] float32; scales uint8 codes, or float32 with biases for int4, int8.
mlx::core::array marlin_gemm(const mlx::core::array& x, const mlx::core::array& weight, const mlx::core::array& scales,
                             const std::optional<mlx::core::array>& biases, Kind kind, int group_size,
                             int activation_bits);

}  // namespace marlin
