// The operators of ONNX Runtime's CPU provider that run in place of the functions that a file of export_onnx brings.
//
// A node's domain tells its form: attnres.<n>_sources for sites by themselves (whole_site.h), attnres.<n>_queries,
// attnres.<n>_reads, attnres.partial and attnres.no_partial for those that share (shared_sites.h), each with more words
// where it is not the usual form. ONNX Runtime takes an operator that is registered for a domain before a function of
// the model, and finds operators by exact domains. Which ones there are, is in the entries attnres.domains.0,
// attnres.domains.1, ... of the session's configuration, separated by commas; without these, the form that most sites by
// themselves have, with up to kCommonSources sources: a domain takes ONNX Runtime a fifth of a millisecond in every
// session, and those of sites that share depend on the model.

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "shared_sites.h"
#include "whole_site.h"

namespace attnres {
namespace {

constexpr size_t kCommonSources = 17;

// It is called without an interface.
std::atomic<const OrtApi*> inference_api{nullptr};

// A read is like one of the inputs, where the rank of that is known. What other nodes give is as the file says: ONNX
// Runtime 1.23 ends the process if the type is told of an output that a node does not have, as one that a tool took away.
template <size_t kInput>
OrtStatus* ORT_API_CALL infer_read(const OrtCustomOp*, OrtShapeInferContext* context) {
  const OrtApi* api = inference_api;
  OrtTensorTypeAndShapeInfo* like = nullptr;
  size_t rank = 0;
  if (OrtStatus* status = api->ShapeInferContext_GetInputTypeShape(context, kInput, &like)) return status;
  if (OrtStatus* status = api->GetDimensionsCount(like, &rank)) return status;
  return rank == 0 ? nullptr : api->ShapeInferContext_SetOutputTypeShape(context, 0, like);
}

// A read of two phases may be written in place of its mixed blocks, which nothing else reads.
size_t may_write_in_place(int** input, int** output) {
  *input = new int[1]{0};
  *output = new int[1]{0};
  return 1;
}

template <class Made>
std::unique_ptr<Operator> make_operator(const std::string& domain, const char* (*name)(const OrtCustomOp*)) {
  auto made = std::make_unique<Operator>(domain);
  OrtCustomOp& op = *made;
  op.version = kApiVersion;
  op.GetName = name;
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  // Of any type, as long as ONNX Runtime is asked: one operator takes three types of sources, and parameters of others.
  op.GetInputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
  op.GetOutputType = op.GetInputType;
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputTypeCount = op.GetInputTypeCount;
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return Ort{api}.guarded([&] {
      *kernel = static_cast<Kernel*>(new Made(*static_cast<const Operator*>(self), api, info));
    });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& made_kernel = *static_cast<const Kernel*>(kernel);
    return made_kernel.ort().guarded([&] { made_kernel.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return made;
}

const char* block_attn_res(const OrtCustomOp*) { return "BlockAttnRes"; }

std::unique_ptr<Operator> make_operator(const std::string& name) {
  const Domain domain(name);
  if (name.find("float64") != std::string::npos) throw Failure("'" + name + "' is of float64, for which is no kernel");
  if (domain.number("sources", 0) > 0) {
    auto made = make_operator<WholeSite>(name, block_attn_res);
    made->InferOutputShapeFn = infer_read<0>;
    return made;
  }
  if (domain.has("partial")) {
    auto made = make_operator<MergePartial>(name, block_attn_res);
    if (!domain.begins_with("no")) made->InferOutputShapeFn = infer_read<2>;
    made->GetMayInplace = may_write_in_place;
    made->ReleaseMayInplace = [](int* input, int* output) {
      delete[] input;
      delete[] output;
    };
    return made;
  }
  const bool queries = domain.number("queries", 0) > 0;
  if (!queries && (domain.number("reads", 0) == 0 || domain.number("blocks", 1) == 0)) {
    throw Failure("'" + name + "' is no domain of sites, as attnres.<n>_sources or attnres.<n>_reads");
  }
  auto made = queries ? make_operator<ScaleQueries>(name, [](const OrtCustomOp*) { return "ScaleQueries"; })
                      : make_operator<AttendBlocks>(name, [](const OrtCustomOp*) { return "AttendBlocks"; });
  made->GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
  return made;
}

// The operators that were registered for a domain, each once. Sessions keep pointers to them, also after the options
// that they were registered with are gone.
class Domains {
 public:
  void add(const Ort& ort, OrtSessionOptions* options, const std::string& name) {
    Entry& entry = entries_[name];
    if (entry.domain == nullptr) {
      entry.op = make_operator(name);
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
ATTNRES_EXPORT int64_t attnres_kernels() { return attnres::sites; }
