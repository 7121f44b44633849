// Inputs on their way through an encoder, and into what a decoder reads of them, in slices of bounded work: others are served between.
#pragma once
#include "stack.hpp"

namespace marlin {

// Inputs stand one after another as rows, without filler: products take the rows of all, attention goes input by input. Work goes
// from phase to phase, through all rows of each: keys, values and queries of an encoder layer; the rest of that layer, which reads
// them; and in the end the keys and values of each decoder layer. So a slice may end at any row of any phase.
class SlicedEncoding {
 public:
  // x [rows, dim]: what the encoder reads of the inputs. `sizes`: the rows of each; `bits`: of what the decoder reads of each, 32,
  // 8 or 4. Both stacks have to outlive this.
  SlicedEncoding(const Stack& encoder, const Stack& decoder, const mlx::core::array& x, const std::vector<int>& sizes, const std::vector<int>& bits);

  // Goes on by about the work of reading `rows` rows, a few at least. Whether all is read.
  bool advance(int64_t rows);
  // Goes on with these inputs.
  void keep(const std::vector<int>& inputs);
  // What the decoder reads of each input, once all is read. Given away.
  std::vector<StackMemory> memories() { return std::move(memories_); }

 private:
  struct Span {
    int64_t input, first, end;  // rows
  };
  int64_t phases() const { return 2 * encoder_.layers_.size() + decoder_.layers_.size(); }
  // Multiplications of a row in a phase but for attention.
  double products_of(int64_t phase) const;
  void run(int64_t phase, int64_t first, int64_t count);
  void project(const Layer& layer, int64_t first, int64_t count);
  void finish(const Layer& layer, int64_t first, int64_t count);
  void remember(int64_t layer, int64_t first, int64_t count);
  // The parts of inputs in rows first .. first + count.
  std::vector<Span> spans(int64_t first, int64_t count) const;

  const Stack &encoder_, &decoder_;
  std::vector<int> sizes_;
  std::vector<StackMemory> memories_;
  std::vector<float> x_, queries_, keys_, values_;               // of all rows
  std::vector<float> normed_, added_, attended_, up_, gate_;  // of the rows of a product
  int64_t rows_ = 0, phase_ = 0, row_ = 0;                       // row_: of the phase, the first that is not done
  double row_work_ = 0;
};

}  // namespace marlin
