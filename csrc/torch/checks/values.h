// What the checks share: the words of their errors, the dtype and the device of a tensor.
#pragma once

#include <iterator>

#include "../checks.h"

namespace quantkit {

[[noreturn]] void raise(const std::string& text);

std::string text(int64_t v);
std::string text(double v);  // as Python prints a float
std::string list_text(const std::vector<int64_t>& v);
// A name that nothing has, as Python shows it: at most 40 characters of its UTF-8. An error ends at
// a NUL, so control characters are escaped.
std::string quoted(const std::string& name);
// "a, b or c"
template <class List, class Name>
std::string choice_text(const List& list, Name name) {
  std::string names;
  for (size_t i = 0; i < std::size(list); ++i)
    names += (i == 0 ? "" : i + 1 < std::size(list) ? ", " : " or ") + std::string(name(list[i]));
  return names;
}

void check_kind(const TensorInfo& t, bool floating);
void check_dtype(const TensorInfo& t, Type type);
void check_same_device(const TensorInfo& t, const TensorInfo& x);
// Of a parameter, which without dimensions may be on the CPU as well.
void check_device(const TensorInfo& p, const TensorInfo& x);

}  // namespace quantkit
