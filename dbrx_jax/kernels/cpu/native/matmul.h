// The kernels of kernels.h for a Mode (float32.h or bfloat16.h), which says what registers hold and how they multiply.

typedef Mode::Element Element;

constexpr int kLine = 64;      // bytes of a line of the caches
constexpr int kAhead = 8192;   // bytes that are prefetched ahead where weights are read as they are stored

INLINE void Prefetch(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }  // to the second level: it can wait for more

INLINE int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A row of x for DotRows has each group of inputs padded with zeros to whole units.
INLINE int64_t PaddedGroup(const Weight& w) { return RoundUp(w.group(), Mode::kStep); }

int64_t PreparedBytes(const Weight& w, bool contracts_rows) {
  const int64_t count = contracts_rows ? RoundUp(w.inputs, Mode::kInputs) : w.groups * PaddedGroup(w);
  return sizeof(Element) * count;
}

void Prepare(const Weight& w, bool contracts_rows, const void* x, bool x_is_bfloat16, void* prepared) {
  Element* to = (Element*)prepared;
  const int64_t groups = contracts_rows ? 1 : w.groups, group = w.inputs / groups;
  const int64_t padded = contracts_rows ? RoundUp(group, Mode::kInputs) : PaddedGroup(w);
  for (int64_t g = 0; g < groups; ++g, to += padded) {
    for (int64_t c = 0; c < padded; ++c) {
      const float value = c < group ? ElementOf(x, x_is_bfloat16, g * group + c) : 0.0f;
      to[contracts_rows ? c : Mode::Position(w.kind, c)] = Mode::ToElement(value);
    }
  }
}

// A copy of the last bytes of a row, followed by zeros, for loads that would reach behind it.
struct Padded {
  uint8_t bytes[128] = {};
  INLINE Padded(const uint8_t* from, int64_t count) { __builtin_memcpy(bytes, from, count); }
};

// Multiplies `rows` rows of x with outputs m to last, as many at once as registers hold sums.
template <Kind kind, bool is_grouped, int rows>
void DotBlock(const Weight& w, int64_t m, int64_t last, const Element* const* x, float* const* sums, int64_t column) {
  constexpr int kFit = Mode::kSums / (is_grouped ? 2 : 1) / rows, kOutputs = kFit > 4 ? 4 : kFit > 1 ? kFit : 1;
  constexpr int kStepBytes = BytesOf(kind, Mode::kStep), kUnroll = kStepBytes < kLine ? kLine / kStepBytes : 1;
  const int64_t row_bytes = BytesOf(kind, w.inputs), group = w.group(), padded = PaddedGroup(w);
  for (; m < last; m += kOutputs, column += kOutputs) {
    const uint8_t* from[kOutputs];
    int64_t output[kOutputs];
    for (int o = 0; o < kOutputs; ++o) {
      output[o] = m + o < last ? m + o : last - 1;
      from[o] = (const uint8_t*)w.values + output[o] * row_bytes;
    }
    Floats total[rows][kOutputs] = {};
    for (int64_t g = 0; g < (is_grouped ? w.groups : 1); ++g) {
      Mode::Sums partial[rows][kOutputs];
      for (int r = 0; r < rows; ++r)
        for (int o = 0; o < kOutputs; ++o) partial[r][o] = Mode::Zero();
      const Element* factors[rows];
      for (int r = 0; r < rows; ++r) factors[r] = x[r] + g * padded;
      auto multiply = [&](int64_t c) __attribute__((always_inline)) {
        Mode::Unit weights[kOutputs];
        for (int o = 0; o < kOutputs; ++o) weights[o] = Mode::LoadUnit<kind>(from[o] + BytesOf(kind, g * group + c));
        for (int r = 0; r < rows; ++r)
          for (int o = 0; o < kOutputs; ++o) Mode::MultiplyAdd(partial[r][o], weights[o], factors[r] + c);
      };
      int64_t c = 0;
      for (; c + kUnroll * Mode::kStep <= group; c += kUnroll * Mode::kStep) {
        for (int o = 0; o < kOutputs; ++o)
          for (int i = 0; i < kUnroll * kStepBytes; i += kLine)
            Prefetch(from[o] + BytesOf(kind, g * group + c) + kAhead + i);
        for (int u = 0; u < kUnroll; ++u) multiply(c + u * Mode::kStep);
      }
      for (; c + Mode::kStep <= group; c += Mode::kStep) multiply(c);
      if (c < group) {
        for (int o = 0; o < kOutputs; ++o) {
          const Padded rest(from[o] + BytesOf(kind, g * group + c), BytesOf(kind, group - c));
          const Mode::Unit weights = Mode::LoadUnit<kind>(rest.bytes);
          for (int r = 0; r < rows; ++r) Mode::MultiplyAdd(partial[r][o], weights, factors[r] + c);
        }
      }
      for (int o = 0; o < kOutputs; ++o) {
        const float scale = w.scale ? ElementOf(w.scale, w.scale_is_bfloat16, output[o] * w.groups + g) : 1.0f;
        for (int r = 0; r < rows; ++r) total[r][o] += Mode::Total(partial[r][o]) * scale;
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int o = 0; o < kOutputs && m + o < last; ++o) sums[r][column + o] = SumLanes(total[r][o]);
  }
}

template <Kind kind, bool is_grouped, int rows = Mode::kMaxRows>
INLINE void DotBlocks(const Weight& w, int64_t first, int64_t last, const Element* const* x, int64_t num_rows,
                      float* const* sums) {
  if (num_rows >= rows || rows == 1)
    DotBlock<kind, is_grouped, rows>(w, first, last, x, sums, 0);
  else if constexpr (rows > 1)
    DotBlocks<kind, is_grouped, rows - 1>(w, first, last, x, num_rows, sums);
}

template <Kind kind>
void DotRows(const Weight& w, int64_t first, int64_t last, const void* const* x, int64_t rows, float* const* sums) {
  const Element* const* factors = (const Element* const*)x;
  for (int64_t r = 0; r < rows; r += Mode::kMaxRows) {
    if (kind == Kind::kInt4 && w.groups > 1)
      DotBlocks<kind, kind == Kind::kInt4>(w, first, last, factors + r, rows - r, sums + r);
    else
      DotBlocks<kind, false>(w, first, last, factors + r, rows - r, sums + r);
  }
}

// Bytes of a row of a weight (inputs, outputs); int4 has two inputs in a row of bytes.
INLINE int64_t InputBytes(Kind kind, int64_t outputs) {
  return kind == Kind::kInt4 ? outputs : BytesOf(kind, outputs);
}

// kLanes scales, or the `valid` that there are.
INLINE Floats LoadScales(const Weight& w, int64_t first, int64_t valid) {
  const int64_t size = w.scale_is_bfloat16 ? 2 : 4;
  const uint8_t* from = (const uint8_t*)w.scale + first * size;
  const Padded rest(from, valid > 0 && valid < kLanes ? size * valid : 0);
  if (valid < kLanes) from = rest.bytes;
  return w.scale_is_bfloat16 ? LoadFloats<Kind::kBfloat16>(from) : LoadFloats<Kind::kFloat32>(from);
}

// Adds the products of rows of x and inputs c to `end`, as many as registers hold, to kColumns outputs from m on.
// is_whole: all of these inputs and outputs are there.
template <Kind kind, bool is_grouped, bool is_whole>
void AddBlock(const Weight& w, int64_t c, int64_t end, int64_t m, const Element* const* x, int64_t rows,
              float* const* sums, int64_t column) {
  constexpr int kVectors = Mode::kColumns / kLanes;
  constexpr int input_rows = kind == Kind::kInt4 ? 2 : 1;  // inputs in a row of bytes
  const int64_t row_bytes = InputBytes(kind, w.outputs), valid = w.outputs - m;
  // The processor prefetches wider weights itself, and better.
  const bool is_new_line = kind != Kind::kFloat32 && kind != Kind::kBfloat16 && InputBytes(kind, m) % kLine == 0;
  const int64_t left = (end - c + Mode::kInputs - 1) / Mode::kInputs;
  const int count = is_whole || left > Mode::kTiles ? Mode::kTiles : left;
  Mode::Tile tiles[Mode::kTiles];
  for (int t = 0; t < count; ++t) {
    const int64_t input = c + t * Mode::kInputs;
    const uint8_t* at = (const uint8_t*)w.values + InputBytes(kind, m) + input / input_rows * row_bytes;
    const uint8_t* second = at + row_bytes;
    if (is_whole) {
      if (is_new_line) {  // of the next inputs, and of their neighbours if they have rows of their own
        Prefetch(at + Mode::kTiles * Mode::kInputs * row_bytes / input_rows);
        if (Mode::kInputs > input_rows) Prefetch(second + Mode::kTiles * Mode::kInputs * row_bytes);
      }
      tiles[t] = Mode::LoadTile<kind>(at, second, t);
    } else {
      const int64_t bytes = InputBytes(kind, valid < Mode::kColumns ? valid : Mode::kColumns);
      const Padded row(at, bytes), next(second, kind != Kind::kInt4 && input + 1 < end ? bytes : 0);
      tiles[t] = Mode::LoadTile<kind>(row.bytes, next.bytes, t);
    }
  }
  Floats scales[kVectors];
  if (is_grouped)
    for (int v = 0; v < kVectors; ++v)
      scales[v] = LoadScales(w, c / w.group() * w.outputs + m + v * kLanes, is_whole ? kLanes : valid - v * kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = sums[r] + column;
    Floats added[kVectors];
    for (int v = 0; v < kVectors; ++v) added[v] = is_grouped ? Floats{} : Load<Floats>(to + v * kLanes);
    for (int t = 0; t < count; ++t) Mode::MultiplyAdd(added, tiles[t], x[r] + c + t * Mode::kInputs);
    for (int v = 0; v < kVectors; ++v) {
      if (is_grouped) added[v] = Load<Floats>(to + v * kLanes) + added[v] * scales[v];
      Store(to + v * kLanes, added[v]);
    }
  }
}

template <Kind kind, bool is_grouped>
void AddBlocks(const Weight& w, int64_t first, int64_t last, const Element* const* x, int64_t rows,
               float* const* sums) {
  constexpr int kInputs = Mode::kTiles * Mode::kInputs;
  for (int64_t begin = 0; begin < w.inputs; begin += w.group()) {
    const int64_t end = begin + w.group();
    for (int64_t c = begin; c < end; c += kInputs) {
      for (int64_t m = first; m < last; m += Mode::kColumns) {
        if (c + kInputs <= end && m + Mode::kColumns <= w.outputs)
          AddBlock<kind, is_grouped, true>(w, c, end, m, x, rows, sums, m - first);
        else
          AddBlock<kind, is_grouped, false>(w, c, end, m, x, rows, sums, m - first);
      }
    }
  }
}

template <Kind kind>
void AddRows(const Weight& w, int64_t first, int64_t last, const void* const* x, int64_t rows, float* const* sums) {
  const int64_t padded = RoundUp(last - first, kColumnAlignment);
  for (int64_t r = 0; r < rows; ++r) __builtin_memset(sums[r], 0, 4 * padded);
  const Element* const* factors = (const Element* const*)x;
  if (kind == Kind::kInt4 && w.groups > 1)
    return AddBlocks<kind, kind == Kind::kInt4>(w, first, last, factors, rows, sums);
  AddBlocks<kind, false>(w, first, last, factors, rows, sums);
  if (w.scale == nullptr) return;
  for (int64_t m = first; m < last; m += kLanes) {
    const Floats scales = LoadScales(w, m, w.outputs - m);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = sums[r] + m - first;
      Store(to, Load<Floats>(to) * scales);
    }
  }
}

typedef void (*Multiply)(const Weight&, int64_t, int64_t, const void* const*, int64_t, float* const*);

void DotRowsOfAnyKind(const Weight& w, int64_t first, int64_t last, const void* const* x, int64_t rows,
                      float* const* sums) {
  static const Multiply kByKind[] = {DotRows<Mode::kFirstKind>, DotRows<Kind::kBfloat16>, DotRows<Kind::kInt8>,
                                     DotRows<Kind::kInt4>, DotRows<Kind::kFp8>};
  kByKind[(int)w.kind](w, first, last, x, rows, sums);
}

void AddRowsOfAnyKind(const Weight& w, int64_t first, int64_t last, const void* const* x, int64_t rows,
                      float* const* sums) {
  static const Multiply kByKind[] = {AddRows<Mode::kFirstKind>, AddRows<Kind::kBfloat16>, AddRows<Kind::kInt8>,
                                     AddRows<Kind::kInt4>, AddRows<Kind::kFp8>};
  kByKind[(int)w.kind](w, first, last, x, rows, sums);
}

constexpr Kernels kKernels = {PreparedBytes, Prepare, DotRowsOfAnyKind, AddRowsOfAnyKind, Gate};
