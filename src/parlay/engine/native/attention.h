// Attention over pages and trees, in float32 with an online softmax.
//
// Every query has its own list of keys in the order of positions: known tokens through its row's page table, then its
// ancestors among the guesses, itself last. The list is walked in chunks of kChunk positions, so what a query gets does
// not depend on what else is in the step, nor on whether it was guessed: every score and every sum is a chain in the
// order of dimensions or positions, and keys that it may not see add exact zeros.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>

#include "scores.h"
#include "simd.h"

namespace parlay {

constexpr int64_t kLines = 48;  // queries times heads that meet a chunk together
constexpr int64_t kNearBytes = 128 << 10;  // bytes of keys and values that may be near at a time
constexpr int64_t kFar = 48;            // positions that are fetched ahead, into the second cache: the first is too small

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

  // Writes the slots of positions [from, to) of a query's list.
  void locate(int64_t token, int64_t from, int64_t to, int64_t* slots) const {
    const int64_t* page = pages + row[token] * max_pages + from / page_size;
    int64_t position = from, within = from % page_size;
    for (; position < std::min(to, known[token]); ++page, within = 0)
      for (; within < page_size && position < std::min(to, known[token]); ++within, ++position)
        *slots++ = *page * page_size + within;
    const int64_t* own = ancestors + token * max_ancestors - known[token];
    for (; position < to; ++position) *slots++ = own[position];
  }
};

inline int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// The queries of a few tokens of one row, for some of the KV heads, and what they have gathered so far.
template <class T>
class Lines {
 public:
  // `most`: tokens at a time. `heads`: KV heads at a time.
  Lines(const Attention<T>& attention, int64_t most, int64_t heads)
      : a(attention), folds(a.heads / a.kv_heads), both(a.key_size + a.value_size), key_size(padded(a.key_size, kLanes)),
        value_size(padded(a.value_size, 2 * kLanes)),
        direct(key_size == a.key_size && value_size == a.value_size), states(heads),
        scores(most * folds * kStride), panels(by_panels ? padded(most * folds, kLanes) / kLanes : 0), 
        copied(direct ? 0 : 2 * kChunk * (key_size + value_size), T(0)) {
    for (State& state : states) {
      state.query.resize(by_panels ? 0 : most * folds * key_size);
      state.panels.resize(panels * key_size * kLanes);
      state.total.resize(most * folds * value_size);
      state.peak.resize(most * folds);
      state.mass.resize(most * folds);
    }
  }

  // Tokens [first, last) with KV heads [low, high).
  void run(int64_t first, int64_t last, int64_t low, int64_t high) {
    this->first = first, this->last = last, this->low = low, this->high = high;
    for (int64_t head = low; head < high; ++head) begin(head);
    int64_t start = std::numeric_limits<int64_t>::max(), stop = 0;
    for (int64_t token = first; token < last; ++token) {
      start = std::min(start, oldest(token));
      stop = std::max(stop, a.known[token]);
    }
    walk(last - 1, start / kChunk * kChunk, stop, first, last);  // the last knows the most, and all guesses the same
    for (int64_t token = first; token < last; ++token)
      if (a.guessed(token) > 0)  // the rest of its list, from the chunk on in which nothing is known
        walk(token, std::max(padded(stop, kChunk), oldest(token) / kChunk * kChunk), end(token), token, token + 1);
    for (int64_t head = low; head < high; ++head) finish(head);
  }

 private:
  struct State {  // of one KV head
    std::vector<float> query, total, peak, mass;
    std::vector<T> panels;  // in place of `query`, and not scaled yet
  };

  struct Gathered {  // of a chunk
    const T* keys[kChunk + 7];
    const T* values[kChunk];
    int64_t count = 0;
  };

  static constexpr bool by_panels = kPanels && std::is_same_v<T, bfloat16>;

  const Attention<T>& a;
  int64_t folds, both, key_size, value_size;
  bool direct;  // the pool's own memory can be read
  std::vector<State> states;
  std::vector<float> scores;
  int64_t panels;
  std::vector<T> copied;  // padded with zeros
  int64_t first = 0, last = 0, low = 0, high = 0;
  std::vector<int64_t> slots;  // where the tokens walk
  int64_t own[kChunk];
  Gathered common, guesses;  // of all tokens that walk, and of one of them
  int64_t begun = 0, fetched = 0;  // slots before this chunk, and those that are here or on their way

  int64_t end(int64_t token) const { return a.known[token] + a.guessed(token); }
  int64_t oldest(int64_t token) const { return a.window > 0 ? std::max<int64_t>(0, end(token) - a.window) : 0; }
  int64_t ours(int64_t token, int64_t chunk, int64_t stop) const {  // its guesses in a chunk whose rest is known
    const bool some = a.guessed(token) > 0 && stop < chunk + kChunk && a.known[token] == stop;
    return some ? std::min(end(token), chunk + kChunk) - stop : 0;
  }

  void begin(int64_t head) {
    State& state = states[head - low];
    const int64_t lines = (last - first) * folds;
    std::fill(state.query.begin(), state.query.end(), 0.0f);
    std::fill(state.panels.begin(), state.panels.end(), T(0));
    std::fill_n(state.total.begin(), lines * value_size, 0.0f);
    std::fill_n(state.peak.begin(), lines, -std::numeric_limits<float>::infinity());
    std::fill_n(state.mass.begin(), lines, 0.0f);
    for (int64_t line = 0; line < lines; ++line) {
      const T* from = a.query + ((first + line / folds) * a.heads + head * folds + line % folds) * a.key_size;
      T* panel = state.panels.data() + line / kLanes * kLanes * key_size + line % kLanes * 2;
      for (int64_t d = 0; d < a.key_size; ++d)
        if constexpr (by_panels)
          panel[d / 2 * 2 * kLanes + d % 2] = from[d];
        else
          state.query[line * key_size + d] = static_cast<float>(from[d]) * a.scale;
    }
  }

  // Positions [start, stop) of one token's list are looked at by the lines of tokens [from, to).
  void walk(int64_t token, int64_t start, int64_t stop, int64_t from, int64_t to) {
    slots.resize(std::max<int64_t>(0, stop - start));
    a.locate(token, start, stop, slots.data());
    fetched = 0;
    for (int64_t chunk = start; chunk < stop; chunk += kChunk) {
      begun = chunk - start;
      for (int64_t head = low; head < high; ++head) {
        gather(head, slots.data() + begun, std::min(stop - chunk, kChunk), 0, common);
        attend(states[head - low], head, from, to, chunk, stop);
      }
    }
  }

  const T* at(int64_t slot, int64_t head) const { return a.pool + (slot * a.kv_heads + head) * both; }

  void prefetch(int64_t slot) const {
    constexpr int64_t line = 64 / sizeof(T);  // of the cache
    for (const T* from = at(slot, low); from < at(slot, high); from += line) __builtin_prefetch(from, 0, 2);
  }

  // Points at keys and values; what cannot be read in place is copied to places from `place` on.
  void gather(int64_t head, const int64_t* slots, int64_t count, int64_t place, Gathered& found) {
    found.count = count;
    for (int64_t i = 0; i < count; ++i) {
      found.keys[i] = at(slots[i], head);
      found.values[i] = found.keys[i] + a.key_size;
      if (direct) continue;
      T* to = copied.data() + (place + i) * (key_size + value_size);
      std::copy_n(found.keys[i], a.key_size, to);
      std::copy_n(found.values[i], a.value_size, to + key_size);
      found.keys[i] = to;
      found.values[i] = to + key_size;
    }
    for (int64_t i = count; i < padded(count, 8); ++i) found.keys[i] = found.keys[count - 1];
  }

  // The lines of tokens [from, to) look at the gathered keys, which begin at position `chunk`; where these end at `stop`
  // within the chunk, every guess looks at its own keys behind them.
  void attend(State& state, int64_t head, int64_t from, int64_t to, int64_t chunk, int64_t stop) {
    const int64_t begin = (from - first) * folds, lines = (to - from) * folds;
    float* s = scores.data();
    score(state, begin, lines, common, s, [&](int64_t key) { fetch(head, key); });
    bool any = false;
    for (int64_t token = from; token < to; ++token) {
      const int64_t line = (token - from) * folds, more = ours(token, chunk, stop);
      if (more > 0) {
        gather_guesses(token, head, stop, more);
        score(state, begin + line, folds, guesses, s + line * kStride + common.count, [](int64_t) {});
      }
      const int64_t lowest = std::clamp<int64_t>(oldest(token) - chunk, 0, kChunk);
      const int64_t highest = std::clamp<int64_t>(end(token) - chunk, 0, common.count + more);
      for (int64_t fold = 0; fold < folds; ++fold)
        any |= soften(state, begin + line + fold, s + (line + fold) * kStride, lowest, highest);
    }
    if (any) gain(state, begin, lines, common, s);
    for (int64_t token = from; token < to; ++token)
      if (const int64_t line = (token - from) * folds, more = ours(token, chunk, stop); more > 0) {
        gather_guesses(token, head, stop, more);
        gain(state, begin + line, folds, guesses, s + line * kStride + common.count);
      }
  }

  void gather_guesses(int64_t token, int64_t head, int64_t stop, int64_t count) {
    a.locate(token, stop, stop + count, own);
    gather(head, own, count, kChunk, guesses);
  }

  // Adds values to the totals of lines [begin, begin + lines) by their weights.
  void gain(State& state, int64_t begin, int64_t lines, const Gathered& from, const float* s) {
    float* total = &state.total[begin * value_size];
    int64_t line = 0;
    const auto add = [&]<int M>(std::integral_constant<int, M>) {
      for (; line + M <= lines; line += M)
        mix<M>(s + line * kStride, from.values, from.count, total + line * value_size, value_size);
    };
    add(std::integral_constant<int, 6>());
    add(std::integral_constant<int, 3>());
    add(std::integral_constant<int, 1>());
  }

  // Scores of gathered keys for lines [begin, begin + lines); says before each few how far it will have come.
  template <class Say>
  void score(State& state, int64_t begin, int64_t lines, const Gathered& from, float* s, Say say) {
    constexpr int64_t step = by_panels ? 8 : 4;
    for (int64_t key = 0; key < from.count; key += step) {
      say(key + step);
      if constexpr (by_panels) {
        score_by_panels(state, begin, begin + lines, from.keys + key, s + key);
      } else {
        const float* query = &state.query[begin * key_size];
        int64_t line = 0;
        for (; line + 3 <= lines; line += 3)
          dots<3>(query + line * key_size, key_size, from.keys + key, s + line * kStride + key);
        for (; line < lines; ++line) dots<1>(query + line * key_size, key_size, from.keys + key, s + line * kStride + key);
      }
    }
  }

  // Of 8 keys for lines [begin, end).
  void score_by_panels(State& state, int64_t begin, int64_t end, const T* const* keys, float* s) {
    if constexpr (by_panels) {
      const int64_t last = (end + kLanes - 1) / kLanes;
      int64_t panel = begin / kLanes;
      for (; panel + 3 <= last; panel += 3) score_panels<3, vfloat>(state, panel * kLanes, begin, end, keys, s);
      if (panel + 2 == last) score_panels<2, vfloat>(state, panel * kLanes, begin, end, keys, s);
      if (panel + 1 != last) return;
      const int64_t half = kLanes / 2, low = std::max(begin, panel * kLanes) / half, high = (end - 1) / half;
      if (low == high)
        score_panels<1, vhalves>(state, low * half, begin, end, keys, s);
      else
        score_panels<1, vfloat>(state, panel * kLanes, begin, end, keys, s);
    }
  }

  // The same from line `first` on, as many as P times V has.
  template <int P, class V>
  void score_panels(State& state, int64_t first, int64_t begin, int64_t end, const T* const* keys, float* s) {
    constexpr int64_t lanes = sizeof(V) / sizeof(float);
    V found[8][P];
    pair_dots<P>(state.panels.data() + first / kLanes * kLanes * key_size + first % kLanes * 2, key_size, keys, found);
    const auto* flat = reinterpret_cast<const float*>(found);
    for (int64_t line = std::max(begin, first); line < std::min(end, first + P * lanes); ++line)
      for (int i = 0; i < 8; ++i) s[(line - begin) * kStride + i] = flat[i * P * lanes + line - first] * a.scale;
  }

  // Fetches what comes next, when `key` of the chunk's keys have been looked at.
  void fetch(int64_t head, int64_t key) {
    const int64_t seen = begun + ((head - low) * common.count + key) / (high - low);
    const int64_t until = std::min(seen + kFar, static_cast<int64_t>(slots.size()));
    for (; fetched < until; ++fetched) prefetch(slots[fetched]);
  }

  // Turns a line's scores into weights, 0 outside [from, to), and rescales what it has; whether it sees anything.
  bool soften(State& state, int64_t line, float* s, int64_t from, int64_t to) {
    if (from >= to) {
      std::fill_n(s, kChunk, 0.0f);
      return false;
    }
    if (a.softcap > 0)
      for (int64_t i = from; i < to; ++i) s[i] = std::tanh(s[i] / a.softcap) * a.softcap;
    std::fill(s, s + from, -std::numeric_limits<float>::infinity());
    std::fill(s + to, s + kChunk, -std::numeric_limits<float>::infinity());
    vfloat top = load(s);
    for (int64_t i = kLanes; i < kChunk; i += kLanes) top = larger(top, load(s + i));
    const float higher = std::max(state.peak[line], largest(top));
    vfloat weight = vfloat{};
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      const vfloat e = exponential(load(s + i) - higher);
      store(s + i, e);
      weight += e;
    }
    const float shrink = std::exp(state.peak[line] - higher);
    state.mass[line] = state.mass[line] * shrink + sum(weight);
    if (shrink != 1.0f)
      for (int64_t d = 0; d < value_size; ++d) state.total[line * value_size + d] *= shrink;
    state.peak[line] = higher;
    return true;
  }

  void finish(int64_t head) {
    const State& state = states[head - low];
    for (int64_t line = 0; line < (last - first) * folds; ++line) {
      T* to = a.out + ((first + line / folds) * a.heads + head * folds + line % folds) * a.value_size;
      for (int64_t d = 0; d < a.value_size; ++d)
        to[d] = static_cast<T>(state.total[line * value_size + d] / state.mass[line]);
    }
  }
};

template <class T>
void attend(const Attention<T>& a) {
  const int64_t folds = a.heads / a.kv_heads, threads = at::get_num_threads();
  int64_t most = std::max<int64_t>(1, kLines / folds);
  std::vector<std::pair<int64_t, int64_t>> blocks;  // of tokens of one row
  const auto cut = [&] {
    blocks.clear();
    for (int64_t first = 0, last; first < a.tokens; first = last) {
      for (last = first + 1; last < a.tokens && last < first + most && a.row[last] == a.row[first];) ++last;
      blocks.emplace_back(first, last);
    }
  };
  cut();
  if (static_cast<int64_t>(blocks.size()) * a.kv_heads < 4 * threads) {  // so that all threads have as much to do
    int64_t longest = 1;
    for (const auto& [first, last] : blocks) longest = std::max(longest, last - first);
    const int64_t pieces = threads / std::gcd(threads, a.kv_heads);
    most = (longest + pieces - 1) / pieces;
    cut();
  }
  const int64_t size = static_cast<int64_t>(blocks.size());
  const int64_t chunk = kChunk * (a.key_size + a.value_size) * static_cast<int64_t>(sizeof(T));
  const int64_t near = std::clamp<int64_t>(kNearBytes / chunk, 1, a.kv_heads);  // so that a chunk stays near for them all
  const int64_t heads = size * (a.kv_heads / near) < 4 * threads ? 1 : near, groups = (a.kv_heads + heads - 1) / heads;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, size * groups), 1, [&](int64_t begin, int64_t end) {
    Lines<T> lines(a, most, heads);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next++) < size * groups;) {
        const auto& block = blocks[size - 1 - task / groups];
        const int64_t low = task % groups * heads;
        lines.run(block.first, block.second, low, std::min(low + heads, a.kv_heads));
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
