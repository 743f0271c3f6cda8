// Uninitialized memory of one op call, cut into 64-byte-aligned pieces.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

namespace slmops {

/// `bytes` rounded up so that what follows begins on a cache line of its own.
constexpr int64_t aligned_bytes(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/// One allocation, freed at the end of its life.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(static_cast<uint8_t*>(
            ::operator new(static_cast<size_t>(bytes), std::align_val_t{64}))),
        next_(data_) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  /// The next `count` elements; the caller has summed aligned_bytes of all pieces beforehand.
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += aligned_bytes(count * static_cast<int64_t>(sizeof(T)));
    return piece;
  }

 private:
  uint8_t* data_;
  uint8_t* next_;
};

}  // namespace slmops
