// Sites that share the work on complete blocks: ScaleQueries, AttendBlocks, and BlockAttnRes of two phases. What goes in
// and comes out is in shared_bodies.py.

#pragma once

#include "kernel.h"
#include "phases.h"

namespace attnres {

// The type of what two phases hand on may be that of the sources, or float32: a converter to half floats narrows it too.
template <class Body>
void with_types(const Tensor& source, ONNXTensorElementDataType wide, const char* what, Body body) {
  with_type(source.type, what, [&](auto type) {
    if (source.type == wide) return body(type, type);
    if (wide != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) throw Failure(std::string(what) + " not of the type of the others");
    body(type, Float32{});
  });
}

// ScaleQueries (queries..., gains...) in attnres.<n>_queries, with a scale.
class ScaleQueries : public Kernel {
 public:
  ScaleQueries(const Operator& op, const OrtApi* api, const OrtKernelInfo* info)
      : Kernel(op, api, info, "a ScaleQueries"), reads_(op.domain.number("queries", 0)), scale_(number(info, "scale")) {
    require_inputs(op, inputs_ == reads_ || inputs_ == 2 * reads_, "its queries, and as many gains or none");
    // As the function does: what is narrow in the domain is widened, and what a converter narrowed stays so.
    widens_ = op.domain.parameter_type() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    std::vector<Tensor> constants;
    for (size_t i = 0; i < inputs_; ++i) {
      const OrtValue* const value = constant_input(info, i);
      if (value == nullptr) return;
      constants.push_back(tensor(ort_, value));
    }
    constant_ = scaled(constants);
  }

  void compute(OrtKernelContext* context) const override {
    const Tensor first = input(context, 0);
    Queries changing;
    if (constant_.rows.empty()) {
      std::vector<Tensor> parameters;
      for (size_t i = 0; i < inputs_; ++i) parameters.push_back(input(context, i));
      changing = scaled(parameters);
    }
    const Queries& queries = constant_.rows.empty() ? changing : constant_;
    const auto wide = widens_ ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : first.type;
    with_type(wide, "the queries of a ScaleQueries are", [&](auto type) {
      write<decltype(type)>(context, queries, static_cast<int64_t>(first.count()));
    });
  }

 private:
  // Queries times gains and scale, [reads, width] and [width, reads].
  struct Queries {
    std::vector<float> rows, columns;
  };

  Queries scaled(const std::vector<Tensor>& parameters) const {
    const size_t width = parameters[0].count();
    std::vector<float> rows, kept;
    for (const Tensor& parameter : parameters) require(parameter.is_like(parameters[0]), "the parameters");
    for (size_t s = 0; s < reads_; ++s) {
      const float* const query = as_floats(parameters[s], "the queries of a ScaleQueries are", kept);
      rows.insert(rows.end(), query, query + width);
    }
    for (size_t s = 0; reads_ + s < parameters.size(); ++s) {
      const float* const gain = as_floats(parameters[reads_ + s], "the gains of a ScaleQueries are", kept);
      for (size_t d = 0; d < width; ++d) rows[s * width + d] *= gain[d];
    }
    for (float& number : rows) number *= scale_;
    std::vector<float> columns(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) columns[i % width * reads_ + i / width] = rows[i];
    return {rows, columns};
  }

  template <class T>
  void write(OrtKernelContext* context, const Queries& queries, int64_t width) const {
    const int64_t sizes[] = {width, static_cast<int64_t>(reads_)}, column_sizes[] = {width, 1};
    const auto row = static_cast<size_t>(width);
    store_all(static_cast<T*>(output(context, 0, sizes, 2)), queries.columns.data(), queries.columns.size());
    for (size_t s = 0; s < reads_; ++s) {
      store_all(static_cast<T*>(output(context, 1 + s, column_sizes, 2)), queries.rows.data() + s * row, row);
    }
    const std::vector<float> ones(row, 1.0f);
    store_all(static_cast<T*>(output(context, 1 + reads_, &width, 1)), ones.data(), row);
  }

  size_t reads_;
  float scale_;
  bool widens_;
  Queries constant_;
};

// AttendBlocks ([logits_before, ]blocks..., columns[, ones]) in attnres.<n>_reads and so on.
class AttendBlocks : public Kernel {
  struct Form {
    explicit Form(const Domain& domain)
        : reads(domain.number("reads", 0)),
          blocks(domain.number("blocks", 1)),
          before(domain.has("first") ? 0 : blocks - domain.number("new", 1)),
          partials(domain.number("partials", reads)),
          given(before > 0 ? 1 : 0) {}

    size_t reads, blocks;
    size_t before;    // blocks with logits
    size_t partials;  // reads with a partial
    size_t given;     // position of the first block
  };

 public:
  AttendBlocks(const Operator& op, const OrtApi* api, const OrtKernelInfo* info)
      : Kernel(op, api, info, "an AttendBlocks"), form_(op.domain), eps_(number(info, "eps")) {
    const size_t given = form_.given + form_.blocks + 1;
    require_inputs(op, inputs_ == given || inputs_ == given + 1, "logits, its blocks, and columns");
    begin_ = static_cast<size_t>(numbers(info, "begin").at(0));
    for (const int64_t size : numbers(info, "sizes")) sizes_.push_back(static_cast<size_t>(size));
    for (const size_t size : sizes_) reads_ += size;
    if (sizes_.empty() || sizes_[0] != form_.reads || form_.partials > form_.reads || form_.blocks < form_.before) {
      throw Failure("the sizes of an AttendBlocks are not those of " + op.domain.name());
    }
  }

  void compute(OrtKernelContext* context) const override {
    std::vector<const void*> blocks(form_.blocks);
    const Tensor first = input(context, form_.given);
    for (size_t i = 0; i < form_.blocks; ++i) {
      const Tensor block = input(context, form_.given + i);
      require(block.is_like(first), "the blocks");
      blocks[i] = block.data;
    }
    const Tensor columns = input(context, form_.given + form_.blocks);
    const size_t width = first.width(), rows = width == 0 ? 0 : first.count() / width;
    require(columns.rank == 2 && static_cast<size_t>(columns.sizes[0]) == width &&
                static_cast<size_t>(columns.sizes[1]) >= begin_ + reads_,
            "the blocks and columns");
    std::vector<float> kept_columns, kept_logits;
    const float* const matrix = as_floats(columns, "the columns of an AttendBlocks are", kept_columns);
    const std::vector<float> groups =
        grouped(matrix, width, static_cast<size_t>(columns.sizes[1]), begin_, reads_);
    const float* before = nullptr;
    if (form_.before > 0) {
      const Tensor logits = input(context, 0);
      require(logits.count() == rows * reads_ * form_.before, "the blocks and logits");
      before = as_floats(logits, "the logits of an AttendBlocks are", kept_logits);
    }
    with_types(first, columns.type, "the blocks of an AttendBlocks are", [&](auto type, auto wide) {
      using T = decltype(type);
      using Out = decltype(wide);
      std::vector<Out*> mixed, log_sums;
      std::vector<Later<Out>> later;
      make_outputs(context, first, mixed, log_sums, later);
      if (rows == 0) return;
      const BlocksOfReads<T, Out> phase{reinterpret_cast<const T* const*>(blocks.data()),
                                        form_.blocks, form_.before, before, groups.data(), reads_, sizes_[0], width, eps_,
                                        mixed, log_sums, later};
      attend(context, phase, rows, width * (form_.blocks * (1 + mixed.size()) + reads_ * (form_.blocks - form_.before)));
    });
  }

 private:
  // In the order of AttendBlocks.outputs.
  template <class Out>
  void make_outputs(OrtKernelContext* context, const Tensor& like, std::vector<Out*>& mixed,
                    std::vector<Out*>& log_sums, std::vector<Later<Out>>& later) const {
    size_t index = 0;
    std::vector<int64_t> sizes(like.sizes, like.sizes + like.rank);
    const auto make = [&] { return static_cast<Out*>(output(context, index++, sizes.data(), sizes.size())); };
    // Of one block, each read has that for its mixed blocks.
    for (size_t s = 0; form_.blocks > 1 && s < sizes_[0]; ++s) mixed.push_back(make());
    sizes.back() = 1;
    for (size_t s = 0; s < form_.partials; ++s) log_sums.push_back(make());
    sizes.push_back(static_cast<int64_t>(form_.blocks));
    size_t begin = sizes_[0];
    for (size_t i = 1; i < sizes_.size(); begin += sizes_[i++]) {
      sizes[like.rank - 1] = static_cast<int64_t>(sizes_[i]);
      later.push_back({begin, sizes_[i], make()});
    }
  }

  Form form_;
  size_t begin_, reads_ = 0;
  std::vector<size_t> sizes_;
  float eps_;
};

// BlockAttnRes (mixed, log_sum, partial, column[, ones]) in attnres.partial, and (mixed) in attnres.no_partial.
class MergePartial : public SiteKernel {
 public:
  MergePartial(const Operator& op, const OrtApi* api, const OrtKernelInfo* info)
      : SiteKernel(op, api, info),
        partial_(!op.domain.begins_with("no")),
        total_(number(info, "total")),
        type_(op.domain.source_type()) {
    require_inputs(op, partial_ ? inputs_ == 4 || inputs_ == 5 : inputs_ == 1, partial_ ? kPartial : "mixed blocks");
    if (partial_) eps_ = number(info, "eps");
  }

  void compute(OrtKernelContext* context) const override {
    const Tensor mixed = input(context, 0);
    Tensor partial = mixed;
    std::vector<float> kept_sums, kept_column;
    const float *log_sums = nullptr, *column = nullptr;
    const size_t width = mixed.width();
    if (partial_) {
      partial = input(context, 2);
      const Tensor sums = input(context, 1), weight = input(context, 3);
      require(partial.has_sizes_of(mixed) && weight.count() == width && sums.count() * width == mixed.count(), kPartial);
      log_sums = as_floats(sums, "the log-sums of a BlockAttnRes are", kept_sums);
      column = as_floats(weight, "the column of a BlockAttnRes is", kept_column);
    } else if (type_ != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      partial.type = type_;
    }
    void* const out = output(context, 0, mixed.sizes, mixed.rank);
    if (mixed.count() == 0) return;
    with_types(partial, mixed.type, "the inputs of a BlockAttnRes are", [&](auto type, auto wide) {
      using T = decltype(type);
      using Mixed = decltype(wide);
      const MergeOfPartial<T, Mixed> merge{static_cast<const Mixed*>(mixed.data),
                                           log_sums,
                                           partial_ ? static_cast<const T*>(partial.data) : nullptr,
                                           {reinterpret_cast<const Float32*>(column), width, eps_},
                                           static_cast<T*>(out),
                                           total_};
      attend(context, merge, mixed.count() / width, 2 * width);
    });
  }

 private:
  static constexpr const char* kPartial = "mixed blocks, their log-sum, a partial and a column";

  bool partial_;
  float eps_ = 0, total_;
  ONNXTensorElementDataType type_;
};

}  // namespace attnres
