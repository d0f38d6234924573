// Vectors of kLanes floats (GCC's vector extension), conversions and activations.
//
// Included by each kernels_*.cc inside its unnamed namespace, and compiled with its own flags: nothing may be shared
// between them. So there are no headers of the standard library either, whose inline functions would be.

constexpr int kLanes = DBRX_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

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
INLINE constexpr int64_t BytesOf(Kind kind, int64_t count) {
  switch (kind) {
    case Kind::kFloat32: return 4 * count;
    case Kind::kBfloat16: return 2 * count;
    case Kind::kInt4: return count / 2;
    default: return count;
  }
}

// Integers from bytes or halves. GCC converts such vectors slowly where it has one instruction for it.
#if DBRX_LANES == 16
INLINE Ints OfSigned(const void* from) { return (Ints)_mm512_cvtepi8_epi32(Load<__m128i>(from)); }
INLINE Ints OfBytes(const void* from) { return (Ints)_mm512_cvtepu8_epi32(Load<__m128i>(from)); }
INLINE Ints OfHalves(const void* from) { return (Ints)_mm512_cvtepu16_epi32(Load<__m256i>(from)); }
INLINE Floats OfInts(Ints v) { return (Floats)_mm512_cvtepi32_ps((__m512i)v); }
INLINE float SumLanes(Floats v) { return _mm512_reduce_add_ps((__m512)v); }
#elif defined(__AVX2__)
INLINE Ints OfSigned(const void* from) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
INLINE Ints OfBytes(const void* from) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
INLINE Ints OfHalves(const void* from) { return (Ints)_mm256_cvtepu16_epi32(Load<__m128i>(from)); }
INLINE Floats OfInts(Ints v) { return (Floats)_mm256_cvtepi32_ps((__m256i)v); }

INLINE float SumLanes(Floats v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
#else
template <typename Number>
INLINE Ints OfNumbers(const void* from) {
  Ints v;
  for (int i = 0; i < kLanes; ++i) v[i] = ((const Number*)from)[i];
  return v;
}

INLINE Ints OfSigned(const void* from) { return OfNumbers<int8_t>(from); }
INLINE Ints OfBytes(const void* from) { return OfNumbers<uint8_t>(from); }
INLINE Ints OfHalves(const void* from) { return OfNumbers<uint16_t>(from); }
INLINE Floats OfInts(Ints v) { return __builtin_convertvector(v, Floats); }

INLINE float SumLanes(Floats v) {
  float sum = v[0];
  for (int i = 1; i < kLanes; ++i) sum += v[i];
  return sum;
}
#endif

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

INLINE Floats OfFp8(const uint8_t* from) {
  const Ints bits = OfBytes(from), magnitude = bits & 127;
  const Floats normal = (Floats)((magnitude << 20) + (120 << 23)), subnormal = OfInts(magnitude) * 0x1p-9f;
  const Floats value = Select(magnitude < 8, subnormal, normal);
  const Floats or_nan = Select(magnitude == 127, (Floats){} + __builtin_nanf(""), value);
  return (Floats)((Ints)or_nan | ((bits & 128) << 24));
}

// kLanes weights that are consecutive in memory, of any kind but int4.
template <Kind kind>
INLINE Floats LoadFloats(const uint8_t* from) {
  if constexpr (kind == Kind::kFloat32) return Load<Floats>(from);
  else if constexpr (kind == Kind::kBfloat16) return (Floats)(OfHalves(from) << 16);
  else if constexpr (kind == Kind::kInt8) return OfInts(OfSigned(from));
  else return OfFp8(from);
}

INLINE Floats LowNibbles(const uint8_t* from) { return OfInts((OfBytes(from) << 28) >> 28); }
INLINE Floats HighNibbles(const uint8_t* from) { return OfInts((OfBytes(from) << 24) >> 28); }
