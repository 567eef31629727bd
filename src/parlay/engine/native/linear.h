// Products of few tokens with packed weights, in float32. What a token gets does not depend on the tokens beside it:
// every output is one chain of fused multiply-adds over the inputs, in their order, whatever the shape.
#pragma once

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>

#include "simd.h"

namespace parlay {

constexpr int kPanel = 2 * kLanes;  // outputs whose weights lie side by side
constexpr int kTokens = 6;          // tokens that meet a panel at a time: 12 sums, 2 weights and an input in registers
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
struct Layout<bfloat16> {  // two in every 32 bits: no widening needed
  static constexpr int kInputs = 1;
  static int64_t place(int64_t k, int lane) {
    return k * kPanel + (lane < kLanes ? 2 * lane : 2 * (lane - kLanes) + 1);
  }
  static void load(const bfloat16* from, vfloat* to) {
    const vuint pairs = load_as<vuint>(from);
    to[0] = (vfloat)(pairs << 16);
    to[1] = (vfloat)(pairs & 0xffff0000u);
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

// What is done to sums of products, output by output; null for nothing.
struct After {
  const float* scale;
  const float* bias;

  After from(int64_t output) const { return {scale ? scale + output : scale, bias ? bias + output : bias}; }
};

// `count` outputs of one panel for M tokens.
template <int M, class W, class Y>
inline void multiply(const float* x, int64_t inputs, const W* panel, After after, Y* y, int64_t outputs, int count) {
  vfloat low[M], high[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) low[m] = high[m] = vfloat{};
  constexpr int kInputs = Layout<W>::kInputs;
  for (int64_t k = 0; k < inputs; k += kInputs) {
    vfloat weights[2 * kInputs];
    Layout<W>::load(panel + k * kPanel, weights);
    __builtin_prefetch(reinterpret_cast<const char*>(panel + k * kPanel) + 1024);
#pragma GCC unroll 2
    for (int step = 0; step < kInputs; ++step)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float input = x[m * inputs + k + step];
        low[m] += input * weights[2 * step];
        high[m] += input * weights[2 * step + 1];
      }
  }
  float scale[kPanel], bias[kPanel] = {};
  std::fill_n(scale, kPanel, 1.0f);
  if (after.scale != nullptr) std::copy_n(after.scale, count, scale);
  if (after.bias != nullptr) std::copy_n(after.bias, count, bias);
  const vfloat low_scale = load(scale), high_scale = load(scale + kLanes);
  const vfloat low_bias = load(bias), high_bias = load(bias + kLanes);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    if (count == kPanel) {
      store(y + m * outputs, low[m] * low_scale + low_bias);
      store(y + m * outputs + kLanes, high[m] * high_scale + high_bias);
    } else {
      Y whole[kPanel];
      store(whole, low[m] * low_scale + low_bias);
      store(whole + kLanes, high[m] * high_scale + high_bias);
      std::copy_n(whole, count, y + m * outputs);
    }
  }
}

template <class W, class Y>
void multiply(int64_t tokens, const float* x, int64_t inputs, const W* panel, After after, Y* y, int64_t outputs,
              int count) {
  for (; tokens >= kTokens; tokens -= kTokens, x += kTokens * inputs, y += kTokens * outputs)
    multiply<kTokens>(x, inputs, panel, after, y, outputs, count);
  switch (tokens) {
    case 5: return multiply<5>(x, inputs, panel, after, y, outputs, count);
    case 4: return multiply<4>(x, inputs, panel, after, y, outputs, count);
    case 3: return multiply<3>(x, inputs, panel, after, y, outputs, count);
    case 2: return multiply<2>(x, inputs, panel, after, y, outputs, count);
    case 1: return multiply<1>(x, inputs, panel, after, y, outputs, count);
    default: return;
  }
}

// x: [tokens, inputs], packed: [panels, inputs, kPanel], after: [outputs] each -> y: [tokens, outputs].
template <class W, class Y>
void linear(const float* x, int64_t tokens, int64_t inputs, const W* packed, After after, Y* y, int64_t outputs) {
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
