// Python bindings of the CPU kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include "common.hpp"
#include "linear.hpp"
#include "marlin_gemm.hpp"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(marlin_cpu, m) {
  nb::enum_<marlin::Kind>(m, "Kind")
      .value("nvfp4", marlin::Kind::nvfp4)
      .value("mxfp4", marlin::Kind::mxfp4)
      .value("mxfp8", marlin::Kind::mxfp8)
      .value("int4", marlin::Kind::int4)
      .value("int8", marlin::Kind::int8);
  m.def("set_threads", &marlin::set_threads, "count"_a);
  m.def("linear", &marlin::linear, "x"_a, "weight"_a);
  m.def("marlin_gemm", &marlin::marlin_gemm, "x"_a, "weight"_a, "scales"_a, "biases"_a.none(), "kind"_a, "group_size"_a);
}
