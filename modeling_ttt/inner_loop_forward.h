// Forward: one walk over the mini-batches of a batch row and head.

#pragma once

#include "inner_loop_task.h"

namespace {

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

}  // namespace
