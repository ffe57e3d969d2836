#include "tests/distributed/conformance/rows.h"

#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace reprise::testing {
namespace {

using Rows = std::vector<ConformanceRow>;

const char* kHigher = "not applicable: higher-order gradients, a named error";
const char* kAutocast = "not applicable: autocast contexts";
const char* kSparse = "not applicable: sparse tensors";
const char* kComplex = "not applicable: complex tensors";
const char* kChannels = "not applicable: channels-last tensors";
const char* kPowerSgd = "not applicable: PowerSGD";
const char* kOffload = "not there yet: values are not moved to host memory";

// DDP with checkpoints: 2 ranks, 5 iterations, gradients beside a local model on the full batch.
Rows segments_on_ranks() {
  const std::string s = "SegmentsOnRanks.";
  return {
      {"2.2", "..._once", "one layer plain, one in a segment", "P / P", {s + "Once"}},
      {"2.2", "..._unused_params", "the same, told to look for unused parameters",
       "X ready twice, P if static / P", {s + "UnusedParameters"}},
      {"2.2", "..._twice", "the same layer in two segments", "X / P", {s + "SameLayerTwice"}},
      {"2.2", "..._twice_static_graph", "the same with static_graph", "P / P",
       {s + "SameLayerTwice", s + "SameLayerTwiceThenOnce"}},
      {"2.2", "..._dynamic_module", "alternates two layers by iteration, absent gradients allowed",
       "not tested [X] / P", {s + "DynamicModule"}},
      {"2.2", "..._dynamic_weight_sharing", "the same, with one weight in both",
       "not tested [X] / P", {s + "DynamicWeightSharing"}},
      {"2.2", "..._weight_sharing", "a segment around the whole model, tied weights", "P / P",
       {s + "WeightSharingAroundTheWholeModel"}},
      {"2.2", "..._twice_weight_sharing", "tied weights, twice", "P static, [X] dynamic / not tested",
       {s + "TwiceWithWeightSharing"}},
      {"2.2", "fairscale test_checkpoint_ddp: basic, weight_sharing, checkpoint_half",
       "norms of gradients; half precision", "P / not tested",
       {s + "NormsOfGradients", s + "WeightSharingAroundTheWholeModel", s + "HalfPrecision"}},
      {"2.2", "the same file: unused_param, checkpoint_twice", "expects an error",
       "X / not tested", {s + "UnusedParameters", s + "SameLayerTwice"}},
      {"2.2", "FSDP test_checkpoint_submodule", "gradients close", "dropped / P",
       {s + "NestedSegments", "RandomRanks.EveryRankHasTheGradientsOfOneProcess"}},
      {"2.2", "FSDP test_checkpoint_fsdp_wrapping, test_basic_checkpoint_end_to_end",
       "segments inside and outside; equal loss, output, gradients", "not tested / P",
       {s + "NestedSegments", s + "MicroBatchesInsideOfAccumulation",
        s + "MicroBatchesOutsideOfAccumulation"}},
      {"2.2", "test_autograd: parameter_used_in_an_out",
       "a hook on a weight used inside and outside of a segment fires once", "[2] / P",
       {s + "AParameterUsedInsideAndOutsideIsReadyOnce"}},
  };
}

Rows segments() {
  const std::string c = "Checkpoint.";
  return {
      {"2.3", "test_checkpoint_trigger", "forwards: 2 in a segment, 1 for the last chunk", "P / P",
       {"Statement1.LambdaRunsOncePerForward", "Replays.ASegmentIsReplayedOnce",
        "Replays.TheLastProductOfABlockIsNeverReplayed"}},
      {"2.3", "test_checkpoint_valid: grad()", "equal gradients of chosen inputs", "X / P",
       {c + "SequentialAndModuleList", "Recording.GradientsOfLeavesAndOfInteriorValues"}},
      {"2.3", "test_checkpoint_valid: create_graph", "a graph of gradients", "X / P", {}, kHigher},
      {"2.3", "test_checkpoint, _module_list", "output, input and parameter gradients equal",
       "P / P", {c + "SequentialAndModuleList"}},
      {"2.3", "_sequential_deprecated_multiple_args, _no_args", "TypeError", "X / X",
       {c + "AWrongCallDoesNotCompile"}},
      {"2.3", "_rng_cpu, _rng_gpu", "dropout before and inside", "P / not tested",
       {"Replays.DropoutIsReplayedWithItsOwnNumbers",
        "Statement2.GradientsAreBitwiseEqualUnderEveryPolicyWithDropout"}},
      {"2.3", "_not_preserve_rng_state_and_without_reentrant", "only runs", "not tested / P",
       {"Dropout.EachCallTakesItsOwnRange"}},
      {"2.3", "_non_tensor, _non_tensor_inputs_outputs, _no_tensors",
       "none, scalars, strings in and out; a second backward raises", "P / not tested",
       {c + "NestedContainersAndNoTensors", "Statement1.StructOfVariablesIsReturned",
        "TapeErrors.OfBackwardsArguments"}},
      {"2.3", "_partial_grad", "an output without gradient", "X / [P]",
       {c + "AnOutputWithoutAGradient"}},
      {"2.3", "_without_reentrant_early_free", "memory falls at every step", "not tested / P",
       {"Replays.ValuesOfAReplayAreReleasedAtTheirLastUse",
        "Statement5.NoActivationByteIsLeftAfterBackward"}},
      {"2.3", "get_device_states_recursive, infer_device_state_*",
       "devices of random numbers in nested containers", "P / P",
       {c + "NestedContainersAndNoTensors", "Replays.DropoutIsReplayedWithItsOwnNumbers"}},
      {"2.3", "_preserves_device_context", "the default device is restored", "not tested / P",
       {c + "AReplayRunsOnTheDeviceOfItsTensors",
        "Labels.AReplayGivesEachDeviceItsLabelBackAlsoWhenItThrows"}},
      {"2.3", "test_checkpointing", "2000 small segments", "P / not tested",
       {c + "TwoThousandSmallSegments"}},
      {"2.3", "_non_reentrant_autocast_cpu, _gpu", "autocast's dtype is restored", "not tested / P",
       {}, kAutocast},
      {"2.3", "_without_reentrant_memory_savings", "a lower peak", "P / P",
       {"Statement7.KeepingInputsOnlyLowersThePeakAndReplays"}},
      {"2.3", "_custom_function_works", "a second read of saved tensors raises",
       "not tested / X by design", {"Statement8.AForeignKernelIsWrappedAsAnOpAndReplayed"}},
      {"2.3", "_with_context_fn", "contexts around forward and recomputation", "X / P",
       {"Labels.CheckpointCountsForwardAndReplayUnderTheSegment"}},
      {"2.3", "warns_if_use_reentrant_not_passed (2)", "one warning", "W / not tested",
       {c + "ThereIsOneVariantAndNothingToWarnOf"}},
      {"2.3", "_detects_non_determinism", "fewer, more, other shapes raise; some pass silently",
       "not tested / X/X/X/P",
       {c + "ACallableThatIsNotDeterministicRunsOnce", "Statement1.ControlFlowMayDependOnData"}},
      {"2.3", "access_saved_tensor_twice...", "each read recomputes", "not tested / P",
       {"Replays.ASegmentIsReplayedOnce", "Recording.KeepAllowsTheSameSweepAgain"}},
      {"2.3", "_without_reentrant[input_requires_grad]",
       "parameters have gradients when no input needs one", "[absent] / P",
       {c + "ParametersHaveGradientsWhenNoInputNeedsOne"}},
      {"2.3", "_valid_reset_on_error", "clean state after a refused call", "not tested / P",
       {"Failures.WhatTheCallerDidWrongTouchesNothing",
        "Failures.AForwardThatFailsAtAnyCallLeavesTheTapeUsable"}},
      {"2.3", "_detached_tensor", "no_grad inside", "X / P",
       {"Recording.NoGradRecordsNothingOutsideAndIsReplayedInside", "Recording.DetachEndsHistory"}},
      {"2.3", "_saved_object_identity", "the same object is given back", "not tested / P",
       {"Statement1.ReferenceIsReturnedAsTheSameObject"}},
      {"2.3", "_correct_grad, _dataparallel, _arbitrary_input_output",
       "backward is grad(); containers", "not tested / P",
       {c + "SequentialAndModuleList", c + "NestedContainersAndNoTensors",
        "SegmentsOnRanks.Once"}},
      {"2.3", "save_on_cpu_and_checkpoint", "offload around and inside", "not tested / P", {},
       kOffload},
      {"2.3", "nested: test_nested_checkpoint, two_children, kwargs, non_tensor: first order",
       "equal gradients in every wrapping; all freed", "not tested / P",
       {"Readiness.AWeightInThreeNestedSegments", "Replays.SegmentsNestAThousandDeep",
        "SegmentsOnRanks.NestedSegments"}},
      {"2.3", "the same: second and third order", "gradients of gradients", "not tested / P", {},
       kHigher},
      {"2.3", "nested: same_graph", "a hook on an original node fires once", "not tested / P",
       {"Readiness.AWeightInThreeNestedSegments"}},
      {"2.3", "nested: reentrant_backwards", "backward inside a hook", "not tested / P",
       {"TapeErrors.OfCallbacks"}},
      {"2.3", "nested: set_early_stop, ..._no_recompution_needed",
       "the tail is not run again; nothing saved is nothing run", "not tested / P",
       {"Replays.OnlyWhatIsNeededIsExecuted", "Replays.TheLastProductOfABlockIsNeverReplayed"}},
      {"2.3", "SAC: flops_and_mem", "bytes and FLOPs exact", "not tested / P",
       {c + "BytesAndFlopsOfChainsPerPolicyAreExact",
        "Statement7.PredictedAndMeasuredPeakAreEqualToTheByte"}},
      {"2.3", "SAC: storage_lifetime", "freed with the graph and after backward", "not tested / P",
       {"Statement5.NoActivationByteIsLeftAfterBackward"}},
      {"2.3", "SAC: version_counter", "a changed value raises", "not tested / X/P",
       {"Statement4.ParameterChangedBeforeAReplayIsANamedError",
        "Statement4.AChangeThatNoReplayAndNoBackwardReadsIsNoError"}},
      {"2.3", "SAC: function_with_more_than_one_output, non_tensor_output",
       "a kept op runs once", "not tested / P",
       {"Replays.MustKeepOutputsAreExecutedOnceAtAnyDepth"}},
      {"2.3", "SAC: can_only_trigger_recompute_once", "a second backward raises",
       "not tested / X", {"Recording.KeepAllowsTheSameSweepAgain"}},
      {"2.3",
       "SAC: bad_inputs, policy_with_state, output_already_has_autograd_meta, "
       "subclass_dispatching_sizes",
       "errors of arguments; state; views", "not tested / P",
       {"Failures.APolicyThatThrowsLeavesTheTapeUsable", "Recording.ANamedViewIsKeptWithItsBuffer",
        "Recording.NamedValuesAreKeptByTheirPolicy"}},
      {"2.3", "budget: cheap ops, even and uneven chains, cheaper products, profile, attention",
       "bytes and FLOPs per budget on chains", "not tested / P (compiled)",
       {c + "BytesAndFlopsOfChainsPerPolicyAreExact"}},
      {"2.3",
       "composable: tensor_only, random_cpu, multi_args, clears_state_on_error_in_forward, kwargs",
       "equal gradients, less memory, clean state", "X refused / P",
       {c + "NestedContainersAndNoTensors",
        "Failures.AForwardThatFailsAtAnyCallLeavesTheTapeUsable",
        "Statement7.KeepingInputsOnlyLowersThePeakAndReplays"}},
      {"2.3", "checkpoint_wrapper: parity, kwargs, fqn, load, apply",
       "one peak however it is wrapped; names unchanged", "P / P",
       {c + "NamesOfParametersAreThoseWithoutSegments",
        "Stacks.AxolotlPartialAroundABoundMethod"}},
      {"2.3", "checkpoint_wrapper: cpu_offload", "saved tensors in host memory", "P / P", {},
       kOffload},
  };
}

Rows behaviour() {
  const std::string b = "BehaviourOnRanks.";
  return {
      {"2.4", "control_flow_same_across_ranks", "right gradients", "P",
       {b + "ControlFlowTheSameOnEveryRank"}},
      {"2.4", "control_flow_different_across_ranks", "right gradients", "P with a flag",
       {b + "ControlFlowDifferentOnEveryRank", "SegmentsOnRanks.BranchesByRank"}},
      {"2.4", "multiple_nested_unused_params_error", "an error that names them", "X",
       {b + "NestedOutputsOfWhichSomeAreUnused", b + "ParametersThatMustBeReachedAreNamed"}},
      {"2.4", "shared_grad_acc_unused_params", "right gradients", "P",
       {b + "SharedParametersOfAnUnusedModule"}},
      {"2.4", "undefined_grad_parity", "absent gradients stay absent", "P",
       {b + "GradientsThatNobodyMakesStayAbsent"}},
      {"2.4", "global_local_unused_params_grad (view, static)", "globally unused is untouched", "P",
       {b + "GloballyUnusedStaysUntouchedLocallyUnusedGetsTheMean"}},
      {"2.4", "ignored_output, with_unused_parameters", "right gradients", "P",
       {b + "AnIgnoredOutputOfUsedParameters", "SegmentsOnRanks.UnusedParameters"}},
      {"2.4", "unused_params_rebuild_buckets_exception", "names of missing parameters", "X",
       {b + "ParametersThatMustBeReachedAreNamed",
        "ReducerOrder.IsRenewedWhenAPlanComesBackAndKeptByPlan"}},
      {"2.4", "has_finalized", "a reduction must end before the next forward", "X",
       {b + "AForwardWithoutBackwardLeavesNothingBehind"}},
      {"2.4", "find_unused_parameters_kwarg", "a module used outside of forward; ready only once",
       "X", {b + "AModuleUsedOutsideOfTheForward", "SymptomsOnRanks.AVariableIsMarkedReadyOnce"}},
      {"2.4", "accumulate_gradients_no_sync (view, hooks), grads_same_across_ranks_with_no_sync",
       "equal to local; the same on all ranks", "P", {b + "AccumulationWithoutCommunication"}},
      {"2.4", "accumulate_gradients_module", "sums of steps that are not zeroed", "P",
       {b + "GradientsOfSeveralStepsAddUpWhenTheyAreNotZeroed"}},
      {"2.4", "multiple_outputs_multiple_backward", "equal to local", "P",
       {b + "SeveralOutputsSeveralBackwards"}},
      {"2.4", "weight_sharing", "equal to local", "P",
       {"SegmentsOnRanks.WeightSharingAroundTheWholeModel"}},
      {"2.4", "no_grad", "evaluation without collectives", "P", {b + "EvaluationBetweenSteps"}},
      {"2.4", "static_graph_multi_forward", "equal to local", "P",
       {b + "SeveralForwardsBeforeOneBackward"}},
      {"2.4", "create_graph", "gradients of gradients", "P", {}, kHigher},
      {"2.4", "new_tensor_in_fwd", "equal to local", "P", {b + "ATensorMadeInTheForward"}},
      {"2.4", "returns_tensor_with_no_grad", "equal to local", "P",
       {b + "AnOutputThatNeedsNoGradient"}},
      {"2.4", "static_graph_api_cpu", "a late call is refused", "X",
       {b + "SettingsCannotChangeInAStep"}},
      {"2.4", "static_graph_nested_types", "nested outputs", "P",
       {b + "NestedOutputsOfWhichSomeAreUnused"}},
      {"2.4", "static graph, another graph on each rank", "an error or a wrong result", "X",
       {b + "ControlFlowDifferentOnEveryRank"}},
      {"2.4", "a module frozen in the middle of a run", "", "not tested",
       {b + "WhatIsTrainableMayChange"}},
      {"2.4", "param_layout_mismatch_error", "what differs between ranks is named", "X",
       {"Faults.AnotherShape", "Faults.AnotherParameterList"}},
      {"2.4", "grad_layout_*, channels_last_contig", "strides of gradients", "P", {}, kChannels},
      {"2.4", "fp16", "half precision", "P", {"SegmentsOnRanks.HalfPrecision"}},
      {"2.4", "complex_params", "complex parameters", "P", {}, kComplex},
      {"2.4", "sparse_gradients", "sparse gradients", "P", {}, kSparse},
      {"2.4", "comm_hook_*, fp16 and bf16 wrappers, hook_parity_*", "parity of the hooks", "P",
       {b + "Bf16CompressionIsCloseToNone",
        "ReducerCompression.RoundsEachRanksGradientAndTheSumOnce"}},
      {"2.4", "powerSGD", "parity", "P", {}, kPowerSgd},
      {"2.4", "register_just_once, invalid_init, invalid_return", "errors of arguments", "X",
       {b + "SettingsCannotChangeInAStep", "ReducerShards.MistakesOfTheCaller"}},
      {"2.4", "optimizer-in-backward", "parity with the optimizer behind", "P",
       {b + "TheOptimizerInBackwardGivesTheBitsOfTheOptimizerBehind",
        "ReducerUpdate.WaitsForTheLastReadThatAReplayMayMake"}},
      {"2.4", "uneven_inputs, join_model_equivalence", "no hang; the same model in the end", "P",
       {b + "OneRankStopsBeforeTheOthersAndModelsStayTheSame"}},
      {"2.4", "uneven_input_join_disable, uneven_input_exception", "an error on every rank", "X",
       {b + "WithoutJoinUnevenInputsAreAnErrorOnEveryRank"}},
      {"2.4", "grad_div_uneven_inputs", "the rule of division", "P",
       {b + "TheDivisionOfUnevenInputs"}},
      {"2.4", "ComputeBucketAssignmentTest (4)", "exact assignment by size and dtype", "P",
       {"Buckets.FirstIsSmallThenLargerInReadyOrder", "Buckets.OneDTypeEachOrderedByTheirLastEntry",
        "Buckets.AnEntryLargerThanTheLimitStandsAlone", "Buckets.SlotsStartAt64Bytes"}},
  };
}

Rows symptoms() {
  const std::string s = "SymptomsOnRanks.";
  return {
      {"3", "\"mark a variable ready only once\"", "hook counts used as readiness", "X",
       {s + "AVariableIsMarkedReadyOnce"}},
      {"3", "ZeRO: \"already been reduced\"", "hooks fire per use under a checkpoint", "X",
       {s + "NoGradientIsReducedTwice"}},
      {"3", "unused parameters and checkpoints", "the graph is hidden in segments", "X",
       {s + "UnusedParametersAreFoundInSegments"}},
      {"3", "modules_to_save, frozen towers", "frozen copies look unused", "X",
       {s + "FrozenWeightsBesideTrainedCopies", "StackOnRanks.MsSwiftQwen2VlWithLora"}},
      {"3", "static_graph with accumulation stops reducing", "counts learned in iteration 1", "X",
       {s + "AccumulationIsReducedInEveryStep"}},
      {"3", "no overlap in the first step", "counts and order unknown", "no overlap",
       {s + "TheFirstStepOverlaps"}},
      {"3", "absent or zero gradients of adapters", "only input tensors are tracked", "X",
       {s + "AdaptersUnderFrozenInputsHaveGradients"}},
      {"3", "\"backward a second time\"", "nested backward frees the shared graph", "X",
       {s + "NestedSegmentsAreSweptOnce"}},
      {"3", "accumulated micro-batches with other numbers of tokens", "a mean of means",
       "wrong loss", {s + "MicroBatchesCountByTheirTokens",
                      "ReducerMean.OverTokensIsTheMeanOverAllLabels"}},
  };
}

std::string result_of(const ConformanceRow& row) {
  return row.tests.empty() ? row.note : "pass";
}

void append(std::string& text, const char* title, const char* about, const Rows& rows) {
  text += fmt::format("\n## {}\n\n{}\n\n| peer's test | asserts | peer | ours | our test |\n"
                      "|---|---|---|---|---|\n",
                      title, about);
  for (const ConformanceRow& row : rows) {
    text += fmt::format("| {} | {} | {} | {} | {} |\n", row.name, row.asserts, row.peer,
                        result_of(row), fmt::join(row.tests, ", "));
  }
}

}  // namespace

std::vector<ConformanceRow> conformance_rows() {
  Rows all;
  for (Rows rows : {segments_on_ranks(), segments(), behaviour(), symptoms()}) {
    for (ConformanceRow& row : rows) {
      all.push_back(std::move(row));
    }
  }
  return all;
}

std::string conformance_document() {
  std::string text = R"(# Conformance

What PyTorch's tests of checkpointing and data parallelism assert (and those of fairscale, FSDP, and
what users of it report), its result, and ours. One mode, no flag. "pass" is the named tests, which
CI runs. R / N: reentrant / non-reentrant checkpoint; P passes, X raises (its test expects it),
W warns; in brackets what its documents imply.

This file is written by `distributed_test` from `tests/distributed/conformance/rows.cc`
(REPRISE_WRITE_CONFORMANCE=1), and a test compares the two, the names of tests among them. Suites
that end in OnRanks run on two threads with a communicator of their own, and on 2, 3 and 4 processes.
)";
  append(text, "Checkpoints under data parallelism (2.2)",
         "2 ranks, 5 iterations, small and large buckets. Gradients are those of our run without "
         "segments bit for bit, and within rtol 1.3e-6, atol 5e-5 of one process with the whole "
         "batch. Peer: R / N.",
         segments_on_ranks());
  append(text, "Checkpoints in one process (2.3)", "Peer: R / N.", segments());
  append(text, "Other behaviour of data parallelism (2.4)", "", behaviour());
  append(text, "What users trip over under data parallelism (3)", "", symptoms());
  return text;
}

}  // namespace reprise::testing
