// One block of threads: fibres that run one at a time, each until it waits for others. In which
// order, how uninitialised memory looks and when asynchronous copies land is the Run's choice.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fault.h"
#include "fibre.h"

namespace fastlora::emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

// One way of executing an operator's kernels. A right kernel gives the same bits in all of them.
struct Run {
  enum class Order { kAscending, kDescending, kShuffled };  // who runs first: blocks, threads
  enum class Landing { kEarly, kLate, kAnyTime };           // when asynchronous copies take effect
  uint8_t poison = 0xff;  // bytes of memory that nobody has written
  Order order = Order::kAscending;
  Landing landing = Landing::kEarly;
  uint64_t seed = 0;
};
std::string describe(const Run& run);
// What red zones hold: neither the poison nor the same in all runs, so that reading them shows too.
inline uint8_t canary(const Run& run) { return run.poison ^ 0x99; }

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kBarriers = 16;

// Bytes that an earlier kernel writes, which a dependent one may not see before it has waited.
struct Unfinished {
  char* begin;
  std::vector<char> written;
};

struct Launch {
  const char* name = "";
  Index grid, block;
  size_t shared_bytes = 0;      // dynamic
  bool shared_allowed = false;  // by allow_shared_memory: with the static 48 KB are no limit
  bool dependent = false;       // may start before the kernel before it has finished
  std::function<void()> body;
  std::vector<Unfinished> previous;
};

struct Copy {  // cp.async
  char* to;
  const char* from;
  size_t bytes, valid;  // beyond `valid`: zeros
  Here here;
  bool landed = false;
};

// A warp's part of a wgmma, from its issue until somebody has waited for it.
struct Product {
  std::function<void(float*)> add_to;  // to what the accumulators hold, [lanes][accumulators]
  const float* sums = nullptr;         // the first lane's accumulators stand for all
  unsigned group = 0;                  // how many groups were committed before it
  Here here{"", 0};
  bool landed = false;
};

// The accumulators of wgmmas that nobody has waited for: what they hold meanwhile.
struct Sums {
  float* lanes[32];
  size_t count;  // of one lane
  std::vector<float> values;
};

struct Thread {
  Fibre fibre;
  Index index;
  unsigned linear = 0;
  std::vector<std::vector<Copy>> copies;  // groups; the last one is still open
  std::string waits_for;                  // for messages; empty while it runs
  unsigned product_groups = 0;            // of wgmmas, committed
  bool registers_fenced = false;          // wgmma.fence since the last wait
  uint32_t proxy_fences = 0;
  unsigned lane() const { return linear % kWarp; }
  unsigned warp() const { return linear / kWarp; }
};

// What a lane brings to a warp's rendezvous and where it wants the answer.
struct Arrival {
  const void* in = nullptr;
  void* out = nullptr;
};

class Block {
 public:
  Block();

  void run(const Launch& launch, Index block, const Run& run, uint64_t seed);

  // --- called by the thread that is running -----------------------------------------------------

  Thread& current() { return *current_; }
  bool running() const { return current_ != nullptr; }
  const Launch& launch() const { return *launch_; }
  Index index() const { return index_; }

  void sync_threads(Here here);                                  // __syncthreads
  void barrier(int id, unsigned threads, bool wait, Here here);  // bar.sync, bar.arrive
  // All lanes of `mask` come with the same `kind`; the last one combines.
  void collective(unsigned mask, const std::string& kind, Here here, const void* in, void* out,
                  const std::function<void(const Arrival*)>& combine);
  // Lanes of the caller's warp that exist and have not ended; only they take part.
  unsigned live_lanes() const;
  void preempt();

  // The array of a __shared__ declaration, which `key` stands for: one for all threads.
  void* shared(const void* key, size_t bytes, const char* name);
  void* dynamic_shared() { return dynamic_; }

  void copy_async(const Copy& copy);
  void commit_copies() { current().copies.emplace_back(); }
  void wait_copies(size_t groups_left);
  void wait_previous_kernel();

  // wgmma: the warp's part of one, by the last lane that comes; `what` is the same in the other
  // warps of the warpgroup.
  void issue_product(Product product, float* const (&sums)[32], size_t count,
                     const std::string& what);
  void fence_registers() { current().registers_fenced = true; }
  void commit_products() { ++current().product_groups; }
  void wait_products(unsigned groups_left, Here here);

  // What threads write to shared memory is not seen by wgmma before they have fenced it.
  void wrote(const void* p, size_t bytes, Here here);
  void fence_proxy() { ++current().proxy_fences; }
  // Shared memory as wgmma addresses it, and 16 bytes of it as wgmma reads them.
  uint32_t shared_address(const void* p, Here here) const;
  const void* read_by_product(uint32_t address, Here here) const;

 private:
  struct Barrier {
    unsigned arrived = 0, expected = 0;
    bool all = false;  // __syncthreads: everybody from one place
    Here here{"", 0};
    std::vector<Thread*> waiting;
  };
  struct Rendezvous {
    unsigned mask = 0, arrived = 0;
    std::string kind;
    Here here{"", 0};
    Arrival lanes[kWarp];
    std::vector<Thread*> waiting;
    std::function<void(const Arrival*)> combine;
  };

  struct Warp {
    std::deque<Product> products;  // in the order of their issue, in which they take effect
    std::map<const float*, Sums> sums;
    size_t issued = 0;
  };
  struct Warpgroup {
    std::vector<std::string> issued;  // by the first warp that came
    std::vector<Thread*> waiting;
  };
  struct Writing {  // who wrote 16 bytes of shared memory, and how often it had fenced before
    uint16_t thread = 0xffff;
    uint32_t fences = 0;
    Here here{"", 0};
  };

  void arrive(int id, unsigned expected, unsigned weight, bool wait, bool all, Here here);
  bool complete(Rendezvous& r, unsigned live);
  void pause(std::string waits_for);
  void wake(std::vector<Thread*>& threads);
  unsigned pick();
  void land(Copy& copy);
  void land(Warp& warp, Product& product);
  void record(const Copy& copy, uint32_t fences);
  void land_some();
  void hide_previous();
  void show_previous();
  void finish(Thread& thread);
  void check_shared();
  [[noreturn]] void deadlock();

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<uint64_t> ready_;  // a bit for each thread
  unsigned live_ = 0;
  Thread* current_ = nullptr;
  const Launch* launch_ = nullptr;
  Index index_;
  Run run_;
  std::mt19937_64 random_;
  std::exception_ptr failure_;

  Barrier barriers_[kBarriers];
  std::vector<std::vector<Rendezvous>> rendezvous_;  // of each warp
  std::vector<Warp> warps_;
  std::vector<Warpgroup> warpgroups_;
  std::vector<Writing> writings_;

  struct Array {
    const void* key;
    char* begin;
    size_t bytes;
    std::string name;
  };
  std::unique_ptr<char[]> memory_;
  char* arena_ = nullptr;
  size_t used_ = 0;
  std::vector<Array> arrays_;
  void* dynamic_ = nullptr;

  std::vector<std::vector<char>> hidden_;  // what `previous` holds while it is not to be seen
  bool waited_ = true;                     // the previous kernel has finished
  bool asked_ = false;                     // somebody of this block has waited for it
  std::vector<Thread*> waiting_previous_;
};

Block& block();

}  // namespace fastlora::emulator
