// fastlora._emulator: the entries of fastlora._C that launch kernels, on tensors in the CPU's
// memory. Which argument has which Role is said here and nowhere else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../add_noise.h"
#include "../fold.h"
#include "../lora_linear.h"
#include "../python_tensor.h"
#include "../sampler_step.h"
#include "../spectral_dots.h"
#include "../spectral_weight.h"
#include "call.h"

namespace fastlora::emulator {
namespace {

int g_runs = 4;
uint64_t g_seed = 0;

struct Argument {
  const char* name;
  TensorView& view;
  Role role;
};

constexpr Role kIn = Role::kIn, kOut = Role::kOut, kInOut = Role::kInOut, kScratch = Role::kScratch;

template <class F>
void run(const char* op, std::initializer_list<Argument> arguments, const F& entry) {
  Call call(op, g_runs, g_seed);
  for (const Argument& a : arguments) call.add(a.name, a.view, a.role);
  call.run(entry);
}

void add_all(Call& call, const char* name, TensorViews& views, Role role) {
  for (size_t i = 0; i < views.size(); ++i)
    call.add(std::string(name) + "[" + std::to_string(i) + "]", views[i], role);
}

void configure(int runs, uint64_t seed) {
  if (runs < 1)
    throw std::invalid_argument("emulated: runs: expected at least 1, got " + std::to_string(runs));
  g_runs = runs;
  g_seed = seed;
}

}  // namespace
}  // namespace fastlora::emulator

PYBIND11_MODULE(_emulator, m) {
  using namespace fastlora;
  using namespace fastlora::emulator;
  m.def("set_exchange_api", &set_exchange_api);
  m.def("configure", &configure);
  m.def("launches", &launches);
  m.def("capability", &capability);
  m.def("set_capability", &set_capability);
  pybind11::register_exception<Fault>(m, "KernelFault", PyExc_RuntimeError);

  m.def("lora_linear", [](TensorView y, TensorView x, TensorView weight, TensorView bias,
                          TensorView down, TensorView up, TensorView gate, TensorView row_scale,
                          TensorView h, int64_t form) {
    run("lora_linear",
        {{"y", y, kOut},
         {"x", x, kIn},
         {"weight", weight, kIn},
         {"bias", bias, kIn},
         {"down", down, kIn},
         {"up", up, kIn},
         {"gate", gate, kIn},
         {"row_scale", row_scale, kIn},
         {"h", h, kScratch}},
        [&] { fastlora::lora_linear(y, x, weight, bias, down, up, gate, row_scale, h, form); });
  });
  m.def("lora_add_", [](TensorView y, TensorView x, TensorView down, TensorView up, TensorView gate,
                        TensorView h, int64_t form) {
    run("lora_add_",
        {{"y", y, kInOut},
         {"x", x, kIn},
         {"down", down, kIn},
         {"up", up, kIn},
         {"gate", gate, kIn},
         {"h", h, kScratch}},
        [&] { fastlora::lora_add_(y, x, down, up, gate, h, form); });
  });
  m.def("fold", [](TensorViews weights, TensorViews downs, TensorViews ups, TensorViews gates,
                   TensorViews outs) {
    Call call("fold", g_runs, g_seed);
    add_all(call, "weights", weights, kIn);
    add_all(call, "downs", downs, kIn);
    add_all(call, "ups", ups, kIn);
    add_all(call, "gates", gates, kIn);
    add_all(call, "outs", outs, kOut);
    call.run([&] { fastlora::fold(weights, downs, ups, gates, outs); });
  });
  m.def("spectral_weights", [](TensorViews weights, TensorViews us, TensorViews ss, TensorViews vhs,
                               TensorViews shifts, TensorViews strengths, TensorViews outs) {
    Call call("spectral_weights", g_runs, g_seed);
    add_all(call, "weights", weights, kIn);
    add_all(call, "us", us, kIn);
    add_all(call, "ss", ss, kIn);
    add_all(call, "vhs", vhs, kIn);
    add_all(call, "shifts", shifts, kIn);
    add_all(call, "strengths", strengths, kIn);
    add_all(call, "outs", outs, kOut);
    call.run([&] { fastlora::spectral_weights(weights, us, ss, vhs, shifts, strengths, outs); });
  });
  m.def("spectral_dots", [](TensorViews sums, TensorView partial, TensorViews grads, TensorViews us,
                            TensorViews vhs) {
    Call call("spectral_dots", g_runs, g_seed);
    add_all(call, "sums", sums, kOut);
    call.add("partial", partial, kScratch);
    add_all(call, "grads", grads, kIn);
    add_all(call, "us", us, kIn);
    add_all(call, "vhs", vhs, kIn);
    call.run([&] { fastlora::spectral_dots(sums, partial, grads, us, vhs); });
  });
  m.def("sampler_step", [](TensorView x_next, TensorView history_next, TensorView model_input,
                           TensorView statistics, TensorView x, TensorViews outputs,
                           TensorView weights, TensorView table, TensorView step,
                           TensorView history, TensorView seeds, TensorView noise,
                           TensorView rescale, TensorView mask, TensorView known, double quantile,
                           double threshold_max, int64_t copies) {
    Call call("sampler_step", g_runs, g_seed);
    for (const Argument& a : std::initializer_list<Argument>{{"x'", x_next, kOut},
                                                             {"h'", history_next, kOut},
                                                             {"model input", model_input, kOut},
                                                             {"statistics", statistics, kScratch},
                                                             {"x", x, kIn},
                                                             {"weights", weights, kIn},
                                                             {"table", table, kIn},
                                                             {"step", step, kIn},
                                                             {"history", history, kIn},
                                                             {"seeds", seeds, kIn},
                                                             {"noise", noise, kIn},
                                                             {"rescale", rescale, kIn},
                                                             {"mask", mask, kIn},
                                                             {"known", known, kIn}})
      call.add(a.name, a.view, a.role);
    add_all(call, "outputs", outputs, kIn);
    call.run([&] {
      fastlora::sampler_step(x_next, history_next, model_input, statistics, x, outputs, weights,
                             table, step, history, seeds, noise, rescale, mask, known, quantile,
                             threshold_max, copies);
    });
  });
  m.def("add_noise", [](TensorView x_t, TensorView target, TensorView x0, TensorView noise,
                        TensorView seeds, TensorView t, TensorView table) {
    run("add_noise",
        {{"x_t", x_t, kOut},
         {"target", target, kOut},
         {"x0", x0, kIn},
         {"noise", noise, kIn},
         {"seeds", seeds, kIn},
         {"t", t, kIn},
         {"table", table, kIn}},
        [&] { fastlora::add_noise(x_t, target, x0, noise, seeds, t, table); });
  });
}
