#include "forest.h"

#include <algorithm>
#include <numeric>

#include "order.h"

namespace qflux::cpu {
namespace {

// Points of positions first .. last - 1 of an order, in place: those of even blocks of `size` in
// front of those of odd ones, each in the order that they had. A point at position p has the number
// p - shift.
void split(int32_t* points, int64_t first, int64_t last, int64_t shift, int64_t middle,
           int32_t* room) {
  int64_t low = first, high = 0;
  for (int64_t n = first; n < last; ++n) {
    const int32_t point = points[n];
    const bool behind = point + shift >= middle;
    points[low] = point;
    room[high] = point;
    low += !behind;
    high += behind;
  }
  std::copy(room, room + high, points + low);
}

}  // namespace

template <class T>
Forest<T>::Forest(const Loops<T>& loops, const Sequence<T>& s) : visible_(s.visibility) {
  stage_keys(s);
  const int64_t keys = visible_.key_end, rows = visible_.row_end;
  std::vector<int32_t> key_order = spatial_order(s.key_x, s.key_y, keys);
  // Rows in front of all keys stay in front.
  const int64_t blind = visible_.causal ? row_at(visible_, 0) : 0;
  std::vector<int32_t> row_order(blind);
  std::iota(row_order.begin(), row_order.end(), 0);
  for (const int32_t row : spatial_order(s.query_x + blind, s.query_y + blind, rows - blind))
    row_order.push_back(row + static_cast<int32_t>(blind));
  if (!visible_.causal) {
    TreeLevel<T> level{keys, {whole_rectangle(visible_)}, {}, row_order};
    level.trees.push_back(std::make_unique<KeyTree<T>>(loops, keys_, key_order.data(), keys));
    levels_.push_back(std::move(level));
    rows_ = std::move(row_order);
    store_rows();
    return;
  }
  const int64_t positions = rows + visible_.shift;
  std::vector<int64_t> sizes;
  each_level(kTreeBase, positions, [&](int64_t size) { sizes.push_back(size); });
  std::vector<int32_t> keys_behind(keys), rows_behind(rows);
  for (size_t n = sizes.size(); n-- > 0;) {
    TreeLevel<T> level{sizes[n], {}, {}, {}};
    const int64_t count = rectangle_count(positions, level.size);
    for (int64_t index = 0; index < count; ++index)
      level.where.push_back(rectangle(visible_, level.size, index));
    each(count, [&](int64_t index) {
      const int64_t middle = (2 * index + 1) * level.size;
      const int64_t key = middle - level.size, row = row_at(visible_, key);
      if (key < keys)
        split(key_order.data(), key, std::min(middle + level.size, keys), 0, middle,
              &keys_behind[key]);
      if (row < rows)
        split(row_order.data(), row, row_at(visible_, middle + level.size), visible_.shift, middle,
              &rows_behind[row]);
    });
    level.rows = row_order;
    if (rows_.empty() && (n == 0 || level.size <= kRowBlock)) rows_ = row_order;
    level.trees.resize(count);
    const auto plant = [&](int64_t index) {
      const Rectangle<>& where = level.where[index];
      if (!where.empty())
        level.trees[index] = std::make_unique<KeyTree<T>>(
            loops, keys_, key_order.data() + where.key_begin, where.keys());
    };
    // Large trees are built by all threads, small ones by one each.
    if (count >= thread_count())
      each(count, plant);
    else
      for (int64_t index = 0; index < count; ++index) plant(index);
    levels_.push_back(std::move(level));
  }
  store_rows();
}

template <class T>
void Forest<T>::store_rows() {
  const int64_t count = rows_.size();
  const Chunks chunks(count);
  places_.resize(count);
  each(chunks.count, [&](int64_t chunk) {
    for (int64_t n = chunks.begin(chunk); n < chunks.end(chunk); ++n)
      places_[rows_[n]] = static_cast<int32_t>(n);
  });
  for (TreeLevel<T>& level : levels_)
    each(chunks.count, [&](int64_t chunk) {
      for (int64_t n = chunks.begin(chunk); n < chunks.end(chunk); ++n)
        level.rows[n] = places_[level.rows[n]];
    });
}

template <class T>
void Forest<T>::stage_keys(const Sequence<T>& s) {
  const int64_t keys = visible_.key_end, stride = round_up(keys, kPadding);
  planes_ = room<T>((2 + s.value_dim) * stride);
  T* const planes = planes_.get();
  keys_ = {planes, planes + stride, planes + 2 * stride, stride, s.value_dim};
  const Chunks chunks(keys);
  each(chunks.count, [&](int64_t chunk) {
    const int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
    std::copy(s.key_x + begin, s.key_x + end, planes + begin);
    std::copy(s.key_y + begin, s.key_y + end, planes + stride + begin);
    T* const values = planes + 2 * stride;
    if (!s.values) {
      std::copy(s.key_x + begin, s.key_x + end, values + begin);
      std::copy(s.key_y + begin, s.key_y + end, values + stride + begin);
      return;
    }
    for (int64_t j = begin; j < end; ++j)
      for (int64_t c = 0; c < s.value_dim; ++c)
        values[c * stride + j] = s.values[j * s.value_stride + c];
  });
  for (int64_t c = 0; c < 2 + s.value_dim; ++c)
    std::fill(planes + c * stride + keys, planes + (c + 1) * stride, T(0));
}

template class Forest<float>;
template class Forest<double>;

}  // namespace qflux::cpu
