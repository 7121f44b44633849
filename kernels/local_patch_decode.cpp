// local_patch_decode: embed, layers, head and draw, step by step on plain memory. The cache lives for one call.
#include "local_patch_decode.hpp"

#include "common.hpp"

namespace marlin {

std::pair<mx::array, std::optional<mx::array>> local_patch_decode(
    const Stack& stack, const mx::array& table, const Product& head, const mx::array& lead, const mx::array& additions,
    const mx::array& given, const std::vector<int>& known, int places, const std::vector<mx::array>& noise,
    const std::vector<Drawing>& drawings, bool with_logits, PartSeconds* seconds) {
  const Stopwatch whole(seconds, &PartSeconds::whole);
  Stopwatch waiting(seconds, &PartSeconds::inputs);
  std::vector<mx::array> inputs;
  for (const auto& each : {table, lead, additions, given}) inputs.push_back(contiguous_input(each));
  for (const auto& each : noise) inputs.push_back(contiguous_input(each));
  mx::eval(inputs);
  waiting.stop();
  const int64_t streams = lead.shape(0), dim = stack.dim(), vocab = head.columns(), width = given.shape(1), tokens = additions.shape(1);
  const auto of_stream = [&](const auto& several, int64_t b) -> const auto& { return several.size() == 1 ? several[0] : several.at(b); };
  const float *embeddings = inputs[0].data<float>(), *added = inputs[2].data<float>();
  const int32_t* fed = inputs[3].data<int32_t>();
  std::vector<const float*> random;
  for (size_t n = 4; n < inputs.size(); n++) random.push_back(inputs[n].data<float>());
  StackCache cache = stack.cache(streams, places);
  std::vector<float> rows(inputs[1].data<float>(), inputs[1].data<float>() + streams * dim), logits(streams * vocab);
  std::vector<float> told(with_logits ? streams * places * vocab : 0);
  std::vector<int32_t> ids(streams), found(streams * places);
  const auto feed = [&](int64_t b, int64_t place, int32_t id, float* to) {
    const float *from = embeddings + id * dim, *addition = added + ((additions.shape(0) == 1 ? 0 : b) * tokens + place) * dim;
    for (int64_t k = 0; k < dim; k++) to[k] = from[k] + addition[k];
  };
  const int64_t all_know = *std::min_element(known.begin(), known.end());
  // What stands in every stream is read at once, where that makes no row another one.
  const int64_t together = exact_rows() ? std::min<int64_t>(all_know, places - 1) : 0;
  if (together) {
    std::vector<float> read(streams * (together + 1) * dim);
    for (int64_t b = 0; b < streams; b++) {
      float* own = &read[b * (together + 1) * dim];
      std::copy_n(&rows[b * dim], dim, own);
      for (int64_t place = 0; place < together; place++) feed(b, place, fed[b * width + place], own + (place + 1) * dim);
      std::copy_n(fed + b * width, together, &found[b * places]);
    }
    stack(read.data(), {{streams, together + 1, &cache}}, {}, seconds);
    for (int64_t b = 0; b < streams; b++) std::copy_n(&read[((b + 1) * (together + 1) - 1) * dim], dim, &rows[b * dim]);
  }
  for (int64_t place = together; place < places; place++) {
    if (place != together || !together) stack(rows.data(), {{streams, 1, &cache}}, {}, seconds);
    if (place >= all_know) {
      const Stopwatch heading(seconds, &PartSeconds::head);
      head(rows.data(), logits.data(), streams);
    }
    const Stopwatch choosing(seconds, &PartSeconds::drawing);
    for (int64_t b = 0; b < streams; b++) {
      float* own = logits.data() + b * vocab;
      if (with_logits && place >= all_know) std::copy_n(own, vocab, &told[(b * places + place) * vocab]);
      const bool drawn = place >= known.at(b);
      const int32_t id = drawn ? draw(own, vocab, of_stream(drawings, b), of_stream(random, b) + (place - known[b]) * vocab) : fed[b * width + place];
      found[b * places + place] = id;
      ids[b] = std::max(id, 0);
    }
    for (int64_t b = 0; b < streams && place < tokens; b++) feed(b, place, ids[b], &rows[b * dim]);
  }
  std::optional<mx::array> all_logits;
  if (with_logits) all_logits = mx::array(told.data(), {int(streams), places, int(vocab)}, mx::float32);
  return {mx::array(found.data(), {int(streams), places}, mx::int32), all_logits};
}

}  // namespace marlin
