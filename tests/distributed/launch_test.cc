#include "train/launch.h"

#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/cuda_device.h"

namespace reprise::train {
namespace {

Environment environment(std::map<std::string, std::string> variables) {
  return [variables = std::move(variables)](const char* name) -> const char* {
    const auto it = variables.find(name);
    return it == variables.end() ? nullptr : it->second.c_str();
  };
}

std::string describe(std::map<std::string, std::string> variables) {
  const absl::StatusOr<World> world = find_world(environment(std::move(variables)));
  if (!world.ok()) {
    return std::string(world.status().message());
  }
  return world->launcher + " " + std::to_string(world->rank) + "/" + std::to_string(world->size) +
         " local " + std::to_string(world->local_rank) + "/" + std::to_string(world->local_size);
}

TEST(FindWorld, ByEachLauncher) {
  EXPECT_EQ(describe({}), " 0/1 local 0/1");
  EXPECT_EQ(describe({{"OMPI_COMM_WORLD_RANK", "3"},
                      {"OMPI_COMM_WORLD_SIZE", "4"},
                      {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                      {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                      {"PMIX_RANK", "9"}}),
            "Open MPI 3/4 local 1/2");
  EXPECT_EQ(describe({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "0"}}),
            "PMI 1/2 local 0/2");
  EXPECT_EQ(describe({{"PMIX_RANK", "5"}, {"SLURM_NTASKS", "8"}, {"SLURM_LOCALID", "1"}}),
            "PMIx 5/8 local 1/8");
  EXPECT_EQ(describe({{"SLURM_PROCID", "2"}, {"SLURM_NTASKS", "3"}, {"SLURM_LOCALID", "0"}}),
            "Slurm 2/3 local 0/3");
}

TEST(FindWorld, ABatchScriptIsNoLaunch) {
  EXPECT_EQ(describe({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "1"}}), " 0/1 local 0/1");
  EXPECT_EQ(describe({{"SLURM_PROCID", "0"}}), " 0/1 local 0/1");
}

TEST(FindWorld, RefusesWhatDoesNotFit) {
  EXPECT_EQ(describe({{"PMI_RANK", "1x"}, {"PMI_SIZE", "2"}}),
            "environment variable PMI_RANK must be a number, got \"1x\"");
  EXPECT_EQ(describe({{"PMI_RANK", "2"}, {"PMI_SIZE", "2"}}),
            "PMI: rank must be below 2 = ranks, got 2");
  EXPECT_EQ(describe({{"PMIX_RANK", "1"}}),
            "PMIX_RANK is set without SLURM_NTASKS: the number of ranks is not known; start the "
            "program with mpirun or srun, or with --ranks");
}

TEST(FindWorld, ThreadsAreAShareOfTheCores) {
  const int alone = find_world(environment({}))->threads;
  const int many = find_world(environment({{"PMI_RANK", "1"}, {"PMI_SIZE", "100000"}}))->threads;
  EXPECT_GE(alone, 1);
  EXPECT_EQ(many, 1);
  const auto two = find_world(environment({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}}));
  EXPECT_EQ(two->threads, std::max(1, alone / 2));
}

TEST(PlanLaunch, TakesRanksOut) {
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"--ranks", "2", "demo", "-q"},
        std::vector<std::string>{"demo", "--ranks=2", "-q"}}) {
    const absl::StatusOr<Launch> launch = plan_launch(words, environment({}));
    ASSERT_TRUE(launch.ok());
    EXPECT_EQ(launch->ranks, 2);
    EXPECT_EQ(launch->arguments, (std::vector<std::string>{"demo", "-q"}));
  }
  EXPECT_EQ(plan_launch({"demo"}, environment({}))->ranks, 0);
}

TEST(PlanLaunch, TheWatchdogsLimit) {
  using std::chrono::milliseconds;
  EXPECT_FALSE(find_world(environment({}))->watchdog);
  EXPECT_EQ(find_world(environment({{"REPRISE_WATCHDOG", "2.5"}}))->watchdog, milliseconds(2500));
  EXPECT_EQ(
      find_world(environment({{"REPRISE_WATCHDOG", "soon"}})).status().message(),
      "environment variable REPRISE_WATCHDOG must be a number of seconds from 0.1 to 1000000, "
      "got \"soon\"");
  const auto launch = plan_launch({"--watchdog", "7", "demo", "--ranks=2"},
                                  environment({{"REPRISE_WATCHDOG", "3"}}));
  EXPECT_EQ(launch->world.watchdog, milliseconds(7000));
  EXPECT_EQ(launch->ranks, 2);
  EXPECT_EQ(launch->arguments, std::vector<std::string>{"demo"});
  for (const char* bad : {"", "0", "-1", "nan", "inf", "1e9", "3 s"}) {
    EXPECT_EQ(plan_launch({"--watchdog", bad}, environment({})).status().message(),
              "--watchdog must be a number of seconds from 0.1 to 1000000, got \"" +
                  std::string(bad) + "\"");
  }
}

TEST(PlanLaunch, ARanksParent) {
  std::map<std::string, std::string> variables{{"PMI_RANK", "1"},
                                               {"PMI_SIZE", "2"},
                                               {"REPRISE_RUN_DIR", "/dev/shm/x"},
                                               {"REPRISE_GUARD", "12:345:13"}};
  const Launch launch = *plan_launch({"demo"}, environment(variables));
  ASSERT_TRUE(launch.guarded_by && launch.only_watches());
  EXPECT_EQ(launch.guarded_by->folder, "/dev/shm/x");
  EXPECT_EQ(launch.guarded_by->launcher, 12);
  EXPECT_EQ(launch.guarded_by->started, 345);
  EXPECT_EQ(launch.guarded_by->mpirun, 13);
  variables["REPRISE_GUARD"] = "rank";  // the rank itself
  EXPECT_FALSE(plan_launch({"demo"}, environment(variables))->only_watches());
  EXPECT_FALSE(plan_launch({"demo"}, environment({{"REPRISE_RUN_DIR", "/dev/shm/x"},
                                                  {"REPRISE_GUARD", "12:345:13"}}))
                   ->only_watches());
}

TEST(PlanLaunch, RefusesBadNumbersAndNesting) {
  for (const char* bad : {"", "0", "-1", "two", "2.5", "4097", "99999999999"}) {
    const absl::Status status = plan_launch({"--ranks", bad}, environment({})).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(),
              "--ranks must be a number from 1 to 4096, got \"" + std::string(bad) + "\"");
  }
  EXPECT_FALSE(plan_launch({"--ranks"}, environment({})).ok());
  EXPECT_EQ(plan_launch({"--ranks", "2"}, environment({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}}))
                .status()
                .message(),
            "--ranks 2 inside a launch: this is rank 1 of 2 under PMI already; leave --ranks out");
}

// Before MPI or anything else is started.
TEST(ConnectOn, ADeviceThatIsNotThereIsRefused) {
  if (cuda_device_count() > 0) {
    GTEST_SKIP() << "there is a device";
  }
  for (const int size : {1, 2}) {
    World world;
    world.size = world.local_size = size;
    const absl::Status status = connect_on({DeviceKind::cuda, 0}, world).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_NE(status.message().find("NCCL"), std::string_view::npos) << status;
  }
  EXPECT_EQ((*connect_on(cpu, World{}))->size(), 1);
}

}  // namespace
}  // namespace reprise::train
