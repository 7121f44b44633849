// answer_decode: embed, layers and head on plain memory.
#include "answer_decode.hpp"

#include "common.hpp"

namespace marlin {

mx::array answer_decode(const Stack& stack, const mx::array& table, const Product& head, const mx::array& ids, StackCache& cache,
                        const StackMemory& memory) {
  std::vector<mx::array> inputs{mx::contiguous(table, false, mx::Device::cpu), mx::contiguous(ids, false, mx::Device::cpu)};
  mx::eval(inputs);
  const int64_t answers = ids.shape(0), dim = stack.dim();
  std::vector<float> rows(answers * dim), logits(answers * head.columns());
  for (int64_t b = 0; b < answers; b++) std::copy_n(inputs[0].data<float>() + inputs[1].data<int32_t>()[b] * dim, dim, &rows[b * dim]);
  stack(rows.data(), answers, 1, &cache, &memory);
  head(rows.data(), logits.data(), answers);
  return mx::array(logits.data(), {int(answers), int(head.columns())}, mx::float32);
}

}  // namespace marlin
