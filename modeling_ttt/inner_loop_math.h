// Small matrix products, GELU and LayerNorm on rows that are padded with zeros to whole vectors.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr double INNER_EPS = 1e-6;
constexpr double GELU_A = 1.5957691216057308;  // 2 sqrt(2 / pi)
constexpr double GELU_C = 0.044715 * GELU_A;
constexpr double GELU_FAR = 1e4;  // beyond, the derivatives are constant and the powers of x overflow

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T>
struct Simd {
  static constexpr int n = VECTOR_BYTES / sizeof(T);
  typedef T vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <class T>
int padded(int64_t width) {
  constexpr int n = Simd<T>::n;
  return int((width + n - 1) / n * n);
}

// ------------------------------------------------------------------ small matrix products

// Compilers would rather load a vector again for every row that it is multiplied with.
#if defined(__x86_64__) && defined(__GNUC__)
#define KEEP_IN_REGISTER(v) asm("" : "+x"(v))
#elif defined(__aarch64__) && defined(__GNUC__)
#define KEEP_IN_REGISTER(v) asm("" : "+w"(v))
#else
#define KEEP_IN_REGISTER(v)
#endif

template <class T, int ROWS, int VECTORS>
inline void tile(int depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t ldb, T* c, int64_t ldc,
                 bool add, T alpha) {
  using vec = typename Simd<T>::vec;
  constexpr int n = Simd<T>::n;
  vec sum[ROWS][VECTORS] = {};
  for (int p = 0; p < depth; ++p) {
    vec right[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      right[j] = *(const vec*)(b + p * ldb + j * n);
      KEEP_IN_REGISTER(right[j]);
    }
    for (int i = 0; i < ROWS; ++i) {
      const T left = a[i * a_row + p * a_step];
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      vec* out = (vec*)(c + i * ldc + j * n);
      *out = add ? *out + alpha * sum[i][j] : alpha * sum[i][j];
    }
}

template <class T, int VECTORS>
inline void strip(int rows, int depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t ldb, T* c,
                  int64_t ldc, bool add, T alpha) {
  int i = 0;
  for (; i + 4 <= rows; i += 4)
    tile<T, 4, VECTORS>(depth, a + i * a_row, a_row, a_step, b, ldb, c + i * ldc, ldc, add, alpha);
  for (; i < rows; ++i)
    tile<T, 1, VECTORS>(depth, a + i * a_row, a_row, a_step, b, ldb, c + i * ldc, ldc, add, alpha);
}

// c [rows, columns] = alpha a b (+ c): a(i, p) = a[i * a_row + p * a_step], `columns` in whole vectors.
template <class T>
void product(int rows, int columns, int depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t ldb,
             T* c, int64_t ldc, bool add, T alpha = 1) {
  constexpr int n = Simd<T>::n;
  int j = 0;
  for (; j + 2 * n <= columns; j += 2 * n)
    strip<T, 2>(rows, depth, a, a_row, a_step, b + j, ldb, c + j, ldc, add, alpha);
  if (j < columns) strip<T, 1>(rows, depth, a, a_row, a_step, b + j, ldb, c + j, ldc, add, alpha);
}

template <class T>
void transpose(int rows, int columns, const T* a, int64_t lda, T* b, int64_t ldb) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) b[j * ldb + i] = a[i * lda + j];
}

template <class T>
T dot(int width, const T* a, const T* b) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < width; ++i) sum += a[i] * b[i];
  return sum;
}

// ------------------------------------------------------------------ GELU by the logistic function

inline Simd<float>::vec exponential(Simd<float>::vec x) {
  using vec = Simd<float>::vec;
  typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
  const vec low = vec{} - 87.0f, high = vec{} + 88.0f;
  x = x < low ? low : x;  // NaN stays
  x = x > high ? high : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23 rounds to the nearest whole number
  vec whole = (x * 1.44269504f + magic) - magic;
  vec r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // coefficients: Cephes expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ints bits = (__builtin_convertvector(whole, ints) + 127) << 23;
  vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline Simd<double>::vec exponential(Simd<double>::vec x) {
  for (int i = 0; i < Simd<double>::n; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
inline V logistic(V v) {
  return 1 / (1 + exponential(-v));
}

// x logistic(x (A + C x^2)) over `count` numbers in whole vectors; the gate is kept where it is wanted.
template <class T>
void gelu(int count, const T* x, T* out, T* gate) {
  using vec = typename Simd<T>::vec;
  for (int i = 0; i < count; i += Simd<T>::n) {
    vec u = *(const vec*)(x + i);
    vec h = logistic<vec>(u * (T(GELU_A) + T(GELU_C) * u * u));
    if (gate) *(vec*)(gate + i) = h;
    *(vec*)(out + i) = u * h;
  }
}

// First derivative and, where wanted, the second.
template <class T>
void gelu_slopes(int count, const T* x, const T* gate, T* slope, T* bend) {
  using vec = typename Simd<T>::vec;
  const vec far = vec{} + T(GELU_FAR);
  for (int i = 0; i < count; i += Simd<T>::n) {
    vec u = *(const vec*)(x + i), h = *(const vec*)(gate + i);
    u = u > far ? far : u;
    u = u < -far ? -far : u;
    vec bump = h * (1 - h), d = T(GELU_A) + T(3 * GELU_C) * u * u;
    *(vec*)(slope + i) = d * u * bump + h;
    if (bend) *(vec*)(bend + i) = (((1 - 2 * h) * u * d + 4) * d - T(2 * GELU_A)) * bump;
  }
}

// ------------------------------------------------------------------ the LayerNorm of the inner loss

// normed = (z - mean) rstd for every row.
template <class T>
void normalise(int rows, int width, int ld, const T* z, T* normed, T* rstd) {
  for (int t = 0; t < rows; ++t) {
    const T* in = z + t * ld;
    T* out = normed + t * ld;
    T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < width; ++i) sum += in[i];
    const T mean = sum / width;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < width; ++i) squares += (in[i] - mean) * (in[i] - mean);
    rstd[t] = 1 / std::sqrt(squares / width + T(INNER_EPS));
#pragma omp simd
    for (int i = 0; i < width; ++i) out[i] = (in[i] - mean) * rstd[t];
  }
}

// out = rstd (u - mean(u) - normed mean(u normed)): the backward of the norm without affine map.
template <class T>
void norm_backward(int width, const T* u, const T* normed, T rstd, T* out) {
  T sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (int i = 0; i < width; ++i) sum += u[i], along += u[i] * normed[i];
  sum /= width, along /= width;
#pragma omp simd
  for (int i = 0; i < width; ++i) out[i] = rstd * (u[i] - sum - normed[i] * along);
}

}  // namespace
