#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/attention_tasks.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention_cpu.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/philox-inl.h"
#include "kernels/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace reprise::kernels::cpu::HWY_NAMESPACE {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls f(column, count) for the vectors of [0, width): count lanes of each lie inside.
template <class F>
HWY_INLINE void for_vectors(std::int64_t width, F&& f) {
  const std::int64_t step = lanes();
  for (std::int64_t c = 0; c < width; c += step) {
    f(c, std::min(step, width - c));
  }
}

HWY_INLINE FloatVector get(const float* from, std::int64_t count) {
  return count == lanes() ? load(from) : load_first(from, count);
}
template <class T>
HWY_INLINE void put(FloatVector value, T* to, std::int64_t count) {
  count == lanes() ? store(value, to) : store_first(value, to, count);
}

// Lanes of the vector at `column` that lie in [begin, end).
HWY_INLINE hn::Mask<FloatTag> within(std::int64_t column, std::int64_t begin, std::int64_t end) {
  const FloatTag tag;
  const auto at = hn::Iota(tag, static_cast<float>(column));
  return hn::And(hn::Ge(at, hn::Set(tag, static_cast<float>(begin))),
                 hn::Lt(at, hn::Set(tag, static_cast<float>(end))));
}

HWY_INLINE float largest(FloatVector x) {
  return hn::GetLane(hn::MaxOfLanes(FloatTag(), x));
}
HWY_INLINE float total(FloatVector x) {
  return hn::GetLane(hn::SumOfLanes(FloatTag(), x));
}

struct Times {
  FloatVector factor;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x) const { return hn::Mul(x, factor); }
};

// Masked scores, in place; returns their maximum, NaN if one of them is: Max may pass over it.
HWY_ATTR float mask_row(float* scores, std::int64_t width, std::int64_t begin, std::int64_t end,
                        const float* bias, float scale) {
  const FloatTag tag;
  const auto none = hn::Set(tag, -kInfinity);
  const auto factor = hn::Set(tag, scale);
  auto highest = none, sick = hn::Zero(tag);
  for_vectors(width, [&](std::int64_t c, std::int64_t count) HWY_ATTR {
    auto s = none;
    if (c < end && c + count > begin) {
      s = hn::Mul(get(scores + c, count), factor);
      if (bias != nullptr) {
        s = hn::Add(s, get(bias + c, count));
      }
      if (c < begin || c + lanes() > end) {
        s = hn::IfThenElse(within(c, begin, end), s, none);
      }
      highest = hn::Max(highest, s);
      sick = hn::IfThenElse(hn::IsNaN(s), s, sick);
    }
    put(s, scores + c, count);
  });
  const float any = total(sick);
  return std::isnan(any) ? any : largest(highest);
}

// Masked scores to exp(s - highest), which are summed; stored with dropout. Hidden lanes never
// reach the exponential: results that underflow are slow.
template <class T>
HWY_ATTR float exp_row(const float* scores, T* probabilities, std::int64_t width,
                       std::int64_t begin, std::int64_t end, float highest, const float* keep) {
  const FloatTag tag;
  const auto shift = hn::Set(tag, highest);
  auto sum = hn::Zero(tag);
  const auto none = hn::Set(tag, -kInfinity);
  for_vectors(width, [&](std::int64_t c, std::int64_t count) HWY_ATTR {
    auto p = hn::Zero(tag);
    if (c < end && c + count > begin) {
      const auto s = get(scores + c, count);
      auto hidden = hn::Eq(s, none);
      if (count != lanes()) {
        hidden = hn::Or(hidden, hn::Not(within(0, 0, count)));
      }
      p = hn::IfThenZeroElse(hidden, probability(hn::Sub(hn::IfThenElse(hidden, shift, s), shift)));
      sum = hn::Add(sum, p);
      if (keep != nullptr) {
        p = hn::Mul(p, get(keep + c, count));
      }
    }
    put(p, probabilities + c, count);
  });
  return total(sum);
}

template <class T>
T as(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(x);
  } else {
    return x;
  }
}

template <class T>
HWY_ATTR void softmax_rows(const SoftmaxTile& t) {
  T* const out = static_cast<T*>(t.probabilities);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    float* const scores = t.scores + row * t.width;
    const float before = t.first ? -kInfinity : t.row_max[row];
    const float here = mask_row(scores, t.width, t.begin[row], t.end[row], t.bias, t.scale);
    const float highest = std::isnan(here) ? here : std::max(before, here);
    if (highest == -kInfinity || std::isnan(highest)) {  // nothing seen so far, or all is lost
      const float all = std::isnan(highest) ? highest : 0.0f;
      std::fill_n(out + row * t.width, t.width, as<T>(all));
      t.row_max[row] = highest;
      t.row_sum[row] = all;
      continue;
    }
    const float rescale = before == -kInfinity ? 0.0f : std::exp(before - highest);
    const float sum = exp_row(scores, out + row * t.width, t.width, t.begin[row], t.end[row],
                              highest, t.keep == nullptr ? nullptr : t.keep + row * t.width);
    t.row_sum[row] = (t.first ? 0.0f : t.row_sum[row] * rescale) + sum;
    t.row_max[row] = highest;
    if (!t.first && rescale != 1.0f) {
      float* const sums = t.sums + row * t.D;
      map(Times{hn::Set(FloatTag(), rescale)}, sums, sums, t.D);
    }
  }
}

void softmax_run(const SoftmaxTile& t) {
  t.dtype == DType::bf16 ? softmax_rows<bfloat16>(t) : softmax_rows<float>(t);
}

void finish_run(const OutputRows& r) {
  for (std::int64_t row = 0; row < r.rows; ++row) {
    const bool nothing = r.row_sum[row] == 0.0f;
    r.log_sum_exp[row] = nothing ? -kInfinity : r.row_max[row] + std::log(r.row_sum[row]);
    const Times divide{hn::Set(FloatTag(), nothing ? 0.0f : 1.0f / r.row_sum[row])};
    const float* const from = r.sums + row * r.D;
    char* const to = r.out + row * r.out_stride;
    if (r.dtype == DType::bf16) {
      map(divide, from, reinterpret_cast<bfloat16*>(to), r.D);
    } else {
      map(divide, from, reinterpret_cast<float*>(to), r.D);
    }
  }
}

template <class T>
HWY_ATTR void gradient_row(const GradientTile& t, std::int64_t row) {
  const FloatTag tag;
  const std::int64_t start = row * t.width;
  T* const probabilities = static_cast<T*>(t.probabilities) + start;
  T* const gradients = static_cast<T*>(t.gradients) + start;
  const std::int64_t begin = t.begin[row], end = t.end[row];
  const auto scale = hn::Set(tag, t.scale);
  for_vectors(t.width, [&](std::int64_t c, std::int64_t count) HWY_ATTR {
    auto p = hn::Zero(tag), e = hn::Zero(tag);
    auto kept = p;
    if (c < end && c + count > begin) {
      const auto s = hn::Mul(get(t.scores + start + c, count), scale);
      p = probability(hn::Sub(s, get(t.log_sum_exp + c, count)));
      auto dp = get(t.products + start + c, count);
      kept = p;
      if (t.keep != nullptr) {
        const auto keep = get(t.keep + start + c, count);
        kept = hn::Mul(p, keep);
        dp = hn::Mul(dp, keep);
      }
      e = hn::Mul(hn::Mul(p, hn::Sub(dp, get(t.delta + c, count))), scale);
      if (c < begin || c + lanes() > end) {
        const auto inside = within(c, begin, end);
        kept = hn::IfThenElseZero(inside, kept);
        e = hn::IfThenElseZero(inside, e);
      }
    }
    put(kept, probabilities + c, count);
    put(e, gradients + c, count);
  });
}

void gradient_run(const GradientTile& t) {
  for (std::int64_t row = 0; row < t.rows; ++row) {
    t.dtype == DType::bf16 ? gradient_row<bfloat16>(t, row) : gradient_row<float>(t, row);
  }
}

template <class T>
HWY_ATTR float dot(const char* a, const char* b, std::int64_t D) {
  auto sum = hn::Zero(FloatTag());
  for_vectors(D, [&](std::int64_t c, std::int64_t count) HWY_ATTR {
    const T *x = reinterpret_cast<const T*>(a) + c, *y = reinterpret_cast<const T*>(b) + c;
    sum = count == lanes() ? hn::MulAdd(load(x), load(y), sum)
                           : hn::MulAdd(load_first(x, count), load_first(y, count), sum);
  });
  return total(sum);
}

void dots_run(DType dtype, const char* a, std::int64_t a_stride, const char* b,
              std::int64_t b_stride, std::int64_t rows, std::int64_t D, float* delta) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const char *x = a + row * a_stride, *y = b + row * b_stride;
    delta[row] = dtype == DType::bf16 ? dot<bfloat16>(x, y, D) : dot<float>(x, y, D);
  }
}

struct PlusTimes {
  FloatVector factor;
  HWY_ATTR HWY_INLINE FloatVector operator()(FloatVector x, FloatVector y) const {
    return hn::MulAdd(x, factor, y);
  }
};

template <class T>
HWY_ATTR void store_row(const float* from, std::int64_t D, float factor, T* to, bool accumulate) {
  const auto times = hn::Set(FloatTag(), factor);
  if (accumulate) {
    map(PlusTimes{times}, from, to, to, D);
  } else {
    map(Times{times}, from, to, D);
  }
}

void store_rows_run(const float* sums, std::int64_t rows, std::int64_t D, float factor, DType dtype,
                    char* to, std::int64_t to_stride, bool accumulate) {
  for (std::int64_t row = 0; row < rows; ++row) {
    char* const at = to + row * to_stride;
    if (dtype == DType::bf16) {
      store_row(sums + row * D, D, factor, reinterpret_cast<bfloat16*>(at), accumulate);
    } else {
      store_row(sums + row * D, D, factor, reinterpret_cast<float*>(at), accumulate);
    }
  }
}

// Dropout factors for the four words of lanes() blocks.
struct Factors {
  FloatVector word0, word1, word2, word3;
};

HWY_INLINE Factors keep_factors(Counters at, std::uint64_t seed, float dropout, float factor) {
  const FloatTag tag;
  const hn::RebindToSigned<FloatTag> integer;
  const auto kept = [&](WordVector word) HWY_ATTR {
    const auto upper = hn::ConvertTo(tag, hn::BitCast(integer, hn::ShiftRight<8>(word)));
    const auto uniform = hn::Mul(upper, hn::Set(tag, 0x1p-24f));
    return hn::IfThenElseZero(hn::Ge(uniform, hn::Set(tag, dropout)), hn::Set(tag, factor));
  };
  const Words words = philox_words(at, seed);
  return {kept(words.word0), kept(words.word1), kept(words.word2), kept(words.word3)};
}

// Four keys of lanes() queries at a time.
HWY_ATTR void keep_by_key(const KeepTile& t, std::uint64_t first_block, float dropout,
                          float factor) {
  const auto apart = static_cast<std::uint64_t>(t.blocks_a_row);
  for (std::int64_t key = 0; key < t.keys; key += 4) {
    for (std::int64_t query = 0; query < t.queries; query += lanes()) {
      const std::uint64_t block = first_block + static_cast<std::uint64_t>(key / 4) +
                                  apart * static_cast<std::uint64_t>(query);
      const Factors f = keep_factors(counters(block, apart), t.seed, dropout, factor);
      const std::int64_t count = std::min(lanes(), t.queries - query), rows = t.keys - key;
      float* const to = t.keep + key * t.queries + query;
      put(f.word0, to, count);
      if (rows > 1) {
        put(f.word1, to + t.queries, count);
      }
      if (rows > 2) {
        put(f.word2, to + 2 * t.queries, count);
      }
      if (rows > 3) {
        put(f.word3, to + 3 * t.queries, count);
      }
    }
  }
}

// 4 lanes() keys of one query at a time.
HWY_ATTR void keep_by_query(const KeepTile& t, std::uint64_t first_block, float dropout,
                            float factor) {
  const std::int64_t step = 4 * lanes();
  HWY_ALIGN float rest[4 * HWY_MAX_BYTES / sizeof(float)];
  for (std::int64_t query = 0; query < t.queries; ++query) {
    const std::uint64_t block = first_block + static_cast<std::uint64_t>(t.blocks_a_row * query);
    for (std::int64_t key = 0; key < t.keys; key += step) {
      const Factors f = keep_factors(counters(block + static_cast<std::uint64_t>(key / 4), 1),
                                     t.seed, dropout, factor);
      float* const to = t.keep + query * t.keys + key;
      const std::int64_t count = std::min(step, t.keys - key);
      hn::StoreInterleaved4(f.word0, f.word1, f.word2, f.word3, FloatTag(),
                            count == step ? to : rest);
      if (count != step) {
        std::copy_n(rest, count, to);
      }
    }
  }
}

void keep_run(const KeepTile& t) {
  const auto block = t.block + static_cast<std::uint64_t>(t.first_key / 4);
  const auto dropout = static_cast<float>(t.dropout);
  const auto factor = static_cast<float>(1.0 / (1.0 - t.dropout));
  t.keys_as_rows ? keep_by_key(t, block, dropout, factor)
                 : keep_by_query(t, block, dropout, factor);
}

}  // namespace
}  // namespace reprise::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reprise::kernels::cpu {
namespace {
HWY_EXPORT(softmax_run);
HWY_EXPORT(finish_run);
HWY_EXPORT(gradient_run);
HWY_EXPORT(dots_run);
HWY_EXPORT(store_rows_run);
HWY_EXPORT(keep_run);
}  // namespace

void softmax_tile(const SoftmaxTile& tile) {
  HWY_DYNAMIC_DISPATCH(softmax_run)(tile);
}
void finish_rows(const OutputRows& rows) {
  HWY_DYNAMIC_DISPATCH(finish_run)(rows);
}
void gradient_tile(const GradientTile& tile) {
  HWY_DYNAMIC_DISPATCH(gradient_run)(tile);
}
void keep_tile(const KeepTile& tile) {
  HWY_DYNAMIC_DISPATCH(keep_run)(tile);
}

void row_dots(DType dtype, const char* a, std::int64_t a_stride, const char* b,
              std::int64_t b_stride, std::int64_t rows, std::int64_t D, float* delta) {
  HWY_DYNAMIC_DISPATCH(dots_run)(dtype, a, a_stride, b, b_stride, rows, D, delta);
}

void store_rows(const float* sums, std::int64_t rows, std::int64_t D, float factor, DType dtype,
                char* to, std::int64_t to_stride, bool accumulate) {
  HWY_DYNAMIC_DISPATCH(store_rows_run)
  (sums, rows, D, factor, dtype, to, to_stride, accumulate);
}

}  // namespace reprise::kernels::cpu
#endif  // HWY_ONCE
