// The hot loops of the sweep.
#pragma once

#include "../../math/sums.h"
#include "simd.h"
#include "sweep.h"

namespace qflux::cpu {
namespace {
namespace sweep {

template <class T>
bool all_tame(const T* values, int64_t count) {
  int32_t tame = 1;
  for (int64_t i = 0; i < count; ++i) tame &= is_tame(values[i]);
  return tame != 0;
}

template <class T>
void view_rows(const Frame& frame, const T* query_x, const T* query_y, const T* limit,
               int64_t count, double* angle, double* low, double* high) {
  for (int64_t i = 0; i < count; ++i) {
    const RowView view = view_row(frame, query_x[i], query_y[i], limit[i]);
    angle[i] = view.angle;
    low[i] = view.low;
    high[i] = view.high;
  }
}

template <class T>
void view_keys(const Frame& frame, const CellMap& map, Interval h, const T* key_x, const T* key_y,
               int64_t count, Span* spans) {
  constexpr int64_t kTile = 128;
  Arc outer[kTile], inner[kTile];
  double arcs[6][kTile];
  for (int64_t tile = 0; tile < count; tile += kTile) {
    const int64_t size = count - tile < kTile ? count - tile : kTile;
    for (int64_t j = 0; j < size; ++j) {
      Arc out, in;
      view_key(frame, key_x[tile + j], key_y[tile + j], h, out, in);
      arcs[0][j] = out.start;
      arcs[1][j] = out.end;
      arcs[2][j] = out.cosine;
      arcs[3][j] = in.start;
      arcs[4][j] = in.end;
      arcs[5][j] = in.cosine;
    }
    for (int64_t j = 0; j < size; ++j) {
      outer[j] = {arcs[0][j], arcs[1][j], arcs[2][j]};
      inner[j] = {arcs[3][j], arcs[4][j], arcs[5][j]};
      spans[tile + j] = make_span(map, outer[j], inner[j]);
    }
  }
}

// sum += v in twice the precision of double. Differences of such sums lose nothing, however much
// larger what was added and taken away again may have been.
QFLUX_INLINE void add_doubled(double* sum, double* error, Vector<double> v) {
  Vector<double> total = load(sum);
  store(error, load(error) + add_exactly(total, v));
  store(sum, total);
}

void add_spans(const double* vectors, int64_t width, const Span* spans, int64_t count,
               int32_t blocks, double* bins) {
  const Vector<double> zero(0.0);
  for (int64_t j = 0; j < count; ++j) {
    const Span& span = spans[j];
    if (span.inner_count == 0) continue;
    const int32_t end = span.inner + span.inner_count;
    const double* from = vectors + j * width;
    const bool whole = span.inner_count == blocks, wraps = !whole && end > blocks;
    double* begin = bins + 2 * width * (whole ? 0 : span.inner);
    double* stop = bins + 2 * width * (wraps ? end - blocks : end);
    for (int64_t c = 0; c < width; c += Vector<double>::kWidth) {
      const Vector<double> v = load(from + c);
      add_doubled(begin + c, begin + width + c, v);
      if (whole) continue;
      add_doubled(stop + c, stop + width + c, zero - v);
      if (wraps) add_doubled(bins + c, bins + width + c, v);
    }
  }
}

void add_bins(double* sums, const double* bin, int64_t width) {
  for (int64_t c = 0; c < width; c += Vector<double>::kWidth) {
    add_doubled(sums + c, sums + width + c, load(bin + c));
    store(sums + width + c, load(sums + width + c) + load(bin + width + c));
  }
}

void add_vectors(double* sums, const double* vectors, int64_t count, int64_t width) {
  for (int64_t c = 0; c < width; c += Vector<double>::kWidth)
    for (int64_t i = 0; i < count; ++i)
      add_doubled(sums + c, sums + width + c, load(vectors + i * width + c));
}

template <class T>
constexpr SweepLoops<T> kLoops = {all_tame<T>, view_rows<T>, view_keys<T>,
                                  add_spans,   add_bins,     add_vectors};

}  // namespace sweep
}  // namespace
}  // namespace qflux::cpu
