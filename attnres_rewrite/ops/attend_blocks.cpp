// Phase one of the two-phase schedule for any number n of blocks and S of reads; attend_blocks.py has the equations.
// A block is `rows` rows of `width` values of type T; arithmetic is in A.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

// The rows of one token, in the type of the arithmetic: where that is the type of the blocks, the blocks themselves.
template <typename T, typename A>
struct Rows {
  std::vector<A> copies;
  std::vector<const A*> at;
  const void* const* blocks;
  int64_t width;

  Rows(const void* const* blocks, int64_t n, int64_t width)
      : copies(std::is_same_v<T, A> ? 0 : n * width), at(n), blocks(blocks), width(width) {}

  void load(int64_t row) {
    for (size_t i = 0; i < at.size(); ++i) {
      const T* source = static_cast<const T*>(blocks[i]) + row * width;
      if constexpr (std::is_same_v<T, A>) {
        at[i] = source;
      } else {
        A* copy = copies.data() + i * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) copy[d] = static_cast<A>(source[d]);
        at[i] = copy;
      }
    }
  }
};

template <typename A>
inline A dot(const A* x, const A* y, int64_t width) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += x[d] * y[d];
  return sum;
}

// Inverse RMS of every block, logits [n, S], depth weights [n, S] and log-sums [S] of one token.
template <typename A>
struct Scores {
  int64_t n, reads;
  std::vector<A> inverse_rms, logits, weights, log_sums;

  Scores(int64_t n, int64_t reads)
      : n(n), reads(reads), inverse_rms(n), logits(n * reads), weights(n * reads), log_sums(reads) {}

  void compute(const std::vector<const A*>& rows, const A* queries, int64_t width, A eps, A scale) {
    for (int64_t i = 0; i < n; ++i) {
      inverse_rms[i] = A(1) / std::sqrt(dot(rows[i], rows[i], width) / width + eps);
      for (int64_t s = 0; s < reads; ++s)
        logits[i * reads + s] = dot(rows[i], queries + s * width, width) * inverse_rms[i] * scale;
    }
    for (int64_t s = 0; s < reads; ++s) {
      A peak = logits[s], sum = 0;
      for (int64_t i = 1; i < n; ++i) peak = std::max(peak, logits[i * reads + s]);
      for (int64_t i = 0; i < n; ++i) sum += weights[i * reads + s] = std::exp(logits[i * reads + s] - peak);
      for (int64_t i = 0; i < n; ++i) weights[i * reads + s] /= sum;
      log_sums[s] = peak + std::log(sum);
    }
  }
};

struct Sizes {
  int64_t n, reads, rows, width, threads;
  double eps, scale;
};

template <typename T, typename A>
void forward(Sizes z, const void* const* blocks, const A* queries, void* const* mixed, A* const* log_sums) {
#pragma omp parallel num_threads(z.threads)
  {
    Rows<T, A> rows(blocks, z.n, z.width);
    Scores<A> scores(z.n, z.reads);
    std::vector<A> sum(z.width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < z.rows; ++row) {
      rows.load(row);
      scores.compute(rows.at, queries, z.width, A(z.eps), A(z.scale));
      for (int64_t s = 0; s < z.reads; ++s) {
        T* out = static_cast<T*>(mixed[s]) + row * z.width;
        for (int64_t i = 0; i < z.n; ++i) {
          const A* x = rows.at[i];
          const A weight = scores.weights[i * z.reads + s];
#pragma omp simd
          for (int64_t d = 0; d < z.width; ++d) sum[d] = (i ? sum[d] : A(0)) + weight * x[d];
        }
#pragma omp simd
        for (int64_t d = 0; d < z.width; ++d) out[d] = static_cast<T>(sum[d]);
        log_sums[s][row] = scores.log_sums[s];
      }
    }
  }
}

// `d_blocks` has a null pointer for every block of which no gradient is wanted, `added` for every one to whose gradient
// nothing is added; `d_queries` is null or [threads, S, D], zeros, of which every thread fills its part.
template <typename T, typename A>
void backward(Sizes z, const void* const* blocks, const A* queries, const void* const* d_mixed,
              const A* const* d_log_sums, const void* const* added, void* const* d_blocks, A* d_queries) {
#pragma omp parallel num_threads(z.threads)
  {
    Rows<T, A> rows(blocks, z.n, z.width), d_rows(d_mixed, z.reads, z.width);
    Scores<A> scores(z.n, z.reads);
    std::vector<A> d_logits(z.n * z.reads), on_query(z.reads), sum(z.width);
    A* d_q = d_queries ? d_queries + omp_get_thread_num() * z.reads * z.width : nullptr;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < z.rows; ++row) {
      rows.load(row);
      d_rows.load(row);
      scores.compute(rows.at, queries, z.width, A(z.eps), A(z.scale));
      for (int64_t s = 0; s < z.reads; ++s) {
        // A logit changes the mixed by its block, against the mean over the blocks, and the log-sum by its weight.
        A mean = -d_log_sums[s][row];
        for (int64_t i = 0; i < z.n; ++i) {
          const A d_weight = dot(rows.at[i], d_rows.at[s], z.width);
          d_logits[i * z.reads + s] = d_weight;
          mean += scores.weights[i * z.reads + s] * d_weight;
        }
        for (int64_t i = 0; i < z.n; ++i)
          d_logits[i * z.reads + s] = scores.weights[i * z.reads + s] * (d_logits[i * z.reads + s] - mean);
      }
      for (int64_t i = 0; i < z.n; ++i) {
        const A* x = rows.at[i];
        A on_row = 0;
        for (int64_t s = 0; s < z.reads; ++s) {
          on_row += d_logits[i * z.reads + s] * scores.logits[i * z.reads + s];
          on_query[s] = d_logits[i * z.reads + s] * scores.inverse_rms[i] * A(z.scale);
        }
        if (d_q)
          for (int64_t s = 0; s < z.reads; ++s)
#pragma omp simd
            for (int64_t d = 0; d < z.width; ++d) d_q[s * z.width + d] += on_query[s] * x[d];
        if (!d_blocks[i]) continue;
        on_row *= scores.inverse_rms[i] * scores.inverse_rms[i] / z.width;
#pragma omp simd
        for (int64_t d = 0; d < z.width; ++d) sum[d] = -on_row * x[d];
        for (int64_t s = 0; s < z.reads; ++s) {
          const A *d_out = d_rows.at[s], *query = queries + s * z.width;
          const A weight = scores.weights[i * z.reads + s], on = on_query[s];
#pragma omp simd
          for (int64_t d = 0; d < z.width; ++d) sum[d] += weight * d_out[d] + on * query[d];
        }
        T* out = static_cast<T*>(d_blocks[i]) + row * z.width;
        const T* more = added[i] ? static_cast<const T*>(added[i]) + row * z.width : nullptr;
        if (more)
#pragma omp simd
          for (int64_t d = 0; d < z.width; ++d) out[d] = static_cast<T>(static_cast<A>(more[d]) + sum[d]);
        else
#pragma omp simd
          for (int64_t d = 0; d < z.width; ++d) out[d] = static_cast<T>(sum[d]);
      }
    }
  }
}

}  // namespace

// BLOCK and ARITHMETIC are defined by whoever compiles this: one library a type of blocks.
extern "C" void attend(const Sizes* z, const void* const* blocks, const ARITHMETIC* queries, void* const* mixed,
                       ARITHMETIC* const* log_sums) {
  forward<BLOCK, ARITHMETIC>(*z, blocks, queries, mixed, log_sums);
}

extern "C" void attend_backward(const Sizes* z, const void* const* blocks, const ARITHMETIC* queries,
                                const void* const* d_mixed, const ARITHMETIC* const* d_log_sums,
                                const void* const* added, void* const* d_blocks, ARITHMETIC* d_queries) {
  backward<BLOCK, ARITHMETIC>(*z, blocks, queries, d_mixed, d_log_sums, added, d_blocks, d_queries);
}
