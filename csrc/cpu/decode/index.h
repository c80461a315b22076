// The index of a cache: trees over runs of its keys, in memory that the cache owns.
//
// Keys come in chunks. As many as are indexed form runs whose sizes are those of the digits of
// their number to the base kRunFactor, the largest in front: when a run fills up, it and those as
// large in front of it become one. So a key is built into O(log n) trees in its life, and what is
// indexed is known from its length alone. The tree of a run stands where those of its chunks stood,
// a unit of memory for each chunk (index_unit in decode.h).
#pragma once

#include <vector>

#include "../isa/dispatch.h"
#include "../parallel.h"

namespace qflux::cpu {

constexpr int64_t kRunFactor = 2;

// The runs of the first `tokens` tokens, a multiple of `chunk`.
std::vector<Range> runs_of(int64_t tokens, int64_t chunk);

// The tree of `count` keys at `memory`, which is aligned to vectors.
template <class T>
IndexView<T> index_view(uint8_t* memory, int64_t count, int64_t value_dim);

// The same tree of another sequence, whose memory is so many bytes further on.
template <class T>
IndexView<T> moved(IndexView<T> view, int64_t bytes) {
  const auto move = [&](auto*& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
        reinterpret_cast<uint8_t*>(pointer) + bytes);
  };
  move(view.moments);
  move(view.boxes);
  move(view.keys);
  return view;
}

// Builds it over the keys of `from`, its first `count`. With `exact_points` for a score without a
// bias.
template <class T>
void build_index(const Loops<T>& loops, const IndexView<T>& index, const KeyPlanes<T>& from,
                 int64_t count, bool exact_points);

}  // namespace qflux::cpu
