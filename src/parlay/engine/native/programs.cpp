// Programs that PyTorch compiled ahead of time, as an operator runs them. A library of its own: its header is not public.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>
#include <torch/library.h>

namespace {

using at::Tensor;

// What was compiled ahead of time. Two threads may run it at a time: PyTorch's own binding keeps the interpreter's lock
// for as long as a program runs, an operator does not.
struct Program : torch::CustomClassHolder {
  explicit Program(const std::string& package) : loader(package, "model", false, 2, -1) {}
  torch::inductor::AOTIModelPackageLoader loader;
};

Tensor run(const c10::intrusive_ptr<Program>& program, at::TensorList inputs) {
  return program->loader.run(inputs.vec()).at(0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(parlay, library) {
  library.class_<Program>("Program").def(torch::init<std::string>());
  library.def("run(__torch__.torch.classes.parlay.Program program, Tensor[] inputs) -> Tensor", &run);
}
