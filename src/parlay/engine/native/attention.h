// Attention over pages and trees, in float32 with an online softmax.
//
// Every query has its own list of keys in the order of positions: known tokens through its row's page table, then its
// ancestors among the guesses, itself last. The list is walked in chunks of kChunk positions, so what a query gets does
// not depend on what else is in the step, nor on whether it was guessed: a chunk's sums have one shape and order, and
// keys that it may not see add exact zeros.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>

#include "simd.h"

namespace parlay {

constexpr int64_t kChunk = 64;  // positions
constexpr int64_t kLines = 48;  // queries times heads that meet a chunk together

// T: of the tensors; all of them contiguous.
template <class T>
struct Attention {
  const T* query;             // [tokens, heads, key_size]
  const T* pool;              // [slots, kv_heads, key_size + value_size]
  const int64_t* pages;       // [rows, max_pages]
  const int64_t* row;         // [tokens]
  const int64_t* known;       // [tokens]: so many known tokens come first
  const int64_t* ancestors;   // [tokens, max_ancestors]: slots, then -1
  T* out;                     // [tokens, heads, value_size]
  int64_t tokens, heads, kv_heads, key_size, value_size, page_size, max_pages, max_ancestors;
  float scale, softcap;       // softcap 0: none
  int64_t window;             // 0: none

  int64_t guessed(int64_t token) const {  // how many of a query's keys come after the known ones
    int64_t count = 0;
    while (count < max_ancestors && ancestors[token * max_ancestors + count] >= 0) ++count;
    return count;
  }

  int64_t slot(int64_t token, int64_t position) const {
    if (position >= known[token]) return ancestors[token * max_ancestors + position - known[token]];
    return pages[row[token] * max_pages + position / page_size] * page_size + position % page_size;
  }
};

inline int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// scores[m, 0..4) = q[m] . keys[0..4) for M lines.
template <int M, class T>
inline void dots(const float* q, int64_t size, const T* const* keys, float* scores) {
  vfloat sum[M][4];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = sum[m][2] = sum[m][3] = vfloat{};
  for (int64_t d = 0; d < size; d += kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vfloat key = load(keys[j] + d);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][j] += load(q + m * size + d) * key;
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const quad four = sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
    std::memcpy(scores + m * kChunk, &four, sizeof four);
  }
}

// total[m] += sum over keys of weights[m, key] * values[key] for M lines, two vectors wide.
template <int M, class T>
inline void mix(const float* weights, const T* const* values, int64_t count, int64_t offset, float* total, int64_t size) {
  vfloat low[M], high[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    low[m] = load(total + m * size);
    high[m] = load(total + m * size + kLanes);
  }
  for (int64_t key = 0; key < count; ++key) {
    const vfloat a = load(values[key] + offset), b = load(values[key] + offset + kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float weight = weights[m * kChunk + key];
      low[m] += weight * a;
      high[m] += weight * b;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    store(total + m * size, low[m]);
    store(total + m * size + kLanes, high[m]);
  }
}

// The queries of a few tokens of one row that share a KV head, and what they have gathered so far.
template <class T>
class Lines {
 public:
  Lines(const Attention<T>& attention, int64_t most)
      : a(attention), folds(a.heads / a.kv_heads), key_size(padded(a.key_size, kLanes)),
        value_size(padded(a.value_size, 2 * kLanes)),
        direct(key_size == a.key_size && value_size == a.value_size),
        query(most * key_size), scores(most * kChunk), total(most * value_size), peak(most), mass(most),
        copied(direct ? 0 : kChunk * (key_size + value_size), T(0)) {}

  void run(int64_t first, int64_t last, int64_t head) {
    begin(first, last, head);
    int64_t start = std::numeric_limits<int64_t>::max(), stop = 0;
    for (int64_t token = first; token < last; ++token) {
      start = std::min(start, oldest(token));
      stop = std::max(stop, shared(token));
    }
    for (int64_t chunk = start / kChunk * kChunk; chunk < stop; chunk += kChunk) {
      gather(last - 1, head, chunk, std::min(stop, chunk + kChunk));  // which knows the most
      attend(first, first, last, chunk, false);
    }
    for (int64_t token = first; token < last; ++token)  // the rest of a guess's list is its own
      for (int64_t chunk = std::max(shared(token), oldest(token) / kChunk * kChunk); chunk < end(token); chunk += kChunk) {
        gather(token, head, chunk, std::min(end(token), chunk + kChunk));
        attend(first, token, token + 1, chunk, true);
      }
    finish(first, last, head);
  }

 private:
  const Attention<T>& a;
  int64_t folds, key_size, value_size;
  bool direct;  // the pool's own memory can be read
  std::vector<float> query, scores, total, peak, mass;
  std::vector<T> copied;  // padded with zeros
  const T* keys[kChunk + 3];
  const T* values[kChunk];
  int64_t count = 0;  // of keys

  int64_t end(int64_t token) const { return a.known[token] + a.guessed(token); }
  int64_t oldest(int64_t token) const { return a.window > 0 ? std::max<int64_t>(0, end(token) - a.window) : 0; }
  int64_t shared(int64_t token) const {  // positions whose keys all queries of the row have in common
    return a.guessed(token) > 0 ? a.known[token] / kChunk * kChunk : a.known[token];
  }

  void begin(int64_t first, int64_t last, int64_t head) {
    const int64_t lines = (last - first) * folds;
    std::fill_n(query.begin(), lines * key_size, 0.0f);
    std::fill_n(total.begin(), lines * value_size, 0.0f);
    std::fill_n(peak.begin(), lines, -std::numeric_limits<float>::infinity());
    std::fill_n(mass.begin(), lines, 0.0f);
    for (int64_t line = 0; line < lines; ++line) {
      const T* from = a.query + ((first + line / folds) * a.heads + head * folds + line % folds) * a.key_size;
      for (int64_t d = 0; d < a.key_size; ++d) query[line * key_size + d] = static_cast<float>(from[d]) * a.scale;
    }
  }

  // Points at the keys and values of positions [from, to) of a token's list.
  void gather(int64_t token, int64_t head, int64_t from, int64_t to) {
    count = to - from;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = a.slot(token, from + i);
      const T* both = a.pool + (slot * a.kv_heads + head) * (a.key_size + a.value_size);
      keys[i] = both;
      values[i] = both + a.key_size;
      if (direct) {
        constexpr int64_t line = 64 / sizeof(T);  // of the cache
        for (int64_t d = 0; d < a.key_size + a.value_size; d += line) __builtin_prefetch(both + d);
      } else {
        T* to = copied.data() + i * (key_size + value_size);
        std::copy_n(keys[i], a.key_size, to);
        std::copy_n(values[i], a.value_size, to + key_size);
        keys[i] = to;
        values[i] = to + key_size;
      }
    }
    for (int64_t i = count; i < padded(count, 4); ++i) keys[i] = keys[count - 1];
  }

  // The lines of tokens [from, to) look at the gathered keys, which begin at position `chunk`.
  void attend(int64_t first, int64_t from, int64_t to, int64_t chunk, bool own) {
    const int64_t begin = (from - first) * folds, lines = (to - from) * folds;
    float* s = scores.data() + begin * kChunk;
    for (int64_t key = 0; key < count; key += 4) {
      int64_t line = 0;
      for (; line + 3 <= lines; line += 3)
        dots<3>(&query[(begin + line) * key_size], key_size, keys + key, s + line * kChunk + key);
      for (; line < lines; ++line)
        dots<1>(&query[(begin + line) * key_size], key_size, keys + key, s + line * kChunk + key);
    }
    bool any = false;
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t token = from + line / folds, to_see = own ? end(token) : shared(token);
      const int64_t low = std::clamp<int64_t>(oldest(token) - chunk, 0, kChunk);
      const int64_t high = std::clamp<int64_t>(to_see - chunk, 0, count);
      any |= soften(begin + line, low, high);
    }
    if (!any) return;
    for (int64_t d = 0; d < value_size; d += 2 * kLanes) {
      int64_t line = 0;
      float* to_add = &total[begin * value_size + d];
      for (; line + 6 <= lines; line += 6) mix<6>(s + line * kChunk, values, count, d, to_add + line * value_size, value_size);
      for (; line + 3 <= lines; line += 3) mix<3>(s + line * kChunk, values, count, d, to_add + line * value_size, value_size);
      for (; line < lines; ++line) mix<1>(s + line * kChunk, values, count, d, to_add + line * value_size, value_size);
    }
  }

  // Turns a line's scores into weights, 0 outside [low, high), and rescales what it has; whether it sees anything.
  bool soften(int64_t line, int64_t low, int64_t high) {
    float* s = &scores[line * kChunk];
    if (low >= high) {
      std::fill_n(s, kChunk, 0.0f);
      return false;
    }
    if (a.softcap > 0)
      for (int64_t i = low; i < high; ++i) s[i] = std::tanh(s[i] / a.softcap) * a.softcap;
    std::fill(s, s + low, -std::numeric_limits<float>::infinity());
    std::fill(s + high, s + kChunk, -std::numeric_limits<float>::infinity());
    vfloat top = load(s);
    for (int64_t i = kLanes; i < kChunk; i += kLanes) top = larger(top, load(s + i));
    const float higher = std::max(peak[line], largest(top));
    vfloat weight = vfloat{};
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      const vfloat e = exponential(load(s + i) - higher);
      store(s + i, e);
      weight += e;
    }
    const float shrink = std::exp(peak[line] - higher);
    mass[line] = mass[line] * shrink + sum(weight);
    if (shrink != 1.0f)
      for (int64_t d = 0; d < value_size; ++d) total[line * value_size + d] *= shrink;
    peak[line] = higher;
    return true;
  }

  void finish(int64_t first, int64_t last, int64_t head) {
    for (int64_t line = 0; line < (last - first) * folds; ++line) {
      T* to = a.out + ((first + line / folds) * a.heads + head * folds + line % folds) * a.value_size;
      for (int64_t d = 0; d < a.value_size; ++d) to[d] = static_cast<T>(total[line * value_size + d] / mass[line]);
    }
  }
};

template <class T>
void attend(const Attention<T>& a) {
  const int64_t folds = a.heads / a.kv_heads, most = std::max<int64_t>(1, kLines / folds);
  std::vector<std::pair<int64_t, int64_t>> blocks;  // of tokens of one row
  for (int64_t first = 0, last; first < a.tokens; first = last) {
    for (last = first + 1; last < a.tokens && last < first + most && a.row[last] == a.row[first];) ++last;
    blocks.emplace_back(first, last);
  }
  const int64_t tasks = static_cast<int64_t>(blocks.size()) * a.kv_heads;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t begin, int64_t end) {
    Lines<T> lines(a, most * folds);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next++) < tasks;) {
        const auto& block = blocks[blocks.size() - 1 - task / a.kv_heads];
        lines.run(block.first, block.second, task % a.kv_heads);
      }
  });
}

// Stores keys and values in their slots, finite: a masked infinity would still spoil a sum, since 0 * inf is not 0.
template <class T>
void write(T* pool, const int64_t* slots, const T* key, const T* value, int64_t tokens, int64_t kv_heads, int64_t key_size,
           int64_t value_size) {
  const auto finite = [](T from) {
    const float most = static_cast<float>(std::numeric_limits<T>::max()), x = static_cast<float>(from);
    return x != x ? T(0) : x > most ? std::numeric_limits<T>::max() : x < -most ? std::numeric_limits<T>::lowest() : from;
  };
  for (int64_t line = 0; line < tokens * kv_heads; ++line) {
    T* to = pool + (slots[line / kv_heads] * kv_heads + line % kv_heads) * (key_size + value_size);
    std::transform(key + line * key_size, key + (line + 1) * key_size, to, finite);
    std::transform(value + line * value_size, value + (line + 1) * value_size, to + key_size, finite);
  }
}

}  // namespace parlay
