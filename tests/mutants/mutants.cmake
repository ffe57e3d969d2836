reprise_mutant(contribution_lost FILE gradients.cc TEST Statement4.AChange*
  OLD [[  kernels::accumulate(state.sum, gradient);]] NEW [[  static_cast<void>(gradient);]])
reprise_mutant(value_contribution_lost FILE gradients.cc TEST Shards/RandomPrograms.*/0
  OLD [[  kernels::accumulate(value.gradient, gradient);]] NEW [[]])
reprise_mutant(shared_gradient_added_in_place FILE gradients.cc TEST Shards/RandomPrograms.*/0
  OLD [[if (value.gradient.storage_references() > 1) {]] NEW [[if (false) {]])
reprise_mutant(wrong_random_offset FILE dropout.cc TEST Replays.DropoutIsReplayedWithItsOwnNumbers
  OLD [[run.gradient(0), p_, seed_, offset_,]] NEW [[run.gradient(0), p_, seed_, offset_ + 1,]])
reprise_mutant(released_before_its_last_read FILE value.cc TEST Shards/RandomPrograms.*/0
  OLD [[root->handles + root->need + root->pend != 0]] NEW [[root->handles + root->need != 0]])
reprise_mutant(segment_replayed_twice FILE sweep.cc TEST Replays.ASegmentIsReplayedOnce
  OLD [[          entered_.push_back(s);]] NEW [[]])
reprise_mutant(hold_from_the_children_s_saved_sets FILE segment.cc TEST Shards/RandomPrograms.*/0
  OLD [[  each_wanted(*this, id, [&](Value* v) { closure.ask(v); });]]
  NEW [[  for (std::int32_t r = segment.first; r < segment.last; ++r) {
    each_saved(records_[static_cast<std::size_t>(r)], [&](Value* v) { closure.ask(v); });
  }]])
reprise_mutant(read_noted_by_the_innermost_segment_only FILE tape.cc TEST Shards/RandomPrograms.*/0
  OLD [[         s = segments_[static_cast<std::size_t>(s)].parent) {
      auto& ext]] NEW [[         s = -1) {
      auto& ext]])
reprise_mutant(wrong_version_check FILE sweep_plan.cc TEST Statement4.ParameterChanged*
  OLD [[leaf->version != p->version()]] NEW [[leaf->version > p->version()]])
reprise_mutant(wrong_order_of_ready FILE sweep_plan.cc TEST Readiness.TiedWeights*
  OLD [[return std::tuple(-a.second.ready_at, a.second.slot) <
           std::tuple(-b.second.ready_at, b.second.slot);]]
  NEW [[return std::tuple(a.second.ready_at, a.second.slot) <
           std::tuple(b.second.ready_at, b.second.slot);]])
reprise_mutant(ready_at_the_first_of_two_inputs FILE sweep_plan.cc TEST Readiness.OneParameterAtTwo*
  OLD [[if (reader.expected == 0 || reader.ready_at != r) {]] NEW [[if (true) {]])
reprise_mutant(keeps_dropped_at_entry FILE replay.cc TEST Shards/RandomPrograms.*/0
  OLD [[  std::vector<std::int32_t> run;]]
  NEW [[  std::ranges::for_each(plan_.keep[static_cast<std::size_t>(id)], drop_need);
  std::ranges::for_each(plan_.keep[static_cast<std::size_t>(id)], [](Value* v) { ++v->need; });
  std::vector<std::int32_t> run;]])
reprise_mutant(dead_branches_asked FILE sweep_plan.cc TEST Statement4.AChange*
  OLD [[    each_wanted(static_cast<std::int32_t>(s), [&](Value* v) { closure.ask(v); });]]
  NEW [[    reprise::each_wanted(tape_, static_cast<std::int32_t>(s), [&](Value* v) { closure.ask(v); });]])
reprise_mutant(buffer_taken_from_a_live_handle FILE tape.cc TEST Shards/RandomPrograms.*/0
  OLD [[v != nullptr && v->handles == 1 &&]] NEW [[v != nullptr && v->handles >= 1 &&]])
reprise_mutant(last_read_forgets_replays FILE sweep_plan.cc TEST Readiness.LastReadIsExact
  OLD [[(may_run_[index] == 0 && !saved)]] NEW [[!saved]])
reprise_mutant(half_written_accumulation FILE gradients.cc TEST Failures.AnOpFailsAtEveryCallOn*
  OLD [[if (state.had_gradient && state.left == 1 && !state.sum.defined()) {]]
  NEW [[if (state.had_gradient && !state.sum.defined()) {]])
reprise_mutant(must_keep_stays_inside FILE segment.cc TEST Replays.MustKeepOutputs*
  OLD [[        parent.kept.push_back(v);
        add_need(v);]] NEW [[]])
reprise_mutant(gradient_of_a_loss_stays FILE sweep.cc TEST Recording.ALeafThatIsItself*
  OLD [[      tape_.bind(loss.value());]] NEW [[      static_cast<void>(loss);]])
reprise_mutant(every_gradient_in_f32 FILE sweep.cc TEST Recording.ABf16Parameter*
  OLD [[(record_.op->weights() >> i & 1u) != 0;]] NEW [[true;]])
reprise_mutant(replay_without_its_label FILE replay.cc TEST Labels.Checkpoint*
  OLD [[  const SegmentLabel label(segment.name);]] NEW [[]])
reprise_mutant(gradient_free_before_ready FILE parameter.cc TEST Failures.WhatIsUnderWay*
  OLD [[  p.gradient_pending_ = p.data_pending_ = true;]] NEW [[]])
reprise_mutant(policy_throws_twice FILE tape.cc TEST Failures.APolicyThatThrows*
  OLD [[    if (std::uncaught_exceptions() == exceptions_) {]] NEW [[    if (true) {]])
reprise_mutant(host_copy_forgotten_in_replay FILE replay.cc TEST Offloading.*
  OLD [[return v->asked == epoch && !v->at_hand();]]
  NEW [[return v->asked == epoch && !v->tensor.has_storage();]])
reprise_mutant(host_memory_stays_after_the_last_use FILE value.cc TEST Shards/RandomPrograms.*/0
  OLD [[  root->host.reset();]] NEW [[]])
reprise_mutant(value_leaves_under_a_handle FILE offload.cc TEST Offloading.AHandle*
  OLD [[    if (root->handles > 0) {]] NEW [[    if (false) {]])
reprise_mutant(memory_of_what_left_stays FILE offload.cc TEST Offloading.LowersThe*
  OLD [[      copy->settle();]] NEW [[]])
reprise_mutant(nothing_is_fetched_ahead FILE offload.cc TEST Offloading.CopiesBackBegin*
  OLD [[      copy->fetch(MemoryKind::saved);]] NEW [[]])
reprise_mutant(destroyed_parameter_read FILE sweep_plan.cc TEST TapeErrors.OfADestroyedParameter
  OLD [[  if (leaf->outlived()) {]] NEW [[  if (false) {]])
