// The turn of a point by an angle, given by its cosine and sine, and its derivative.
#pragma once

#include "scalar.h"

namespace qflux {

template <class T>
QFLUX_INLINE Point<T> turned(Point<T> p, T cosine, T sine) {
  return {p.x * cosine - p.y * sine, p.x * sine + p.y * cosine};
}
// d loss / d p: the turn back.
template <class T>
QFLUX_INLINE Point<T> turn_vjp(Point<T> grad, T cosine, T sine) {
  return turned(grad, cosine, -sine);
}
// d loss / d angle, from the turned point.
template <class T>
QFLUX_INLINE T angle_vjp(Point<T> grad, Point<T> turned) {
  return grad.y * turned.x - grad.x * turned.y;
}

}  // namespace qflux
