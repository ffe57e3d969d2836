#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/dropout_cpu.cc"
#include "hwy/foreach_target.h"
#include "kernels/dropout_sides.h"
#include "kernels/pieces.h"
#include "kernels/staging-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

using WordTag = hn::ScalableTag<std::uint32_t>;
using WordVector = hn::Vec<WordTag>;

// Upper and lower half of the product of each lane with `factor`.
struct WideProduct {
  WordVector upper, lower;
};
HWY_INLINE WideProduct wide_product(WordVector x, std::uint32_t factor) {
#if HWY_TARGET == HWY_SCALAR
  const std::uint64_t product = std::uint64_t{hn::GetLane(x)} * factor;
  return {hn::Set(WordTag(), static_cast<std::uint32_t>(product >> 32)),
          hn::Set(WordTag(), static_cast<std::uint32_t>(product))};
#else
  const hn::Repartition<std::uint64_t, WordTag> wide;
  const auto f = hn::Set(WordTag(), factor);
  const auto even = hn::MulEven(x, f);
  const auto odd = hn::MulEven(hn::BitCast(WordTag(), hn::ShiftRight<32>(hn::BitCast(wide, x))), f);
  const auto upper_even = hn::BitCast(WordTag(), hn::ShiftRight<32>(even));
  return {hn::OddEven(hn::BitCast(WordTag(), odd), upper_even), hn::Mul(x, f)};
#endif
}

// The words of blocks first .. first + blocks of philox(seed, ..), to `words`, which has room for a
// vector more. As philox() in core/philox.h.
void fill_words(std::uint64_t seed, std::uint64_t first, std::int64_t blocks,
                std::uint32_t* words) {
  const WordTag tag;
  const auto step = static_cast<std::int64_t>(hn::Lanes(tag));
  HWY_ALIGN std::uint32_t low[HWY_MAX_BYTES / 4];
  HWY_ALIGN std::uint32_t high[HWY_MAX_BYTES / 4];
  for (std::int64_t block = 0; block < blocks; block += step) {
    for (std::int64_t lane = 0; lane < step; ++lane) {
      const std::uint64_t at = first + static_cast<std::uint64_t>(block + lane);
      low[lane] = static_cast<std::uint32_t>(at);
      high[lane] = static_cast<std::uint32_t>(at >> 32);
    }
    auto c0 = hn::Load(tag, low), c1 = hn::Load(tag, high), c2 = hn::Zero(tag), c3 = c2;
    auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const WideProduct a = wide_product(c0, 0xD2511F53u), b = wide_product(c2, 0xCD9E8D57u);
      c0 = hn::Xor(hn::Xor(b.upper, c1), hn::Set(tag, key0));
      c1 = b.lower;
      c2 = hn::Xor(hn::Xor(a.upper, c3), hn::Set(tag, key1));
      c3 = a.lower;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    hn::StoreInterleaved4(c0, c1, c2, c3, tag, words + 4 * block);
  }
}

// out = scale x where the word is not below the threshold, else 0; `words` of whole vectors.
HWY_INLINE void mask_block(const float* x, const std::uint32_t* words, const DropoutMask& mask,
                           float* out, std::int64_t count) {
  const WordTag tag;
  const hn::RebindToSigned<WordTag> integer;
  const auto limit = hn::Set(integer, static_cast<std::int32_t>(mask.threshold));
  const auto scale = hn::Set(FloatTag(), mask.scale);
  const std::int64_t step = lanes();
  for (std::int64_t i = 0; i < count; i += step) {
    const auto drawn = hn::BitCast(integer, hn::ShiftRight<8>(hn::LoadU(tag, words + i)));
    const auto drop = hn::RebindMask(FloatTag(), hn::Lt(drawn, limit));
    const std::int64_t left = count - i;
    if (left >= step) {
      store(hn::IfThenZeroElse(drop, hn::Mul(load(x + i), scale)), out + i);
    } else {
      const auto last = load_first(x + i, left);
      store_first(hn::IfThenZeroElse(drop, hn::Mul(last, scale)), out + i, left);
    }
  }
}

// For elements index .. index + count of the whole tensor.
void dropout_run(const Matrix& x, const DropoutMask& mask, const Matrix& y, bool accumulate,
                 std::int64_t index, std::int64_t count) {
  HWY_ALIGN float x_block[kBlock];
  HWY_ALIGN float y_block[kBlock];
  HWY_ALIGN std::uint32_t words[kBlock + 4 + 2 * HWY_MAX_BYTES];
  for (std::int64_t i = 0; i < count; i += kBlock) {
    const std::int64_t size = std::min(kBlock, count - i);
    const std::int64_t first = (index + i) / 4, skip = (index + i) % 4;
    fill_words(mask.seed, mask.offset + static_cast<std::uint64_t>(first), (skip + size + 3) / 4,
               words);
    void* to = advanced(y.at, y.dtype, i);
    const float* from = staged(advanced(x.at, x.dtype, i), x.dtype, size, x_block);
    float* out = stage_for(to, y.dtype, accumulate, y_block);
    mask_block(from, words + skip, mask, out, size);
    write_block(out, to, y.dtype, accumulate, size);
  }
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {

HWY_EXPORT(dropout_run);

}  // namespace

void dropout(const Matrix& x, const DropoutMask& mask, const Matrix& y, bool accumulate,
             MatrixSize size) {
  for_pieces(size.rows, size.width, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(dropout_run)
    (x.run(row, begin), mask, y.run(row, begin), accumulate, row * size.width + begin, end - begin);
  });
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE
