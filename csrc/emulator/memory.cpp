#include "memory.h"

#include <algorithm>
#include <sstream>

#include "block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastlora::emulator {

Memory& memory() {
  static Memory all;
  return all;
}

void Memory::add(Range range) {
  const auto after =
      std::upper_bound(ranges_.begin(), ranges_.end(), range,
                       [](const Range& a, const Range& b) { return a.begin < b.begin; });
  ranges_.insert(after, std::move(range));
}

void Memory::remove(const char* begin) {
  ranges_.erase(std::remove_if(ranges_.begin(), ranges_.end(),
                               [begin](const Range& r) { return r.begin == begin; }),
                ranges_.end());
}

const Range* Memory::find(const void* p, size_t bytes) const {
  const char* at = static_cast<const char*>(p);
  auto after = std::upper_bound(ranges_.begin(), ranges_.end(), at,
                                [](const char* a, const Range& r) { return a < r.begin; });
  if (after == ranges_.begin()) return nullptr;
  const Range& range = *--after;
  return at + bytes <= range.end ? &range : nullptr;
}

void preempt() {
  if (block().running()) block().preempt();
}

void note_writing(const void* p, size_t bytes, Here here) { block().wrote(p, bytes, here); }

void Memory::check(const void* p, size_t bytes, size_t alignment, const char* verb, Here here,
                   Space space) const {
  const char* at = static_cast<const char*>(p);
  std::ostringstream what;
  what << verb << " " << bytes << " bytes";
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    const Range* range = find(p, 0);
    what << " at an address that is not a multiple of " << alignment;
    if (range != nullptr) what << " (" << range->name << " + " << at - range->begin << ")";
    fail(what.str(), here);
  }
  if (const Range* range = find(p, bytes)) {
    if (space == Space::kAny || range->shared == (space == Space::kShared)) return;
    fail(what.str() + " in " + range->name + ", which is " + (range->shared ? "" : "not ") +
             "in shared memory",
         here);
  }
  if (block().running()) {
    const char* stack = block().current().fibre.stack();
    if (at >= stack && at + bytes <= stack + Fibre::stack_bytes()) return;
  }
  // The nearest range tells which tensor was meant.
  const Range* nearest = nullptr;
  auto distance = [at](const Range& r) { return at < r.begin ? r.begin - at : at - r.end; };
  for (const Range& r : ranges_)
    if (nearest == nullptr || distance(r) < distance(*nearest)) nearest = &r;
  if (nearest == nullptr)
    what << ", but it was given no memory";
  else if (at < nearest->begin)
    what << ", " << nearest->begin - at << " bytes before " << nearest->name;
  else
    what << " at byte " << at - nearest->begin << " of " << nearest->name << ", which has "
         << nearest->end - nearest->begin;
  fail(what.str(), here);
}

#if defined(__SANITIZE_ADDRESS__)
void forbid(const void* begin, size_t bytes) { __asan_poison_memory_region(begin, bytes); }
void allow(const void* begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }
#else
void forbid(const void*, size_t) {}
void allow(const void*, size_t) {}
#endif

}  // namespace fastlora::emulator
