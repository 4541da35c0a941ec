// The arithmetic of a site by itself, row by row, and what it has in common with that of two phases: see
// ops/block_attn_res.py for the equation.
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

// What rows are compared with.
struct Query {
  const Float32* weight;  // query * gain * scale, [width]
  size_t width;
  float eps;
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
ATTNRES_INLINE void logits_of(const Query& query, const T* const* sources, size_t row, size_t ahead, float* logits) {
  using V = Vectors<kBytes>;
  typename V::Floats dots[kSources] = {}, squares[kSources] = {};
  size_t d = 0;
  for (; d + V::kCount <= query.width; d += V::kCount) {
    add_products<kBytes, kSources>(query.weight + d, sources, row + d, V::kCount, ahead, dots, squares);
  }
  if (d < query.width) {
    add_products<kBytes, kSources>(query.weight + d, sources, row + d, query.width - d, ahead, dots, squares);
  }
  for (int i = 0; i < kSources; ++i) {
    const float mean_square = V::sum(squares[i]) / static_cast<float>(query.width);
    logits[i] = V::sum(dots[i]) / std::sqrt(mean_square + query.eps);
  }
}

// Exponentials, whose sum times that of the peak is the sum of all that they are of.
struct Exponentials {
  float peak, sum;
};

// Softmax, in place, times the total: each exactly 1 if all are equal and the total is their number.
inline Exponentials weigh(float* logits, size_t n, float total) {
  float peak = -std::numeric_limits<float>::infinity(), sum = 0;
  for (size_t i = 0; i < n; ++i) peak = std::max(peak, logits[i]);
  for (size_t i = 0; i < n; ++i) sum += logits[i] = std::exp(logits[i] - peak);
  for (size_t i = 0; i < n; ++i) logits[i] *= total / sum;
  return {peak, sum};
}

// kVectors vectors of the weighted sum of n sources. What lies ahead is fetched where nothing else did that.
template <int kBytes, int kVectors, bool kFetches, class T, class Out>
ATTNRES_INLINE void mix(const T* const* sources, const float* weights, size_t n, Out* out, size_t at, size_t count,
                        size_t ahead) {
  using V = Vectors<kBytes>;
  typename V::Floats sums[kVectors] = {};
  for (size_t i = 0; i < n; ++i) {
    const T* from = sources[i] + at;
    for (int k = 0; k < kVectors; ++k) {
      sums[k] += weights[i] * V::load(from + k * V::kCount, count);
      if (kFetches) __builtin_prefetch(from + k * V::kCount + ahead);
    }
  }
  for (int k = 0; k < kVectors; ++k) V::store(out + at + k * V::kCount, sums[k], count);
}

// A row of the weighted sum.
template <int kBytes, bool kFetches, class T, class Out>
ATTNRES_INLINE void mix_row(const T* const* sources, const float* weights, size_t n, Out* out, size_t row, size_t width) {
  constexpr size_t kCount = Vectors<kBytes>::kCount;
  size_t d = 0;
  for (; d + 4 * kCount <= width; d += 4 * kCount) {
    mix<kBytes, 4, kFetches>(sources, weights, n, out, row + d, kCount, width);
  }
  for (; d + kCount <= width; d += kCount) {
    mix<kBytes, 1, kFetches>(sources, weights, n, out, row + d, kCount, width);
  }
  if (d < width) mix<kBytes, 1, kFetches>(sources, weights, n, out, row + d, width - d, width);
}

// A site by itself.
template <class T>
struct Site {
  const T* const* sources;  // [n] tensors [rows, width]
  size_t n;
  Query query;
  T* out;       // [rows, width]
  float total;  // what the depth weights sum to

  // Rows first to last, with vectors of kBytes bytes.
  template <int kBytes>
  ATTNRES_INLINE void attend(size_t first, size_t last) const {
    const size_t width = query.width;
    std::vector<float> weights(n);
    float* const w = weights.data();
    for (size_t row = first * width; row < last * width; row += width) {
      const size_t ahead = row + width < last * width ? width : 0;
      size_t i = 0;
      for (; i + 4 <= n; i += 4) logits_of<kBytes, 4>(query, sources + i, row, ahead, w + i);
      if (i + 3 == n) logits_of<kBytes, 3>(query, sources + i, row, ahead, w + i);
      if (i + 2 == n) logits_of<kBytes, 2>(query, sources + i, row, ahead, w + i);
      if (i + 1 == n) logits_of<kBytes, 1>(query, sources + i, row, ahead, w + i);
      weigh(w, n, total);
      mix_row<kBytes, false>(sources, w, n, out, row, width);
    }
  }
};

// The rows of what has an `attend`, for the instruction sets of this processor, found where the program runs: a library
// that was built on one machine runs on others of its architecture.
template <class Rows>
void attend_anywhere(const Rows& rows, size_t first, size_t last) {
  rows.template attend<16>(first, last);
}

#if defined(__x86_64__)
template <class Rows>
__attribute__((target("avx2,fma"))) void attend_avx2(const Rows& rows, size_t first, size_t last) {
  rows.template attend<32>(first, last);
}

template <class Rows>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) void attend_avx512(const Rows& rows,
                                                                                          size_t first, size_t last) {
  rows.template attend<64>(first, last);
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

template <class Rows>
void (*attend_for(InstructionSet set))(const Rows&, size_t, size_t) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512) return attend_avx512<Rows>;
  if (set == InstructionSet::kAvx2) return attend_avx2<Rows>;
#endif
  (void)set;
  return attend_anywhere<Rows>;
}

}  // namespace attnres
