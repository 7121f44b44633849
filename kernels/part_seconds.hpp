// Where the time of a call goes, part by part: two looks at a clock, some 50 ns, around each part.
#pragma once
#include <chrono>

namespace marlin {

// Seconds, summed over the calls that were given it, by one thread. `whole` has all others in it.
struct PartSeconds {
  double whole = 0, inputs = 0;  // inputs: until what was to be computed before the call is there
  double attention = 0, head = 0, drawing = 0;
};

// Adds the seconds from its beginning to `stop`, or to its end, to one of the sums; to none if there are none.
class Stopwatch {
 public:
  Stopwatch(PartSeconds* sums, double PartSeconds::*part) : sum_(sums ? &(sums->*part) : nullptr) {
    if (sum_) start_ = std::chrono::steady_clock::now();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() { stop(); }
  void stop() {
    if (sum_) *sum_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    sum_ = nullptr;
  }

 private:
  double* sum_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace marlin
