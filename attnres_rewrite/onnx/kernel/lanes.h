// Vectors of float32, and how float32, float16 and bfloat16 in memory become them and come back.
//
// They are vector extensions of GCC and Clang, whose size the caller chooses: one source is compiled for several
// instruction sets, and for processors that have none of these.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define ATTNRES_INLINE inline __attribute__((always_inline))

namespace attnres {

struct Float32 {
  float bits;
};
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// GCC ignores a size of a vector that depends on a template's parameter.
template <int kBytes>
struct VectorTypes;
#define ATTNRES_VECTORS(bytes)                                     \
  template <>                                                      \
  struct VectorTypes<bytes> {                                      \
    typedef float Floats __attribute__((vector_size(bytes)));      \
    typedef uint32_t Words __attribute__((vector_size(bytes)));    \
    typedef uint16_t Halves __attribute__((vector_size(bytes / 2))); \
  };
ATTNRES_VECTORS(16)
ATTNRES_VECTORS(32)
ATTNRES_VECTORS(64)
#undef ATTNRES_VECTORS

template <int kBytes>
struct Vectors {
  static constexpr size_t kCount = kBytes / sizeof(float);
  using Floats = typename VectorTypes<kBytes>::Floats;
  using Words = typename VectorTypes<kBytes>::Words;
  using Halves = typename VectorTypes<kBytes>::Halves;

  static ATTNRES_INLINE Floats floats(Words words) { return reinterpret_cast<Floats>(words); }
  static ATTNRES_INLINE Words words(Floats floats) { return reinterpret_cast<Words>(floats); }

  static ATTNRES_INLINE Floats widened(Float32*, Floats stored) { return stored; }
  static ATTNRES_INLINE Floats narrowed(Float32*, Floats value) { return value; }

  static ATTNRES_INLINE Floats widened(BFloat16*, Halves stored) {
    return floats(__builtin_convertvector(stored, Words) << 16);
  }

  // To nearest, ties to even. Adding to the bits of a NaN could make it a number.
  static ATTNRES_INLINE Halves narrowed(BFloat16*, Floats value) {
    const Words bits = words(value);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words nan = (bits >> 16) | 0x40u;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Halves);
  }

  // The exponent is moved by 112, the difference of the two biases. Infinities and NaNs have the largest one in either
  // format, hence twice. What is below 2^-14 has no leading one, so that one is added and taken off as floats.
  static ATTNRES_INLINE Floats widened(Float16*, Halves stored) {
    const Words bits = __builtin_convertvector(stored, Words);
    const Words magnitude = (bits & 0x7fffu) << 13;
    const Words moved = magnitude + (112u << 23);
    const Words special = magnitude + (224u << 23);
    const Words one = Words{} + (113u << 23);
    const Words small = words(floats(magnitude + one) - floats(one));
    const Words positive = magnitude < (1u << 23) ? small : magnitude >= (31u << 23) ? special : moved;
    return floats(positive | (bits & 0x8000u) << 16);
  }

  // To nearest, ties to even. A half float below 2^-14 is a multiple of 2^-24, the last bit of a float between 0.5 and
  // 1: adding 0.5 rounds it. From 65520 on, the nearest is infinity.
  static ATTNRES_INLINE Halves narrowed(Float16*, Floats value) {
    const Words bits = words(value);
    const Words magnitude = bits & 0x7fffffffu;
    const Words half = Words{} + (126u << 23);
    const Words small = words(floats(magnitude) + floats(half)) - half;
    const Words moved = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Words large = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
    const Words positive = magnitude < (113u << 23) ? small : magnitude >= 0x477ff000u ? large : moved;
    return __builtin_convertvector(positive | (bits >> 16 & 0x8000u), Halves);
  }

  // The first `count` elements at `from`, and zeros.
  template <class T>
  static ATTNRES_INLINE Floats load(const T* from, size_t count = kCount) {
    decltype(narrowed(static_cast<T*>(nullptr), Floats{})) stored{};
    std::memcpy(&stored, from, count * sizeof(T));
    return widened(static_cast<T*>(nullptr), stored);
  }

  template <class T>
  static ATTNRES_INLINE void store(T* to, Floats value, size_t count = kCount) {
    const auto stored = narrowed(static_cast<T*>(nullptr), value);
    std::memcpy(to, &stored, count * sizeof(T));
  }

  static ATTNRES_INLINE float sum(Floats value) {
    float total = 0;
    for (size_t i = 0; i < kCount; ++i) total += value[i];
    return total;
  }
};

}  // namespace attnres
