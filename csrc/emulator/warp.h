// What the lanes of a warp do together, on the block's rendezvous.
#pragma once

#include "block.h"

namespace fastlora::emulator {

inline void sync_warp(unsigned mask, Here here) {
  block().collective(mask, "__syncwarp", here, nullptr, nullptr, [](const Arrival*) {});
}

inline unsigned ballot(unsigned mask, bool vote, const char* kind, Here here) {
  unsigned result = 0;
  block().collective(mask, kind, here, &vote, &result, [](const Arrival* lanes) {
    unsigned votes = 0;
    for (unsigned i = 0; i < kWarp; ++i)
      if (lanes[i].in != nullptr && *static_cast<const bool*>(lanes[i].in)) votes |= 1u << i;
    for (unsigned i = 0; i < kWarp; ++i)
      if (lanes[i].out != nullptr) *static_cast<unsigned*>(lanes[i].out) = votes;
  });
  return result;
}

// A lane gets the value of lane `from(its own number)`, which must be in the mask. Every lane asks
// for itself: its arguments may be others than its neighbours'.
template <class T, class From>
T shuffle(unsigned mask, T value, From from, const char* kind, Here here) {
  struct Question {
    T value;
    unsigned source;
  };
  T result{};
  const Question mine{value, unsigned(from(int(block().current().lane()))) % kWarp};
  const std::string name = std::string(kind) + " of " + std::to_string(sizeof(T)) + " bytes";
  block().collective(mask, name, here, &mine, &result, [=](const Arrival* lanes) {
    auto question = [&](unsigned lane) { return static_cast<const Question*>(lanes[lane].in); };
    for (unsigned i = 0; i < kWarp; ++i) {
      if (lanes[i].in == nullptr) continue;
      const unsigned source = question(i)->source;
      if (lanes[source].in == nullptr)
        fail(name + " reads from lane " + std::to_string(source) +
                 ", which has ended, does not exist or is not in the mask",
             here);
      *static_cast<T*>(lanes[i].out) = question(source)->value;
    }
  });
  return result;
}

}  // namespace fastlora::emulator
