// The inner loop of a TTT layer for CPUs: dual form (arXiv 2407.04620, section 2.5), forward and backward.
//
// A batch row and head is one task; it walks over its mini-batches with everything it needs in the caches of a core.
// The net is a chain of `depth` linear maps with tanh-GELU between. Weights and bias of a map are one matrix [W; b],
// [in + 1, out]. Matrices are row-major; rows are padded with zeros to whole vectors inside a task. Letters are those
// of the Python backends: x inputs and g gradients of the maps for the keys, z their outputs, y inputs and w outputs
// for the queries, d... adjoints. `native_call.py` builds the `Call`; the formulas are those of `chunked_forward.py`
// and `chunked_backward.py`, where they are explained.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr int MAX_DEPTH = 6;
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

struct Tokens {  // [B, H, C, f], contiguous in f
  void* data;
  int64_t row, head, column;  // strides in elements
};

}  // namespace

extern "C" struct Call {
  int64_t batch, heads, count, size, depth, stride, threads;
  int64_t widths[MAX_DEPTH + 1];
  Tokens q, k, v, z;
  void *lr, *tau, *ln_weight, *ln_bias;            // [B, H, C], [K], [H, f], [H, f]
  void *start[MAX_DEPTH], *initial[MAX_DEPTH];     // [N, in + 1, out]
  void *carried_x[MAX_DEPTH], *carried_g[MAX_DEPTH];  // [N, K, .]
  uint8_t *carried_slots, *complete, *reset, *held;   // [B, K], [B, M], [B, M], [B, K]; null where all or none
  int64_t* last;                                      // [B]
  void* norm;                                         // [B, H, C]
  void* gradients;                                    // [B, H, C, sum of out widths]
  void *weights[MAX_DEPTH], *states[MAX_DEPTH];       // [N, in + 1, out], [S, N, in + 1, out]
  void *rows_x[MAX_DEPTH], *rows_g[MAX_DEPTH];        // [N, K, .]
  // Backward: `z`, `norm`, `weights` and `rows` hold the adjoints of the outputs (null where there is none).
  Tokens dq, dk, dv;
  void *dlr, *dtau, *dln_weight, *dln_bias;  // [B, H, C], [N, K], [N, f], [N, f]
  void *dstart[MAX_DEPTH], *dinitial[MAX_DEPTH];
  void *dcarried_x[MAX_DEPTH], *dcarried_g[MAX_DEPTH];
};

namespace {

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

// ------------------------------------------------------------------ what a task keeps

// Zeroed memory in whole vectors, cut off one buffer.
template <class T>
struct Arena {
  T* data = nullptr;
  int64_t used = 0, room;

  explicit Arena(int64_t count) : room(count) {
    data = (T*)std::calloc(count + 64 / sizeof(T), sizeof(T));
    if (!data) throw std::bad_alloc();
  }
  ~Arena() { std::free(data); }
  Arena(const Arena&) = delete;
  T* take(int64_t count) {
    T* p = data + used;
    used += (count + 15) / 16 * 16;
    return p;
  }
};

template <class T>
struct Sizes {
  int K, depth, ldk, width[MAX_DEPTH + 1], ld[MAX_DEPTH + 1], widest = 0;
  int64_t weights[MAX_DEPTH], all_weights = 0, all_widths = 0;  // padded numbers of [W; b]

  explicit Sizes(const Call& c) : K(c.size), depth(c.depth), ldk(padded<T>(c.size)) {
    for (int i = 0; i <= depth; ++i) {
      width[i] = c.widths[i], ld[i] = padded<T>(c.widths[i]);
      widest = std::max(widest, std::max(ld[i], width[i] + 1));
    }
    for (int i = 0; i < depth; ++i) {
      weights[i] = int64_t(width[i] + 1) * ld[i + 1];
      all_weights += weights[i] + 16;
      all_widths += c.widths[i + 1];
    }
  }
};

// What the writes of one mini-batch are made of; all but `x[0]` and `target` follow from the weights.
template <class T>
struct Writes {
  T *x[MAX_DEPTH], *z[MAX_DEPTH], *g[MAX_DEPTH], *gate[MAX_DEPTH], *slope[MAX_DEPTH], *passed[MAX_DEPTH];
  T *residual, *normed, *rstd;

  static int64_t numbers(const Sizes<T>& s) { return int64_t(s.K) * s.widest * (6 * s.depth + 3) + 1024; }

  void place(const Sizes<T>& s, Arena<T>& arena) {
    for (int i = 0; i < s.depth; ++i) {
      x[i] = arena.take(s.K * s.ld[i]);
      for (T** p : {&z[i], &g[i], &gate[i], &slope[i], &passed[i]}) *p = arena.take(s.K * s.ld[i + 1]);
    }
    const int out = s.ld[s.depth];
    residual = arena.take(s.K * out), normed = arena.take(s.K * out), rstd = arena.take(s.K);
  }
};

template <class T>
T* at(const Tokens& tokens, int64_t b, int64_t h, int64_t column) {
  return (T*)tokens.data + b * tokens.row + h * tokens.head + column * tokens.column;
}

template <class T>
void copy_rows(int rows, int width, const T* from, int64_t ld_from, T* to, int64_t ld_to) {
  for (int i = 0; i < rows; ++i) std::memcpy(to + i * ld_to, from + i * ld_from, width * sizeof(T));
}

// One batch row and head of a call.
template <class T>
struct Task {
  const Call& c;
  const Sizes<T>& s;
  int64_t b, h, n, index;  // index: n-th task, mini-batch at hand
  const T *tau, *ln_weight, *ln_bias, *lr;

  Task(const Call& call, const Sizes<T>& sizes, int64_t number)
      : c(call), s(sizes), b(number / call.heads), h(number % call.heads), n(number), index(0) {
    const int f = s.width[s.depth];
    tau = (const T*)c.tau;
    ln_weight = (const T*)c.ln_weight + h * f, ln_bias = (const T*)c.ln_bias + h * f;
    lr = (const T*)c.lr + n * c.count * c.size;
  }

  bool resets() const { return c.reset && c.reset[b * c.count + index]; }
  bool commits() const { return !c.complete || c.complete[b * c.count + index]; }
  bool carries() const { return index == 0 && c.carried_slots; }
  bool carried(int t) const { return c.carried_slots[b * s.K + t]; }
  bool ends() const { return c.held && index == (c.last ? c.last[b] : c.count - 1); }
  bool held(int t) const { return c.held[b * s.K + t]; }
  const T* rates() const { return lr + index * s.K; }

  // [N, in + 1, out] <-> padded.
  void load_weights(void* const* from, T* const* to) const {
    for (int i = 0; i < s.depth; ++i) {
      const int64_t count = int64_t(s.width[i] + 1) * s.width[i + 1];
      copy_rows<T>(s.width[i] + 1, s.width[i + 1], (const T*)from[i] + n * count, s.width[i + 1], to[i], s.ld[i + 1]);
    }
  }
  void store_weights(const T* const* from, void* const* to, int64_t group = 0, bool add = false) const {
    for (int i = 0; i < s.depth; ++i) {
      const int64_t count = int64_t(s.width[i] + 1) * s.width[i + 1];
      T* out = (T*)to[i] + (group * c.batch * c.heads + n) * count;
      for (int r = 0; r <= s.width[i]; ++r)
        for (int j = 0; j < s.width[i + 1]; ++j) {
          T& place = out[r * s.width[i + 1] + j];
          place = from[i][r * s.ld[i + 1] + j] + (add ? place : 0);
        }
    }
  }

  // z = [x, 1] [W; b]
  void map(int i, const T* weights, const T* x, T* z) const {
    const int ld = s.ld[i + 1];
    const T* bias = weights + int64_t(s.width[i]) * ld;
    for (int t = 0; t < s.K; ++t) std::memcpy(z + t * ld, bias, ld * sizeof(T));
    product<T>(s.K, ld, s.width[i], x, s.ld[i], 1, weights, ld, z, ld, true);
  }

  // out [K, in] (+)= g W^T; `room` holds [out, ldk] and [in, ldk].
  void map_back(int i, const T* weights, const T* g, T* out, bool add, T* room) const {
    const int ld = s.ld[i + 1], in = s.width[i], ldk = s.ldk;
    T *turned = room, *result = room + s.ld[i + 1] * ldk;
    transpose<T>(s.K, s.width[i + 1], g, ld, turned, ldk);
    product<T>(in, ldk, s.width[i + 1], weights, ld, 1, turned, ldk, result, ldk, false);
    for (int t = 0; t < s.K; ++t)
      for (int j = 0; j < in; ++j) out[t * s.ld[i] + j] = result[j * ldk + t] + (add ? out[t * s.ld[i] + j] : 0);
  }

  // Keys of the mini-batch and the part of the inner gradient that no weight is in: gamma (beta - (v - k)).
  void load_tokens(Writes<T>& m) const {
    const int f = s.width[0], ld = s.ld[0];
    for (int t = 0; t < s.K; ++t) {
      const T* k = at<T>(c.k, b, h, index * s.K + t);
      const T* v = at<T>(c.v, b, h, index * s.K + t);
      std::memcpy(m.x[0] + t * ld, k, f * sizeof(T));
      T* out = m.residual + t * ld;
      for (int i = 0; i < f; ++i) out[i] = ln_weight[i] * (ln_bias[i] - v[i] + k[i]);
    }
  }

  // Inputs, outputs and gradients of every map for the tokens of a mini-batch, all at the weights of its start.
  void write(const T* const* weights, Writes<T>& m, T* room) const {
    const int last = s.depth - 1, f = s.width[s.depth], ld = s.ld[s.depth];
    for (int i = 0; i < s.depth; ++i) {
      map(i, weights[i], m.x[i], m.z[i]);
      if (i < last) gelu<T>(s.K * s.ld[i + 1], m.z[i], m.x[i + 1], m.gate[i]);
    }
    normalise<T>(s.K, f, ld, m.z[last], m.normed, m.rstd);
    for (int t = 0; t < s.K; ++t) {
      T* upstream = room;
      for (int i = 0; i < f; ++i)
        upstream[i] = m.residual[t * ld + i] + ln_weight[i] * ln_weight[i] * m.normed[t * ld + i];
      norm_backward<T>(f, upstream, m.normed + t * ld, m.rstd[t], m.g[last] + t * ld);
    }
    for (int i = last; i > 0; --i) {
      map_back(i, weights[i], m.g[i], m.passed[i - 1], false, room);
      const int count = s.K * s.ld[i];
      gelu_slopes<T>(count, m.z[i - 1], m.gate[i - 1], m.slope[i - 1], (T*)nullptr);
      for (int j = 0; j < count; ++j) m.g[i - 1][j] = m.passed[i - 1][j] * m.slope[i - 1][j];
    }
    if (carries()) carry_in(m);
  }

  // Rows that an earlier call wrote take their slots of the first mini-batch; the keys hold theirs already.
  void carry_in(Writes<T>& m) const {
    for (int t = 0; t < s.K; ++t) {
      if (!carried(t)) continue;
      for (int i = 0; i < s.depth; ++i) {
        const int64_t row = n * s.K + t;
        std::memcpy(m.g[i] + t * s.ld[i + 1], (T*)c.carried_g[i] + row * s.width[i + 1], s.width[i + 1] * sizeof(T));
        if (i) std::memcpy(m.x[i] + t * s.ld[i], (T*)c.carried_x[i] + row * s.width[i], s.width[i] * sizeof(T));
      }
    }
  }

  // products [t, s] = y_t x_s + 1 and scores = tau_t lr_s products for s <= t, zeros beyond.
  void score(int i, const T* y, const T* x, T* products, T* scores, T* room) const {
    const int ldk = s.ldk;
    transpose<T>(s.K, s.width[i], x, s.ld[i], room, ldk);
    product<T>(s.K, ldk, s.width[i], y, s.ld[i], 1, room, ldk, products, ldk, false);
    for (int t = 0; t < s.K; ++t)
      for (int j = 0; j < ldk; ++j) {
        products[t * ldk + j] = j <= t ? products[t * ldk + j] + 1 : 0;
        scores[t * ldk + j] = j <= t ? products[t * ldk + j] * tau[t] * rates()[j] : 0;
      }
  }

  // w = [y, 1] [W; b] - scores g
  void read_map(int i, const T* weights, const T* y, const T* scores, const T* g, T* w) const {
    map(i, weights, y, w);
    product<T>(s.K, s.ld[i + 1], s.K, scores, s.ldk, 1, g, s.ld[i + 1], w, s.ld[i + 1], true, T(-1));
  }

  // [W; b] += sum over tokens of [x_s, 1] (x) g_s, the bias where wanted.
  void add_outer(int i, T* weights, const T* x, const T* g, bool bias) const {
    const int ld = s.ld[i + 1];
    product<T>(s.width[i], ld, s.K, x, 1, s.ld[i], g, ld, weights, ld, true);
    if (!bias) return;
    T* out = weights + int64_t(s.width[i]) * ld;
    for (int t = 0; t < s.K; ++t)
#pragma omp simd
      for (int j = 0; j < s.width[i + 1]; ++j) out[j] += g[t * ld + j];
  }

  void commit(T* const* weights, const Writes<T>& m, T* room) const {
    for (int i = 0; i < s.depth; ++i) {
      const int ld = s.ld[i + 1];
      for (int t = 0; t < s.K; ++t) {
        const T rate = -tau[s.K - 1] * rates()[t];
        for (int j = 0; j < ld; ++j) room[t * ld + j] = rate * m.g[i][t * ld + j];
      }
      add_outer(i, weights[i], m.x[i], room, true);
    }
  }

  // Squared norm of the inner gradient of a token at map i: (|x|^2 + 1) |g|^2.
  T squared_norm(const Writes<T>& m, int i, int t) const {
    const T* x = m.x[i] + t * s.ld[i];
    const T* g = m.g[i] + t * s.ld[i + 1];
    return (dot<T>(s.width[i], x, x) + 1) * dot<T>(s.width[i + 1], g, g);
  }

  static int64_t room_numbers(const Sizes<T>& s) {
    return int64_t(s.widest) * (s.ldk * 2 + s.K) + 1024;
  }
};

// ------------------------------------------------------------------ forward

template <class T>
struct Forward : Task<T> {
  using Task<T>::c;
  using Task<T>::s;
  using Task<T>::b;
  using Task<T>::h;
  using Task<T>::n;
  using Task<T>::index;

  using Task<T>::Task;

  static int64_t numbers(const Sizes<T>& s) {
    return s.all_weights + Writes<T>::numbers(s) + 2 * s.K * s.widest + 2 * s.K * s.ldk + Task<T>::room_numbers(s) +
           1024;
  }

  void run(Arena<T>& arena) {
    T *weights[MAX_DEPTH], *y[2];
    Writes<T> m;
    for (int i = 0; i < s.depth; ++i) weights[i] = arena.take(s.weights[i]);
    m.place(s, arena);
    y[0] = arena.take(s.K * s.widest), y[1] = arena.take(s.K * s.widest);
    T* products = arena.take(s.K * s.ldk);
    T* scores = arena.take(s.K * s.ldk);
    T* room = arena.take(Task<T>::room_numbers(s));
    this->load_weights(c.start, weights);
    for (index = 0; index < c.count; ++index) {
      if (this->resets()) this->load_weights(c.initial, weights);
      if (c.stride && index % c.stride == 0) this->store_weights(weights, c.states, index / c.stride);
      this->load_tokens(m);
      this->write(weights, m, room);
      read(weights, m, y, products, scores, room);
      collect(m);
      if (this->commits()) this->commit(weights, m, room);
    }
    this->store_weights(weights, c.weights);
  }

  void read(T* const* weights, const Writes<T>& m, T* const* y, T* products, T* scores, T* room) {
    const int f = s.width[0], last = s.depth - 1;
    std::memset(y[0], 0, s.K * s.widest * sizeof(T));
    for (int t = 0; t < s.K; ++t)
      std::memcpy(y[0] + t * s.ld[0], at<T>(c.q, b, h, index * s.K + t), f * sizeof(T));
    for (int i = 0; i <= last; ++i) {
      this->score(i, y[0], m.x[i], products, scores, room);
      this->read_map(i, weights[i], y[0], scores, m.g[i], y[1]);
      if (i < last) gelu<T>(s.K * s.ld[i + 1], y[1], y[0], (T*)nullptr);
    }
    for (int t = 0; t < s.K; ++t)
      std::memcpy(at<T>(c.z, b, h, index * s.K + t), y[1] + t * s.ld[s.depth], s.width[s.depth] * sizeof(T));
  }

  void collect(const Writes<T>& m) {
    const int64_t first = n * c.count * s.K + index * s.K;
    if (c.norm)
      for (int t = 0; t < s.K; ++t) {
        T sum = 0;
        for (int i = 0; i < s.depth; ++i) sum += this->squared_norm(m, i, t);
        ((T*)c.norm)[first + t] = std::sqrt(sum);
      }
    if (c.gradients)
      for (int t = 0; t < s.K; ++t) {
        T* out = (T*)c.gradients + (first + t) * s.all_widths;
        for (int i = 0; i < s.depth; out += s.width[++i])
          std::memcpy(out, m.g[i] + t * s.ld[i + 1], s.width[i + 1] * sizeof(T));
      }
    if (!this->ends()) return;
    for (int i = 0; i < s.depth; ++i)
      for (int t = 0; t < s.K; ++t) {
        T* x = (T*)c.rows_x[i] + (n * s.K + t) * s.width[i];
        T* g = (T*)c.rows_g[i] + (n * s.K + t) * s.width[i + 1];
        const bool keep = this->held(t);
        const T rate = this->rates()[t];
        for (int j = 0; j < s.width[i]; ++j) x[j] = keep ? m.x[i][t * s.ld[i] + j] : 0;
        for (int j = 0; j < s.width[i + 1]; ++j) g[j] = keep ? rate * m.g[i][t * s.ld[i + 1] + j] : 0;
      }
  }
};

// ------------------------------------------------------------------ backward

template <class T>
struct Backward : Task<T> {
  using Task<T>::c;
  using Task<T>::s;
  using Task<T>::b;
  using Task<T>::h;
  using Task<T>::n;
  using Task<T>::index;
  using Task<T>::tau;
  using Task<T>::ln_weight;
  using Task<T>::ln_bias;

  using Task<T>::Task;

  T *after[MAX_DEPTH];                                  // adjoint of the weights after the mini-batch at hand
  T *dx[MAX_DEPTH], *dg[MAX_DEPTH], *dz[MAX_DEPTH];     // [K, in], [K, out], [K, out]
  T *y[MAX_DEPTH], *w[MAX_DEPTH], *slope_w[MAX_DEPTH], *dw[MAX_DEPTH];
  T *products[MAX_DEPTH], *scores[MAX_DEPTH];
  T *rate, *dproduct, *dy, *commit_adjoint, *scaled, *bend, *room, *dlr, *dtau, *row;

  static int64_t numbers(const Sizes<T>& s, int64_t stride) {
    return stride * (s.all_weights + Writes<T>::numbers(s)) + 2 * s.all_weights +
           int64_t(s.K) * s.widest * (7 * s.depth + 8) + int64_t(s.K) * s.ldk * (2 * s.depth + 4) +
           Task<T>::room_numbers(s) + 16384;
  }

  void run(Arena<T>& arena) {
    std::vector<Writes<T>> kept(c.stride);
    std::vector<std::vector<T*>> states(c.stride, std::vector<T*>(s.depth));
    for (int64_t j = 0; j < c.stride; ++j) {
      kept[j].place(s, arena);
      for (int i = 0; i < s.depth; ++i) states[j][i] = arena.take(s.weights[i]);
    }
    place(arena);
    if (c.weights[0]) this->load_weights(c.weights, after);
    for (int64_t group = (c.count - 1) / c.stride; group >= 0; --group) {
      const int64_t first = group * c.stride, stop = std::min(c.count, first + c.stride);
      replay(group, first, stop, kept, states);
      for (int64_t j = stop - 1; j >= first; --j) {
        index = j;
        step(states[j - first].data(), kept[j - first]);
      }
    }
    this->store_weights(after, c.dstart);
    for (int t = 0; t < s.K; ++t) ((T*)c.dtau)[n * s.K + t] = dtau[t];
  }

  void place(Arena<T>& arena) {
    const int K = s.K;
    for (int i = 0; i < s.depth; ++i) {
      after[i] = arena.take(s.weights[i]);
      dx[i] = arena.take(K * s.ld[i]), y[i] = arena.take(K * s.ld[i]);
      for (T** p : {&dg[i], &dz[i], &w[i], &slope_w[i], &dw[i]}) *p = arena.take(K * s.ld[i + 1]);
      products[i] = arena.take(K * s.ldk), scores[i] = arena.take(K * s.ldk);
    }
    for (T** p : {&rate, &dproduct}) *p = arena.take(K * s.ldk);
    for (T** p : {&dy, &commit_adjoint, &scaled, &bend, &row}) *p = arena.take(K * s.widest);
    room = arena.take(Task<T>::room_numbers(s));
    dlr = arena.take(s.ldk), dtau = arena.take(s.ldk);
  }

  // The mini-batches of a group again, from the state kept before it.
  void replay(int64_t group, int64_t first, int64_t stop, std::vector<Writes<T>>& kept,
              std::vector<std::vector<T*>>& states) {
    for (int i = 0; i < s.depth; ++i) {
      const int64_t count = int64_t(s.width[i] + 1) * s.width[i + 1];
      const T* from = (const T*)c.states[i] + (group * c.batch * c.heads + n) * count;
      copy_rows<T>(s.width[i] + 1, s.width[i + 1], from, s.width[i + 1], states[0][i], s.ld[i + 1]);
    }
    for (index = first; index < stop; ++index) {
      const int64_t j = index - first;
      if (j) {
        for (int i = 0; i < s.depth; ++i) std::memcpy(states[j][i], states[j - 1][i], s.weights[i] * sizeof(T));
        --index;
        if (this->commits()) this->commit(states[j].data(), kept[j - 1], room);
        ++index;
        if (this->resets()) this->load_weights(c.initial, states[j].data());
      }
      this->load_tokens(kept[j]);
      this->write(states[j].data(), kept[j], room);
    }
  }

  void step(T* const* weights, const Writes<T>& m) {
    const int K = s.K, depth = s.depth;
    for (int t = 0; t < K; ++t) dlr[t] = 0;
    through_reads(weights, m);
    through_norms(m);
    if (this->ends()) through_rows(m);
    if (this->commits()) through_commit(m);
    if (this->carries()) carry_out();
    through_writes(weights, m);
    const T* lr = this->rates();
    for (int t = 0; t < K; ++t)
      for (int j = 0; j <= t; ++j) {
        dlr[j] += rate[t * s.ldk + j] * tau[t];
        dtau[t] += rate[t * s.ldk + j] * lr[j];
      }
    std::memcpy((T*)c.dlr + n * c.count * K + index * K, dlr, K * sizeof(T));
    if (this->resets()) {
      this->store_weights(after, c.dinitial, 0, true);
      for (int i = 0; i < depth; ++i) std::memset(after[i], 0, s.weights[i] * sizeof(T));
    }
  }

  void through_reads(T* const* weights, const Writes<T>& m) {
    const int K = s.K, ldk = s.ldk, last = s.depth - 1;
    for (int t = 0; t < K; ++t)
      std::memcpy(y[0] + t * s.ld[0], at<T>(c.q, b, h, index * K + t), s.width[0] * sizeof(T));
    for (int i = 0; i <= last; ++i) {
      this->score(i, y[i], m.x[i], products[i], scores[i], room);
      if (i == last) break;
      this->read_map(i, weights[i], y[i], scores[i], m.g[i], w[i]);
      gelu<T>(K * s.ld[i + 1], w[i], y[i + 1], scaled);
      gelu_slopes<T>(K * s.ld[i + 1], w[i], scaled, slope_w[i], (T*)nullptr);
    }
    for (int t = 0; t < K; ++t) {
      T* out = dw[last] + t * s.ld[s.depth];
      if (c.z.data)
        std::memcpy(out, at<T>(c.z, b, h, index * K + t), s.width[s.depth] * sizeof(T));
      else
        std::memset(out, 0, s.width[s.depth] * sizeof(T));
    }
    std::memset(rate, 0, K * ldk * sizeof(T));
    for (int i = last; i >= 0; --i) {
      const int ld = s.ld[i + 1];
      // Adjoint of the scores, then of the products.
      transpose<T>(K, s.width[i + 1], m.g[i], ld, room, ldk);
      product<T>(K, ldk, s.width[i + 1], dw[i], ld, 1, room, ldk, dproduct, ldk, false, T(-1));
      for (int t = 0; t < K; ++t)
        for (int j = 0; j < ldk; ++j) {
          T& d = dproduct[t * ldk + j];
          rate[t * ldk + j] += d * products[i][t * ldk + j];
          d = j <= t ? d * tau[t] * this->rates()[j] : 0;
        }
      product<T>(K, ld, K, scores[i], 1, ldk, dw[i], ld, dg[i], ld, false, T(-1));
      product<T>(K, s.ld[i], K, dproduct, 1, ldk, y[i], s.ld[i], dx[i], s.ld[i], false);
      this->map_back(i, weights[i], dw[i], dy, false, room);
      product<T>(K, s.ld[i], K, dproduct, ldk, 1, m.x[i], s.ld[i], dy, s.ld[i], true);
      if (i)
        for (int j = 0; j < K * s.ld[i]; ++j) dw[i - 1][j] = dy[j] * slope_w[i - 1][j];
    }
    for (int t = 0; t < K; ++t)
      std::memcpy(at<T>(c.dq, b, h, index * K + t), dy + t * s.ld[0], s.width[0] * sizeof(T));
  }

  void through_norms(const Writes<T>& m) {
    if (!c.norm) return;
    const T* dnorm = (const T*)c.norm + n * c.count * s.K + index * s.K;
    for (int t = 0; t < s.K; ++t) {
      T sum = 0;
      for (int i = 0; i < s.depth; ++i) sum += this->squared_norm(m, i, t);
      if (!(sum > 0) || dnorm[t] == 0) continue;
      const T factor = dnorm[t] / std::sqrt(sum);
      for (int i = 0; i < s.depth; ++i) {
        const T* x = m.x[i] + t * s.ld[i];
        const T* g = m.g[i] + t * s.ld[i + 1];
        const T of_x = factor * dot<T>(s.width[i + 1], g, g), of_g = factor * (dot<T>(s.width[i], x, x) + 1);
        for (int j = 0; j < s.width[i]; ++j) dx[i][t * s.ld[i] + j] += of_x * x[j];
        for (int j = 0; j < s.width[i + 1]; ++j) dg[i][t * s.ld[i + 1] + j] += of_g * g[j];
      }
    }
  }

  // The rows of the new state are (x, lr g).
  void through_rows(const Writes<T>& m) {
    for (int i = 0; i < s.depth; ++i)
      for (int t = 0; t < s.K; ++t) {
        if (!this->held(t)) continue;
        const int64_t place = n * s.K + t;
        if (c.rows_x[i])
          for (int j = 0; j < s.width[i]; ++j) dx[i][t * s.ld[i] + j] += ((T*)c.rows_x[i])[place * s.width[i] + j];
        if (!c.rows_g[i]) continue;
        const T* d = (T*)c.rows_g[i] + place * s.width[i + 1];
        for (int j = 0; j < s.width[i + 1]; ++j) dg[i][t * s.ld[i + 1] + j] += this->rates()[t] * d[j];
        dlr[t] += dot<T>(s.width[i + 1], d, m.g[i] + t * s.ld[i + 1]);
      }
  }

  // S' = S + sum over s of c_s [x_s, 1] (x) g_s with c_s = -tau_{K-1} lr_s; the adjoint of S' is `after`.
  void through_commit(const Writes<T>& m) {
    const int K = s.K;
    const T *lr = this->rates(), end = tau[K - 1];
    for (int i = 0; i < s.depth; ++i) {
      const int ld = s.ld[i + 1], in = s.width[i];
      this->map_back(i, after[i], m.g[i], commit_adjoint, false, room);
      const T* bias = after[i] + int64_t(in) * ld;
      for (int t = 0; t < K; ++t) {
        const T factor = -end * lr[t];
        const T* x = m.x[i] + t * s.ld[i];
        const T* e = commit_adjoint + t * s.ld[i];
        const T committed = dot<T>(in, e, x) + dot<T>(s.width[i + 1], m.g[i] + t * ld, bias);
        dlr[t] -= end * committed;
        dtau[K - 1] -= committed * lr[t];
        for (int j = 0; j < in; ++j) {
          dx[i][t * s.ld[i] + j] += factor * e[j];
          scaled[t * s.ld[i] + j] = factor * x[j];
        }
        for (int j = 0; j < s.width[i + 1]; ++j) dg[i][t * ld + j] += factor * bias[j];
      }
      product<T>(K, ld, in, scaled, s.ld[i], 1, after[i], ld, dg[i], ld, true);
    }
  }

  // Adjoints at carried slots belong to the rows of the incoming state and go no further.
  void carry_out() {
    for (int t = 0; t < s.K; ++t) {
      if (!this->carried(t)) continue;
      for (int i = 0; i < s.depth; ++i) {
        const int64_t place = n * s.K + t;
        std::memcpy((T*)c.dcarried_g[i] + place * s.width[i + 1], dg[i] + t * s.ld[i + 1],
                    s.width[i + 1] * sizeof(T));
        std::memset(dg[i] + t * s.ld[i + 1], 0, s.width[i + 1] * sizeof(T));
        if (!i) continue;  // the keys of the first map carry theirs as tokens
        std::memcpy((T*)c.dcarried_x[i] + place * s.width[i], dx[i] + t * s.ld[i], s.width[i] * sizeof(T));
        std::memset(dx[i] + t * s.ld[i], 0, s.width[i] * sizeof(T));
      }
    }
  }

  void through_writes(T* const* weights, const Writes<T>& m) {
    const int K = s.K, last = s.depth - 1;
    for (int i = 0; i <= last; ++i) this->add_outer(i, after[i], y[i], dw[i], true);
    for (int i = 0; i < last; ++i) {
      const int count = K * s.ld[i + 1], ld = s.ld[i + 2];
      for (int j = 0; j < count; ++j) scaled[j] = dg[i][j] * m.slope[i][j];  // adjoint of what was passed back
      product<T>(K, ld, s.width[i + 1], scaled, s.ld[i + 1], 1, weights[i + 1], ld, dg[i + 1], ld, true);
      this->add_outer(i + 1, after[i + 1], scaled, m.g[i + 1], false);
    }
    through_objective(m);
    for (int i = last; i > 0; --i) {
      this->add_outer(i, after[i], m.x[i], dz[i], true);
      this->map_back(i, weights[i], dz[i], dx[i], true, room);
      const int count = K * s.ld[i];
      gelu_slopes<T>(count, m.z[i - 1], m.gate[i - 1], scaled, bend);
      for (int j = 0; j < count; ++j)
        dz[i - 1][j] = dx[i][j] * m.slope[i - 1][j] + dg[i - 1][j] * m.passed[i - 1][j] * bend[j];
    }
    this->add_outer(0, after[0], m.x[0], dz[0], true);
    this->map_back(0, weights[0], dz[0], dx[0], true, room);
    for (int t = 0; t < K; ++t) {
      T* dk = at<T>(c.dk, b, h, index * K + t);
      const T *r = row + t * s.ld[0], *d = dx[0] + t * s.ld[0];
      for (int j = 0; j < s.width[0]; ++j) dk[j] = d[j] + ln_weight[j] * r[j];
    }
  }

  // From the adjoint v of the last gradient: that of its residual (kept in `row`), of the target and of z.
  void through_objective(const Writes<T>& m) {
    const int last = s.depth - 1, f = s.width[s.depth], ld = s.ld[s.depth];
    T *dweight = (T*)c.dln_weight + n * f, *dbias = (T*)c.dln_bias + n * f;
    for (int t = 0; t < s.K; ++t) {
      const T *v = dg[last] + t * ld, *g = m.g[last] + t * ld, *normed = m.normed + t * ld;
      const T *residual = m.residual + t * ld, rstd = m.rstd[t];
      T *r = row + t * ld, *out = dz[last] + t * ld, *upstream = room;
      norm_backward<T>(f, v, normed, rstd, r);
      T along = 0;
#pragma omp simd reduction(+ : along)
      for (int j = 0; j < f; ++j) along += (residual[j] + ln_weight[j] * ln_weight[j] * normed[j]) * normed[j];
      along *= rstd / f;
      for (int j = 0; j < f; ++j) upstream[j] = ln_weight[j] * ln_weight[j] * r[j];
      norm_backward<T>(f, upstream, normed, rstd, out);
      const T of_g = dot<T>(f, v, normed) * rstd / f, of_normed = dot<T>(f, v, g) * rstd / f;
      for (int j = 0; j < f; ++j) out[j] -= along * r[j] + of_g * g[j] + of_normed * normed[j];
      const T* value = at<T>(c.v, b, h, index * s.K + t);
      T* dv = at<T>(c.dv, b, h, index * s.K + t);
      const T* key = m.x[0] + t * s.ld[0];
      for (int j = 0; j < f; ++j) {
        dv[j] = -ln_weight[j] * r[j];
        dbias[j] += ln_weight[j] * r[j];
        dweight[j] += r[j] * (ln_bias[j] - value[j] + key[j] + 2 * ln_weight[j] * normed[j]);
      }
    }
  }
};

// ------------------------------------------------------------------ all tasks of a call

template <class T, class Pass>
int run_all(const Call& c, int64_t numbers, const Sizes<T>& sizes) {
  const int64_t tasks = c.batch * c.heads;
  int failed = 0;
#pragma omp parallel for num_threads(c.threads) if (c.threads > 1) schedule(dynamic) reduction(+ : failed)
  for (int64_t number = 0; number < tasks; ++number) {
    try {
      Arena<T> arena(numbers);
      Pass(c, sizes, number).run(arena);
    } catch (const std::bad_alloc&) {
      ++failed;
    }
  }
  return failed;
}

template <class T>
int forward(const Call& c) {
  const Sizes<T> sizes(c);
  return run_all<T, Forward<T>>(c, Forward<T>::numbers(sizes), sizes);
}

template <class T>
int backward(const Call& c) {
  const Sizes<T> sizes(c);
  return run_all<T, Backward<T>>(c, Backward<T>::numbers(sizes, c.stride), sizes);
}

}  // namespace

// 0, or the number of tasks that had no memory.
extern "C" int ttt_forward_f32(const Call* c) { return forward<float>(*c); }
extern "C" int ttt_forward_f64(const Call* c) { return forward<double>(*c); }
extern "C" int ttt_backward_f32(const Call* c) { return backward<float>(*c); }
extern "C" int ttt_backward_f64(const Call* c) { return backward<double>(*c); }
extern "C" int64_t ttt_call_bytes() { return sizeof(Call); }
