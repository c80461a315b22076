// The geometry of the sub-quadratic sweep (docs/subquadratic.md): which rows keep a key for
// certain.
//
// Row i keeps key k where x_i . k >= 2 tau_i - 1. With any invertible L and any m,
//   z = L^-1 (k - m),  p_i = L' x_i,  h_i = (2 tau_i - 1 - x_i . m) / |p_i|
// the test is  z . p_i / |p_i| >= h_i, and for rows whose h_i agree the key is kept by exactly the
// directions p_i inside an arc around z of half-width acos(h / |z|). L and m decide only how well
// the h_i agree; rounding is covered by widening the interval of h, so that what an arc calls
// certain is what the pair loop would decide.
#pragma once

#include "scalar.h"
#include "statistics.h"

namespace qflux {

// NaN and infinities have no geometry, and beyond this squares or sums of them may overflow.
template <class T>
constexpr double kLargestTame = sizeof(T) == 4 ? 1e18 : 1e100;
template <class T>
QFLUX_INLINE bool is_tame(T number) {
  return absolute(number) <= static_cast<T>(kLargestTame<T>);
}

// Bound on the rounding of a score in T, relative to its terms, with room for the geometry's own in
// double.
template <class T>
constexpr double kScoreUnit = sizeof(T) == 4 ? 0x1p-18 : 0x1p-47;

struct Frame {
  Point<double> mean;
  double l11, l21, l22;  // L, lower triangular
  double unit;           // bound on the rounding of a score, relative to its terms
  double least;          // smallest singular value of L
};

// What one row contributes: where it looks, and the interval its h is certain to lie in, up to
// key_slack() times the length of the key.
struct RowView {
  double angle, low, high;
};

struct Interval {
  double low, high;
};

// The directions that keep a key: outside the outer arc none does, inside the inner arc all do.
// Arcs run from `start` to `end` in the sense of growing angle.
struct Arc {
  double start, end;
  double cosine;  // of the half-width; above 1: no direction, -1 and below: every direction
};

constexpr double kTurn = 4.0;  // pseudo-angles lie in [0, kTurn)

// Grows with the angle of (x, y) from 0 to kTurn and needs no trigonometry.
QFLUX_INLINE double pseudo_angle(double x, double y) {
  const double length = absolute(x) + absolute(y);
  const double slope = length > 0 ? y / length : 0.0;
  const double turned = x < 0 ? 2.0 - slope : slope;
  const double wrapped = turned < 0 ? turned + kTurn : turned;
  return wrapped < kTurn ? wrapped : 0.0;
}

// The ellipse of a window's keys, widened by eps as the threshold is for rows of squared length
// `square`. A factor of zero marks states without extent, for which there is no frame.
QFLUX_INLINE Frame make_frame(const Moments& window, Point<double> shift, double eps, double square,
                              double unit) {
  const double scale = 1 / window.count;
  const double mx = window.x * scale, my = window.y * scale;
  const double ridge = (square > 0 ? 4 * eps / square : 0.0);
  double cxx = window.xx * scale - mx * mx, cyy = window.yy * scale - my * my;
  const double cxy = window.xy * scale - mx * my;
  const double trace = (cxx > 0 ? cxx : 0.0) + (cyy > 0 ? cyy : 0.0);
  // States on a line still get an ellipse, a very thin one.
  const double thin = 1e-10 * trace;
  cxx = (cxx > 0 ? cxx : 0.0) + ridge + thin;
  cyy = (cyy > 0 ? cyy : 0.0) + ridge + thin;
  Frame f{{shift.x + mx, shift.y + my}, 0, 0, 0, unit, 0};
  if (!(cxx > 0)) return f;
  f.l11 = square_root(cxx);
  f.l21 = cxy / f.l11;
  const double rest = cyy - f.l21 * f.l21;
  f.l22 = square_root(rest > 1e-10 * cyy ? rest : 1e-10 * cyy);
  // The smallest singular value is at least det / largest.
  const double largest = square_root(f.l11 * f.l11 + f.l21 * f.l21 + f.l22 * f.l22);
  f.least = f.l11 * f.l22 / largest;
  return f;
}

// q = x / 2 is the query of math/score.h. A row without direction has an interval of NaN.
QFLUX_INLINE RowView view_row(const Frame& f, double qx, double qy, double tau) {
  const double x = 2 * qx, y = 2 * qy, t = 2 * tau - 1;
  const double px = f.l11 * x + f.l21 * y, py = f.l22 * y;
  const double inverse = 1 / square_root(px * px + py * py);
  const double h = (t - x * f.mean.x - y * f.mean.y) * inverse;
  const double along = absolute(x * f.mean.x) + absolute(y * f.mean.y);
  const double slack = f.unit * (2 + 2 * absolute(tau) + along) * inverse;
  return {pseudo_angle(px, py), h - slack, h + slack};
}

// What the interval of h is widened by for each unit of a key's length.
QFLUX_INLINE double key_slack(const Frame& f) { return f.unit / f.least; }

// Rounding does not exchange the ends: where c is not +-1, s is 1e-8 or more.
QFLUX_INLINE Arc make_arc(double zx, double zy, double inverse, double h) {
  const double c = h * inverse;
  const double bounded = c > 1 ? 1.0 : c < -1 ? -1.0 : c;
  const double s = square_root(1 - bounded * bounded);
  return {pseudo_angle(zx * bounded + zy * s, zy * bounded - zx * s),
          pseudo_angle(zx * bounded - zy * s, zy * bounded + zx * s), c};
}

// Both arcs of a key for rows whose h lie in the interval.
QFLUX_INLINE void view_key(const Frame& f, double kx, double ky, Interval h, Arc& outer,
                           Arc& inner) {
  const double dx = kx - f.mean.x, dy = ky - f.mean.y;
  const double zx = dx / f.l11, zy = (dy - f.l21 * zx) / f.l22;
  const double length = square_root(zx * zx + zy * zy);
  const double terms = absolute(kx) + absolute(ky) + absolute(f.mean.x) + absolute(f.mean.y);
  const double slack = key_slack(f) * terms + f.unit * (absolute(zx) + absolute(zy));
  // A key at the centre keeps or drops every direction alike.
  const double inverse = 1 / (length > 1e-300 ? length : 1e-300);
  outer = make_arc(zx, zy, inverse, h.low - slack);
  inner = make_arc(zx, zy, inverse, h.high + slack);
}

// What classifies keys without arcs, one set of rows at a time, as GPUs do: what the rows have in
// common, and where a key lies in their frame.
//
// Rows look in directions between `first` and `last`, unit vectors less than half a turn apart in
// the sense of growing angle; two zero vectors stand for every direction. Their h lie in [low,
// high]; NaN there: nothing is certain for these rows.
struct RowsView {
  Point<double> first, last;
  double low, high;
};

// z, and by how much z . u must clear an interval of h; NaN: nothing is certain for this key.
struct WhiteKey {
  double x, y, slack;
};

enum class Certainty : int32_t { kNone, kAll, kTest };

// A vector of that pseudo-angle, not of unit length.
QFLUX_INLINE Point<double> direction_of(double angle) {
  const bool upper = angle < 2;
  const double turned = upper ? angle : angle - 2;  // in [0, 2], from the positive x axis or back
  const double x = 1 - turned, y = turned < 1 ? turned : 2 - turned;
  return {upper ? x : -x, upper ? y : -y};
}

// Rows with pseudo-angles in [first, last] and h in [low, high], infinite where a row has none.
QFLUX_INLINE RowsView common_view(double first, double last, double low, double high) {
  const Point<double> a = direction_of(first), b = direction_of(last);
  // Just below half a turn the cone's two sides are hard to tell apart, and there is little to win.
  const bool narrow = last - first < 1.99;
  const double ra = narrow ? 1 / square_root(a.x * a.x + a.y * a.y) : 0.0;
  const double rb = narrow ? 1 / square_root(b.x * b.x + b.y * b.y) : 0.0;
  const double unknown = (low - low) + (high - high);  // NaN for an infinity
  return {{a.x * ra, a.y * ra}, {b.x * rb, b.y * rb}, low + unknown, high + unknown};
}

// A frame as keys need it: products are cheaper than quotients, and round as well for view_key's
// slack.
struct Whitening {
  Point<double> mean;
  double r11, l21, r22, unit, slack, terms;

  QFLUX_INLINE explicit Whitening(const Frame& f)
      : mean(f.mean),
        r11(1 / f.l11),
        l21(f.l21),
        r22(1 / f.l22),
        unit(f.unit),
        slack(key_slack(f)),
        terms(absolute(f.mean.x) + absolute(f.mean.y)) {}

  QFLUX_INLINE WhiteKey operator()(double kx, double ky) const {
    const double zx = (kx - mean.x) * r11, zy = (ky - mean.y - l21 * zx) * r22;
    const double square = zx * zx + zy * zy;
    const double room = slack * (absolute(kx) + absolute(ky) + terms) +
                        unit * (absolute(zx) + absolute(zy)) + (square - square);
    return {zx, zy, room};
  }
};

// Whether all rows keep the key for certain, none does, or pairs have to be tested: z . u lies
// between its values at the ends of the range, but reaches |z| where z itself lies in the range and
// -|z| where -z does.
QFLUX_INLINE Certainty classify(const RowsView& rows, const WhiteKey& z) {
  const double at_first = rows.first.x * z.x + rows.first.y * z.y;
  const double at_last = rows.last.x * z.x + rows.last.y * z.y;
  const double after_first = rows.first.x * z.y - rows.first.y * z.x;
  const double before_last = z.x * rows.last.y - z.y * rows.last.x;
  double most = at_first > at_last ? at_first : at_last;
  double least = at_first > at_last ? at_last : at_first;
  // In a range of no width z and -z are told apart by the ends' own products.
  const bool ahead = after_first >= 0 && before_last >= 0 && most >= 0;
  const bool behind = after_first <= 0 && before_last <= 0 && least <= 0;
  if (ahead || behind) {
    const double length = square_root(z.x * z.x + z.y * z.y);
    most = ahead ? length : most;
    least = behind ? -length : least;
  }
  if (least >= rows.high + z.slack) return Certainty::kAll;
  return most < rows.low - z.slack ? Certainty::kNone : Certainty::kTest;
}

// Rows sorted by angle are cut into blocks of so many; certainty is decided for whole blocks.
constexpr int32_t kRankBlock = 64;

// From an angle to a cell and from a cell to the rows in it. The circle is cut evenly into kParts,
// and each part into as many cells as rows look that way, so that rows that all look one way are
// told apart as well as rows that look everywhere.
struct CellMap {
  static constexpr int32_t kParts = 1024;

  const int32_t* offset;  // [kParts + 1]: first cell of each part
  const int32_t* first;   // [cells + 1]: rank of the first row of each cell
  int32_t rows;

  QFLUX_INLINE int32_t cell(double angle) const {
    const double scaled = angle * (kParts / kTurn);
    const int32_t part = static_cast<int32_t>(scaled);
    const int32_t count = offset[part + 1] - offset[part];
    const int32_t inside = static_cast<int32_t>((scaled - part) * count);
    return offset[part] + (inside < count ? inside : count - 1);
  }
  QFLUX_INLINE int32_t blocks() const { return (rows + kRankBlock - 1) / kRankBlock; }
};

// Blocks of ranks, counted around the circle: `inner` keep the key for certain, and what else lies
// in `outer` has to be tested pair by pair.
struct Span {
  int32_t inner, inner_count, outer, outer_count;
};

// Blocks start .. start + count - 1, modulo their number.
struct BlockRange {
  int32_t start, count;
};

QFLUX_INLINE BlockRange touched_blocks(const CellMap& map, const Arc& arc) {
  const int32_t all = map.blocks();
  if (!(arc.cosine <= 1)) return {0, 0};
  if (arc.cosine <= -1) return {0, all};
  const int32_t from = map.first[map.cell(arc.start)], to = map.first[map.cell(arc.end) + 1];
  const int32_t low = from / kRankBlock, high = (to + kRankBlock - 1) / kRankBlock;
  if (arc.start <= arc.end) return {low < all ? low : 0, from < to ? high - low : 0};
  // Ranks from .. rows - 1 and 0 .. to - 1.
  const int32_t tail = from < map.rows ? all - low : 0;
  if (tail + high >= all) return {0, all};
  return {tail > 0 ? low : 0, tail + high};
}

QFLUX_INLINE BlockRange covered_blocks(const CellMap& map, const Arc& arc) {
  const int32_t all = map.blocks();
  if (!(arc.cosine <= 1)) return {0, 0};
  if (arc.cosine <= -1) return {0, all};
  const int32_t from = map.first[map.cell(arc.start) + 1], to = map.first[map.cell(arc.end)];
  const int32_t low = (from + kRankBlock - 1) / kRankBlock;
  const int32_t high = to == map.rows ? all : to / kRankBlock;
  if (arc.start <= arc.end) return low < high ? BlockRange{low, high - low} : BlockRange{0, 0};
  return {low < all ? low : 0, all - low + high};
}

QFLUX_INLINE Span make_span(const CellMap& map, const Arc& outer, const Arc& inner) {
  const int32_t all = map.blocks();
  const BlockRange touched = touched_blocks(map, outer), covered = covered_blocks(map, inner);
  if (covered.count <= 0) return {0, 0, touched.start, touched.count};
  if (touched.count >= all) return {covered.start, covered.count, covered.start, all};
  const int32_t apart = covered.start - touched.start;
  const int32_t lead = apart < 0 ? apart + all : apart;
  // Rounding never lets an inner arc leave its outer one by a whole block; if it did, the pairs
  // would be tested.
  if (lead + covered.count > touched.count) return {0, 0, touched.start, touched.count};
  return {covered.start, covered.count, touched.start, touched.count};
}

// The blocks of a span that have to be tested: before and after the inner ones.
struct Band {
  BlockRange before, after;
};

QFLUX_INLINE Band band_of(const Span& span, int32_t all) {
  const int32_t apart = span.inner - span.outer;
  const int32_t lead = span.inner_count == 0 ? span.outer_count : apart < 0 ? apart + all : apart;
  const int32_t rest = span.outer_count - lead - span.inner_count;
  const int32_t next = span.inner + span.inner_count;
  return {{span.outer, lead}, {next < all ? next : next - all, rest > 0 ? rest : 0}};
}

}  // namespace qflux
