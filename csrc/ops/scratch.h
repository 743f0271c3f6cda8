// Uninitialized memory of one op call, in 64-byte-aligned pieces.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace slmops {

/// `bytes` rounded up so that what follows begins on a cache line of its own.
constexpr int64_t aligned_bytes(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/// As many bytes for each worker of a team.
struct WorkerScratch {
  uint8_t* data;
  int64_t bytes;

  uint8_t* of(int64_t worker) const { return data + worker * bytes; }
};

/// Owns pieces of memory for its lifetime.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() {
    for (void* piece : pieces_) ::operator delete(piece, kAlignment);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  /// `count` elements.
  template <class T>
  T* take(int64_t count) {
    pieces_.reserve(pieces_.size() + 1);
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    pieces_.push_back(::operator new(bytes, kAlignment));
    return static_cast<T*>(pieces_.back());
  }

  WorkerScratch take_each(int64_t workers, int64_t bytes) {
    const int64_t each = aligned_bytes(bytes);
    return {take<uint8_t>(workers * each), each};
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  std::vector<void*> pieces_;
};

}  // namespace slmops
