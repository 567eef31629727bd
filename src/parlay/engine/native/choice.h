// What of a distribution may be chosen. A line gets the same result whatever is beside it.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>

#include "simd.h"

namespace parlay {

// The place of the first of the largest numbers, or of the first NaN, which counts as larger than all.
template <class T>
inline int64_t argmax(const T* x, int64_t size) {
  vfloat top = broadcast(-std::numeric_limits<float>::infinity());
  vint odd = top != top;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const vfloat next = load(x + i);
    top = larger(next, top);
    odd |= next != next;
  }
  float peak = largest(top);
  bool has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) has_nan |= odd[lane] != 0;
  for (; i < size; ++i) {
    const float next = static_cast<float>(x[i]);
    has_nan |= next != next;
    peak = std::max(peak, next);
  }
  const auto found = std::find_if(x, x + size, [&](T each) {
    const float value = static_cast<float>(each);
    return has_nan ? value != value : value == peak;
  });
  return found - x;
}

constexpr int kBands = 8;
constexpr float kReach[kBands] = {0.5f, 1, 2, 4, 8, 16, 32, std::numeric_limits<float>::infinity()};  // below the peak

// above[band] = the sum of exp(x - peak) over the numbers within kReach[band] of the peak that are not below `floor`.
// Runs short enough for float32 are added up in float64.
inline void masses(const float* x, int64_t size, float floor, float peak, double* above) {
  std::fill_n(above, kBands, 0.0);
  float from[kBands];
  for (int band = 0; band < kBands; ++band) from[band] = std::max(floor, peak - kReach[band]);
  int64_t i = 0;
  while (i + kLanes <= size) {
    vfloat mass[kBands] = {};
    for (const int64_t stop = std::min(size, i + 64 * kLanes); i + kLanes <= stop; i += kLanes) {
      const vfloat next = load(x + i), e = exponential(next - peak);
#pragma GCC unroll 8
      for (int band = 0; band < kBands; ++band) mass[band] += next >= from[band] ? e : vfloat{};
    }
    for (int band = 0; band < kBands; ++band) above[band] += sum(mass[band]);
  }
  for (; i < size; ++i)
    for (int band = 0; band < kBands; ++band)
      if (x[i] >= from[band]) above[band] += std::exp(x[i] - peak);
}

inline double weight(const float* begin, const float* end, float peak) {
  double total = 0;
  for (; begin != end; ++begin) total += std::exp(*begin - peak);
  return total;
}

// The smallest of the largest numbers that together weigh `need`; of all of them where that is less. Halves what is in
// question until little is left to sort.
inline float last_to_reach(float* begin, float* end, double need, float peak) {
  while (end - begin > 64) {
    float* middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, std::greater<>());
    const double upper = weight(begin, middle, peak);
    if (upper >= need) {
      end = middle;
    } else {
      need -= upper;
      begin = middle;
    }
  }
  std::sort(begin, end, std::greater<>());
  for (; begin + 1 < end; ++begin)
    if ((need -= std::exp(*begin - peak)) <= 0) break;
  return *begin;
}

inline bool any(vint mask) {
  typedef int64_t vlong __attribute__((vector_size(kBytes)));
  const vlong pairs = (vlong)mask;
  int64_t all = 0;
  for (int pair = 0; pair < kLanes / 2; ++pair) all |= pairs[pair];
  return all != 0;
}

// Copies the numbers from `low` up and below `high`.
inline void gather(const float* x, int64_t size, float low, float high, std::vector<float>& found) {
  found.clear();
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const vfloat next = load(x + i);
    if (any((next >= low) & (next < high)))
      std::copy_if(x + i, x + i + kLanes, std::back_inserter(found), [&](float each) { return each >= low && each < high; });
  }
  std::copy_if(x + i, x + size, std::back_inserter(found), [&](float each) { return each >= low && each < high; });
}

struct Limits {
  int64_t top_k;  // 0: all
  double top_p;   // 1: all
  double min_p;   // 0: all
};

// The smallest of the `count` largest numbers of a line.
inline float top_k(const float* x, int64_t size, int64_t count, float peak, std::vector<float>& found) {
  const float all = std::numeric_limits<float>::infinity();
  for (const float reach : kReach) {
    gather(x, size, peak - reach, all, found);
    if (static_cast<int64_t>(found.size()) < count) continue;
    std::nth_element(found.begin(), found.begin() + (count - 1), found.end(), std::greater<>());
    return found[count - 1];
  }
  return -all;
}

// The smallest of the fewest numbers of a line, `floor` and above, that hold a share of their mass.
inline float top_p(const float* x, int64_t size, double share, float floor, float peak, std::vector<float>& found) {
  double above[kBands];
  masses(x, size, floor, peak, above);
  const double need = share * above[kBands - 1];
  const auto band = std::find_if(above, above + kBands - 1, [&](double mass) { return mass >= need; }) - above;
  const float high = band == 0 ? std::numeric_limits<float>::infinity() : peak - kReach[band - 1];
  gather(x, size, std::max(floor, peak - kReach[band]), high, found);
  if (found.empty()) return std::max(floor, high);
  return last_to_reach(found.data(), found.data() + found.size(), need - (band == 0 ? 0 : above[band - 1]), peak);
}

// The smallest number of a line that may be chosen: of the top_k largest, then of the fewest of those that hold the
// share top_p of their mass, and with a share min_p of the largest one's mass.
inline float lowest_kept(const float* x, int64_t size, const Limits& limits, std::vector<float>& scratch) {
  const float nothing = -std::numeric_limits<float>::infinity();
  const float peak = x[argmax(x, size)];
  if (!std::isfinite(peak)) return nothing;  // the model has overflowed: nothing sensible can be left out
  float floor = nothing;
  if (limits.top_k > 0 && limits.top_k < size) floor = top_k(x, size, limits.top_k, peak, scratch);
  if (limits.top_p < 1) floor = top_p(x, size, limits.top_p, floor, peak, scratch);
  if (limits.min_p > 0) floor = std::max(floor, peak + static_cast<float>(std::log(limits.min_p)));
  return floor;
}

// Divides a line by the temperature and makes -infinity of what may not be chosen.
inline void truncate(const float* logits, int64_t size, float temperature, const Limits& limits, std::vector<float>& scratch, float* out) {
  const float nothing = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < size; ++i) out[i] = logits[i] / temperature;
  const float floor = lowest_kept(out, size, limits, scratch);
  if (floor > nothing)
    for (int64_t i = 0; i < size; ++i) out[i] = out[i] < floor ? nothing : out[i];
}

constexpr int64_t kBlock = 64 * kLanes;  // numbers that float32 may add up

inline double mass_of(const float* x, int64_t size) {
  vfloat mass = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) mass += load(x + i);
  double total = sum(mass);
  for (; i < size; ++i) total += x[i];
  return total;
}

// Where a share of a line's mass, which is not negative, ends: of no number without mass, unless there is none at all
// or the model has overflowed. Blocks first, then the numbers of one.
inline int64_t draw(const float* x, int64_t size, double share, std::vector<double>& ends) {
  ends.clear();
  double total = 0;
  for (int64_t first = 0; first < size; first += kBlock)
    ends.push_back(total += mass_of(x + first, std::min(kBlock, size - first)));
  const double at = std::min(share * total, std::nextafter(total, 0.0));  // the product may round up
  const int64_t block = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
  double end = block > 0 ? ends[std::min<int64_t>(block, ends.size()) - 1] : 0;
  int64_t found = size - 1;
  for (int64_t i = block * kBlock; i < std::min(size, (block + 1) * kBlock); ++i) {
    if (!(x[i] > 0)) continue;
    found = i;
    if ((end += x[i]) > at) break;
  }
  return found;
}

}  // namespace parlay
