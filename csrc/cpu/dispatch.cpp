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
#endif

namespace {

#ifdef QUANTKIT_AVX2
// Not every compiler's __builtin_cpu_supports() knows it.
bool supports_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

struct Candidate {
  const KernelTable* table;
  bool runs;
};

std::vector<Candidate> candidates() {
  return {
      {&baseline_table, true},
#ifdef QUANTKIT_AVX2
      {&avx2_table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c()},
#endif
#ifdef QUANTKIT_AVX512
      {&avx512_table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("fma") && supports_f16c()},
#endif
  };
}

std::atomic<const KernelTable*> chosen{nullptr};

const KernelTable* find(const std::string& name) {
  std::string built;
  for (const Candidate& c : candidates()) {
    if (name == c.table->name) {
      if (c.runs) return c.table;
      throw std::runtime_error("QUANTKIT_ISA=" + name + ": this machine does not run it");
    }
    built += std::string(built.empty() ? "" : ", ") + c.table->name;
  }
  throw std::runtime_error("QUANTKIT_ISA=" + name + ": this build has " + built);
}

const KernelTable* choose() {
  const char* forced = std::getenv("QUANTKIT_ISA");
  if (forced != nullptr && *forced != '\0') return find(forced);
  const KernelTable* best = nullptr;
  for (const Candidate& c : candidates())
    if (c.runs) best = c.table;
  return best;
}

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = choose();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates())
    if (c.runs) names.push_back(c.table->name);
  return names;
}

void set_isa(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

}  // namespace quantkit
