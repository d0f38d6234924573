// XLA custom calls, and the Python module that hands them to jax.ffi: matmuls and experts of small batches.

#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace dbrx {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kSums = 8192;         // floats that a thread keeps in its cache
constexpr int64_t kFewRows = 8;         // of x, whose products with a weight need to read it once
constexpr int64_t kPartBytes = 1 << 18;  // of a weight that is read several times, from a thread's second-level cache
constexpr int64_t kParts = 4;           // parts of the work for each thread, at least
constexpr int64_t kTokens = 32;         // whose rows a thread copies at a time
constexpr int64_t kBits[] = {32, 16, 8, 4, 8};  // of a weight, by Kind

// Keeps denormal numbers while it lives, so that results are the same on every thread: XLA flushes them on some.
class DenormalsKept {
#if defined(__x86_64__)
 public:
  DenormalsKept() { _mm_setcsr(before_ & ~0x8040); }  // neither flush to zero nor take for zero
  ~DenormalsKept() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#endif
};

// Runs work(0) to work(count - 1) on this thread and those of XLA's pool that are free. Only waits for what another
// thread has begun: a pool whose threads all wait in calls like this would otherwise wait for ever.
void ParallelFor(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    int64_t count;
    const std::function<void(int64_t)>* work;  // valid until all is done

    void Run() {
      const DenormalsKept kept;
      for (int64_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1, std::memory_order_release)) (*work)(i);
    }
  };
  auto state = std::make_shared<State>();
  state->count = count, state->work = &work;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->Run(); });
  state->Run();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 10000) std::this_thread::yield();
}

struct InstructionSet {
  const char* name;
  bool is_supported;
  const Kernels *float32, *bfloat16;  // by the dtype of the rows
};

// From the best to the portable one.
const std::vector<InstructionSet>& InstructionSets() {
  static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
      {"avx512_bf16", __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"), &kAvx512,
       &kAvx512Bfloat16},
      {"avx512", __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"), &kAvx512, &kAvx512},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &kAvx2, &kAvx2},
#endif
      {"portable", true, &kPortable, &kPortable},
  };
  return sets;
}

// The set of this name, or the best one: a program compiled on another processor may ask for one that is missing.
const InstructionSet& FindInstructionSet(std::string_view name) {
  const InstructionSet* best = nullptr;
  for (const InstructionSet& set : InstructionSets()) {
    if (!set.is_supported) continue;
    if (set.name == name) return set;
    if (best == nullptr) best = &set;
  }
  return *best;
}

// Reads weights from a call's arguments: values, and after quantised values their scales.
class Arguments {
 public:
  Arguments(ffi::RemainingArgs arguments, size_t first, const InstructionSet& set, bool x_is_bfloat16)
      : arguments_(arguments), next_(first), set_(set), x_is_bfloat16_(x_is_bfloat16) {}

  bool at_end() const { return next_ >= arguments_.size(); }

  ffi::AnyBuffer Next() { return arguments_.get<ffi::AnyBuffer>(next_++).value(); }

  // A weight (outputs, inputs), or (inputs, outputs).
  Weight NextWeight(bool contracts_rows) {
    const ffi::AnyBuffer values = Next();
    const int inputs = contracts_rows ? 0 : 1;
    Weight w = {KindOf(values.element_type()), false, values.dimensions()[1 - inputs], values.dimensions()[inputs], 1,
                values.untyped_data(), nullptr};
    if (w.kind == Kind::kFloat32 || w.kind == Kind::kBfloat16) return w;
    if (w.kind == Kind::kInt4) w.inputs *= 2;
    const ffi::AnyBuffer scale = Next();
    w.groups = scale.dimensions()[inputs];
    w.scale = scale.untyped_data();
    w.scale_is_bfloat16 = scale.element_type() == ffi::BF16;
    return w;
  }

  const Kernels& KernelsOf(const Weight& w) const {
    return x_is_bfloat16_ && w.kind != Kind::kFloat32 ? *set_.bfloat16 : *set_.float32;
  }

 private:
  static Kind KindOf(ffi::DataType type) {
    switch (type) {
      case ffi::F32: return Kind::kFloat32;
      case ffi::BF16: return Kind::kBfloat16;
      case ffi::S8: return Kind::kInt8;
      case ffi::U8: return Kind::kInt4;
      default: return Kind::kFp8;
    }
  }

  ffi::RemainingArgs arguments_;
  size_t next_;
  const InstructionSet& set_;
  bool x_is_bfloat16_;
};

const uint8_t* Row(const ffi::AnyBuffer& x, int64_t row) {
  return static_cast<const uint8_t*>(x.untyped_data()) + row * x.dimensions()[1] * ffi::ByteWidth(x.element_type());
}

// Writes numbers to an array of float32 or bfloat16 from element `first` on.
void Write(const float* from, int64_t count, ffi::AnyBuffer array, int64_t first) {
  if (array.element_type() == ffi::F32) {
    std::memcpy(static_cast<float*>(array.untyped_data()) + first, from, 4 * count);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(array.untyped_data()) + first;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = std::isnan(from[i]) ? (bits >> 16) | 0x40 : rounded;
  }
}

// Rows of x in the form that a kernel reads.
class PreparedRows {
 public:
  PreparedRows(const Kernels& kernels, const Weight& w, bool contracts_rows, int64_t rows)
      : stride_((kernels.prepared_bytes(w, contracts_rows) + 127) / 64 * 64 + 64),  // rows start in different sets
        bytes_(new uint8_t[stride_ * rows]), pointers_(rows) {
    for (int64_t r = 0; r < rows; ++r) pointers_[r] = bytes_.get() + r * stride_;
  }

  uint8_t* row(int64_t r) { return bytes_.get() + r * stride_; }
  const void* const* from(int64_t first) const { return pointers_.data() + first; }

 private:
  int64_t stride_;
  std::unique_ptr<uint8_t[]> bytes_;
  std::vector<const void*> pointers_;
};

// Sums of rows and `columns` outputs, on a thread's stack; as many rows as fit.
struct Sums {
  alignas(64) float values[kSums];
  float* rows[kSums / kColumnAlignment];

  explicit Sums(int64_t columns) {
    for (int64_t r = 0; r < kSums / columns; ++r) rows[r] = values + r * columns;
  }
};

// Outputs of w that a thread takes at a time: a power of two. `weights` weights like it are multiplied by up to `rows`
// rows each.
int64_t PartOf(const Weight& w, bool contracts_rows, int64_t rows, int64_t weights, int64_t threads) {
  int64_t most = kSums / kFewRows;
  if (rows > kFewRows && contracts_rows) most /= 4;
  if (rows > kFewRows && !contracts_rows) most = kPartBytes * 8 / (w.inputs * kBits[static_cast<int>(w.kind)] + 1);
  int64_t part = kColumnAlignment;
  while (2 * part <= most && part < w.outputs && kParts * threads * 2 * part <= w.outputs * weights) part *= 2;
  return part;
}

// x w^T for each weight (outputs, inputs), or x w for each (inputs, outputs).
ffi::Error Matmul(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, bool contracts_rows,
                  std::string_view instruction_set) {
  const ffi::AnyBuffer x = args.get<ffi::AnyBuffer>(0).value();
  const bool x_is_bfloat16 = x.element_type() == ffi::BF16;
  Arguments arguments(args, 1, FindInstructionSet(instruction_set), x_is_bfloat16);
  struct Product {
    Weight weight;
    const Kernels* kernels;
    std::shared_ptr<PreparedRows> x;
    ffi::AnyBuffer result;
    int64_t part, first_item;
  };
  const int64_t rows = x.dimensions()[0];
  std::vector<Product> products;
  int64_t items = 0;
  for (size_t i = 0; !arguments.at_end(); ++i) {
    const Weight w = arguments.NextWeight(contracts_rows);
    const Kernels& kernels = arguments.KernelsOf(w);
    std::shared_ptr<PreparedRows> prepared;
    if (i > 0 && products[0].weight.kind == w.kind && products[0].weight.groups == w.groups) {
      prepared = products[0].x;
    } else {
      prepared = std::make_shared<PreparedRows>(kernels, w, contracts_rows, rows);
      for (int64_t r = 0; r < rows; ++r)
        kernels.prepare(w, contracts_rows, Row(x, r), x_is_bfloat16, prepared->row(r));
    }
    const int64_t part = PartOf(w, contracts_rows, rows, 1, pool.num_threads());
    products.push_back({w, &kernels, prepared, *results.get<ffi::AnyBuffer>(i).value(), part, items});
    items += (w.outputs + part - 1) / part;
  }
  ParallelFor(pool, items, [&](int64_t item) {
    auto next = std::upper_bound(products.begin(), products.end(), item,
                                 [](int64_t item, const Product& p) { return item < p.first_item; });
    const Product& p = *std::prev(next);
    const int64_t first = (item - p.first_item) * p.part, last = std::min(first + p.part, p.weight.outputs);
    const int64_t most = kSums / p.part;
    Sums sums(p.part);
    for (int64_t begin = 0; begin < rows; begin += most) {
      const int64_t count = std::min(most, rows - begin);
      auto multiply = contracts_rows ? p.kernels->add_rows : p.kernels->dot_rows;
      multiply(p.weight, first, last, p.x->from(begin), count, sums.rows);
      for (int64_t r = 0; r < count; ++r)
        Write(sums.rows[r], last - first, p.result, (begin + r) * p.weight.outputs + first);
    }
  });
  return ffi::Error::Success();
}

// Pairs of a token and its k-th expert, n K + k, sorted by expert; those of experts that are not here are left out.
struct Groups {
  std::vector<int64_t> pairs, starts;  // starts[e] is the first pair of expert e
  std::vector<int64_t> active;         // experts with a pair
  int64_t most = 0;                    // pairs of an expert

  Groups(const int32_t* experts, int64_t num_pairs, int64_t num_experts) : starts(num_experts + 1) {
    auto is_here = [&](int64_t p) { return experts[p] >= 0 && experts[p] < num_experts; };
    for (int64_t p = 0; p < num_pairs; ++p)
      if (is_here(p)) ++starts[experts[p] + 1];
    for (int64_t e = 0; e < num_experts; ++e) {
      if (starts[e + 1]) active.push_back(e);
      most = std::max(most, starts[e + 1]);
      starts[e + 1] += starts[e];
    }
    pairs.resize(starts[num_experts]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t p = 0; p < num_pairs; ++p)
      if (is_here(p)) pairs[next[experts[p]]++] = p;
  }
};

// The weighted sum of each token's experts: x (N, D), weights (N, K), experts (N, K), then w1, v1, w2 of each expert.
ffi::Error Experts(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> result,
                   int32_t activation, std::string_view instruction_set) {
  const ffi::AnyBuffer x = args.get<ffi::AnyBuffer>(0).value();
  const float* weights = args.get<ffi::AnyBuffer>(1).value().typed_data<float>();
  const ffi::AnyBuffer indices = args.get<ffi::AnyBuffer>(2).value();
  const int64_t tokens = x.dimensions()[0], top_k = indices.dimensions()[1];
  const bool x_is_bfloat16 = x.element_type() == ffi::BF16;
  struct Expert {
    Weight w1, v1, w2;
  };
  std::vector<Expert> experts;
  Arguments arguments(args, 3, FindInstructionSet(instruction_set), x_is_bfloat16);
  while (!arguments.at_end()) {
    const Weight w1 = arguments.NextWeight(false), v1 = arguments.NextWeight(false);
    experts.push_back({w1, v1, arguments.NextWeight(true)});
  }
  const Weight &in = experts[0].w1, &out = experts[0].w2;
  const int64_t hidden = in.outputs, width = in.inputs;
  const Kernels &in_kernels = arguments.KernelsOf(in), &out_kernels = arguments.KernelsOf(out);
  const Groups groups(indices.typed_data<int32_t>(), tokens * top_k, experts.size());
  const int64_t num_pairs = groups.pairs.size(), num_active = groups.active.size();

  PreparedRows inputs(in_kernels, in, false, tokens), activated(out_kernels, out, true, num_pairs);
  ParallelFor(pool, (tokens + kTokens - 1) / kTokens, [&](int64_t item) {
    for (int64_t n = item * kTokens; n < std::min(tokens, (item + 1) * kTokens); ++n)
      in_kernels.prepare(in, false, Row(x, n), x_is_bfloat16, inputs.row(n));
  });
  std::vector<const void*> rows(num_pairs);  // of the pairs
  for (int64_t p = 0; p < num_pairs; ++p) rows[p] = inputs.row(groups.pairs[p] / top_k);

  const int64_t in_part = PartOf(in, false, groups.most, num_active, pool.num_threads());
  const int64_t in_parts = (hidden + in_part - 1) / in_part;
  ParallelFor(pool, num_active * in_parts, [&](int64_t item) {
    const int64_t e = groups.active[item / in_parts], first = item % in_parts * in_part;
    const int64_t last = std::min(first + in_part, hidden), end = groups.starts[e + 1], most = kSums / in_part;
    Weight part = experts[e].w2;
    part.inputs = 2;
    const int64_t offset = out_kernels.prepared_bytes(part, true) / 2 * first;
    part.inputs = last - first;
    Sums gate(in_part), up(in_part);
    for (int64_t begin = groups.starts[e]; begin < end; begin += most) {
      const int64_t count = std::min(most, end - begin);
      in_kernels.dot_rows(experts[e].w1, first, last, &rows[begin], count, gate.rows);
      in_kernels.dot_rows(experts[e].v1, first, last, &rows[begin], count, up.rows);
      for (int64_t r = 0; r < count; ++r) {
        in_kernels.gate(static_cast<Activation>(activation), gate.rows[r], up.rows[r], last - first);
        out_kernels.prepare(part, true, gate.rows[r], false, activated.row(begin + r) + offset);
      }
    }
  });

  std::unique_ptr<float[]> outputs(new float[tokens * top_k * width]);  // of all pairs, times their weights
  const int64_t out_part = PartOf(out, true, groups.most, num_active, pool.num_threads());
  const int64_t out_parts = (width + out_part - 1) / out_part;
  ParallelFor(pool, num_active * out_parts, [&](int64_t item) {
    const int64_t e = groups.active[item / out_parts], first = item % out_parts * out_part;
    const int64_t last = std::min(first + out_part, width), end = groups.starts[e + 1], most = kSums / out_part;
    Sums sums(out_part);
    for (int64_t begin = groups.starts[e]; begin < end; begin += most) {
      const int64_t count = std::min(most, end - begin);
      out_kernels.add_rows(experts[e].w2, first, last, activated.from(begin), count, sums.rows);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t pair = groups.pairs[begin + r];
        for (int64_t i = 0; i < last - first; ++i)
          outputs[pair * width + first + i] = weights[pair] * sums.rows[r][i];
      }
    }
  });

  const int32_t* expert = indices.typed_data<int32_t>();
  const int64_t num_experts = experts.size();
  ParallelFor(pool, (tokens + kTokens - 1) / kTokens, [&](int64_t item) {
    std::vector<float> sum(width);
    for (int64_t n = item * kTokens; n < std::min(tokens, (item + 1) * kTokens); ++n) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t pair = n * top_k; pair < (n + 1) * top_k; ++pair)
        if (expert[pair] >= 0 && expert[pair] < num_experts)
          for (int64_t i = 0; i < width; ++i) sum[i] += outputs[pair * width + i];
      Write(sum.data(), width, *result, n * width);
    }
  });
  return ffi::Error::Success();
}

auto Call() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs(); }
XLA_FFI_DEFINE_HANDLER(kMatmul, Matmul,
                       Call().RemainingRets().Attr<bool>("contracts_rows").Attr<std::string_view>("instruction_set"));
XLA_FFI_DEFINE_HANDLER(kExperts, Experts,
                       Call().Ret<ffi::AnyBuffer>().Attr<int32_t>("activation")
                           .Attr<std::string_view>("instruction_set"));

PyObject* InstructionSetNames(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const InstructionSet& set : InstructionSets()) {
    if (!set.is_supported) continue;
    PyObject* name = PyUnicode_FromString(set.name);
    PyList_Append(names, name);
    Py_DECREF(name);
  }
  return names;
}

PyObject* Targets(PyObject*, PyObject*) {
  return Py_BuildValue("{s:N,s:N}", "dbrx_matmul", PyCapsule_New(reinterpret_cast<void*>(kMatmul), nullptr, nullptr),
                       "dbrx_experts", PyCapsule_New(reinterpret_cast<void*>(kExperts), nullptr, nullptr));
}

PyMethodDef methods[] = {
    {"instruction_sets", InstructionSetNames, METH_NOARGS, "Returns the processor's instruction sets, best first."},
    {"targets", Targets, METH_NOARGS, "Returns XLA's custom calls by name, as capsules for jax.ffi."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace dbrx

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&dbrx::module); }
