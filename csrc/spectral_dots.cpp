#include "spectral_dots.h"

namespace fastlora {
namespace {

constexpr const char* kOp = "spectral_dots";

void check_sizes(const char* name, const TensorView& t) {
  constexpr int64_t kLimit = INT32_MAX - 256;  // a tile may reach beyond the edge
  for (int i = 0; i < 2; ++i) {
    FASTLORA_CHECK(t.shape[i] <= kLimit, kOp, name, "dimensions below 2^31", t);
    FASTLORA_CHECK(t.shape[i] <= 1 || t.strides[i] <= INT32_MAX, kOp, name,
                   "strides below 2^31 elements on CUDA", t);
  }
}

SpectralDots dots_layer(const TensorView& sums, const TensorView& grad, const TensorView& u,
                        const TensorView& vh) {
  const TensorView* matrices[] = {&grad, &u, &vh};
  const char* names[] = {"grads", "us", "vhs"};
  for (int i = 0; i < 3; ++i) {
    check_memory(kOp, names[i], *matrices[i], sums);
    check_sizes(names[i], *matrices[i]);
  }
  FASTLORA_CHECK(grad.dtype != DType::kFloat64, kOp, "grads",
                 "float32, float16 or bfloat16 on CUDA", grad);
  FASTLORA_CHECK(sums.dtype == DType::kFloat32, kOp, "sums", "float32", sums);
  check_contiguous(kOp, "sums", sums);
  SpectralDots p{};
  p.grad = grad.data;
  p.u = u.data;
  p.vh = vh.data;
  p.sums = sums.ptr<float>();
  for (int i = 0; i < 2; ++i) {
    p.grad_stride[i] = grad.strides[i];
    p.u_stride[i] = u.strides[i];
    p.vh_stride[i] = vh.strides[i];
  }
  p.out = static_cast<int32_t>(grad.shape[0]);
  p.in = static_cast<int32_t>(grad.shape[1]);
  p.rank = static_cast<int32_t>(u.shape[1]);
  p.dtype = grad.dtype;
  p.u_dtype = u.dtype;
  p.vh_dtype = vh.dtype;
  return p;
}

}  // namespace

void spectral_dots(TensorViews sums, TensorView partial, TensorViews grads, TensorViews us,
                   TensorViews vhs) {
  std::vector<SpectralDots> layers;
  int64_t room = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    check_memory(kOp, "sums", sums[i], partial);
    const SpectralDots p = dots_layer(sums[i], grads[i], us[i], vhs[i]);
    room += (int64_t(p.out) + kDotsRows - 1) / kDotsRows * p.rank;
    if (p.rank > 0) layers.push_back(p);
  }
  FASTLORA_CHECK(partial.dtype == DType::kFloat32 && partial.numel() >= room, kOp, "partial",
                 "float32 [" + std::to_string(room) + "]", partial);
  check_contiguous(kOp, "partial", partial);
  if (layers.empty()) return;
#ifdef FASTLORA_CUDA
  FASTLORA_CHECK(!partial.cpu(), kOp, "partial", "a tensor on a GPU", partial);
  launch_spectral_dots(layers.data(), static_cast<int64_t>(layers.size()), partial.ptr<float>(),
                       partial.device.device_id, current_stream(partial));
#else
  FASTLORA_CHECK(false, kOp, "grads", "CPU tensors (this build has no CUDA kernels)", partial);
#endif
}

void dots_of_product(TensorView sums, TensorView product, TensorView u) {
  check_memory(kOp, "product", product, sums);
  check_memory(kOp, "u", u, sums);
  check_contiguous(kOp, "sums", sums);
  FASTLORA_CHECK(sums.dtype == DType::kFloat64 || sums.dtype == DType::kFloat32, kOp, "sums",
                 "float64 or float32", sums);
  FASTLORA_CHECK(sums.cpu(), kOp, "sums", "a CPU tensor", sums);
  FASTLORA_CHECK(product.shape[0] <= 1 || product.shape[1] <= 1 || product.strides[1] == 1, kOp,
                 "product", "contiguous rows", product);
  FASTLORA_CHECK(u.dtype == product.dtype, kOp, "u", name_of(product.dtype), u);
  const DotsOfProduct p{sums, product, u};
  if (product.numel() == 0) return;
  const WithoutGil others_may_run;
  FASTLORA_CPU_CALL(dots_of_product_loop, p);
}

}  // namespace fastlora
