// Text: a string argument of an op.
#pragma once
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace slmops {

/// torch's handle of a string, which the op owns. An op with a std::string argument would lose 48
/// bytes at each call: torch's conversion (2.10 to 2.13) copies from a string that it never frees.
class Text {
 public:
  /// The characters; gives torch's string back, so it is called once, first thing in the op.
  std::string take() const {
    size_t length;
    const char* data;
    check(torch_string_length(handle_, &length));
    check(torch_string_c_str(handle_, &data));
    std::string text(data, length);
    check(torch_delete_string(handle_));
    return text;
  }

 private:
  static void check(AOTITorchError error) {
    if (error != 0) throw std::runtime_error("torch cannot read a string argument of an op");
  }
  StringHandle handle_;
};

// What torch's conversion of arguments asks of a type that it does not know.
static_assert(std::is_trivially_copyable_v<Text> && sizeof(Text) == sizeof(StableIValue));

}  // namespace slmops
