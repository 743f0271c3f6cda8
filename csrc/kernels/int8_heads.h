// Heads as int8: amax = max|x| of a head, scale = amax / 127, code = clamp(rne(x * (127 / amax)),
// -127, 127), and where codes of keys and values lie.
#pragma once
#include "quantize_rows.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Scale and sum of the codes of a head.
struct RoundedHead {
  float scale;
  int32_t sum;
};

/// Codes of d elements into [padded_head(d)].
inline RoundedHead round_head(const void* x, DType type, int64_t d, int8_t* codes) {
  const SourceRows src = {x, type, d, nullptr};
  const int64_t width = padded_head(d);
  RoundedHead head = {0.0f, 0};
  with_row(src, 0, d, width, [&](const auto& row) {
    const int32_t amax_bits = largest_bits(row, 0, width);
    if (amax_bits < kTinyBits || amax_bits >= kInfinityBits) {
      memset(codes, 0, static_cast<size_t>(width));
      if (amax_bits >= kInfinityBits) head.scale = kNan;
      return;
    }
    float amax;
    memcpy(&amax, &amax_bits, sizeof(amax));
    head = {amax / 127.0f, round_columns(row, 0, width, splat(127.0f / amax), codes)};
  });
  return head;
}

/// One head of d elements into slot `slot` of the keys or values at `codes`; returns its scale.
inline float store_int8_head(const void* x, DType type, int64_t d, int64_t slot, bool values,
                             uint8_t* codes) {
  constexpr uint32_t kFlip = 0x80808080u;
  alignas(64) int8_t rounded[kMostKeyElements];
  const float scale = round_head(x, type, d, rounded).scale;
  const int64_t width = padded_head(d);
  for (int64_t e = 0; e < width; e += 4) {
    uint32_t four;
    memcpy(&four, rounded + e, sizeof(four));
    four ^= kFlip;
    if (values) {
      uint8_t* to = codes + (slot / 4 * width + e) * 4 + slot % 4;
      for (int i = 0; i < 4; ++i) to[4 * i] = static_cast<uint8_t>(four >> (8 * i));
    } else {
      memcpy(codes + (slot / kKeyBlock * width + e) * kKeyBlock + slot % kKeyBlock * 4, &four,
             sizeof(four));
    }
  }
  return scale;
}

inline void store_int8(const StoreArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % args.heads, row = i / args.heads;
    const int64_t b = row / args.length, l = row % args.length, slot = args.first_slot + l;
    const int64_t from = b * args.batch_stride + l * args.length_stride + head * args.head_stride;
    const Int8View& out = args.out;
    uint8_t* codes = out.codes + b * out.batch_stride + head * out.head_stride;
    out.scale[b * out.scale_batch_stride + head * out.scale_head_stride + slot] =
        store_int8_head(static_cast<const uint8_t*>(args.x) + from * size_of(args.type), args.type,
                        args.d, slot, args.values, codes);
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
