// The operator BlockAttnRes of ONNX Runtime's CPU provider, in place of the functions that a file of export_onnx brings.
//
// A site is a node BlockAttnRes (sources..., query[, gain]) with attributes eps, scale and aggregation, in a domain that
// tells its form: attnres.<n>_sources, attnres.<n>_sources_sum and so on. ONNX Runtime takes an operator that is
// registered for a domain before a function of the model, and finds operators by exact domains. So every domain gets
// the same operator. Which ones there are, is in the entries attnres.domains.0, attnres.domains.1, ... of the session's
// configuration, separated by commas; without these, the form that most files have, with up to kCommonSources sources:
// a domain takes ONNX Runtime a fifth of a millisecond in every session.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "rows.h"
#include "runtime.h"

namespace attnres {
namespace {

constexpr size_t kCommonSources = 17;
// Numbers that one task of the thread pool reads: some microseconds, so that what starts a task is no part of the time.
constexpr size_t kNumbersPerTask = 1 << 16;

// Kernels that sessions of this process hold.
std::atomic<int64_t> kernels{0};

template <class T>
void multiply(std::vector<float>& product, const void* factor) {
  for (size_t d = 0; d < product.size(); ++d) product[d] *= Vectors<16>::load(static_cast<const T*>(factor) + d, 1)[0];
}

void multiply(std::vector<float>& product, const Tensor& factor, const char* name) {
  if (factor.rank != 1 || factor.count() != product.size()) {
    throw Failure(std::string("the ") + name + " of a BlockAttnRes is not as wide as its sources");
  }
  switch (factor.type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return multiply<Float32>(product, factor.data);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return multiply<Float16>(product, factor.data);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return multiply<BFloat16>(product, factor.data);
    default:
      throw Failure(std::string("the ") + name + " of a BlockAttnRes is not of float32, float16 or bfloat16");
  }
}

// What the operator of a domain is, and its name.
struct Operator : OrtCustomOp {
  std::string domain;
  size_t sources;
};

class Kernel {
 public:
  Kernel(const Operator& op, const OrtApi* api, const OrtKernelInfo* info)
      : ort_{api}, sources_(op.sources), set_(instruction_set()) {
    size_t inputs = 0;
    ort_.check(api->KernelInfo_GetInputCount(info, &inputs));
    if (inputs != sources_ + 1 && inputs != sources_ + 2) {
      throw Failure("a BlockAttnRes of " + op.domain + " has " + std::to_string(inputs) +
                    " inputs; it takes its sources, a query, and a gain or none");
    }
    gain_ = inputs == sources_ + 2;
    ort_.check(api->KernelInfoGetAttribute_float(info, "eps", &eps_));
    ort_.check(api->KernelInfoGetAttribute_float(info, "scale", &scale_));
    char aggregation[8] = "";
    size_t size = sizeof(aggregation);
    ort_.check(api->KernelInfoGetAttribute_string(info, "aggregation", aggregation, &size));
    total_ = std::strcmp(aggregation, "sum") == 0 ? static_cast<float>(sources_) : 1.0f;
    fold_constants(info);
    tell(op, info);
    ++kernels;
  }

  ~Kernel() { --kernels; }

  void compute(OrtKernelContext* context) const {
    std::vector<const void*> sources(sources_);
    const Tensor first = input(context, 0);
    sources[0] = first.data;
    for (size_t i = 1; i < sources_; ++i) {
      const Tensor source = input(context, i);
      if (!source.is_like(first)) throw Failure("the sources of a BlockAttnRes differ in shape or type");
      sources[i] = source.data;
    }
    const size_t width = static_cast<size_t>(first.sizes[first.rank - 1]);
    std::vector<float> changing;
    if (constant_.size() != width || width == 0) {
      const Tensor query = input(context, sources_);
      const Tensor gain = gain_ ? input(context, sources_ + 1) : query;
      changing = folded(width, query, gain_ ? &gain : nullptr);
    }
    OrtValue* value = nullptr;
    ort_.check(ort_.api->KernelContext_GetOutput(context, 0, first.sizes, first.rank, &value));
    void* out = nullptr;
    ort_.check(ort_.api->GetTensorMutableData(value, &out));
    const size_t count = first.count();
    if (count == 0) return;
    const float* weight = changing.empty() ? constant_.data() : changing.data();
    switch (first.type) {
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
        return attend_to<Float32>(context, sources, weight, out, count / width, width);
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
        return attend_to<Float16>(context, sources, weight, out, count / width, width);
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
        return attend_to<BFloat16>(context, sources, weight, out, count / width, width);
      default:
        throw Failure("the sources of a BlockAttnRes are not of float32, float16 or bfloat16");
    }
  }

  const Ort& ort() const { return ort_; }

 private:
  Tensor input(const OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    ort_.check(ort_.api->KernelContext_GetInput(context, index, &value));
    return tensor(ort_, value);
  }

  std::vector<float> folded(size_t width, const Tensor& query, const Tensor* gain) const {
    std::vector<float> weight(width, 1.0f);
    multiply(weight, query, "query");
    if (gain != nullptr) multiply(weight, *gain, "gain");
    for (float& number : weight) number *= scale_;
    return weight;
  }

  // Queries and gains are weights of the model, as a rule.
  void fold_constants(const OrtKernelInfo* info) {
    std::vector<Tensor> parameters;
    for (size_t i = sources_; i < sources_ + (gain_ ? 2 : 1); ++i) {
      int is_constant = 0;
      const OrtValue* value = nullptr;
      ort_.check(ort_.api->KernelInfoGetConstantInput_tensor(info, i, &is_constant, &value));
      if (!is_constant) return;
      parameters.push_back(tensor(ort_, value));
    }
    constant_ = folded(parameters[0].count(), parameters[0], gain_ ? &parameters[1] : nullptr);
  }

  void tell(const Operator& op, const OrtKernelInfo* info) const {
    char name[256] = "";
    size_t size = sizeof(name);
    if (OrtStatus* too_long = ort_.api->KernelInfo_GetNodeName(info, name, &size)) ort_.api->ReleaseStatus(too_long);
    const OrtLogger* logger = nullptr;
    ort_.check(ort_.api->KernelInfo_GetLogger(info, &logger));
    static const char* const kNames[] = {"any", "avx2", "avx512"};
    const std::string message = std::string("attnres: the site ") + name + " of " + op.domain +
                                " runs as a kernel, instruction set " + kNames[static_cast<int>(set_)];
    ort_.check(ort_.api->Logger_LogMessage(logger, ORT_LOGGING_LEVEL_INFO, message.c_str(), ORT_FILE, __LINE__,
                                           static_cast<const char*>(__FUNCTION__)));
  }

  template <class T>
  struct Tasks {
    Site<T> site;
    void (*attend)(const Site<T>&, size_t, size_t);
    size_t rows, rows_per_task;

    static void run(void* data, size_t task) {
      const Tasks& tasks = *static_cast<Tasks*>(data);
      const size_t first = task * tasks.rows_per_task;
      tasks.attend(tasks.site, first, std::min(tasks.rows, first + tasks.rows_per_task));
    }
  };

  template <class T>
  void attend_to(OrtKernelContext* context, const std::vector<const void*>& sources, const float* weight, void* out,
                 size_t rows, size_t width) const {
    const auto* from = reinterpret_cast<const T* const*>(sources.data());
    const auto* folded = reinterpret_cast<const Float32*>(weight);
    const Site<T> site{from, sources_, folded, static_cast<T*>(out), width, eps_, total_};
    const size_t rows_per_task = std::max<size_t>(1, kNumbersPerTask / (sources_ * width));
    Tasks<T> tasks{site, attend_for<T>(set_), rows, rows_per_task};
    const size_t count = (rows + rows_per_task - 1) / rows_per_task;
    if (count == 1) return Tasks<T>::run(&tasks, 0);
    ort_.check(ort_.api->KernelContext_ParallelFor(context, Tasks<T>::run, count, 0, &tasks));
  }

  Ort ort_;
  size_t sources_;
  InstructionSet set_;
  bool gain_ = false;
  float eps_ = 0, scale_ = 1, total_ = 1;
  std::vector<float> constant_;
};

// It is called without an interface.
std::atomic<const OrtApi*> inference_api{nullptr};

// The result of a site is like its first source.
OrtStatus* ORT_API_CALL infer_output(const OrtCustomOp*, OrtShapeInferContext* context) {
  const OrtApi* api = inference_api;
  OrtTensorTypeAndShapeInfo* first = nullptr;
  if (OrtStatus* status = api->ShapeInferContext_GetInputTypeShape(context, 0, &first)) return status;
  return api->ShapeInferContext_SetOutputTypeShape(context, 0, first);
}

std::unique_ptr<Operator> make_operator(const std::string& domain, size_t sources) {
  auto made = std::make_unique<Operator>();
  made->domain = domain;
  made->sources = sources;
  OrtCustomOp& op = *made;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "BlockAttnRes"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  // Of any type, as long as ONNX Runtime is asked: one operator takes three types of sources, and parameters of others.
  op.GetInputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
  op.GetOutputType = op.GetInputType;
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputTypeCount = op.GetInputTypeCount;
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 2; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.InferOutputShapeFn = infer_output;
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return Ort{api}.guarded([&] { *kernel = new Kernel(*static_cast<const Operator*>(self), api, info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& site = *static_cast<const Kernel*>(kernel);
    return site.ort().guarded([&] { site.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return made;
}

// The operators that were registered for a domain, each once. Sessions keep pointers to them, also after the options
// that they were registered with are gone.
class Domains {
 public:
  void add(const Ort& ort, OrtSessionOptions* options, const std::string& name) {
    const size_t sources = sources_in(name);
    Entry& entry = entries_[name];
    if (entry.domain == nullptr) {
      entry.op = make_operator(name, sources);
      ort.check(ort.api->CreateCustomOpDomain(name.c_str(), &entry.domain));
      ort.check(ort.api->CustomOpDomain_Add(entry.domain, entry.op.get()));
    }
    ort.check(ort.api->AddCustomOpDomain(options, entry.domain));
  }

 private:
  struct Entry {
    std::unique_ptr<Operator> op;
    OrtCustomOpDomain* domain = nullptr;
  };

  static size_t sources_in(const std::string& name) {
    size_t sources = 0;
    int end = 0;
    if (std::sscanf(name.c_str(), "attnres.%zu_sources%n", &sources, &end) != 1 || end == 0 || sources == 0) {
      throw Failure("'" + name + "' is no domain of sites, attnres.<n>_sources");
    }
    if (name.find("float64") != std::string::npos) throw Failure("'" + name + "' is of float64, for which is no kernel");
    return sources;
  }

  std::map<std::string, Entry> entries_;
};

std::vector<std::string> common_domains() {
  std::vector<std::string> names;
  for (size_t sources = 1; sources <= kCommonSources; ++sources) {
    names.push_back("attnres." + std::to_string(sources) + "_sources");
  }
  return names;
}

// The domains that the session's configuration names.
std::vector<std::string> asked_domains(const Ort& ort, const OrtSessionOptions* options) {
  std::vector<std::string> names;
  for (size_t i = 0;; ++i) {
    const std::string key = "attnres.domains." + std::to_string(i);
    int there = 0;
    ort.check(ort.api->HasSessionConfigEntry(options, key.c_str(), &there));
    if (!there) return names;
    size_t size = 0;
    // It fails, and tells the size.
    if (OrtStatus* none = ort.api->GetSessionConfigEntry(options, key.c_str(), nullptr, &size)) {
      ort.api->ReleaseStatus(none);
    }
    std::string list(size, '\0');
    ort.check(ort.api->GetSessionConfigEntry(options, key.c_str(), list.data(), &size));
    list.resize(size - 1);
    for (size_t begin = 0; begin <= list.size();) {
      const size_t end = std::min(list.find(',', begin), list.size());
      names.push_back(list.substr(begin, end - begin));
      begin = end + 1;
    }
  }
}

}  // namespace
}  // namespace attnres

#define ATTNRES_EXPORT extern "C" __attribute__((visibility("default")))

// The entry that ONNX Runtime looks for in a library of operators.
ATTNRES_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace attnres;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "attnres: the kernel needs ONNX Runtime 1.21 or newer");
  }
  static std::mutex registering;
  static Domains domains;
  const Ort ort{api};
  return ort.guarded([&] {
    const std::lock_guard<std::mutex> lock(registering);
    inference_api = api;
    std::vector<std::string> names = asked_domains(ort, options);
    if (names.empty()) names = common_domains();
    for (const std::string& name : names) domains.add(ort, options, name);
  });
}

// How many sites of the sessions of this process run as kernels.
ATTNRES_EXPORT int64_t attnres_kernels() { return attnres::kernels; }
