// What of a list of tensors an operation depends on, as bytes that can be compared: read through torch's
// DLPack exchange API, a table of C functions (DLPack 1.3), so that no torch header is needed and no
// reference is kept.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace zk::host {

namespace py = pybind11;

// The part of dlpack.h 1.x that is read here; the layout is the standard's.
struct DLDevice {
  int32_t type, index;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

class Fingerprints {
 public:
  // capsule: torch.Tensor.__dlpack_c_exchange_api__; types: the classes of ordinary tensors, compared by
  // identity.
  Fingerprints(const py::capsule& capsule, const py::tuple& types) : owner_(capsule), types_(types) {
    const auto* api = capsule.get_pointer<DLPackExchangeAPI>();
    if (api->major != 1 || api->tensor_from_object == nullptr)
      throw py::value_error("DLPack: expected version 1");
    read_ = api->tensor_from_object;
    for (const py::handle type : types_) plain_.push_back(type.ptr());
  }

  // Of lists of tensors: how many each has, and of each tensor address, dtype, device, shape and strides;
  // with `objects` also which object it is. None where one is not of the ordinary classes, or has no memory
  // to read. An entry that is None counts as an empty list.
  py::object of(const py::tuple& groups, bool objects) const {
    std::vector<int64_t> found;
    const auto add = [&](const int64_t* words, int64_t count) {
      found.insert(found.end(), words, words + count);
      return true;
    };
    if (!read(groups, objects, add)) return py::none();
    return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(int64_t));
  }

  // Whether what a planned call brings besides its tensors is ordinary: vectors on the device of `first`, one
  // coefficient for each seed, and one value in each of the others, which may be None. What is not is
  // somebody else's to judge.
  bool are_values(const py::handle& first, const py::handle& seeds, const py::handle& coeffs,
                  const py::handle& decay, const py::handle& rounding_seed,
                  const py::handle& mask_seed) const {
    constexpr DLDataType kInt64{0, 64, 1}, kFloat32{2, 32, 1};
    DLTensor t;
    if (!is_plain(reinterpret_cast<const PyObject*>(Py_TYPE(first.ptr()))) || !look(first.ptr(), &t))
      return false;
    const DLDevice device = t.device;
    const auto count = [&](const py::handle& value, const DLDataType& dtype) -> int64_t {
      if (!is_plain(reinterpret_cast<const PyObject*>(Py_TYPE(value.ptr()))) || !look(value.ptr(), &t))
        return -1;
      const bool ordinary = t.ndim == 1 && std::memcmp(&t.dtype, &dtype, sizeof(dtype)) == 0 &&
                            std::memcmp(&t.device, &device, sizeof(device)) == 0 &&
                            (t.strides[0] == 1 || t.shape[0] < 2);
      return ordinary ? t.shape[0] : -1;
    };
    const auto is_one = [&](const py::handle& value, const DLDataType& dtype) {
      return value.is_none() || count(value, dtype) == 1;
    };
    const int64_t directions = count(seeds, kInt64);
    return directions >= 0 && count(coeffs, kFloat32) == directions && is_one(decay, kFloat32) &&
           is_one(rounding_seed, kInt64) && is_one(mask_seed, kInt64);
  }

  // Whether the fingerprint of these lists would be `kept`.
  bool matches(const py::bytes& kept, const py::tuple& groups, bool objects) const {
    const char* at = PyBytes_AS_STRING(kept.ptr());
    const char* const end = at + PyBytes_GET_SIZE(kept.ptr());
    const auto compare = [&](const int64_t* words, int64_t count) {
      const auto bytes = static_cast<std::ptrdiff_t>(count * sizeof(int64_t));
      if (end - at < bytes || std::memcmp(at, words, bytes) != 0) return false;
      at += bytes;
      return true;
    };
    return read(groups, objects, compare) && at == end;
  }

 private:
  bool is_plain(const PyObject* type) const {
    for (const PyObject* plain : plain_) {
      if (type == plain) return true;
    }
    return false;
  }

  bool look(PyObject* object, DLTensor* found) const {
    if (read_(object, found) == 0) return true;
    PyErr_Clear();
    return false;
  }

  // take(words, count) gets the fingerprint in pieces; the first false ends it.
  template <class Take>
  bool read(const py::tuple& groups, bool objects, const Take& take) const {
    for (const py::handle group : groups) {
      int64_t count = 0;
      if (group.is_none()) {
        if (!take(&count, 1)) return false;
        continue;
      }
      const auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(group.ptr(), "expected lists"));
      if (!sequence) throw py::error_already_set();
      count = PySequence_Fast_GET_SIZE(sequence.ptr());
      if (!take(&count, 1)) return false;
      for (int64_t i = 0; i < count; ++i) {
        if (!read_one(PySequence_Fast_GET_ITEM(sequence.ptr(), i), objects, take)) return false;
      }
    }
    return true;
  }

  template <class Take>
  bool read_one(PyObject* object, bool objects, const Take& take) const {
    if (!is_plain(reinterpret_cast<PyObject*>(Py_TYPE(object)))) return false;
    DLTensor t;
    if (!look(object, &t)) return false;
    int64_t dtype = 0, device = 0;
    std::memcpy(&dtype, &t.dtype, sizeof(t.dtype));
    std::memcpy(&device, &t.device, sizeof(t.device));
    const int64_t words[] = {number(t.data) + static_cast<int64_t>(t.byte_offset),
                             dtype | int64_t{t.ndim} << 32, device, objects ? number(object) : 0};
    return take(words, 4) && take(t.shape, t.ndim) && take(t.strides, t.ndim);
  }

  static int64_t number(const void* address) {
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(address));
  }

  py::capsule owner_;
  py::tuple types_;
  std::vector<const PyObject*> plain_;
  int (*read_)(void*, DLTensor*) = nullptr;
};

}  // namespace zk::host
