// The passes of a layer's attention over tokens, around its pairs.
#pragma once

#include "../../attention.h"

namespace qflux::cpu {

// Tokens that are turned at a time: their points of a cylinder fill lines of the cache.
constexpr int64_t kTurned = 16;

template <class T>
struct AttentionLoops {
  // Turns the points of tokens first .. last - 1, at most kTurned, of sequence b.
  void (*turn)(const AttentionParams<T>&, int64_t b, int64_t first, int64_t last, T* points);
  // Numbers of the same tokens, value_dim of each cylinder: `rows` with `stride` between all
  // tokens, to [cylinder][token] of this sequence and back, there added to what stands in `more` if
  // it is not null. Tokens far apart in memory share few places of a cache; the pairs are to find
  // them together.
  void (*pack)(const AttentionParams<T>&, int64_t b, int64_t first, int64_t last, const T* rows,
               int64_t stride, T* packed);
  void (*unpack)(const AttentionParams<T>&, int64_t b, int64_t first, int64_t last, const T* packed,
                 const T* more, T* rows, int64_t stride);
  // Gradients of turned queries and keys, [cylinder][token][2] of this sequence, become gradients
  // of projections, and are added to those of angles, [cylinder][token].
  void (*turn_back)(const AttentionParams<T>&, int64_t b, int64_t first, int64_t last,
                    const T* turned, const T* queries, const T* keys, T* projected, double* angle);
  // LayerNorm and gates of rows first .. last - 1; adds own values to what was gathered.
  void (*gate)(const AttentionParams<T>&, int64_t first, int64_t last, const AttentionResults<T>&);
  // Gradients of gates and, as rows `to` with `stride`, of what was gathered; adds to the sums over
  // rows [scale, shift][width].
  void (*gate_back)(const AttentionParams<T>&, int64_t first, int64_t last,
                    const AttentionResults<T>&, const AttentionGradients<T>&, T* to, int64_t stride,
                    double* sums);
};

}  // namespace qflux::cpu
