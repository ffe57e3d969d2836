// Every rank runs every test. The exit code of a rank that failed is 1; the others then end with an
// error too, because they miss it.
#include <cstdio>
#include <memory>

#include <gtest/gtest.h>

#include "core/parallel.h"
#include "tests/distributed/conformance/net.h"
#include "tests/distributed/mpi/world.h"
#include "train/launch.h"

namespace reprise::testing {
namespace {
std::unique_ptr<distributed::Communicator> the_world;
}

distributed::Communicator& world() {
  return *the_world;
}

void on_ranks(const std::function<void(distributed::Communicator&)>& body) {
  body(world());
}

int run(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const absl::StatusOr<train::World> place = train::find_world();
  if (!place.ok() || place->size < 2) {
    std::fprintf(stderr, "start this with mpirun -n 2 or more\n");
    return 1;
  }
  set_threads(place->threads);
  auto communicator = train::connect(*place, std::chrono::seconds(60));
  if (!communicator.ok()) {
    std::fprintf(stderr, "%s\n", communicator.status().ToString().c_str());
    return 1;
  }
  the_world = *std::move(communicator);
  if (the_world->rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    class OnlyFailures : public ::testing::EmptyTestEventListener {
      void OnTestPartResult(const ::testing::TestPartResult& result) override {
        if (result.failed()) {
          std::fprintf(stderr, "rank %d: %s:%d\n%s\n", world().rank(), result.file_name(),
                       result.line_number(), result.message());
        }
      }
    };
    listeners.Append(new OnlyFailures);
  }
  int failed = RUN_ALL_TESTS();
  try {
    failed = static_cast<int>(
        distributed::all_reduce_value(world(), failed, distributed::Reduce::max, "exit code"));
    world().close();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rank %d: %s\n", world().rank(), e.what());
    failed = 1;
  }
  the_world.reset();  // before the allocator, which is made later, goes
  return failed;
}

}  // namespace reprise::testing

int main(int argc, char** argv) {
  return reprise::testing::run(argc, argv);
}
