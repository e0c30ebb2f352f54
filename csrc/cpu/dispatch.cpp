#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef QUANTKIT_AVX2
#include <cpuid.h>
#endif

namespace quantkit {

extern const KernelTable baseline_table;
#ifdef QUANTKIT_AVX2
extern const KernelTable avx2_table;
#endif
#ifdef QUANTKIT_AVX512
extern const KernelTable avx512_table;
extern const LinearTable avx512_vnni_linear;
#endif
#ifdef QUANTKIT_CUDA_EMU
extern const LaunchTable cuda_emu_table;
#endif

namespace {

#ifdef QUANTKIT_AVX2
// Not every compiler's __builtin_cpu_supports() knows it.
bool supports_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

// Kernels of the CPU, or emulated ones beside which the baseline stands in.
struct Candidate {
  const char* name;
  const KernelTable* table;
  bool runs;
  const LaunchTable* emulated = nullptr;
};

const std::vector<Candidate>& all() {
  static const std::vector<Candidate> candidates = {
      {"baseline", &baseline_table, true},
#ifdef QUANTKIT_AVX2
      {"avx2", &avx2_table,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c()},
#endif
#ifdef QUANTKIT_AVX512
      {"avx512", &avx512_table,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma") && supports_f16c()},
#endif
#ifdef QUANTKIT_CUDA_EMU
      {"cuda_emu", &baseline_table, true, &cuda_emu_table},
#endif
  };
  return candidates;
}

std::atomic<const Candidate*> chosen{nullptr};

const Candidate* find(const std::string& name) {
  std::string built;
  for (const Candidate& c : all()) {
    if (name == c.name) {
      if (c.runs) return &c;
      throw std::runtime_error("QUANTKIT_ISA=" + name + ": this machine does not run it");
    }
    built += std::string(built.empty() ? "" : ", ") + c.name;
  }
  throw std::runtime_error("QUANTKIT_ISA=" + name + ": this build has " + built);
}

const Candidate* choose() {
  const char* forced = std::getenv("QUANTKIT_ISA");
  if (forced != nullptr && *forced != '\0') return find(forced);
  const Candidate* best = nullptr;
  for (const Candidate& c : all())
    if (c.runs && c.emulated == nullptr) best = &c;
  return best;
}

const Candidate& candidate() {
  const Candidate* c = chosen.load(std::memory_order_acquire);
  if (c == nullptr) {
    c = choose();
    chosen.store(c, std::memory_order_release);
  }
  return *c;
}

}  // namespace

const KernelTable& kernels() { return *candidate().table; }
const LinearTable& linear_kernels() {
#ifdef QUANTKIT_AVX512
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  if (has_vnni && &kernels() == &avx512_table) return avx512_vnni_linear;
#endif
  return kernels().linear;
}
const LaunchTable* emulated_launches() { return candidate().emulated; }
std::string isa() { return candidate().name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : all())
    if (c.runs) names.push_back(c.name);
  return names;
}

void set_isa(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

}  // namespace quantkit
