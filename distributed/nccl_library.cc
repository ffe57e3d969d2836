#include "distributed/nccl_calls.h"

#ifdef REPRISE_HAS_NCCL
#include <nccl.h>

#include "core/cuda_device.h"
#endif

namespace reprise::distributed {

#ifdef REPRISE_HAS_NCCL
namespace {

static_assert(sizeof(NcclId) == sizeof(ncclUniqueId));
static_assert(static_cast<int>(NcclResult::success) == ncclSuccess);
static_assert(static_cast<int>(NcclResult::remote_error) == ncclRemoteError);
static_assert(static_cast<int>(NcclResult::in_progress) == ncclInProgress);

void check(cudaError_t status) {
  cuda_check("communicator", status);
}

NcclResult result(ncclResult_t code) {
  return static_cast<NcclResult>(code);
}

ncclDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return ncclFloat32;
    case DType::bf16:
      return ncclBfloat16;
    case DType::f64:
      return ncclFloat64;
    case DType::i32:
      return ncclInt32;
    case DType::i64:
      return ncclInt64;
  }
  return ncclNumTypes;
}

ncclRedOp_t operation_of(Reduce reduce) {
  switch (reduce) {
    case Reduce::sum:
      return ncclSum;
    case Reduce::max:
      return ncclMax;
    case Reduce::min:
      return ncclMin;
  }
  return ncclNumOps;
}

class Library final : public NcclCalls {
 public:
  explicit Library(Device device) : device_(device) {}

  NcclResult make_id(NcclId& id) override {
    ncclUniqueId made;
    const ncclResult_t code = ncclGetUniqueId(&made);
    std::copy(std::begin(made.internal), std::end(made.internal), id.begin());
    return result(code);
  }

  NcclResult init(Comm& comm, int size, const NcclId& id, int rank) override {
    ncclUniqueId shared;
    std::copy(id.begin(), id.end(), shared.internal);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclComm_t made = nullptr;
    const ncclResult_t code = ncclCommInitRankConfig(&made, size, shared, rank, &config);
    comm = made;
    return result(code);
  }

  NcclResult state(Comm comm) override {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t code = ncclCommGetAsyncError(comm_of(comm), &state);
    return result(code == ncclSuccess ? state : code);
  }

  NcclResult enqueue(const NcclOperation& o, Comm comm, Stream stream) override {
    const ncclComm_t on = comm_of(comm);
    const cudaStream_t in_stream = stream_of(stream);
    const ncclDataType_t type = type_of(o.dtype);
    switch (o.kind) {
      case Collective::Kind::all_reduce:
        return result(
            ncclAllReduce(o.in, o.out, o.count, type, operation_of(o.reduce), on, in_stream));
      case Collective::Kind::reduce_scatter:
        return result(
            ncclReduceScatter(o.in, o.out, o.count, type, operation_of(o.reduce), on, in_stream));
      case Collective::Kind::all_gather:
        return result(ncclAllGather(o.in, o.out, o.count, type, on, in_stream));
      case Collective::Kind::broadcast:
        return result(ncclBroadcast(o.in, o.out, o.count, type, o.root, on, in_stream));
      case Collective::Kind::agree:
      case Collective::Kind::barrier:
        break;
    }
    return result(ncclInvalidArgument);
  }

  NcclResult finalize(Comm comm) override { return result(ncclCommFinalize(comm_of(comm))); }
  NcclResult destroy(Comm comm) override { return result(ncclCommDestroy(comm_of(comm))); }
  NcclResult abort(Comm comm) override { return result(ncclCommAbort(comm_of(comm))); }

  std::string text(NcclResult code, Comm comm) override {
    std::string text = ncclGetErrorString(static_cast<ncclResult_t>(code));
    const char* last = comm == nullptr ? nullptr : ncclGetLastError(comm_of(comm));
    if (last != nullptr && *last != 0) {
      text += std::string(": ") + last;
    }
    return text;
  }

  void use_device() override { check(cudaSetDevice(device_.index)); }
  bool on_device(const Tensor& data) override { return data.device() == device_; }

  Stream make_stream() override {
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
    return stream;
  }
  void destroy_stream(Stream stream) override { cudaStreamDestroy(stream_of(stream)); }

  Event mark_compute() override { return mark(cuda_stream(device_)); }
  Event mark(Stream stream) override {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    Event owned(event, [](void* at) { cudaEventDestroy(static_cast<cudaEvent_t>(at)); });
    check(cudaEventRecord(event, stream_of(stream)));
    return owned;
  }
  void wait_for(Stream stream, const Event& event) override {
    check(cudaStreamWaitEvent(stream_of(stream), static_cast<cudaEvent_t>(event.get()), 0));
  }
  bool passed(const Event& event) override {
    const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event.get()));
    if (status == cudaErrorNotReady) {
      cudaGetLastError();  // it is no error, but would be the next launch's
      return false;
    }
    check(status);
    return true;
  }

  void* allocate(std::size_t bytes, Stream stream) override {
    void* at = nullptr;
    check(cudaMallocAsync(&at, bytes, stream_of(stream)));
    return at;
  }
  void free(void* at, Stream stream) override { cudaFreeAsync(at, stream_of(stream)); }
  void* allocate_pinned(std::size_t bytes) override {
    void* at = nullptr;
    check(cudaHostAlloc(&at, bytes, cudaHostAllocDefault));
    return at;
  }
  void free_pinned(void* at) override { cudaFreeHost(at); }
  void copy(void* to, const void* from, std::size_t bytes, Stream stream) override {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(stream)));
  }

 private:
  static ncclComm_t comm_of(Comm comm) { return static_cast<ncclComm_t>(comm); }
  static cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }

  const Device device_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<NcclCalls>> nccl_library(Device device) {
  if (device.kind != DeviceKind::cuda || device.index < 0 || device.index >= cuda_device_count()) {
    return absl::FailedPreconditionError(fmt::format(
        "NCCL needs one of {} cuda devices here, got {}", cuda_device_count(), to_string(device)));
  }
  return std::make_unique<Library>(device);
}

std::string nccl_version() {
  int version = 0;
  ncclGetVersion(&version);
  return fmt::format("NCCL {}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

#else

absl::StatusOr<std::unique_ptr<NcclCalls>> nccl_library(Device) {
  return absl::FailedPreconditionError(
      "this build has no NCCL: install it beside CUDA (nccl.h, libnccl), then configure with "
      "-DREPRISE_CUDA=ON");
}

std::string nccl_version() {
  return {};
}

#endif

}  // namespace reprise::distributed
