// Defines the operators and registers their kernels.

#include "ops.h"
#include "schemas.h"

// Another name lets two builds live in one process (benchmarks/ab.py).
#ifndef QUANTKIT_NAMESPACE
#define QUANTKIT_NAMESPACE quantkit
#endif
#define QUOTED(name) #name
#define NAME_OF(name) QUOTED(name)

// torch takes tags since 2.12: null before, where quantkit/_load.py adds them for Python.
extern "C" [[gnu::weak]] int32_t torch_tag_pt2_compliant_tag();
extern "C" [[gnu::weak]] AOTITorchError torch_library_def_with_tags(TorchLibraryHandle, const char*,
                                                                    const int32_t*, int32_t);

namespace {
void define(TorchLibraryHandle library, const char* schema) {
  if (torch_library_def_with_tags == nullptr || torch_tag_pt2_compliant_tag == nullptr) {
    quantkit::check_shim(aoti_torch_library_def(library, schema));
  } else {
    const int32_t tag = torch_tag_pt2_compliant_tag();
    quantkit::check_shim(torch_library_def_with_tags(library, schema, &tag, 1));
  }
}

const struct Schemas {
  TorchLibraryHandle handle = nullptr;

  Schemas() {
    quantkit::check_shim(
        aoti_torch_library_init_def(NAME_OF(QUANTKIT_NAMESPACE), __FILE__, __LINE__, &handle));
    for (const char* schema : quantkit::kSchemas) define(handle, schema);
  }
  ~Schemas() { aoti_torch_delete_library_object(handle); }
} schemas;

void implement(quantkit::Library& library) {
  quantkit::implement_static(library);
  quantkit::implement_dynamic(library);
  quantkit::implement_measure(library);
  quantkit::implement_linear(library);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(QUANTKIT_NAMESPACE, CPU, library) { implement(library); }
#ifdef QUANTKIT_CUDA
STABLE_TORCH_LIBRARY_IMPL(QUANTKIT_NAMESPACE, CUDA, library) { implement(library); }
#endif
