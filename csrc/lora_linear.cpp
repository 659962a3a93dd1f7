#include "lora_linear.h"

namespace fastlora {
namespace {

constexpr int64_t kMaxRank = 1024;  // of the CPU loop's buffer; see cpu/lora_linear.cpp
constexpr int64_t kMaxIn = 4096;

void check(const char* op, const LoraLinear& p) {
  const struct {
    const char* name;
    const TensorView& view;
  } arguments[] = {{"y", p.y},       {"x", p.x},       {"weight", p.weight}, {"bias", p.bias},
                   {"down", p.down}, {"up", p.up},     {"gate", p.gate},     {"row_scale", p.row_scale},
                   {"h", p.h}};
  for (const auto& a : arguments) {
    check_memory(op, a.name, a.view, p.y);
    if (p.y.cpu()) check_contiguous(op, a.name, a.view);
  }
  const DType gate_type = p.y.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  FASTLORA_CHECK(p.gate.dtype == gate_type, op, "gate", name_of(gate_type), p.gate);
  for (const TensorView* t : {&p.x, &p.weight, &p.bias, &p.down, &p.up, &p.row_scale})
    FASTLORA_CHECK(!t->defined || t->dtype == p.y.dtype, op, "argument", name_of(p.y.dtype), *t);
  if (p.y.cpu()) {
    FASTLORA_CHECK(p.rank <= kMaxRank, op, "up", "a rank of at most 1024 for the CPU loop", p.up);
    FASTLORA_CHECK(p.in <= kMaxIn, op, "x", "at most 4096 inputs for the CPU loop", p.x);
  }
}

void run(const char* op, LoraLinear& p) {
  p.out = p.up.shape[0];
  p.rank = p.up.shape[1];
  p.tokens = p.out > 0 ? p.y.numel() / p.out : 0;
  p.in = p.down.defined ? p.down.shape[1] : p.rank;
  const int64_t rows = p.gate.ndim == 2 ? p.gate.shape[0] : 1;
  p.tokens_per_row = rows > 0 ? p.tokens / rows : 0;
  check(op, p);
  if (p.tokens == 0 || p.out == 0) return;
  if (p.y.cpu()) {
    FASTLORA_CPU_CALL(lora_linear_loop, p);
    return;
  }
#ifdef FASTLORA_CUDA
  launch_lora_linear(p, current_stream(p.y));
#else
  FASTLORA_CHECK(false, op, "y", "a CPU tensor (this build has no CUDA kernels)", p.y);
#endif
}

}  // namespace

void lora_linear(TensorView y, TensorView x, TensorView weight, TensorView bias, TensorView down,
                 TensorView up, TensorView gate, TensorView row_scale, TensorView h) {
  LoraLinear p{y, x, weight, bias, down, up, gate, row_scale, h};
  run("lora_linear", p);
}

void lora_add_(TensorView y, TensorView x, TensorView down, TensorView up, TensorView gate,
               TensorView h) {
  LoraLinear p{y, x, {}, {}, down, up, gate, {}, h};
  run("lora_add_", p);
}

}  // namespace fastlora
