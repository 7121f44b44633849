// Python bindings of the CPU kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "answer_decode.hpp"
#include "character_encoder.hpp"
#include "common.hpp"
#include "linear.hpp"
#include "local_patch_decode.hpp"
#include "logits.hpp"
#include "probes.hpp"
#include "sequence_costs.hpp"
#include "sliced_encoding.hpp"
#include "ways.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using marlin::mx::array;

namespace {

using Page = std::tuple<array, std::optional<array>, int>;

std::vector<marlin::PageArrays> pages(const std::vector<Page>& from) {
  std::vector<marlin::PageArrays> all;
  for (const auto& [data, scales, bits] : from) all.push_back({data, scales, bits});
  return all;
}

}  // namespace

NB_MODULE(marlin_cpu, m) {
  m.def("set_threads", &marlin::set_threads, "count"_a);
  m.def("set_exact_rows", &marlin::set_exact_rows, "exact"_a);
  m.def("exact_rows", &marlin::exact_rows);

  nb::enum_<marlin::Kind>(m, "Kind")
      .value("nvfp4", marlin::Kind::nvfp4)
      .value("mxfp4", marlin::Kind::mxfp4)
      .value("mxfp8", marlin::Kind::mxfp8)
      .value("int4", marlin::Kind::int4)
      .value("int8", marlin::Kind::int8);
  m.def("linear", &marlin::linear, "x"_a, "weight"_a);
  m.def("marlin_gemm", &marlin::marlin_gemm, "x"_a, "weight"_a, "scales"_a, "biases"_a.none(), "kind"_a, "group_size"_a,
        "activation_bits"_a = 16);
  m.def("processor_class", &marlin::processor_class);
  m.def("way_names", &marlin::way_names, "kind"_a, "activation_bits"_a);
  m.def("chosen_way", &marlin::chosen_way, "kind"_a, "columns"_a, "depth"_a, "group_size"_a, "rows"_a, "activation_bits"_a);
  m.def("set_ways", &marlin::set_ways, "kind"_a, "activation_bits"_a, "large"_a, "choices"_a);
  m.attr("most_small_weights") = marlin::MOST_SMALL_WEIGHTS;
  m.def("takes_tiles", &marlin::takes_tiles, "kind"_a, "rows"_a, "activation_bits"_a);
  m.def(
      "flash_attention",
      [](const array& queries, const std::vector<Page>& keys, const std::vector<Page>& values, float scale, bool causal,
         int window, const std::optional<array>& left_padding, const std::optional<array>& lengths,
         const std::optional<array>& relative_bias) {
        return marlin::flash_attention(queries, pages(keys), pages(values), scale, causal, window, left_padding, lengths, relative_bias);
      },
      "queries"_a, "keys"_a, "values"_a, "scale"_a, "causal"_a, "window"_a, "left_padding"_a.none(), "lengths"_a.none(),
      "relative_bias"_a.none());

  nb::class_<marlin::Product>(m, "Product")
      .def(nb::init<const array&, const std::optional<array>&, const std::optional<array>&, std::optional<marlin::Kind>, int,
                    const std::optional<array>&, float, int>(),
           "weight"_a, "scales"_a.none(), "biases"_a.none(), "kind"_a.none(), "group_size"_a, "bias"_a.none(), "factor"_a,
           "activation_bits"_a = 16);
  m.def("products_of", &marlin::products_of, "products"_a, "x"_a);
  nb::enum_<marlin::NormKind>(m, "NormKind")
      .value("rmsnorm", marlin::NormKind::rmsnorm)
      .value("layernorm", marlin::NormKind::layernorm)
      .value("variance", marlin::NormKind::variance);
  nb::class_<marlin::Norm>(m, "Norm")
      .def(nb::init<marlin::NormKind, const array&, const std::optional<array>&, float>(), "kind"_a, "weight"_a, "bias"_a.none(), "eps"_a);
  nb::enum_<marlin::Activation>(m, "Activation")
      .value("swiglu", marlin::Activation::swiglu)
      .value("gelu", marlin::Activation::gelu)
      .value("gelu_tanh", marlin::Activation::gelu_tanh)
      .value("relu", marlin::Activation::relu)
      .value("silu", marlin::Activation::silu);
  m.def("activation", &marlin::activation, "x"_a, "kind"_a);
  nb::class_<marlin::CrossAttention>(m, "CrossAttention")
      .def(nb::init<marlin::Norm, marlin::Product, marlin::Product, marlin::Product, marlin::Product>(), "norm"_a, "q_proj"_a,
           "k_proj"_a, "v_proj"_a, "o_proj"_a);
  nb::class_<marlin::Adapter>(m, "Adapter")
      .def(nb::init<marlin::Product, marlin::Product>(), "down_proj"_a, "up_proj"_a);
  nb::class_<marlin::Layer>(m, "Layer")
      .def(nb::init<marlin::Norm, marlin::Product, marlin::Product, marlin::Product, marlin::Product, std::optional<marlin::Norm>,
                    std::optional<marlin::Norm>, marlin::Norm, std::optional<marlin::Product>, marlin::Product, marlin::Product,
                    std::optional<marlin::CrossAttention>, std::optional<marlin::Adapter>>(),
           "attention_norm"_a, "q_proj"_a, "k_proj"_a, "v_proj"_a, "o_proj"_a, "q_norm"_a.none(), "k_norm"_a.none(),
           "ffn_norm"_a, "gate_proj"_a.none(), "up_proj"_a, "down_proj"_a, "cross"_a.none() = nb::none(),
           "adapter"_a.none() = nb::none());
  nb::class_<marlin::StackShape>(m, "StackShape")
      .def(nb::init<int64_t, int64_t, int64_t, float, int64_t, float, bool, bool, marlin::Activation, bool, bool, int64_t>(), "heads"_a, "kv_heads"_a,
           "head_dim"_a, "scale"_a, "window"_a, "rope_theta"_a, "rope_interleaved"_a, "token_shift"_a, "activation"_a,
           "causal"_a = true, "norms_follow"_a = false, "block"_a = -1);
  nb::class_<marlin::PageCounts>(m, "PageCounts").def(nb::init<int64_t>(), "layers"_a).def("so_far", &marlin::PageCounts::so_far);
  nb::class_<marlin::StackCache>(m, "StackCache")
      .def("__init__", [](marlin::StackCache* self, int64_t layers, int64_t batch, int64_t kv_heads, int64_t head_dim, int key_bits, int value_bits,
                          int64_t rows_per_page, std::vector<int> left_padding, int64_t window, int64_t sinks, float share_left,
                          std::shared_ptr<marlin::PageCounts> counts) {
             new (self) marlin::StackCache(layers, batch, kv_heads, head_dim, key_bits, value_bits, rows_per_page, std::move(left_padding),
                                           {window, sinks, share_left, std::move(counts)});
           }, "layers"_a, "batch"_a, "kv_heads"_a, "head_dim"_a, "key_bits"_a, "value_bits"_a, "rows_per_page"_a, "left_padding"_a,
           "window"_a = -1, "sinks"_a = 0, "share_left"_a = -1.0f, "counts"_a.none() = nb::none())
      .def_prop_ro("rows", &marlin::StackCache::rows)
      .def_prop_ro("dropped", &marlin::StackCache::dropped)
      .def_prop_ro("bytes_in_use", &marlin::StackCache::bytes_in_use)
      .def_prop_ro("bytes_allocated", &marlin::StackCache::bytes_allocated)
      .def("keep", &marlin::StackCache::keep, "streams"_a)
      .def("copy", [](const marlin::StackCache& cache) { return marlin::StackCache(cache); })
      .def("cut", &marlin::StackCache::cut, "rows"_a, "delayed"_a = std::vector<array>{})
      .def("may_go_back", &marlin::StackCache::may_go_back)
      .def("stored", &marlin::StackCache::stored, nb::call_guard<nb::gil_scoped_release>())
      .def("restore", &marlin::StackCache::restore, "layers"_a, "rows"_a, "dropped"_a = 0, nb::call_guard<nb::gil_scoped_release>())
      .def("places", &marlin::StackCache::places)
      .def("delayed", &marlin::StackCache::delayed);
  nb::class_<marlin::PartSeconds>(m, "PartSeconds")
      .def(nb::init<>())
      .def_ro("whole", &marlin::PartSeconds::whole)
      .def_ro("inputs", &marlin::PartSeconds::inputs)
      .def_ro("attention", &marlin::PartSeconds::attention)
      .def_ro("head", &marlin::PartSeconds::head)
      .def_ro("drawing", &marlin::PartSeconds::drawing);
  nb::class_<marlin::Stack>(m, "Stack")
      .def(nb::init<std::vector<marlin::Layer>, std::optional<marlin::Norm>, const marlin::StackShape&, const std::optional<array>&>(),
           "layers"_a, "norm"_a.none(), "shape"_a, "relative_bias"_a.none() = nb::none())
      .def("__call__", &marlin::Stack::forward, "x"_a, "cache"_a.none(), "lengths"_a = std::vector<int>{},
           "seconds"_a.none() = nb::none(), nb::call_guard<nb::gil_scoped_release>())
      .def("ragged", &marlin::Stack::ragged, "x"_a, "rows"_a, "caches"_a = std::vector<marlin::StackCache*>{},
           "memories"_a = std::vector<const marlin::StackMemory*>{}, "first_layer"_a = 0, "end_layer"_a = -1,
           "seconds"_a.none() = nb::none(), nb::call_guard<nb::gil_scoped_release>())
      .def("remember", &marlin::Stack::remember, "states"_a, "lengths"_a, "bits"_a, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<marlin::StackMemory>(m, "StackMemory")
      .def_prop_ro("bytes_in_use", &marlin::StackMemory::bytes_in_use)
      .def("keep", &marlin::StackMemory::keep, "sequences"_a);
  nb::class_<marlin::SlicedEncoding>(m, "SlicedEncoding")
      .def(nb::init<const marlin::Stack&, const marlin::Stack&, const array&, const std::vector<int>&, const std::vector<int>&>(), "encoder"_a,
           "decoder"_a, "x"_a, "sizes"_a, "bits"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("advance", &marlin::SlicedEncoding::advance, "rows"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("keep", &marlin::SlicedEncoding::keep, "inputs"_a)
      .def("memories", &marlin::SlicedEncoding::memories);

  nb::class_<marlin::CharacterEmbedding>(m, "CharacterEmbedding")
      .def(nb::init<const std::vector<array>&, const std::vector<int>&, const array&, const array&, marlin::Norm>(), "tables"_a, "primes"_a,
           "types"_a, "positions"_a, "norm"_a);
  nb::class_<marlin::CharacterDown>(m, "CharacterDown")
      .def(nb::init<marlin::Product, marlin::Norm, int64_t, marlin::Activation, bool>(), "product"_a, "norm"_a, "factor"_a, "activation"_a,
           "leads"_a);
  nb::class_<marlin::CharacterUp>(m, "CharacterUp")
      .def(nb::init<marlin::Product, marlin::Product, const std::optional<array>&, marlin::Norm, int64_t, int64_t, marlin::Activation, bool>(),
           "characters"_a, "molecules"_a, "bias"_a.none(), "norm"_a, "factor"_a, "width"_a, "activation"_a, "leads"_a);
  m.def("embed_characters", &marlin::embed_characters, "embedding"_a, "ids"_a, "types"_a.none(), nb::call_guard<nb::gil_scoped_release>());
  m.def("down_characters", &marlin::down_characters, "down"_a, "characters"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("up_characters", &marlin::up_characters, "up"_a, "characters"_a, "molecules"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<marlin::Drawing>(m, "Drawing")
      .def("__init__", [](marlin::Drawing* self, float temperature, int top_k, float top_p, float min_p) {
             new (self) marlin::Drawing{temperature, top_k, top_p, min_p};
           }, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a);
  nb::class_<marlin::ProductProbe>(m, "ProductProbe")
      .def(nb::init<std::vector<marlin::Product>>(), "products"_a)
      .def("seconds", &marlin::ProductProbe::seconds, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<marlin::AttentionProbe>(m, "AttentionProbe")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int>(), "layers"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
           "rows"_a, "window"_a, "key_bits"_a, "value_bits"_a)
      .def("seconds", &marlin::AttentionProbe::seconds, nb::call_guard<nb::gil_scoped_release>());
  m.def("draw_ids", &marlin::draw_ids, "logits"_a, "forbidden"_a, "drawings"_a, "noise"_a.none());
  m.def("answer_decode", &marlin::answer_decode, "stack"_a, "table"_a, "head"_a, "ids"_a, "rows"_a, "caches"_a,
        "memories"_a = std::vector<const marlin::StackMemory*>{}, "every"_a = false, nb::call_guard<nb::gil_scoped_release>());
  m.def("sequence_costs", &marlin::sequence_costs, "stack"_a, "table"_a, "head"_a, "lead"_a, "additions"_a, "given"_a, "expected"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("local_patch_decode", &marlin::local_patch_decode, "stack"_a, "table"_a, "head"_a, "lead"_a, "additions"_a, "given"_a,
        "known"_a, "places"_a, "noise"_a, "drawings"_a, "with_logits"_a = false, "seconds"_a.none() = nb::none(), nb::call_guard<nb::gil_scoped_release>());
}
