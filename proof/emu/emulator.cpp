#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>

#include "../../csrc/cpu/fpenv.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace quantkit {
namespace emu {
namespace {

// What any GPU since compute capability 7.5 allows.
constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int kMostThreads = 1024, kWarp = 32;
constexpr int64_t kMostShared = 48 * 1024;
constexpr size_t kStack = 128 * 1024;

// ---- coroutines ---------------------------------------------------------------------------------

#ifdef __x86_64__
extern "C" void quantkit_emu_switch(void** from, void* to);
asm(R"(
.text
.hidden quantkit_emu_switch
.globl quantkit_emu_switch
.type quantkit_emu_switch, @function
quantkit_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size quantkit_emu_switch, .-quantkit_emu_switch
)");
#endif

// A stack and where its coroutine stands.
class Fiber {
 public:
  Fiber() {
    memory_ = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, 4096, PROT_NONE);
  }
  ~Fiber() { munmap(memory_, kStack); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Readies entry() to be run from its start.
  void prepare(void (*entry)()) {
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(static_cast<char*>(memory_) + kStack) - 1;
    *top = nullptr;  // entry never returns
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    at_ = top;
#else
    getcontext(&at_);
    at_.uc_stack.ss_sp = memory_;
    at_.uc_stack.ss_size = kStack;
    makecontext(&at_, entry, 0);
#endif
  }
  void enter() {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, memory_, kStack);
#endif
#ifdef __x86_64__
    quantkit_emu_switch(&caller_, at_);
#else
    swapcontext(&caller_, &at_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  // To whoever entered; `last`: for good.
  void leave([[maybe_unused]] bool last) {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, bottom_, size_);
#endif
#ifdef __x86_64__
    quantkit_emu_switch(&at_, caller_);
#else
    swapcontext(&at_, &caller_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &bottom_, &size_);
#endif
  }
  // First thing in entry().
  void entered() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &bottom_, &size_);
#endif
  }

 private:
  void* memory_;
#ifdef __x86_64__
  void *at_ = nullptr, *caller_ = nullptr;
#else
  ucontext_t at_, caller_;
#endif
#ifdef __SANITIZE_ADDRESS__
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

// ---- a block ------------------------------------------------------------------------------------

enum class Wait { ready, barrier, shuffle, done };

struct Thread {
  std::unique_ptr<Fiber> fiber;  // while it waits
  Wait wait = Wait::ready;
  const char* file = nullptr;
  int line = 0, distance = 0;
  uint64_t value = 0;
};

struct Machine {
  Place place{};
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<Fiber>> idle;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  const Buffers* buffers = nullptr;
  std::string fault;
  std::vector<char> shared;
  std::map<std::pair<std::string, int>, int64_t> places;  // of arrays in shared memory
  int64_t used = 0;
  int64_t read = 0;  // bytes of the first buffer
  std::mt19937 random{20251125};
};

thread_local Machine machine;

std::string where(const char* file, int line) {
  const std::string path(file);
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
}

std::string who(unsigned thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(machine.place.block.x);
}

void entry() {
  machine.running->entered();
  for (;;) {
    Machine& m = machine;
    try {
      (*m.body)();
    } catch (const std::exception& error) {
      if (m.fault.empty()) m.fault = who(m.place.thread.x) + ": " + error.what();
    }
    m.threads[m.place.thread.x].wait = Wait::done;
    m.running->leave(false);
  }
}

void run_thread(int i) {
  Machine& m = machine;
  Thread& t = m.threads[i];
  m.place.thread.x = static_cast<unsigned>(i);
  if (t.fiber == nullptr) {
    if (m.idle.empty()) {
      m.idle.push_back(std::make_unique<Fiber>());
      m.idle.back()->prepare(entry);
    }
    t.fiber = std::move(m.idle.back());
    m.idle.pop_back();
  }
  m.running = t.fiber.get();
  m.running->enter();
  if (t.wait == Wait::done) m.idle.push_back(std::move(t.fiber));
}

void wait_for(Wait what, const char* file, int line) {
  Thread& t = machine.threads[machine.place.thread.x];
  t.wait = what;
  t.file = file;
  t.line = line;
  machine.running->leave(false);
}

// Lets a warp go on whose lanes have all come to one shuffle.
bool exchange(int first) {
  Machine& m = machine;
  uint64_t values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Thread& t = m.threads[first + lane];
    const Thread& leader = m.threads[first];
    if (t.wait != Wait::shuffle || t.line != leader.line || t.file != leader.file) return false;
    values[lane] = t.value;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread& t = m.threads[first + lane];
    const int from = lane ^ t.distance;
    if (from < 0 || from >= kWarp) throw Fault("a shuffle from outside the warp");
    t.value = values[from];
    t.wait = Wait::ready;
  }
  return true;
}

bool release_barrier() {
  Machine& m = machine;
  const Thread& first = m.threads[0];
  for (const Thread& t : m.threads)
    if (t.wait != Wait::barrier || t.line != first.line || t.file != first.file) return false;
  for (Thread& t : m.threads) t.wait = Wait::ready;
  return true;
}

// What the threads of a block that cannot go on wait for.
std::string standstill() {
  std::string text;
  int told = 0;
  std::string last;
  for (size_t i = 0; i < machine.threads.size() && told < 6; ++i) {
    const Thread& t = machine.threads[i];
    const std::string now =
        t.wait == Wait::done
            ? "has ended"
            : (t.wait == Wait::barrier ? "waits at the barrier of " : "waits in the shuffle of ") +
                  where(t.file, t.line);
    if (now != last) {
      text += (told++ > 0 ? "; " : "") + who(static_cast<unsigned>(i)) + " " + now;
      last = now;
    }
  }
  return "a divergent barrier or a stray shuffle: " + text;
}

std::vector<int> shuffled(int64_t n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

void run_block() {
  Machine& m = machine;
  const int warps = static_cast<int>(m.threads.size()) / kWarp;
  for (Thread& t : m.threads) t = Thread();
  m.used = 0;
  m.places.clear();
  for (bool all = false;;) {
    bool ran = false;
    for (const int warp : shuffled(warps)) {
      if (!all && m.random() % 2 == 0) continue;  // the others get ahead
      for (const int lane : shuffled(kWarp)) {
        const int i = warp * kWarp + lane;
        if (m.threads[i].wait != Wait::ready) continue;
        run_thread(i);
        ran = true;
        if (!m.fault.empty()) throw Fault(m.fault);
      }
      ran |= exchange(warp * kWarp);
    }
    ran |= release_barrier();
    if (std::all_of(m.threads.begin(), m.threads.end(),
                    [](const Thread& t) { return t.wait == Wait::done; }))
      return;
    if (!ran && all) throw Fault(standstill());
    all = !ran;
  }
}

}  // namespace

const Place& current() { return machine.place; }

void check_access(const void* p, int size, bool write) {
  const char* const at = static_cast<const char*>(p);
  const char* const verb = write ? "write" : "read";
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(size) != 0)
    throw Fault("a misaligned " + std::string(verb) + " of " + std::to_string(size) + " bytes");
  for (const Buffer& b : *machine.buffers)
    if (at >= b.begin && at + size <= b.end && (b.writable || !write)) {
      if (!write && &b == machine.buffers->data()) machine.read += size;
      return;
    }
  std::string text =
      std::string("a ") + verb + " of " + std::to_string(size) + " bytes out of bounds";
  for (const Buffer& b : *machine.buffers)
    text += ", " + std::to_string(at - b.begin) + " of " + std::to_string(b.end - b.begin) +
            " in " + b.name;
  throw Fault(text);
}

void barrier(const char* file, int line) { wait_for(Wait::barrier, file, line); }

uint64_t shuffle(uint64_t value, int distance, unsigned mask, const char* file, int line) {
  if (mask != 0xffffffffu) throw Fault("a shuffle of some lanes only, at " + where(file, line));
  Thread& t = machine.threads[machine.place.thread.x];
  t.value = value;
  t.distance = distance;
  wait_for(Wait::shuffle, file, line);
  return machine.threads[machine.place.thread.x].value;
}

char* shared_memory(int64_t bytes, const char* file, int line) {
  Machine& m = machine;
  const auto key = std::make_pair(std::string(file), line);
  const auto found = m.places.find(key);
  if (found != m.places.end()) return m.shared.data() + found->second;
  const int64_t at = (m.used + 15) / 16 * 16;
  if (at + bytes > kMostShared) throw Fault("more than 48 KiB of shared memory");
  m.used = at + bytes;
  m.places[key] = at;
  for (int64_t i = 0; i < bytes; ++i) m.shared[at + i] = static_cast<char>(m.random());
  return m.shared.data() + at;
}

void check_index(int64_t i, int64_t n, const char* file, int line) {
  if (i < 0 || i >= n)
    throw Fault("index " + std::to_string(i) + " of " + std::to_string(n) +
                " in the shared memory of " + where(file, line));
}

void launch(int64_t blocks, int threads, const Buffers& buffers,
            const std::function<void()>& body) {
  if (blocks < 1 || blocks > kMostBlocks)
    throw Fault("a grid of " + std::to_string(blocks) + " blocks");
  if (threads < kWarp || threads > kMostThreads || threads % kWarp != 0)
    throw Fault("a block of " + std::to_string(threads) + " threads");
  FloatingPointGuard guard;  // a GPU has the contract's environment
  Machine& m = machine;
  m.body = &body;
  m.buffers = &buffers;
  m.fault.clear();
  m.shared.resize(kMostShared);
  m.threads.clear();
  m.threads.resize(threads);
  m.place.threads.x = static_cast<unsigned>(threads);
  m.place.blocks.x = static_cast<unsigned>(blocks);
  for (const int block : shuffled(blocks)) {
    m.place.block.x = static_cast<unsigned>(block);
    run_block();
  }
}

// For tests: how many bytes of the first buffer (x, or the codes of dequantize) this thread's
// launches have read since the last call.
extern "C" __attribute__((visibility("default"))) int64_t quantkit_emu_bytes_read() {
  return std::exchange(machine.read, 0);
}

}  // namespace emu
}  // namespace quantkit
