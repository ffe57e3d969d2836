#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rope_cpu.cc"
#include "hwy/foreach_target.h"
#include "kernels/pieces.h"
#include "kernels/rope_sides.h"
#include "kernels/staging-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kPairs = 128;                           // of a block
constexpr std::int64_t kRoom = HWY_MAX_BYTES / sizeof(float);  // whole vectors may run over

// Angles are reduced in double, half a vector of f32 at a time.
using WideTag = hn::ScalableTag<double>;
using NarrowTag = hn::Rebind<float, WideTag>;
using IntegerTag = hn::Rebind<std::int32_t, WideTag>;
using Narrow = hn::Vec<NarrowTag>;

HWY_INLINE Narrow narrow(float value) {
  return hn::Set(NarrowTag(), value);
}

// Series on [-pi / 4, pi / 4]; what is left out is below 2e-9.
HWY_INLINE Narrow sine(Narrow r) {
  const auto z = hn::Mul(r, r);
  auto p = hn::MulAdd(z, narrow(1.0f / 362880), narrow(-1.0f / 5040));
  p = hn::MulAdd(z, p, narrow(1.0f / 120));
  p = hn::MulAdd(z, p, narrow(-1.0f / 6));
  return hn::MulAdd(hn::Mul(r, z), p, r);
}
HWY_INLINE Narrow cosine(Narrow r) {
  const auto z = hn::Mul(r, r);
  auto p = hn::MulAdd(z, narrow(-1.0f / 3628800), narrow(1.0f / 40320));
  p = hn::MulAdd(z, p, narrow(-1.0f / 720));
  p = hn::MulAdd(z, p, narrow(1.0f / 24));
  p = hn::MulAdd(z, p, narrow(-0.5f));
  return hn::MulAdd(z, p, narrow(1.0f));
}

// Negated where bit 1 of n is set.
HWY_INLINE Narrow signed_by(hn::Vec<IntegerTag> n, Narrow x) {
  const auto sign = hn::ShiftLeft<30>(hn::And(n, hn::Set(IntegerTag(), 2)));
  return hn::BitCast(NarrowTag(), hn::Xor(hn::BitCast(IntegerTag(), x), sign));
}

// cos and sin of position * inv_freq[i], times their factors, for `count` pairs; the three arrays
// have room for whole vectors.
void turn(float position, const float* inv_freq, std::int64_t count, const RopeCall& call,
          float* cos, float* sin) {
  const WideTag wide;
  const NarrowTag tag;
  const auto step = static_cast<std::int64_t>(hn::Lanes(wide));
  for (std::int64_t i = 0; i < count; i += step) {
    const auto angle = hn::PromoteTo(wide, hn::Mul(narrow(position), hn::LoadU(tag, inv_freq + i)));
    const auto turns = hn::Round(hn::Mul(angle, hn::Set(wide, 0.63661977236758134)));
    // pi / 2 in two parts; the first has 33 bits, so that its multiples are exact.
    const auto near = hn::NegMulAdd(turns, hn::Set(wide, 1.57079632673412561417e+00), angle);
    const auto left = hn::NegMulAdd(turns, hn::Set(wide, 6.07710050650619224932e-11), near);
    const auto n = hn::DemoteTo(IntegerTag(), turns);
    const auto r = hn::DemoteTo(tag, left);
    const auto s = sine(r), c = cosine(r);
    const auto odd =
        hn::RebindMask(tag, hn::Ne(hn::And(n, hn::Set(IntegerTag(), 1)), hn::Zero(IntegerTag())));
    const auto sine_of = signed_by(n, hn::IfThenElse(odd, c, s));
    const auto cosine_of =
        signed_by(hn::Add(n, hn::Set(IntegerTag(), 1)), hn::IfThenElse(odd, s, c));
    hn::StoreU(hn::Mul(sine_of, narrow(call.sin_factor)), tag, sin + i);
    hn::StoreU(hn::Mul(cosine_of, narrow(call.cos_factor)), tag, cos + i);
  }
}

void round_to_bf16(float* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += lanes()) {
    store(rounded_to<bfloat16>(load(values + i)), values + i);
  }
}

// `count` elements from `from` on to `block`.
HWY_INLINE void fetch(const Heads& x, std::int64_t from, std::int64_t count, float* block) {
  const void* at = advanced(x.at, x.dtype, from);
  if (x.dtype == DType::f32) {
    map(Identity(), static_cast<const float*>(at), block, count);
  } else {
    map(Identity(), static_cast<const bfloat16*>(at), block, count);
  }
}

struct Blocks {
  HWY_ALIGN float cos[kPairs + kRoom] = {};
  HWY_ALIGN float sin[kPairs + kRoom] = {};
  HWY_ALIGN float inv_freq[kPairs + kRoom] = {};
  HWY_ALIGN float in[2 * (kPairs + kRoom)] = {};
  HWY_ALIGN float out[2 * (kPairs + kRoom)] = {};
};

// cos and sin of pairs [first, first + count) of token t of text b.
void turn_block(const RopeCall& call, std::int64_t b, std::int64_t t, std::int64_t first,
                std::int64_t count, Blocks& blocks) {
  map(Identity(), call.inv_freq + first, blocks.inv_freq, count);
  std::int64_t begin = first;
  // In order: the last vector of a section runs over into the next.
  for (int r = 0; r < call.sections.count; ++r) {
    const std::int64_t end = std::min(first + count, call.sections.ends[r]);
    if (begin < end) {
      const std::int64_t at = r * call.sections.stride + b * call.positions_batch_stride + t;
      turn(static_cast<float>(call.positions[at]), blocks.inv_freq + begin - first, end - begin,
           call, blocks.cos + begin - first, blocks.sin + begin - first);
      begin = end;
    }
  }
  if (call.round_to_bf16) {
    round_to_bf16(blocks.cos, count);
    round_to_bf16(blocks.sin, count);
  }
}

HWY_INLINE void rotate(FloatVector& a, FloatVector& b, const Blocks& blocks, std::int64_t i) {
  const auto c = load(blocks.cos + i), s = load(blocks.sin + i);
  const auto turned = hn::NegMulAdd(b, s, hn::Mul(a, c));
  b = hn::MulAdd(a, s, hn::Mul(b, c));
  a = turned;
}

// Pairs [first, first + count) of the head at `x` and `y` (elements from the start).
void rotate_half(const RopeCall& call, Blocks& blocks, std::int64_t x, std::int64_t y,
                 std::int64_t first, std::int64_t count) {
  constexpr std::int64_t kSecond = kPairs + kRoom;
  fetch(call.x, x + first, count, blocks.in);
  fetch(call.x, x + call.pairs + first, count, blocks.in + kSecond);
  for (std::int64_t i = 0; i < count; i += lanes()) {
    auto a = load(blocks.in + i), b = load(blocks.in + kSecond + i);
    rotate(a, b, blocks, i);
    store(a, blocks.out + i);
    store(b, blocks.out + kSecond + i);
  }
  const auto put = [&](std::int64_t at, const float* block) HWY_ATTR {
    write_block(block, advanced(call.y.at, call.y.dtype, at), call.y.dtype, call.accumulate, count);
  };
  put(y + first, blocks.out);
  put(y + call.pairs + first, blocks.out + kSecond);
}

void rotate_interleaved(const RopeCall& call, Blocks& blocks, std::int64_t x, std::int64_t y,
                        std::int64_t first, std::int64_t count) {
  fetch(call.x, x + 2 * first, 2 * count, blocks.in);
  for (std::int64_t i = 0; i < count; i += lanes()) {
    FloatVector a, b;
    hn::LoadInterleaved2(FloatTag(), blocks.in + 2 * i, a, b);
    rotate(a, b, blocks, i);
    hn::StoreInterleaved2(a, b, FloatTag(), blocks.out + 2 * i);
  }
  write_block(blocks.out, advanced(call.y.at, call.y.dtype, y + 2 * first), call.y.dtype,
              call.accumulate, 2 * count);
}

void copy_rest(const RopeCall& call, Blocks& blocks, std::int64_t x, std::int64_t y) {
  for (std::int64_t at = 2 * call.pairs; at < call.size; at += kPairs) {
    const std::int64_t count = std::min(kPairs, call.size - at);
    fetch(call.x, x + at, count, blocks.in);
    write_block(blocks.in, advanced(call.y.at, call.y.dtype, y + at), call.y.dtype, call.accumulate,
                count);
  }
}

// The heads of tokens [begin, end) of the B * T.
void rope_run(const RopeCall& call, std::int64_t begin, std::int64_t end) {
  Blocks blocks;
  for (std::int64_t token = begin; token < end; ++token) {
    const std::int64_t b = token / call.tokens, t = token % call.tokens;
    const std::int64_t x = b * call.x.batch_stride + t * call.x.token_stride;
    const std::int64_t y = b * call.y.batch_stride + t * call.y.token_stride;
    for (std::int64_t first = 0; first < call.pairs; first += kPairs) {
      const std::int64_t count = std::min(kPairs, call.pairs - first);
      turn_block(call, b, t, first, count, blocks);
      for (std::int64_t head = 0; head < call.heads; ++head) {
        const std::int64_t from = x + head * call.x.head_stride, to = y + head * call.y.head_stride;
        if (call.interleaved) {
          rotate_interleaved(call, blocks, from, to, first, count);
        } else {
          rotate_half(call, blocks, from, to, first, count);
        }
      }
    }
    for (std::int64_t head = 0; head < call.heads; ++head) {
      copy_rest(call, blocks, x + head * call.x.head_stride, y + head * call.y.head_stride);
    }
  }
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(rope_run);

}  // namespace

void rope(const RopeCall& call) {
  const std::int64_t grain =
      std::max<std::int64_t>(1, kPieceElements / std::max<std::int64_t>(1, call.heads * call.size));
  parallel_for(call.batch * call.tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(rope_run)(call, begin, end);
  });
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE
