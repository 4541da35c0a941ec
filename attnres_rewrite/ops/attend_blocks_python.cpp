// What Python calls of attend_blocks.cpp, after which this is compiled: lists of tensors in the place of addresses.
//
// Between two calls a model's weights pass through the caches, so that all that Python touches for a call has left them,
// and an array of addresses made in Python costs as much as a quarter of phase one. Nothing here needs a header of PyTorch,
// which would take seconds to compile: it gives the address of a function that finds the data of a tensor.

#include <Python.h>

#include <exception>

namespace {

void* (*data_of)(PyObject*) = nullptr;

// The data of every tensor of a list, null for None.
template <typename Data>
std::vector<Data> data_of_each(PyObject* tensors) {
  std::vector<Data> found(PyList_GET_SIZE(tensors));
  for (size_t i = 0; i < found.size(); ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors, i);
    found[i] = tensor == Py_None ? nullptr : static_cast<Data>(data_of(tensor));
  }
  return found;
}

template <typename Data>
Data* unless_empty(std::vector<Data>& found) {
  return found.empty() ? nullptr : found.data();
}

// Others may use the interpreter while this lives.
struct Released {
  PyThreadState* state = PyEval_SaveThread();
  ~Released() { PyEval_RestoreThread(state); }
};

// No exception of C++ may reach the interpreter.
template <typename Call>
void raising(Call call) {
  try {
    call();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

}  // namespace

// The address of a function from a tensor, as Python has it, to its data.
extern "C" void find_data_with(int64_t address) { data_of = reinterpret_cast<void* (*)(PyObject*)>(address); }

// Lists of tensors as `attend` takes them; `gains` may be empty.
extern "C" void attend_lists(PyObject* blocks, PyObject* queries, PyObject* gains, PyObject* mixed, PyObject* log_sums,
                             int64_t rows, int64_t width, int64_t threads, double eps, double scale) {
  raising([=] {
    auto x = data_of_each<const void*>(blocks);
    auto q = data_of_each<const A*>(queries), g = data_of_each<const A*>(gains);
    auto m = data_of_each<void*>(mixed);
    auto l = data_of_each<A*>(log_sums);
    const Sizes z{int64_t(x.size()), int64_t(q.size()), rows, width, threads, eps, scale};
    const Released released;
    attend(z, x.data(), q.data(), unless_empty(g), m.data(), l.data());
  });
}

// Lists of tensors as `attend_backward` takes them; `gains`, `d_queries` and `d_gains` may be empty.
extern "C" void attend_backward_lists(PyObject* blocks, PyObject* queries, PyObject* gains, PyObject* d_mixed,
                                      PyObject* d_log_sums, PyObject* added, PyObject* d_blocks, PyObject* d_queries,
                                      PyObject* d_gains, int64_t rows, int64_t width, int64_t threads, double eps,
                                      double scale) {
  raising([=] {
    auto x = data_of_each<const void*>(blocks), dm = data_of_each<const void*>(d_mixed);
    auto q = data_of_each<const A*>(queries), g = data_of_each<const A*>(gains), dl = data_of_each<const A*>(d_log_sums);
    auto more = data_of_each<const void*>(added);
    auto dx = data_of_each<void*>(d_blocks);
    auto dq = data_of_each<A*>(d_queries), dg = data_of_each<A*>(d_gains);
    const Sizes z{int64_t(x.size()), int64_t(q.size()), rows, width, threads, eps, scale};
    const Released released;
    attend_backward(z, x.data(), q.data(), unless_empty(g), dm.data(), dl.data(), more.data(), dx.data(),
                    unless_empty(dq), unless_empty(dg));
  });
}
