// Phase one of the two-phase schedule for any number n of blocks and S of reads; attend_blocks.py has the equations.
// A block is `rows` rows of `width` values of type T; arithmetic is in A. Whoever compiles this defines BLOCK and
// ARITHMETIC, so that there is one library a type of blocks; what Python calls is in attend_blocks_python.cpp.
//
// A row is in the nearest cache when it is used again, so what counts is how often a value is loaded from there: four dot
// products, or four sums of weighted vectors, are made together, with what they add up in registers. Where memory is used
// first, read or written, the same place of the next row is asked for: what reads ahead in a processor does not follow the
// rows of many blocks.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

using T = BLOCK;
using A = ARITHMETIC;

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
typedef A Vector __attribute__((vector_size(BYTES)));
constexpr int64_t LANES = BYTES / sizeof(A);
// Two vectors at a time, as an addition is started before the one before it is done.
constexpr int64_t STEP = 2 * LANES;
constexpr int TILE = 4;

inline Vector load(const A* from) {
  Vector found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

// A vector, or a single number.
template <typename V, typename From>
inline V load_as(const From* from) {
  if constexpr (std::is_same_v<V, A>) {
    return static_cast<A>(*from);
  } else if constexpr (std::is_same_v<From, A>) {
    return load(from);
  } else {
    Vector found;
    for (int64_t l = 0; l < LANES; ++l) found[l] = static_cast<A>(from[l]);
    return found;
  }
}

template <typename V, typename To>
inline void store(To* to, const V& value) {
  if constexpr (std::is_same_v<V, A>) {
    *to = static_cast<To>(value);
  } else if constexpr (std::is_same_v<To, A>) {
    std::memcpy(to, &value, sizeof value);
  } else {
    for (int64_t l = 0; l < LANES; ++l) to[l] = static_cast<To>(value[l]);
  }
}

// In halves, as a sum one by one would wait for itself.
inline A sum_of(const Vector& lanes) {
  A parts[LANES];
  std::memcpy(parts, &lanes, sizeof parts);
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) parts[l] += parts[l + half];
  return parts[0];
}

// `call(size, begin)` for all of `count` in groups, whose size the compiler knows.
template <typename Call>
inline void in_tiles(int64_t count, Call call) {
  int64_t i = 0;
  for (; i + TILE <= count; i += TILE) call(std::integral_constant<int, TILE>(), i);
  if (count - i == 3) call(std::integral_constant<int, 3>(), i);
  if (count - i == 2) call(std::integral_constant<int, 2>(), i);
  if (count - i == 1) call(std::integral_constant<int, 1>(), i);
}

constexpr bool COPIED = !std::is_same_v<T, A>;

// Dot products of `x` with `count` others; where `x` is a row of a block, it asks for the next.
inline void dots(const A* x, const A* const* others, int64_t count, int64_t width, A* found) {
  in_tiles(count, [=](auto size, int64_t begin) {
    constexpr int R = decltype(size)::value;
    const A* const* of = others + begin;
    Vector sums[R][2] = {};
    int64_t d = 0;
    for (; d + STEP <= width; d += STEP) {
      const Vector first = load(x + d), second = load(x + d + LANES);
      if (!COPIED && begin == 0) {
        __builtin_prefetch(x + d + width);
        __builtin_prefetch(x + d + LANES + width);
      }
      for (int r = 0; r < R; ++r) {
        sums[r][0] += first * load(of[r] + d);
        sums[r][1] += second * load(of[r] + d + LANES);
      }
    }
    for (int r = 0; r < R; ++r) {
      A sum = sum_of(sums[r][0] + sums[r][1]);
      for (int64_t e = d; e < width; ++e) sum += x[e] * of[r][e];
      found[begin + r] = sum;
    }
  });
}

// Sums of the n `vectors`, weighted with coefficients [n, count]: `emit(which, d, values)` gets what there is at `d`.
template <typename Emit>
inline void combine(const A* const* vectors, int64_t n, const A* coefficients, int64_t count, int64_t width, Emit emit) {
  in_tiles(count, [=](auto size, int64_t begin) {
    constexpr int R = decltype(size)::value;
    const A* own = coefficients + begin;
    int64_t d = 0;
    for (; d + STEP <= width; d += STEP) {
      Vector sums[R][2] = {};
      for (int64_t i = 0; i < n; ++i) {
        const Vector first = load(vectors[i] + d), second = load(vectors[i] + d + LANES);
        for (int r = 0; r < R; ++r) {
          sums[r][0] += own[i * count + r] * first;
          sums[r][1] += own[i * count + r] * second;
        }
      }
      for (int r = 0; r < R; ++r) {
        emit(begin + r, d, sums[r][0]);
        emit(begin + r, d + LANES, sums[r][1]);
      }
    }
    for (; d < width; ++d) {
      for (int r = 0; r < R; ++r) {
        A sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += own[i * count + r] * vectors[i][d];
        emit(begin + r, d, sum);
      }
    }
  });
}

// The rows of one token, in the type of the arithmetic: where that is the type of the blocks, the blocks themselves.
struct Rows {
  std::vector<A> copies;
  const void* const* blocks;
  int64_t n, width;

  Rows(const void* const* blocks, int64_t n, int64_t width)
      : copies(COPIED ? n * width : 0), blocks(blocks), n(n), width(width) {}

  void load(int64_t row, const A** at) {
    for (int64_t i = 0; i < n; ++i) {
      const T* source = static_cast<const T*>(blocks[i]) + row * width;
      if constexpr (!COPIED) {
        // Both branches are compiled for every type.
        at[i] = reinterpret_cast<const A*>(source);
      } else {
        A* copy = copies.data() + i * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) copy[d] = static_cast<A>(source[d]);
        at[i] = copy;
      }
    }
  }
};

struct Sizes {
  int64_t n, reads, rows, width, threads;
  double eps, scale;
};

// Of one token: inverse RMS [n], logits [n, S], depth weights [n, S], log-sums [S], and the dot products [n, count] of the
// blocks with other vectors.
struct Scores {
  const Sizes& z;
  int64_t others;
  std::vector<A> inverse_rms, logits, weights, log_sums, products;
  std::vector<const A*> vectors;

  Scores(const Sizes& z, const A* queries, int64_t others)
      : z(z),
        others(others),
        inverse_rms(z.n),
        logits(z.n * z.reads),
        weights(z.n * z.reads),
        log_sums(z.reads),
        products(1 + z.reads + others),
        vectors(1 + z.reads + others) {
    for (int64_t s = 0; s < z.reads; ++s) vectors[1 + s] = queries + s * z.width;
  }

  // Where `compute` finds the other vectors.
  const A** other_vectors() { return vectors.data() + 1 + z.reads; }

  // `with_others` gets the products of each block with the other vectors, [n, others].
  void compute(const A* const* rows, A* with_others) {
    for (int64_t i = 0; i < z.n; ++i) {
      vectors[0] = rows[i];
      dots(rows[i], vectors.data(), vectors.size(), z.width, products.data());
      inverse_rms[i] = A(1) / std::sqrt(products[0] / z.width + A(z.eps));
      for (int64_t s = 0; s < z.reads; ++s) logits[i * z.reads + s] = products[1 + s] * inverse_rms[i] * A(z.scale);
      for (int64_t k = 0; k < others; ++k) with_others[i * others + k] = products[1 + z.reads + k];
    }
    for (int64_t s = 0; s < z.reads; ++s) {
      A peak = logits[s], sum = 0;
      for (int64_t i = 1; i < z.n; ++i) peak = std::max(peak, logits[i * z.reads + s]);
      for (int64_t i = 0; i < z.n; ++i) sum += weights[i * z.reads + s] = std::exp(logits[i * z.reads + s] - peak);
      for (int64_t i = 0; i < z.n; ++i) weights[i * z.reads + s] /= sum;
      log_sums[s] = peak + std::log(sum);
    }
  }
};

// Queries times gains [S, D]; `gains` is null where there are none.
std::vector<A> folded(const Sizes& z, const A* const* queries, const A* const* gains) {
  std::vector<A> found(z.reads * z.width);
  for (int64_t s = 0; s < z.reads; ++s)
    for (int64_t d = 0; d < z.width; ++d) found[s * z.width + d] = gains ? queries[s][d] * gains[s][d] : queries[s][d];
  return found;
}

void forward(const Sizes& z, const void* const* blocks, const A* queries, void* const* mixed, A* const* log_sums) {
#pragma omp parallel num_threads(z.threads)
  {
    Rows rows(blocks, z.n, z.width);
    std::vector<const A*> x(z.n);
    Scores scores(z, queries, 0);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < z.rows; ++row) {
      rows.load(row, x.data());
      scores.compute(x.data(), nullptr);
      combine(x.data(), z.n, scores.weights.data(), z.reads, z.width, [=](int64_t s, int64_t d, const auto& value) {
        T* to = static_cast<T*>(mixed[s]) + row * z.width + d;
        __builtin_prefetch(to + z.width, 1);
        store(to, value);
      });
      for (int64_t s = 0; s < z.reads; ++s) log_sums[s][row] = scores.log_sums[s];
    }
  }
}

// `d_blocks` has a null pointer for every block of which no gradient is wanted, `added` for every one to whose gradient
// nothing is added; `d_queries` is null or [threads, S, D], zeros, of which every thread fills its part, for what the
// queries are with their gains.
void backward(const Sizes& z, const void* const* blocks, const A* queries, const void* const* d_mixed,
              const A* const* d_log_sums, const void* const* added, void* const* d_blocks, A* d_queries) {
  std::vector<int64_t> wanted;
  for (int64_t i = 0; i < z.n; ++i)
    if (d_blocks[i]) wanted.push_back(i);
  const int64_t asked = wanted.size();
#pragma omp parallel num_threads(z.threads)
  {
    Rows rows(blocks, z.n, z.width), d_rows(d_mixed, z.reads, z.width);
    std::vector<const A*> x(z.n);
    Scores scores(z, queries, z.reads);
    // Of a logit's gradient [n, S]: what it is, and what of it is the query's.
    std::vector<A> d_logits(z.n * z.reads), on_query(z.n * z.reads), on_row(z.n);
    // What the gradients of the wanted blocks have of the queries, and of the gradients of what was mixed: [2 S, asked].
    std::vector<A> shares(2 * z.reads * asked);
    A* d_q = d_queries ? d_queries + omp_get_thread_num() * z.reads * z.width : nullptr;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < z.rows; ++row) {
      rows.load(row, x.data());
      d_rows.load(row, scores.other_vectors());
      scores.compute(x.data(), d_logits.data());
      for (int64_t s = 0; s < z.reads; ++s) {
        // A logit changes the mixed by its block, against the mean over the blocks, and the log-sum by its weight.
        A mean = -d_log_sums[s][row];
        for (int64_t i = 0; i < z.n; ++i) mean += scores.weights[i * z.reads + s] * d_logits[i * z.reads + s];
        for (int64_t i = 0; i < z.n; ++i)
          d_logits[i * z.reads + s] = scores.weights[i * z.reads + s] * (d_logits[i * z.reads + s] - mean);
      }
      for (int64_t i = 0; i < z.n; ++i) {
        on_row[i] = 0;
        for (int64_t s = 0; s < z.reads; ++s) {
          on_row[i] += d_logits[i * z.reads + s] * scores.logits[i * z.reads + s];
          on_query[i * z.reads + s] = d_logits[i * z.reads + s] * scores.inverse_rms[i] * A(z.scale);
        }
        on_row[i] *= scores.inverse_rms[i] * scores.inverse_rms[i] / z.width;
      }
      if (d_q)
        combine(x.data(), z.n, on_query.data(), z.reads, z.width, [=](int64_t s, int64_t d, const auto& value) {
          A* to = d_q + s * z.width + d;
          store(to, load_as<std::decay_t<decltype(value)>>(to) + value);
        });
      for (int64_t s = 0; s < z.reads; ++s)
        for (int64_t k = 0; k < asked; ++k) {
          shares[s * asked + k] = on_query[wanted[k] * z.reads + s];
          shares[(z.reads + s) * asked + k] = scores.weights[wanted[k] * z.reads + s];
        }
      combine(scores.vectors.data() + 1, 2 * z.reads, shares.data(), asked, z.width,
              [&](int64_t k, int64_t d, const auto& value) {
                using V = std::decay_t<decltype(value)>;
                const int64_t i = wanted[k], at = row * z.width + d;
                T* to = static_cast<T*>(d_blocks[i]) + at;
                __builtin_prefetch(to + z.width, 1);
                V found = value - on_row[i] * load_as<V>(x[i] + d);
                if (added[i]) {
                  const T* more = static_cast<const T*>(added[i]) + at;
                  __builtin_prefetch(more + z.width);
                  found += load_as<V>(more);
                }
                store(to, found);
              });
    }
  }
}

// `gains` is null where there are none.
void attend(const Sizes& z, const void* const* blocks, const A* const* queries, const A* const* gains,
            void* const* mixed, A* const* log_sums) {
  forward(z, blocks, folded(z, queries, gains).data(), mixed, log_sums);
}

// `d_queries` is null where no gradients of vectors are wanted; `d_gains` is read where there are gains.
void attend_backward(const Sizes& z, const void* const* blocks, const A* const* queries, const A* const* gains,
                     const void* const* d_mixed, const A* const* d_log_sums, const void* const* added,
                     void* const* d_blocks, A* const* d_queries, A* const* d_gains) {
  const int64_t size = z.reads * z.width;
  std::vector<A> d_folded(d_queries ? z.threads * size : 0);
  A* const to = d_queries ? d_folded.data() : nullptr;
  backward(z, blocks, folded(z, queries, gains).data(), d_mixed, d_log_sums, added, d_blocks, to);
  if (!d_queries) return;
  for (int64_t thread = 1; thread < z.threads; ++thread)
    for (int64_t i = 0; i < size; ++i) to[i] += to[thread * size + i];
  for (int64_t s = 0; s < z.reads; ++s)
    for (int64_t d = 0; d < z.width; ++d) {
      const A found = to[s * z.width + d];
      d_queries[s][d] = gains ? found * gains[s][d] : found;
      if (gains) d_gains[s][d] = found * queries[s][d];
    }
}

}  // namespace
