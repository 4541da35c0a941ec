// The arithmetic of a site, row by row: see ops/block_attn_res.py for the equation.
//
// A row of every source is read twice: for the logits, from memory, and for the weighted sum, from the cache. All is
// float32 whatever the sources are, as in PyTorch. There are no shortcuts for values that are not finite: a NaN or an
// infinity in a row reaches its result as it does in the standard operators.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "lanes.h"

namespace attnres {

template <class T>
struct Site {
  const T* const* sources;  // [n] tensors [rows, width]
  size_t n;
  const Float32* weight;  // query * gain * scale, [width]
  T* out;                 // [rows, width]
  size_t width;
  float eps;
  float total;  // what the depth weights sum to
};

// What one vector of columns adds to the sums of kSources sources. What lies ahead, in the next row, is fetched on the
// way: with many sources a processor does not notice by itself that all are read from front to back.
template <int kBytes, int kSources, class T>
ATTNRES_INLINE void add_products(const Float32* weight, const T* const* sources, size_t column, size_t count, size_t ahead,
                                 typename Vectors<kBytes>::Floats* dots, typename Vectors<kBytes>::Floats* squares) {
  using V = Vectors<kBytes>;
  const auto w = V::load(weight, count);
  for (int i = 0; i < kSources; ++i) {
    const auto v = V::load(sources[i] + column, count);
    __builtin_prefetch(sources[i] + column + ahead);
    dots[i] += v * w;
    squares[i] += v * v;
  }
}

// Logits of kSources sources, whose sums are computed side by side: one sum would wait for itself.
template <int kBytes, int kSources, class T>
ATTNRES_INLINE void logits_of(const Site<T>& site, const T* const* sources, size_t row, size_t ahead, float* logits) {
  using V = Vectors<kBytes>;
  typename V::Floats dots[kSources] = {}, squares[kSources] = {};
  size_t d = 0;
  for (; d + V::kCount <= site.width; d += V::kCount) {
    add_products<kBytes, kSources>(site.weight + d, sources, row + d, V::kCount, ahead, dots, squares);
  }
  if (d < site.width) {
    add_products<kBytes, kSources>(site.weight + d, sources, row + d, site.width - d, ahead, dots, squares);
  }
  for (int i = 0; i < kSources; ++i) {
    const float mean_square = V::sum(squares[i]) / static_cast<float>(site.width);
    logits[i] = V::sum(dots[i]) / std::sqrt(mean_square + site.eps);
  }
}

// Softmax, in place, times the total: each exactly 1 if all are equal and the total is their number.
inline void weigh(float* logits, size_t n, float total) {
  float peak = -std::numeric_limits<float>::infinity(), sum = 0;
  for (size_t i = 0; i < n; ++i) peak = std::max(peak, logits[i]);
  for (size_t i = 0; i < n; ++i) sum += logits[i] = std::exp(logits[i] - peak);
  for (size_t i = 0; i < n; ++i) logits[i] *= total / sum;
}

// kVectors vectors of a row of the result, from column d on.
template <int kBytes, int kVectors, class T>
ATTNRES_INLINE void mix(const Site<T>& site, const float* weights, size_t row, size_t d, size_t count) {
  using V = Vectors<kBytes>;
  typename V::Floats sums[kVectors] = {};
  for (size_t i = 0; i < site.n; ++i) {
    const T* from = site.sources[i] + row + d;
    for (int k = 0; k < kVectors; ++k) sums[k] += weights[i] * V::load(from + k * V::kCount, count);
  }
  for (int k = 0; k < kVectors; ++k) V::store(site.out + row + d + k * V::kCount, sums[k], count);
}

// Rows first to last, with vectors of kBytes bytes.
template <int kBytes, class T>
ATTNRES_INLINE void attend(const Site<T>& site, size_t first, size_t last) {
  constexpr size_t kCount = Vectors<kBytes>::kCount;
  std::vector<float> weights(site.n);
  float* const w = weights.data();
  for (size_t row = first * site.width; row < last * site.width; row += site.width) {
    const size_t ahead = row + site.width < last * site.width ? site.width : 0;
    size_t i = 0;
    for (; i + 4 <= site.n; i += 4) logits_of<kBytes, 4>(site, site.sources + i, row, ahead, w + i);
    if (i + 3 == site.n) logits_of<kBytes, 3>(site, site.sources + i, row, ahead, w + i);
    if (i + 2 == site.n) logits_of<kBytes, 2>(site, site.sources + i, row, ahead, w + i);
    if (i + 1 == site.n) logits_of<kBytes, 1>(site, site.sources + i, row, ahead, w + i);
    weigh(w, site.n, site.total);
    size_t d = 0;
    for (; d + 4 * kCount <= site.width; d += 4 * kCount) mix<kBytes, 4>(site, w, row, d, kCount);
    for (; d + kCount <= site.width; d += kCount) mix<kBytes, 1>(site, w, row, d, kCount);
    if (d < site.width) mix<kBytes, 1>(site, w, row, d, site.width - d);
  }
}

// The same for the instruction sets of this processor, found where the program runs: a library that was built on one
// machine runs on others of its architecture.
template <class T>
void attend_anywhere(const Site<T>& site, size_t first, size_t last) {
  attend<16>(site, first, last);
}

#if defined(__x86_64__)
template <class T>
__attribute__((target("avx2,fma"))) void attend_avx2(const Site<T>& site, size_t first, size_t last) {
  attend<32>(site, first, last);
}

template <class T>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) void attend_avx512(const Site<T>& site,
                                                                                          size_t first, size_t last) {
  attend<64>(site, first, last);
}
#endif

enum class InstructionSet { kAny, kAvx2, kAvx512 };

// ATTNRES_INSTRUCTION_SET asks for less than there is: "any" or "avx2".
inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  const char* asked = std::getenv("ATTNRES_INSTRUCTION_SET");
  const std::string most = asked ? asked : "";
  __builtin_cpu_init();
  const bool avx2 = most != "any" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 && most != "avx2" ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
#endif
  return InstructionSet::kAny;
}

template <class T>
void (*attend_for(InstructionSet set))(const Site<T>&, size_t, size_t) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512) return attend_avx512<T>;
  if (set == InstructionSet::kAvx2) return attend_avx2<T>;
#endif
  (void)set;
  return attend_anywhere<T>;
}

}  // namespace attnres
