// Runs one kernel several times on the same inputs. stdin: the launch, then the buffers' bytes. stdout: of each run a line of
// what happened, then the outputs' bytes.
//
// The launch, as whitespace-separated integers:  grid x y z  threadgroup x y z
//   number of buffers, then of each:  bytes  is_output  offset      number of runs, then of each:  order poison seed fill
// (fill: the byte that outputs hold before the run, or -1 for what stdin gave) and a newline.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "scheduler.h"

namespace {

struct Buffer {
  size_t bytes;
  bool is_output;
  size_t offset;  // from an address aligned to 16 bytes, as a slice of an array may begin
  std::vector<char> initial;
};

struct Run {
  int order, poison, seed, fill;
};

long long read_integer() {
  long long value;
  if (scanf("%lld", &value) != 1) {
    fprintf(stderr, "emulator: malformed launch\n");
    exit(2);
  }
  return value;
}

emulator::Index3 read_index3() {
  emulator::Index3 value;
  value.x = read_integer();
  value.y = read_integer();
  value.z = read_integer();
  return value;
}

void run_once(const Run& run, const std::vector<Buffer>& buffers, emulator::Index3 grid, emulator::Index3 threadgroup) {
  std::vector<void*> allocations, memory;
  // Each buffer is an allocation that ends with its last byte, so that the sanitizer sees the first byte beyond.
  for (const Buffer& buffer : buffers) {
    void* allocation;
    if (posix_memalign(&allocation, 16, buffer.offset + buffer.bytes) != 0) {
      fprintf(stderr, "emulator: no memory for a buffer\n");
      exit(2);
    }
    allocations.push_back(allocation);
    char* start = static_cast<char*>(allocation) + buffer.offset;
    if (buffer.is_output && run.fill >= 0)
      memset(start, run.fill, buffer.bytes);
    else
      std::copy(buffer.initial.begin(), buffer.initial.end(), start);  // memcpy refuses the nothing of an empty buffer
    memory.push_back(start);
  }
  const emulator::Outcome outcome =
      emulator::dispatch(memory.data(), grid, threadgroup, static_cast<emulator::Order>(run.order),
                         static_cast<emulator::Poison>(run.poison), run.seed);
  int written_input = -1;
  for (size_t i = 0; i < buffers.size(); i++)
    if (!buffers[i].is_output && !std::equal(buffers[i].initial.begin(), buffers[i].initial.end(), static_cast<char*>(memory[i])))
      written_input = i;
  printf("%u %d %llu %llu %llu %zu %s\n", outcome.events, written_input, (unsigned long long)outcome.threads,
         (unsigned long long)outcome.collectives, (unsigned long long)outcome.barriers, outcome.threadgroup_bytes,
         outcome.error.c_str());
  for (size_t i = 0; i < buffers.size(); i++) {
    if (buffers[i].is_output) fwrite(memory[i], 1, buffers[i].bytes, stdout);
    free(allocations[i]);
  }
}

}  // namespace

int main() {
  const emulator::Index3 grid = read_index3(), threadgroup = read_index3();
  std::vector<Buffer> buffers(read_integer());
  for (Buffer& buffer : buffers) {
    buffer.bytes = read_integer();
    buffer.is_output = read_integer();
    buffer.offset = read_integer();
    buffer.initial.resize(buffer.bytes);
  }
  std::vector<Run> runs(read_integer());
  for (Run& run : runs) {
    run.order = read_integer();
    run.poison = read_integer();
    run.seed = read_integer();
    run.fill = read_integer();
  }
  getchar();  // the newline before the bytes
  for (Buffer& buffer : buffers)
    if (fread(buffer.initial.data(), 1, buffer.bytes, stdin) != buffer.bytes) return 2;
  for (const Run& run : runs) run_once(run, buffers, grid, threadgroup);
}
