// What the decoders share around attention: masks and packed texts of a batch, dropout that is off
// in evaluation, values of new parameters.
#pragma once

#include <cstdint>
#include <string_view>

#include "autograd/variable.h"
#include "core/philox.h"
#include "nn/models/model.h"
#include "nn/weights/json.h"

namespace reprise::nn {

// Which keys a query may see besides what causality says: made once a forward, read by every block.
struct Visible {
  Tensor mask;       // i64 [B, T]; absent: all
  Tensor documents;  // i64 [B, T], the number of the text in its row; absent: one text a row
  // What attention may rely on: see AttentionSpec.
  bool padded_right = false;
  std::int64_t most_documents = 0;
};
Visible visible_of(const Batch& batch);
// Whether each row of a mask [B, T] is one or more tokens, then only padding.
bool is_padded_right(const Tensor& mask);

struct AttendOptions {
  double scale = 1;
  double dropout = 0;              // on the probabilities
  Generator* generator = nullptr;  // null: no dropout
  std::int64_t window = 0;         // keys j with i - window < j; 0: all
};

// Causal attention. q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D].
Variable attend(Variable q, Variable k, Variable v, const Visible& visible,
                const AttendOptions& options);

// Without a generator, or at probability 0, x itself.
Variable drop(Variable x, double probability, Generator* generator);

// A probability of dropout: from 0 to below 1.
double read_dropout(JsonReader& json, std::string_view key, double otherwise);

// Biases 0, weights of norms 1, matrices and tables N(0, deviation^2).
void initialize_parameter(const NamedParameter& entry, double deviation, Generator& generator);

}  // namespace reprise::nn
