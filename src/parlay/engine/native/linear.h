// Products of few tokens with packed weights, summed in float32. What a token gets does not depend on the tokens beside
// it: every output is one chain of multiply-adds over the inputs, in their order, whatever the shape. Where the hardware
// multiplies pairs of bfloat16, a link of the chain is a pair of inputs.
#pragma once

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>

#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace parlay {

constexpr int kPanel = 2 * kLanes;  // outputs whose weights lie side by side
#if defined(__AVX512F__)
constexpr int kTokens = 12;  // tokens that meet a panel at a time: 24 sums, 2 weights and an input in 32 registers
#else
constexpr int kTokens = 6;  // 12 sums in 16 registers
#endif
constexpr int64_t kNear = 48;       // tokens whose inputs stay in cache while the panels pass by

// How weights of a type lie in a panel: so many inputs at a time, and where output `lane` of input k is, such that a load
// gives, for each of these inputs, outputs 0.. and kLanes.. in order.
template <class W>
struct Layout;

template <>
struct Layout<float> {
  static constexpr int kInputs = 1;
  static int64_t place(int64_t k, int lane) { return k * kPanel + lane; }
  static void load(const float* from, vfloat* to) {
    to[0] = parlay::load(from);
    to[1] = parlay::load(from + kLanes);
  }
};

template <>
struct Layout<bfloat16> {  // two inputs in every 32 bits: no widening needed, and what pairs of products are made of
  static constexpr int kInputs = 2;
  static int64_t place(int64_t k, int lane) { return k / 2 * 2 * kPanel + lane * 2 + k % 2; }
  static void load(const bfloat16* from, vfloat* to) {
    const vuint low = load_as<vuint>(from), high = load_as<vuint>(from + kPanel);
    to[0] = (vfloat)(low << 16);
    to[1] = (vfloat)(high << 16);
    to[2] = (vfloat)(low & 0xffff0000u);
    to[3] = (vfloat)(high & 0xffff0000u);
  }
};

template <>
struct Layout<int8_t> {  // four in every 32 bits, of two inputs: compilers widen bytes one by one
  static constexpr int kInputs = 2;
  static int64_t place(int64_t k, int lane) {
    return k / 2 * 2 * kPanel + lane % kLanes * 4 + k % 2 * 2 + lane / kLanes;
  }
  static void load(const int8_t* from, vfloat* to) {
    const vuint fours = load_as<vuint>(from);
    to[0] = widen((vint)(fours << 24));
    to[1] = widen((vint)(fours << 16));
    to[2] = widen((vint)(fours << 8));
    to[3] = widen((vint)fours);
  }
  static vfloat widen(vint high) { return __builtin_convertvector(high >> 24, vfloat); }
};

// weight: [outputs, inputs] -> packed: [panels, inputs, kPanel], zeros behind the last output.
template <class W>
void pack(const W* weight, int64_t outputs, int64_t inputs, W* packed) {
  at::parallel_for(0, (outputs + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int lane = 0; lane < kPanel; ++lane) {
        const int64_t output = panel * kPanel + lane;
        W* to = packed + panel * inputs * kPanel;
        for (int64_t k = 0; k < inputs; ++k)
          to[Layout<W>::place(k, lane)] = output < outputs ? weight[output * inputs + k] : W(0);
      }
  });
}

template <class W>
inline void prefetch(const W* from, int count) {  // four kilobytes ahead, into the second cache
  for (int byte = 0; byte < count * static_cast<int>(sizeof(W)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + 4096 + byte, 0, 2);
}

// What is done to sums of products, output by output; null for nothing.
struct After {
  const float* scale;
  const float* bias;

  After from(int64_t output) const { return {scale ? scale + output : scale, bias ? bias + output : bias}; }
};

// Sums of products of one panel for M tokens: outputs 0.. in `low` and kLanes.. in `high`.
template <int M, class W>
inline void accumulate(const float* x, int64_t inputs, const W* panel, vfloat* low, vfloat* high) {
  constexpr int kInputs = Layout<W>::kInputs;
  for (int64_t k = 0; k < inputs; k += kInputs) {
    vfloat weights[2 * kInputs];
    Layout<W>::load(panel + k * kPanel, weights);
    prefetch(panel + k * kPanel, kInputs * kPanel);
#pragma GCC unroll 2
    for (int step = 0; step < kInputs; ++step)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const float input = x[m * inputs + k + step];
        low[m] += input * weights[2 * step];
        high[m] += input * weights[2 * step + 1];
      }
  }
}

#if defined(__AVX512BF16__)
template <int M>
inline void accumulate(const bfloat16* x, int64_t inputs, const bfloat16* panel, vfloat* low, vfloat* high) {
  for (int64_t k = 0; k < inputs; k += 2) {
    const bfloat16* from = panel + k * kPanel;
    const auto first = load_as<__m512bh>(from), second = load_as<__m512bh>(from + kPanel);
    prefetch(from, 2 * kPanel);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + m * inputs + k, sizeof pair);
      const auto input = (__m512bh)_mm512_set1_epi32(pair);
      low[m] = (vfloat)_mm512_dpbf16_ps((__m512)low[m], first, input);
      high[m] = (vfloat)_mm512_dpbf16_ps((__m512)high[m], second, input);
    }
  }
}
#endif

// What is done to the sums of one panel: by one function for all numbers of tokens, or compilers would fuse the two
// operations here and not there.
struct Finish {
  float scale[kPanel], bias[kPanel];

  Finish(After after, int count) : scale{}, bias{} {
    std::fill_n(scale, kPanel, 1.0f);
    if (after.scale != nullptr) std::copy_n(after.scale, count, scale);
    if (after.bias != nullptr) std::copy_n(after.bias, count, bias);
  }

  template <class Y>
  __attribute__((noinline)) void operator()(vfloat low, vfloat high, Y* y, int count) const {
    low = low * load(scale) + load(bias);
    high = high * load(scale + kLanes) + load(bias + kLanes);
    if (count == kPanel) {
      store(y, low);
      store(y + kLanes, high);
    } else {
      Y whole[kPanel];
      store(whole, low);
      store(whole + kLanes, high);
      std::copy_n(whole, count, y);
    }
  }
};

// `count` outputs of one panel for M tokens.
template <int M, class X, class W, class Y>
inline void multiply(const X* x, int64_t inputs, const W* panel, After after, Y* y, int64_t outputs, int count) {
  vfloat low[M], high[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) low[m] = high[m] = vfloat{};
  accumulate<M>(x, inputs, panel, low, high);
  const Finish finish(after, count);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) finish(low[m], high[m], y + m * outputs, count);
}

template <int M, class X, class W, class Y>
inline void multiply_some(int64_t tokens, const X* x, int64_t inputs, const W* panel, After after, Y* y,
                          int64_t outputs, int count) {
  if constexpr (M > 0) {
    if (tokens == M) return multiply<M>(x, inputs, panel, after, y, outputs, count);
    multiply_some<M - 1>(tokens, x, inputs, panel, after, y, outputs, count);
  }
}

template <class X, class W, class Y>
void multiply(int64_t tokens, const X* x, int64_t inputs, const W* panel, After after, Y* y, int64_t outputs,
              int count) {
  for (int64_t tiles = (tokens + kTokens - 1) / kTokens; tiles > 0; --tiles) {  // of about a size: small ones are slow
    const int64_t some = (tokens + tiles - 1) / tiles;
    multiply_some<kTokens>(some, x, inputs, panel, after, y, outputs, count);
    tokens -= some, x += some * inputs, y += some * outputs;
  }
}

// x: [tokens, inputs], packed: [panels, inputs, kPanel], after: [outputs] each -> y: [tokens, outputs].
template <class X, class W, class Y>
void linear(const X* x, int64_t tokens, int64_t inputs, const W* packed, After after, Y* y, int64_t outputs) {
  at::parallel_for(0, (outputs + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < tokens; first += kNear)
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t output = panel * kPanel;
        multiply(std::min(kNear, tokens - first), x + first * inputs, inputs, packed + output * inputs,
                 after.from(output), y + first * outputs + output, outputs,
                 static_cast<int>(std::min<int64_t>(kPanel, outputs - output)));
      }
  });
}

}  // namespace parlay
