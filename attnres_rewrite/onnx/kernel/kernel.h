// What the kernels of all operators have in common: the domain that tells the form, inputs and outputs, types, threads.

#pragma once

#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "rows.h"
#include "runtime.h"

namespace attnres {

// Numbers that one task of the thread pool reads: some microseconds, so that what starts a task is no part of the time.
constexpr size_t kNumbersPerTask = 1 << 16;

// Sites that run as kernels in the sessions of this process.
inline std::atomic<int64_t> sites{0};

// The words of a domain, attnres.<n>_<word>_<word> and so on: see form.py.
class Domain {
 public:
  explicit Domain(const std::string& name) : name_(name) {
    const std::string prefix = "attnres.";
    if (name.compare(0, prefix.size(), prefix) != 0) return;
    for (size_t begin = prefix.size(); begin <= name.size();) {
      const size_t end = std::min(name.find('_', begin), name.size());
      words_.push_back(name.substr(begin, end - begin));
      begin = end + 1;
    }
  }

  const std::string& name() const { return name_; }

  bool has(const std::string& word) const { return std::find(words_.begin(), words_.end(), word) != words_.end(); }

  bool begins_with(const std::string& word) const { return !words_.empty() && words_[0] == word; }

  // The number before a word; 0 if it is none.
  size_t number(const std::string& word, size_t otherwise) const {
    const auto found = std::find(words_.begin(), words_.end(), word);
    if (found == words_.end() || found == words_.begin()) return otherwise;
    size_t number = 0;
    int end = 0;
    const std::string& text = *(found - 1);
    return std::sscanf(text.c_str(), "%zu%n", &number, &end) == 1 && end == static_cast<int>(text.size()) ? number : 0;
  }

  // Of the sources, and of queries and gains; float64 is known to no kernel.
  ONNXTensorElementDataType source_type() const { return type(false, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT); }
  ONNXTensorElementDataType parameter_type() const { return type(true, source_type()); }

 private:
  ONNXTensorElementDataType type(bool of_parameters, ONNXTensorElementDataType otherwise) const {
    for (size_t i = 0; i < words_.size(); ++i) {
      if (of_parameters != (i + 1 < words_.size() && words_[i + 1] == "parameters")) continue;
      if (words_[i] == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      if (words_[i] == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
      if (words_[i] == "bfloat16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    }
    return otherwise;
  }

  std::string name_;
  std::vector<std::string> words_;
};

// What the operator of a domain is.
struct Operator : OrtCustomOp {
  explicit Operator(const std::string& name) : OrtCustomOp{}, domain(name) {}
  Domain domain;
};

// Calls `body` with a Float32, Float16 or BFloat16.
template <class Body>
auto with_type(ONNXTensorElementDataType type, const char* what, Body body) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return body(Float32{});
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return body(Float16{});
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return body(BFloat16{});
    default:
      throw Failure(std::string(what) + " not of float32, float16 or bfloat16");
  }
}

// The numbers of a tensor in float32: its own, or a copy that `kept` has.
inline const float* as_floats(const Tensor& tensor, const char* what, std::vector<float>& kept) {
  if (tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return static_cast<const float*>(tensor.data);
  kept.resize(tensor.count());
  with_type(tensor.type, what, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(tensor.data);
    for (size_t i = 0; i < kept.size(); ++i) kept[i] = Vectors<16>::load(from + i, 1)[0];
  });
  return kept.data();
}

class Kernel {
 public:
  Kernel(const Operator& op, const OrtApi* api, const OrtKernelInfo* info, const char* node)
      : ort_{api}, node_(node), set_(instruction_set()) {
    ort_.check(api->KernelInfo_GetInputCount(info, &inputs_));
    ort_.check(api->KernelInfo_GetOutputCount(info, &outputs_));
    tell(op, info);
  }
  virtual ~Kernel() = default;
  virtual void compute(OrtKernelContext* context) const = 0;

  const Ort& ort() const { return ort_; }

 protected:
  void require_inputs(const Operator& op, bool right, const char* what) const {
    if (right) return;
    throw Failure(node_ + " of " + op.domain.name() + " has " + std::to_string(inputs_) + " inputs; it takes " + what);
  }

  void require(bool right, const char* what) const {
    if (!right) throw Failure(std::string(what) + " of " + node_ + " differ in shape or type");
  }

  float number(const OrtKernelInfo* info, const char* name) const {
    float value = 0;
    ort_.check(ort_.api->KernelInfoGetAttribute_float(info, name, &value));
    return value;
  }

  std::vector<int64_t> numbers(const OrtKernelInfo* info, const char* name) const {
    size_t size = 0;
    ort_.check(ort_.api->KernelInfoGetAttributeArray_int64(info, name, nullptr, &size));
    std::vector<int64_t> values(size);
    ort_.check(ort_.api->KernelInfoGetAttributeArray_int64(info, name, values.data(), &size));
    return values;
  }

  // A weight of the model; null if it is none.
  const OrtValue* constant_input(const OrtKernelInfo* info, size_t index) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    ort_.check(ort_.api->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
    return is_constant ? value : nullptr;
  }

  Tensor input(const OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    ort_.check(ort_.api->KernelContext_GetInput(context, index, &value));
    return tensor(ort_, value);
  }

  // The memory of an output; none if nothing reads it.
  void* output(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t rank) const {
    if (index >= outputs_) return nullptr;
    OrtValue* value = nullptr;
    ort_.check(ort_.api->KernelContext_GetOutput(context, index, sizes, rank, &value));
    void* data = nullptr;
    if (value != nullptr) ort_.check(ort_.api->GetTensorMutableData(value, &data));
    return data;
  }

  // All rows, by the threads of the session.
  template <class Rows>
  void attend(OrtKernelContext* context, const Rows& rows, size_t count, size_t numbers_per_row) const {
    const size_t per_task = std::max<size_t>(1, kNumbersPerTask / std::max<size_t>(1, numbers_per_row));
    Tasks<Rows> tasks{rows, attend_for<Rows>(set_), count, per_task};
    const size_t number = (count + per_task - 1) / per_task;
    if (number <= 1) return Tasks<Rows>::run(&tasks, 0);
    ort_.check(ort_.api->KernelContext_ParallelFor(context, Tasks<Rows>::run, number, 0, &tasks));
  }

  Ort ort_;
  size_t inputs_ = 0, outputs_ = 0;

 private:
  template <class Rows>
  struct Tasks {
    const Rows& rows;
    void (*attend)(const Rows&, size_t, size_t);
    size_t count, per_task;

    static void run(void* data, size_t task) {
      const Tasks& tasks = *static_cast<Tasks*>(data);
      const size_t first = task * tasks.per_task;
      tasks.attend(tasks.rows, first, std::min(tasks.count, first + tasks.per_task));
    }
  };

  void tell(const Operator& op, const OrtKernelInfo* info) const {
    char name[256] = "";
    size_t size = sizeof(name);
    if (OrtStatus* too_long = ort_.api->KernelInfo_GetNodeName(info, name, &size)) ort_.api->ReleaseStatus(too_long);
    const OrtLogger* logger = nullptr;
    ort_.check(ort_.api->KernelInfo_GetLogger(info, &logger));
    static const char* const kNames[] = {"any", "avx2", "avx512"};
    const std::string message = std::string("attnres: the node ") + name + " of " + op.domain.name() +
                                " runs as a kernel, instruction set " + kNames[static_cast<int>(set_)];
    ort_.check(ort_.api->Logger_LogMessage(logger, ORT_LOGGING_LEVEL_INFO, message.c_str(), ORT_FILE, __LINE__,
                                           static_cast<const char*>(__FUNCTION__)));
  }

  std::string node_;
  InstructionSet set_;
};

// Counts the sites, which are not all kernels: others hold what sites share.
class SiteKernel : public Kernel {
 public:
  SiteKernel(const Operator& op, const OrtApi* api, const OrtKernelInfo* info) : Kernel(op, api, info, "a BlockAttnRes") {
    ++sites;
  }
  ~SiteKernel() override { --sites; }
};

}  // namespace attnres
