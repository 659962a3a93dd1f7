#include "call.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>

#include "memory.h"

namespace fastlora::emulator {
namespace {

constexpr size_t kZone = 512;  // bytes on both sides; copies keep addresses modulo kZone / 2

// NaN and true; large, true; zero, false; a large negative number: what comparisons let through
// under one of them shows under another.
constexpr uint8_t kPoisons[] = {0xff, 0x5a, 0x00, 0xc7};

Call* g_call = nullptr;
std::mutex g_mutex;  // one emulated device, one call at a time

size_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    default: return 4;
  }
}

// "[3, 17]" of the element at `byte` of the memory that the view spans; empty if there is none.
std::string subscript(const TensorView& t, size_t byte, size_t element) {
  std::vector<int64_t> i(size_t(t.ndim), 0);
  for (int64_t n = 0; n < t.numel(); ++n) {
    int64_t at = 0;
    for (int32_t d = 0; d < t.ndim; ++d) at += i[size_t(d)] * t.strides[d];
    if (size_t(at) * element <= byte && byte < size_t(at + 1) * element) {
      std::string s = "[";
      for (int32_t d = 0; d < t.ndim; ++d) s += (d ? ", " : "") + std::to_string(i[size_t(d)]);
      return s + "]";
    }
    for (int32_t d = t.ndim - 1; d >= 0; --d) {
      if (++i[size_t(d)] < t.shape[d]) break;
      i[size_t(d)] = 0;
    }
  }
  return "";
}

}  // namespace

Call& current_call() {
  if (g_call == nullptr) throw Fault("emulator: a kernel is launched outside of a call");
  return *g_call;
}

namespace {
std::map<const void*, size_t> g_allowed;
std::vector<std::string> g_launches;
int g_capability = 90;
}  // namespace

const std::vector<std::string>& launches() { return g_launches; }
int capability() { return g_capability; }
void set_capability(int value) { g_capability = value; }

void allow_shared_memory(const void* kernel, size_t bytes) { g_allowed[kernel] = bytes; }

bool shared_memory_allowed(const void* kernel, size_t bytes) {
  const auto found = g_allowed.find(kernel);
  return found != g_allowed.end() && found->second >= bytes;
}

Call::Call(const char* op, int runs, uint64_t seed) : op_(op) {
  using Order = Run::Order;
  using Landing = Run::Landing;
  runs_ = {{kPoisons[0], Order::kAscending, Landing::kEarly, seed},
           {kPoisons[1], Order::kDescending, Landing::kLate, seed + 1}};
  std::mt19937_64 random(seed);
  for (int i = 2; i < runs; ++i)
    runs_.push_back({kPoisons[i % 4], Order::kShuffled, Landing::kAnyTime, random()});
  if (runs < 2) runs_.resize(1);
}

void Call::add(std::string name, TensorView& view, Role role) {
  if (!view.defined || view.data == nullptr || view.numel() == 0) return;
  FASTLORA_CHECK(view.device.device_type == kDLCPU, op_, name, "a CPU tensor under emulated()",
                 view);
  const size_t element = element_bytes(view.dtype);
  int64_t last = 0;  // torch has no negative strides
  for (int32_t d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  arguments_.push_back(
      {std::move(name), &view, role, view.ptr<char>(), size_t(last + 1) * element, element, 0});
}

void Call::find_spans() {
  std::vector<size_t> order(arguments_.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [this](size_t a, size_t b) { return arguments_[a].begin < arguments_[b].begin; });
  for (const size_t i : order) {
    Argument& a = arguments_[i];
    Span* last = spans_.empty() ? nullptr : &spans_.back();
    if (last == nullptr || a.begin >= last->begin + last->bytes) {
      spans_.push_back({});
      last = &spans_.back();
      last->begin = a.begin;
    }
    last->bytes = std::max(last->bytes, size_t(a.begin + a.bytes - last->begin));
    last->name += (last->name.empty() ? "" : " = ") + a.name;
    a.span = spans_.size() - 1;
  }
  for (Span& s : spans_) {
    s.mine.assign(s.bytes, 0);
    s.ignored.assign(s.bytes, 0);
  }
  for (const Argument& a : arguments_) {
    Span& s = spans_[a.span];
    if (a.role == Role::kIn) continue;
    std::vector<char>& marks = a.role == Role::kScratch ? s.ignored : s.mine;
    for_each_element(
        a, [&](size_t at) { std::memset(marks.data() + (a.begin - s.begin) + at, 1, a.element); });
  }
}

void Call::for_each_element(const Argument& a, const std::function<void(size_t)>& f) const {
  const TensorView& t = *a.view;
  std::vector<int64_t> i(size_t(t.ndim), 0);
  for (int64_t n = t.numel(); n > 0; --n) {
    int64_t at = 0;
    for (int32_t d = 0; d < t.ndim; ++d) at += i[size_t(d)] * t.strides[d];
    f(size_t(at) * a.element);
    for (int32_t d = t.ndim - 1; d >= 0; --d) {
      if (++i[size_t(d)] < t.shape[d]) break;
      i[size_t(d)] = 0;
    }
  }
}

// Fresh copies, what is only written filled with the run's poison.
void Call::prepare(const Run& run) {
  for (Span& s : spans_) {
    if (s.memory.empty()) s.memory.resize(s.bytes + 3 * kZone);
    allow(s.memory.data(), s.memory.size());
    std::memset(s.memory.data(), canary(run), s.memory.size());
    // The same address modulo 256: kernels choose their accesses by it.
    const size_t wanted = reinterpret_cast<uintptr_t>(s.begin) % (kZone / 2);
    char* at = s.memory.data() + kZone;
    at += (wanted + kZone / 2 - reinterpret_cast<uintptr_t>(at) % (kZone / 2)) % (kZone / 2);
    s.copy = at;
    std::memcpy(s.copy, s.begin, s.bytes);
  }
  for (const Argument& a : arguments_)
    if (a.role == Role::kOut || a.role == Role::kScratch) {
      bool input_too = false;  // an in-place call
      for (const Argument& b : arguments_)
        input_too = input_too || (&a != &b && b.span == a.span && b.role != Role::kScratch &&
                                  b.begin < a.begin + a.bytes && a.begin < b.begin + b.bytes);
      if (input_too) continue;
      char* base = spans_[a.span].copy + (a.begin - spans_[a.span].begin);
      for_each_element(a, [&](size_t at) { std::memset(base + at, run.poison, a.element); });
    }
  for (Span& s : spans_) {
    forbid(s.memory.data(), size_t(s.copy - s.memory.data()));
    char* end = s.copy + s.bytes;
    forbid(end, size_t(s.memory.data() + s.memory.size() - end));
    memory().add({s.copy, end, s.name});
  }
}

void Call::run(const std::function<void()>& entry) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  find_spans();
  std::vector<void*> originals;
  for (const Argument& a : arguments_) originals.push_back(a.view->data);
  const auto restore = [&] {
    for (size_t i = 0; i < arguments_.size(); ++i) arguments_[i].view->data = originals[i];
    for (Span& s : spans_) allow(s.memory.data(), s.memory.size());
    memory().clear();
    g_call = nullptr;
  };
  try {
    for (const Run& run : runs_) {
      restore();
      g_call = this;
      one(run, entry);
    }
  } catch (...) {
    restore();
    throw;
  }
  restore();
  g_launches = kernels_;
  for (Span& s : spans_)
    for (size_t i = 0; i < s.bytes; ++i)
      if (s.mine[i]) s.begin[i] = s.result[i];
}

void Call::one(const Run& run, const std::function<void()>& entry) {
  run_ = &run;
  launches_ = 0;
  kernels_.clear();
  before_.clear();
  prepare(run);
  for (Argument& a : arguments_) {
    const Span& s = spans_[a.span];
    a.view->data = s.copy + (a.view->ptr<char>() - s.begin);
  }
  entry();
  check(run);
  compare(run);
}

void Call::launch(Launch& l, bool dependent) {
  if (l.block.count() == 0 || l.block.count() > kMaxThreads || l.grid.count() == 0 ||
      l.grid.x > INT32_MAX || l.grid.y > 65535 || l.grid.z > 65535 || l.block.z > 64)
    throw Fault("emulator: kernel " + std::string(l.name) + ": no GPU takes this grid or block");
  l.dependent = dependent;
  if (dependent)
    for (size_t i = 0; i < spans_.size(); ++i) {
      const Span& s = spans_[i];
      // The first kernel of a call follows somebody else's, who may have written any of it.
      Unfinished u{s.copy, std::vector<char>(s.bytes, 1)};
      if (!before_.empty())
        for (size_t k = 0; k < s.bytes; ++k) u.written[k] = s.copy[k] != before_[i][k];
      l.previous.push_back(std::move(u));
    }
  before_.clear();
  for (const Span& s : spans_) before_.emplace_back(s.copy, s.copy + s.bytes);

  std::vector<uint64_t> order(l.grid.count());
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(run_->seed + ++launches_);
  if (run_->order == Run::Order::kDescending) std::reverse(order.begin(), order.end());
  if (run_->order == Run::Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
  for (const uint64_t b : order) {
    const Index index{unsigned(b % l.grid.x), unsigned(b / l.grid.x % l.grid.y),
                      unsigned(b / l.grid.x / l.grid.y)};
    block().run(l, index, *run_, random());
  }
  kernels_.push_back(l.name);
}

// Red zones, inputs and the gaps between elements are as they were.
void Call::check(const Run& run) {
  for (const Span& s : spans_) {
    allow(s.memory.data(), s.memory.size());
    const char* end = s.copy + s.bytes;
    for (const char* p = s.memory.data(); p < s.memory.data() + s.memory.size(); ++p) {
      if (p == s.copy) p = end;
      if (uint8_t(*p) == canary(run)) continue;
      const std::string where = p < s.copy ? std::to_string(s.copy - p) + " bytes before "
                                           : std::to_string(p - end + 1) + " bytes beyond ";
      throw Fault("emulator: " + op_ + " writes " + where + s.name + " (" + describe(run) + ")");
    }
    for (size_t i = 0; i < s.bytes; ++i)
      if (!s.mine[i] && !s.ignored[i] && s.copy[i] != s.begin[i])
        throw Fault("emulator: " + op_ + " changes byte " + std::to_string(i) + " of " + s.name +
                    ", which is no element of an output (" + describe(run) + ")");
  }
}

void Call::compare(const Run& run) {
  if (&run == &runs_[0]) {
    for (Span& s : spans_) s.result.assign(s.copy, s.copy + s.bytes);
    return;
  }
  for (size_t i = 0; i < spans_.size(); ++i)
    for (size_t k = 0; k < spans_[i].bytes; ++k)
      if (spans_[i].mine[k] && spans_[i].copy[k] != spans_[i].result[k]) differ(run, i, k);
}

void Call::differ(const Run& run, size_t span, size_t byte) {
  std::string place = spans_[span].name;
  for (const Argument& a : arguments_) {
    if (a.span != span || a.role == Role::kIn) continue;
    const auto offset = size_t(a.begin - spans_[span].begin);
    const std::string element = byte < offset ? "" : subscript(*a.view, byte - offset, a.element);
    if (!element.empty()) place = a.name + element;
  }
  std::string kernels;
  for (const std::string& name : kernels_) kernels += (kernels.empty() ? "" : ", ") + name;
  throw Fault(
      "emulator: " + op_ + ": " + place + " depends on how it is executed: other bits under " +
      describe(run) + " than under " + describe(runs_[0]) +
      ". Unwritten memory is read or kept, threads race, or a barrier is missing. Kernels: " +
      kernels);
}

}  // namespace fastlora::emulator
