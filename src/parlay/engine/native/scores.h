// What attention is made of: scores of a few keys for some lines, and sums of values by their weights.
#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace parlay {

constexpr int64_t kChunk = 64;  // positions
constexpr int64_t kStride = kChunk + 8;  // of a line's scores: they are written by the eight

typedef float vhalves __attribute__((vector_size(kBytes / 2)));  // half as many lanes: twice as fast

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
    std::memcpy(scores + m * kStride, &four, sizeof four);
  }
}

#if defined(__AVX512BF16__)
// Where the hardware multiplies pairs of bfloat16, lines lie side by side in panels of kLanes, so that nothing is summed
// across a vector: panel[pair of dimensions][line][2].
constexpr bool kPanels = true;

inline vfloat add_pairs(vfloat sum, const bfloat16* lines, int32_t pair) {
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, load_as<__m512bh>(lines), (__m512bh)_mm512_set1_epi32(pair));
}

inline vhalves add_pairs(vhalves sum, const bfloat16* lines, int32_t pair) {
  return (vhalves)_mm256_dpbf16_ps((__m256)sum, load_as<__m256bh>(lines), (__m256bh)_mm256_set1_epi32(pair));
}

// found[key][p][line] = q[line] . keys[key] for 8 keys and the first lines, as many as V has, of P panels.
template <int P, class V>
inline void pair_dots(const bfloat16* panels, int64_t size, const bfloat16* const* keys, V (*found)[P]) {
  V sum[8][P];
#pragma GCC unroll 8
  for (int key = 0; key < 8; ++key)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[key][p] = V{};
  for (int64_t d = 0; d < size; d += 2)
#pragma GCC unroll 8
    for (int key = 0; key < 8; ++key) {
      int32_t pair;
      std::memcpy(&pair, keys[key] + d, sizeof pair);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[key][p] = add_pairs(sum[key][p], panels + (p * size + d) * kLanes, pair);
    }
#pragma GCC unroll 8
  for (int key = 0; key < 8; ++key)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) found[key][p] = sum[key][p];
}
#else
constexpr bool kPanels = false;
#endif

// total[m] += sum over keys of weights[m, key] * values[key] for M lines, W vectors wide.
template <int M, int W, class T>
inline void mix(const float* weights, const T* const* values, int64_t count, int64_t offset, float* total, int64_t size) {
  vfloat sum[M][W];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum[m][w] = load(total + m * size + w * kLanes);
  for (int64_t key = 0; key < count; ++key) {
    vfloat value[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) value[w] = load(values[key] + offset + w * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float weight = weights[m * kStride + key];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sum[m][w] += weight * value[w];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(total + m * size + w * kLanes, sum[m][w]);
}

template <int M, class T>
inline void mix(const float* weights, const T* const* values, int64_t count, float* total, int64_t size) {
  int64_t offset = 0;
  if constexpr (M <= 3 || kLanes == 16)  // as many sums as there are registers for
    for (; offset + 4 * kLanes <= size; offset += 4 * kLanes)
      mix<M, 4>(weights, values, count, offset, total + offset, size);
  for (; offset < size; offset += 2 * kLanes) mix<M, 2>(weights, values, count, offset, total + offset, size);
}

}  // namespace parlay
