// The table of contents of fastlora._C: one m.def per operator.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "dispatcher.h"
#include "lora_linear.h"
#include "python_tensor.h"

namespace fastlora {
namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = FASTLORA_COMPILER;
  info["cuda"] = FASTLORA_CUDA_VERSION;       // "" without CUDA kernels
  info["cuda_archs"] = FASTLORA_CUDA_ARCHS;   // as given to the compiler
  info["cpu_isa"] = isa_name();
  return info;
}

}  // namespace
}  // namespace fastlora

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  using namespace fastlora;
  m.def("set_exchange_api", &set_exchange_api);
  m.def("build_info", &build_info);
  bind_dispatcher(m);

  m.def("lora_linear", &lora_linear);
  m.def("lora_add_", &lora_add_);
}
