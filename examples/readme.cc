// The example of README.md, word for word from the first include on.
#include <cstdio>

#include "autograd/tape.h"
#include "nn/models/llama.h"
#include "nn/optimizer/adamw.h"
using namespace reprise;
int main() {
  nn::LlamaConfig config{.vocabulary = 97, .width = 64, .inner = 172, .layers = 4, .heads = 4};
  config.kv_heads = 4;
  config.head_size = config.rope.dim = 16;
  nn::Llama model(config, {cpu, DType::f32});
  Generator generator{/*seed=*/1};
  model.initialize(generator);
  nn::AdamW optimizer(model.trainable_parameters(), {});
  const Tensor ids = Tensor::from(std::vector<std::int64_t>{3, 14, 15, 92, 65, 35, 89, 79}, {1, 8});
  Tape tape;
  for (int step = 0; step < 20; ++step) {
    Tape::Scope scope(tape, Policies::named("inputs-only"));  // every block is a segment
    Variable loss = model.loss({.ids = ids, .labels = ids});
    for (Parameter* p : model.parameters()) p->zero_gradient();
    backward(loss);  // replays each block's records, never its code
    optimizer.step(1e-2);
    std::printf("step %d loss %.4f\n", step, loss.tensor().item<float>());
  }
}
