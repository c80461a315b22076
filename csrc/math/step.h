// One token's share of a Heun-Euler step, each rule beside its vector-Jacobian product
// (docs/operators.md, "One Heun-Euler step").
#pragma once

#include "scalar.h"

namespace qflux {

template <class T>
struct RadiusRule {
  bool active;
  T min, max, rate, reversion, target;
};

template <class T>
struct RadiusGradient {
  Point<T> moved;
  T strength;
};

template <class T>
QFLUX_INLINE T min_radius() {
  return T(1e-6);
}

// Scaled, so that squares neither overflow nor vanish.
template <class T>
QFLUX_INLINE T norm(Point<T> p) {
  const T ax = absolute(p.x), ay = absolute(p.y);
  const T scale = ax > ay ? ax : ay;
  if (!(scale > T(0))) return ax + ay;
  const T x = p.x / scale, y = p.y / scale;
  return scale * square_root(x * x + y * y);
}

// r' + rate * strength - reversion * (r' - target), before the clamp.
template <class T>
QFLUX_INLINE T free_radius(T r, T strength, const RadiusRule<T>& rule) {
  return r + rule.rate * strength - rule.reversion * (r - rule.target);
}

// x' * rho / r' with rho = clamp(free radius, min, max), r' = max(|x'|, 1e-6).
template <class T>
QFLUX_INLINE Point<T> move_radius(Point<T> moved, T strength, const RadiusRule<T>& rule) {
  if (!rule.active) return moved;
  T r = norm(moved);
  r = r < min_radius<T>() ? min_radius<T>() : r;
  T rho = free_radius(r, strength, rule);
  rho = rho < rule.min ? rule.min : rho > rule.max ? rule.max : rho;
  const T scale = rho / r;
  return {moved.x * scale, moved.y * scale};
}

template <class T>
QFLUX_INLINE RadiusGradient<T> move_radius_vjp(Point<T> moved, T strength,
                                               const RadiusRule<T>& rule, Point<T> grad) {
  if (!rule.active) return {grad, T(0)};
  const T length = norm(moved);
  const bool floored = length < min_radius<T>();
  const T r = floored ? min_radius<T>() : length;
  const T free = free_radius(r, strength, rule);
  const bool clamped = free < rule.min || free > rule.max;
  const T rho = free < rule.min ? rule.min : free > rule.max ? rule.max : free;
  const T scale = rho / r;
  const T grad_scale = grad.x * moved.x + grad.y * moved.y;
  const T grad_free = clamped ? T(0) : grad_scale / r;
  const T grad_r = grad_free * (1 - rule.reversion) - grad_scale * scale / r;
  const T radial = floored ? T(0) : grad_r / length;
  return {{grad.x * scale + radial * moved.x, grad.y * scale + radial * moved.y},
          grad_free * rule.rate};
}

// x + dt * context: a Heun stage's end point, and with half the sum of two contexts the step's.
template <class T>
QFLUX_INLINE Point<T> advance(Point<T> x, T dt, Point<T> context) {
  return {multiply_add(dt, context.x, x.x), multiply_add(dt, context.y, x.y)};
}

// skip * x + (1 - skip) * evolved
template <class T>
QFLUX_INLINE Point<T> blend(T skip, Point<T> x, Point<T> evolved) {
  return {skip * x.x + (1 - skip) * evolved.x, skip * x.y + (1 - skip) * evolved.y};
}

}  // namespace qflux
