// The arithmetic of the two phases, row by row (the paper's section 4): of the reads of a block on all complete blocks,
// and of a read on the partial of its own block. See shared_bodies.py for the functions that compute the same.

#pragma once

#include "rows.h"

namespace attnres {

// Columns are side by side in groups of this many, which is a cache line, and of which every vector size is a part.
constexpr size_t kColumns = 16;

// The columns [begin, begin + count) of a matrix [width, stride] as [groups, width, kColumns]. What the last group has
// more than these is of no matter.
inline std::vector<float> grouped(const float* matrix, size_t width, size_t stride, size_t begin, size_t count) {
  std::vector<float> groups((count + kColumns - 1) / kColumns * width * kColumns);
  float* to = groups.data();
  for (size_t column = begin; column < begin + count; column += kColumns) {
    for (size_t d = 0; d < width; ++d, to += kColumns) {
      const size_t at = d * stride + column;
      // Of one size, which is one instruction, but at the end of the matrix.
      if (at + kColumns <= width * stride) {
        std::memcpy(to, matrix + at, kColumns * sizeof(float));
      } else {
        std::copy(matrix + at, matrix + width * stride, to);
      }
    }
  }
  return groups;
}

// Products of a row with one group of columns. Several sums for each, as one would wait for itself.
template <int kBytes>
ATTNRES_INLINE void multiply_columns(const float* group, const float* row, size_t width, float* dots) {
  using V = Vectors<kBytes>;
  constexpr size_t kVectors = kColumns / V::kCount, kSteps = kVectors == 1 ? 4 : 2;
  const auto* from = reinterpret_cast<const Float32*>(group);
  typename V::Floats sums[kSteps][kVectors] = {};
  size_t d = 0;
  for (; d + kSteps <= width; d += kSteps) {
    for (size_t step = 0; step < kSteps; ++step, from += kColumns) {
      for (size_t k = 0; k < kVectors; ++k) sums[step][k] += row[d + step] * V::load(from + k * V::kCount);
    }
  }
  for (; d < width; ++d, from += kColumns) {
    for (size_t k = 0; k < kVectors; ++k) sums[0][k] += row[d] * V::load(from + k * V::kCount);
  }
  for (size_t k = 0; k < kVectors; ++k) {
    for (size_t step = 1; step < kSteps; ++step) sums[0][k] += sums[step][k];
    V::store(reinterpret_cast<Float32*>(dots) + k * V::kCount, sums[0][k]);
  }
}

// A row in float32; returns its mean square.
template <int kBytes, class T>
ATTNRES_INLINE float widen_row(const T* from, size_t width, float* to) {
  using V = Vectors<kBytes>;
  typename V::Floats squares = {};
  for (size_t d = 0; d < width; d += V::kCount) {
    const size_t count = std::min(V::kCount, width - d);
    const auto v = count == V::kCount ? V::load(from + d) : V::load(from + d, count);
    squares += v * v;
    V::store(reinterpret_cast<Float32*>(to) + d, v, count);
  }
  return V::sum(squares) / static_cast<float>(width);
}

// Where there is anything to store them to.
template <class T>
inline void store_all(T* to, const float* from, size_t count) {
  using V = Vectors<16>;
  if (to == nullptr) return;
  const auto* floats = reinterpret_cast<const Float32*>(from);
  size_t i = 0;
  for (; i + V::kCount <= count; i += V::kCount) V::store(to + i, V::load(floats + i));
  if (i < count) V::store(to + i, V::load(floats + i, count - i), count - i);
}

// The logits of the reads that a later call of phase one attends for.
template <class Out>
struct Later {
  size_t begin, reads;
  Out* logits;  // [rows, reads, n]
};

// Phase one: the logits of all reads from here on, and the blocks as mixed for the first of them.
template <class T, class Out>
struct BlocksOfReads {
  const T* const* blocks;      // [n] tensors [rows, width]
  size_t n, before;            // the last n - before of them are new
  const float* logits_before;  // of all reads on the others, [rows, reads, before]
  const float* columns;        // of all reads, as of `grouped`
  size_t reads, own, width;
  float eps;
  const std::vector<Out*>& mixed;     // of each of the own reads [rows, width], or none
  const std::vector<Out*>& log_sums;  // of the last of the own reads [rows, 1]
  const std::vector<Later<Out>>& later;

  template <int kBytes>
  ATTNRES_INLINE void attend(size_t first, size_t last) const {
    std::vector<float> row(width), dots(reads + kColumns), logits(reads * n);
    for (size_t r = first; r < last; ++r) {
      fill_logits<kBytes>(r, row.data(), dots.data(), logits.data());
      for (const Later<Out>& call : later) {
        if (call.logits == nullptr) continue;
        store_all(call.logits + r * call.reads * n, logits.data() + call.begin * n, call.reads * n);
      }
      for (size_t s = 0; s < own; ++s) {
        float* const weights = logits.data() + s * n;
        const Exponentials found = weigh(weights, n, 1.0f);
        const size_t with_partial = s + log_sums.size() - own;
        if (with_partial < log_sums.size() && log_sums[with_partial] != nullptr) {
          const float log_sum = found.peak + std::log(found.sum);
          store_all(log_sums[with_partial] + r, &log_sum, 1);
        }
        if (s >= mixed.size() || mixed[s] == nullptr) continue;
        if (s == 0 && r + 1 < last) {
          mix_row<kBytes, true>(blocks, weights, n, mixed[s], r * width, width);
        } else {
          mix_row<kBytes, false>(blocks, weights, n, mixed[s], r * width, width);
        }
      }
    }
  }

 private:
  // Logits [reads, n] of one row.
  template <int kBytes>
  ATTNRES_INLINE void fill_logits(size_t r, float* row, float* dots, float* logits) const {
    for (size_t s = 0; s < reads; ++s) {
      for (size_t i = 0; i < before; ++i) logits[s * n + i] = logits_before[(r * reads + s) * before + i];
    }
    for (size_t i = before; i < n; ++i) {
      const float rms = std::sqrt(widen_row<kBytes>(blocks[i] + r * width, width, row) + eps);
      for (size_t s = 0; s < reads; s += kColumns) {
        multiply_columns<kBytes>(columns + s * width, row, width, dots);
        for (size_t k = s; k < std::min(s + kColumns, reads); ++k) logits[k * n + i] = dots[k - s] / rms;
      }
    }
  }
};

// Phase two: a read, of the blocks as mixed for it and the partial, where there is one.
template <class T, class Mixed>
struct MergeOfPartial {
  const Mixed* mixed;     // [rows, width]
  const float* log_sums;  // [rows]
  const T* partial;       // [rows, width], or none
  Query query;
  T* out;       // [rows, width], perhaps in place of `mixed`
  float total;  // what the depth weights sum to

  template <int kBytes>
  ATTNRES_INLINE void attend(size_t first, size_t last) const {
    using V = Vectors<kBytes>;
    const size_t width = query.width;
    for (size_t r = first; r < last; ++r) {
      const size_t row = r * width;
      float a = 0;
      if (partial != nullptr) {
        float logit = 0;
        logits_of<kBytes, 1>(query, &partial, row, r + 1 < last ? width : 0, &logit);
        a = 1 / (1 + std::exp(log_sums[r] - logit));
      }
      size_t d = 0;
      for (; d + V::kCount <= width; d += V::kCount) merge<kBytes>(row + d, V::kCount, a);
      if (d < width) merge<kBytes>(row + d, width - d, a);
    }
  }

 private:
  template <int kBytes>
  ATTNRES_INLINE void merge(size_t at, size_t count, float a) const {
    using V = Vectors<kBytes>;
    auto h = V::load(mixed + at, count);
    if (partial != nullptr) h += (V::load(partial + at, count) - h) * a;
    V::store(out + at, h * total, count);
  }
};

}  // namespace attnres
