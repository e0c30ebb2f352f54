#include "run.cuh"

namespace quantkit {
// The object's one exported symbol.
extern const LaunchTable cuda_table;
const LaunchTable cuda_table = {run_elementwise, scratch_bytes, run_dynamic,
                                run_measure,     run_finish,    run_linear};
}  // namespace quantkit
