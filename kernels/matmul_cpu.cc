#if defined(REPRISE_HAS_ONEDNN)

#include <oneapi/dnnl/dnnl.hpp>

#include <omp.h>

#include "core/error.h"
#include "kernels/matmul_tile.h"

namespace reprise::kernels::cpu {
namespace {

dnnl::engine& engine() {
  static dnnl::engine& one = *new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return one;
}

// Streams must not be shared by threads.
dnnl::stream& stream() {
  static thread_local dnnl::stream one(engine());
  return one;
}

// oneDNN cuts a product by the number of threads, also along k, where that changes the sums; so
// every product is made for one thread and run on one. The setting is the calling thread's own.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) {
    if (before_ != 1) {
      omp_set_num_threads(1);
    }
  }
  ~OneThread() {
    if (before_ != 1) {
      omp_set_num_threads(before_);
    }
  }
  OneThread(const OneThread&) = delete;

 private:
  int before_;
};

dnnl::memory::data_type type(DType dtype) {
  return dtype == DType::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

dnnl::memory::desc layout(std::int64_t rows, std::int64_t columns, DType dtype, std::int64_t stride,
                          bool transposed) {
  using Dims = dnnl::memory::dims;
  return {Dims{rows, columns}, type(dtype), transposed ? Dims{1, stride} : Dims{stride, 1}};
}

class Product final : public TileProduct {
 public:
  Product(const TileShape& s, const dnnl::matmul::primitive_desc& description)
      : a_(layout(s.m, s.k, s.inputs, s.lda, s.transpose_a)),
        b_(layout(s.k, s.n, s.inputs, s.ldb, s.transpose_b)),
        c_(layout(s.m, s.n, s.output, s.ldc, false)),
        has_bias_(s.bias.has_value()),
        scratch_(description.scratchpad_desc()),
        primitive_(description) {
    if (has_bias_) {
      bias_ = layout(1, s.n, *s.bias, s.n, false);
    }
  }

  std::int64_t scratch_bytes() const override {
    return static_cast<std::int64_t>(scratch_.get_size());
  }

  void run(const void* a, const void* b, void* c, const void* bias, void* scratch) const override {
    const OneThread guard;
    const auto bind = [](const dnnl::memory::desc& desc, const void* at) {
      return dnnl::memory(desc, engine(), const_cast<void*>(at));
    };
    const dnnl::memory a_memory = bind(a_, a), b_memory = bind(b_, b), c_memory = bind(c_, c);
    dnnl::memory bias_memory, scratch_memory;
    dnnl_exec_arg_t arguments[5] = {{DNNL_ARG_SRC, a_memory.get()},
                                    {DNNL_ARG_WEIGHTS, b_memory.get()},
                                    {DNNL_ARG_DST, c_memory.get()}};
    int count = 3;
    if (scratch_.get_size() != 0) {
      scratch_memory = bind(scratch_, scratch);
      arguments[count++] = {DNNL_ARG_SCRATCHPAD, scratch_memory.get()};
    }
    if (has_bias_) {
      bias_memory = bind(bias_, bias);
      arguments[count++] = {DNNL_ARG_BIAS, bias_memory.get()};
    }
    const dnnl_status_t status =
        dnnl_primitive_execute(primitive_.get(), stream().get(), count, arguments);
    ensure(status == dnnl_success, "oneDNN ran a product: status {}", static_cast<int>(status));
  }

 private:
  dnnl::memory::desc a_, b_, c_, bias_;
  bool has_bias_;
  dnnl::memory::desc scratch_;
  dnnl::matmul primitive_;
};

}  // namespace

std::unique_ptr<TileProduct> library_tile_product(const TileShape& s) {
  const OneThread guard;
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (s.accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
  const auto a = layout(s.m, s.k, s.inputs, s.lda, s.transpose_a);
  const auto b = layout(s.k, s.n, s.inputs, s.ldb, s.transpose_b);
  const auto c = layout(s.m, s.n, s.output, s.ldc, false);
  try {
    const auto operation = s.bias ? dnnl::matmul::desc(a, b, layout(1, s.n, *s.bias, s.n, false), c)
                                  : dnnl::matmul::desc(a, b, c);
    return std::make_unique<Product>(s,
                                     dnnl::matmul::primitive_desc(operation, attributes, engine()));
  } catch (const dnnl::error& error) {
    // bf16 needs AVX-512, and f32 inputs never give bf16: matmul_tile.cc widens.
    if (error.status == dnnl_unimplemented) {
      return nullptr;
    }
    throw Error(std::string("[matmul] oneDNN: ") + error.what());
  }
}

}  // namespace reprise::kernels::cpu

#endif
