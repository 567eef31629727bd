// The operators, as PyTorch sees them.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "attention.h"
#include "choice.h"
#include "linear.h"

namespace {

using at::Tensor;

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;  // the hardware multiplies pairs of bfloat16
#else
constexpr bool kPairs = false;
#endif

#define PARLAY_DISPATCH(type, ...)                           \
  AT_DISPATCH_SWITCH(type, "parlay",                         \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

#define PARLAY_DISPATCH_WEIGHT(type, ...)                    \
  AT_DISPATCH_SWITCH(type, "parlay",                         \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) AT_DISPATCH_CASE(at::kChar, __VA_ARGS__))

// weight: [outputs, inputs] -> [panels, inputs, panel], in the order in which `linear` reads it.
Tensor pack_weight(const Tensor& weight) {
  const Tensor whole = weight.contiguous();
  const int64_t outputs = whole.size(0), inputs = whole.size(1);
  Tensor packed = at::empty({(outputs + parlay::kPanel - 1) / parlay::kPanel, inputs, parlay::kPanel}, whole.options());
  PARLAY_DISPATCH_WEIGHT(whole.scalar_type(), [&] {
    TORCH_CHECK(inputs % parlay::Layout<scalar_t>::kInputs == 0, "narrow weights: inputs must come in pairs");
    parlay::pack(whole.const_data_ptr<scalar_t>(), outputs, inputs, packed.data_ptr<scalar_t>());
  });
  return packed;
}

// x: [..., inputs]; scale, of whole numbers' lines, and bias: [outputs] -> [..., outputs].
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& scale,
              const std::optional<Tensor>& bias, int64_t outputs) {
  const int64_t inputs = packed.size(1);
  TORCH_CHECK(x.size(-1) == inputs && packed.size(2) == parlay::kPanel && packed.is_contiguous());
  TORCH_CHECK(outputs <= packed.size(0) * parlay::kPanel && (!bias || bias->numel() == outputs));
  TORCH_CHECK(!scale || (scale->numel() == outputs && scale->scalar_type() == at::kFloat && scale->is_contiguous()));
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor y = at::empty(shape, x.options());
  const bool pairs = kPairs && x.scalar_type() == at::kBFloat16 && packed.scalar_type() == at::kBFloat16;
  const Tensor given = (pairs ? x : x.to(at::kFloat)).contiguous();
  const int64_t tokens = given.numel() / inputs;
  const Tensor wide_bias = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const parlay::After after{scale ? scale->const_data_ptr<float>() : nullptr,
                            bias ? wide_bias.const_data_ptr<float>() : nullptr};
  using parlay::bfloat16;
  if constexpr (kPairs) {
    if (pairs) {
      parlay::linear(given.const_data_ptr<bfloat16>(), tokens, inputs, packed.const_data_ptr<bfloat16>(), after,
                     y.data_ptr<bfloat16>(), outputs);
      return y;
    }
  }
  const auto run = [&](auto* to) {
    PARLAY_DISPATCH_WEIGHT(packed.scalar_type(), [&] {
      parlay::linear(given.const_data_ptr<float>(), tokens, inputs, packed.const_data_ptr<scalar_t>(), after, to, outputs);
    });
  };
  PARLAY_DISPATCH(y.scalar_type(), [&] { run(y.data_ptr<scalar_t>()); });
  return y;
}

// Writes the step's keys and values, then attends; see attention.h. A window or softcap of 0 is none.
Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, Tensor pool, const Tensor& slots,
              const Tensor& pages, const Tensor& row, const Tensor& known, const Tensor& ancestors, double scale,
              int64_t window, double softcap) {
  TORCH_CHECK(pool.is_contiguous() && pool.scalar_type() == query.scalar_type());
  TORCH_CHECK(pool.size(3) == key.size(2) + value.size(2) && query.size(1) % key.size(1) == 0);
  const Tensor q = query.contiguous(), k = key.contiguous(), v = value.contiguous();
  Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  PARLAY_DISPATCH(q.scalar_type(), [&] {
    parlay::write(pool.data_ptr<scalar_t>(), slots.const_data_ptr<int64_t>(), k.const_data_ptr<scalar_t>(),
                  v.const_data_ptr<scalar_t>(), k.size(0), k.size(1), k.size(2), v.size(2));
    parlay::attend(parlay::Attention<scalar_t>{
        q.const_data_ptr<scalar_t>(), pool.const_data_ptr<scalar_t>(), pages.const_data_ptr<int64_t>(),
        row.const_data_ptr<int64_t>(), known.const_data_ptr<int64_t>(), ancestors.const_data_ptr<int64_t>(),
        out.data_ptr<scalar_t>(), q.size(0), q.size(1), k.size(1), k.size(2), v.size(2), pool.size(1), pages.size(1),
        ancestors.size(1), static_cast<float>(scale), static_cast<float>(softcap), window});
  });
  return out;
}

// The first largest of every line: [lines, size] -> [lines].
Tensor argmax(const Tensor& values) {
  TORCH_CHECK(values.dim() == 2 && values.is_contiguous() && values.size(1) > 0);
  const int64_t size = values.size(1);
  Tensor out = at::empty({values.size(0)}, values.options().dtype(at::kLong));
  int64_t* to = out.data_ptr<int64_t>();
  PARLAY_DISPATCH(values.scalar_type(), [&] {
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    at::parallel_for(0, values.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) to[line] = parlay::argmax(from + line * size, size);
    });
  });
  return out;
}

// Temperature, top-k, top-p and min-p of every line, the latter three [lines]; see choice.h. [lines, size] -> the same.
Tensor truncate_lines(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                      const Tensor& min_p) {
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0);
  const int64_t size = logits.size(1);
  Tensor out = at::empty_like(logits);
  const float* from = logits.const_data_ptr<float>();
  const double *temperatures = temperature.const_data_ptr<double>(), *masses = top_p.const_data_ptr<double>();
  const double* shares = min_p.const_data_ptr<double>();
  const int64_t* counts = top_k.const_data_ptr<int64_t>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t line = begin; line < end; ++line)
      parlay::truncate(from + line * size, size, static_cast<float>(temperatures[line]),
                       {counts[line], masses[line], shares[line]}, scratch, to + line * size);
  });
  return out;
}

// Where a share of every line's mass ends, the shares [lines]; see choice.h. [lines, size] -> [lines].
Tensor draw(const Tensor& mass, const Tensor& share) {
  TORCH_CHECK(mass.dim() == 2 && mass.is_contiguous() && mass.size(1) > 0 && share.numel() == mass.size(0));
  const int64_t size = mass.size(1);
  Tensor out = at::empty({mass.size(0)}, mass.options().dtype(at::kLong));
  const float* from = mass.const_data_ptr<float>();
  const double* shares = share.const_data_ptr<double>();
  int64_t* to = out.data_ptr<int64_t>();
  at::parallel_for(0, mass.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> ends;
    for (int64_t line = begin; line < end; ++line) to[line] = parlay::draw(from + line * size, size, shares[line], ends);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(parlay, library) {
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, int outputs) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) pool, Tensor slots, Tensor pages, Tensor row, "
      "Tensor known, Tensor ancestors, float scale, int window, float softcap) -> Tensor");
  library.def("argmax(Tensor values) -> Tensor");
  library.def("truncate(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p) -> Tensor");
  library.def("draw(Tensor mass, Tensor share) -> Tensor");
}

TORCH_LIBRARY_IMPL(parlay, CPU, library) {
  library.impl("pack_weight", &pack_weight);
  library.impl("linear", &linear);
  library.impl("attend", &attend);
  library.impl("argmax", &argmax);
  library.impl("truncate", &truncate_lines);
  library.impl("draw", &draw);
}
