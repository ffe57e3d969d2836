// Text from a language model whose tokens are bytes.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "core/philox.h"
#include "nn/models/language_model.h"

namespace reprise::train {

// Continues `prompt` by `count` bytes, drawn with the temperature from the model's distribution
// over at most `window` last bytes. Bytes that are not UTF-8 or not printable come out as '?'.
// `after_forward`, if any, is called after each forward.
std::string sample_text(nn::LanguageModel& model, std::string_view prompt, std::int64_t count,
                        std::int64_t window, double temperature, Generator& generator,
                        const std::function<void()>& after_forward = {});

}  // namespace reprise::train
