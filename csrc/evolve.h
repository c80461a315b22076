// The Heun-Euler step as a sequence of interactions and per-token rules, for any device.
//
// A `Device` offers interact(InteractParams), interact_backward(InteractBackwardParams),
// threshold_backward(ThresholdBackwardParams) and for_each_token(PairParams, functor), all in order
// on one thread pool or stream.
#pragma once

#include "params.h"

namespace qflux {

// Scratch of the backward: gradients at x, at x + k1, of the two contexts, of the strength and of
// the threshold at hand.
enum ScratchPlane : int64_t {
  kGradState = 0,
  kGradMiddle = 2,
  kGradContext = 4,
  kGradMiddleContext = 6,
  kGradStrength = 8,
  kGradThreshold = 9,
  kScratchPlanes = 10,
};

template <class T>
struct CopyToTape {
  EvolveParams<T> p;
  QFLUX_INLINE void operator()(BatchIndex b, int64_t i) const {
    store_point(p.plane(0, kTapeState), b, i, load_point(p.pair.states, b, i));
  }
};

template <class T>
struct EndOfFirstStage {
  EvolveParams<T> p;
  int64_t step;
  QFLUX_INLINE void operator()(BatchIndex b, int64_t i) const {
    const auto x = load_point(as_const(p.plane(step, kTapeState)), b, i);
    const auto context = load_point(as_const(p.plane(step, kTapeContext)), b, i);
    store_point(p.plane(step, kTapeMiddle), b, i, advance(x, p.dt.at(step, b, i), context));
  }
};

// x + (k1 + k2) / 2, recomputed alike in both directions.
template <class T>
QFLUX_INLINE Point<T> end_of_heun(const EvolveParams<T>& p, int64_t step, BatchIndex b, int64_t i) {
  const auto x = load_point(as_const(p.plane(step, kTapeState)), b, i);
  const auto c1 = load_point(as_const(p.plane(step, kTapeContext)), b, i);
  const auto c2 = load_point(as_const(p.plane(step, kTapeMiddleContext)), b, i);
  return advance(x, p.dt.at(step, b, i) / 2, {c1.x + c2.x, c1.y + c2.y});
}

template <class T>
struct EndOfStep {
  EvolveParams<T> p;
  int64_t step;
  QFLUX_INLINE void operator()(BatchIndex b, int64_t i) const {
    const auto x = load_point(as_const(p.plane(step, kTapeState)), b, i);
    auto result = x;
    if (i < p.pair.visibility(b).row_end) {
      const T strength = p.plane(step, kTapeStrength).at(b, i);
      const auto evolved = move_radius(end_of_heun(p, step, b, i), strength, p.radius);
      result = blend(p.skip.at(step, b, i), x, evolved);
    }
    const bool last = step + 1 == p.steps;
    store_point(last ? p.out : p.plane(step + 1, kTapeState), b, i, result);
    if (last) p.strength.store(b, i, 0, p.plane(step, kTapeStrength).at(b, i));
  }
};

// The interaction of either stage, at x or at x + k1. Only the first one's strength is wanted, and
// only the last step's degree.
template <class T>
QFLUX_INLINE InteractParams<T> stage_params(const EvolveParams<T>& p, int64_t step, bool middle) {
  InteractParams<T> stage{};
  stage.pair = p.pair;
  stage.pair.states = as_const(p.plane(step, middle ? kTapeMiddle : kTapeState));
  stage.pair.key_points = stage.pair.states;
  stage.context = p.plane(step, middle ? kTapeMiddleContext : kTapeContext);
  stage.threshold = p.plane(step, middle ? kTapeMiddleThreshold : kTapeThreshold);
  if (p.keeps_sums()) stage.moments = p.plane(step, middle ? kTapeMiddleKept : kTapeKept);
  if (!middle) stage.strength = p.plane(step, kTapeStrength);
  if (!middle && step + 1 == p.steps) stage.degree = p.degree;
  return stage;
}

template <class T, class Device>
void evolve_forward(Device& device, const EvolveParams<T>& p) {
  device.for_each_token(p.pair, CopyToTape<T>{p});
  for (int64_t step = 0; step < p.steps; ++step) {
    device.interact(stage_params(p, step, false));
    device.for_each_token(p.pair, EndOfFirstStage<T>{p, step});
    device.interact(stage_params(p, step, true));
    device.for_each_token(p.pair, EndOfStep<T>{p, step});
  }
}

template <class T>
struct StepGradients {
  EvolveBackwardParams<T> p;

  QFLUX_INLINE View<T> plane(int64_t which) const { return p.forward.pair.plane(p.scratch, which); }
};

// Pulls the gradient of a step's result back to x', the contexts and the strength.
template <class T>
struct EndOfStepVjp {
  StepGradients<T> g;
  int64_t step;
  QFLUX_INLINE void operator()(BatchIndex b, int64_t i) const {
    const auto& p = g.p.forward;
    const bool last = step + 1 == p.steps;
    const auto grad =
        last ? load_point(g.p.grad_out, b, i) : load_point(as_const(g.plane(kGradState)), b, i);
    Point<T> grad_x = grad, grad_moved{T(0), T(0)};
    T grad_strength = T(0), grad_skip = T(0);
    if (i < p.pair.visibility(b).row_end) {
      const auto x = load_point(as_const(p.plane(step, kTapeState)), b, i);
      const T strength = p.plane(step, kTapeStrength).at(b, i);
      const T skip = p.skip.at(step, b, i);
      const auto moved = end_of_heun(p, step, b, i);
      const auto evolved = move_radius(moved, strength, p.radius);
      grad_skip = grad.x * (x.x - evolved.x) + grad.y * (x.y - evolved.y);
      const auto pulled =
          move_radius_vjp(moved, strength, p.radius, {(1 - skip) * grad.x, (1 - skip) * grad.y});
      grad_moved = pulled.moved;
      grad_strength = pulled.strength + (last ? g.p.grad_strength.load(b, i) : T(0));
      grad_x = {skip * grad.x + grad_moved.x, skip * grad.y + grad_moved.y};
    }
    const T dt = p.dt.at(step, b, i);
    store_point(g.plane(kGradState), b, i, grad_x);
    store_point(g.plane(kGradMiddleContext), b, i, {dt / 2 * grad_moved.x, dt / 2 * grad_moved.y});
    // Half of x' is k1 itself; the other half arrives through x + k1 in the next rule.
    store_point(g.plane(kGradContext), b, i, {grad_moved.x / 2, grad_moved.y / 2});
    g.plane(kGradStrength).at(b, i) = grad_strength;
    if (g.p.grad_skip) g.p.token_grad(g.p.grad_skip, p.skip, step, b, i) += grad_skip;
  }
};

template <class T>
struct EndOfFirstStageVjp {
  StepGradients<T> g;
  int64_t step;
  QFLUX_INLINE void operator()(BatchIndex b, int64_t i) const {
    const auto& p = g.p.forward;
    const auto grad_middle = load_point(as_const(g.plane(kGradMiddle)), b, i);
    const auto half = load_point(as_const(g.plane(kGradContext)), b, i);
    const auto grad_x = load_point(as_const(g.plane(kGradState)), b, i);
    const Point<T> grad_k1{half.x + grad_middle.x, half.y + grad_middle.y};
    if (g.p.grad_dt) {
      const auto c1 = load_point(as_const(p.plane(step, kTapeContext)), b, i);
      const auto c2 = load_point(as_const(p.plane(step, kTapeMiddleContext)), b, i);
      g.p.token_grad(g.p.grad_dt, p.dt, step, b, i) +=
          grad_k1.x * c1.x + grad_k1.y * c1.y + half.x * c2.x + half.y * c2.y;
    }
    const T dt = p.dt.at(step, b, i);
    store_point(g.plane(kGradContext), b, i, {dt * grad_k1.x, dt * grad_k1.y});
    store_point(g.plane(kGradState), b, i, {grad_x.x + grad_middle.x, grad_x.y + grad_middle.y});
  }
};

template <class T>
struct CopyGradient {
  StepGradients<T> g;
  QFLUX_INLINE void operator()(BatchIndex b, int64_t i) const {
    store_point(g.p.grad_states, b, i, load_point(as_const(g.plane(kGradState)), b, i));
  }
};

// The backward of `stage_params`.
template <class T>
QFLUX_INLINE InteractBackwardParams<T> stage_backward_params(const StepGradients<T>& g,
                                                             int64_t step, bool middle) {
  const InteractParams<T> forward = stage_params(g.p.forward, step, middle);
  InteractBackwardParams<T> backward{};
  backward.pair = forward.pair;
  backward.threshold = as_const(forward.threshold);
  backward.moments = as_const(forward.moments);
  backward.grad_context = as_const(g.plane(middle ? kGradMiddleContext : kGradContext));
  if (!middle) backward.grad_strength = as_const(g.plane(kGradStrength));
  backward.grad_states = g.plane(middle ? kGradMiddle : kGradState);
  backward.grad_keys = backward.grad_states;
  backward.grad_coefficient = g.p.grad_coefficient;
  backward.accumulate = !middle;
  backward.keys_are_states = true;
  return backward;
}

// What follows stage_backward_params where the limit has a gradient: its way through tau.
template <class T>
QFLUX_INLINE ThresholdBackwardParams<T> stage_threshold_params(const StepGradients<T>& g,
                                                               int64_t step, bool middle) {
  ThresholdBackwardParams<T> backward{};
  backward.pair = stage_params(g.p.forward, step, middle).pair;
  backward.grad_threshold = as_const(g.plane(kGradThreshold));
  backward.grad_states = g.plane(middle ? kGradMiddle : kGradState);
  backward.grad_keys = backward.grad_states;
  backward.grad_coefficient = g.p.grad_coefficient;
  backward.window_grads = g.p.window_grads;
  return backward;
}

template <class T, class Device>
void stage_backward(Device& device, const StepGradients<T>& g, int64_t step, bool middle) {
  auto params = stage_backward_params(g, step, middle);
  const bool limit_vjp = has_limit_vjp(params.pair.score);
  if (limit_vjp) params.grad_threshold = g.plane(kGradThreshold);
  device.interact_backward(params);
  if (limit_vjp) device.threshold_backward(stage_threshold_params(g, step, middle));
}

// grad_dt, grad_skip and grad_coefficient are zero on entry: steps that share a number add up.
template <class T, class Device>
void evolve_backward(Device& device, const EvolveBackwardParams<T>& p) {
  const StepGradients<T> g{p};
  const PairParams<T>& pair = p.forward.pair;
  for (int64_t step = p.forward.steps - 1; step >= 0; --step) {
    device.for_each_token(pair, EndOfStepVjp<T>{g, step});
    stage_backward(device, g, step, true);
    device.for_each_token(pair, EndOfFirstStageVjp<T>{g, step});
    stage_backward(device, g, step, false);
  }
  device.for_each_token(pair, CopyGradient<T>{g});
}

}  // namespace qflux
