#include "block.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "call.h"
#include "memory.h"

namespace fastlora::emulator {
namespace {

// A GPU has up to 227 KB for a block; wgmma's addresses have 18 bits.
constexpr size_t kArena = 256 << 10, kArenaAlignment = 1024;
constexpr size_t kRedZone = 128;  // on both sides of every shared array
// What every GPU from sm_80 on has, and an sm_90.
constexpr size_t kStaticShared = 48 << 10, kAllShared = 99 << 10, kSharedOfHopper = 227 << 10;
constexpr uint32_t kOnItsWay = UINT32_MAX;  // a copy that nobody has waited for
constexpr unsigned kGroupWarps = 4;         // of a warpgroup
constexpr size_t kPoisonedStack = 4 << 10;

std::string bytes_in_words(uint8_t value) {
  std::ostringstream s;
  s << "0x" << std::hex << int(value);
  return s.str();
}

std::string words(Index i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

}  // namespace

std::string describe(Here here) {
  const char* slash = std::strrchr(here.file, '/');
  return std::string(slash ? slash + 1 : here.file) + ":" + std::to_string(here.line);
}

std::string describe(const Run& run) {
  const char* order = run.order == Run::Order::kAscending    ? "ascending threads"
                      : run.order == Run::Order::kDescending ? "descending threads"
                                                             : "shuffled threads";
  const char* landing = run.landing == Run::Landing::kEarly  ? "early copies"
                        : run.landing == Run::Landing::kLate ? "late copies"
                                                             : "copies at any time";
  return std::string(order) + ", " + landing + ", poison " + bytes_in_words(run.poison);
}

void fail(const std::string& what, Here here) {
  std::string place;
  Block& b = block();
  if (b.running())
    place = std::string("kernel ") + b.launch().name + ", block " + words(b.index()) + ", thread " +
            words(b.current().index) + ": ";
  throw Fault("emulator: " + place + what + " at " + describe(here));
}

Block& block() {
  static Block only;
  return only;
}

Block::Block() : memory_(new char[kArena + kArenaAlignment]) {
  const auto begin = reinterpret_cast<uintptr_t>(memory_.get());
  arena_ = memory_.get() + (kArenaAlignment - begin % kArenaAlignment) % kArenaAlignment;
}

// --- running -------------------------------------------------------------------------------------

void Block::run(const Launch& launch, Index index, const Run& run, uint64_t seed) {
  launch_ = &launch;
  index_ = index;
  run_ = run;
  random_.seed(seed);
  failure_ = nullptr;
  const auto count = unsigned(launch.block.count());
  while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
  ready_.assign((count + 63) / 64, 0);
  live_ = count;
  for (Barrier& b : barriers_) b = {};
  rendezvous_.assign((count + kWarp - 1) / kWarp, {});
  warps_.assign(rendezvous_.size(), {});
  warpgroups_.assign((warps_.size() + kGroupWarps - 1) / kGroupWarps, {});
  writings_.assign(kArena / 16, {});
  used_ = 0;
  arrays_.clear();
  dynamic_ =
      launch.shared_bytes ? shared(&launch, launch.shared_bytes, "dynamic shared memory") : nullptr;
  hide_previous();
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = *threads_[i];
    t.linear = i;
    t.index = {i % launch.block.x, i / launch.block.x % launch.block.y,
               i / launch.block.x / launch.block.y};
    t.copies.assign(1, {});
    t.product_groups = t.proxy_fences = 0;
    t.registers_fenced = false;
    t.waits_for.clear();
    allow(t.fibre.stack(), Fibre::stack_bytes());
    std::memset(t.fibre.stack() + Fibre::stack_bytes() - kPoisonedStack, run.poison,
                kPoisonedStack);
    t.fibre.start([this, &t] {
      try {
        launch_->body();
        finish(t);
      } catch (...) {
        failure_ = std::current_exception();
      }
    });
    ready_[i / 64] |= uint64_t(1) << (i % 64);
  }
  while (live_ > 0 && !failure_) {
    const unsigned next = pick();
    if (next == kMaxThreads) {
      if (!waiting_previous_.empty()) {  // the latest moment for it
        show_previous();
        wake(waiting_previous_);
        continue;
      }
      try {
        deadlock();
      } catch (...) {
        failure_ = std::current_exception();
      }
      break;
    }
    ready_[next / 64] &= ~(uint64_t(1) << (next % 64));
    current_ = threads_[next].get();
    current_->waits_for.clear();
    current_->fibre.resume();
    if (current_->fibre.done()) --live_;
    current_ = nullptr;
  }
  show_previous();
  waiting_previous_.clear();
  if (!failure_) check_shared();
  for (const Array& a : arrays_) memory().remove(a.begin);
  allow(arena_, kArena);
  if (failure_) std::rethrow_exception(failure_);
  if (launch.dependent && !asked_)
    throw Fault(std::string("emulator: kernel ") + launch.name + ", block " + words(index) +
                " never waits for the kernel before it, as a dependent one has to");
}

void Block::preempt() {
  if (run_.order != Run::Order::kShuffled || random_() % 16 != 0) return;
  Thread& me = current();
  ready_[me.linear / 64] |= uint64_t(1) << (me.linear % 64);
  pause("its turn");
}

// The ready thread whose turn it is; kMaxThreads if none is ready.
unsigned Block::pick() {
  const auto words = unsigned(ready_.size());
  if (run_.order == Run::Order::kAscending) {
    for (unsigned w = 0; w < words; ++w)
      if (ready_[w]) return w * 64 + unsigned(__builtin_ctzll(ready_[w]));
  } else if (run_.order == Run::Order::kDescending) {
    for (unsigned w = words; w-- > 0;)
      if (ready_[w]) return w * 64 + 63 - unsigned(__builtin_clzll(ready_[w]));
  } else {
    const unsigned from = unsigned(random_() % (words * 64));
    for (unsigned i = 0; i <= words; ++i) {  // the next one from a random place on, around the end
      const unsigned w = (from / 64 + i) % words;
      const uint64_t beyond = i == 0 ? ~uint64_t(0) << (from % 64) : ~uint64_t(0);
      if (ready_[w] & beyond) return w * 64 + unsigned(__builtin_ctzll(ready_[w] & beyond));
    }
  }
  return kMaxThreads;
}

void Block::pause(std::string waits_for) {
  land_some();
  current_->waits_for = std::move(waits_for);
  current_->fibre.pause();
}

void Block::wake(std::vector<Thread*>& threads) {
  for (Thread* t : threads) ready_[t->linear / 64] |= uint64_t(1) << (t->linear % 64);
  threads.clear();
}

void Block::finish(Thread& thread) {
  // Lanes that have ended take part in nothing: others may have waited for this one alone.
  const unsigned live = live_lanes() & ~(1u << thread.lane());
  auto& pending = rendezvous_[thread.warp()];
  for (size_t i = 0; i < pending.size();)
    if (complete(pending[i], live))
      pending.erase(pending.begin() + ptrdiff_t(i));
    else
      ++i;
  for (const auto& group : thread.copies)
    for (const Copy& copy : group)
      fail("ends with an asynchronous copy that nobody has waited for", copy.here);
  for (const Product& product : warps_[thread.warp()].products)
    fail("ends with a wgmma that nobody has waited for", product.here);
}

void Block::deadlock() {
  for (const auto& t : threads_) {
    if (t->linear >= launch_->block.count() || t->fibre.done()) continue;
    const Thread* missing = nullptr;  // preferably one that will never come
    for (const auto& other : threads_) {
      if (other->linear >= launch_->block.count() || other->waits_for == t->waits_for) continue;
      if (missing == nullptr || other->fibre.done()) missing = other.get();
    }
    std::string what = std::string("kernel ") + launch_->name + ", block " + words(index_) +
                       ", thread " + words(t->index) + " waits for ever for " + t->waits_for;
    if (missing != nullptr)
      what += "; thread " + words(missing->index) +
              (missing->fibre.done() ? " has ended" : " waits for " + missing->waits_for);
    throw Fault("emulator: " + what);
  }
  throw Fault("emulator: no thread can run");
}

// --- barriers and warps --------------------------------------------------------------------------

void Block::sync_threads(Here here) {
  arrive(0, unsigned(launch_->block.count()), 1, true, true, here);
}

void Block::barrier(int id, unsigned threads, bool wait, Here here) {
  if (id < 0 || id >= int(kBarriers))
    fail("uses barrier " + std::to_string(id) + ", there are 0 to 15", here);
  const unsigned warps = unsigned(launch_->block.count() + kWarp - 1) / kWarp;
  if (threads == 0 || threads % kWarp != 0 || threads > warps * kWarp)
    fail("uses a barrier of " + std::to_string(threads) +
             " threads; it takes a multiple of 32, at most the block",
         here);
  // A warp comes as a whole, and counts as one also where it is not full.
  const unsigned live = live_lanes();
  collective(0xffffffffu, "bar " + std::to_string(id), here, nullptr, nullptr,
             [](const Arrival*) {});
  const bool first = (live & (live - 1) & (1u << current().lane())) == 0 &&
                     (live & ((1u << current().lane()) - 1)) == 0;
  const unsigned weight = first ? kWarp - unsigned(__builtin_popcount(live)) + 1 : 1;
  arrive(id, threads, weight, wait, false, here);
}

unsigned Block::live_lanes() const {
  unsigned live = 0;
  const unsigned first = current_->warp() * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (first + lane < launch_->block.count() && !threads_[first + lane]->fibre.done())
      live |= 1u << lane;
  return live;
}

// Whether all have come; then the answers are there and those who wait may go on.
bool Block::complete(Rendezvous& r, unsigned live) {
  if (r.arrived != (r.mask & live)) return false;
  r.combine(r.lanes);
  wake(r.waiting);
  return true;
}

void Block::arrive(int id, unsigned expected, unsigned weight, bool wait, bool all, Here here) {
  Barrier& b = barriers_[id];
  if (b.arrived == 0) {
    b.expected = expected;
    b.all = all;
    b.here = here;
  } else if (b.expected != expected || b.all != all) {
    fail("comes to barrier " + std::to_string(id) + " with " + std::to_string(expected) +
             " threads, others with " + std::to_string(b.expected) + " at " + describe(b.here),
         here);
  } else if (all && b.here != here) {
    fail("comes to a __syncthreads while others wait at that of " + describe(b.here), here);
  }
  if ((b.arrived += weight) == b.expected) {
    b.arrived = 0;
    wake(b.waiting);
    if (wait) land_some();
    return;
  }
  if (!wait) return;
  b.waiting.push_back(current_);
  pause((all ? "__syncthreads at " : "barrier " + std::to_string(id) + " at ") + describe(here));
}

void Block::collective(unsigned mask, const std::string& kind, Here here, const void* in, void* out,
                       const std::function<void(const Arrival*)>& combine) {
  Thread& me = current();
  if ((mask >> me.lane() & 1) == 0) fail(kind + " with a mask that leaves out the caller", here);
  auto& pending = rendezvous_[me.warp()];
  auto r = std::find_if(pending.begin(), pending.end(),
                        [mask](const Rendezvous& p) { return p.mask == mask; });
  if (r == pending.end()) {
    pending.emplace_back();
    r = pending.end() - 1;
    r->mask = mask;
    r->kind = kind;
    r->here = here;
    r->combine = combine;
  } else if (r->kind != kind) {
    fail(kind + " meets " + r->kind + " at " + describe(r->here) + " in the same warp", here);
  }
  r->arrived |= 1u << me.lane();
  r->lanes[me.lane()] = {in, out};
  if (complete(*r, live_lanes())) {
    pending.erase(r);
    land_some();
    return;
  }
  r->waiting.push_back(&me);
  pause(kind + " at " + describe(here));
}

// --- shared memory -------------------------------------------------------------------------------

void* Block::shared(const void* key, size_t bytes, const char* name) {
  for (const Array& a : arrays_)
    if (a.key == key) return a.begin;
  const size_t begin = (used_ + kRedZone + 127) / 128 * 128;
  size_t total = bytes;
  for (const Array& a : arrays_) total += a.bytes;
  const bool is_static = key != launch_;
  const size_t most = capability() == 90 ? kSharedOfHopper : kAllShared;
  if (total > most || (is_static && total - launch_->shared_bytes > kStaticShared))
    throw Fault(std::string("emulator: kernel ") + launch_->name + " uses " +
                std::to_string(total) + " bytes of shared memory");
  if (total > kStaticShared && !launch_->shared_allowed)  // the launch fails on a GPU
    throw Fault(std::string("emulator: kernel ") + launch_->name + ": " + std::to_string(total) +
                " bytes of shared memory; more than 48 KB need allow_shared_memory");
  char* array = arena_ + begin;
  allow(arena_ + used_, begin + bytes + kRedZone - used_);
  std::memset(arena_ + used_, canary(run_), begin - used_);
  std::memset(array, run_.poison, bytes);
  std::memset(array + bytes, canary(run_), kRedZone);
  forbid(arena_ + used_, begin - used_);
  forbid(array + bytes, kRedZone);
  used_ = begin + bytes;
  arrays_.push_back({key, array, bytes, name});
  memory().add({array, array + bytes, name, true});
  return array;
}

void Block::check_shared() {
  allow(arena_, kArena);
  for (const Array& a : arrays_)
    for (size_t i = 0; i < kRedZone; ++i) {
      const bool before = uint8_t(a.begin[-1 - ptrdiff_t(i)]) != canary(run_);
      const bool after = uint8_t(a.begin[a.bytes + i]) != canary(run_);
      if (before || after)
        throw Fault(std::string("emulator: kernel ") + launch_->name + ", block " + words(index_) +
                    " writes " + std::to_string(i + 1) + " bytes " +
                    (before ? "before " : "beyond ") + a.name);
    }
}

// --- asynchronous copies -------------------------------------------------------------------------

void Block::copy_async(const Copy& copy) {
  if (copy.valid > copy.bytes)
    fail("copies " + std::to_string(int64_t(copy.valid)) + " of " + std::to_string(copy.bytes) +
             " bytes",
         copy.here);
  memory().check(copy.to, copy.bytes, copy.bytes, "copies", copy.here, Space::kShared);
  if (copy.valid > 0)
    memory().check(copy.from, copy.valid, copy.bytes, "copies", copy.here, Space::kGlobal);
  // From now on until somebody has waited nothing is certain about what lies there.
  std::memset(copy.to, run_.poison, copy.bytes);
  record(copy, kOnItsWay);
  land_some();
  current().copies.back().push_back(copy);
  if (run_.landing == Run::Landing::kEarly) land(current().copies.back().back());
}

void Block::land(Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
  copy.landed = true;
}

void Block::land_some() {
  if (run_.landing != Run::Landing::kAnyTime) return;
  for (auto& group : current().copies)
    for (Copy& copy : group)
      if (!copy.landed && random_() % 3 == 0) land(copy);
  Warp& warp = warps_[current().warp()];
  for (Product& product : warp.products) {
    if (product.landed) continue;
    if (random_() % 3 != 0) break;
    land(warp, product);
  }
}

void Block::wait_copies(size_t groups_left) {
  auto& groups = current().copies;  // the last one is not committed and not waited for
  const size_t committed = groups.size() - 1;
  const size_t finished = committed > groups_left ? committed - groups_left : 0;
  for (size_t i = 0; i < finished; ++i)
    for (Copy& copy : groups[i]) {
      if (!copy.landed) land(copy);
      record(copy, current().proxy_fences);
    }
  groups.erase(groups.begin(), groups.begin() + ptrdiff_t(finished));
}

// --- warpgroups ----------------------------------------------------------------------------------

void Block::issue_product(Product product, float* const (&sums)[32], size_t count,
                          const std::string& what) {
  const unsigned index = current().warp();
  Warp& warp = warps_[index];
  Warpgroup& group = warpgroups_[index / kGroupWarps];
  if ((index / kGroupWarps + 1) * kGroupWarps > warps_.size())
    fail("a wgmma by fewer than four warps", product.here);
  if (warp.issued == group.issued.size())
    group.issued.push_back(what);
  else if (group.issued[warp.issued] != what)
    fail(what + " while another warp of the warpgroup has " + group.issued[warp.issued],
         product.here);
  ++warp.issued;
  wake(group.waiting);
  Sums& held = warp.sums[sums[0]];
  if (held.values.empty()) {  // no wgmma is on its way to them
    held.count = count;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      held.lanes[lane] = sums[lane];
      held.values.insert(held.values.end(), sums[lane], sums[lane] + count);
      std::memset(sums[lane], run_.poison, count * sizeof(float));
    }
  }
  product.sums = sums[0];
  product.group = current().product_groups;
  warp.products.push_back(std::move(product));
  if (run_.landing == Run::Landing::kEarly) land(warp, warp.products.back());
}

void Block::land(Warp& warp, Product& product) {
  product.add_to(warp.sums[product.sums].values.data());
  product.landed = true;
}

void Block::wait_products(unsigned groups_left, Here here) {
  Thread& me = current();
  me.registers_fenced = false;
  Warp& warp = warps_[me.warp()];
  // What one warp waits for is done by all four.
  Warpgroup& group = warpgroups_[me.warp() / kGroupWarps];
  const auto others = [&] {
    size_t least = warp.issued;
    const size_t first = me.warp() / kGroupWarps * kGroupWarps;
    for (size_t w = first; w < first + kGroupWarps && w < warps_.size(); ++w)
      least = std::min(least, warps_[w].issued);
    return least;
  };
  const auto finished = [&](const Product& p) { return p.group + groups_left < me.product_groups; };
  collective(0xffffffffu, "wgmma.wait_group " + std::to_string(groups_left), here, nullptr, nullptr,
             [](const Arrival*) {});
  size_t done = warp.issued - warp.products.size();
  for (const Product& product : warp.products) done += finished(product);
  while (others() < done) {
    group.waiting.push_back(&me);
    pause("the wgmma of the other warps of its warpgroup, at " + describe(here));
  }
  while (!warp.products.empty() && finished(warp.products.front())) {
    if (!warp.products.front().landed) land(warp, warp.products.front());
    warp.products.pop_front();
  }
  for (auto held = warp.sums.begin(); held != warp.sums.end();) {
    const bool pending =
        std::any_of(warp.products.begin(), warp.products.end(),
                    [&](const Product& product) { return product.sums == held->first; });
    if (pending) {
      ++held;
      continue;
    }
    Sums& s = held->second;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      std::memcpy(s.lanes[lane], &s.values[lane * s.count], s.count * sizeof(float));
    held = warp.sums.erase(held);
  }
  land_some();
}

void Block::record(const Copy& copy, uint32_t fences) {
  const auto thread = uint16_t(current().linear);
  const auto begin = size_t(copy.to - arena_);
  for (size_t i = begin / 16; i < (begin + copy.bytes + 15) / 16; ++i)
    writings_[i] = {thread, fences, copy.here};
}

void Block::wrote(const void* p, size_t bytes, Here here) {
  const char* at = static_cast<const char*>(p);
  if (!running() || bytes == 0 || at < arena_ || at + bytes > arena_ + kArena) return;
  const auto begin = size_t(at - arena_);
  for (size_t i = begin / 16; i < (begin + bytes + 15) / 16; ++i)
    writings_[i] = {uint16_t(current().linear), current().proxy_fences, here};
}

uint32_t Block::shared_address(const void* p, Here here) const {
  const char* at = static_cast<const char*>(p);
  if (at < arena_ || at >= arena_ + kArena) fail("a pointer that is not to shared memory", here);
  return uint32_t(at - arena_);
}

const void* Block::read_by_product(uint32_t address, Here here) const {
  if (address >= kArena) fail("a wgmma reads beyond the addresses of shared memory", here);
  const char* at = arena_ + address;
  memory().check(at, 16, 16, "a wgmma reads", here, Space::kShared);
  const Writing& w = writings_[address / 16];
  if (w.thread != 0xffff && (w.fences == kOnItsWay || w.fences == threads_[w.thread]->proxy_fences))
    fail("a wgmma reads shared memory that thread " + words(threads_[w.thread]->index) +
             " writes at " + describe(w.here) + " without a fence.proxy.async after it",
         here);
  return at;
}

// --- the kernel before this one ------------------------------------------------------------------

void Block::hide_previous() {
  hidden_.clear();
  asked_ = false;
  waited_ = launch_->previous.empty();
  for (const Unfinished& u : launch_->previous) {
    hidden_.emplace_back(u.begin, u.begin + u.written.size());
    for (size_t i = 0; i < u.written.size(); ++i)
      if (u.written[i]) u.begin[i] = char(run_.poison);
  }
}

void Block::show_previous() {
  if (waited_) return;
  waited_ = true;
  for (size_t k = 0; k < hidden_.size(); ++k) {
    const Unfinished& u = launch_->previous[k];
    for (size_t i = 0; i < u.written.size(); ++i)
      if (u.written[i]) u.begin[i] = hidden_[k][i];
  }
}

void Block::wait_previous_kernel() {
  asked_ = true;
  if (waited_) return;
  if (run_.landing == Run::Landing::kEarly) return show_previous();
  waiting_previous_.push_back(current_);
  pause("the kernel before this one");
}

}  // namespace fastlora::emulator
