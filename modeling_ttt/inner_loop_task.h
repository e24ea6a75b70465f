// What the passes share: the call, the memory of a task, and the steps of a mini-batch that both take.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "inner_loop_math.h"

namespace {

constexpr int MAX_DEPTH = 6;

}  // namespace

struct Tokens {  // [B, H, C, f], contiguous in f
  void* data;
  int64_t row, head, column;  // strides in elements
};

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

}  // namespace
