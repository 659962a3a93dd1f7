// Runs one kernel of kernels.cu as a program of its own: what AddressSanitizer needs.
//
//   kernels NAME ELEMENTS:BYTES:ROLE ...     arrays hold 0, 1, 2, ...
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" const char* run_kernel(const char* name, void** arrays, const int64_t* elements,
                                  const int32_t* bytes, const int32_t* roles, int count, int runs,
                                  uint64_t seed);

int main(int argc, char** argv) {
  std::vector<std::vector<int32_t>> memory;
  std::vector<void*> arrays;
  std::vector<int64_t> elements;
  std::vector<int32_t> bytes, roles;
  for (int i = 2; i < argc; ++i) {
    long long n = 0;
    int size = 0, role = 0;
    if (std::sscanf(argv[i], "%lld:%d:%d", &n, &size, &role) != 3) return 2;
    memory.emplace_back(static_cast<size_t>((n * size + 3) / 4));
    for (size_t k = 0; k < memory.back().size(); ++k) memory.back()[k] = int32_t(k);
    elements.push_back(n);
    bytes.push_back(size);
    roles.push_back(role);
  }
  for (auto& m : memory) arrays.push_back(m.data());
  const char* error = run_kernel(argv[1], arrays.data(), elements.data(), bytes.data(),
                                 roles.data(), int(arrays.size()), 4, 0);
  if (error == nullptr) return 0;
  std::puts(error);
  return 1;
}
