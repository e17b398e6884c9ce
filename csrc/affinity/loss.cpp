// The affinity loss of a window on the CPU, forward and backward.
//
// Data flow: each image row is summed by one thread, tap after tap, and the rows are then added in order: the same bits for any
// number of threads. Floor: the window read once (forward) or its gradient written once (backward). Bound: memory.
#include <algorithm>

#include "affinity/affinity.h"
#include "common/rows.h"
#include "common/threads.h"

namespace afa {
namespace AFA_ISA {

struct LabelledWindow {
  int64_t height, width, radius, side;
  LabelledWindow(const View<4>& window, int64_t r)
      : height(window.size[2]), width(window.size[3]), radius(r), side(2 * r + 1) {}

  // Calls visit(tap, others, low, high) for every tap of row y: others[x] is the label that pixel x of the row reaches through it,
  // where low <= x < high; outside, and everywhere when low == high, the tap leaves the image.
  template <class Visit>
  void taps(const int32_t* labels, int64_t y, const Visit& visit) const {
    for (int64_t tap = 0; tap < side * side; ++tap) {
      const int64_t dy = tap / side - radius, dx = tap % side - radius;
      const bool inside = y + dy >= 0 && y + dy < height;
      const int64_t low = inside ? std::clamp(-dx, int64_t(0), width) : 0, high = inside ? std::clamp(width - dx, low, width) : 0;
      visit(tap, inside ? labels + (y + dy) * width + dx : labels, low, high);
    }
  }
};

static void row_sums(const View<4>& window, const LabelledWindow& at, const int32_t* labels, int64_t b, int64_t y, float* line,
                     PairSums* sums) {
  const int32_t* own = labels + y * at.width;
  at.taps(labels, y, [&](int64_t tap, const int32_t* others, int64_t low, int64_t high) {
    if (low == high) return;
    load_row(window, b, tap, y, line);
    float same = 0, different = 0;
    int64_t same_count = 0, different_count = 0;
    for (int64_t x = low; x < high; ++x) {
      const bool counts = own[x] >= 0 && others[x] >= 0, equal = own[x] == others[x];
      same += counts && equal ? 1.0f - line[x] : 0.0f;
      different += counts && !equal ? line[x] : 0.0f;
      same_count += counts && equal;
      different_count += counts && !equal;
    }
    sums->same += same, sums->different += different;
    sums->same_count += same_count, sums->different_count += different_count;
  });
}

Status loss_of_window(const View<4>& window, const int32_t* labels, int64_t radius, PairSums* sums, float* lines, PairSums* rows,
                      int threads) {
  const LabelledWindow at(window, radius);
  if (window.size[1] != at.side * at.side || threads < 1) return Status::bad_argument;
  const int64_t count = window.size[0] * at.height;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < count; ++row) {
    const int64_t b = row / at.height, y = row % at.height;
    rows[row] = PairSums();
    row_sums(window, at, labels + b * at.height * at.width, b, y, lines + thread_number() * at.width, rows + row);
  }
  *sums = PairSums();
  for (int64_t row = 0; row < count; ++row) add_sums(rows[row], sums);
  return Status::ok;
}

Status loss_of_window_backward(const View<4>& grad, const int32_t* labels, int64_t radius, float same, float different,
                               float* lines, int threads) {
  const LabelledWindow at(grad, radius);
  if (grad.size[1] != at.side * at.side || threads < 1) return Status::bad_argument;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < grad.size[0] * at.height; ++row) {
    const int64_t b = row / at.height, y = row % at.height;
    const int32_t *image = labels + b * at.height * at.width, *own = image + y * at.width;
    float* line = lines + thread_number() * at.width;
    at.taps(image, y, [&](int64_t tap, const int32_t* others, int64_t low, int64_t high) {
      std::fill(line, line + at.width, 0.0f);
      for (int64_t x = low; x < high; ++x)
        line[x] = own[x] < 0 || others[x] < 0 ? 0.0f : own[x] == others[x] ? same : different;
      store_row(grad, b, tap, y, line);
    });
  }
  return Status::ok;
}

}  // namespace AFA_ISA
}  // namespace afa

#if AFA_ISA_IS_BASELINE
#include <vector>

namespace afa {

AFA_DECLARE_PER_ISA(Status loss_of_window(const View<4>& window, const int32_t* labels, int64_t radius, PairSums* sums,
                                          float* lines, PairSums* rows, int threads))
AFA_DECLARE_PER_ISA(Status loss_of_window_backward(const View<4>& grad, const int32_t* labels, int64_t radius, float same,
                                                   float different, float* lines, int threads))

Status affinity_loss_cpu(const View<4>& window, const int32_t* labels, int64_t radius, PairSums* sums, int threads) {
  std::vector<float> lines(threads * window.size[3]);
  std::vector<PairSums> rows(window.size[0] * window.size[2]);
  AFA_DISPATCH(loss_of_window, window, labels, radius, sums, lines.data(), rows.data(), threads)
}
Status affinity_loss_backward_cpu(const View<4>& grad_window, const int32_t* labels, int64_t radius, float same, float different,
                                  int threads) {
  std::vector<float> lines(threads * grad_window.size[3]);
  AFA_DISPATCH(loss_of_window_backward, grad_window, labels, radius, same, different, lines.data(), threads)
}

}  // namespace afa
#endif
