// Text from a language model whose tokens are bytes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/philox.h"
#include "nn/models/language_model.h"

namespace reprise::train {

// Continues `prompt` by `count` bytes, drawn with the temperature from the model's distribution
// over at most `window` last bytes. Bytes that are not UTF-8 or not printable come out as '?'.
std::string sample_text(nn::LanguageModel& model, std::string_view prompt, std::int64_t count,
                        std::int64_t window, double temperature, Generator& generator);

}  // namespace reprise::train
