// Vectors of the instruction set this translation unit is compiled for.
//
// GCC and Clang vector extensions give SSE2, AVX2 and NEON from one source; AVX-512 has its own
// specialisation because its compares yield mask registers, which the extensions cannot name.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../math/scalar.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define QFLUX_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define QFLUX_VECTOR_BYTES 32
#else
#define QFLUX_VECTOR_BYTES 16
#endif

namespace qflux {
namespace {

// An attribute of lambdas, which have no `inline`.
#define QFLUX_INLINE_LAMBDA __attribute__((always_inline))
#define QFLUX_NO_INLINE __attribute__((noinline))

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using Integer = int32_t;
  typedef float Raw __attribute__((vector_size(QFLUX_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(QFLUX_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  using Integer = int64_t;
  typedef double Raw __attribute__((vector_size(QFLUX_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(QFLUX_VECTOR_BYTES)));
};

template <class T>
struct Vector {
  static constexpr int kWidth = QFLUX_VECTOR_BYTES / sizeof(T);
  using Integer = typename Lanes<T>::Integer;
  using Raw = typename Lanes<T>::Raw;
  using Bits = typename Lanes<T>::Bits;

  Raw raw;

  Vector() = default;
  QFLUX_INLINE Vector(Raw r) : raw(r) {}
  QFLUX_INLINE explicit Vector(T value) : raw(value - Raw{}) {}
  QFLUX_INLINE explicit Vector(int value) : Vector(T(value)) {}
};

template <class T>
QFLUX_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v.raw, from, sizeof(v.raw));
  return v;
}
template <class T>
QFLUX_INLINE void store(T* to, Vector<T> v) {
  std::memcpy(to, &v.raw, sizeof(v.raw));
}

// clang-format off
template <class T> QFLUX_INLINE Vector<T> operator+(Vector<T> a, Vector<T> b) { return a.raw + b.raw; }
template <class T> QFLUX_INLINE Vector<T> operator-(Vector<T> a, Vector<T> b) { return a.raw - b.raw; }
template <class T> QFLUX_INLINE Vector<T> operator-(Vector<T> a) { return -a.raw; }
template <class T> QFLUX_INLINE Vector<T> operator*(Vector<T> a, Vector<T> b) { return a.raw * b.raw; }
template <class T> QFLUX_INLINE Vector<T> operator/(Vector<T> a, Vector<T> b) { return a.raw / b.raw; }
// clang-format on

#if defined(__AVX512F__)

template <class T>
struct Mask {
  uint32_t bits;
};

// clang-format off
QFLUX_INLINE Vector<float>  multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) { return {(Vector<float>::Raw)_mm512_fmadd_ps((__m512)a.raw, (__m512)b.raw, (__m512)c.raw)}; }
QFLUX_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) { return {(Vector<double>::Raw)_mm512_fmadd_pd((__m512d)a.raw, (__m512d)b.raw, (__m512d)c.raw)}; }
QFLUX_INLINE Vector<float>  absolute(Vector<float> a) { return {(Vector<float>::Raw)_mm512_abs_ps((__m512)a.raw)}; }
QFLUX_INLINE Vector<double> absolute(Vector<double> a) { return {(Vector<double>::Raw)_mm512_abs_pd((__m512d)a.raw)}; }
QFLUX_INLINE Mask<float>  not_less(Vector<float> a, Vector<float> b) { return {_mm512_cmp_ps_mask((__m512)a.raw, (__m512)b.raw, _CMP_NLT_UQ)}; }
QFLUX_INLINE Mask<double> not_less(Vector<double> a, Vector<double> b) { return {_mm512_cmp_pd_mask((__m512d)a.raw, (__m512d)b.raw, _CMP_NLT_UQ)}; }
QFLUX_INLINE Mask<float>  not_less_equal(Vector<float> a, Vector<float> b) { return {_mm512_cmp_ps_mask((__m512)a.raw, (__m512)b.raw, _CMP_NLE_UQ)}; }
QFLUX_INLINE Mask<double> not_less_equal(Vector<double> a, Vector<double> b) { return {_mm512_cmp_pd_mask((__m512d)a.raw, (__m512d)b.raw, _CMP_NLE_UQ)}; }
QFLUX_INLINE Vector<float>  select(Mask<float> m, Vector<float> a, Vector<float> b) { return {(Vector<float>::Raw)_mm512_mask_blend_ps((__mmask16)m.bits, (__m512)b.raw, (__m512)a.raw)}; }
QFLUX_INLINE Vector<double> select(Mask<double> m, Vector<double> a, Vector<double> b) { return {(Vector<double>::Raw)_mm512_mask_blend_pd((__mmask8)m.bits, (__m512d)b.raw, (__m512d)a.raw)}; }
// clang-format on
template <class T>
QFLUX_INLINE Mask<T> both(Mask<T> a, Mask<T> b) {
  return {a.bits & b.bits};
}
// clang-format off
QFLUX_INLINE Vector<float>  multiply_add_where(Mask<float> m, Vector<float> a, Vector<float> b, Vector<float> c) { return {(Vector<float>::Raw)_mm512_mask3_fmadd_ps((__m512)a.raw, (__m512)b.raw, (__m512)c.raw, (__mmask16)m.bits)}; }
QFLUX_INLINE Vector<double> multiply_add_where(Mask<double> m, Vector<double> a, Vector<double> b, Vector<double> c) { return {(Vector<double>::Raw)_mm512_mask3_fmadd_pd((__m512d)a.raw, (__m512d)b.raw, (__m512d)c.raw, (__mmask8)m.bits)}; }
QFLUX_INLINE Vector<float>  add_where(Mask<float> m, Vector<float> a, Vector<float> c) { return {(Vector<float>::Raw)_mm512_mask_add_ps((__m512)c.raw, (__mmask16)m.bits, (__m512)a.raw, (__m512)c.raw)}; }
QFLUX_INLINE Vector<double> add_where(Mask<double> m, Vector<double> a, Vector<double> c) { return {(Vector<double>::Raw)_mm512_mask_add_pd((__m512d)c.raw, (__mmask8)m.bits, (__m512d)a.raw, (__m512d)c.raw)}; }
QFLUX_INLINE void count(Mask<float> m, Vector<float>::Bits& counter) { counter = (Vector<float>::Bits)_mm512_mask_add_epi32((__m512i)counter, (__mmask16)m.bits, (__m512i)counter, _mm512_set1_epi32(1)); }
QFLUX_INLINE void count(Mask<double> m, Vector<double>::Bits& counter) { counter = (Vector<double>::Bits)_mm512_mask_add_epi64((__m512i)counter, (__mmask8)m.bits, (__m512i)counter, _mm512_set1_epi64(1)); }
// clang-format on
template <class T>
QFLUX_INLINE Vector<T> where(Mask<T> m, Vector<T> a) {
  return select(m, a, Vector<T>(T(0)));
}
// Lanes first <= lane < last.
template <class T>
QFLUX_INLINE Mask<T> lanes_between(int64_t first, int64_t last) {
  constexpr int64_t width = Vector<T>::kWidth;
  const auto below = [](int64_t n) {
    return n <= 0 ? 0u : n >= width ? (1u << width) - 1u : (1u << n) - 1u;
  };
  return {below(last) & ~below(first)};
}

#else

template <class T>
struct Mask {
  typename Vector<T>::Bits bits;
};

template <class T>
QFLUX_INLINE Vector<T> multiply_add(Vector<T> a, Vector<T> b, Vector<T> c) {
  return a.raw * b.raw + c.raw;  // contracted where the instruction set has a fused form
}
template <class T>
QFLUX_INLINE Vector<T> absolute(Vector<T> a) {
  using Bits = typename Vector<T>::Bits;
  using Integer = typename Vector<T>::Integer;
  constexpr Integer kSign = Integer(1) << (8 * sizeof(T) - 1);
  return (typename Vector<T>::Raw)((Bits)a.raw & ~(kSign - Bits{}));
}
#if defined(__AVX__)
// The extensions spell these with a complement, which costs an instruction.
// clang-format off
QFLUX_INLINE Mask<float>  not_less(Vector<float> a, Vector<float> b) { return {(Vector<float>::Bits)_mm256_cmp_ps((__m256)a.raw, (__m256)b.raw, _CMP_NLT_UQ)}; }
QFLUX_INLINE Mask<double> not_less(Vector<double> a, Vector<double> b) { return {(Vector<double>::Bits)_mm256_cmp_pd((__m256d)a.raw, (__m256d)b.raw, _CMP_NLT_UQ)}; }
QFLUX_INLINE Mask<float>  not_less_equal(Vector<float> a, Vector<float> b) { return {(Vector<float>::Bits)_mm256_cmp_ps((__m256)a.raw, (__m256)b.raw, _CMP_NLE_UQ)}; }
QFLUX_INLINE Mask<double> not_less_equal(Vector<double> a, Vector<double> b) { return {(Vector<double>::Bits)_mm256_cmp_pd((__m256d)a.raw, (__m256d)b.raw, _CMP_NLE_UQ)}; }
// clang-format on
#else
template <class T>
QFLUX_INLINE Mask<T> not_less(Vector<T> a, Vector<T> b) {
  return {~(a.raw < b.raw)};
}
template <class T>
QFLUX_INLINE Mask<T> not_less_equal(Vector<T> a, Vector<T> b) {
  return {~(a.raw <= b.raw)};
}
#endif
template <class T>
QFLUX_INLINE Vector<T> select(Mask<T> m, Vector<T> a, Vector<T> b) {
  return m.bits ? a.raw : b.raw;
}
template <class T>
QFLUX_INLINE Mask<T> both(Mask<T> a, Mask<T> b) {
  return {a.bits & b.bits};
}
// a where the mask holds, else 0.
template <class T>
QFLUX_INLINE Vector<T> where(Mask<T> m, Vector<T> a) {
  return (typename Vector<T>::Raw)((typename Vector<T>::Bits)a.raw & m.bits);
}
// a * b + c where the mask holds, else c.
template <class T>
QFLUX_INLINE Vector<T> multiply_add_where(Mask<T> m, Vector<T> a, Vector<T> b, Vector<T> c) {
  return multiply_add(where(m, a), b, c);
}
template <class T>
QFLUX_INLINE Vector<T> add_where(Mask<T> m, Vector<T> a, Vector<T> c) {
  return where(m, a) + c;
}
template <class T>
QFLUX_INLINE void count(Mask<T> m, typename Vector<T>::Bits& counter) {
  counter -= m.bits;
}
template <class T>
QFLUX_INLINE Mask<T> lanes_between(int64_t first, int64_t last) {
  using Bits = typename Vector<T>::Bits;
  using Integer = typename Vector<T>::Integer;
  constexpr int64_t width = Vector<T>::kWidth;
  const auto clamped = [](int64_t n) {
    return static_cast<Integer>(n < 0 ? 0 : n < width ? n : width);
  };
  Bits lane;
  for (int l = 0; l < width; ++l) lane[l] = l;
  return {(lane >= clamped(first) - Bits{}) & (lane < clamped(last) - Bits{})};
}

#endif

template <class T>
QFLUX_INLINE Mask<T> less(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  Mask<T> not_less_mask = not_less(a, b);
  return {~not_less_mask.bits & ((1u << Vector<T>::kWidth) - 1u)};
#else
  return {a.raw < b.raw};
#endif
}
// A NaN stays one.
template <class T>
QFLUX_INLINE Vector<T> at_most_one(Vector<T> a) {
  const Vector<T> one(T(1));
  return select(less(one, a), one, a);
}
// Of numbers; a NaN is unequal to nothing.
template <class T>
QFLUX_INLINE Mask<T> unequal(Vector<T> a, Vector<T> b) {
  return less(Vector<T>(T(0)), absolute(a - b));
}
template <class T>
QFLUX_INLINE Vector<T> not_negative(Vector<T> a) {
  return where(not_less(a, Vector<T>(T(0))), a);
}
template <class T>
QFLUX_INLINE Vector<T> reciprocal(Vector<T> a) {
  return Vector<T>(T(1)) / a;
}
template <class T>
QFLUX_INLINE Vector<T> square_root(Vector<T> a) {
  typename Vector<T>::Raw root;
  for (int lane = 0; lane < Vector<T>::kWidth; ++lane) root[lane] = qflux::square_root(a.raw[lane]);
  return root;
}

// e^a, a few units in the last place off; where it is hardly a number, infinity or next to zero.
template <class T>
QFLUX_INLINE Vector<T> exponential(Vector<T> a) {
  using V = Vector<T>;
  using Bits = typename V::Bits;
  constexpr bool kWide = sizeof(T) == 8;
  constexpr int kMantissa = kWide ? 52 : 23, kTerms = kWide ? 13 : 7;
  const T most = kWide ? T(708) : T(87);
  const V low(-most), high(most);
  const Mask<T> beyond = less(high, a);
  a = select(less(a, low), low, select(beyond, high, a));  // a NaN stays one
  // a = n ln 2 + r. Next to such a number the integers are a unit in the last place apart.
  const V shift(T(1.5) * T(typename V::Integer(1) << kMantissa));
  const V shifted = multiply_add(a, V(T(1.4426950408889634)), shift);
  const V n = shifted - shift;
  // ln 2 in two parts, of which the first has few enough bits for its product with n.
  const V first(kWide ? T(0.693147180369123816490) : T(0.693359375));
  const V rest(kWide ? T(1.90821492927058770002e-10) : T(-2.12194440e-4));
  const V r = multiply_add(-n, rest, multiply_add(-n, first, a));
  V power(T(1));
  for (int k = kTerms; k > 0; --k) power = multiply_add(power * r, V(T(1) / T(k)), V(T(1)));
  const Bits scale = ((Bits)shifted.raw - (Bits)shift.raw) << kMantissa;
  const V result = (typename V::Raw)((Bits)power.raw + scale);
  return select(beyond, V(T(INFINITY)), result);
}

// A bit for each lane that holds.
template <class T>
QFLUX_INLINE uint32_t lane_bits(Mask<T> mask) {
#if defined(__AVX512F__)
  return mask.bits;
#else
  uint32_t bits = 0;
#if defined(__AVX__)
  if constexpr (sizeof(T) == 4)
    bits = static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask.bits));
  else
    bits = static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask.bits));
#else
  for (int lane = 0; lane < Vector<T>::kWidth; ++lane) bits |= (mask.bits[lane] ? 1u : 0u) << lane;
#endif
  return bits;
#endif
}

// A number as a type.
template <int kNumber>
struct Constant {
  static constexpr int kValue = kNumber;
  QFLUX_INLINE constexpr operator int() const { return kNumber; }
};

// Calls body(0) to body(kCount - 1). The index is a type, so that arrays over it live in registers
// even where the compiler would not unroll a loop.
template <int kCount, int kIndex = 0, class Body>
QFLUX_INLINE void each_column(const Body& body) {
  if constexpr (kIndex < kCount) {
    body(Constant<kIndex>());
    each_column<kCount, kIndex + 1>(body);
  }
}

// Those of the standard library are weak functions where they are not inlined.
QFLUX_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
QFLUX_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// What is left of so many numbers when, again and again, the second half of them is joined to the
// first: one after the other would wait for each.
template <int kCount, class T, class Join>
QFLUX_INLINE T fold(T* number, const Join& join) {
  if constexpr (kCount > 1) {
    for (int l = 0; l < kCount / 2; ++l) number[l] = join(number[l], number[l + kCount / 2]);
    return fold<kCount / 2>(number, join);
  }
  return number[0];
}

// The sum of the lanes.
template <class T>
QFLUX_INLINE T across(Vector<T> v) {
  T lane[Vector<T>::kWidth];
  store(lane, v);
  return fold<Vector<T>::kWidth>(lane, [](T a, T b) QFLUX_INLINE_LAMBDA { return a + b; });
}

// Calls body(first, doubles) for the lanes from `first` on, as many as there are doubles in a
// vector.
template <class T, class Body>
QFLUX_INLINE void each_wide(Vector<T> v, const Body& body) {
  using D = Vector<double>;
  if constexpr (sizeof(T) == sizeof(double)) {
    body(0, v);
  } else {
#if defined(__AVX512F__)
    // Forms without a mask leave a warning of some compilers about their own headers.
    const __m256d low = _mm512_maskz_extractf64x4_pd(0xf, (__m512d)v.raw, 0);
    const __m256d high = _mm512_maskz_extractf64x4_pd(0xf, (__m512d)v.raw, 1);
    body(0, D{(D::Raw)_mm512_maskz_cvtps_pd(0xff, _mm256_castpd_ps(low))});
    body(D::kWidth, D{(D::Raw)_mm512_maskz_cvtps_pd(0xff, _mm256_castpd_ps(high))});
#elif defined(__AVX__)
    const __m256 all = (__m256)v.raw;
    body(0, D{(D::Raw)_mm256_cvtps_pd(_mm256_castps256_ps128(all))});
    body(D::kWidth, D{(D::Raw)_mm256_cvtps_pd(_mm256_extractf128_ps(all, 1))});
#else
    T lane[Vector<T>::kWidth];
    double wide[Vector<T>::kWidth];
    store(lane, v);
    for (int l = 0; l < Vector<T>::kWidth; ++l) wide[l] = lane[l];
    for (int l = 0; l < Vector<T>::kWidth; l += D::kWidth) body(l, load(wide + l));
#endif
  }
}

// Zeroed memory. Those of the standard library are weak functions, of which a program keeps one
// copy: it may be the one of an instruction set that the machine does not have.
template <class T>
class Array {
 public:
  explicit Array(int64_t count)
      : data_(count > 0 ? new T[static_cast<size_t>(count)]() : nullptr) {}
  ~Array() { delete[] data_; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t n) const { return data_[n]; }

 private:
  T* const data_;
};

}  // namespace
}  // namespace qflux
