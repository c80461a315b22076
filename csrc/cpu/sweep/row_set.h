// Rows and keys gathered out of a sequence, in the planes and records that the pair loops want.
#pragma once

#include <vector>

#include "../isa/dense.h"
#include "../parallel.h"

namespace qflux::cpu {

// Keys gathered for one call of the pair loop.
constexpr int64_t kListTile = 1024;

// Rows in an order of their own.
template <class T>
struct RowSet {
  std::vector<int32_t> row;  // of the sequence
  int64_t stride;
  std::unique_ptr<T[]> planes, records;

  RowSet(const Sequence<T>& s, std::vector<int32_t> rows, bool backward)
      : row(std::move(rows)), stride(ceil_div(row.size(), kPadding) * kPadding) {
    const int64_t count = row.size(), value_dim = s.value_dim;
    const bool wants_records = backward && s.values;
    const int64_t plane_count = backward ? value_dim + 4 : 3;
    planes = room<T>(plane_count * stride);
    records = room<T>(wants_records ? count * value_dim : 0);
    const Chunks chunks(count);
    each(chunks.count, [&](int64_t chunk) {
      const auto gather = [&](const T* from, int64_t plane) {
        T* to = planes.get() + plane * stride;
        for (int64_t n = chunks.begin(chunk); n < chunks.end(chunk); ++n) to[n] = from[row[n]];
      };
      gather(s.query_x, 0);
      gather(s.query_y, 1);
      gather(s.limit, 2);
      if (backward) {
        for (int64_t c = 0; c < value_dim; ++c) gather(s.grad + c * s.row_stride, 3 + c);
        gather(s.grad_strength, 3 + value_dim);
      }
      if (wants_records)
        for (int64_t n = chunks.begin(chunk); n < chunks.end(chunk); ++n)
          std::copy_n(s.grad_records + row[n] * value_dim, value_dim,
                      records.get() + n * value_dim);
    });
    for (int64_t plane = 0; plane < plane_count; ++plane)
      std::fill(planes.get() + plane * stride + count, planes.get() + (plane + 1) * stride, T(0));
  }

  int64_t count() const { return row.size(); }
  const T* plane(int64_t which) const { return planes.get() + which * stride; }

  // The sequence with rows first .. last - 1 of this set as its rows 0 .. last - first - 1.
  Sequence<T> as_rows(Sequence<T> s, int64_t first, int64_t last) const {
    s.visibility = {last - first, 0, 0, false};
    s.query_x = plane(0) + first;
    s.query_y = plane(1) + first;
    s.limit = plane(2) + first;
    s.row_stride = stride;
    if (s.grad) {
      s.grad = plane(3) + first;
      s.grad_strength = plane(3 + s.value_dim) + first;
    }
    if (s.grad_records) s.grad_records = records.get() + first * s.value_dim;
    return s;
  }
};

// Keys `from` on of a sequence become its keys 0 on.
template <class T>
Sequence<T> from_key(Sequence<T> s, int64_t from) {
  s.key_x += from;
  s.key_y += from;
  if (s.values) s.values += from * s.value_stride;
  if (s.value_planes) s.value_planes += from;
  return s;
}

// A few keys out of many, gathered.
template <class T>
struct KeyTile {
  std::unique_ptr<T[]> points, records, planes;

  KeyTile(const Sequence<T>& s, bool backward)
      : points(room<T>(2 * kListTile)),
        records(room<T>(s.values ? kListTile * s.value_dim : 0)),
        planes(room<T>(s.values && backward ? kListTile * s.value_dim : 0)) {}

  // `s` with `keys`, at most kListTile of them, as its keys.
  Sequence<T> gather(Sequence<T> s, const int32_t* keys, int64_t count) {
    T *x = points.get(), *y = points.get() + kListTile;
    for (int64_t n = 0; n < count; ++n) x[n] = s.key_x[keys[n]], y[n] = s.key_y[keys[n]];
    const int64_t padded = ceil_div(count, kPadding) * kPadding;
    std::fill(x + count, x + padded, T(0));
    std::fill(y + count, y + padded, T(0));
    if (s.values) {
      for (int64_t n = 0; n < count; ++n)
        std::copy_n(s.values + keys[n] * s.value_stride, s.value_dim,
                    records.get() + n * s.value_dim);
      s.values = records.get();
      s.value_stride = s.value_dim;
    }
    if (s.value_planes) {
      for (int64_t c = 0; c < s.value_dim; ++c) {
        T* plane = planes.get() + c * kListTile;
        for (int64_t n = 0; n < count; ++n) plane[n] = s.value_planes[c * s.key_stride + keys[n]];
        std::fill(plane + count, plane + padded, T(0));
      }
      s.value_planes = planes.get();
    }
    s.key_x = x;
    s.key_y = y;
    s.key_stride = kListTile;
    s.visibility.key_end = count;
    return s;
  }
};

}  // namespace qflux::cpu
