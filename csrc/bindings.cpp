// The table of contents of fastlora._C: one m.def per operator.
#include <pybind11/pybind11.h>

#include "add_noise.h"
#include "cpu/isa.h"
#include "dispatcher.h"
#include "fold.h"
#include "heuristics.h"
#include "lora_linear.h"
#include "python_tensor.h"
#include "same_children.h"
#include "sampler_step.h"
#include "spectral_dots.h"
#include "spectral_weight.h"
#include "tiny_call.h"

namespace fastlora {
namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = FASTLORA_COMPILER;
  info["openmp"] = bool(FASTLORA_OPENMP);
  info["cpu_isa"] = isa_name();
  info["cuda"] = FASTLORA_CUDA_VERSION;      // "" without CUDA kernels
  info["cuda_archs"] = FASTLORA_CUDA_ARCHS;  // as given to the compiler
  info["cpu_only"] = FASTLORA_CPU_ONLY;      // why there are no CUDA kernels
  return info;
}

// Seconds of the plain layer, of the library's products, and of the extended and appended forms.
pybind11::tuple predict_lora_linear(int64_t tokens, int64_t in, int64_t out, int64_t rank,
                                    int capability, int multiprocessors) {
  const Gpu gpu = gpu_of(capability, multiprocessors);
  const LinearShape s{tokens, in, out, rank};
  return pybind11::make_tuple(plain_seconds(gpu, s), products_seconds(gpu, s),
                              extended_seconds(gpu, s), appended_seconds(gpu, s));
}

// Seconds of the plain layer and of every route on a CPU.
pybind11::dict predict_lora_linear_cpu(int64_t tokens, int64_t in, int64_t out, int64_t rank,
                                       int dtype, int isa, int threads) {
  const Cpu cpu = cpu_of(static_cast<DType>(dtype), static_cast<Isa>(isa), threads);
  const LinearShape s{tokens, in, out, rank};
  pybind11::dict seconds;
  seconds["plain"] = plain_seconds(cpu, s);
  seconds["loop"] = loop_seconds(cpu, s);
  seconds["around"] = around_seconds(cpu, s);
  seconds["products"] = products_seconds(cpu, s);
  return seconds;
}

// Seconds of lora_add_ by the library's products and by our kernels; in = 0: without down.
pybind11::tuple predict_lora_add(int64_t tokens, int64_t in, int64_t out, int64_t rank,
                                 int capability, int multiprocessors) {
  const Gpu gpu = gpu_of(capability, multiprocessors);
  const LinearShape s{tokens, in, out, rank};
  return pybind11::make_tuple(add_products_seconds(gpu, s), add_kernels_seconds(gpu, s));
}

}  // namespace
}  // namespace fastlora

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  using namespace fastlora;
  m.def("set_exchange_api", &set_exchange_api);
  m.def("build_info", &build_info);
  bind_dispatcher(m);
  bind_tiny_calls(m);
  m.def("predict_lora_linear", &predict_lora_linear);
  m.def("predict_lora_linear_cpu", &predict_lora_linear_cpu);
  m.def("predict_lora_add", &predict_lora_add);
  m.def("predict_fold", [](double bytes, int capability, int multiprocessors) {
    return fold_seconds(gpu_of(capability, multiprocessors), bytes);
  });
  m.def("predict_fold_cpu", [](double bytes) { return fold_seconds(bytes); });
  m.def("same_children", &same_children);

  m.def("lora_linear", &lora_linear);
  using pybind11::arg;
  m.def("lora_add_", &lora_add_, arg("y"), arg("x"), arg("down"), arg("up"), arg("gate"), arg("h"),
        arg("form") = 0);
  m.def("fold", &fold);
  m.def("spectral_weights", &spectral_weights);
  m.def("check_spectral_results", &check_spectral_results);
  m.def("spectral_scale", &spectral_scale);
  m.def("spectral_dots", &spectral_dots);
  m.def("dots_of_product", &dots_of_product);
  m.def("sampler_step", &sampler_step);
  m.def("add_noise", &add_noise);
}
