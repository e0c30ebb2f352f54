#include "device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cpu/parallel.h"

namespace quantkit {

#ifdef QUANTKIT_CUDA
extern const LaunchTable cuda_table;
#endif

namespace {

Pool torch_pool() {
  uint32_t threads = 1;
  check_shim(torch_get_num_threads(&threads));
  return {threads, [](int64_t tasks, void (*task)(int64_t, void*), void* context) {
            struct Call {
              void (*task)(int64_t, void*);
              void* context;
            } call{task, context};
            const auto part = [](int64_t begin, int64_t end, void* c) {
              for (int64_t i = begin; i < end; ++i)
                static_cast<Call*>(c)->task(i, static_cast<Call*>(c)->context);
            };
            check_shim(torch_parallel_for(0, tasks, 1, part, &call));
          }};
}

// CUDA reports what went wrong at a later call, whoever made the one that failed.
void check_launch(const char* error) {
  if (error != nullptr)
    throw std::runtime_error(
        std::string("quantkit: a CUDA kernel, or an earlier CUDA call, failed: ") + error);
}

#ifdef QUANTKIT_CUDA
// From the library that holds the tensor's kernels: CPU-only torch has none, and 2.12 has no other
// way.
void* current_stream(int32_t device_index) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get == nullptr)
    throw std::runtime_error("quantkit: libtorch_cuda.so tells no current stream");
  void* stream = nullptr;
  check_shim(get(device_index, &stream));
  return stream;
}
#endif

// Calls body(launches, stream) with the GPU's kernels, or with those that are emulated; false: the
// CPU's turn.
template <class Body>
bool on_gpu([[maybe_unused]] const TensorInfo& on, Body body) {
#ifdef QUANTKIT_CUDA
  if (on.device_type == aoti_torch_device_type_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.device_index);
    body(cuda_table, current_stream(on.device_index));
    return true;
  }
#endif
  const LaunchTable* emulated = emulated_launches();
  if (emulated == nullptr) return false;
  body(*emulated, nullptr);
  return true;
}

}  // namespace

bool packs_codes(const TensorInfo& on) {
  return on.device_type == aoti_torch_device_type_cpu() && emulated_launches() == nullptr;
}

bool sums_by_torch(const TensorInfo& on) { return !packs_codes(on); }

void run(const Linear& l, const TensorInfo& on) {
  const bool done = on_gpu(
      on, [&](const LaunchTable& table, void* stream) { check_launch(table.linear(l, stream)); });
  if (!done) run_on_cpu(l, torch_pool());
}

void run(const Elementwise& e, const TensorInfo& on) {
  const bool done = on_gpu(on, [&](const LaunchTable& table, void* stream) {
    check_launch(table.elementwise(e, stream));
  });
  if (!done) run_on_cpu(e, torch_pool());
}

void run(const Dynamic& given, const TensorInfo& on) {
  const bool done = on_gpu(on, [&](const LaunchTable& table, void* stream) {
    Dynamic d = given;
    Layout reduced = given.elements.layout->without_repeats();
    reduced.number_states();
    const Layout parameters = reduced.parameters();
    d.reduced = &reduced;
    d.parameters = &parameters;
    const int64_t bytes = table.scratch_bytes(d);
    if (bytes == 0) return check_launch(table.dynamic(d, nullptr, stream));
    // From torch's caching allocator, which gives it out again in the stream's order.
    const Tensor scratch = empty_contiguous(on, &bytes, 1, dtype_of(Type::u8));
    check_launch(table.dynamic(d, TensorInfo("scratch", scratch).data, stream));
  });
  if (!done) run_on_cpu(given, torch_pool());
}

void run(const Measure& m, const TensorInfo& on) {
  const bool done = on_gpu(
      on, [&](const LaunchTable& table, void* stream) { check_launch(table.measure(m, stream)); });
  if (!done) run_on_cpu(m, torch_pool());
}

void finish(const Measured* measured, int64_t count, const MeasuredOut& out, const TensorInfo& on) {
  const bool done = on_gpu(on, [&](const LaunchTable& table, void* stream) {
    check_launch(table.finish(measured, count, out, stream));
  });
  if (!done) finish_on_cpu(measured, count, out);
}

}  // namespace quantkit
