// Vectors of kLanes floats (GCC's vector extension), conversions and activations.
//
// Included by each kernels_*.cc inside its unnamed namespace, and compiled with its own flags: nothing may be shared
// between them. So there are no headers of the standard library either, whose inline functions would be.

constexpr int kLanes = DBRX_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

#define INLINE inline __attribute__((always_inline))

template <typename Vector>
INLINE Vector Load(const void* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename Vector>
INLINE void Store(void* to, Vector v) {
  __builtin_memcpy(to, &v, sizeof v);
}

INLINE Floats Select(Ints condition, Floats yes, Floats no) {
  return (Floats)((condition & (Ints)yes) | (~condition & (Ints)no));
}

INLINE float FromBfloat16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

INLINE uint16_t ToBfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE float ElementOf(const void* array, bool is_bfloat16, int64_t i) {
  return is_bfloat16 ? FromBfloat16(((const uint16_t*)array)[i]) : ((const float*)array)[i];
}

// Bytes of `count` inputs or outputs of a kind that are consecutive in memory.
INLINE int64_t BytesOf(Kind kind, int64_t count) {
  switch (kind) {
    case Kind::kFloat32: return 4 * count;
    case Kind::kBfloat16: return 2 * count;
    case Kind::kInt4: return count / 2;
    default: return count;
  }
}

INLINE float SumLanes(Floats v) {
  float lanes[kLanes];
  Store(lanes, v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// e^x, with a relative error of about 1e-7 (Cephes' polynomial).
INLINE Floats Exp(Floats x) {
  const Floats low = (Floats){} - 87.0f, high = (Floats){} + 88.0f;
  x = Select(x < low, low, Select(x > high, high, x));  // NaN stays
  const Floats shift = (Floats){} + 12582912.0f;        // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (x * 1.44269504f + shift) - shift;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints exponent = (Ints)(n + shift) - (Ints)shift + 127;
  return p * (Floats)(exponent << 23);
}

INLINE Floats Activate(Activation activation, Floats x) {
  if (activation == Activation::kRelu) return Select(x < 0.0f, (Floats){}, x);
  if (activation == Activation::kGelu) {
    for (int i = 0; i < kLanes; ++i) x[i] *= 0.5f * __builtin_erfcf(-0.70710678f * x[i]);
    return x;
  }
  // gelu's 0.5 (1 + tanh(z)) is a sigmoid of 2 z.
  const Floats z = activation == Activation::kSilu ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
  return x / (1.0f + Exp(-z));
}

void Gate(Activation activation, float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    Store(gate + i, Activate(activation, Load<Floats>(gate + i)) * Load<Floats>(up + i));
}

INLINE Floats OfIntegers(Ints v) { return __builtin_convertvector(v, Floats); }

INLINE Floats OfFp8(Bytes bytes) {
  const Ints bits = __builtin_convertvector(bytes, Ints), magnitude = bits & 127;
  const Floats normal = (Floats)((magnitude << 20) + (120 << 23)), subnormal = OfIntegers(magnitude) * 0x1p-9f;
  const Floats value = Select(magnitude < 8, subnormal, normal);
  const Floats or_nan = Select(magnitude == 127, (Floats){} + __builtin_nanf(""), value);
  return (Floats)((Ints)or_nan | ((bits & 128) << 24));
}

// kLanes weights that are consecutive in memory, of any kind but int4.
template <Kind kind>
INLINE Floats LoadFloats(const uint8_t* from) {
  if constexpr (kind == Kind::kFloat32) return Load<Floats>(from);
  else if constexpr (kind == Kind::kBfloat16) return (Floats)(__builtin_convertvector(Load<Halves>(from), Words) << 16);
  else if constexpr (kind == Kind::kInt8) return OfIntegers(__builtin_convertvector(Load<SignedBytes>(from), Ints));
  else return OfFp8(Load<Bytes>(from));
}

INLINE Floats LowNibbles(const uint8_t* from) {
  return OfIntegers((__builtin_convertvector(Load<Bytes>(from), Ints) << 28) >> 28);
}

INLINE Floats HighNibbles(const uint8_t* from) {
  return OfIntegers((__builtin_convertvector(Load<Bytes>(from), Ints) << 24) >> 28);
}
