// project_norm (math/projection.h). Forward: the matrix, then the tokens. Backward: the matrix, the
// tokens' own gradients, sums over chunks of tokens, the sums of these, the parameters' gradients.
// Every sum is taken in a fixed order by one thread or one block.
#include "../../math/sums.h"
#include "../common/runtime.cuh"
#include "project.h"

namespace qflux::cuda {
namespace {

constexpr int kProjectThreads = 256;
constexpr int kTile = 32;                        // tokens of a block
constexpr int kLanes = kProjectThreads / kTile;  // threads that share a token
constexpr int kGroup = 8;                        // tokens for which a thread reads the matrix once
constexpr int kAtOnce = 4;                       // columns that a thread sums together
constexpr int kSumThreads = 128;                 // outputs of a block that sums over tokens
constexpr int kSumTile = 64;                     // tokens whose sums are taken in T from zero

struct BlockSums {
  double at[kProjectThreads];
};
struct TokenParts {
  double at[kAtOnce][kTile][kLanes];
};
struct TokenNumbers {
  double inverse[kTile], variance[kTile];
};
template <class T>
struct SumFactors {
  T at[kSumTile][kAtOnce];
};

__device__ __forceinline__ double sum_over_block(BlockSums& shared, double part) {
  shared.at[threadIdx.x] = part;
  __syncthreads();
#pragma unroll 1
  for (int half = kProjectThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half)
      shared.at[threadIdx.x] += shared.at[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = shared.at[0];
  __syncthreads();
  return sum;
}

// A block finds one entry of the Gram matrix; those on the diagonal also write their column of A.
template <class T>
__global__ void __launch_bounds__(kProjectThreads)
    project_matrix(ProjectionParams<T> p, ProjectionScratch<T> scratch) {
  QFLUX_SHARED(BlockSums, shared);
  const int64_t columns = p.columns();
  const double scale = 1 / static_cast<double>(p.width);
  for (int64_t entry = blockIdx.x; entry < p.triangle_size(); entry += gridDim.x) {
    int64_t j = 0;
    while (triangle(0, j + 1) <= entry) ++j;
    const int64_t i = entry - triangle(0, j);
    double sum_i = 0, sum_j = 0;
    for (int64_t k = threadIdx.x; k < p.width; k += kProjectThreads) {
      sum_i += p.matrix(k, i);
      sum_j += p.matrix(k, j);
    }
    const double mean_i = sum_over_block(shared, sum_i) * scale;
    const double mean_j = sum_over_block(shared, sum_j) * scale;
    double product = 0;
    for (int64_t k = threadIdx.x; k < p.width; k += kProjectThreads) {
      const double a = p.matrix(k, j) - mean_j;
      product = multiply_add(p.matrix(k, i) - mean_i, a, product);
      if (i == j) scratch.planes[j * p.width + k] = static_cast<T>(a);
    }
    const double gram = sum_over_block(shared, product) * scale;
    if (threadIdx.x == 0) scratch.gram[i * columns + j] = scratch.gram[j * columns + i] = gram;
  }
}

// r of every token of a tile; a token past the end repeats the last one.
template <class T>
__device__ __forceinline__ void find_inverses(const ProjectionParams<T>& p, const double* gram,
                                              int64_t first, TokenParts& parts,
                                              TokenNumbers& numbers) {
  const int lane = threadIdx.x % kLanes, own = threadIdx.x / kLanes;
  const int64_t token = first + own < p.tokens ? first + own : p.tokens - 1;
  const T* features = p.token(token);
  double part = 0;
#pragma unroll 1
  for (int64_t j = lane; j < p.columns(); j += kLanes)
    part = multiply_add(gram_product(gram, features, p.count, j),
                        double(extended(features, p.count, j)), part);
  parts.at[0][own][lane] = part;
  __syncthreads();
  if (threadIdx.x < kTile) {
    double variance = 0;
    for (int l = 0; l < kLanes; ++l) variance += parts.at[0][threadIdx.x][l];
    numbers.inverse[threadIdx.x] = inverse_deviation(variance, p.eps);
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kProjectThreads)
    project_tokens(ProjectionParams<T> p, ProjectionScratch<T> scratch, T* out) {
  QFLUX_SHARED(TokenParts, parts);
  QFLUX_SHARED(TokenNumbers, numbers);
  QFLUX_DYNAMIC_SHARED(memory);
  T* scaled = reinterpret_cast<T*>(memory);  // [columns][kTile]
  const int64_t columns = p.columns(), width = p.width;
  for (int64_t first = blockIdx.x * int64_t{kTile}; first < p.tokens;
       first += gridDim.x * int64_t{kTile}) {
    find_inverses(p, scratch.gram, first, parts, numbers);
    for (int64_t n = threadIdx.x; n < columns * kTile; n += kProjectThreads) {
      const int64_t own = n % kTile, j = n / kTile;
      const int64_t token = first + own < p.tokens ? first + own : p.tokens - 1;
      scaled[n] = static_cast<T>(numbers.inverse[own]) * extended(p.token(token), p.count, j);
    }
    __syncthreads();
    for (int64_t n = threadIdx.x; n < width * (kTile / kGroup); n += kProjectThreads) {
      const int64_t k = n % width, group = n / width * kGroup;
      const T scale = p.scale_at(k), shift = p.shift ? p.shift[k] : T(0);
      T sum[kGroup];
#pragma unroll
      for (int t = 0; t < kGroup; ++t) sum[t] = shift;
#pragma unroll 1
      for (int64_t j = 0; j < columns; ++j) {
        const T a = scale * scratch.planes[j * width + k];
#pragma unroll
        for (int t = 0; t < kGroup; ++t)
          sum[t] = multiply_add(a, scaled[j * kTile + group + t], sum[t]);
      }
#pragma unroll
      for (int t = 0; t < kGroup; ++t)
        if (first + group + t < p.tokens) out[(first + group + t) * width + k] = sum[t];
    }
    __syncthreads();
  }
}

// r and v of every token, and the gradients of the features.
template <class T>
__global__ void __launch_bounds__(kProjectThreads)
    project_tokens_backward(ProjectionParams<T> p, ProjectionScratch<T> scratch, T* grad_features) {
  QFLUX_SHARED(TokenParts, parts);
  QFLUX_SHARED(TokenNumbers, numbers);
  QFLUX_DYNAMIC_SHARED(memory);
  double* pulled = reinterpret_cast<double*>(memory);  // m: [columns][kTile]
  const int64_t columns = p.columns(), width = p.width;
  const int lane = threadIdx.x % kLanes, own = threadIdx.x / kLanes;
  for (int64_t first = blockIdx.x * int64_t{kTile}; first < p.tokens;
       first += gridDim.x * int64_t{kTile}) {
    const int64_t token = first + own < p.tokens ? first + own : p.tokens - 1;
    find_inverses(p, scratch.gram, first, parts, numbers);
#pragma unroll 1
    for (int64_t begin = 0; begin < columns; begin += kAtOnce) {
      T sum[kAtOnce] = {};
      for (int64_t k = lane; k < width; k += kLanes) {
        const T g = p.scale_at(k) * p.grad[token * width + k];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          if (begin + n < columns)
            sum[n] = multiply_add(g, scratch.planes[(begin + n) * width + k], sum[n]);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) parts.at[n][own][lane] = static_cast<double>(sum[n]);
      __syncthreads();
      if (threadIdx.x < kAtOnce * kTile) {
        const int64_t t = threadIdx.x % kTile, n = threadIdx.x / kTile;
        double total = 0;
        for (int l = 0; l < kLanes; ++l) total += parts.at[n][t][l];
        if (begin + n < columns) pulled[(begin + n) * kTile + t] = total;
      }
      __syncthreads();
    }
    if (threadIdx.x < kTile && first + threadIdx.x < p.tokens) {
      const int64_t t = first + threadIdx.x;
      double grad_inverse = 0;
      for (int64_t j = 0; j < columns; ++j)
        grad_inverse = multiply_add(pulled[j * kTile + threadIdx.x],
                                    double(extended(p.token(t), p.count, j)), grad_inverse);
      const double inverse = numbers.inverse[threadIdx.x];
      const double variance = variance_vjp(inverse, grad_inverse);
      numbers.variance[threadIdx.x] = variance;
      scratch.tokens[t] = inverse;
      scratch.tokens[p.tokens + t] = variance;
    }
    __syncthreads();
    if (grad_features && first + own < p.tokens)
#pragma unroll 1
      for (int64_t j = lane; j < p.count; j += kLanes)
        grad_features[token * p.count + j] = static_cast<T>(
            feature_vjp(numbers.inverse[own], pulled[j * kTile + own], numbers.variance[own],
                        gram_product(scratch.gram, p.token(token), p.count, j)));
    __syncthreads();
  }
}

// Entries of Q over the tokens of a chunk.
template <class T>
__device__ __forceinline__ void sum_triangle(const ProjectionParams<T>& p, const double* tokens,
                                             int64_t first, int64_t last, double* out) {
  for (int64_t entry = threadIdx.x; entry < p.triangle_size(); entry += kSumThreads) {
    int64_t j = 0;
    while (triangle(0, j + 1) <= entry) ++j;
    const int64_t i = entry - triangle(0, j);
    CompensatedSum<double> total;
#pragma unroll 1
    for (int64_t tile = first; tile < last; tile += kSumTile) {
      const int64_t end = tile + kSumTile < last ? tile + kSumTile : last;
      double sum = 0;
      for (int64_t t = tile; t < end; ++t) {
        const T* features = p.token(t);
        sum += tokens[p.tokens + t] * double(extended(features, p.count, i)) *
               double(extended(features, p.count, j));
      }
      total.add(sum);
    }
    out[entry] = total.get();
  }
}

// Work: for every chunk of tokens, kAtOnce columns of S and of the sum of g by kSumThreads outputs;
// then Q of every chunk.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    project_sums(ProjectionParams<T> p, ProjectionScratch<T> scratch, int64_t chunks,
                 int64_t column_blocks, int64_t output_blocks) {
  QFLUX_SHARED(SumFactors<T>, factors);
  const int64_t width = p.width, blocks = chunks * column_blocks * output_blocks;
  for (int64_t work = blockIdx.x; work < blocks + chunks; work += gridDim.x) {
    const int64_t chunk = work % chunks;
    const int64_t first = p.chunk_begin(chunk, chunks), last = p.chunk_begin(chunk + 1, chunks);
    double* partial = scratch.partial + chunk * p.sums();
    if (work >= blocks) {
      sum_triangle(p, scratch.tokens, first, last, partial + p.sum_columns() * width);
      continue;
    }
    const int64_t begin = work / chunks % column_blocks * kAtOnce;
    const int64_t k = work / chunks / column_blocks * kSumThreads + threadIdx.x;
    CompensatedSum<double> total[kAtOnce];
#pragma unroll 1
    for (int64_t tile = first; tile < last; tile += kSumTile) {
      const int count = static_cast<int>(last - tile < kSumTile ? last - tile : kSumTile);
      for (int n = threadIdx.x; n < count * kAtOnce; n += kSumThreads) {
        const int64_t t = tile + n / kAtOnce, j = begin + n % kAtOnce;
        const T inverse = static_cast<T>(scratch.tokens[t]);
        factors.at[n / kAtOnce][n % kAtOnce] =
            j < p.columns() ? inverse * extended(p.token(t), p.count, j) : T(1);
      }
      __syncthreads();
      T sum[kAtOnce] = {};
      if (k < width)
        for (int t = 0; t < count; ++t) {
          const T g = p.grad[(tile + t) * width + k];
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n) sum[n] = multiply_add(g, factors.at[t][n], sum[n]);
        }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) total[n].add(sum[n]);
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (k < width && begin + n < p.sum_columns())
        partial[(begin + n) * width + k] = total[n].get();
  }
}

template <class T>
__global__ void __launch_bounds__(kProjectThreads)
    project_totals(ProjectionParams<T> p, ProjectionScratch<T> scratch, int64_t chunks) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kProjectThreads;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kProjectThreads + threadIdx.x; n < p.sums();
       n += stride) {
    CompensatedSum<double> total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      total.add(scratch.partial[chunk * p.sums() + n]);
    scratch.totals[n] = total.get();
  }
}

// A block for each column of [W b], and one for scale and shift.
template <class T>
__global__ void __launch_bounds__(kProjectThreads)
    project_parameters(ProjectionParams<T> p, ProjectionScratch<T> scratch,
                       ProjectionGradients<T> grads) {
  QFLUX_SHARED(BlockSums, shared);
  const int64_t width = p.width, columns = p.columns();
  const double* triangle_sums = scratch.totals + p.sum_columns() * width;
  for (int64_t j = blockIdx.x; j <= columns; j += gridDim.x) {
    const double* sums = scratch.totals + j * width;
    if (j == columns) {
      for (int64_t k = threadIdx.x; k < width; k += kProjectThreads) {
        double of_scale = 0;
#pragma unroll 1
        for (int64_t i = 0; i < columns; ++i)
          of_scale = multiply_add(double(scratch.planes[i * width + k]),
                                  scratch.totals[i * width + k], of_scale);
        grads.scale[k] = static_cast<T>(of_scale);
        grads.shift[k] = static_cast<T>(sums[k]);
      }
      continue;
    }
    double part = 0;
    for (int64_t k = threadIdx.x; k < width; k += kProjectThreads)
      part += double(p.scale_at(k)) * sums[k];
    const double mean = sum_over_block(shared, part) / static_cast<double>(width);
    for (int64_t k = threadIdx.x; k < width; k += kProjectThreads) {
      double product = 0;
#pragma unroll 1
      for (int64_t i = 0; i < columns; ++i)
        product = multiply_add(double(scratch.planes[i * width + k]), triangle_sums[triangle(i, j)],
                               product);
      const double scaled = double(p.scale_at(k)) * sums[k];
      const T grad = static_cast<T>(weight_vjp(scaled, mean, product, width));
      if (j < p.count)
        grads.weight[k * p.count + j] = grad;
      else
        grads.bias[k] = grad;
    }
  }
}

int64_t blocks_of(int64_t work, int64_t each) { return (work + each - 1) / each; }

template <class T>
const char* run(const ProjectionParams<T>& p, const ProjectionScratch<T>& scratch, T* out,
                void* stream) {
  Queue queue(stream);
  queue.launch(project_matrix<T>, {p.triangle_size(), kProjectThreads}, p, scratch);
  const int64_t shared = p.columns() * kTile * static_cast<int64_t>(sizeof(T));
  queue.launch(project_tokens<T>, {blocks_of(p.tokens, kTile), kProjectThreads, shared}, p, scratch,
               out);
  return queue.error();
}

template <class T>
const char* run(const ProjectionParams<T>& p, const ProjectionScratch<T>& scratch,
                const ProjectionGradients<T>& grads, void* stream) {
  const int64_t shared = p.columns() * kTile * static_cast<int64_t>(sizeof(double));
  Queue queue(stream);
  queue.launch(project_matrix<T>, {p.triangle_size(), kProjectThreads}, p, scratch);
  queue.launch(project_tokens_backward<T>, {blocks_of(p.tokens, kTile), kProjectThreads, shared}, p,
               scratch, grads.features);
  if (scratch.partial == nullptr) return queue.error();
  const int64_t chunks = p.chunks();
  const int64_t column_blocks = blocks_of(p.sum_columns(), kAtOnce);
  const int64_t output_blocks = blocks_of(p.width, kSumThreads);
  queue.launch(project_sums<T>, {chunks * (column_blocks * output_blocks + 1), kSumThreads}, p,
               scratch, chunks, column_blocks, output_blocks);
  queue.launch(project_totals<T>, {blocks_of(p.sums(), kProjectThreads), kProjectThreads}, p,
               scratch, chunks);
  queue.launch(project_parameters<T>, {p.columns() + 1, kProjectThreads}, p, scratch, grads);
  return queue.error();
}

}  // namespace

const char* project(const ProjectionParams<float>& params, const ProjectionScratch<float>& scratch,
                    float* out, void* stream) {
  return run(params, scratch, out, stream);
}
const char* project(const ProjectionParams<double>& params,
                    const ProjectionScratch<double>& scratch, double* out, void* stream) {
  return run(params, scratch, out, stream);
}
const char* project_backward(const ProjectionParams<float>& params,
                             const ProjectionScratch<float>& scratch,
                             const ProjectionGradients<float>& grads, void* stream) {
  return run(params, scratch, grads, stream);
}
const char* project_backward(const ProjectionParams<double>& params,
                             const ProjectionScratch<double>& scratch,
                             const ProjectionGradients<double>& grads, void* stream) {
  return run(params, scratch, grads, stream);
}

}  // namespace qflux::cuda
