#include "dispatcher.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

#include "python_tensor.h"

namespace py = pybind11;

namespace fastlora {
namespace {

struct Guard {
  PyObject* query;
  PyObject* idle;
};

std::vector<Guard> g_guards;
PyObject* g_forward_ad = nullptr;        // the module dict of torch.autograd.forward_ad
PyObject* g_grad_enabled = nullptr;      // torch.is_grad_enabled
PyObject* g_set_grad_enabled = nullptr;  // torch._C._set_grad_enabled
PyObject* g_is_neg = nullptr;            // torch.Tensor.is_neg, unbound
PyObject* g_requires_grad = nullptr;
PyObject* g_current_level = nullptr;
std::atomic<PyTypeObject*> g_dtype{nullptr};  // torch.dtype, a static type, once seen
std::atomic<int64_t> g_plans{0};              // which set of plans is in use

py::object call(PyObject* function) {
  PyObject* result = PyObject_CallNoArgs(function);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Nothing but plain eager execution may look at memory: a mode, a transform or a tracer has to see
// the operator through torch's dispatcher.
bool plain_eager() {
  for (const Guard& guard : g_guards)
    if (call(guard.query).ptr() != guard.idle) return false;
  return true;
}

bool forward_ad_active() {
  PyObject* level = PyDict_GetItem(g_forward_ad, g_current_level);
  return level != nullptr && PyLong_AsLong(level) >= 0;
}

// Gradient mode is off while it lives; it was on.
class WithoutGrad {
 public:
  WithoutGrad() {
    if (!set(Py_False)) throw py::error_already_set();
  }
  ~WithoutGrad() {
    const py::error_scope raised;  // is kept
    set(Py_True);
  }

 private:
  static bool set(PyObject* mode) {
    const auto none =
        py::reinterpret_steal<py::object>(PyObject_CallOneArg(g_set_grad_enabled, mode));
    return static_cast<bool>(none);
  }
};

// The signature: everything of the arguments that a plan may depend on, as words. Floats are left
// out on purpose: a strength must not cost a plan.
class Signature {
 public:
  static constexpr size_t kCapacity = 384;

  enum class Kind : int64_t { kNone = 1, kInt, kFloat, kTensor, kList, kOther };

  Signature() { word(g_plans.load(std::memory_order_relaxed)); }

  bool full() const { return size_ >= kCapacity; }
  bool has_tensor_subclass() const { return subclass_; }
  bool requires_grad() const { return requires_grad_; }

  // An argument of the operator: beside the words, its view for a native plan.
  void add_argument(PyObject* object, bool check_grad) {
    const size_t index = arguments_++;
    if (index < kMaxNativeArguments) argument_ = &views_[index];
    add(object, check_grad);
    argument_ = nullptr;
  }
  const TensorView* views() const { return views_; }

  void add(PyObject* object, bool check_grad) {
    if (full()) {
      // Too long to remember; the guards of the remaining tensors still have to be read.
      inspect_only(object, check_grad);
      return;
    }
    if (object == Py_None) return push(Kind::kNone, 0);
    if (is_plain_tensor(object)) return add_tensor(object, check_grad);
    if (PyFloat_Check(object)) return push(Kind::kFloat, 0);
    if (PyLong_Check(object)) return push(Kind::kInt, PyLong_AsLongLong(object));
    if (PyList_Check(object) || PyTuple_Check(object)) {
      const Py_ssize_t n = PySequence_Fast_GET_SIZE(object);
      push(Kind::kList, n);
      for (Py_ssize_t i = 0; i < n; ++i) add(PySequence_Fast_GET_ITEM(object, i), check_grad);
      return;
    }
    // A torch.dtype is a singleton, so its address is its value; a tensor subclass goes through
    // the dispatcher.
    // Asking costs more than all the rest where the answer is no, so torch.dtype is remembered.
    if (Py_TYPE(object) != g_dtype) {
      if (PyObject_HasAttrString(object, "__torch_function__")) {
        subclass_ = true;
        return;
      }
      if (std::strcmp(Py_TYPE(object)->tp_name, "torch.dtype") == 0) g_dtype = Py_TYPE(object);
    }
    push(Kind::kOther, reinterpret_cast<int64_t>(object));
  }

  std::string key() const {
    return std::string(reinterpret_cast<const char*>(words_), size_ * sizeof(int64_t));
  }
  std::string_view view() const {
    return {reinterpret_cast<const char*>(words_), size_ * sizeof(int64_t)};
  }

 private:
  void push(Kind kind, int64_t value) {
    word(static_cast<int64_t>(kind));
    word(value);
  }
  void word(int64_t value) {
    if (size_ < kCapacity) words_[size_++] = value;
  }
  void inspect_only(PyObject* object, bool check_grad) {
    if (PyList_Check(object) || PyTuple_Check(object)) {
      const Py_ssize_t n = PySequence_Fast_GET_SIZE(object);
      for (Py_ssize_t i = 0; i < n; ++i)
        inspect_only(PySequence_Fast_GET_ITEM(object, i), check_grad);
    } else if (is_plain_tensor(object)) {
      read_flags(object, check_grad);
    } else if (object != Py_None && PyObject_HasAttrString(object, "__torch_function__")) {
      subclass_ = true;
    }
  }
  void read_flags(PyObject* object, bool check_grad) {
    // The exchange API drops the negative bit: the data would be read with the wrong sign.
    PyObject* args[1] = {object};
    py::object neg =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(g_is_neg, args, 1, nullptr));
    if (!neg) throw py::error_already_set();
    if (neg.ptr() == Py_True)
      throw py::value_error(
          "fastlora: a tensor with the negative bit set is not supported; "
          "call .resolve_neg() on it first");
    if (check_grad && !requires_grad_) {
      py::object flag =
          py::reinterpret_steal<py::object>(PyObject_GetAttr(object, g_requires_grad));
      if (!flag) throw py::error_already_set();
      requires_grad_ = flag.ptr() == Py_True;
    }
  }
  void add_tensor(PyObject* object, bool check_grad) {
    read_flags(object, check_grad);
    TensorView t;
    try {
      t = view_of(object);
    } catch (const py::error_already_set&) {
      subclass_ = true;  // what DLPack cannot describe (meta, sparse) is for torch's dispatcher
      return;
    }
    if (argument_ != nullptr) *argument_ = t;
    const bool real = t.data != nullptr || t.numel() == 0;
    push(Kind::kTensor, (int64_t(t.dtype) << 32) | (int64_t(t.ndim) << 8) | (real ? 4 : 0) |
                            (t.aligned(16) ? 2 : 0) | (t.aligned(64) ? 1 : 0));
    word((int64_t(t.device.device_type) << 32) | uint32_t(t.device.device_id));
    for (int32_t i = 0; i < t.ndim; ++i) word(t.shape[i]);
    for (int32_t i = 0; i < t.ndim; ++i) word(t.strides[i]);
  }

  int64_t words_[kCapacity];
  size_t size_ = 0;
  TensorView views_[kMaxNativeArguments];  // undefined for what is not a tensor
  TensorView* argument_ = nullptr;
  size_t arguments_ = 0;
  bool subclass_ = false;
  bool requires_grad_ = false;
};

// Plans of one operator. `miss(*args)` checks the contract and returns a plan; `dispatch(*args)` is
// torch's dispatcher; `reference(*args)` plain PyTorch.
class Dispatcher {
 public:
  Dispatcher(py::object miss, py::object dispatch, py::object reference, bool differentiable)
      : miss_(std::move(miss)),
        dispatch_(std::move(dispatch)),
        reference_(std::move(reference)),
        differentiable_(differentiable) {}

  // Guards first; what is not plain eager execution without gradients goes to the dispatcher.
  PyObject* eager(PyObject* const* args, Py_ssize_t n) {
    // Operators have no forward-mode formula, and torch would drop the tangents without a word.
    if (forward_ad_active()) return PyObject_Vectorcall(reference_.ptr(), args, n, nullptr);
    if (!plain_eager()) return PyObject_Vectorcall(dispatch_.ptr(), args, n, nullptr);
    const bool grad = call(g_grad_enabled).ptr() == Py_True;
    Signature signature;
    for (Py_ssize_t i = 0; i < n; ++i) signature.add_argument(args[i], differentiable_ && grad);
    if (signature.has_tensor_subclass() || signature.requires_grad())
      return PyObject_Vectorcall(dispatch_.ptr(), args, n, nullptr);
    if (differentiable_ || !grad) return run(signature, args, n);
    const WithoutGrad off;
    return run(signature, args, n);
  }

  // Below the dispatcher: no guards, the same plans.
  PyObject* kernel(PyObject* const* args, Py_ssize_t n) {
    Signature signature;
    for (Py_ssize_t i = 0; i < n; ++i) signature.add_argument(args[i], false);
    return run(signature, args, n);
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_.clear();
  }
  size_t size() const { return plans_.size(); }

 private:
  static constexpr size_t kMaxPlans = 4096;  // dynamic shapes must not grow without bound

  PyObject* run(const Signature& signature, PyObject* const* args, Py_ssize_t n) {
    py::object plan;
    if (!signature.full()) plan = find(signature);
    if (!plan) {
      plan = py::reinterpret_steal<py::object>(PyObject_Vectorcall(miss_.ptr(), args, n, nullptr));
      if (!plan) return nullptr;
      if (!signature.full()) store(signature, plan);
    }
    if (PyCapsule_CheckExact(plan.ptr())) {
      void* native = PyCapsule_GetPointer(plan.ptr(), kNativePlan);
      return native == nullptr ? nullptr : reinterpret_cast<NativePlan>(native)(signature.views());
    }
    return PyObject_Vectorcall(plan.ptr(), args, n, nullptr);
  }
  py::object find(const Signature& signature) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(signature.key());
    return found == plans_.end() ? py::object() : found->second;
  }
  void store(const Signature& signature, const py::object& plan) {
    std::unordered_map<std::string, py::object> dropped;  // decref outside of the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kMaxPlans) dropped.swap(plans_);
    plans_.emplace(signature.key(), plan);
  }

  py::object miss_;
  py::object dispatch_;
  py::object reference_;
  const bool differentiable_;  // without it nobody asks for a gradient
  std::mutex mutex_;
  std::unordered_map<std::string, py::object> plans_;
};

// pybind11's own argument handling would cost as much as a small kernel, so the two entry points
// are plain vectorcall functions bound to a Dispatcher.
template <PyObject* (Dispatcher::*method)(PyObject* const*, Py_ssize_t)>
PyObject* enter(PyObject* self, PyObject* const* args, Py_ssize_t n) {
  try {
    auto* dispatcher = static_cast<Dispatcher*>(PyCapsule_GetPointer(self, "fastlora.Dispatcher"));
    return (dispatcher->*method)(args, n);
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const py::builtin_exception& e) {
    e.set_error();
  } catch (const std::invalid_argument& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

template <class F>
PyCFunction as_method(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef g_eager{"eager", as_method(&enter<&Dispatcher::eager>), METH_FASTCALL, nullptr};
PyMethodDef g_kernel{"kernel", as_method(&enter<&Dispatcher::kernel>), METH_FASTCALL, nullptr};

// Returns (eager, kernel, clear, size). A Dispatcher lives as long as the process, as operators do.
py::tuple make_dispatcher(py::object miss, py::object dispatch, py::object reference,
                          bool differentiable) {
  auto* d =
      new Dispatcher(std::move(miss), std::move(dispatch), std::move(reference), differentiable);
  const py::capsule self(d, "fastlora.Dispatcher");
  return py::make_tuple(py::reinterpret_steal<py::object>(PyCFunction_New(&g_eager, self.ptr())),
                        py::reinterpret_steal<py::object>(PyCFunction_New(&g_kernel, self.ptr())),
                        py::cpp_function([d] { d->clear(); }),
                        py::cpp_function([d] { return d->size(); }));
}

}  // namespace

void set_guards(py::list guards, py::dict forward_ad, py::object grad_enabled,
                py::object set_grad_enabled, py::object is_neg) {
  g_guards.clear();
  for (py::handle item : guards) {
    auto pair = py::reinterpret_borrow<py::tuple>(item);
    g_guards.push_back({py::object(pair[0]).release().ptr(), py::object(pair[1]).release().ptr()});
  }
  g_forward_ad = forward_ad.release().ptr();
  g_grad_enabled = grad_enabled.release().ptr();
  g_set_grad_enabled = set_grad_enabled.release().ptr();
  g_is_neg = is_neg.release().ptr();
  g_requires_grad = PyUnicode_InternFromString("requires_grad");
  g_current_level = PyUnicode_InternFromString("_current_level");
}

void bind_dispatcher(py::module_& m) {
  m.def("set_guards", &set_guards);
  m.def("make_dispatcher", &make_dispatcher);
  // Plans made under another number are not found, nor lost: CPU tensors on the emulator.
  m.def("set_plans", [](int64_t number) { g_plans = number; });
}

}  // namespace fastlora
