// Calls the CPU kernels on plain memory, for a machine on which MLX itself does not run: an ARM one that QEMU emulates.
//
// stdin: calls, one after another. Each is a line "operation integers: n i1 .. in buffers: m bytes1 .. bytesm" without the
// words, then the buffers. stdout: a line that says how the kernels were built, then of each call its floats.
// A new operation is a function in `operations`. With DRIVER_ALL the kernels are linked to it, else it has marlin_gemm alone.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "common.hpp"
#include "linear.hpp"
#include "marlin_gemm.hpp"
#ifdef DRIVER_ALL
#include "flash_attention.hpp"
#else
#include "marlin_gemm.cpp"  // with this, so that MLX's headers are read once
#endif

namespace {

struct Call {
  std::vector<int64_t> integers;
  std::vector<std::vector<char>> buffers;

  template <class T>
  const T* buffer(size_t index) const {
    return index < buffers.size() && !buffers[index].empty() ? reinterpret_cast<const T*>(buffers[index].data()) : nullptr;
  }
};

[[noreturn]] void refuse(const char* what) {
  std::fprintf(stderr, "arm_driver: %s\n", what);
  std::exit(2);
}

int64_t read_integer() {
  long long value;
  if (std::scanf("%lld", &value) != 1) refuse("malformed call");
  return value;
}

// Integers: kind, columns, depth, group_size. Buffers: weight, codes (or scales, biases).
marlin::Matrix matrix(const Call& call, marlin::Kind kind) {
  const int64_t columns = call.integers[1], depth = call.integers[2];
  const bool bytes = kind == marlin::Kind::mxfp8 || kind == marlin::Kind::int8;
  const bool affine = kind == marlin::Kind::int4 || kind == marlin::Kind::int8;
  return {call.buffer<uint8_t>(0), affine ? nullptr : call.buffer<uint8_t>(1), affine ? call.buffer<float>(1) : nullptr,
          affine ? call.buffer<float>(2) : nullptr, columns, depth, bytes ? depth : depth / 2, call.integers[3]};
}

std::vector<float> unpack(const Call& call) {
  const auto kind = marlin::Kind(call.integers[0]);
  const marlin::Matrix w = matrix(call, kind);
  std::vector<float> out(w.columns * w.depth);
  marlin::unpack(kind, w, 0, w.columns, out.data());
  return out;
}

// Two integers more: rows of x, and the bits that they are rounded to or 32; one buffer more: x.
std::vector<float> multiply_packed(const Call& call) {
  const auto kind = marlin::Kind(call.integers[0]);
  const marlin::Matrix w = matrix(call, kind);
  const int64_t rows = call.integers[4];
  std::vector<float> out(rows * w.columns);
  const marlin::Target target{w, out.data()};
  marlin::multiply_packed(kind, {&target, 1}, call.buffer<float>(call.buffers.size() - 1), rows, call.integers[5]);
  return out;
}

#ifdef DRIVER_ALL
// Integers: rows, columns, depth. Buffers: x, weight.
std::vector<float> multiply_dense(const Call& call) {
  std::vector<float> out(call.integers[0] * call.integers[1]);
  marlin::multiply_dense(call.buffer<float>(0), call.buffer<float>(1), out.data(), call.integers[0], call.integers[1], call.integers[2]);
  return out;
}

// Integers: heads, kv_heads, head_dim, rows, total, bits. Buffers: queries, keys (and their codes), values (and their codes).
std::vector<float> attend(const Call& call) {
  const int64_t heads = call.integers[0], kv_heads = call.integers[1], head_dim = call.integers[2], rows = call.integers[3];
  const int64_t total = call.integers[4], bits = call.integers[5];
  std::vector<float> out(heads * rows * head_dim);
  marlin::AttentionTask task{1, heads, kv_heads, head_dim, rows, total - rows, total, 1.0f};
  task.queries = call.buffer<float>(0);
  task.out = out.data();
  task.query_row = task.out_row = head_dim;
  task.query_head = task.out_head = rows * head_dim;
  task.query_batch = task.out_batch = heads * rows * head_dim;
  const auto page = [&](size_t first) -> std::vector<marlin::PageView> {
    if (bits == 32) return {{call.buffer<float>(first), nullptr, nullptr, marlin::Kind::nvfp4, kv_heads * total * head_dim, total * head_dim, head_dim, total}};
    const auto kind = bits == 8 ? marlin::Kind::mxfp8 : marlin::Kind::nvfp4;
    return {{nullptr, call.buffer<uint8_t>(first), call.buffer<uint8_t>(first + 1), kind, kv_heads * total, total, 1, total}};
  };
  marlin::attend(task, page(1), page(bits == 32 ? 2 : 3));
  return out;
}
#endif

const std::map<std::string, std::vector<float> (*)(const Call&)> operations = {
    {"unpack", unpack},
    {"multiply_packed", multiply_packed},
#ifdef DRIVER_ALL
    {"multiply_dense", multiply_dense},
    {"attend", attend},
#endif
};

}  // namespace

// What linear.cpp has of OpenBLAS: row-major products, b as it is (111) or transposed (112).
extern "C" void scipy_openblas_set_num_threads(int) {}
extern "C" void scipy_cblas_sgemm(int, int, int transpose, int rows, int columns, int depth, float, const float* a, int a_stride,
                                  const float* b, int b_stride, float keep, float* out, int out_stride) {
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t n = 0; n < columns; n++) {
      float total = keep == 0.0f ? 0.0f : keep * out[m * out_stride + n];
      for (int64_t k = 0; k < depth; k++) total += a[m * a_stride + k] * (transpose == 112 ? b[n * b_stride + k] : b[k * b_stride + n]);
      out[m * out_stride + n] = total;
    }
  }
}

#ifndef DRIVER_ALL
namespace marlin {
int threads() { return 1; }
bool exact_rows() { return false; }
void product(Strided a, Strided b, float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth) {
  scipy_cblas_sgemm(101, 111, 112, rows, columns, depth, 1.0f, a.data, a.stride, b.data, b.stride, 0.0f, out, out_stride);
}
}  // namespace marlin
#endif

int main() {
#if MARLIN_NEON
  std::printf("neon\n");
#else
  std::printf("portable\n");
#endif
  char name[64];
  while (std::scanf("%63s", name) == 1) {
    const auto operation = operations.find(name);
    if (operation == operations.end()) refuse("no such operation");
    Call call;
    call.integers.resize(read_integer());
    for (auto& value : call.integers) value = read_integer();
    call.buffers.resize(read_integer());
    for (auto& buffer : call.buffers) buffer.resize(read_integer());
    std::getchar();  // the newline before the bytes
    for (auto& buffer : call.buffers)
      if (std::fread(buffer.data(), 1, buffer.size(), stdin) != buffer.size()) refuse("a buffer is short");
    const std::vector<float> out = operation->second(call);
    std::fwrite(out.data(), sizeof(float), out.size(), stdout);
  }
}
