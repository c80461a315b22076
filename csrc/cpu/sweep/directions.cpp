#include "directions.h"

#include <algorithm>

namespace qflux::cpu {

Directions sort_by_direction(const std::vector<int32_t>& list, const double* angle) {
  const int64_t rows = list.size();
  Directions sorted;
  sorted.offset.assign(CellMap::kParts + 1, 0);
  const int64_t step = std::max<int64_t>(rows / 4096, 1);
  for (int64_t n = 0; n < rows; n += step)
    ++sorted.offset[static_cast<int32_t>(angle[list[n]] * (CellMap::kParts / kTurn)) + 1];
  // A cell for every eight rows, and one more in each part.
  for (int32_t part = 0; part < CellMap::kParts; ++part)
    sorted.offset[part + 1] =
        static_cast<int32_t>(sorted.offset[part] + 1 + sorted.offset[part + 1] * step / 8);
  const int32_t cells = sorted.offset[CellMap::kParts];
  const CellMap map{sorted.offset.data(), nullptr, static_cast<int32_t>(rows)};

  const Chunks chunks(rows);
  const auto cell = room<int32_t>(rows);
  std::vector<int32_t> place(chunks.count * cells, 0);
  each(chunks.count, [&](int64_t chunk) {
    const int64_t end = chunks.end(chunk);
    for (int64_t n = chunks.begin(chunk); n < end; ++n)
      ++place[chunk * cells + (cell[n] = map.cell(angle[list[n]]))];
  });
  sorted.first.resize(cells + 1);
  int32_t next = 0;
  for (int32_t c = 0; c < cells; ++c) {
    sorted.first[c] = next;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int32_t here = place[chunk * cells + c];
      place[chunk * cells + c] = next;
      next += here;
    }
  }
  sorted.first[cells] = next;
  sorted.order.resize(rows);
  each(chunks.count, [&](int64_t chunk) {
    const int64_t end = chunks.end(chunk);
    for (int64_t n = chunks.begin(chunk); n < end; ++n)
      sorted.order[place[chunk * cells + cell[n]]++] = list[n];
  });
  return sorted;
}

template <class T>
Classes classify(const SweepLoops<T>& loops, const Sequence<T>& s, const Frame& frame, Interval h,
                 const CellMap& map, const Rectangle<>& where, int64_t bin_width) {
  Classes classes{Chunks(where.keys()), map.blocks(), room<Span>(where.keys()), {}};
  Chunks& chunks = classes.chunks;
  const int32_t blocks = classes.blocks;
  const int64_t bin_size = bin_width * (blocks + 1);
  chunks.count = std::clamp<int64_t>((int64_t(1) << 23) / bin_size, 1, chunks.count);
  classes.tested.assign(chunks.count * (blocks + 1), 0);
  each(chunks.count, [&](int64_t chunk) {
    const int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
    Span* spans = classes.spans.get();
    loops.view_keys(frame, map, h, s.key_x + where.key_begin + begin,
                    s.key_y + where.key_begin + begin, end - begin, spans + begin);
    int32_t* change = &classes.tested[chunk * (blocks + 1)];
    for (int64_t j = begin; j < end; ++j) {
      const Band band = band_of(spans[j], blocks);
      for (const BlockRange& range : {band.before, band.after}) {
        if (range.count == 0) continue;
        const int32_t stop = range.start + range.count;
        ++change[range.start];
        --change[std::min(stop, blocks)];
        if (stop > blocks) ++change[0], --change[stop - blocks];
      }
    }
    for (int32_t b = 1; b <= blocks; ++b) change[b] += change[b - 1];
  });
  return classes;
}

template Classes classify(const SweepLoops<float>&, const Sequence<float>&, const Frame&, Interval,
                          const CellMap&, const Rectangle<>&, int64_t);
template Classes classify(const SweepLoops<double>&, const Sequence<double>&, const Frame&,
                          Interval, const CellMap&, const Rectangle<>&, int64_t);

}  // namespace qflux::cpu
