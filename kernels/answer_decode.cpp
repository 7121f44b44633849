// answer_decode: embed, layers and head on plain memory.
#include "answer_decode.hpp"

#include "common.hpp"

namespace marlin {

mx::array answer_decode(const Stack& stack, const mx::array& table, const Product& head, const std::vector<int>& ids, StackCache& cache,
                        const StackMemory* memory) {
  const auto embeddings = in_memory(table);
  const int64_t answers = ids.size(), dim = stack.dim();
  std::vector<float> rows(answers * dim), logits(answers * head.columns());
  for (int64_t b = 0; b < answers; b++) std::copy_n(embeddings.data<float>() + ids[b] * dim, dim, &rows[b * dim]);
  stack(rows.data(), answers, 1, &cache, memory);
  head(rows.data(), logits.data(), answers);
  return mx::array(logits.data(), {int(answers), int(head.columns())}, mx::float32);
}

}  // namespace marlin
