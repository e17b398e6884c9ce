// Sorting on a GPU: pairs of a 32-bit key and a payload, by key, equal keys in the order in which they came.
#pragma once

#include "common/common.h"

namespace afa {

struct SortPairs {
  const uint32_t* keys = nullptr;
  const int32_t* payload = nullptr;  // null: 0, 1, 2, ...
  uint32_t* sorted_keys = nullptr;   // neither of the inputs
  int32_t* sorted_payload = nullptr;
  int64_t count = 0;
  int bits = 32;  // those above are 0 in every key: what is not there costs no pass
};
int64_t radix_sort_cuda_workspace(int64_t count);  // bytes
// On the current device.
Status radix_sort_cuda(const SortPairs& pairs, void* workspace, void* stream);

}  // namespace afa
