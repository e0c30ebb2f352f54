#include <pthread.h>

#include "dispatch.h"

#ifdef __linux__
#include <dirent.h>
#endif

namespace quantkit {
namespace {

bool several = false, forked = false;

// Where they cannot be counted there may be several.
bool has_several_threads() {
#ifdef __linux__
  if (DIR* const tasks = opendir("/proc/self/task")) {
    int count = 0;
    while (const dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
    closedir(tasks);
    return count > 1;
  }
#endif
  return true;
}

[[maybe_unused]] const int registered = pthread_atfork([] { several = has_several_threads(); }, nullptr,
                                                       [] { forked |= several; });

}  // namespace

bool forked_from_threads() { return forked; }

}  // namespace quantkit
