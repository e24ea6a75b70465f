// Backward: group by group from the last, each replayed from the state kept before it.

#pragma once

#include <algorithm>
#include <vector>

#include "inner_loop_task.h"

namespace {

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
      if (sum == 0 || dnorm[t] == 0) continue;
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

}  // namespace
