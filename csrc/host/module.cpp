// zokernels._host: what is not a tensor operation. Instruction sets, build information, the fingerprints of a
// plan's tensors, a step's seeds, handlers of signals, and the scalar form of the shared headers for the tests. pybind11; per Python version and
// optional: the tensor libraries do not need it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/lanes_portable.h"
#include "../noise/normal.h"
#include "../noise/rounding.h"
#include "fingerprint.h"

namespace py = pybind11;

namespace {

using Block = std::array<uint32_t, 4>;

Block philox_block(const Block& counter, uint64_t seed) {
  const auto x = zk::philox<zk::Scalar>(counter[0], counter[1], counter[2], counter[3], zk::philox_key(seed));
  return {x.w[0], x.w[1], x.w[2], x.w[3]};
}

std::array<uint32_t, 8> normal_bits(const Block& words) {
  float z[8];
  zk::normal8(zk::Words<uint32_t>{{words[0], words[1], words[2], words[3]}}, z);
  std::array<uint32_t, 8> result{};
  for (int i = 0; i < 8; ++i) result[i] = zk::bits(z[i]);
  return result;
}

// The square root as the device computes it, from 1 / sqrt(s) rounded to nearest and moved by `ulps`, over
// every `stride`-th radius that the transform can produce.
py::dict check_sqrt(uint32_t stride, int ulps) {
  uint64_t tried = 0, wrong = 0;
  float smallest = 1e30f, largest = 0.0f;
  for (uint64_t v = 1; v < (uint64_t{1} << 32); v += 2 * uint64_t{stride}) {
    const float s = zk::radius_squared<float>(static_cast<uint32_t>(v), zk::kMantissa);
    const auto y = zk::bits(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(s))));
    wrong += zk::sqrt_from_rsqrt(s, zk::from_bits(y + ulps)) != __builtin_sqrtf(s);
    smallest = s < smallest ? s : smallest;
    largest = s > largest ? s : largest;
    ++tried;
  }
  py::dict result;
  result["tried"] = tried;
  result["wrong"] = wrong;
  result["smallest"] = smallest;
  result["largest"] = largest;
  return result;
}

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info = {{"compiler", __VERSION__}, {"build_type", ZK_BUILD_TYPE}};
#if !defined(__clang__)
  info["compiler"].insert(0, "gcc ");
#endif
  return info;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found = {"portable"};
  if (zk::cpu::has_avx2()) found.push_back("avx2");
  if (zk::cpu::has_avx512()) found.push_back("avx512");
  if (zk::cpu::has_vnni()) found.push_back("vnni");
  if (zk::cpu::has_amx()) found.push_back("amx");
  if (zk::cpu::has_neon()) found.push_back("neon");
  return found;
}

// derive_seed(run_seed, step, k) for k = 0 .. count - 1, as the int64 of the same bits.
std::vector<int64_t> derive_seeds(uint64_t run_seed, uint64_t step, uint32_t count) {
  std::vector<int64_t> seeds;
  for (uint32_t k = 0; k < count; ++k)
    seeds.push_back(static_cast<int64_t>(zk::derive_seed(run_seed, step, k)));
  return seeds;
}

// Of the signals of these numbers those with a handler in Python, each with it; getsignal: signal's.
py::list handled(const py::object& getsignal, const py::tuple& numbers) {
  py::list found;
  for (const py::handle number : numbers) {
    const auto handler = py::reinterpret_steal<py::object>(PyObject_CallOneArg(getsignal.ptr(),
                                                                               number.ptr()));
    if (!handler) throw py::error_already_set();
    if (PyCallable_Check(handler.ptr())) found.append(py::make_tuple(number, handler));
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side facts about this build of zokernels, and the scalar generator for tests.";
  m.def("instruction_sets", &instruction_sets,
        "Kernels that this build has and this machine can run, slowest first.");
  m.def("build_info", &build_info);
  m.def("philox", &philox_block, py::arg("counter"), py::arg("seed"), "One Philox4x32-10 block.");
  m.def("normal_bits", &normal_bits, py::arg("words"), "The eight normals of a block, as fp32 bits.");
  m.def("derive_seed", &zk::derive_seed, py::arg("run_seed"), py::arg("step"), py::arg("k"));
  m.def("handled", &handled, py::arg("getsignal"), py::arg("numbers"),
        "The signals that have a handler in Python, each with it.");
  m.def("derive_seeds", &derive_seeds, py::arg("run_seed"), py::arg("step"), py::arg("count"),
        "The seeds of a step, as int64.");
  m.def("to_half", [](float x) { return zk::cpu::Portable::to_half(x); },
        "fp16 bits of a fp32, to nearest even.");
  py::class_<zk::host::Fingerprints>(m, "Fingerprints",
                                     "What of lists of tensors operations depend on, as bytes.")
      .def(py::init<py::capsule, py::tuple>(), py::arg("capsule"), py::arg("types"))
      .def("are_values", &zk::host::Fingerprints::are_values)
      .def("of", &zk::host::Fingerprints::of, py::arg("groups"), py::arg("objects"))
      .def("matches", &zk::host::Fingerprints::matches, py::arg("kept"), py::arg("groups"),
           py::arg("objects"));
  m.def("check_sqrt", &check_sqrt, py::arg("stride"), py::arg("ulps") = 0);
}
