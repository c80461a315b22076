// The formulas of csrc/math for Python, in double, as the tests call them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "math/mass.h"
#include "math/score.h"
#include "math/statistics.h"
#include "math/step.h"
#include "math/storage.h"
#include "math/sweep.h"

namespace py = pybind11;
using namespace qflux;

namespace {

using Pair2 = std::array<double, 2>;

Point<double> point(const Pair2& p) { return {p[0], p[1]}; }
Pair2 pair(const Point<double>& p) { return {p.x, p.y}; }

template <class Score>
double score(const Pair2& query, const Pair2& key) {
  return inner_product(query[0], query[1], key[0], key[1], Score::make(0, 0, 0).bias());
}

template <class Score>
Pair2 query(const Pair2& state, double coefficient) {
  return pair(Score::query(point(state), coefficient));
}

template <class Score>
Pair2 query_vjp(const Pair2& grad, double coefficient) {
  return pair(Score::query_vjp(point(grad), coefficient));
}

using Gate = InverseGate<double>;
using Limit = HardThreshold<double>;
using Mass = Sparsemax<double>;

// tau by steps of Newton from `start`, until two keep as many pairs.
double solve_mass(const std::vector<double>& pairs, double start) {
  double tau = start, before = -1;
  for (;;) {
    double mass = 0, count = 0;
    for (double p : pairs)
      if (p > tau) mass += p - tau, ++count;
    tau = mass_step(tau, mass, count);
    if (count == before) return tau;
    before = count;
  }
}

// The gradient of a row's query, and what the key pass gets, from u of each kept key.
std::array<double, 3> mass_vjp(const std::vector<Pair2>& keys, const std::vector<double>& u) {
  MassSums<double> sums{};
  for (size_t j = 0; j < keys.size(); ++j) {
    sums.count += 1;
    sums.upstream += u[j];
    sums.key = {sums.key.x + keys[j][0], sums.key.y + keys[j][1]};
    sums.upstream_key = {sums.upstream_key.x + u[j] * keys[j][0],
                         sums.upstream_key.y + u[j] * keys[j][1]};
  }
  const Point<double> grad = mass_query_vjp(sums);
  return {grad.x, grad.y, mass_mean(sums)};
}

// The moments of keys[begin:middle] and keys[middle:end], put together.
double threshold_of_window(const Pair2& state, const std::vector<Pair2>& keys, size_t middle,
                           const Pair2& shift, double sigma, double eps) {
  Moments before, inside;
  for (size_t j = 0; j < keys.size(); ++j)
    (j < middle ? before : inside).add(keys[j][0] - shift[0], keys[j][1] - shift[1]);
  before.add(inside);
  return threshold(point(state), before, point(shift), sigma, eps);
}

RadiusRule<double> rule(const std::array<double, 5>& values) {
  return {true, values[0], values[1], values[2], values[3], values[4]};
}

Frame frame_of(const std::vector<Pair2>& keys, double eps, double square, double unit) {
  Moments window;
  for (const Pair2& key : keys) window.add(key[0] - keys[0][0], key[1] - keys[0][1]);
  return make_frame(window, point(keys[0]), eps, square, unit);
}

// How many rows there are, and of each key: all keep it (1), none does (0), or it is open (2).
std::vector<int> classified(const std::vector<Pair2>& keys, const std::vector<Pair2>& rows,
                            const std::vector<double>& tau, double eps, double unit) {
  double square = 0;
  for (const Pair2& x : rows) square += (x[0] * x[0] + x[1] * x[1]) / double(rows.size());
  const Frame frame = frame_of(keys, eps, square, unit);
  double first = HUGE_VAL, last = -HUGE_VAL, low = HUGE_VAL, high = -HUGE_VAL;
  for (size_t i = 0; i < rows.size(); ++i) {
    const RowView view = view_row(frame, rows[i][0] / 2, rows[i][1] / 2, tau[i]);
    first = std::min(first, view.angle), last = std::max(last, view.angle);
    low = std::min(low, view.low), high = std::max(high, view.high);
  }
  const RowsView view = common_view(first, last, low, high);
  std::vector<int> found;
  for (const Pair2& key : keys)
    found.push_back(static_cast<int>(classify(view, Whitening(frame)(key[0], key[1]))));
  return found;
}

}  // namespace

PYBIND11_MODULE(math_module, m) {
  m.def("widen", [](const std::vector<uint16_t>& bits, bool float16) {
    std::vector<float> numbers;
    for (const uint16_t n : bits)
      numbers.push_back(widen(n, float16 ? Storage::kFloat16 : Storage::kBfloat16));
    return numbers;
  });
  m.def("narrow", [](const std::vector<float>& numbers, bool float16) {
    std::vector<uint16_t> bits;
    for (const float n : numbers)
      bits.push_back(narrow(n, float16 ? Storage::kFloat16 : Storage::kBfloat16));
    return bits;
  });
  m.def("threshold_score", score<Limit>);
  m.def("threshold_query", query<Limit>);
  m.def("threshold_query_vjp", query_vjp<Limit>);
  m.def("threshold_kept", [](double limit, double p) { return bool(Limit{limit}.kept(p)); });
  m.def("threshold_weight",
        [](double limit, double p) { return Limit{limit}.weight(p, Limit{limit}.kept(p)); });
  m.def("threshold_derivative",
        [](double limit, double p, double grad) { return Limit{limit}.derivative(p, grad); });

  m.def("gate_score", score<Gate>);
  m.def("gate_query", query<Gate>);
  m.def("gate_query_vjp", query_vjp<Gate>);
  m.def("gate_alpha_vjp", [](const Pair2& grad, const Pair2& state) {
    return Gate::coefficient_vjp(point(grad), point(state));
  });
  m.def("gate_kept",
        [](double eps, double min_gate, double p) { return bool(Gate{eps, min_gate}.kept(p)); });
  m.def("gate_weight", [](double eps, double min_gate, double p) {
    const Gate gate{eps, min_gate};
    return gate.weight(p, gate.kept(p));
  });
  m.def("gate_derivative",
        [](double eps, double p, double grad) { return Gate{eps, 0.0}.derivative(p, grad); });

  m.def("mass_score", score<Mass>);
  m.def("mass_query", query<Mass>);
  m.def("mass_query_vjp", query_vjp<Mass>);
  m.def("mass_scale_vjp", [](const Pair2& grad, const Pair2& state) {
    return Mass::coefficient_vjp(point(grad), point(state));
  });
  m.def("mass_kept", [](double limit, double p) {
    const Mass pair{limit, 0};
    return bool(pair.kept(p + pair.bias()));
  });
  m.def("mass_weight", [](double limit, double rest, double p) {
    const Mass pair{limit, rest};
    const double above = p + pair.bias();
    return pair.weight(above, pair.kept(above));
  });
  m.def("solve_mass", solve_mass);
  m.def("mass_vjp", mass_vjp);

  m.def("threshold", threshold_of_window);

  m.def("pseudo_angle", &pseudo_angle);
  m.def("make_arc", [](const Pair2& z, double h) {
    const Arc arc = make_arc(z[0], z[1], 1 / std::hypot(z[0], z[1]), h);
    return std::array<double, 3>{arc.start, arc.end, arc.cosine};
  });
  m.def("direction_of", [](double angle) { return pair(direction_of(angle)); });
  m.def("classify", classified);
  m.def("classify_view", [](const Pair2& first, const Pair2& last, double low, double high,
                            const Pair2& z, double slack) {
    return static_cast<int>(classify({point(first), point(last), low, high}, {z[0], z[1], slack}));
  });

  m.def("move_radius", [](const Pair2& moved, double strength, const std::array<double, 5>& r) {
    return pair(move_radius(point(moved), strength, rule(r)));
  });
  m.def("move_radius_vjp",
        [](const Pair2& moved, double strength, const std::array<double, 5>& r, const Pair2& grad) {
          const auto result = move_radius_vjp(point(moved), strength, rule(r), point(grad));
          return std::make_pair(pair(result.moved), result.strength);
        });
  m.def("advance", [](const Pair2& x, double dt, const Pair2& context) {
    return pair(advance(point(x), dt, point(context)));
  });
  m.def("blend", [](double skip, const Pair2& x, const Pair2& evolved) {
    return pair(blend(skip, point(x), point(evolved)));
  });
}
