// What of a list of tensors an operation depends on, as bytes that can be compared: read through torch's DLPack exchange
// API, a table of C functions (DLPack 1.3), so that no torch header is needed and no reference is kept.
#pragma once

#include <pybind11/pybind11.h>

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
  // capsule: torch.Tensor.__dlpack_c_exchange_api__; types: the classes of ordinary tensors, compared by identity.
  Fingerprints(const py::capsule& capsule, const py::tuple& types) : owner_(capsule), types_(types) {
    const auto* api = capsule.get_pointer<DLPackExchangeAPI>();
    if (api->major != 1 || api->tensor_from_object == nullptr) throw py::value_error("DLPack: expected version 1");
    read_ = api->tensor_from_object;
    for (const py::handle type : types_) plain_.push_back(type.ptr());
  }

  // Of lists of tensors: how many each has, and of each tensor address, dtype, device, shape and strides. None where one is
  // not of the ordinary classes, or has no memory to read. An entry that is None counts as an empty list.
  py::object of(const py::tuple& groups) const {
    std::vector<int64_t> found;
    found.reserve(reserved_);
    for (const py::handle group : groups) {
      if (group.is_none()) {
        found.push_back(0);
        continue;
      }
      const py::object sequence = py::reinterpret_steal<py::object>(PySequence_Fast(group.ptr(), "expected lists"));
      if (!sequence) throw py::error_already_set();
      const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence.ptr());
      found.push_back(count);
      for (Py_ssize_t i = 0; i < count; ++i) {
        if (!add(PySequence_Fast_GET_ITEM(sequence.ptr(), i), found)) return py::none();
      }
    }
    reserved_ = found.size();
    return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(int64_t));
  }

 private:
  bool is_plain(const PyObject* type) const {
    for (const PyObject* plain : plain_) {
      if (type == plain) return true;
    }
    return false;
  }

  bool add(PyObject* object, std::vector<int64_t>& found) const {
    if (!is_plain(reinterpret_cast<PyObject*>(Py_TYPE(object)))) return false;
    DLTensor t;
    if (read_(object, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    int64_t dtype = 0, device = 0;
    std::memcpy(&dtype, &t.dtype, sizeof(t.dtype));
    std::memcpy(&device, &t.device, sizeof(t.device));
    const int64_t words[] = {static_cast<int64_t>(reinterpret_cast<intptr_t>(t.data)) + static_cast<int64_t>(t.byte_offset),
                             dtype | int64_t{t.ndim} << 32, device};
    found.insert(found.end(), words, words + 3);
    found.insert(found.end(), t.shape, t.shape + t.ndim);
    found.insert(found.end(), t.strides, t.strides + t.ndim);
    return true;
  }

  py::capsule owner_;
  py::tuple types_;
  std::vector<const PyObject*> plain_;
  int (*read_)(void*, DLTensor*) = nullptr;
  mutable size_t reserved_ = 0;
};

}  // namespace zk::host
