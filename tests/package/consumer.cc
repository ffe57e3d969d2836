// A project of somebody else's that found Reprise with find_package.
#include <cstdio>

#include <reprise/autograd/tape.h>
#include <reprise/core/tensor.h>

int main() {
  reprise::Tape tape;
  reprise::Tape::Scope scope(tape);
  const reprise::Tensor x = reprise::Tensor::full({2, 3}, reprise::DType::f32, 1.5);
  std::printf("%s\n", reprise::to_string(x.shape()).c_str());
  return x.to_vector<float>()[5] == 1.5f ? 0 : 1;
}
