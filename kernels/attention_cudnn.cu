// Fused attention by cuDNN, whose graphs cudnn_frontend builds: on Hopper the backward is a
// composite that only it spells out. Everything is asked for in its deterministic form.
//
// The library is loaded when it is first wanted, so that a program starts without it; its parts and
// the runtime library that cudnn_frontend calls are looked for where the loader looks, then in the
// folders that were found when this was built.
#include <array>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/cuda_device.h"
#include "core/error.h"
#include "kernels/attention_cudnn.h"

#if defined(REPRISE_HAS_CUDNN)
#include <cuda_runtime_api.h>
#include <cudnn_frontend.h>
#include <dlfcn.h>

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // declared there, set below
}
#endif

namespace reprise::kernels::cuda {

#if defined(REPRISE_HAS_CUDNN)
namespace {

namespace fe = cudnn_frontend;

void* load(const std::string& name, std::string& why) {
  const std::string folders = REPRISE_CUDNN_FOLDERS;
  std::size_t begin = 0;
  std::string path = name;
  while (true) {
    if (void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) {
      return handle;
    }
    if (const char* const error = dlerror(); error != nullptr && why.empty()) {
      why = error;
    }
    if (begin >= folders.size()) {
      return nullptr;
    }
    const std::size_t end = std::min(folders.find(':', begin), folders.size());
    path = folders.substr(begin, end - begin) + "/" + name;
    begin = end + 1;
  }
}

// Why the library is not there; empty: it is.
const std::string& load_library() {
  static const std::string refusal = [] {
    std::string why, unused;
    // Those that the library and its frontend open by name themselves.
    load("libcudart.so." + std::to_string(CUDART_VERSION / 1000), unused);
    load("libnvrtc.so." + std::to_string(CUDART_VERSION / 1000), unused);
    fe::cudnn_dlhandle = load("libcudnn.so." + std::to_string(CUDNN_MAJOR), why);
    return fe::cudnn_dlhandle != nullptr ? std::string() : why;
  }();
  return refusal;
}

fe::DataType_t type(DType dtype) {
  return dtype == DType::bf16  ? fe::DataType_t::BFLOAT16
         : dtype == DType::f32 ? fe::DataType_t::FLOAT
         : dtype == DType::i32 ? fe::DataType_t::INT32
                               : fe::DataType_t::INT64;
}

using Attributes = fe::graph::Tensor_attributes;
using TensorPointer = std::shared_ptr<Attributes>;

// The tensors of a graph, as cudnn_frontend has them.
class Tensors {
 public:
  Tensors(fe::graph::Graph& graph, const FusedGraph& description) {
    for (const FusedTensor& t : tensors_of(description)) {
      if (t.ragged) {
        auto& offsets = offsets_[t.role] =
            graph.tensor(Attributes()
                             .set_name(std::string(name(t.role)) + "_offsets")
                             .set_uid(fused_id(t.role, true))
                             .set_dim({description.batch + 1, 1, 1, 1})
                             .set_stride({1, 1, 1, 1})
                             .set_data_type(fe::DataType_t::INT64));
        offsets->set_is_virtual(false);
      }
      if (t.output) {
        outputs_.emplace(t.role, t);
      } else {
        inputs_[t.role] = graph.tensor(described(t, Attributes()));
      }
    }
  }

  const TensorPointer& in(FusedRole role) const { return inputs_.at(role); }
  void set_output(FusedRole role, const TensorPointer& tensor) const {
    described(outputs_.at(role), *tensor).set_output(true);
  }

 private:
  Attributes& described(const FusedTensor& t, Attributes&& attributes) const {
    return described(t, attributes);
  }
  Attributes& described(const FusedTensor& t, Attributes& attributes) const {
    attributes.set_name(std::string(name(t.role)))
        .set_uid(fused_id(t.role))
        .set_dim({t.dims.begin(), t.dims.end()})
        .set_stride({t.strides.begin(), t.strides.end()})
        .set_data_type(type(t.dtype));
    if (t.ragged) {
      attributes.set_ragged_offset(offsets_.at(t.role));
    }
    return attributes;
  }

  std::unordered_map<FusedRole, TensorPointer> inputs_, offsets_;
  std::unordered_map<FusedRole, FusedTensor> outputs_;
};

// What forward and backward have in common.
template <class Options>
void set_visibility(Options& options, const FusedGraph& g, const Tensors& tensors) {
  options.set_attn_scale(g.scale);
  if (g.causal) {
    options
        .set_diagonal_alignment(g.from_last_key ? fe::DiagonalAlignment_t::BOTTOM_RIGHT
                                                : fe::DiagonalAlignment_t::TOP_LEFT)
        .set_diagonal_band_right_bound(0);
  }
  if (g.window > 0) {
    options.set_diagonal_band_left_bound(static_cast<int>(g.window));
  }
  if (g.padded) {
    options.set_padding_mask(true)
        .set_seq_len_q(tensors.in(FusedRole::query_tokens))
        .set_seq_len_kv(tensors.in(FusedRole::key_tokens));
  }
}

std::shared_ptr<fe::graph::Graph> described(const FusedGraph& g, int capability) {
  auto graph = std::make_shared<fe::graph::Graph>();
  graph->set_io_data_type(fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT)
      .set_sm_version(capability);
  const Tensors tensors(*graph, g);
  const auto in = [&](FusedRole role) { return tensors.in(role); };
  if (!g.backward) {
    auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true);
    set_visibility(options, g, tensors);
    const auto [out, stats] =
        graph->sdpa(in(FusedRole::q), in(FusedRole::k), in(FusedRole::v), std::move(options));
    tensors.set_output(FusedRole::out, out);
    tensors.set_output(FusedRole::stats, stats);
    return graph;
  }
  auto options = fe::graph::SDPA_backward_attributes()
                     .set_name("attention_backward")
                     .set_deterministic_algorithm(true);
  set_visibility(options, g, tensors);
  const auto [dq, dk, dv] =
      graph->sdpa_backward(in(FusedRole::q), in(FusedRole::k), in(FusedRole::v), in(FusedRole::out),
                           in(FusedRole::dout), in(FusedRole::stats), std::move(options));
  tensors.set_output(FusedRole::dq, dq);
  tensors.set_output(FusedRole::dk, dk);
  tensors.set_output(FusedRole::dv, dv);
  return graph;
}

// After the operation graph: the library's candidates. Empty: there is one.
std::string choose(fe::graph::Graph& graph, std::int64_t most_bytes) {
  auto status = graph.create_execution_plans({fe::HeurMode_t::A});
  if (status.is_good()) {
    graph.deselect_workspace_greater_than(most_bytes);
    status = graph.check_support();
  }
  return status.is_good() ? "" : status.get_message();
}

// What the compiled graph wants for itself; it needs a driver.
std::string compile(fe::graph::Graph& graph, std::int64_t most_bytes, std::int64_t& bytes) {
  auto status = graph.build_plans(fe::BuildPlanPolicy_t::HEURISTICS_CHOICE);
  if (status.is_good()) {
    status = graph.get_workspace_size(bytes);
  }
  if (status.is_bad()) {
    return status.get_message();
  }
  return bytes <= most_bytes
             ? ""
             : fmt::format("it wants {} bytes of workspace, more than {}", bytes, most_bytes);
}

void check(const char* what, cudnnStatus_t status) {
  if (status != CUDNN_STATUS_SUCCESS) {
    fail("attention", "cuDNN: {}: {}", what, fe::detail::get_error_string(status));
  }
}

// A device's handle; calls on it are one after another.
struct Handle {
  std::mutex mutex;
  cudnnHandle_t handle = nullptr;
  int capability = 0;
};

class Plan final : public FusedPlan {
 public:
  Plan(std::shared_ptr<fe::graph::Graph> graph, Handle& handle)
      : graph_(std::move(graph)), handle_(handle) {}

  void run(const Pointers& pointers, void* workspace, void* stream) const override {
    std::unordered_map<std::int64_t, void*> by_id;
    for (std::size_t id = 1; id < pointers.size(); ++id) {
      if (pointers[id] != nullptr) {
        by_id.emplace(static_cast<std::int64_t>(id), pointers[id]);
      }
    }
    const std::lock_guard lock(handle_.mutex);
    check("stream", fe::detail::set_stream(handle_.handle, static_cast<cudaStream_t>(stream)));
    if (auto status = graph_->execute(handle_.handle, by_id, workspace); status.is_bad()) {
      fail("attention", "cuDNN: {}", status.get_message());
    }
  }

 private:
  std::shared_ptr<fe::graph::Graph> graph_;
  Handle& handle_;
};

class Cudnn final : public FusedLibrary {
 public:
  std::unique_ptr<FusedPlan> plan(const FusedGraph& description, std::int64_t most_bytes,
                                  std::string& why) override {
    if (const std::string& missing = load_library(); !missing.empty()) {
      fail_without_cudnn(missing);
    }
    Handle& handle = of_device(description.device);
    const std::lock_guard lock(handle.mutex);
    try {
      auto graph = described(description, handle.capability);
      auto status = graph->validate();
      if (status.is_good()) {
        status = graph->build_operation_graph(handle.handle);
      }
      why = status.is_good() ? choose(*graph, most_bytes) : status.get_message();
      std::int64_t bytes = 0;
      if (why.empty()) {
        why = compile(*graph, most_bytes, bytes);
      }
      return why.empty() ? std::make_unique<Plan>(std::move(graph), handle) : nullptr;
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {  // a library that cudnn_frontend could not open
      fail_without_cudnn(error.what());
    }
  }

 private:
  Handle& of_device(int device) {
    const std::lock_guard lock(mutex_);
    Handle& made = handles_.at(static_cast<std::size_t>(device));
    if (made.handle == nullptr) {
      int major = 0, minor = 0;
      cuda_check("attention",
                 cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
      cuda_check("attention",
                 cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
      made.capability = 10 * major + minor;
      check("start", fe::detail::create_handle(&made.handle));
    }
    return made;
  }

  std::mutex mutex_;
  std::array<Handle, 16> handles_;
};

}  // namespace

bool has_cudnn() {
  return true;
}

std::int64_t cudnn_version() {
  return load_library().empty() ? static_cast<std::int64_t>(fe::detail::get_backend_version()) : 0;
}

CudnnVerdict cudnn_verdict(const FusedGraph& description, int capability, std::int64_t most_bytes,
                           const std::string& card) {
  if (const std::string& missing = load_library(); !missing.empty()) {
    fail_without_cudnn(missing);
  }
  CudnnVerdict verdict;
  auto graph = described(description, capability);
  auto status = graph->validate();
  if (status.is_bad()) {
    verdict.refusal = status.get_message();
    return verdict;
  }
  verdict.structure = graph->print();
  if (card.empty()) {
    return verdict;
  }
  auto properties = std::make_shared<fe::DeviceProperties>();
  status = properties->deserialize({card.begin(), card.end()});
  if (status.is_good()) {
    graph->set_device_properties(properties);
    status = graph->build_operation_graph();
  }
  verdict.library_refusal = status.is_good() ? choose(*graph, most_bytes) : status.get_message();
  if (verdict.library_refusal.empty()) {
    verdict.compile_refusal = compile(*graph, most_bytes, verdict.workspace_bytes);
  }
  return verdict;
}

FusedLibrary* fused_library() {
  static Cudnn& one = *new Cudnn;  // the driver may be gone before static objects are
  return &one;
}

#else

bool has_cudnn() {
  return false;
}
std::int64_t cudnn_version() {
  return 0;
}
CudnnVerdict cudnn_verdict(const FusedGraph&, int, std::int64_t, const std::string&) {
  fail("attention", "this build has no cudnn_frontend");
}
FusedLibrary* fused_library() {
  return nullptr;
}

#endif

}  // namespace reprise::kernels::cuda
