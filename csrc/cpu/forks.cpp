#include <pthread.h>

#include <atomic>

#include "dispatch.h"

#ifdef __linux__
#include <dirent.h>
#endif

namespace quantkit {
namespace {

// 0 where they cannot be counted.
int count_threads() {
  int count = 0;
#ifdef __linux__
  if (DIR* const tasks = opendir("/proc/self/task")) {
    while (const dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
    closedir(tasks);
  }
#endif
  return count;
}

// Libraries begin threads of their own when they are loaded, torch before this one.
const int at_first = count_threads();
std::atomic<bool> used{false};
bool several = false, forked = false;

[[maybe_unused]] const int registered = pthread_atfork(
    [] { several = used || count_threads() > at_first; }, nullptr, [] { forked |= several; });

}  // namespace

bool forked_from_threads() { return forked; }
void use_threads() { used = true; }

}  // namespace quantkit
