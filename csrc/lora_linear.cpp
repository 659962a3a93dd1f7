#include "lora_linear.h"

#include <new>

namespace fastlora {
namespace {

// Limits of the loop for tiny additions; see cpu/lora_add.cpp.
constexpr int64_t kMaxRank = 1024;
constexpr int64_t kMaxIn = 4096;
constexpr int64_t kBriefWork = 1 << 17;  // multiplications, a few microseconds: the GIL is kept
constexpr int64_t kTinyWork = 1 << 12;   // multiplications; packing operands pays off beyond

// A contiguous tensor [..., columns] as the matrix that it is.
struct Flattened {
  int64_t shape[2], strides[2];
  void apply(TensorView& t) {
    if (t.ndim == 2 || t.ndim == 0 || !t.contiguous()) return;
    const int64_t columns = t.shape[t.ndim - 1];
    shape[0] = columns > 0 ? t.numel() / columns : 0;
    shape[1] = strides[0] = columns;
    strides[1] = 1;
    t.shape = shape;
    t.strides = strides;
    t.ndim = 2;
  }
};

bool tiny(const LoraLinear& p) {
  bool plain = p.gate.contiguous() && p.rank <= kMaxRank && p.in <= kMaxIn &&
               p.tokens * p.rank * (p.out + (p.down.defined ? p.in : 0)) <= kTinyWork;
  for (const TensorView* t : {&p.y, &p.x, &p.down, &p.up})
    plain = plain && (!t->defined || (t->contiguous() && t->dtype == p.y.dtype));
  return plain;
}

// What memory, dtypes and devices have to be. D, U may be float32 beside 16 bits on the CPU.
void check(const char* op, const LoraLinear& p) {
  const struct {
    const char* name;
    const TensorView& view;
    bool factor;
  } arguments[] = {{"y", p.y, false},
                   {"x", p.x, false},
                   {"weight", p.weight, false},
                   {"bias", p.bias, false},
                   {"down", p.down, true},
                   {"up", p.up, true},
                   {"row_scale", p.row_scale, false}};
  const DType wide = p.y.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  for (const auto& a : arguments) {
    check_memory(op, a.name, a.view, p.y);
    FASTLORA_CHECK(!a.view.defined || a.view.dtype == p.y.dtype ||
                       (p.y.cpu() && a.factor && a.view.dtype == wide),
                   op, a.name, name_of(p.y.dtype), a.view);
  }
  check_memory(op, "h", p.h, p.y);
  check_memory(op, "gate", p.gate, p.y);
  FASTLORA_CHECK(p.gate.dtype == wide, op, "gate", name_of(wide), p.gate);
}

// What the loop of lora_linear reads through pointers.
void check_rows(const char* op, const LoraLinear& p) {
  FASTLORA_CHECK(p.y.contiguous(), op, "y", "a contiguous tensor", p.y);
  const struct {
    const char* name;
    const TensorView& view;
  } matrices[] = {{"weight", p.weight}, {"down", p.down}, {"up", p.up}};
  for (const auto& [name, view] : matrices)
    FASTLORA_CHECK(view.defined && (view.strides[1] == 1 || view.shape[1] <= 1), op, name,
                   "a matrix whose rows are contiguous", view);
  check_contiguous(op, "bias", p.bias);
  check_contiguous(op, "row_scale", p.row_scale);
}

// What the forms on tensor cores need; without it they would read and write beside the matrices.
void check_form(const char* op, const LoraLinear& p) {
  const bool known = p.form >= Form::kTiled && p.form <= Form::kAppended;
  if (!known)
    throw std::invalid_argument(std::string(op) + ": form: expected 0 to 2, got " +
                                std::to_string(static_cast<int64_t>(p.form)));
  if (p.form != Form::kAppended && p.rank > 0)
    FASTLORA_CHECK(p.h.defined, op, "h", "scratch memory [tokens, rank]", p.h);
  if (p.form == Form::kTiled) return;
  FASTLORA_CHECK(p.y.dtype == DType::kFloat16 || p.y.dtype == DType::kBFloat16, op, "x",
                 "float16 or bfloat16 for tensor cores", p.x);
  const bool adds = !p.weight.defined && p.form == Form::kExtended;
  FASTLORA_CHECK(adds || (p.weight.defined && p.down.defined), op, "weight",
                 "a matrix for this form", p.weight);
  for (const TensorView* t : {&p.down, &p.up, &p.row_scale, &p.bias})
    FASTLORA_CHECK(!t->defined || t->dtype == p.y.dtype, op, "factor", name_of(p.y.dtype), *t);
  if (p.form == Form::kAppended)
    FASTLORA_CHECK(p.rank >= 1 && p.rank <= 32, op, "up", "a rank from 1 to 32 for this form",
                   p.up);
}

void linear_on_cpu(const LoraLinear& p) {
  bool out_of_memory = false;
  if (p.tokens * (p.in * p.out + p.rank * (p.in + p.out)) < kBriefWork) {
    FASTLORA_CPU_CALL(lora_linear_loop, p, out_of_memory);
  } else {
    const WithoutGil others_may_run;
    FASTLORA_CPU_CALL(lora_linear_loop, p, out_of_memory);
  }
  if (out_of_memory) throw std::bad_alloc();
}

void add_on_cpu(const LoraLinear& p) {
  if (p.rank == 0) return;
  if (tiny(p)) {
    FASTLORA_CPU_CALL(lora_add_tiny_loop, p);
    return;
  }
  bool out_of_memory = false;
  {
    const WithoutGil others_may_run;
    FASTLORA_CPU_CALL(lora_add_loop, p, out_of_memory);
  }
  if (out_of_memory) throw std::bad_alloc();
}

void run(const char* op, LoraLinear& p) {
  p.out = p.up.shape[0];
  p.rank = p.up.shape[1];
  p.tokens = p.out > 0 ? p.y.numel() / p.out : 0;
  p.in = p.down.defined ? p.down.shape[1] : p.rank;
  const int64_t rows = p.gate.ndim == 2 ? p.gate.shape[0] : 1;
  p.tokens_per_row = rows > 0 ? p.tokens / rows : 0;
  Flattened y, x;
  y.apply(p.y);
  x.apply(p.x);
  check(op, p);
  FASTLORA_CHECK(p.y.ndim == 2, op, "y", "a matrix, or contiguous memory", p.y);
  FASTLORA_CHECK(p.x.ndim == 2, op, "x", "a matrix, or contiguous memory", p.x);
  if (p.y.cpu() && p.weight.defined) check_rows(op, p);
  if (p.tokens == 0 || p.out == 0) return;
  if (p.y.cpu()) return p.weight.defined ? linear_on_cpu(p) : add_on_cpu(p);
  check_form(op, p);
#ifdef FASTLORA_CUDA
  launch_lora_linear(p, current_stream(p.y));
#else
  FASTLORA_CHECK(false, op, "y", "a CPU tensor (this build has no CUDA kernels)", p.y);
#endif
}

}  // namespace

void lora_linear(TensorView y, TensorView x, TensorView weight, TensorView bias, TensorView down,
                 TensorView up, TensorView gate, TensorView row_scale, TensorView h, int64_t form) {
  LoraLinear p{y, x, weight, bias, down, up, gate, row_scale, h};
  p.form = static_cast<Form>(form);
  run("lora_linear", p);
}

void lora_add_(TensorView y, TensorView x, TensorView down, TensorView up, TensorView gate,
               TensorView h, int64_t form) {
  LoraLinear p{y, x, {}, {}, down, up, gate, {}, h};
  p.form = static_cast<Form>(form);
  run("lora_add_", p);
}

}  // namespace fastlora
