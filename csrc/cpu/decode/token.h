// A further token through the language model (qflux/models/lm.py) behind a cache, up to what the
// output layer reads: embedding and projection, layers, LayerNorm. A layer (qflux/models/layers.py)
// is
//
//   u = conv(norm(h));   q, k, v, gate[, own] = inputs(u);   q, k turned by the token's angle
//   k, v join the cache;   c = what q gathers there
//   h = h + output(norm(c + own) silu(gate))
//   g, u = mlp_inputs(mlp_conv(mlp_norm(h)));   h = h + mlp_output(silu(g) u)
//
// on vectors of a few hundred numbers, where a call of an operation costs more than what it does.
#pragma once

#include "decode.h"

namespace qflux::cpu {

template <class T>
struct NormParams {
  const T *weight, *bias;  // null: one, and zero
  double eps;
};

// A causal convolution of each channel with `width` taps; width 1 for none.
template <class T>
struct ConvolutionParams {
  int64_t width;
  const T *weight, *bias;  // [channels][width], [channels] or null
  const T* past;           // [batch][width - 1][channels]: the inputs so far
  T* next;                 // the same with this token's
};

template <class T>
struct LinearParams {
  const T *weight, *bias;  // [rows][columns], [rows] or null
  int64_t rows, columns;
};

template <class T>
struct LayerParams {
  NormParams<T> norm, gathered_norm, mlp_norm;
  ConvolutionParams<T> convolution, mlp_convolution;
  LinearParams<T> inputs, output;
  // Without weights: there is no MLP.
  LinearParams<T> mlp_inputs, mlp_output;
  int64_t cylinders, value_dim;
  // Values of the token's own have a projection; else they are u, each number with a factor, again
  // from the start where it is narrower; else, without factors, what others get.
  bool own;
  const T* own_scale;  // [cylinders][value_dim], or null
  bool averages;       // a row's weights sum to one; else what it gathers is divided by its degree
  // Of the cache with room for this token, which is the last; the rest of it the layer writes.
  CachedRows<T> rows;
  View<T> keys, values;  // the buffers of the cache
};

// Points of radius low + (high - low) sigmoid(radius_logit) at a phase.
template <class T>
struct EmbeddingParams {
  int64_t vocabulary, cylinders;
  const T *radius_logit, *phase;  // [vocabulary][cylinders]
  double low, high;
};

template <class T>
struct TokenParams {
  int64_t batch, hidden;
  const int64_t* ids;  // [batch]
  EmbeddingParams<T> embedding;
  LinearParams<T> projection;
  const T* angle;  // [cylinders], of this token
  std::vector<LayerParams<T>> layers;
  NormParams<T> norm;
  T* out;  // [batch][hidden]
};

// False, and what was written is void, for an id outside the vocabulary, and where an operator has
// to treat what is not finite or very large.
template <class T>
bool step_token(const TokenParams<T>& params);

}  // namespace qflux::cpu
