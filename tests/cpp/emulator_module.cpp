// The CUDA launchers, compiled against the emulator, on NumPy arrays of any strides. Test-only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/common/gather.cuh"
#include "../../csrc/cuda/common/launch.h"
#include "../../csrc/cuda/evolve/step.h"
#include "../../csrc/cuda/projection/project.h"
#include "../../csrc/cuda/sweep/sweep.h"
#include "../../csrc/emulator/emulator.h"
#include "../../csrc/evolve.h"

namespace py = pybind11;
using namespace qflux;

namespace {

template <class T>
T* data_of(const py::object& object) {
  if (object.is_none()) return nullptr;
  using Plain = std::remove_const_t<T>;
  if (!py::isinstance<py::array_t<Plain>>(object)) throw std::invalid_argument("wrong dtype");
  auto array = py::reinterpret_borrow<py::array_t<Plain>>(object);
  if constexpr (std::is_const_v<T>)
    return array.data();
  else
    return array.mutable_data();
}

// Strides in elements of an array [...][outer][inner][`last` dimensions]; one batch dimension is
// the inner one.
struct Strides {
  py::array array;
  int last;

  int64_t at(int64_t dim) const {
    return dim >= 0 && dim < array.ndim() ? array.strides(dim) / array.itemsize() : 0;
  }
  int64_t trailing(int n) const { return n < last ? at(array.ndim() - last + n) : 0; }
  int64_t inner() const { return at(array.ndim() - last - 1); }
  int64_t outer(int leading = 0) const {
    const int64_t dim = array.ndim() - last - 2;
    return dim < leading ? 0 : at(dim);
  }
};

// In half precision bfloat16 comes as the integers of its bits.
template <class T>
Storage storage_of(const py::object& object) {
  if (!std::is_same_v<std::remove_const_t<T>, float> || object.is_none()) return Storage::kSame;
  const py::array array(object);
  if (array.itemsize() != 2) return Storage::kSame;
  return array.dtype().kind() == 'f' ? Storage::kFloat16 : Storage::kBfloat16;
}

// An array [batch][tokens], or [batch][tokens][components] with `last` 2.
template <class T>
View<T> view(const py::object& object, int last) {
  const Storage storage = storage_of<T>(object);
  T* data = storage == Storage::kSame
                ? data_of<T>(object)
                : static_cast<T*>(const_cast<void*>(py::array(object).data()));
  if (data == nullptr) return {};
  const Strides strides{object, last};
  return {data,   strides.outer(), strides.inner(), strides.trailing(0), strides.trailing(1),
          storage};
}

template <class T>
PerSequence<T> per_sequence(const py::object& object) {
  if (object.is_none()) return {};
  if (!py::isinstance<py::array>(object)) return {nullptr, object.cast<T>()};
  const Strides strides{object, 0};
  return {data_of<const T>(object), T(0), strides.outer(), strides.inner()};
}

template <class T>
PerToken<T> per_token(const py::object& object) {
  if (!py::isinstance<py::array>(object)) return {nullptr, object.cast<T>()};
  const Strides strides{object, 1};
  PerToken<T> p{};
  p.data = data_of<const T>(object);
  p.per_step = strides.array.shape(0) > 1;
  p.step = p.per_step ? strides.at(0) : 0;
  p.outer = strides.outer(1);
  p.inner = strides.inner();
  p.token = strides.trailing(0);
  return p;
}

template <class T>
PairParams<T> pair_params(const py::dict& d) {
  PairParams<T> p{};
  p.states = view<const T>(d["states"], 2);
  p.key_points = view<const T>(d["keys"], 2);
  p.values = view<const T>(d["values"], 2);
  const auto batch = d["batch"].cast<std::vector<int64_t>>();
  p.outer = batch.size() > 1 ? batch[0] : 1;
  p.inner = batch.back();
  p.rows = d["rows"].cast<int64_t>();
  p.keys = d["key_count"].cast<int64_t>();
  p.value_dim = d["value_dim"].cast<int64_t>();
  p.score = static_cast<ScoreKind>(d["score"].cast<int64_t>());
  p.eps = d["eps"].cast<double>();
  p.whole_window = d["whole_window"].cast<bool>();
  p.causal = d["causal"].cast<bool>();
  p.mean = d["mean"].cast<bool>();
  p.coefficient = per_sequence<T>(d["coefficient"]);
  p.min_gate = per_sequence<T>(d["min_gate"]);
  p.lengths = per_sequence<int64_t>(d["lengths"]);
  p.row_scratch = data_of<T>(d["row_scratch"]);
  return p;
}

template <class T>
EvolveParams<T> evolve_params(const py::dict& d) {
  EvolveParams<T> p{};
  p.pair = pair_params<T>(d);
  p.steps = d["steps"].cast<int64_t>();
  p.radius.active = !d["radius"].is_none();
  if (p.radius.active) {
    const auto rule = d["radius"].cast<py::tuple>();
    const auto number = [&](int n) { return rule[n].cast<T>(); };
    p.radius = {true, number(0), number(1), number(2), number(3), number(4)};
  }
  p.dt = per_token<T>(d["dt"]);
  p.skip = per_token<T>(d["skip"]);
  p.tape = data_of<T>(d["tape"]);
  p.save = d["save"].cast<bool>();
  p.planes = d["planes"].cast<int64_t>();
  return p;
}

cuda::Launches launches(const py::dict& d) {
  return static_cast<cuda::Launches>(d["launches"].cast<int>());
}

// How a pass over pairs of floats divides its work.
py::dict schedule(int64_t batch, int owners, int64_t sources, int column_blocks) {
  using Sizes = cuda::TileTraits<float, cuda::kNarrow, 2 + cuda::kNarrow>;
  cuda::Schedule s = cuda::schedule_of<Sizes>(batch, owners, sources, column_blocks, false);
  cuda::divide_sources<Sizes>(s, sources);
  py::dict d;
  d["works"] = batch * s.owner_blocks * column_blocks;
  d["parts"] = s.parts;
  d["part_sources"] = s.part_sources;
  d["tile"] = Sizes::kTile;
  return d;
}

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

// Scratch full of NaN and guarded on both sides.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes), memory_(bytes + 2 * kGuard + kAlignment, 0xff) {
    start_ = memory_.data() + kGuard;
    start_ += (kAlignment - reinterpret_cast<uintptr_t>(start_) % kAlignment) % kAlignment;
  }
  int64_t bytes() const { return bytes_; }
  void* data() { return start_; }
  void check() const {
    for (const unsigned char* at = memory_.data(); at < memory_.data() + memory_.size(); ++at)
      if ((at < start_ || at >= start_ + bytes_) && *at != 0xff)
        throw std::runtime_error("a write outside the scratch");
  }

 private:
  static constexpr int64_t kGuard = 4096, kAlignment = 256;
  int64_t bytes_;
  std::vector<unsigned char> memory_;
  unsigned char* start_;
};

// Runs call(base, scratch) where the dict asks for a sweep, else otherwise(), with partials unless
// it says that there are none.
template <class T, class Call, class Otherwise>
void by_algorithm(const py::dict& d, PairParams<T>& pair, bool backward, const Call& call,
                  const Otherwise& otherwise) {
  const int64_t base = d.contains("sweep_base") ? d["sweep_base"].cast<int64_t>() : 0;
  if (base == 0) {
    const bool divides = !d.contains("divides") || d["divides"].cast<bool>();
    Scratch partials(divides ? cuda::partial_bytes(pair, backward) : 0);
    if (partials.bytes() > 0) pair.partials = static_cast<T*>(partials.data());
    check(otherwise());
    return partials.check();
  }
  Scratch scratch(cuda::sweep_bytes_by(base, pair, backward));
  check(call(base, scratch.bytes() > 0 ? scratch.data() : nullptr));
  scratch.check();
}

template <class T>
void interact(const py::dict& d) {
  InteractParams<T> p{};
  p.pair = pair_params<T>(d);
  p.context = view<T>(d["context"], 2);
  p.strength = view<T>(d["strength"], 1);
  p.degree = view<int32_t>(d["degree"], 1);
  p.threshold = view<T>(d["threshold"], 1);
  if (d.contains("moments")) p.moments = view<T>(d["moments"], 2);
  by_algorithm(
      d, p.pair, false,
      [&](int64_t base, void* scratch) { return cuda::interact_by(base, p, scratch, nullptr); },
      [&] { return cuda::interact(p, nullptr); });
}

template <class T>
void interact_backward(const py::dict& d) {
  InteractBackwardParams<T> p{};
  p.pair = pair_params<T>(d);
  p.grad_context = view<const T>(d["grad_context"], 2);
  p.grad_strength = view<const T>(d["grad_strength"], 1);
  p.threshold = view<const T>(d["threshold"], 1);
  if (d.contains("moments")) p.moments = view<const T>(d["moments"], 2);
  p.grad_states = view<T>(d["grad_states"], 2);
  p.grad_keys = view<T>(d["grad_keys"], 2);
  p.grad_values = view<T>(d["grad_values"], 2);
  p.grad_coefficient = view<T>(d["grad_coefficient"], 1);
  if (d.contains("grad_threshold")) p.grad_threshold = view<T>(d["grad_threshold"], 1);
  p.accumulate = d["accumulate"].cast<bool>();
  p.keys_are_states = d["keys_are_states"].cast<bool>();
  by_algorithm(
      d, p.pair, true,
      [&](int64_t base, void* scratch) {
        return cuda::interact_backward_by(base, p, scratch, nullptr);
      },
      [&] { return cuda::interact_backward(p, nullptr); });
}

template <class T>
void threshold_backward(const py::dict& d) {
  ThresholdBackwardParams<T> p{};
  p.pair = pair_params<T>(d);
  p.grad_threshold = view<const T>(d["grad_threshold"], 1);
  p.grad_states = view<T>(d["grad_states"], 2);
  p.grad_keys = view<T>(d["grad_keys"], 2);
  p.grad_coefficient = view<T>(d["grad_coefficient"], 1);
  p.window_grads = data_of<double>(d["window_grads"]);
  check(cuda::threshold_backward(p, nullptr));
}

template <class T, class Params>
void evolve_by(const py::dict& d, PairParams<T>& pair, bool backward, const Params& p) {
  by_algorithm(
      d, pair, backward,
      [&](int64_t base, void* scratch) {
        return cuda::evolve_by(launches(d), p, nullptr, {scratch, base});
      },
      [&] { return cuda::evolve_by(launches(d), p, nullptr); });
}

template <class T>
void evolve(const py::dict& d) {
  EvolveParams<T> p = evolve_params<T>(d);
  p.out = view<T>(d["out"], 2);
  p.strength = view<T>(d["strength"], 1);
  p.degree = view<int32_t>(d["degree"], 1);
  evolve_by(d, p.pair, false, p);
}

template <class T>
void evolve_backward(const py::dict& d) {
  EvolveBackwardParams<T> p{};
  p.forward = evolve_params<T>(d);
  p.grad_out = view<const T>(d["grad_out"], 2);
  p.grad_strength = view<const T>(d["grad_strength"], 1);
  p.grad_states = view<T>(d["grad_states"], 2);
  p.grad_dt = data_of<T>(d["grad_dt"]);
  p.grad_skip = data_of<T>(d["grad_skip"]);
  p.grad_coefficient = view<T>(d["grad_coefficient"], 1);
  p.scratch = data_of<T>(d["scratch"]);
  p.window_grads = data_of<double>(d["window_grads"]);
  evolve_by(d, p.forward.pair, true, p);
}

template <class T>
ProjectionParams<T> projection_params(const py::dict& d) {
  ProjectionParams<T> p{};
  p.tokens = d["tokens"].cast<int64_t>();
  p.count = d["count"].cast<int64_t>();
  p.width = d["width"].cast<int64_t>();
  p.eps = d["eps"].cast<double>();
  p.features = data_of<const T>(d["states"]);
  p.weight = data_of<const T>(d["weight"]);
  p.bias = data_of<const T>(d["bias"]);
  p.scale = data_of<const T>(d["scale"]);
  p.shift = data_of<const T>(d["shift"]);
  return p;
}

// The sizes of the scratch: planes, gram, tokens, partial, totals.
py::tuple project_sizes(int64_t tokens, int64_t count, int64_t width) {
  ProjectionParams<double> p{};
  p.tokens = tokens;
  p.count = count;
  p.width = width;
  return py::make_tuple(p.columns() * width, p.columns() * p.columns(), 2 * tokens,
                        p.chunks() * p.sums(), p.sums());
}

template <class T>
cuda::ProjectionScratch<T> projection_scratch(const py::dict& d) {
  return {data_of<T>(d["planes"]), data_of<double>(d["gram"]), data_of<double>(d["token_scratch"]),
          data_of<double>(d["partial"]), data_of<double>(d["totals"])};
}

template <class T>
void project(const py::dict& d) {
  check(cuda::project(projection_params<T>(d), projection_scratch<T>(d), data_of<T>(d["out"]),
                      nullptr));
}

template <class T>
void project_backward(const py::dict& d) {
  ProjectionParams<T> p = projection_params<T>(d);
  p.grad = data_of<const T>(d["grad"]);
  const ProjectionGradients<T> grads{data_of<T>(d["grad_features"]), data_of<T>(d["grad_weight"]),
                                     data_of<T>(d["grad_bias"]), data_of<T>(d["grad_scale"]),
                                     data_of<T>(d["grad_shift"])};
  check(cuda::project_backward(p, projection_scratch<T>(d), grads, nullptr));
}

// In the precision of the states.
template <void (*kF32)(const py::dict&), void (*kF64)(const py::dict&)>
void dispatch(const py::dict& d) {
  py::isinstance<py::array_t<double>>(d["states"]) ? kF64(d) : kF32(d);
}

}  // namespace

PYBIND11_MODULE(qflux_emulator, m) {
  m.attr("TAPE_CONTEXT") = static_cast<int64_t>(kTapeContext);
  m.attr("TAPE_PLANES") = static_cast<int64_t>(kTapePlanes);
  m.attr("TAPE_KEPT_PLANES") = static_cast<int64_t>(kTapeKeptPlanes);
  m.attr("KEPT_SUMS") = static_cast<int64_t>(kKeptSums);
  m.attr("WINDOW_SUMS") = kWindowSums;
  m.attr("SCRATCH_PLANES") = static_cast<int64_t>(kScratchPlanes);
  m.def("architectures", &cuda::architectures);
  m.def(
      "configure",
      [](int order, int64_t max_blocks, int64_t max_shared_bytes) {
        emulator::Machine& machine = emulator::machine();
        machine.order = static_cast<emulator::Order>(order);
        machine.max_blocks = max_blocks;
        machine.max_shared_bytes = max_shared_bytes;
      },
      py::arg("order"), py::arg("max_blocks"), py::arg("max_shared_bytes") = 227 * 1024);
  m.def("schedule", &schedule);
  m.attr("SWEEP_BASE") = cuda::kSweepBase;
  m.def("count_launches", [] { return std::exchange(emulator::machine().launches, 0); });
  m.def("sweep_bytes", [](const py::dict& d, bool backward) {
    return cuda::sweep_bytes_by(d["sweep_base"].cast<int64_t>(), pair_params<float>(d), backward);
  });
  m.def("count_products", [] { return std::exchange(emulator::machine().products, 0); });
  m.def("set_tensor_cores", [](bool there) { emulator::machine().tensor_cores = there; });
  m.def("count_picks", [] { return std::exchange(emulator::machine().picks, 0); });
  m.def("interact", &dispatch<interact<float>, interact<double>>);
  m.def("interact_backward", &dispatch<interact_backward<float>, interact_backward<double>>);
  m.def("threshold_backward", &dispatch<threshold_backward<float>, threshold_backward<double>>);
  m.def("evolve", &dispatch<evolve<float>, evolve<double>>);
  m.def("evolve_backward", &dispatch<evolve_backward<float>, evolve_backward<double>>);
  m.def("project_sizes", &project_sizes);
  m.def("project", &dispatch<project<float>, project<double>>);
  m.def("project_backward", &dispatch<project_backward<float>, project_backward<double>>);
}
