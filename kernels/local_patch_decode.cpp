// local_patch_decode: embed, layers, head and draw, step by step on plain memory. The cache lives for one call.
#include "local_patch_decode.hpp"

#include "common.hpp"

namespace marlin {

mx::array local_patch_decode(const Stack& stack, const mx::array& table, const Product& head, const mx::array& lead,
                             const mx::array& additions, const mx::array& given, const mx::array& noise, int steps,
                             const Drawing& drawing, PartSeconds* seconds) {
  const Stopwatch whole(seconds, &PartSeconds::whole);
  Stopwatch waiting(seconds, &PartSeconds::inputs);
  std::vector<mx::array> inputs;
  for (const auto& each : {table, lead, additions, given, noise}) inputs.push_back(contiguous_input(each));
  mx::eval(inputs);
  waiting.stop();
  const int64_t streams = lead.shape(0), dim = stack.dim(), vocab = head.columns(), known = given.shape(1), tokens = additions.shape(1);
  const float *embeddings = inputs[0].data<float>(), *added = inputs[2].data<float>(), *random = inputs[4].data<float>();
  const int32_t* fed = inputs[3].data<int32_t>();
  StackCache cache = stack.cache(streams, known + steps);
  std::vector<float> rows(inputs[1].data<float>(), inputs[1].data<float>() + streams * dim), logits(streams * vocab);
  std::vector<int32_t> ids(streams), drawn(streams * steps);
  for (int64_t token = 0; token < known + steps; token++) {
    stack(rows.data(), streams, 1, &cache, nullptr, nullptr, seconds);
    if (token < known) {
      for (int64_t b = 0; b < streams; b++) ids[b] = fed[b * known + token];
    } else {
      Stopwatch heading(seconds, &PartSeconds::head);
      head(rows.data(), logits.data(), streams);
      heading.stop();
      const Stopwatch choosing(seconds, &PartSeconds::drawing);
      for (int64_t b = 0; b < streams; b++) {
        ids[b] = draw(logits.data() + b * vocab, vocab, drawing, random + (token - known) * vocab);
        drawn[b * steps + token - known] = ids[b];
      }
    }
    for (int64_t b = 0; b < streams && token < tokens; b++) {
      const float *from = embeddings + ids[b] * dim, *addition = added + ((additions.shape(0) == 1 ? 0 : b) * tokens + token) * dim;
      for (int64_t k = 0; k < dim; k++) rows[b * dim + k] = from[k] + addition[k];
    }
  }
  return mx::array(drawn.data(), {int(streams), steps}, mx::int32);
}

}  // namespace marlin
