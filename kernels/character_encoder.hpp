// What an encoder of characters (CANINE) has around its stacks of layers: hashed embeddings, the convolution down to molecules,
// and the one back. Neither convolution writes its windows out.
#pragma once
#include <optional>
#include <vector>

#include "stack.hpp"

namespace marlin {

// A row of each table side by side, plus the type's and the position's, normed.
class CharacterEmbedding {
 public:
  // tables [buckets, columns] each with its prime, types [types, dim], positions [most, dim].
  CharacterEmbedding(const std::vector<mlx::core::array>& tables, const std::vector<int>& primes, const mlx::core::array& types,
                     const mlx::core::array& positions, Norm norm);
  // ids and types [sequences, total] -> [sequences, total, dim]; all types 0 if null.
  void operator()(const int32_t* ids, const int32_t* types, float* out, int64_t sequences, int64_t total) const;
  int64_t dim() const { return dim_; }
  int64_t positions() const { return most_; }

 private:
  std::vector<mlx::core::array> held_;
  std::vector<const float*> tables_;
  std::vector<int64_t> primes_;
  const float *types_, *positions_;
  int64_t buckets_, columns_, dim_, most_;
  Norm norm_;
};

// A product over the rows of each molecule, which stand side by side in memory already.
class CharacterDown {
 public:
  // leads: the first character takes the place of the last molecule, before all others.
  CharacterDown(Product product, Norm norm, int64_t factor, Activation activation, bool leads);
  // characters [sequences, total, dim] -> [sequences, total / factor, dim]
  void operator()(const float* characters, float* molecules, int64_t sequences, int64_t total) const;
  int64_t factor() const { return factor_; }

 private:
  Product product_;
  Norm norm_;
  int64_t factor_;
  Activation activation_;
  bool leads_;
};

// A convolution over characters and the molecules that they belong to. The window's positions are columns of two products, one
// over characters and one over molecules, so that no row goes through a product twice; they are summed up afterwards.
class CharacterUp {
 public:
  // characters and molecules: products of rows [.., dim] to [.., width * dim], a position of the window after the other.
  CharacterUp(Product characters, Product molecules, const std::optional<mlx::core::array>& bias, Norm norm, int64_t factor, int64_t width,
              Activation activation, bool leads);
  // characters [sequences, total, dim], molecules [sequences, count, dim] -> [sequences, total, dim]
  void operator()(const float* characters, const float* molecules, float* out, int64_t sequences, int64_t total, int64_t count) const;

 private:
  // Rows first .. last of a sequence.
  void rows(const float* characters, const float* molecules, float* out, int64_t first, int64_t last, int64_t total, int64_t count) const;
  // Which molecule stands beside a character.
  int64_t molecule_of(int64_t position, int64_t count) const;

  Product characters_, molecules_;
  std::vector<mlx::core::array> held_;
  const float* bias_;
  Norm norm_;
  int64_t factor_, width_, dim_;
  Activation activation_;
  bool leads_;
};

// For the bindings; std::invalid_argument for more positions than there are, or fewer than a molecule has.
// ids and types [n, total] int32 -> [n, total, dim].
mlx::core::array embed_characters(const CharacterEmbedding& embedding, const mlx::core::array& ids, const std::optional<mlx::core::array>& types);
// characters [n, total, dim] -> molecules [n, total / factor, dim]
mlx::core::array down_characters(const CharacterDown& down, const mlx::core::array& characters);
// characters [n, total, dim], molecules [n, count, dim] -> [n, total, dim]
mlx::core::array up_characters(const CharacterUp& up, const mlx::core::array& characters, const mlx::core::array& molecules);

}  // namespace marlin
