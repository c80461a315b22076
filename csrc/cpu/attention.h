// The attention of a language model's layer on the CPU, on torch's thread pool.
#pragma once

#include "../attention.h"

namespace qflux::cpu {

template <class T>
void attend(const AttentionParams<T>& params, const AttentionResults<T>& results);
// `saved` is as the forward left it, without its output; every gradient is written.
template <class T>
void attend_backward(const AttentionParams<T>& params, const AttentionResults<T>& saved,
                     const AttentionGradients<T>& grads);

}  // namespace qflux::cpu
