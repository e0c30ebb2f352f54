// The Python module beside the operators: what was built, and which instruction set runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "The compiled kernels of quantkit. Private: use quantkit.backend().";
  m.def("isa", &quantkit::isa, "The instruction set in use.");
  m.def(
      "isas", [] { return py::tuple(py::cast(quantkit::available_isas())); },
      "The instruction sets that this build has and this machine runs.");
  m.def("set_isa", &quantkit::set_isa, py::arg("name"), "Switch the instruction set, for tests.");
  m.def("forked_from_threads", &quantkit::forked_from_threads,
        "Whether kernels run on one thread because the process was forked from several.");
  m.def(
      "cuda_archs", [] { return py::tuple(py::str(QUANTKIT_CUDA_ARCHS).attr("split")()); },
      "The GPU architectures compiled in.");
}
