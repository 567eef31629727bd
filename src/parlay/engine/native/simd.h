// Vectors of the machine's own width, through the compilers' vector extension: one source for every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <c10/util/BFloat16.h>

namespace parlay {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

using bfloat16 = c10::BFloat16;
typedef float vfloat __attribute__((vector_size(kBytes)));
typedef int32_t vint __attribute__((vector_size(kBytes)));
typedef uint32_t vuint __attribute__((vector_size(kBytes)));
typedef uint16_t vhalf __attribute__((vector_size(kBytes / 2)));
typedef float quad __attribute__((vector_size(16)));

#if defined(__clang__)
#define PARLAY_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t quad_index __attribute__((vector_size(16)));
#define PARLAY_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, quad_index{i, j, k, l})
#endif

template <class V>
inline V load_as(const void* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline vfloat load(const float* from) { return load_as<vfloat>(from); }

inline vfloat load(const bfloat16* from) {  // a bfloat16 is the upper half of a float
  return (vfloat)(__builtin_convertvector(load_as<vhalf>(from), vuint) << 16);
}

inline void store(float* to, vfloat vector) { std::memcpy(to, &vector, sizeof vector); }

inline void store(bfloat16* to, vfloat vector) {  // to nearest, ties to even; NaN stays NaN
  const vuint bits = (vuint)vector;
  const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vuint nan = bits - bits + 0x7fc0u;
  const vhalf halves = __builtin_convertvector(vector == vector ? rounded : nan, vhalf);
  std::memcpy(to, &halves, sizeof halves);
}

inline vfloat broadcast(float value) { return vfloat{} + value; }

inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

// e^x within 2 units in the last place for x <= 88; 0 below -87.3. Range reduction to |r| <= ln(2)/2, then a polynomial.
inline vfloat exponential(vfloat x) {
  const vfloat magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat n = (x * 1.44269504f + magic) - magic;
  const vfloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vfloat clean = x < -87.3f ? vfloat{} : n;  // keeps the conversion within range
  const vfloat power = (vfloat)((__builtin_convertvector(clean, vint) + 127) << 23);
  return x < -87.3f ? vfloat{} : p * power;
}

inline float sum(vfloat vector) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += vector[lane];
  return total;
}

inline float largest(vfloat vector) {
  float found = vector[0];
  for (int lane = 1; lane < kLanes; ++lane) found = vector[lane] > found ? vector[lane] : found;
  return found;
}

inline quad fold(vfloat vector) {  // four partial sums
  quad parts[kLanes / 4];
  std::memcpy(parts, &vector, sizeof vector);
  quad total = parts[0];
  for (int part = 1; part < kLanes / 4; ++part) total += parts[part];
  return total;
}

// The sums of four vectors.
inline quad sums(vfloat a, vfloat b, vfloat c, vfloat d) {
  const quad p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const quad pq = PARLAY_SHUFFLE(p, q, 0, 4, 2, 6) + PARLAY_SHUFFLE(p, q, 1, 5, 3, 7);
  const quad rs = PARLAY_SHUFFLE(r, s, 0, 4, 2, 6) + PARLAY_SHUFFLE(r, s, 1, 5, 3, 7);
  return PARLAY_SHUFFLE(pq, rs, 0, 1, 4, 5) + PARLAY_SHUFFLE(pq, rs, 2, 3, 6, 7);
}

}  // namespace parlay
