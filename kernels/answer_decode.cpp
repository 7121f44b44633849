// answer_decode: embed, layers and head on plain memory.
#include "answer_decode.hpp"

#include "common.hpp"

namespace marlin {

mx::array answer_decode(const Stack& stack, const mx::array& table, const Product& head, const std::vector<int>& ids,
                        const std::vector<int>& rows, const std::vector<StackCache*>& caches, const std::vector<const StackMemory*>& memories, bool every) {
  const auto embeddings = in_memory(table);
  const std::vector<Sequences> all = sequences_of(rows, caches, memories);
  const int64_t count = ids.size(), dim = stack.dim();
  std::vector<float> hidden(count * dim);
  for (int64_t m = 0; m < count; m++) std::copy_n(embeddings.data<float>() + ids[m] * dim, dim, &hidden[m * dim]);
  int64_t total = 0, texts = 0;
  for (const Sequences& each : all) total += each.batch * each.rows, texts += each.batch;
  if (total != count) throw std::invalid_argument("the rows of the caches are not those of the ids");
  stack(hidden.data(), all);
  if (every) {
    std::vector<float> logits(count * head.columns());
    head(hidden.data(), logits.data(), count);
    return mx::array(logits.data(), {int(count), int(head.columns())}, mx::float32);
  }
  // The last row of each text moves up to where the head reads it.
  int64_t from = 0, to = 0;
  for (const Sequences& each : all)
    for (int64_t b = 0; b < each.batch; b++, to++) {
      from += each.rows;
      std::copy_n(&hidden[(from - 1) * dim], dim, &hidden[to * dim]);
    }
  std::vector<float> logits(texts * head.columns());
  head(hidden.data(), logits.data(), texts);
  return mx::array(logits.data(), {int(texts), int(head.columns())}, mx::float32);
}

}  // namespace marlin
