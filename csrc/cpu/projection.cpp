// Prepares the matrix, shares tokens among threads and turns the sums over tokens into gradients.
#include "projection.h"

#include <vector>

#include "isa/dispatch.h"
#include "parallel.h"

namespace qflux::cpu {
namespace {

constexpr int64_t kPadding = 16;       // the widest vector
constexpr int64_t kOutputs = 1 << 15;  // a share of work that is worth waking a thread for

// A, G and what the loops read of them.
template <class T>
class Matrix {
 public:
  explicit Matrix(const ProjectionParams<T>& p)
      : stride_((p.width + kPadding - 1) / kPadding * kPadding),
        centred_(static_cast<size_t>(p.columns() * p.width)),
        gram_(static_cast<size_t>(p.columns() * p.columns())),
        columns_(static_cast<size_t>(p.columns() * stride_)),
        shift_(static_cast<size_t>(stride_)) {
    const int64_t columns = p.columns(), width = p.width;
    for (int64_t j = 0; j < columns; ++j) {
      double* column = &centred_[j * width];
      double mean = 0;
      for (int64_t k = 0; k < width; ++k) mean += column[k] = p.matrix(k, j);
      mean /= static_cast<double>(width);
      for (int64_t k = 0; k < width; ++k) {
        column[k] -= mean;
        columns_[j * stride_ + k] = static_cast<T>(double(p.scale_at(k)) * column[k]);
      }
      for (int64_t i = 0; i <= j; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < width; ++k)
          sum = multiply_add(centred_[i * width + k], column[k], sum);
        gram_[i * columns + j] = gram_[j * columns + i] = sum / static_cast<double>(width);
      }
    }
    for (int64_t k = 0; k < width; ++k) shift_[k] = p.shift ? p.shift[k] : T(0);
  }

  const double* centred() const { return centred_.data(); }  // [columns][width]
  ProjectionPlanes<T> planes() const {
    return {columns_.data(), shift_.data(), gram_.data(), stride_};
  }

 private:
  int64_t stride_;
  std::vector<double> centred_, gram_;
  std::vector<T> columns_, shift_;
};

template <class T>
void finish(const ProjectionParams<T>& p, const double* centred, const double* sums,
            const ProjectionGradients<T>& grads) {
  const int64_t width = p.width, columns = p.columns();
  const double* triangle_sums = sums + p.sum_columns() * width;
  for (int64_t k = 0; k < width; ++k) {
    double of_scale = 0;
    for (int64_t j = 0; j < columns; ++j)
      of_scale = multiply_add(centred[j * width + k], sums[j * width + k], of_scale);
    grads.scale[k] = static_cast<T>(of_scale);
    grads.shift[k] = static_cast<T>(sums[columns * width + k]);
  }
  for (int64_t j = 0; j < columns; ++j) {
    double mean = 0;
    for (int64_t k = 0; k < width; ++k) mean += double(p.scale_at(k)) * sums[j * width + k];
    mean /= static_cast<double>(width);
    for (int64_t k = 0; k < width; ++k) {
      double product = 0;
      for (int64_t i = 0; i < columns; ++i)
        product = multiply_add(centred[i * width + k], triangle_sums[triangle(i, j)], product);
      const double scaled = double(p.scale_at(k)) * sums[j * width + k];
      const T grad = static_cast<T>(weight_vjp(scaled, mean, product, width));
      (j < p.count ? grads.weight[k * p.count + j] : grads.bias[k]) = grad;
    }
  }
}

}  // namespace

template <class T>
void project(const ProjectionParams<T>& p, T* out) {
  const Matrix<T> matrix(p);
  const ProjectionPlanes<T> planes = matrix.planes();
  parallel_for(0, p.tokens, 1 + kOutputs / p.width, [&](int64_t begin, int64_t end) {
    loops<T>().projection.forward(p, planes, begin, end, out);
  });
}

template <class T>
void project_backward(const ProjectionParams<T>& p, const ProjectionGradients<T>& grads) {
  const Matrix<T> matrix(p);
  const ProjectionPlanes<T> planes = matrix.planes();
  const int64_t chunks = p.chunks(), size = grads.weight ? p.sums() : 0;
  std::vector<CompensatedSum<double>> partial(static_cast<size_t>(chunks * size));
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      loops<T>().projection.backward(p, planes, p.chunk_begin(chunk, chunks),
                                     p.chunk_begin(chunk + 1, chunks), grads.features,
                                     size ? &partial[chunk * size] : nullptr);
  });
  if (size == 0) return;
  std::vector<double> sums(static_cast<size_t>(size));
  parallel_for(0, size, 1 + kOutputs / chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t n = begin; n < end; ++n) partial[n].add(partial[chunk * size + n]);
    for (int64_t n = begin; n < end; ++n) sums[n] = partial[n].get();
  });
  finish(p, matrix.centred(), sums.data(), grads);
}

template void project(const ProjectionParams<float>&, float*);
template void project(const ProjectionParams<double>&, double*);
template void project_backward(const ProjectionParams<float>&, const ProjectionGradients<float>&);
template void project_backward(const ProjectionParams<double>&, const ProjectionGradients<double>&);

}  // namespace qflux::cpu
