#include "core/streams.h"

#include <utility>

#include "core/error.h"

namespace reprise {

Streams::Streams(std::shared_ptr<CudaCalls> calls) : calls_(std::move(calls)) {
  calls_->use_device();
  try {
    for (CudaCalls::Stream& stream : streams_) {
      stream = calls_->make_stream();
    }
  } catch (...) {
    for (const CudaCalls::Stream stream : streams_) {
      if (stream != nullptr) {
        calls_->destroy_stream(stream);
      }
    }
    throw;
  }
}

Streams::~Streams() {
  for (const CudaCalls::Event event : events_) {
    calls_->destroy_event(event);
  }
  for (const CudaCalls::Stream stream : streams_) {
    calls_->destroy_stream(stream);
  }
}

Streams::Mark::Mark(Mark&& other) noexcept
    : streams_(std::exchange(other.streams_, nullptr)),
      event_(std::exchange(other.event_, nullptr)) {}

Streams::Mark& Streams::Mark::operator=(Mark other) noexcept {
  std::swap(streams_, other.streams_);
  std::swap(event_, other.event_);
  return *this;
}

// An event may be recorded again while streams wait for it: each waits for the record that was the
// last when it was told to.
Streams::Mark::~Mark() {
  if (event_ != nullptr) {
    streams_->events_.push_back(event_);
  }
}

Streams::Mark Streams::mark(StreamKind kind) {
  calls_->use_device();
  if (events_.empty()) {
    events_.reserve(events_.capacity() + 1);
    events_.push_back(calls_->make_event());
  }
  Mark mark(this, events_.back());
  events_.pop_back();
  calls_->record(mark.event_, stream(kind));
  return mark;
}

void Streams::wait(StreamKind waiting, const Mark& mark) {
  ensure(mark.streams_ == this, "a mark of other streams, or none");
  calls_->use_device();
  calls_->wait(stream(waiting), mark.event_);
}

void Streams::follow(StreamKind waiting, StreamKind first) {
  wait(waiting, mark(first));
}

void Streams::copy(StreamKind kind, void* to, const void* from, std::size_t bytes) {
  calls_->use_device();
  calls_->copy(to, from, bytes, stream(kind));
}

void Streams::synchronize(StreamKind kind) {
  calls_->use_device();
  calls_->synchronize(stream(kind));
}

}  // namespace reprise
