// The inner loop of a TTT layer for CPUs: dual form (arXiv 2407.04620, section 2.5), forward and backward.
//
// A batch row and head is one task; it walks over its mini-batches with everything it needs in the caches of a core.
// The net is a chain of `depth` linear maps with tanh-GELU between. Weights and bias of a map are one matrix [W; b],
// [in + 1, out]. Matrices are row-major; rows are padded with zeros to whole vectors inside a task. Letters are those
// of the Python backends: x inputs and g gradients of the maps for the keys, z their outputs, y inputs and w outputs
// for the queries, d... adjoints. `native_call.py` builds the `Call`; the formulas are those of `chunked_forward.py`
// and `chunked_backward.py`, where they are explained.

#include <algorithm>
#include <new>

#include "inner_loop_backward.h"
#include "inner_loop_forward.h"

namespace {

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
