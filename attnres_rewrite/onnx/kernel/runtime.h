// What the operator needs of ONNX Runtime's C interface: errors as exceptions, and tensors.
//
// Only functions of version kApiVersion are used, which newer releases keep.

#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "third_party/onnxruntime_c_api.h"

namespace attnres {

constexpr uint32_t kApiVersion = ORT_API_VERSION;
constexpr size_t kMostDimensions = 16;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Ort {
  const OrtApi* api;

  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    const std::string message = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    throw Failure(message);
  }

  // Exceptions end here: on the other side is C.
  template <class Body>
  OrtStatus* guarded(Body body) const {
    try {
      body();
      return nullptr;
    } catch (const std::exception& error) {
      return api->CreateStatus(ORT_FAIL, error.what());
    }
  }
};

// Sizes without memory of their own: a step of generation looks at hundreds of tensors, and computes little with each.
struct Tensor {
  ONNXTensorElementDataType type;
  size_t rank;
  int64_t sizes[kMostDimensions];
  const void* data;

  size_t count() const {
    size_t product = 1;
    for (size_t i = 0; i < rank; ++i) product *= static_cast<size_t>(sizes[i]);
    return product;
  }

  size_t width() const { return static_cast<size_t>(sizes[rank - 1]); }

  bool has_sizes_of(const Tensor& other) const {
    return rank == other.rank && std::equal(sizes, sizes + rank, other.sizes);
  }

  bool is_like(const Tensor& other) const { return type == other.type && has_sizes_of(other); }
};

inline Tensor tensor(const Ort& ort, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ort.check(ort.api->GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(ort.api->ReleaseTensorTypeAndShapeInfo)> owner(
      info, ort.api->ReleaseTensorTypeAndShapeInfo);
  Tensor result;
  ort.check(ort.api->GetTensorElementType(info, &result.type));
  ort.check(ort.api->GetDimensionsCount(info, &result.rank));
  if (result.rank == 0 || result.rank > kMostDimensions) {
    throw Failure("Attention Residuals take tensors of one to " + std::to_string(kMostDimensions) + " dimensions");
  }
  ort.check(ort.api->GetDimensions(info, result.sizes, result.rank));
  void* data = nullptr;
  ort.check(ort.api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  result.data = data;
  return result;
}

}  // namespace attnres
