// Embeddings and convolutions of an encoder of characters, on plain memory. Many sequences are spread over threads; one is
// taken by all threads together.
#include "character_encoder.hpp"

#include <stdexcept>

#include "common.hpp"

namespace marlin {

namespace {

constexpr int64_t ROWS_OF_A_CONVOLUTION = 512;  // of a convolution back: what lies between its products and its sums stays small

// body(number) for each of `count` parts, which threads share where there are enough.
template <class Body>
void over_parts(int64_t count, const Body& body) {
  if (count >= threads() && !in_parallel()) {
#pragma omp parallel for num_threads(threads()) schedule(dynamic, 1)
    for (int64_t number = 0; number < count; number++) body(number);
  } else {
    for (int64_t number = 0; number < count; number++) body(number);
  }
}

// Without threads: of one row.
void add_row(float* to, const float* from, int64_t count) {
  for (int64_t k = 0; k < count; k += LANES) {
    const int64_t left = count - k;
    store_some(load_some(to + k, left) + load_some(from + k, left), to + k, left);
  }
}

mx::array result(const std::vector<float>& values, int64_t sequences, int64_t rows, int64_t dim) {
  return mx::array(values.data(), {int(sequences), int(rows), int(dim)}, mx::float32);
}

}  // namespace

CharacterEmbedding::CharacterEmbedding(const std::vector<mx::array>& tables, const std::vector<int>& primes, const mx::array& types,
                                       const mx::array& positions, Norm norm)
    : primes_(primes.begin(), primes.end()), buckets_(tables.at(0).shape(0)), columns_(tables[0].shape(1)),
      dim_(int64_t(tables.size()) * columns_), most_(positions.shape(0)), norm_(std::move(norm)) {
  held_.reserve(tables.size() + 2);
  const auto hold = [this](const mx::array& each) { return held_.emplace_back(in_memory(each)).data<float>(); };
  for (const auto& table : tables) tables_.push_back(hold(table));
  types_ = hold(types), positions_ = hold(positions);
}

void CharacterEmbedding::operator()(const int32_t* ids, const int32_t* types, float* out, int64_t sequences, int64_t total) const {
  constexpr int64_t WORK_OF_A_VALUE = 8;
  over_threads(sequences * total, dim_ * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
      float* row = out + m * dim_;
      for (size_t n = 0; n < tables_.size(); n++)
        std::copy_n(tables_[n] + (int64_t(ids[m]) + 1) * primes_[n] % buckets_ * columns_, columns_, row + int64_t(n) * columns_);
      add_row(row, types_ + (types ? types[m] * dim_ : 0), dim_);
      add_row(row, positions_ + m % total * dim_, dim_);
      norm_.row(row, row);
    }
  });
}

CharacterDown::CharacterDown(Product product, Norm norm, int64_t factor, Activation activation, bool leads)
    : product_(std::move(product)), norm_(std::move(norm)), factor_(factor), activation_(activation), leads_(leads) {}

void CharacterDown::operator()(const float* characters, float* molecules, int64_t sequences, int64_t total) const {
  const int64_t dim = product_.columns(), count = total / factor_, convolved = count - leads_;
  over_parts(sequences, [&](int64_t s) {
    const float* from = characters + s * total * dim;
    float* to = molecules + s * count * dim;
    if (leads_) std::copy_n(from, dim, to);
    if (convolved > 0) {
      product_(from, to + leads_ * dim, convolved);
      activate(activation_, to + leads_ * dim, nullptr, to + leads_ * dim, convolved * dim);
    }
    norm_(to, to, count);
  });
}

CharacterUp::CharacterUp(Product characters, Product molecules, const std::optional<mx::array>& bias, Norm norm, int64_t factor, int64_t width,
                         Activation activation, bool leads)
    : characters_(std::move(characters)), molecules_(std::move(molecules)), bias_(nullptr), norm_(std::move(norm)), factor_(factor),
      width_(width), dim_(characters_.depth()), activation_(activation), leads_(leads) {
  if (bias) bias_ = held_.emplace_back(in_memory(*bias)).data<float>();
}

int64_t CharacterUp::molecule_of(int64_t position, int64_t count) const { return std::min(position / factor_ + leads_, count - 1); }

void CharacterUp::operator()(const float* characters, const float* molecules, float* out, int64_t sequences, int64_t total, int64_t count) const {
  const int64_t parts = (total + ROWS_OF_A_CONVOLUTION - 1) / ROWS_OF_A_CONVOLUTION;
  over_parts(sequences * parts, [&](int64_t number) {
    const int64_t s = number / parts, part = number % parts;
    rows(characters + s * total * dim_, molecules + s * count * dim_, out + s * total * dim_, total * part / parts, total * (part + 1) / parts,
         total, count);
  });
}

void CharacterUp::rows(const float* characters, const float* molecules, float* out, int64_t first, int64_t last, int64_t total,
                       int64_t count) const {
  // Characters low .. high - 1 stand in the windows of these rows; the others of a window are zeros.
  const int64_t before = (width_ - 1) / 2, low = std::max<int64_t>(0, first - before), high = std::min(total, last + width_ - 1 - before);
  const int64_t first_molecule = molecule_of(low, count), some_molecules = molecule_of(high - 1, count) + 1 - first_molecule;
  const int64_t wide = width_ * dim_;
  thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < (high - low + some_molecules) * wide) memory.resize((high - low + some_molecules) * wide);
  float *of_characters = memory.data(), *of_molecules = of_characters + (high - low) * wide;
  characters_(characters + low * dim_, of_characters, high - low);
  molecules_(molecules + first_molecule * dim_, of_molecules, some_molecules);
  over_threads(last - first, 4 * wide, [&](int64_t start, int64_t end) {
    for (int64_t t = first + start; t < first + end; t++) {
      float* row = out + t * dim_;
      if (bias_) {
        std::copy_n(bias_, dim_, row);
      } else {
        std::fill_n(row, dim_, 0.0f);
      }
      for (int64_t n = 0; n < width_; n++) {
        const int64_t position = t - before + n;
        if (position < 0 || position >= total) continue;
        add_row(row, of_characters + (position - low) * wide + n * dim_, dim_);
        add_row(row, of_molecules + (molecule_of(position, count) - first_molecule) * wide + n * dim_, dim_);
      }
      activate(activation_, row, nullptr, row, dim_);
      norm_.row(row, row);
    }
  });
}

mx::array embed_characters(const CharacterEmbedding& embedding, const mx::array& ids, const std::optional<mx::array>& types) {
  const auto input = in_memory(ids);
  std::optional<mx::array> kinds;
  if (types) kinds = in_memory(*types);
  const int64_t sequences = ids.shape(0), total = ids.shape(1);
  if (total > embedding.positions()) throw std::invalid_argument("more positions than have an embedding");
  std::vector<float> rows(sequences * total * embedding.dim());
  embedding(input.data<int32_t>(), kinds ? kinds->data<int32_t>() : nullptr, rows.data(), sequences, total);
  return result(rows, sequences, total, embedding.dim());
}

mx::array down_characters(const CharacterDown& down, const mx::array& characters) {
  const auto input = in_memory(characters);
  const int64_t sequences = characters.shape(0), total = characters.shape(1), dim = characters.shape(2);
  if (total < down.factor()) throw std::invalid_argument("fewer characters than a molecule has");
  std::vector<float> rows(sequences * (total / down.factor()) * dim);
  down(input.data<float>(), rows.data(), sequences, total);
  return result(rows, sequences, total / down.factor(), dim);
}

mx::array up_characters(const CharacterUp& up, const mx::array& characters, const mx::array& molecules) {
  const auto input = in_memory(characters), others = in_memory(molecules);
  const int64_t sequences = characters.shape(0), total = characters.shape(1), dim = characters.shape(2);
  std::vector<float> rows(sequences * total * dim);
  up(input.data<float>(), others.data<float>(), rows.data(), sequences, total, molecules.shape(1));
  return result(rows, sequences, total, dim);
}

}  // namespace marlin
