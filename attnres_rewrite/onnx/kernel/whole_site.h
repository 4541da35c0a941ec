// A site by itself: BlockAttnRes (sources..., query[, gain]), with attributes eps, scale and aggregation, in a domain
// attnres.<n>_sources.

#pragma once

#include "kernel.h"

namespace attnres {

class WholeSite : public SiteKernel {
 public:
  WholeSite(const Operator& op, const OrtApi* api, const OrtKernelInfo* info)
      : SiteKernel(op, api, info),
        sources_(op.domain.number("sources", 0)),
        gain_(inputs_ == sources_ + 2),
        eps_(number(info, "eps")),
        scale_(number(info, "scale")) {
    require_inputs(op, inputs_ == sources_ + 1 || gain_, "its sources, a query, and a gain or none");
    char aggregation[8] = "";
    size_t size = sizeof(aggregation);
    ort_.check(api->KernelInfoGetAttribute_string(info, "aggregation", aggregation, &size));
    total_ = std::strcmp(aggregation, "sum") == 0 ? static_cast<float>(sources_) : 1.0f;
    fold_constants(info);
  }

  void compute(OrtKernelContext* context) const override {
    std::vector<const void*> sources(sources_);
    const Tensor first = input(context, 0);
    sources[0] = first.data;
    for (size_t i = 1; i < sources_; ++i) {
      const Tensor source = input(context, i);
      require(source.is_like(first), "the sources");
      sources[i] = source.data;
    }
    const size_t width = first.width();
    std::vector<float> changing;
    if (constant_.size() != width || width == 0) {
      const Tensor query = input(context, sources_);
      const Tensor gain = gain_ ? input(context, sources_ + 1) : query;
      changing = folded(width, query, gain_ ? &gain : nullptr);
    }
    void* const out = output(context, 0, first.sizes, first.rank);
    if (first.count() == 0) return;
    const auto* weight = reinterpret_cast<const Float32*>(changing.empty() ? constant_.data() : changing.data());
    with_type(first.type, "the sources of a BlockAttnRes are", [&](auto type) {
      using T = decltype(type);
      const Site<T> site{reinterpret_cast<const T* const*>(sources.data()), sources_, {weight, width, eps_},
                         static_cast<T*>(out), total_};
      attend(context, site, first.count() / width, sources_ * width);
    });
  }

 private:
  static void multiply(std::vector<float>& product, const Tensor& factor, const std::string& name) {
    if (factor.rank != 1 || factor.count() != product.size()) {
      throw Failure("the " + name + " of a BlockAttnRes is not as wide as its sources");
    }
    std::vector<float> kept;
    const float* const numbers = as_floats(factor, ("the " + name + " of a BlockAttnRes is").c_str(), kept);
    for (size_t d = 0; d < product.size(); ++d) product[d] *= numbers[d];
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
    for (size_t i = sources_; i < inputs_; ++i) {
      if (const OrtValue* value = constant_input(info, i)) parameters.push_back(tensor(ort_, value));
    }
    if (parameters.size() != inputs_ - sources_) return;
    constant_ = folded(parameters[0].count(), parameters[0], gain_ ? &parameters[1] : nullptr);
  }

  size_t sources_;
  bool gain_;
  float eps_, scale_, total_ = 1;
  std::vector<float> constant_;
};

}  // namespace attnres
