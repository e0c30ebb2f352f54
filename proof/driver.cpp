// The CPU kernels without torch: for other compilers, machines, sanitizers and valgrind (proof).
//
// driver cases FILE [isa=NAME] [threads=N] [every=K] [nontemporal=1] [environment=NAME]
//   runs recorded calls again: the memory of every operand, gaps included, must be that of the
//   file.
// driver guard [isa=NAME] [step=K]
//   every kind of loop at every length from 1 to 512, and at some from where other loops take over,
//   and every misalignment, between unreadable pages. AddressSanitizer guards the bytes up to them,
//   too. Lengths from 64 on go in steps of K, those below in steps of 1 + K / 64.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <cinttypes>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../csrc/cpu/parallel.h"
#include "recorded.h"

using namespace quantkit;
using recorded::Call;
using recorded::Kind;

namespace {

using Options = std::map<std::string, std::string>;

int64_t number(const Options& options, const char* name, int64_t otherwise) {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : std::atoll(found->second.c_str());
}

// ---- running a call -----------------------------------------------------------------------------

// Threads that ThreadSanitizer sees all of.
Pool pool_of(int64_t threads) {
  return {threads, [](int64_t tasks, void (*task)(int64_t, void*), void* context) {
            std::vector<std::thread> others;
            for (int64_t i = 1; i < tasks; ++i) others.emplace_back(task, i, context);
            task(0, context);
            for (std::thread& thread : others) thread.join();
          }};
}

void run_call(const Call& call, const Pool& pool) {
  if (call.kind == Kind::elementwise) run_on_cpu(call.elementwise, pool);
  if (call.kind == Kind::dynamic) run_on_cpu(call.dynamic, pool);
  if (call.kind == Kind::measure) run_on_cpu(call.measure, pool);
}

// ---- the caller's floating-point environment ----------------------------------------------------

uint64_t control() {
#if defined(__x86_64__)
  return _mm_getcsr();
#elif defined(__aarch64__)
  uint64_t value;
  __asm__ __volatile__("mrs %0, fpcr" : "=r"(value));
  return value;
#else
  return uint64_t(std::fegetround());
#endif
}

void set_control(uint64_t value) {
#if defined(__x86_64__)
  _mm_setcsr(unsigned(value));
#elif defined(__aarch64__)
  __asm__ __volatile__("msr fpcr, %0" : : "r"(value));
#else
  std::fesetround(int(value));
#endif
}

// What a caller may have set.
uint64_t environment(const std::string& name) {
#if defined(__x86_64__)
  const uint64_t flush = 0x8040, rounding[] = {0x2000, 0x4000, 0x6000}, usual = 0x1f80;
#elif defined(__aarch64__)
  const uint64_t flush = 1 << 24, rounding[] = {2 << 22, 1 << 22, 3 << 22}, usual = 0;
#else
  const uint64_t flush = 0, rounding[] = {FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO},
                 usual = FE_TONEAREST;
#endif
  if (name == "usual") return usual;
  if (name == "flushing") return usual | flush;
  if (name == "downward") return usual | rounding[0];
  if (name == "upward") return usual | rounding[1] | flush;
  if (name == "to zero") return usual | rounding[2];
  throw std::runtime_error(
      "environment: expected usual, flushing, downward, upward or to zero, got " + name);
}

// ---- recorded calls -----------------------------------------------------------------------------

struct File {
  std::FILE* file;

  explicit File(const char* name) : file(std::fopen(name, "rb")) {
    int64_t header[std::size(recorded::kHeader)];
    if (file == nullptr || !get(header, sizeof(header)) ||
        std::memcmp(header, recorded::kHeader, sizeof(header)) != 0)
      throw std::runtime_error(std::string(name) + ": no recorded calls, or of another build");
  }
  bool get(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, file) == 1; }
  void need(void* to, size_t bytes) {
    if (!get(to, bytes)) throw std::runtime_error("the file of calls ends early");
  }
};

// FNV-1a.
struct Hash {
  uint64_t value = 0xcbf29ce484222325;

  void add(const char* from, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) value = (value ^ uint8_t(from[i])) * 0x100000001b3;
  }
};

// One for all NaNs: which one an operation gives differs from machine to machine.
template <class T>
void canonical(std::vector<char>& bytes, uint64_t infinity) {
  for (size_t i = 0; i + sizeof(T) <= bytes.size(); i += sizeof(T)) {
    T bits;
    std::memcpy(&bits, &bytes[i], sizeof(T));
    if ((bits & T(~(T(1) << (8 * sizeof(T) - 1)))) <= T(infinity)) continue;
    bits = T(infinity + 1);
    std::memcpy(&bytes[i], &bits, sizeof(T));
  }
}

std::vector<char> canonical(std::vector<char> bytes, Type type) {
  switch (type) {
    case Type::f16: canonical<uint16_t>(bytes, 0x7c00); break;
    case Type::bf16: canonical<uint16_t>(bytes, 0x7f80); break;
    case Type::f32: canonical<uint32_t>(bytes, 0x7f800000); break;
    case Type::f64: canonical<uint64_t>(bytes, 0x7ff0000000000000); break;
    default: break;
  }
  return bytes;
}

// Sums as any split of the work leaves them: with digits below 2^32.
std::vector<char> carried(std::vector<char> bytes) {
  for (size_t i = 0; i + sizeof(Measured) <= bytes.size(); i += sizeof(Measured)) {
    Measured m;
    std::memcpy(&m, &bytes[i], sizeof(m));
    carry(m.squares);
    carry(m.errors);
    std::memcpy(&bytes[i], &m, sizeof(m));
  }
  return bytes;
}

// Memory of exactly these bytes, aligned as it was when it was recorded.
struct Block {
  void* base = nullptr;
  char* data;

  Block(int64_t bytes, int32_t alignment) {
    if (posix_memalign(&base, 64, size_t(bytes + alignment)) != 0) throw std::bad_alloc();
    data = static_cast<char*>(base) + alignment;
  }
  Block(Block&& other) : base(other.base), data(other.data) { other.base = nullptr; }
  Block(const Block&) = delete;
  ~Block() { std::free(base); }
};

int run_cases(const char* name, const Options& options) {
  File file(name);
  const Pool pool = pool_of(number(options, "threads", 3));
  const int64_t every = number(options, "every", 1);
  const bool nontemporal = number(options, "nontemporal", 0) != 0;
  const auto named = options.find("environment");
  const uint64_t caller = environment(named == options.end() ? "usual" : named->second),
                 own = control();
  int64_t calls = 0, elements = 0, differing = 0;
  Hash hash;
  Kind kind;
  for (int64_t at = 0; file.get(&kind, sizeof(kind)); ++at) {
    Call call(kind);
    recorded::parts_of(call, [&](void* to, size_t bytes) { file.need(to, bytes); });
    const std::vector<recorded::Field> fields = recorded::fields_of(call);
    std::vector<int32_t> index(fields.size());
    file.need(index.data(), index.size() * sizeof(int32_t));
    int64_t count;
    file.need(&count, sizeof(count));
    std::vector<recorded::Buffer> buffers;
    std::vector<Block> blocks;
    for (int64_t i = 0; i < count; ++i) {
      int32_t facts[3];
      file.need(facts, sizeof(facts));
      recorded::Buffer b{nullptr, facts[0], facts[1], facts[2], 0, {}, {}};
      file.need(&b.bytes, sizeof(b.bytes));
      b.before.resize(size_t(b.bytes));
      file.need(b.before.data(), b.before.size());
      if (b.written != 0) {
        b.after.resize(size_t(b.bytes));
        file.need(b.after.data(), b.after.size());
      }
      blocks.emplace_back(b.bytes, b.alignment);
      std::memcpy(blocks.back().data, b.before.data(), b.before.size());
      buffers.push_back(std::move(b));
    }
    if (at % every != 0) continue;
    for (size_t i = 0; i < fields.size(); ++i)
      *fields[i].pointer = index[i] < 0 ? nullptr : blocks[size_t(index[i])].data;
    call.elements().nontemporal |= nontemporal;

    set_control(caller);
    run_call(call, pool);
    const uint64_t left = control();
    set_control(own);
    if (left != caller)
      throw std::runtime_error("the caller's floating-point environment was not restored");

    ++calls;
    elements += call.layout.numel;
    for (size_t i = 0; i < buffers.size(); ++i) {
      const recorded::Buffer& b = buffers[i];
      const std::vector<char> now(blocks[i].data, blocks[i].data + b.bytes);
      if (b.written == 0) {
        differing += now != b.before;
        continue;
      }
      const auto comparable = [&](const std::vector<char>& bytes) {
        return call.kind == Kind::measure ? carried(bytes) : canonical(bytes, Type(b.type));
      };
      const std::vector<char> result = comparable(now);
      if (result != comparable(b.after)) {
        ++differing;
        std::printf("call %" PRId64 ", operation %d, memory %zu differs\n", at,
                    int(call.elements().operation), i);
      }
      hash.add(result.data(), result.size());
    }
  }
  std::printf("calls %" PRId64 " elements %" PRId64 " differing %" PRId64 " hash %016" PRIx64 "\n",
              calls, elements, differing, hash.value);
  return differing != 0 || calls == 0;
}

// ---- between unreadable pages -------------------------------------------------------------------

constexpr int64_t kLongest = 512, kRows = 3, kLine = 64;
// From 1,024 and 4,096 elements on under one scale there are other loops (csrc/cpu/kernels.h).
constexpr int64_t kLongRuns[] = {1024, 4096}, kMore = 17;
constexpr uint8_t kCanary = 0xa5;
std::string now_running;

// Pages that can be used between two that cannot.
struct Arena {
  char *begin, *end;

  explicit Arena(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE),
                  inside = (bytes + 2 * kLine + page - 1) / page * page;
    char* const all =
        static_cast<char*>(mmap(nullptr, size_t(inside + 2 * page), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (all == MAP_FAILED || mprotect(all, size_t(page), PROT_NONE) != 0 ||
        mprotect(all + page + inside, size_t(page), PROT_NONE) != 0)
      throw std::runtime_error("mmap failed");
    begin = all + page;
    end = begin + inside;
    poison(begin, end);
  }

  // Where an operand of these bytes lies; all other bytes are poisoned, those around it canaries.
  char* place(int64_t bytes, bool at_end, int64_t offset) const {
    char* const p = at_end ? end - bytes - offset : begin + offset;
    char *const from = before(p), *const to = behind(p + bytes);
    unpoison(from, to);
    std::memset(from, kCanary, size_t(to - from));
    poison(from, p);
    poison(p + bytes, to);
    return p;
  }
  // Whether only the operand was written; poisons it, too.
  bool untouched_around(char* p, int64_t bytes) const {
    char *const from = before(p), *const to = behind(p + bytes);
    unpoison(from, to);
    const auto canary = [](char c) { return uint8_t(c) == kCanary; };
    const bool untouched = std::all_of(from, p, canary) && std::all_of(p + bytes, to, canary);
    poison(from, to);
    return untouched;
  }

 private:
  // A line away, at a border of eight bytes.
  char* before(char* p) const { return std::max(begin, p - kLine - (p - begin) % 8); }
  char* behind(char* p) const { return std::min(end, p + kLine + (end - p) % 8); }

  // Eight bytes at a time: what begins within eight is poisoned from the next eight on.
#ifdef __SANITIZE_ADDRESS__
  static void poison(const char* from, const char* to) {
    __asan_poison_memory_region(from, size_t(to - from));
  }
  static void unpoison(const char* from, const char* to) {
    __asan_unpoison_memory_region(from, size_t(to - from));
  }
#else
  static void poison(const char*, const char*) {}
  static void unpoison(const char*, const char*) {}
#endif
};

// A call of any length; its pointers stand for memory that is placed later.
struct Kernel {
  Call call;
  std::string name;
};

// How elements and parameters lie: one scale, a scale for each element, the same in steps, rows
// under a scale each, many short ones, columns (a scale for each of the inner elements), scales of
// rows beside zero points of columns, and steps of x or of what is written.
enum class Lie { shared, each, each_steps, rows, short_rows, columns, crossed, x_steps, out_steps };
constexpr Lie kLies[] = {Lie::shared,  Lie::each,       Lie::each_steps,
                         Lie::rows,    Lie::short_rows, Lie::columns,
                         Lie::crossed, Lie::x_steps,    Lie::out_steps};

Layout layout_for(Lie lie, int64_t n) {
  const auto layout_of = [](const std::vector<Dim>& dims) {
    Layout layout{};
    layout.numel = 1;
    for (const Dim& dim : dims) {
      layout.dims[layout.count++] = dim;
      layout.numel *= dim.size;
    }
    return layout;
  };
  switch (lie) {
    case Lie::each: return layout_of({{n, {1, 1, 1, 1, 1}}});
    case Lie::each_steps: return layout_of({{n, {1, 1, 1, 2, 3}}});
    case Lie::rows: return layout_of({{kRows, {n, n, n, 1, 1}}, {n, {1, 1, 1, 0, 0}}});
    case Lie::short_rows:
      return layout_of({{n, {kRows, kRows, kRows, 1, 1}}, {kRows, {1, 1, 1, 0, 0}}});
    case Lie::columns: return layout_of({{kRows, {n, n, n, 0, 0}}, {n, {1, 1, 1, 1, 1}}});
    case Lie::crossed: return layout_of({{kRows, {n, n, n, 1, 0}}, {n, {1, 1, 1, 0, 1}}});
    case Lie::x_steps: return layout_of({{n, {3, 1, 1, 0, 0}}});
    case Lie::out_steps: return layout_of({{n, {1, 2, 2, 0, 0}}});
    case Lie::shared: break;
  }
  return layout_of({{n, {1, 1, 1, 0, 0}}});
}

bool of_each(Lie lie) { return lie == Lie::each || lie == Lie::each_steps; }

// Codes that share a byte are written side by side, rows of whole bytes.
bool writes_packed(const Elementwise& e) {
  return e.q != nullptr && route_of(e.operation).beside == Beside::codes && e.packed &&
         per_byte(e.format) > 1;
}
bool repacks(const Elementwise& e) {
  return e.operation == Operation::pack || e.operation == Operation::unpack;
}

// Whether such a kernel can be called so, with loops that no other lie has: chosen parameters lie
// without gaps, scales and zero points alike; conversions and masks have none.
bool takes(Kernel& kernel, Lie lie) {
  const Elementwise& e = kernel.call.elements();
  if (repacks(e)) return lie == Lie::shared;
  if (writes_packed(e) && (lie == Lie::out_steps || lie == Lie::short_rows)) return false;
  if (of_each(lie) || lie == Lie::crossed)
    return kernel.call.kind == Kind::elementwise && e.scale.data != nullptr;
  return kernel.call.kind == Kind::dynamic || e.scale.data != nullptr ||
         (lie != Lie::columns && lie != Lie::short_rows);
}

const char* name_of(Type type) {
  constexpr const char* names[] = {"f16", "bf16", "f32", "f64", "i8",  "u8",  "i16",
                                   "u16", "i32",  "u32", "i64", "u64", "bool"};
  return names[int(type)];
}

constexpr Type kFloats[] = {Type::f16, Type::bf16, Type::f32, Type::f64};
#define QK_ENTRY(name, ...) Format::name,
constexpr Format kFormats[] = {QK_FORMATS(QK_ENTRY)};
#undef QK_ENTRY
#define QK_ENTRY(name, ...) #name,
constexpr const char* kFormatNames[] = {QK_FORMATS(QK_ENTRY) "numbers"};
#undef QK_ENTRY

void* const kUsed = &now_running;  // a field that is not null

void set_limits(Elementwise& e, Format format) {
  e.format = format;
  e.packed = true;
  with_codes(format, [&](auto tag) {
    using F = typename decltype(tag)::type;
    const bool wide = F::Encoder::kInteger && F::kHigh > 255;
    e.q_min = int32_t(wide && F::kLow < 0 ? -300 : F::kLow);
    e.q_max = int32_t(wide ? 300 : F::kHigh);
  });
}

// The steps of data of this type, its parameters' type and the dtype of its steps.
Elementwise elementwise_of(Type x, Type parameter, Type step) {
  Elementwise e{};
  e.x = kUsed;
  e.x_type = x;
  e.scale = {kUsed, parameter, false};
  e.add = e.subtract = {kUsed, parameter, false};
  const Type back = x == Type::f64 ? x : Type::f32;
  e.steps = {step, step, back, back};
  e.y_type = back;
  return e;
}

// The symmetric scheme for centred codes, else the asymmetric one.
Scheme scheme_of(const Elementwise& e) {
  Scheme s{};
  s.q_min = e.q_min;
  s.q_max = e.q_max;
  s.symmetric = e.centred;
  s.steps = e.centred ? e.q_max : e.q_max - e.q_min;
  s.eps = 1e-8;
  return s;
}

// By float32 steps: every format, each with a byte or more to itself or packed.
void add_formats(std::vector<Kernel>& kernels) {
  const auto add = [&](const Elementwise& e, const std::string& name) {
    Call call(Kind::elementwise);
    call.elementwise = e;
    kernels.push_back({call, name + " " + kFormatNames[int(e.format)] + " in float32 steps"});
  };
  const auto of = [](Operation o, Type x, Format format) {
    Elementwise e = elementwise_of(x, Type::f32, Type::f32);
    e.operation = o;
    e.y_type = x;
    set_limits(e, format);
    return e;
  };
  for (const Format format : kFormats) {
    const bool of_version_1 = format <= Format::int16;
    for (const Type x : {Type::f16, Type::f32}) {
      const std::string name = std::string(" ") + name_of(x);
      Elementwise e = of(Operation::quantize, x, format);
      e.q = kUsed;
      if (!of_version_1) add(e, "quantize" + name);
      e.steps.round_first = true;
      if (!is_float(format)) add(e, "quantize, rounded first," + name);
    }
    if (of_version_1) continue;
    for (const Operation o : {Operation::pack, Operation::unpack}) {
      Elementwise e{};
      e.operation = o;
      e.format = format;
      e.packed = true;
      e.q_in = e.q = kUsed;
      if (per_byte(format) > 1) add(e, "operation " + std::to_string(int(o)));
    }
    Elementwise back = of(Operation::dequantize, Type::f32, format);
    back.x = nullptr;
    back.q_in = back.y = kUsed;
    add(back, "dequantize");
    if (is_float(format)) {
      Elementwise e = of(Operation::fake_quantize_masked, Type::f32, format);
      e.y = e.q = kUsed;
      add(e, "fake_quantize_masked");
    }
    Call call(Kind::dynamic);
    Dynamic& d = call.dynamic;
    Elementwise& e = d.elements;
    e = of(Operation::quantize_dequantize, Type::f32, format);
    e.q = e.y = kUsed;
    e.chosen = true;
    e.centred = e.q_min < 0;
    d.scale = kUsed;
    d.zero_point = is_float(format) ? nullptr : kUsed;
    d.p_type = Type::f32;
    d.scheme = scheme_of(e);
    kernels.push_back({call, std::string("chosen ") + kFormatNames[int(format)]});
    if (!is_float(format)) continue;
    d.stored = kUsed;
    d.global = {kUsed, Type::f32, false};
    d.scheme.stored = Stored::e4m3;
    e.centred = false;
    kernels.push_back({call, std::string("chosen, e4m3 scales, ") + kFormatNames[int(format)]});
    d.scheme.stored = Stored::e8m0;
    d.scheme.rule = Rule::floor;
    kernels.push_back({call, std::string("chosen, e8m0 scales, ") + kFormatNames[int(format)]});
  }
}

std::vector<Kernel> kernels_to_guard() {
  std::vector<Kernel> kernels;
  const auto add = [&](const Elementwise& e, std::string name) {
    Call call(Kind::elementwise);
    call.elementwise = e;
    kernels.push_back({call, std::move(name)});
  };
  add_formats(kernels);
  for (const Type x : kFloats) {
    std::vector<Type> parameter_types = {x};
    if (x != Type::f64) parameter_types.push_back(is_half(x) ? Type::f32 : Type::f64);
    for (const Type parameter : parameter_types) {
      // Parameters of another type leave x's, as those without dimensions do, or promote it.
      for (const Type step : {x, parameter}) {
        const std::string name =
            std::string(" ") + name_of(x) + " by " + name_of(parameter) + " in " + name_of(step);
        for (const Format format : {Format::int8, Format::uint8, Format::int16}) {
          Elementwise e = elementwise_of(x, parameter, step);
          e.operation = Operation::quantize;
          e.q = kUsed;
          set_limits(e, format);
          add(e, "quantize" + name + " to " + kFormatNames[int(format)]);
        }
        for (const Operation o : {Operation::fake_quantize, Operation::fake_quantize_masked,
                                  Operation::fake_quantize_backward}) {
          Elementwise e = elementwise_of(x, parameter, step);
          e.operation = o;
          e.y = kUsed;
          e.y_type = x;
          set_limits(e, Format::int16);
          if (o == Operation::fake_quantize_backward) e.q_in = kUsed;
          if (o == Operation::fake_quantize_masked) e.q = kUsed;
          add(e, "operation " + std::to_string(int(o)) + name);
        }
        if (step == x && parameter == x) break;
      }
    }
    for (const bool symmetric : {true, false})
      for (const Operation o :
           {Operation::choose, Operation::quantize, Operation::quantize_dequantize}) {
        Call call(Kind::dynamic);
        Dynamic& d = call.dynamic;
        d.elements = elementwise_of(x, x, x);
        Elementwise& e = d.elements;
        e.operation = o;
        d.scale = d.zero_point = kUsed;
        d.p_type = x;
        e.chosen = true;
        e.centred = symmetric;
        if (o != Operation::choose) e.q = kUsed;
        if (o == Operation::quantize_dequantize) e.y = kUsed;
        set_limits(e, symmetric ? Format::int8 : Format::uint8);
        d.scheme = scheme_of(e);
        kernels.push_back({call, std::string(symmetric ? "symmetric" : "asymmetric") +
                                     " operation " + std::to_string(int(o)) + " " + name_of(x)});
      }
    Elementwise gradient{};
    gradient.operation = Operation::masked_gradient;
    gradient.x = gradient.q_in = gradient.y = kUsed;
    gradient.x_type = gradient.y_type = x;
    add(gradient, std::string("masked gradient ") + name_of(x));
  }
  const auto wide = [](Type t) { return t == Type::f64 ? t : Type::f32; };
  for (const Format q : {Format::int8, Format::uint8, Format::int16, Format::numbers})
    for (const Type scale : kFloats)
      for (const Type zero_point : {Type::f32, Type::f64}) {
        Elementwise e{};
        e.operation = Operation::dequantize;
        e.q_in = e.y = kUsed;
        e.format = q;
        e.scale = {kUsed, scale, false};
        e.add = e.subtract = {kUsed, zero_point, false};
        e.steps.subtract = zero_point;
        e.steps.multiply = e.y_type = zero_point == Type::f64 ? zero_point : wide(scale);
        add(e, std::string("dequantize ") + kFormatNames[int(q)] + " by " + name_of(scale) +
                   " and " + name_of(zero_point));
      }
  for (int from = 0; from <= int(Type::boolean); ++from)
    for (const Type to : kFloats) {
      Elementwise e{};
      e.operation = Operation::convert;
      e.x = e.y = kUsed;
      e.x_type = Type(from);
      e.y_type = to;
      add(e, std::string("convert ") + name_of(Type(from)) + " to " + name_of(to));
    }
  return kernels;
}

// Numbers of a type: multiples of 1/4 up to 32, scales positive, zero points integers. No code of a
// byte is a NaN of a float format, of which machines make different ones.
void fill(std::vector<char>& bytes, Type type, Operand kind, uint32_t seed) {
  const int64_t size = size_of(type), n = int64_t(bytes.size()) / size;
  std::vector<float> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 1664525 + 1013904223;
    const int32_t number = int32_t(seed >> 24);
    values[size_t(i)] = kind == kScale       ? float(number % 16 + 1) / 8
                        : kind == kZeroPoint ? float(number % 32)
                                             : float(number - 128) / 4;
  }
  with_real(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = 0; i < n; ++i) {
      T value;
      if constexpr (std::is_same<T, boolean>::value)
        value = boolean{uint8_t(i % 3)};
      else if constexpr (std::is_same<T, uint8_t>::value)
        value = T(int32_t(values[size_t(i)] * 4) & (kind == kQ ? 0xfb : 0xff));
      else if constexpr (std::is_integral<T>::value)
        value = T(int32_t(values[size_t(i)]));
      else
        value = narrow<T>(Wide<T>(values[size_t(i)]));
      std::memcpy(&bytes[size_t(i * size)], &value, size_t(size));
    }
  });
}

// What a call of `n` must leave: by the baseline, element by element where no parameters are
// chosen.
std::vector<std::vector<char>> expected_of(Call& call, const std::vector<int32_t>& index,
                                           const std::vector<std::vector<char>>& contents) {
  std::vector<std::vector<char>> memory = contents;
  const std::vector<recorded::Field> fields = recorded::fields_of(call);
  for (size_t i = 0; i < fields.size(); ++i)
    if (index[i] >= 0) *fields[i].pointer = memory[size_t(index[i])].data();
  const std::string isa_in_use = isa();
  set_isa("baseline");
  const int64_t n = call.layout.numel;
  if (call.kind == Kind::dynamic) run_call(call, pool_of(1));
  const Elementwise& e = call.elements();
  const int64_t one = writes_packed(e) && !repacks(e) ? per_byte(e.format) : 1;
  for (int64_t i = 0; i < n && call.kind != Kind::dynamic; i += one)
    kernels().elementwise(call.elementwise, i, i + one);
  set_isa(isa_in_use);
  return memory;
}

int64_t guard_kernel(Kernel& kernel, Lie lie, int64_t n, const std::vector<Arena>& arenas,
                     int64_t& wrong) {
  Call& call = kernel.call;
  call.layout = layout_for(lie, n);
  call.elements().layout = &call.layout;

  // Each field has memory of its own, but the chosen parameters are those that the elements take.
  const std::vector<recorded::Field> fields = recorded::fields_of(call);
  std::vector<int32_t> index(fields.size(), -1);
  std::vector<int64_t> sizes;
  const Format format = call.elements().format;
  const bool has_zero_point = format == Format::numbers || !is_float(format);
  for (size_t i = 0; i < fields.size(); ++i) {
    if (*fields[i].pointer == nullptr) continue;
    if (call.kind == Kind::dynamic && (i == 4 || (has_zero_point && (i == 5 || i == 6)))) continue;
    index[i] = int32_t(sizes.size());
    sizes.push_back(fields[i].bytes(call.layout));
  }
  if (call.kind == Kind::dynamic) index[4] = index[7];
  if (call.kind == Kind::dynamic && has_zero_point) index[5] = index[6] = index[8];
  std::vector<std::vector<char>> contents;
  for (const int64_t bytes : sizes) contents.emplace_back(size_t(bytes), char(kCanary));
  std::vector<int64_t> unit(sizes.size(), 1);
  for (size_t i = 0; i < fields.size(); ++i) {
    if (index[i] < 0) continue;
    unit[size_t(index[i])] = size_of(fields[i].type);
    if (!fields[i].written)
      fill(contents[size_t(index[i])], fields[i].type, fields[i].operand, uint32_t(i + 1));
    if (fields[i].operand == kZeroPoint && !has_zero_point)
      std::fill(contents[size_t(index[i])].begin(), contents[size_t(index[i])].end(), char(0));
  }
  const std::vector<std::vector<char>> expected = expected_of(call, index, contents);

  const Pool pool = pool_of(1);
  int64_t calls = 0;
  for (const bool at_end : {true, false})
    for (int64_t turn = 0; turn < kLine; ++turn) {
      if (turn >= kLine / *std::min_element(unit.begin(), unit.end())) break;
      std::vector<char*> place(sizes.size());
      for (size_t i = 0; i < sizes.size(); ++i) {
        // The first at every misalignment of its type; the others at one of theirs that moves with
        // it.
        const int64_t places = kLine / unit[i], which = i == 0 ? turn : turn * 3 + n * int64_t(i);
        place[i] = arenas[i].place(sizes[i], at_end, which % places * unit[i]);
        std::memcpy(place[i], contents[i].data(), contents[i].size());
      }
      for (size_t i = 0; i < fields.size(); ++i)
        if (index[i] >= 0) *fields[i].pointer = place[size_t(index[i])];
      now_running = kernel.name + ", lie " + std::to_string(int(lie)) + ", length " +
                    std::to_string(n) + (at_end ? ", at the end, " : ", at the beginning, ") +
                    std::to_string(turn);
      call.elements().nontemporal = (turn + n) % 2 != 0;
      run_call(call, pool);
      ++calls;
      bool right = true;
      for (size_t i = 0; i < sizes.size(); ++i)
        right &= std::memcmp(place[i], expected[i].data(), expected[i].size()) == 0 &&
                 arenas[i].untouched_around(place[i], sizes[i]);
      if (!right && ++wrong <= 10) std::printf("wrong: %s\n", now_running.c_str());
    }
  return calls;
}

void report_fault(int) {
  const auto say = [](const char* text, size_t n) { return write(STDERR_FILENO, text, n) >= 0; };
  const bool said = say("reads or writes outside: ", 25) &&
                    say(now_running.data(), now_running.size()) && say("\n", 1);
  _exit(said ? 3 : 4);
}

int run_guard(const Options& options) {
  signal(SIGSEGV, report_fault);
  signal(SIGBUS, report_fault);
  const int64_t step = number(options, "step", 1);
  std::vector<Arena> arenas;
  for (int i = 0; i < 9; ++i) arenas.emplace_back(3 * (4096 + kMore) * kRows * 8);
  std::vector<Kernel> kernels = kernels_to_guard();
  int64_t calls = 0, wrong = 0;
  for (Kernel& kernel : kernels)
    for (const Lie lie : kLies) {
      if (!takes(kernel, lie)) continue;
      const auto guard = [&](int64_t n) {
        const Elementwise& e = kernel.call.elements();
        if (writes_packed(e) && !repacks(e)) n += -n & (per_byte(e.format) - 1);
        calls += guard_kernel(kernel, lie, n, arenas, wrong);
      };
      for (int64_t n = 1; n <= kLongest; n += n < 64 ? 1 + step / 64 : step) guard(n);
      for (const int64_t run : kLongRuns)
        for (int64_t n = run; n < run + kMore && !of_each(lie); n += step > 100 ? kMore
                                                                     : step > 8 ? 8
                                                                                : 1)
          guard(n);
    }
  std::printf("kernels %zu calls %" PRId64 " wrong %" PRId64 "\n", kernels.size(), calls, wrong);
  return wrong != 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::string mode = argc > 1 ? argv[1] : "";
    Options options;
    for (int i = 2; i < argc; ++i) {
      const std::string argument = argv[i];
      const size_t equals = argument.find('=');
      if (equals != std::string::npos)
        options[argument.substr(0, equals)] = argument.substr(equals + 1);
    }
    if (options.count("isa") != 0) set_isa(options["isa"]);
    if (mode == "cases" && argc > 2) return run_cases(argv[2], options);
    if (mode == "guard") return run_guard(options);
    if (mode == "isas") {
      for (const std::string& name : available_isas()) std::printf("%s ", name.c_str());
      std::printf("\n");
      return 0;
    }
    throw std::runtime_error("expected cases FILE, guard or isas");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
