// Philox4x32-10 for a vector of blocks, for every Highway target: the same words as philox() in
// core/philox.h.
#if defined(REPRISE_KERNELS_PHILOX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef REPRISE_KERNELS_PHILOX_INL_H_
#undef REPRISE_KERNELS_PHILOX_INL_H_
#else
#define REPRISE_KERNELS_PHILOX_INL_H_
#endif

#include <cstdint>

#include "kernels/vector_io-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {

using WordTag = hn::RebindToUnsigned<FloatTag>;
using WordVector = hn::Vec<WordTag>;

// Upper and lower half of the product of each lane with `factor`.
struct WideProduct {
  WordVector upper, lower;
};
HWY_INLINE WideProduct wide_product(WordVector x, std::uint32_t factor) {
  const WordTag tag;
#if HWY_TARGET == HWY_SCALAR
  const std::uint64_t product = std::uint64_t{hn::GetLane(x)} * factor;
  return {hn::Set(tag, static_cast<std::uint32_t>(product >> 32)),
          hn::Set(tag, static_cast<std::uint32_t>(product))};
#else
  const hn::Repartition<std::uint64_t, WordTag> wide;
  const auto f = hn::Set(tag, factor);
  const auto even = hn::MulEven(x, f);
  const auto odd = hn::MulEven(hn::BitCast(tag, hn::ShiftRight<32>(hn::BitCast(wide, x))), f);
  return {hn::OddEven(hn::BitCast(tag, odd), hn::BitCast(tag, hn::ShiftRight<32>(even))),
          hn::OddEven(hn::BitCast(tag, hn::ShiftLeft<32>(odd)), hn::BitCast(tag, even))};
#endif
}

// Block numbers, one a lane, in halves.
struct Counters {
  WordVector low, high;
};

// lanes() block numbers from `block`, `apart` from each other.
HWY_INLINE Counters counters(std::uint64_t block, std::uint64_t apart) {
  const WordTag tag;
  const auto last = static_cast<std::uint64_t>(lanes() - 1) * apart;
  const auto low = static_cast<std::uint32_t>(block);
  if (low + last <= 0xffffffffu) {  // no lane carries into the upper half
    const auto steps = hn::Mul(hn::Iota(tag, 0u), hn::Set(tag, static_cast<std::uint32_t>(apart)));
    return {hn::Add(hn::Set(tag, low), steps),
            hn::Set(tag, static_cast<std::uint32_t>(block >> 32))};
  }
  HWY_ALIGN std::uint32_t lows[HWY_MAX_BYTES / 4], highs[HWY_MAX_BYTES / 4];
  for (std::int64_t lane = 0; lane < lanes(); ++lane, block += apart) {
    lows[lane] = static_cast<std::uint32_t>(block);
    highs[lane] = static_cast<std::uint32_t>(block >> 32);
  }
  return {hn::Load(tag, lows), hn::Load(tag, highs)};
}

// The four words of each block.
struct Words {
  WordVector word0, word1, word2, word3;
};
HWY_INLINE Words philox_words(Counters block, std::uint64_t seed) {
  const WordTag tag;
  Words x{block.low, block.high, hn::Zero(tag), hn::Zero(tag)};
  auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const WideProduct a = wide_product(x.word0, 0xD2511F53u);
    const WideProduct b = wide_product(x.word2, 0xCD9E8D57u);
    x = {hn::Xor(hn::Xor(b.upper, x.word1), hn::Set(tag, key0)), b.lower,
         hn::Xor(hn::Xor(a.upper, x.word3), hn::Set(tag, key1)), a.lower};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x;
}

}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggled
